// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A volume of a few chunks with two cells each (a cell stands for half of the blocks), under the rules of the real
//! one: states, masks, routes and the merge at an install are those of `core::chunk`.

use blkferry::core::chunk::{
    Access, ChunkState, ChunkView, Route, after_claim, after_install, check_move, route,
};
use blkferry::core::geometry::{BlockMask, ChunkId, Geometry, Span};
use blkferry::core::message::{Body, Version};

/// The value of a cell that is all zeros.
pub(crate) const ZERO: u8 = 0;
/// What the base image has everywhere.
pub(crate) const BASE: u8 = 1;
/// What the guest wrote before the migration was armed.
pub(crate) const FIRST: u8 = 2;

pub(crate) const CELLS: usize = 2;
const CHUNK: u32 = 64 << 10;

/// What one guest request does to a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Touch {
    Whole,
    Low,
    Zero,
}

impl Touch {
    pub(crate) fn cells(self) -> std::ops::Range<usize> {
        if self == Self::Low { 0..1 } else { 0..CELLS }
    }

    fn span(self, chunk: ChunkId) -> Span {
        Span { chunk, start: 0, len: if self == Self::Low { CHUNK / 2 } else { CHUNK } }
    }

    fn access(self) -> Access {
        if self == Self::Zero { Access::Zero } else { Access::Write }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Hold {
    was: ChunkState,
    punch: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Chunk {
    pub(crate) state: ChunkState,
    mask: BlockMask,
    pub(crate) version: u64,
    /// The version that the journal has: plain writes are not noted.
    noted: u64,
    pub(crate) writing: bool,
    hold: Option<Hold>,
    /// An install waits to hold it: no new writes.
    pub(crate) claimed: bool,
    pub(crate) demanded: bool,
    cells: [u8; CELLS],
}

impl Chunk {
    const EMPTY: Self = Self {
        state: ChunkState::Base,
        mask: BlockMask::EMPTY,
        version: 0,
        noted: 0,
        writing: false,
        hold: None,
        claimed: false,
        demanded: false,
        cells: [BASE; CELLS],
    };

    pub(crate) fn lasting(&self) -> ChunkState {
        self.hold.map_or(self.state, |hold| hold.was)
    }

    pub(crate) fn free(&self) -> bool {
        self.hold.is_none() && !self.writing
    }

    fn bump(&mut self) {
        if self.state != ChunkState::Remote {
            self.version += 1;
        }
    }
}

/// A read of a chunk in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Reading {
    version: u64,
    clean: bool,
    mask: u64,
    low: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Volume {
    geometry: Geometry,
    pub(crate) chunks: Vec<Chunk>,
}

fn mask_of(cell: usize) -> BlockMask {
    BlockMask(0xffff_ffff << (32 * cell))
}

const FULL: BlockMask = BlockMask(u64::MAX);

pub(crate) fn geometry(chunks: u32) -> Geometry {
    Geometry::new(u64::from(chunks) * u64::from(CHUNK), CHUNK).expect("geometry")
}

impl Volume {
    pub(crate) fn new(chunks: u32) -> Self {
        Self { geometry: geometry(chunks), chunks: vec![Chunk::EMPTY; chunks as usize] }
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = ChunkId> + use<> {
        self.geometry.chunks()
    }

    pub(crate) fn chunk(&self, chunk: ChunkId) -> &Chunk {
        &self.chunks[chunk.index()]
    }

    pub(crate) fn chunk_mut(&mut self, chunk: ChunkId) -> &mut Chunk {
        &mut self.chunks[chunk.index()]
    }

    /// Content of before the migration.
    pub(crate) fn preset(&mut self, chunk: ChunkId, touch: Touch) {
        self.begin(chunk, touch, FIRST);
        self.end(chunk, touch, FIRST);
    }

    fn view(&self, chunk: ChunkId) -> ChunkView {
        let c = self.chunk(chunk);
        ChunkView { state: c.state, mask: c.mask }
    }

    /// What the guest would read, `None` if it is not here (or not yet).
    pub(crate) fn value(&self, chunk: ChunkId, cell: usize) -> Option<u8> {
        let c = self.chunk(chunk);
        let view = ChunkView { state: c.lasting(), mask: c.mask };
        let span = Span { chunk, start: CHUNK / 2 * cell as u32, len: CHUNK / 2 };
        match route(&self.geometry, view, Access::Read, span) {
            Route::Layer => Some(c.cells[cell]),
            Route::Base => Some(BASE),
            Route::Zeros => Some(ZERO),
            Route::Done | Route::Modify { .. } | Route::Punch | Route::Fill | Route::Wait => None,
        }
    }

    fn enter(&mut self, chunk: ChunkId, state: ChunkState, mask: BlockMask) {
        let c = self.chunk_mut(chunk);
        check_move(c.state, state).expect("a legal move of a chunk");
        if c.state != state {
            c.demanded = false;
        }
        (c.state, c.mask) = (state, mask);
        c.noted = c.version;
    }

    // ---- guest writes -------------------------------------------------------------------------------------------

    /// Whether a request of the guest can begin now.
    pub(crate) fn can_begin(&self, chunk: ChunkId, touch: Touch) -> bool {
        let c = self.chunk(chunk);
        let way = route(&self.geometry, self.view(chunk), touch.access(), touch.span(chunk));
        let ready = matches!(way, Route::Modify { .. } | Route::Punch | Route::Done);
        ready && !c.claimed && c.free()
    }

    /// Begins a request: of a write, the first half reaches the layer.
    pub(crate) fn begin(&mut self, chunk: ChunkId, touch: Touch, value: u8) {
        match route(&self.geometry, self.view(chunk), touch.access(), touch.span(chunk)) {
            Route::Punch => self.hold(chunk, true),
            Route::Modify { before, .. } => {
                if let Some(state) = before {
                    self.enter(chunk, state, BlockMask::EMPTY);
                }
                let c = self.chunk_mut(chunk);
                c.writing = true;
                c.bump();
                if before.is_some() {
                    c.noted = c.version;
                }
                c.cells[0] = value;
            }
            Route::Done => {}
            Route::Layer | Route::Base | Route::Zeros | Route::Fill | Route::Wait => {
                panic!("a request began that cannot")
            }
        }
    }

    /// Ends a request; returns whether a chunk that was remote is whole now.
    pub(crate) fn end(&mut self, chunk: ChunkId, touch: Touch, value: u8) -> bool {
        if self.chunk(chunk).hold.is_some() {
            let remote = self.chunk(chunk).lasting() == ChunkState::Remote;
            self.chunk_mut(chunk).cells = [ZERO; CELLS];
            self.finish(chunk, ChunkState::Zero, BlockMask::EMPTY, None);
            return remote;
        }
        if !self.chunk(chunk).writing {
            return false;
        }
        let claim = match route(&self.geometry, self.view(chunk), Access::Write, touch.span(chunk)) {
            Route::Modify { claim, .. } => claim,
            other => panic!("a write ends in {other:?}"),
        };
        for cell in touch.cells() {
            self.chunk_mut(chunk).cells[cell] = value;
        }
        let c = *self.chunk(chunk);
        let mut whole = false;
        if matches!(c.state, ChunkState::Base | ChunkState::Remote) {
            let mask = c.mask.union(claim);
            let after = after_claim(c.state, mask, FULL);
            whole = c.state == ChunkState::Remote && after == ChunkState::Modified;
            self.enter(chunk, after, if after == c.state { mask } else { BlockMask::EMPTY });
        }
        let c = self.chunk_mut(chunk);
        c.writing = false;
        c.bump();
        whole
    }

    // ---- holders ------------------------------------------------------------------------------------------------

    fn hold(&mut self, chunk: ChunkId, punch: bool) {
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

    /// Gives the chunk back as it was.
    pub(crate) fn let_go(&mut self, chunk: ChunkId) {
        let c = self.chunk_mut(chunk);
        if let Some(hold) = c.hold.take() {
            c.state = hold.was;
        }
    }

    /// Holds the chunk for an arriving copy; false if it is not wanted.
    pub(crate) fn begin_install(&mut self, chunk: ChunkId, version: Version, pushed: bool) -> bool {
        let c = *self.chunk(chunk);
        let wanted = if pushed { version.0 >= c.version } else { c.state == ChunkState::Remote };
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
        let kept = self.chunk(chunk).mask;
        let mut put = |cell: usize, value: u8| {
            if !kept.intersects(mask_of(cell)) {
                self.chunks[chunk.index()].cells[cell] = value;
            }
        };
        let (state, mask) = match body {
            Body::Zero => {
                (0..CELLS).for_each(|cell| put(cell, ZERO));
                let state = if kept.is_empty() { ChunkState::Zero } else { ChunkState::Modified };
                (state, BlockMask::EMPTY)
            }
            Body::Blocks { mask, bytes } => {
                let cells = (0..CELLS).filter(|cell| mask.contains(mask_of(*cell)));
                cells.zip(bytes).for_each(|(cell, value)| put(cell, *value));
                after_install(*mask, kept, FULL)
            }
        };
        self.finish(chunk, state, mask, Some(version.0));
    }

    pub(crate) fn mark_remote(&mut self, chunk: ChunkId) {
        assert!(self.chunk(chunk).free(), "{chunk} is marked remote while it is in use");
        self.enter(chunk, ChunkState::Remote, BlockMask::EMPTY);
    }

    // ---- captures -----------------------------------------------------------------------------------------------

    /// The first half of a capture: reads the low cell. `None`: the chunk cannot travel.
    pub(crate) fn begin_capture(&self, chunk: ChunkId) -> Option<Reading> {
        let c = self.chunk(chunk);
        let mask = match c.state {
            ChunkState::Modified | ChunkState::Received => FULL,
            ChunkState::Base if !c.mask.is_empty() => c.mask,
            ChunkState::Zero => BlockMask::EMPTY,
            ChunkState::Base | ChunkState::Local | ChunkState::Remote | ChunkState::Installing => {
                return None;
            }
        };
        Some(Reading { version: c.version, clean: !c.writing, mask: mask.0, low: c.cells[0] })
    }

    /// The second half; version, whether nothing overlapped, content.
    pub(crate) fn end_capture(&self, chunk: ChunkId, reading: Reading) -> (Version, bool, Body) {
        let c = self.chunk(chunk);
        let mask = BlockMask(reading.mask);
        let cells = [reading.low, c.cells[1]];
        let bytes: Vec<u8> =
            (0..CELLS).filter(|cell| mask.contains(mask_of(*cell))).map(|cell| cells[cell]).collect();
        // The state of a zero chunk is its content: nothing is read.
        let zero = mask.is_empty() || mask == FULL && bytes.iter().all(|value| *value == ZERO);
        let clean = reading.clean && (mask.is_empty() || c.version == reading.version);
        let body = if zero { Body::Zero } else { Body::Blocks { mask, bytes } };
        (Version(reading.version), clean, body)
    }

    // ---- sets ---------------------------------------------------------------------------------------------------

    pub(crate) fn modified(&self) -> Vec<ChunkId> {
        let wanted = |chunk: &ChunkId| match self.chunk(*chunk).lasting() {
            ChunkState::Modified | ChunkState::Received | ChunkState::Zero => true,
            ChunkState::Base => !self.chunk(*chunk).mask.is_empty(),
            ChunkState::Local | ChunkState::Remote | ChunkState::Installing => false,
        };
        self.ids().filter(wanted).collect()
    }

    pub(crate) fn with_lasting(&self, state: ChunkState) -> Vec<ChunkId> {
        self.ids().filter(|chunk| self.chunk(*chunk).lasting() == state).collect()
    }

    // ---- crashes ------------------------------------------------------------------------------------------------

    /// The process died: what is noted is there.
    pub(crate) fn kill(&mut self) {
        for c in &mut self.chunks {
            if let Some(hold) = c.hold.take() {
                c.state = hold.was;
            }
            (c.writing, c.claimed, c.demanded) = (false, false, false);
            c.version = c.noted;
        }
    }

    /// The host died: the map is the synced one; so is the data, or what was newer has reached the disk as well.
    pub(crate) fn host_crash(&mut self, synced: &Self, newer: bool) {
        self.kill();
        for (c, old) in self.chunks.iter_mut().zip(&synced.chunks) {
            let cells = if newer { c.cells } else { old.cells };
            let state = if old.lasting() == ChunkState::Local { ChunkState::Base } else { old.lasting() };
            let (mask, version) = (old.mask, old.version);
            *c = Chunk { state, mask, version, noted: version, cells, ..Chunk::EMPTY };
            if c.state == ChunkState::Zero {
                // As on open: what must be a hole is made one.
                c.cells = [ZERO; CELLS];
            }
        }
    }

    /// Undoes what came for chunks that the source has.
    pub(crate) fn revert(&mut self, chunks: impl Iterator<Item = ChunkId>) {
        for chunk in chunks {
            *self.chunk_mut(chunk) = Chunk { state: ChunkState::Remote, ..Chunk::EMPTY };
        }
    }

    pub(crate) fn wipe(&mut self) {
        self.chunks.fill(Chunk::EMPTY);
    }
}
