// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A volume in memory with the rules of the real one: states, masks and versions by `core::chunk`, writes that take
//! time, holders that wait for writers, captures that may be torn, a synced copy that a crash of the host falls back to.

use blkferry::core::chunk::{ChunkState, after_fetch, after_install, check_move};
use blkferry::core::geometry::{BlockMask, ChunkId, Geometry};
use blkferry::core::message::{Body, Version};

pub(crate) const BLOCKS: usize = 64;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Hold {
    pub(crate) was: ChunkState,
    pub(crate) punch: bool,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk {
    pub(crate) state: ChunkState,
    pub(crate) mask: BlockMask,
    pub(crate) version: u64,
    /// The version that the journal has: plain writes are not noted.
    pub(crate) noted: u64,
    pub(crate) writers: u32,
    pub(crate) hold: Option<Hold>,
    /// Somebody waits to hold it: no new writers.
    pub(crate) claimants: u32,
    pub(crate) demanded: bool,
}

impl Chunk {
    const EMPTY: Self = Self {
        state: ChunkState::Base,
        mask: BlockMask::EMPTY,
        version: 0,
        noted: 0,
        writers: 0,
        hold: None,
        claimants: 0,
        demanded: false,
    };

    pub(crate) fn lasting(&self) -> ChunkState {
        self.hold.map_or(self.state, |hold| hold.was)
    }

    fn bump(&mut self) {
        if self.state != ChunkState::Remote {
            self.version += 1;
        }
    }
}

/// Map and data at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) order: u64,
    map: Vec<(ChunkState, BlockMask, u64)>,
    data: Vec<u64>,
}

#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) geometry: Geometry,
    based: u32,
    pub(crate) chunks: Vec<Chunk>,
    data: Vec<u64>,
    pub(crate) synced: Snapshot,
    order: u64,
}

pub(crate) fn at(chunk: ChunkId, block: usize) -> usize {
    chunk.index() * BLOCKS + block
}

pub(crate) fn bits(mask: BlockMask) -> impl Iterator<Item = usize> {
    (0..BLOCKS).filter(move |bit| mask.0 >> bit & 1 == 1)
}

impl Volume {
    pub(crate) fn new(geometry: Geometry, based: u32) -> Self {
        let count = geometry.chunk_count() as usize;
        let chunks = vec![Chunk::EMPTY; count];
        let data = vec![0; count * BLOCKS];
        let synced = Snapshot { order: 0, map: Vec::new(), data: Vec::new() };
        let mut volume = Self { geometry, based, chunks, data, synced, order: 0 };
        volume.synced = volume.snapshot();
        volume
    }

    pub(crate) fn order(&mut self) -> u64 {
        self.order += 1;
        self.order
    }

    pub(crate) fn has_base(&self, chunk: ChunkId) -> bool {
        chunk.0 < self.based
    }

    pub(crate) fn full(&self, chunk: ChunkId) -> BlockMask {
        self.geometry.full_mask(chunk)
    }

    fn base(&self, chunk: ChunkId, block: usize) -> u64 {
        if self.has_base(chunk) { 1 << 60 | at(chunk, block) as u64 } else { 0 }
    }

    pub(crate) fn chunk(&self, chunk: ChunkId) -> &Chunk {
        &self.chunks[chunk.index()]
    }

    pub(crate) fn chunk_mut(&mut self, chunk: ChunkId) -> &mut Chunk {
        &mut self.chunks[chunk.index()]
    }

    /// The value of a block, `None` if it is at the source.
    pub(crate) fn value(&self, chunk: ChunkId, block: usize) -> Option<u64> {
        let c = self.chunk(chunk);
        let valid = c.mask.0 >> block & 1 == 1;
        match c.lasting() {
            ChunkState::Local | ChunkState::Modified | ChunkState::Received => {
                Some(self.data[at(chunk, block)])
            }
            ChunkState::Zero => Some(0),
            ChunkState::Base if !valid => Some(self.base(chunk, block)),
            ChunkState::Remote if !valid => None,
            ChunkState::Base | ChunkState::Remote | ChunkState::Installing => {
                Some(self.data[at(chunk, block)])
            }
        }
    }

    /// The value that a crash of the host now is sure to leave, if it is sure.
    pub(crate) fn synced_value(&self, chunk: ChunkId, block: usize) -> Option<u64> {
        let (state, mask, _) = self.synced.map[chunk.index()];
        let valid = mask.0 >> block & 1 == 1;
        let value = self.synced.data[at(chunk, block)];
        match state {
            ChunkState::Modified | ChunkState::Received => Some(value),
            ChunkState::Zero => Some(0),
            ChunkState::Local => Some(self.base(chunk, block)),
            ChunkState::Base if !valid => Some(self.base(chunk, block)),
            ChunkState::Remote if !valid => None,
            ChunkState::Base | ChunkState::Remote | ChunkState::Installing => Some(value),
        }
    }

    fn enter(&mut self, chunk: ChunkId, state: ChunkState, mask: BlockMask) {
        let c = &mut self.chunks[chunk.index()];
        check_move(c.state, state).expect("legal move");
        if c.state != state {
            c.demanded = false;
        }
        c.state = state;
        c.mask = mask;
        c.noted = c.version;
    }

    // ---- guest writes -------------------------------------------------------------------------------------------

    pub(crate) fn begin_write(&mut self, chunk: ChunkId, before: Option<ChunkState>) {
        if let Some(state) = before {
            self.enter(chunk, state, BlockMask::EMPTY);
        }
        let c = self.chunk_mut(chunk);
        c.writers += 1;
        c.bump();
        if before.is_some() {
            c.noted = c.version;
        }
    }

    pub(crate) fn put(&mut self, chunk: ChunkId, block: usize, value: u64) {
        self.data[at(chunk, block)] = value;
    }

    /// Returns whether the chunk was remote and is whole now.
    pub(crate) fn end_write(&mut self, chunk: ChunkId, claim: BlockMask) -> bool {
        let full = self.full(chunk);
        let c = *self.chunk(chunk);
        let mut overwritten = false;
        if matches!(c.state, ChunkState::Base | ChunkState::Remote) {
            let mask = c.mask.union(claim);
            let after = blkferry::core::chunk::after_claim(c.state, mask, full);
            overwritten = c.state == ChunkState::Remote && after == ChunkState::Modified;
            self.enter(chunk, after, if after == c.state { mask } else { BlockMask::EMPTY });
        }
        let c = self.chunk_mut(chunk);
        c.writers -= 1;
        c.bump();
        overwritten
    }

    // ---- holders ------------------------------------------------------------------------------------------------

    pub(crate) fn free(&self, chunk: ChunkId) -> bool {
        let c = self.chunk(chunk);
        c.hold.is_none() && c.writers == 0
    }

    pub(crate) fn hold(&mut self, chunk: ChunkId, punch: bool) {
        let c = self.chunk_mut(chunk);
        if punch {
            c.bump();
        }
        c.hold = Some(Hold { was: c.state, punch });
        c.state = ChunkState::Installing;
    }

    fn finish(&mut self, chunk: ChunkId, state: ChunkState, mask: BlockMask, version: Option<u64>) {
        let c = self.chunk_mut(chunk);
        let punch = c.hold.take().is_some_and(|hold| hold.punch);
        c.demanded = false;
        match version {
            Some(version) => c.version = version,
            None if punch => c.version += 1,
            None => {}
        }
        self.enter(chunk, state, mask);
    }

    pub(crate) fn end_punch(&mut self, chunk: ChunkId) -> bool {
        let remote = self.chunk(chunk).lasting() == ChunkState::Remote;
        for block in 0..BLOCKS {
            self.data[at(chunk, block)] = 0;
        }
        self.finish(chunk, ChunkState::Zero, BlockMask::EMPTY, None);
        remote
    }

    /// Gives the chunk back as it was.
    pub(crate) fn let_go(&mut self, chunk: ChunkId) {
        let c = self.chunk_mut(chunk);
        if let Some(hold) = c.hold.take() {
            c.state = hold.was;
        }
    }

    /// Holds the chunk for an arriving copy; false if it is not wanted.
    pub(crate) fn begin_install(&mut self, chunk: ChunkId, version: Version, receiving: bool) -> bool {
        let c = *self.chunk(chunk);
        let wanted = match (c.state, receiving) {
            (ChunkState::Remote, false) => true,
            (_, true) => version.0 >= c.version,
            (_, false) => false,
        };
        if !wanted {
            return false;
        }
        if c.state != ChunkState::Remote && !(c.state == ChunkState::Base && c.mask.is_empty()) {
            self.enter(chunk, ChunkState::Remote, BlockMask::EMPTY);
        }
        self.hold(chunk, false);
        true
    }

    pub(crate) fn end_install(&mut self, chunk: ChunkId, version: Version, body: &Body) {
        let full = self.full(chunk);
        let kept = self.chunk(chunk).mask;
        let (state, mask) = match body {
            Body::Zero => {
                bits(full.minus(kept)).for_each(|block| self.put(chunk, block, 0));
                let state = if kept.is_empty() { ChunkState::Zero } else { ChunkState::Modified };
                (state, BlockMask::EMPTY)
            }
            Body::Blocks { mask, bytes } => {
                for (block, value) in bits(*mask).zip(bytes.as_chunks::<8>().0) {
                    if kept.0 >> block & 1 == 0 {
                        self.put(chunk, block, u64::from_le_bytes(*value));
                    }
                }
                after_install(*mask, kept, full)
            }
        };
        self.finish(chunk, state, mask, Some(version.0));
    }

    /// Copies the base image's content in, if it is wanted still.
    pub(crate) fn fetch(&mut self, chunk: ChunkId) {
        let c = *self.chunk(chunk);
        if c.state != ChunkState::Base || !self.has_base(chunk) {
            return;
        }
        for block in bits(self.full(chunk).minus(c.mask)) {
            let value = self.base(chunk, block);
            self.put(chunk, block, value);
        }
        self.hold(chunk, false);
        self.finish(chunk, after_fetch(c.mask), BlockMask::EMPTY, None);
    }

    pub(crate) fn mark_remote(&mut self, chunk: ChunkId) {
        assert!(self.free(chunk), "{chunk} is marked remote while it is in use");
        self.enter(chunk, ChunkState::Remote, BlockMask::EMPTY);
    }

    // ---- sets ---------------------------------------------------------------------------------------------------

    pub(crate) fn modified(&self) -> Vec<ChunkId> {
        let wanted = |chunk: &ChunkId| match self.chunk(*chunk).lasting() {
            ChunkState::Modified | ChunkState::Received | ChunkState::Zero => true,
            ChunkState::Base => !self.chunk(*chunk).mask.is_empty(),
            ChunkState::Local | ChunkState::Remote | ChunkState::Installing => false,
        };
        self.geometry.chunks().filter(wanted).collect()
    }

    pub(crate) fn with_lasting(&self, state: ChunkState) -> Vec<ChunkId> {
        self.geometry.chunks().filter(|chunk| self.chunk(*chunk).lasting() == state).collect()
    }

    // ---- crashes ------------------------------------------------------------------------------------------------

    pub(crate) fn snapshot(&mut self) -> Snapshot {
        let order = self.order();
        let map = self.chunks.iter().map(|c| (c.lasting(), c.mask, c.version)).collect();
        Snapshot { order, map, data: self.data.clone() }
    }

    pub(crate) fn sync(&mut self, snapshot: Snapshot) {
        if snapshot.order > self.synced.order {
            self.synced = snapshot;
        }
    }

    /// The process died: what is noted is there.
    pub(crate) fn kill(&mut self) {
        for c in &mut self.chunks {
            if let Some(hold) = c.hold.take() {
                c.state = hold.was;
            }
            c.writers = 0;
            c.claimants = 0;
            c.demanded = false;
            c.version = c.noted;
        }
    }

    /// The host died: what is synced is there, and perhaps more of the data.
    pub(crate) fn host_crash(&mut self, mut newer: impl FnMut() -> bool) {
        self.kill();
        for (c, (state, mask, version)) in self.chunks.iter_mut().zip(&self.synced.map) {
            let state = match state {
                ChunkState::Local => ChunkState::Base,
                ChunkState::Received => ChunkState::Modified,
                other => *other,
            };
            *c = Chunk { state, mask: *mask, version: *version, noted: *version, ..Chunk::EMPTY };
        }
        for (now, synced) in self.data.iter_mut().zip(&self.synced.data) {
            if !newer() {
                *now = *synced;
            }
        }
        // As on open: what must be a hole is made one.
        for chunk in self.with_lasting(ChunkState::Zero) {
            (0..BLOCKS).for_each(|block| self.put(chunk, block, 0));
        }
        // What a crash has left is on the disk; it is no commit.
        let order = self.synced.order;
        self.synced = Snapshot { order, ..self.snapshot() };
    }

    /// Undoes what came for chunks that the source has.
    pub(crate) fn revert(&mut self, chunks: impl Iterator<Item = ChunkId>) {
        for chunk in chunks {
            *self.chunk_mut(chunk) = Chunk { state: ChunkState::Remote, ..Chunk::EMPTY };
        }
    }

    /// Drops everything but the chunks of the list that are whole; returns those.
    pub(crate) fn prune(&mut self, list: &[(ChunkId, Version)]) -> Vec<(ChunkId, Version)> {
        let whole = |c: &Chunk| matches!(c.state, ChunkState::Modified | ChunkState::Received);
        let kept: Vec<_> = list.iter().copied().filter(|(chunk, _)| whole(self.chunk(*chunk))).collect();
        self.chunks.fill(Chunk::EMPTY);
        for (chunk, version) in &kept {
            let (state, version) = (ChunkState::Received, version.0);
            *self.chunk_mut(*chunk) = Chunk { state, version, noted: version, ..Chunk::EMPTY };
        }
        self.synced = self.snapshot();
        kept
    }

    pub(crate) fn wipe(&mut self) {
        self.chunks.fill(Chunk::EMPTY);
        self.synced = self.snapshot();
    }
}
