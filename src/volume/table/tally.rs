// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many chunks are in each state, without looking at all of them: a volume of 16 TiB has 64 million.
//!
//! States change under the locks of their shards, so each change is counted once. Readers take no lock: what they see
//! together may be a moment apart. `Base` is not counted but what the others leave, so that untouched chunks, of which
//! a volume has any number and gets more when it grows, need not be known here.

use crate::core::chunk::{ALL_STATES, ChunkState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct Tally([AtomicU64; ALL_STATES.len()]);

impl Tally {
    fn of(&self, state: ChunkState) -> Option<&AtomicU64> {
        self.0.get(state as usize).filter(|_| state != ChunkState::Base)
    }

    /// A chunk went from one state to another.
    pub(super) fn moved(&self, from: ChunkState, to: ChunkState) {
        if from == to {
            return;
        }
        if let Some(count) = self.of(to) {
            count.fetch_add(1, Relaxed);
        }
        if let Some(count) = self.of(from) {
            count.fetch_sub(1, Relaxed);
        }
    }

    /// So many chunks that were `Base` are in this state.
    pub(super) fn add(&self, state: ChunkState, chunks: u64) {
        if let Some(count) = self.of(state) {
            count.fetch_add(chunks, Relaxed);
        }
    }

    /// Chunks in a state that is not `Base`.
    pub(super) fn get(&self, state: ChunkState) -> u64 {
        self.of(state).map_or(0, |count| count.load(Relaxed))
    }

    /// All chunks are `Base`.
    pub(super) fn clear(&self) {
        self.0.iter().for_each(|count| count.store(0, Relaxed));
    }
}
