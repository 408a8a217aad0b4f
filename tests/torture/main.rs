// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Torture of two real daemons with real faults: processes die at exact points of the protocol, networks stall and
//! tear, disks fill up, strangers talk. After each fault the migration comes to a legal end, every block holds what
//! was acknowledged last, and never did both daemons own the disk. `tests/torture/run` does the same at length.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    missing_docs
)]
#![allow(unreachable_pub, reason = "modules of a test")]

mod bounded;
mod cases;
#[allow(dead_code, reason = "of the pair tests; each uses its own part")]
#[path = "../pair/daemon.rs"]
mod daemon;
mod ground;
#[allow(dead_code, reason = "the front-end of the vhost tests; each uses its own part")]
#[path = "../vhost/guest.rs"]
mod guest;
mod hypervisor;
mod long;
mod play;
mod proxy;
mod report;
mod stranger;
#[allow(dead_code, reason = "of the pair tests; each uses its own part")]
#[path = "../pair/world.rs"]
mod world;
#[allow(dead_code, reason = "of the pair tests; each uses its own part")]
#[path = "../pair/writer.rs"]
mod writer;
