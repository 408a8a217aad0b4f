// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The word of a chunk: its fields, and nothing about who may change them.
//!
//! The version has the top bits, so that it wraps without touching its neighbours; the writes in
//! flight have 20 bits, far more than all rings together can hold requests.

use crate::core::chunk::ChunkState;
use crate::core::message::Version;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

const STATE: u64 = 0b111;
pub(super) const SLOW: u64 = 1 << 3;
pub(super) const WRITER: u64 = 1 << 4;
pub(super) const WRITERS: u64 = 0xf_ffff << 4;
const VERSION_SHIFT: u32 = 24;
const VERSION: u64 = 1 << VERSION_SHIFT;

pub(super) fn state_of(word: u64) -> ChunkState {
    // 3 bits, of which only values of `ChunkState` are ever stored.
    u8::try_from(word & STATE).ok().and_then(ChunkState::from_number).unwrap_or(ChunkState::Installing)
}

pub(super) fn with_state(word: u64, state: ChunkState) -> u64 {
    word & !STATE | state as u64
}

pub(super) fn version_of(word: u64) -> Version {
    Version(word >> VERSION_SHIFT)
}

pub(super) fn with_version(word: u64, version: Version) -> u64 {
    word & (VERSION - 1) | version.0 << VERSION_SHIFT
}

pub(super) fn writers_of(word: u64) -> u64 {
    (word & WRITERS) / WRITER
}

/// The word after a step of its version; 40 bits wrap, and no write rate reaches that within one migration.
pub(super) fn bumped(word: u64) -> u64 {
    if state_of(word) == ChunkState::Remote { word } else { word.wrapping_add(VERSION) }
}

pub(super) fn update(word: &AtomicU64, change: impl Fn(u64) -> u64) -> u64 {
    word.fetch_update(SeqCst, SeqCst, |now| Some(change(now))).unwrap_or_else(|now| now)
}

/// The word of a chunk that nobody uses.
pub(super) fn idle(state: ChunkState, version: Version) -> u64 {
    with_version(state as u64, version)
}
