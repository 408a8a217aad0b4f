// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Chunks that stand alike, as runs: the unit of journal and checkpoint, and the table that recovery builds.
//!
//! A fresh or an adopted volume is one run, whatever its size; a flat table would cost 24 bytes a chunk before the
//! first I/O.

use super::codec::{Reader, Writer};
use crate::core::chunk::ChunkState;
use crate::core::geometry::{BlockMask, ChunkId};
use crate::core::message::Version;
use std::collections::BTreeMap;

/// How a chunk stands from now on: absolute, so that applying it twice, or after a newer snapshot, does no harm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    /// The chunk.
    pub chunk: ChunkId,
    /// Its state; never `Installing`, which is noted as the state that it came from.
    pub state: ChunkState,
    /// Blocks valid in the layer, in `Base` and `Remote`; ignored in other states.
    pub mask: BlockMask,
    /// Its version.
    pub version: Version,
}

/// Consecutive chunks that stand alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First chunk.
    pub first: ChunkId,
    /// Number of chunks, at least 1.
    pub count: u32,
    /// State of each.
    pub state: ChunkState,
    /// Valid blocks of each.
    pub mask: BlockMask,
    /// Version of each.
    pub version: Version,
}

/// Bytes of a run on disk.
pub(super) const RUN_BYTES: usize = 32;

impl From<Transition> for Run {
    fn from(one: Transition) -> Self {
        let mask = if keeps_mask(one.state) { one.mask } else { BlockMask::EMPTY };
        Self { first: one.chunk, count: 1, state: one.state, mask, version: one.version }
    }
}

fn keeps_mask(state: ChunkState) -> bool {
    matches!(state, ChunkState::Base | ChunkState::Remote)
}

impl Run {
    /// The run of a whole volume of `chunks` chunks in one state.
    pub(super) fn whole(chunks: u32, state: ChunkState) -> Self {
        Self { first: ChunkId(0), count: chunks, state, mask: BlockMask::EMPTY, version: Version(0) }
    }

    /// The chunk after the last one.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.first.0.saturating_add(self.count)
    }

    /// Each chunk on its own.
    pub fn transitions(self) -> impl Iterator<Item = Transition> {
        let Self { state, mask, version, .. } = self;
        (self.first.0..self.end()).map(move |n| Transition { chunk: ChunkId(n), state, mask, version })
    }

    /// Takes `next` in, if it goes on where this run ends and stands alike.
    pub(super) fn join(&mut self, next: &Self) -> bool {
        let alike = (self.state, self.mask, self.version) == (next.state, next.mask, next.version);
        if !alike || self.end() != next.first.0 {
            return false;
        }
        self.count += next.count;
        true
    }

    pub(super) fn write(&self, out: &mut Writer) {
        out.u32(self.first.0).u32(self.count).u8(self.state as u8).bytes(&[0; 7]);
        out.u64(self.mask.0).u64(self.version.0);
    }

    /// The next run, if it is one that [`write`](Self::write) can have written for a volume of `chunks` chunks.
    pub(super) fn read(input: &mut Reader<'_>, chunks: u32) -> Option<Self> {
        let (first, count) = (ChunkId(input.u32()?), input.u32()?);
        let state = ChunkState::from_number(input.u8()?)?;
        let padding = input.array::<7>()?;
        let (mask, version) = (BlockMask(input.u64()?), Version(input.u64()?));
        let fits = count > 0 && first.0.checked_add(count).is_some_and(|end| end <= chunks);
        let plain = padding == [0; 7] && state != ChunkState::Installing;
        (fits && plain && (mask.is_empty() || keeps_mask(state))).then_some(Self {
            first,
            count,
            state,
            mask,
            version,
        })
    }
}

/// Joins neighbours that stand alike.
pub(super) fn merged(runs: impl Iterator<Item = Run>) -> impl Iterator<Item = Run> {
    let mut runs = runs.peekable();
    std::iter::from_fn(move || {
        let mut run = runs.next()?;
        while runs.next_if(|next| run.join(next)).is_some() {}
        Some(run)
    })
}

/// All chunks of a volume as runs that cover it without gaps, by their first chunk.
#[derive(Debug)]
pub(super) struct RunTable(BTreeMap<u32, Run>);

impl RunTable {
    pub(super) fn new(runs: impl Iterator<Item = Run>) -> Self {
        Self(runs.map(|run| (run.first.0, run)).collect())
    }

    /// Replaces what the table says of the chunks of `new`.
    pub(super) fn set(&mut self, new: Run) {
        self.cut(new.first.0);
        self.cut(new.end());
        if new.count == 1 {
            self.0.insert(new.first.0, new);
            return;
        }
        let covered: Vec<u32> = self.0.range(new.first.0..new.end()).map(|(first, _)| *first).collect();
        for first in covered {
            self.0.remove(&first);
        }
        self.0.insert(new.first.0, new);
    }

    /// Makes a run start at `chunk`.
    fn cut(&mut self, chunk: u32) {
        let Some((_, run)) = self.0.range_mut(..chunk).next_back() else { return };
        if run.end() <= chunk {
            return;
        }
        let tail = Run { first: ChunkId(chunk), count: run.end() - chunk, ..*run };
        run.count -= tail.count;
        self.0.insert(chunk, tail);
    }

    pub(super) fn into_runs(self) -> Vec<Run> {
        merged(self.0.into_values()).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    pub(in super::super) fn any_run(chunks: u32) -> impl Strategy<Value = Run> {
        (0..chunks, 1..=chunks, 0u8..6, any::<u64>(), 0u64..4).prop_map(
            move |(first, count, state, mask, version)| {
                // Every state but `Installing`, which is never noted.
                let state = ChunkState::from_number(if state == 5 { 6 } else { state }).unwrap();
                let mask = if keeps_mask(state) { BlockMask(mask) } else { BlockMask::EMPTY };
                Run {
                    first: ChunkId(first),
                    count: count.min(chunks - first),
                    state,
                    mask,
                    version: Version(version),
                }
            },
        )
    }

    proptest! {
        #[test]
        fn a_run_survives_its_bytes(run in any_run(1000)) {
            let mut out = Writer::default();
            run.write(&mut out);
            prop_assert_eq!(out.0.len(), RUN_BYTES);
            prop_assert_eq!(Run::read(&mut Reader(&out.0), 1000), Some(run));
            prop_assert_eq!(Run::read(&mut Reader(&out.0), run.end() - 1), None);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..40), chunks: u32) {
            let _ = Run::read(&mut Reader(&bytes), chunks);
        }

        #[test]
        fn the_table_is_a_flat_one_in_short(runs in prop::collection::vec(any_run(50), 0..30)) {
            let mut table = RunTable::new(std::iter::once(Run::whole(50, ChunkState::Base)));
            let mut flat: Vec<Transition> = Run::whole(50, ChunkState::Base).transitions().collect();
            for run in runs {
                table.set(run);
                run.transitions().for_each(|one| flat[one.chunk.index()] = one);
            }
            let short = table.into_runs();
            prop_assert!(short.windows(2).all(|pair| pair[0].end() == pair[1].first.0));
            let joined = merged(short.iter().copied()).count();
            prop_assert_eq!(joined, short.len());
            prop_assert_eq!(short.into_iter().flat_map(Run::transitions).collect::<Vec<_>>(), flat);
        }
    }
}
