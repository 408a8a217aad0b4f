// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Decisions, and nothing else (layer L0).
//!
//! Everything here is a pure function or a state machine that is told what happened and when, and answers what to
//! do. There is no I/O, no clock, no thread, no lock and no log line in this layer: the same code runs in the
//! daemon, in the simulation of two peers and in the model check.

#![forbid(unsafe_code)]
#![warn(clippy::wildcard_enum_match_arm)]

mod aside;
pub mod chunk;
pub mod destination;
pub mod geometry;
pub mod heat;
pub mod message;
pub mod ownership;
pub mod progress;
pub mod record;
pub mod set;
pub mod source;
pub mod standing;
pub mod strategy;
pub mod takeover;
