// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two real daemons and a front-end without a VM: a disk moves between them while a writer uses it, checks every
//! answer against its own record, and reads the whole disk at the end. The front-end plays the hypervisor: it stops
//! the rings at one daemon and starts them at the other, on the same guest memory. Daemons are killed, ended and
//! started again under it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    missing_docs
)]
#![allow(unreachable_pub, reason = "modules of a test")]

mod away;
#[allow(dead_code, reason = "tests/torture uses more of it")]
mod daemon;
mod disks;
#[allow(dead_code, reason = "the front-end of the vhost tests; each uses its own part")]
#[path = "../vhost/guest.rs"]
mod guest;
mod kills;
mod moves;
mod recover;
mod resize;
mod returns;
mod world;
#[allow(dead_code, reason = "tests/torture uses more of it")]
mod writer;
