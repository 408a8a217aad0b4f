// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! blkferry: a vhost-user-blk device whose disk can move.
//!
//! The library is the daemon `blkferryd` and the client `blkferry`; the binaries only start it. Its rooms are
//! layers, and imports go down only (`tests/tidy.rs` checks that):
//!
//! | layer | room | what is in it |
//! |---|---|---|
//! | L6 | [`control`] | the API on a UNIX socket, metrics, the client, QMP |
//! | L5 | [`node`] | the companion thread: the one owner of the volume's role |
//! | L4 | [`frontend`] | the hypervisor's side: vhost-user messages, virtqueues, dirty log |
//! | L4 | [`peer`] | the other daemon's side: one migration connection |
//! | L3 | [`volume`] | the guest's I/O path: chunk table, ports, captures and installs |
//! | L2 | [`store`] | bytes at rest: layer, chunk map, records, base image |
//! | L1 | [`engine`] | file I/O on io_uring whose operations own their buffers |
//! | L1 | [`wire`] | messages to bytes and back |
//! | L0 | [`core`] | decisions: chunk states, sessions, ownership; no I/O, clock, thread or lock |
//!
//! [`config`] is data that all may read. docs/ARCHITECTURE.md has the picture and the invariants.

pub mod config;
pub mod control;
pub mod core;
pub mod engine;
pub mod frontend;
pub mod node;
pub mod peer;
pub mod store;
pub mod volume;
pub mod wire;
