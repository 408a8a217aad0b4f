// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vhost-user back-end against a front-end without a VM: real socket, real rings in shared memory, real
//! io_uring on a real file. Only the node is played, by a thread that answers its signals.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    missing_docs
)]
#![allow(unreachable_pub, reason = "modules of a test")]

mod cloud_hypervisor;
mod errors;
mod garbage;
mod guest;
mod io;
mod limits;
mod lives;
mod malformed;
mod malice;
mod matrix;
mod migration;
mod raw;
mod reconnect;
mod resize;
mod rig;
mod tuning;
