// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's I/O path (layer L3).
//!
//! A queue thread turns descriptor chains into [`Request`]s and gives them to its [`Port`]; the companion thread
//! captures, installs and fetches chunks through [`Transfer`]. Both meet in the chunk table, and nowhere else. Facts
//! go up as [`VolumeEvent`]s, writes through the [`Tracker`].

mod event;
mod gate;
#[cfg(test)]
mod growth_tests;
mod port;
mod recovery;
mod request;
mod table;
#[cfg(test)]
mod testing;
mod tracker;
mod transfer;
#[allow(clippy::module_inception, reason = "the room is named after what it is about")]
mod volume;
mod waiters;

pub use event::{Origin, VolumeEvent, VolumeEvents};
pub use gate::{Closed, FlushGate, Gate};
pub use port::{MAX_BATCH, Port, PortEvent};
pub use request::{Rejected, Request, RequestOp, Status, Token};
pub use table::TableError;
pub use tracker::{DirtyCallback, Tracker};
pub use transfer::{Captured, InstallPhase, Installed, Transfer, TransferError};
pub use volume::{IoTotals, StateCounts, Volume, VolumeOptions};
pub use waiters::Waker;
