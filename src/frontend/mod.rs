// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hypervisor's side (layer L4): a vhost-user-blk back-end.
//!
//! [`server`] accepts one front-end after another; `handler` answers its messages; `ring` runs one thread per
//! virtqueue; `virtio_blk` turns descriptor chains into requests for the volume; [`signal`] says what the messages
//! mean to the owner of the volume's role. Nothing here decides who owns the disk: rings process only while the
//! volume's gate is open.
//!
//! `vhost-user-backend` was rejected: no hook for SET_VRING_ENABLE or SET_LOG_BASE, an error ends the connection,
//! a daemon object serves one connection, and SET_VRING_ADDR can rewind a live ring (docs/ARCHITECTURE.md).

mod back_channel;
mod busy_poll;
pub mod device_state;
mod dirty_log;
pub mod features;
mod handler;
mod inflight;
mod mapping;
mod memory;
mod ring;
mod ring_mem;
pub mod server;
mod sigbus;
pub mod signal;
mod virtio_blk;
mod virtqueue;

#[doc(hidden)]
pub mod fuzzing {
    //! What the fuzz targets need of the parser.
    pub use super::memory::{GuestMemory, GuestRange, RegionInfo, View};
    pub use super::ring_mem::{RingAddresses, RingMemory};
    pub use super::virtio_blk::{Action, Chain, ChainError};
}
