// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control plane over its real sockets: the API and its client, the follower, the `blkferry` program.
//!
//! The node and QEMU are played by scripts, because what matters here is what happens when one of them fails at a
//! certain step; the real ones cannot be told to.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod api;
mod cli;
mod disks;
mod follow;
mod node;
mod qemu;
mod qmp;
