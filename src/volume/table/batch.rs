// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of several chunks under one set of locks and with one note.

use super::word::{SLOW, WRITERS, state_of, update, version_of, with_state, with_version, writers_of};
use super::{Claim, Due, SHARDS, Shard, Table, TableError};
use crate::core::chunk::{ChunkState, after_claim, check_move};
use crate::core::geometry::{BlockMask, ChunkId};
use crate::store::Transition;
use crate::volume::waiters::Waiter;
use parking_lot::MutexGuard;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// The locks of several shards, taken in rising order so that two threads cannot wait for each other.
struct Locked<'a>(Vec<(u32, MutexGuard<'a, Shard>)>);

impl<'a> Locked<'a> {
    fn all_of(table: &'a Table, chunks: impl Iterator<Item = ChunkId>) -> Self {
        // 64 shards: one bit each.
        let wanted = BlockMask(chunks.fold(0, |bits, chunk| bits | 1u64 << (chunk.0 % SHARDS)));
        let guards = wanted.runs().flatten().map(|n| (n, table.shards[n as usize].lock()));
        Self(guards.collect())
    }

    fn of(&mut self, chunk: ChunkId) -> &mut Shard {
        let at = self.0.partition_point(|(n, _)| *n < chunk.0 % SHARDS);
        // Locked by `all_of` for every chunk that is asked for.
        &mut self.0[at].1
    }
}

impl Table {
    /// Publishes the claims of completed writes: one note for all of them. Returns the chunks that were `Remote` and
    /// are whole now. The writes stay counted: call [`end_write`](Self::end_write) for each afterwards.
    ///
    /// # Errors
    /// [`TableError`]: none of the claims has been published.
    pub(in crate::volume) fn publish(self: &Arc<Self>, claims: &[Claim]) -> Result<Vec<ChunkId>, TableError> {
        let mut wanted: Vec<(ChunkId, BlockMask)> = claims.iter().map(|c| (c.chunk, c.blocks)).collect();
        wanted.sort_unstable_by_key(|(chunk, _)| *chunk);
        wanted.dedup_by(|next, first| {
            let same = next.0 == first.0;
            if same {
                first.1 = first.1.union(next.1);
            }
            same
        });
        let mut shards = Locked::all_of(self, wanted.iter().map(|(chunk, _)| *chunk));
        let mut moves = Vec::with_capacity(wanted.len());
        for (chunk, blocks) in wanted {
            let word = self.word(chunk).load(SeqCst);
            let mask = self.mask(chunk, word);
            let (state, grown) = (state_of(word), mask.union(blocks));
            let after = after_claim(state, grown, self.geometry().full_mask(chunk));
            // Whole already, by another write: nothing to add.
            if !matches!(state, ChunkState::Base | ChunkState::Remote) || grown == mask {
                continue;
            }
            check_move(state, after)?;
            let mask = if after == state { grown } else { BlockMask::EMPTY };
            let version = version_of(word);
            moves.push((state, Transition { chunk, state: after, mask, version }));
        }
        let (overwritten, dues) = self.apply(&mut shards, &moves)?;
        drop(shards);
        dues.into_iter().for_each(Due::fire);
        Ok(overwritten)
    }

    /// Changes those of a run of chunks for which `wanted` says how, with one note. Chunks that are held, waited for
    /// or written are left alone and returned.
    ///
    /// # Errors
    /// [`TableError`]: no chunk of the run has changed.
    pub(in crate::volume) fn change(
        self: &Arc<Self>,
        run: std::ops::Range<u32>,
        wanted: impl Fn(Transition) -> Option<Transition>,
    ) -> Result<Vec<ChunkId>, TableError> {
        let mut shards = Locked::all_of(self, run.clone().map(ChunkId));
        let (mut moves, mut busy) = (Vec::new(), Vec::new());
        for chunk in run.clone().map(ChunkId) {
            // `slow` lets no writer in without the lock: what is seen here stays true while it is held.
            let word = self.word(chunk).fetch_or(SLOW, SeqCst);
            let entry = shards.of(chunk).get(&chunk);
            let mask = self.mask(chunk, word);
            let free = entry.is_none_or(|entry| entry.hold.is_none() && entry.claimants.is_empty());
            let state = state_of(word);
            if !free || writers_of(word) > 0 {
                busy.push(chunk);
            } else if let Some(to) = wanted(Transition { chunk, state, mask, version: version_of(word) }) {
                moves.push((state, to));
            }
        }
        // Nobody can come between: the same as to hold each chunk for a moment.
        let legal = moves.iter().filter(|(from, to)| *from != to.state).try_for_each(|(from, to)| {
            check_move(*from, ChunkState::Installing)?;
            check_move(ChunkState::Installing, to.state)
        });
        let applied = legal.map_err(TableError::from).and_then(|()| self.apply(&mut shards, &moves));
        if applied.is_ok() {
            for (_, to) in &moves {
                update(self.word(to.chunk), |word| with_version(word, to.version));
            }
        }
        for chunk in run.map(ChunkId) {
            self.tidy(shards.of(chunk), chunk);
        }
        drop(shards);
        applied?.1.into_iter().for_each(Due::fire);
        Ok(busy)
    }

    /// Everything untouched again, for a volume that has just been wiped. Writes in flight stay counted.
    pub(in crate::volume) fn reset(&self) {
        let mut wakes = Vec::new();
        let all: Vec<_> = self.shards.iter().map(|shard| shard.lock()).collect();
        for (word, mask) in self.words.iter().zip(self.masks.iter()) {
            // Most have never been touched: do not give them memory.
            let seen = word.load(SeqCst);
            if seen & SLOW != 0 {
                mask.store(0, Relaxed);
            }
            if seen != 0 {
                update(word, |word| word & WRITERS);
            }
        }
        self.tally.clear();
        for mut shard in all {
            wakes.extend(shard.drain().flat_map(|(_, mut entry)| entry.take_parked(|_| true)));
        }
        wakes.into_iter().for_each(Waiter::wake);
    }

    /// Notes and publishes moves of chunks whose shards are locked. Returns the chunks that were `Remote` and are
    /// whole now, and what to fire when the locks have been let go.
    fn apply(
        self: &Arc<Self>,
        shards: &mut Locked<'_>,
        moves: &[(ChunkState, Transition)],
    ) -> Result<(Vec<ChunkId>, Vec<Due>), TableError> {
        let (mut overwritten, mut dues) = (Vec::new(), Vec::new());
        if moves.is_empty() {
            return Ok((overwritten, dues));
        }
        let transitions: Vec<Transition> = moves.iter().map(|(_, transition)| *transition).collect();
        self.notes.note(&transitions)?;
        for (from, to) in moves {
            let shard = shards.of(to.chunk);
            let before = self.set(to.chunk, |word| with_state(word, to.state));
            self.set_mask(to.chunk, before, to.mask);
            let mut due = Due::default();
            if to.state != *from
                && let Some(entry) = shard.get_mut(&to.chunk)
            {
                due.wakes = entry.take_parked(|_| true);
            }
            if (*from, to.state) == (ChunkState::Remote, ChunkState::Modified) {
                overwritten.push(to.chunk);
            }
            self.settle(shard, to.chunk, &mut due);
            dues.push(due);
        }
        Ok((overwritten, dues))
    }
}
