// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Holding one chunk alone: what an install, a fetch and a punch do.
//!
//! The right to a chunk is a value. Whoever has it publishes what the chunk has become, or drops it, and then the
//! chunk is what it was: a cancelled future, a queue that ends, an error on the way out all give it back.

use super::word::{bumped, state_of, version_of, with_state, with_version, writers_of};
use super::{Due, Entry, Hold, Shard, Table, TableError};
use crate::core::chunk::{ChunkState, check_move};
use crate::core::geometry::{BlockMask, ChunkId};
use crate::core::message::Version;
use crate::store::Transition;
use crate::volume::waiters::Claimant;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use tokio::sync::oneshot;

/// A chunk held alone. Dropping it gives the chunk back as it was.
#[derive(Debug)]
pub(in crate::volume) struct Exclusive {
    table: Arc<Table>,
    chunk: ChunkId,
    was: ChunkState,
    mask: BlockMask,
    version: Version,
    punch: bool,
    held: bool,
}

impl Exclusive {
    /// The chunk.
    pub(in crate::volume) fn chunk(&self) -> ChunkId {
        self.chunk
    }

    /// What it was when it was taken, with its mask and version.
    pub(in crate::volume) fn was(&self) -> (ChunkState, BlockMask, Version) {
        (self.was, self.mask, self.version)
    }

    /// Notes and publishes what the chunk is now, and lets go. Without a version it keeps its own (a punch counts
    /// as a write).
    ///
    /// # Errors
    /// [`TableError`]: the chunk has been given back as it was.
    pub(in crate::volume) fn finish(
        mut self,
        state: ChunkState,
        mask: BlockMask,
        version: Option<Version>,
    ) -> Result<(), TableError> {
        check_move(ChunkState::Installing, state)?;
        let table = Arc::clone(&self.table);
        let mut shard = table.shard(self.chunk);
        let punch = self.punch;
        let next = move |word: u64| match version {
            Some(version) => with_state(with_version(word, version), state),
            None if punch => with_state(bumped(word), state),
            None => with_state(word, state),
        };
        let noted = version_of(next(table.word(self.chunk).load(SeqCst)));
        if let Err(error) = table.notes.note(&[Transition { chunk: self.chunk, state, mask, version: noted }])
        {
            // Before `self` is dropped, which locks the shard.
            drop(shard);
            return Err(error.into());
        }
        self.held = false;
        let mut due = Due::default();
        let entry = table.entry(&mut shard, self.chunk);
        entry.hold = None;
        due.wakes = entry.take_parked(|_| true);
        let before = table.set(self.chunk, next);
        table.set_mask(self.chunk, before, mask);
        table.settle(&mut shard, self.chunk, &mut due);
        drop(shard);
        due.fire();
        Ok(())
    }
}

impl Drop for Exclusive {
    /// Gives the chunk back. Pieces that wait for its content stay parked: whoever fills tries again.
    fn drop(&mut self) {
        if !self.held {
            return;
        }
        let table = Arc::clone(&self.table);
        let mut due = Due::default();
        let mut shard = table.shard(self.chunk);
        let (was, punch) = (self.was, self.punch);
        table.set(self.chunk, |word| {
            // A punch that failed may have changed the content.
            let word = with_state(word, was);
            if punch { bumped(word) } else { word }
        });
        let entry = table.entry(&mut shard, self.chunk);
        entry.hold = None;
        due.wakes = entry.take_parked(|parked| !parked.fill);
        table.settle(&mut shard, self.chunk, &mut due);
        drop(shard);
        due.fire();
    }
}

impl Table {
    pub(super) fn hold(self: &Arc<Self>, entry: &mut Entry, chunk: ChunkId, punch: bool) -> Exclusive {
        let word = self
            .set(chunk, |word| with_state(if punch { bumped(word) } else { word }, ChunkState::Installing));
        let was = state_of(word);
        entry.hold = Some(Hold { was, punch });
        Exclusive {
            table: Arc::clone(self),
            chunk,
            was,
            mask: self.mask(chunk, word),
            version: version_of(word),
            punch,
            held: true,
        }
    }

    /// Holds the chunk now, or queues the claimant.
    pub(super) fn claim_alone(
        self: &Arc<Self>,
        shard: &mut Shard,
        chunk: ChunkId,
        claimant: Claimant,
        punch: bool,
    ) -> Result<Option<Exclusive>, TableError> {
        let entry = self.entry(shard, chunk);
        // `slow` is set: from here on this number only falls.
        let word = self.word(chunk).load(SeqCst);
        if entry.hold.is_none() && entry.claimants.is_empty() && writers_of(word) == 0 {
            check_move(state_of(word), ChunkState::Installing)?;
            return Ok(Some(self.hold(entry, chunk, punch)));
        }
        entry.claimants.push_back((claimant, punch));
        Ok(None)
    }

    /// Holds the last chunk alone if it is short, while the layer's length changes. Blocks until writes in flight have
    /// ended; not for an asynchronous context.
    pub(in crate::volume) fn hold_short_end(self: &Arc<Self>) -> Option<Exclusive> {
        let geometry = self.geometry();
        let chunk = ChunkId(geometry.chunk_count() - 1);
        if geometry.chunk_len(chunk) == geometry.chunk_size() {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        let granted = self.claim_alone(&mut self.shard(chunk), chunk, Claimant::Task(sender), false);
        // No move is illegal here, and the sender is only dropped with the table.
        granted
            .unwrap_or_else(|error| {
                log::error!("{chunk} cannot be held: {error}");
                None
            })
            .or_else(|| receiver.blocking_recv().ok())
    }

    /// Holds a chunk alone: new writers park, and the ones in flight are waited for. Dropping the future gives up.
    ///
    /// # Errors
    /// [`TableError::Illegal`], which would be a bug.
    pub(in crate::volume) async fn begin_exclusive(
        self: &Arc<Self>,
        chunk: ChunkId,
    ) -> Result<Exclusive, TableError> {
        let (sender, receiver) = oneshot::channel();
        let granted = self.claim_alone(&mut self.shard(chunk), chunk, Claimant::Task(sender), false)?;
        match granted {
            Some(exclusive) => Ok(exclusive),
            // The sender is only dropped with the table, which `self` keeps.
            None => {
                receiver.await.map_err(|_| TableError::Note(io::Error::other("the chunk table has gone")))
            }
        }
    }
}
