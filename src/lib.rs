// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! blkferry: a vhost-user-blk device whose disk can move.

pub mod config;
pub mod core;
pub mod node;
