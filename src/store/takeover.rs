// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes a state directory the owner of its disk by force. Whether it may, `core::takeover` has decided.
//!
//! The order is what a crash in between leaves: first it is written down what is going to be done; then what had not
//! survived a crash of the host is remote, durably; then the file `forced`, which counts for nothing before the record
//! does; then the record; and only under a record that says that this side owns the disk are lost chunks made what the
//! operator wants them to be. Until then they are remote, and an owner without a source answers them with errors.
//! Whatever is cut off is done again by the same command.

use super::error::StoreError;
use super::{Forced, Run, Store, Transition, forced};
use crate::core::chunk::ChunkState;
use crate::core::geometry::BlockMask;
use crate::core::message::VolumeId;
use crate::core::record::{MigrationRecord, Role};
use crate::core::takeover::LostChunks;

/// Chunks that are noted at a time.
const BATCH: usize = 1024;

/// What is to be done.
#[derive(Debug)]
pub struct TakeOver<'a> {
    /// The chunks as they count from now on.
    pub runs: &'a [Run],
    /// They are not what the map has.
    pub reverts: bool,
    /// The ownership; `None` at a side that owns the disk and only settles what it has lost.
    pub forced: Option<(VolumeId, Forced)>,
    /// What becomes of chunks that are remote.
    pub lost: LostChunks,
    /// For the log, before anything is changed.
    pub begins: &'a str,
    /// For the log, when all is done.
    pub ends: &'a str,
}

impl Store {
    /// What an operator has forced, if it is in force.
    ///
    /// # Errors
    /// [`StoreError`]: the file is unreadable or damaged.
    pub fn forced(&self) -> Result<Option<Forced>, StoreError> {
        let record = self.record.load();
        let loaded = forced::load(self.state.folder().as_ref())?;
        Ok(super::look::in_force(loaded, record.as_ref().map(|(record, _)| record)))
    }

    /// Carries a takeover out; see the module's header. Durable when this returns.
    ///
    /// # Errors
    /// [`StoreError`]: call it again, with what a new look shows.
    pub fn take_over(&self, plan: &TakeOver<'_>) -> Result<(), StoreError> {
        let folder = self.state.folder().as_ref();
        forced::log(folder, plan.begins)?;
        if plan.reverts {
            self.change(plan.runs.iter().flat_map(|run| run.transitions()))?;
        }
        if let Some((volume, forced)) = &plan.forced {
            forced::store(folder, forced)?;
            let record = MigrationRecord::V1 { volume: *volume, epoch: forced.after, role: Role::Serving };
            let path = folder.path(super::record::NAME);
            self.record.store(&record).map_err(StoreError::io("write", &path))?;
        }
        let remote = plan.runs.iter().filter(|run| run.state == ChunkState::Remote);
        self.settle_lost(remote.flat_map(|run| run.transitions()), plan.lost)?;
        forced::log(folder, plan.ends)
    }

    /// Makes remote chunks what the operator wants them to be.
    fn settle_lost(
        &self,
        remote: impl Iterator<Item = Transition>,
        lost: LostChunks,
    ) -> Result<(), StoreError> {
        let mut settled = Vec::new();
        for one in remote {
            let Some((state, mask)) = lost.settle(one.mask) else { return Ok(()) };
            // Where the map says that nothing of a range is here, the layer may hold anything.
            self.punch_outside(&one, one.mask)?;
            settled.push(Transition { state, mask, ..one });
        }
        self.change(settled.into_iter())
    }

    fn punch_outside(&self, chunk: &Transition, mask: BlockMask) -> Result<(), StoreError> {
        let geometry = self.geometry();
        let start = geometry.chunk_start(chunk.chunk);
        for blocks in geometry.full_mask(chunk.chunk).minus(mask).runs() {
            let bytes = geometry.block_bytes(chunk.chunk, &blocks);
            let (from, len) = (start + u64::from(bytes.start), u64::from(bytes.end - bytes.start));
            let punched = self.layer.make_hole(from, len);
            punched.map_err(StoreError::io("punch a hole into", self.layer.path()))?;
        }
        Ok(())
    }

    /// Notes how chunks stand, and makes it durable together with the layer.
    fn change(&self, transitions: impl Iterator<Item = Transition>) -> Result<(), StoreError> {
        let path = self.state.path();
        let mut transitions = transitions.peekable();
        while transitions.peek().is_some() {
            let batch: Vec<_> = transitions.by_ref().take(BATCH).collect();
            self.map.note(&batch).map_err(StoreError::io("write the chunk map in", path))?;
        }
        self.layer.sync().map_err(StoreError::io("sync", self.layer.path()))?;
        self.map.commit(self.map.position()).map_err(StoreError::io("sync the chunk map in", path))
    }
}
