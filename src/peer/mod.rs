// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One migration connection (layer L4): bytes of [`crate::wire`] over TCP or TLS, and nothing that a session decides.
//!
//! A *link* is one control stream and 1 to 16 data streams between two daemons. The source connects
//! ([`connect::connect`]), the destination listens ([`listen::Listener`]); both get the same [`link::PeerLink`]. All
//! streams stand or fall together: when one ends, the link is closed, what was queued is dropped, and the session
//! above connects again and sends again what was not acknowledged. Mending a single stream was rejected: the
//! session must be able to resume from nothing anyway, and one way to fail is easier to get right than two.
//!
//! Everything runs as tokio tasks (a current-thread runtime will do) and nothing blocks.

#![forbid(unsafe_code)]

pub mod connect;
pub mod link;
pub mod listen;
mod queue;
mod stream;
pub mod throttle;
pub mod tls;

pub use crate::wire::negotiate::Features;
pub use connect::{ConnectError, ConnectParams, connect};
pub use link::{CloseReason, LinkEvent, LinkOptions, LinkSender, LinkStats, PeerLink, SendError};
pub use listen::{ListenParams, Listener};
pub use throttle::Throttle;
pub use tls::{TlsClient, TlsError, TlsServer};

#[cfg(test)]
mod tests;
