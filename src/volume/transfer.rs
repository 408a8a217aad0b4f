// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whole chunks in and out, for the companion thread: capture, install, fetch from the base image, mark remote.
//!
//! A **capture** holds nothing. It reads beside the guest's writes and says afterwards whether it may have been torn:
//! clean means no write was in flight when it began and none began before it ended. Holding the chunk instead would
//! make the guest wait for a migration that it should not notice.
//!
//! An **install** and a **fetch** hold the chunk alone, and decide what to write only then: whatever was true when
//! they were asked for may be over. The guest may have written some of the chunk's blocks (they are kept), or all of
//! it (the arrival is superseded), or discarded it. Content is fetched from the base image *before* the chunk is
//! held, so a slow repository never blocks writes.
//!
//! Everything that goes wrong leaves a chunk as it was, or `Remote`; never half installed under a state that says
//! it is whole.

mod replica;

use super::table::{Exclusive, TableError};
use super::volume::Volume;
use crate::core::chunk::{ChunkState, after_fetch, after_install};
use crate::core::geometry::{BlockMask, ChunkId, Geometry};
use crate::core::message::{Body, Version};
use crate::core::set::ChunkSet;
use crate::engine::{AnyFile, CompanionEngine, FileId, IoBuf};
use crate::store::{Store, Transition};
use std::io;
use std::sync::Arc;
use thiserror::Error;

/// Chunks that change state under one set of locks and with one note.
const BATCH: u32 = 1024;

/// Why a chunk could not be captured, installed, fetched or marked.
#[derive(Debug, Error)]
pub enum TransferError {
    /// The volume has no such chunk.
    #[error("{0} is not in the volume")]
    NoChunk(ChunkId),
    /// Part of the chunk is still at the migration source.
    #[error("{0} is not whole here yet")]
    NotWhole(ChunkId),
    /// The chunk is the base image's: nothing of it may travel.
    #[error("{0} does not differ from the base image")]
    NotModified(ChunkId),
    /// The content does not fit the chunk.
    #[error("the content that came for {0} does not fit it")]
    Malformed(ChunkId),
    /// The layer or the base image.
    #[error("{chunk}: {error}")]
    Io {
        /// The chunk.
        chunk: ChunkId,
        /// What happened.
        error: io::Error,
    },
    /// The layer could not be synced, or the state directory not be written.
    #[error("the volume cannot be made durable: {0}")]
    Store(io::Error),
    /// A guest may be using the volume.
    #[error("the volume serves a guest")]
    InUse,
    /// The chunk map.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// File operations that the companion may have under way.
const ENGINE_DEPTH: u32 = 256;

/// A copy of a chunk's content.
#[derive(Debug)]
pub struct Captured {
    /// The version that was captured.
    pub version: Version,
    /// No write overlapped the capture: this is the whole truth of that version. An unclean copy may be torn; it is
    /// as good as nothing when the version moves on, which it then surely does.
    pub clean: bool,
    /// The content.
    pub body: Body,
}

/// Whether an arriving chunk may replace what is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstallPhase {
    /// Before the handoff: the guest runs at the source, so a newer copy replaces an older one.
    Receiving,
    /// After it: only what is still remote may be filled.
    Pulling,
}

/// What became of an arriving chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    /// It is in the layer's page cache and in the map.
    Done,
    /// What is here is newer: nothing was changed.
    Superseded,
}

/// The companion thread's way into the volume.
#[derive(Debug)]
pub struct Transfer {
    volume: Arc<Volume>,
    engine: CompanionEngine,
    file: FileId,
}

impl Transfer {
    /// With a file engine of its own. Call it in the runtime of the companion thread.
    ///
    /// # Errors
    /// No io_uring, or no descriptor is left.
    pub fn open(volume: &Arc<Volume>) -> io::Result<Self> {
        let engine = match volume.layer().file() {
            AnyFile::Kernel { .. } => CompanionEngine::new(ENGINE_DEPTH)?,
            AnyFile::Simulated(_) => CompanionEngine::simulated(),
        };
        Self::new(Arc::clone(volume), engine)
    }

    /// Uses `engine` for its file operations.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(volume: Arc<Volume>, engine: CompanionEngine) -> io::Result<Self> {
        let file = engine.register_file(volume.layer().file())?;
        Ok(Self { volume, engine, file })
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    fn check(&self, chunk: ChunkId) -> Result<(), TransferError> {
        if self.volume.geometry().has(chunk) { Ok(()) } else { Err(TransferError::NoChunk(chunk)) }
    }

    /// Copies a chunk of the modified set (paper: BACKGROUND_PUSH, and the answer to a pull). A chunk of which only
    /// some blocks differ from the base image gives only those. All zeros travel as metadata.
    ///
    /// # Errors
    /// `NotWhole` for a remote chunk, `NotModified` for one of the base image, `Io`.
    pub async fn capture(&self, chunk: ChunkId) -> Result<Captured, TransferError> {
        self.check(chunk)?;
        let table = self.volume.table();
        let look = loop {
            // First, so that a write after this counts as a pass of its own.
            self.volume.tracker().captured(chunk);
            let look = table.look(chunk);
            if look.state != ChunkState::Installing {
                break look;
            }
            if let Some(free) = table.when_free(chunk) {
                // An error means that the sender has gone; then it is time to look again too.
                drop(free.await);
            }
        };
        let full = self.volume.geometry().full_mask(chunk);
        let mask = match look.state {
            ChunkState::Modified | ChunkState::Received => full,
            ChunkState::Base if !look.mask.is_empty() => look.mask,
            ChunkState::Zero => {
                return Ok(Captured { version: look.version, clean: look.writers == 0, body: Body::Zero });
            }
            ChunkState::Remote => return Err(TransferError::NotWhole(chunk)),
            ChunkState::Base | ChunkState::Local | ChunkState::Installing => {
                return Err(TransferError::NotModified(chunk));
            }
        };
        let body = self.read_blocks(chunk, mask).await?;
        let clean = look.writers == 0 && table.look(chunk).version == look.version;
        Ok(Captured { version: look.version, clean, body })
    }

    /// Reads from the first to the last block of the mask at once, and keeps what is in the mask.
    async fn read_blocks(&self, chunk: ChunkId, mask: BlockMask) -> Result<Body, TransferError> {
        let geometry = self.volume.geometry();
        let first = mask.0.trailing_zeros();
        let end = u64::BITS - mask.0.leading_zeros();
        let outer = geometry.block_bytes(chunk, &(first..end));
        let offset = geometry.chunk_start(chunk) + u64::from(outer.start);
        let (result, buf) = self.engine.read(self.file, offset, IoBuf::zeroed(outer.len())).await;
        result.map_err(|error| TransferError::Io { chunk, error })?;
        let full = geometry.full_mask(chunk);
        if mask == full && buf.is_zero() {
            return Ok(Body::Zero);
        }
        let mask = if mask == full { self.without_zeros(chunk, &buf) } else { mask };
        if mask == full {
            return Ok(Body::Blocks { mask, bytes: buf.to_vec() });
        }
        let mut bytes = vec![0; geometry.mask_bytes(chunk, mask) as usize];
        let mut at = 0;
        for run in mask.runs() {
            let range = geometry.block_bytes(chunk, &run);
            buf.slice((range.start - outer.start) as usize, range.len())
                .copy_to(&mut bytes[at..at + range.len()]);
            at += range.len();
        }
        Ok(Body::Blocks { mask, bytes })
    }

    /// Which blocks of a whole chunk have to travel. Where no base image lies under it, those that do not are zeros at the
    /// destination; few of them are not worth the holes that they cost there.
    fn without_zeros(&self, chunk: ChunkId, content: &IoBuf) -> BlockMask {
        let full = self.volume.geometry().full_mask(chunk);
        if self.volume.table().has_base(chunk) {
            return full;
        }
        let mut mask = full;
        for block in 0..full.count() {
            let range = self.volume.geometry().block_bytes(chunk, &(block..block + 1));
            if content.slice(range.start as usize, range.len()).is_zero() {
                mask = mask.minus(BlockMask::range(block, block + 1));
            }
        }
        if mask.count() * 4 > full.count() * 3 { full } else { mask }
    }

    /// Puts a chunk of the source into place, around the blocks that the guest has written here. Wakes who waits.
    ///
    /// # Errors
    /// `Malformed`, `Io` or `Table`; the chunk is then as it was, or `Remote`.
    pub async fn install(
        &self,
        chunk: ChunkId,
        version: Version,
        body: &Body,
        phase: InstallPhase,
    ) -> Result<Installed, TransferError> {
        self.check(chunk)?;
        self.check_body(chunk, body)?;
        let held = loop {
            let held = self.volume.table().begin_exclusive(chunk).await?;
            let (was, mask, current) = held.was();
            // What is pulled may come from another run of the source, whose versions mean something else: there the
            // epoch keeps old copies out.
            let stale = phase == InstallPhase::Receiving && version < current;
            let replaceable = was == ChunkState::Remote || phase == InstallPhase::Receiving;
            if stale || !replaceable {
                return Ok(Installed::Superseded);
            }
            if was == ChunkState::Remote || (was == ChunkState::Base && mask.is_empty()) {
                break held;
            }
            // A copy is replaced: say first that it is gone, so that a crash leaves no torn one.
            held.finish(ChunkState::Remote, BlockMask::EMPTY, None)?;
        };
        let (_, kept, _) = held.was();
        let (state, mask) = self.place(chunk, body, kept).await?;
        held.finish(state, mask, Some(version))?;
        Ok(Installed::Done)
    }

    fn check_body(&self, chunk: ChunkId, body: &Body) -> Result<(), TransferError> {
        let geometry = self.volume.geometry();
        match body {
            Body::Zero => Ok(()),
            Body::Blocks { mask, bytes }
                if !mask.is_empty()
                    && geometry.full_mask(chunk).contains(*mask)
                    && bytes.len() == geometry.mask_bytes(chunk, *mask) as usize =>
            {
                Ok(())
            }
            Body::Blocks { .. } => Err(TransferError::Malformed(chunk)),
        }
    }

    /// Writes what arrived into the held chunk, but for the blocks `kept`; returns what the chunk is then.
    async fn place(
        &self,
        chunk: ChunkId,
        body: &Body,
        kept: BlockMask,
    ) -> Result<(ChunkState, BlockMask), TransferError> {
        let geometry = self.volume.geometry();
        let full = geometry.full_mask(chunk);
        let Body::Blocks { mask: came, bytes } = body else {
            self.punch(chunk, full.minus(kept)).await?;
            let state = if kept.is_empty() { ChunkState::Zero } else { ChunkState::Modified };
            return Ok((state, BlockMask::EMPTY));
        };
        let bytes = IoBuf::copy_of(bytes);
        for run in came.minus(kept).runs() {
            let before = came.minus(BlockMask::range(run.start, u32::MAX));
            let at = geometry.mask_bytes(chunk, before) as usize;
            let range = geometry.block_bytes(chunk, &run);
            self.write(chunk, range.start, bytes.slice(at, range.len())).await?;
        }
        let (state, mask) = after_install(*came, kept, full);
        if state == ChunkState::Base && !self.volume.table().has_base(chunk) {
            // Where there is no base image, what is not in the mask must be a hole; and a hole is as whole as data.
            self.punch(chunk, full.minus(mask)).await?;
            if kept.is_empty() {
                return Ok((ChunkState::Received, BlockMask::EMPTY));
            }
        }
        Ok((state, mask))
    }

    async fn write(&self, chunk: ChunkId, start: u32, buf: IoBuf) -> Result<(), TransferError> {
        let offset = self.volume.geometry().chunk_start(chunk) + u64::from(start);
        let (result, _) = self.engine.write(self.file, offset, buf).await;
        result.map_err(|error| TransferError::Io { chunk, error })
    }

    async fn punch(&self, chunk: ChunkId, blocks: BlockMask) -> Result<(), TransferError> {
        let geometry = self.volume.geometry();
        for run in blocks.runs() {
            let range = geometry.block_bytes(chunk, &run);
            let offset = geometry.chunk_start(chunk) + u64::from(range.start);
            let punched = self.engine.punch(self.file, offset, range.len() as u64).await;
            punched.map_err(|error| TransferError::Io { chunk, error })?;
        }
        Ok(())
    }

    /// Copies the base image's content into a chunk, around the blocks that the guest has written. Does nothing
    /// where nothing is missing. Wakes who waits; when it fails they go on waiting: try again, or
    /// [`fail_waiters`](Self::fail_waiters).
    ///
    /// # Errors
    /// `Io` or `Table`; the chunk is as it was.
    pub async fn fetch_base(&self, chunk: ChunkId) -> Result<(), TransferError> {
        self.check(chunk)?;
        let table = self.volume.table();
        let wanted = |state| state == ChunkState::Base && table.has_base(chunk);
        if !wanted(table.look(chunk).lasting) {
            return Ok(());
        }
        let Some(base) = &self.volume.store().base else { return Ok(()) };
        let geometry = self.volume.geometry();
        let read = base.read(geometry.chunk_start(chunk), geometry.chunk_len(chunk) as usize).await;
        let content = read.map_err(|error| TransferError::Io { chunk, error })?;
        let held = table.begin_exclusive(chunk).await?;
        let (was, mask, _) = held.was();
        if wanted(was) { self.fill(held, mask, geometry, &content).await } else { Ok(()) }
    }

    /// `geometry` is the one that the content was read with: if the volume has grown since, what is past the old end is a
    /// hole, as the base image has it.
    async fn fill(
        &self,
        held: Exclusive,
        mask: BlockMask,
        geometry: Geometry,
        content: &[u8],
    ) -> Result<(), TransferError> {
        let chunk = held.chunk();
        for run in geometry.full_mask(chunk).minus(mask).runs() {
            let range = geometry.block_bytes(chunk, &run);
            let bytes = content.get(range.start as usize..range.end as usize);
            let bytes = bytes.ok_or(TransferError::Malformed(chunk))?;
            self.write(chunk, range.start, IoBuf::copy_of(bytes)).await?;
        }
        Ok(held.finish(after_fetch(mask), BlockMask::EMPTY, None)?)
    }

    /// The source has newer content for `run` chunks from `first` on: they become `Remote`, and nothing of them is
    /// valid here. Versions stay: while the disk is received, an older copy that is still on its way is refused. For a
    /// destination that the guest does not use yet.
    ///
    /// # Errors
    /// `NoChunk` when the run leaves the volume; `Table`.
    pub async fn mark_remote(&self, first: ChunkId, run: u32) -> Result<(), TransferError> {
        self.change(first, run, |now| {
            let (state, mask) = (ChunkState::Remote, BlockMask::EMPTY);
            (now.state != state || !now.mask.is_empty()).then_some(Transition { state, mask, ..now })
        })
        .await
    }

    /// Another run of the source speaks from now on: its versions have nothing to do with those of the run before.
    /// Everything that was installed stays, as version 0, durably. Call it before the new run's number is recorded.
    ///
    /// # Errors
    /// `Table`, or `Io`.
    pub async fn forget_versions(&self) -> Result<(), TransferError> {
        let version = Version(0);
        let all = self.volume.geometry().chunk_count();
        self.change(ChunkId(0), all, |now| (now.version != version).then_some(Transition { version, ..now }))
            .await?;
        self.sync().await
    }

    /// The host went down after an offer had been prepared and before anything was committed under it: what came may
    /// be torn. Every chunk of the source's modified set is `Remote` again, every other one `Base`, durably.
    ///
    /// # Errors
    /// `Table`, or `Io`: call it again before anything else.
    pub async fn revert_to_remote(&self, modified: &ChunkSet) -> Result<(), TransferError> {
        let (mask, version) = (BlockMask::EMPTY, Version(0));
        let all = self.volume.geometry().chunk_count();
        self.change(ChunkId(0), all, |now| {
            let remote = modified.contains(now.chunk);
            let state = if remote { ChunkState::Remote } else { ChunkState::Base };
            let next = Transition { chunk: now.chunk, state, mask, version };
            (next != now).then_some(next)
        })
        .await?;
        self.sync().await
    }

    async fn change(
        &self,
        first: ChunkId,
        run: u32,
        wanted: impl Fn(Transition) -> Option<Transition>,
    ) -> Result<(), TransferError> {
        let count = self.volume.geometry().chunk_count();
        let end = first.0.checked_add(run).filter(|end| *end <= count);
        let end = end.ok_or(TransferError::NoChunk(ChunkId(first.0.saturating_add(run))))?;
        let table = self.volume.table();
        let mut at = first.0;
        while at < end {
            let next = end.min(at.saturating_add(BATCH));
            for chunk in table.change(at..next, &wanted)? {
                let held = table.begin_exclusive(chunk).await?;
                let (state, mask, version) = held.was();
                if let Some(to) = wanted(Transition { chunk, state, mask, version }) {
                    held.finish(to.state, to.mask, Some(to.version))?;
                }
            }
            at = next;
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Makes everything durable that has been installed or completed so far: the layer, then the chunk map.
    ///
    /// # Errors
    /// `Store`: an error of the layer also marks the volume faulty, one of the map may pass with a rotation.
    pub async fn sync(&self) -> Result<(), TransferError> {
        self.check_sound()?;
        let upto = self.volume.map().position();
        if let Err(error) = self.engine.sync(self.file).await {
            self.volume.layer_lost(&error);
            return Err(TransferError::Store(error));
        }
        self.blocking(move |store| store.map.commit(upto)).await
    }

    /// Replaces the journal by a checkpoint if it has grown long or is broken; returns whether it did. Guest I/O goes
    /// on meanwhile. Call it at the start and when `VolumeEvent::RotationDue` says so.
    ///
    /// # Errors
    /// `Store`; nothing is lost, and the next call tries again.
    pub async fn maybe_rotate(&self) -> Result<bool, TransferError> {
        if !self.volume.map().wants_rotation() {
            return Ok(false);
        }
        self.check_sound()?;
        let volume = Arc::clone(&self.volume);
        self.blocking(move |store| {
            let sync = || store.layer.sync().inspect_err(|error| volume.layer_lost(error));
            store.map.rotate(|chunk| volume.table().record(chunk), sync)
        })
        .await?;
        Ok(true)
    }

    /// The kernel tells of lost pages once: a sync that is tried again would succeed, and lie.
    fn check_sound(&self) -> Result<(), TransferError> {
        match self.volume.fault() {
            Some(fault) => Err(TransferError::Store(io::Error::other(fault))),
            None => Ok(()),
        }
    }

    /// Drops all content, durably, for a destination whose migration was cancelled. The gate must be closed, and no
    /// other call may be under way.
    ///
    /// # Errors
    /// `InUse` while the gate is open; `Store`.
    pub async fn wipe(&self) -> Result<(), TransferError> {
        if self.volume.gate().is_open() {
            return Err(TransferError::InUse);
        }
        self.blocking(|store| store.wipe().map_err(io::Error::other)).await?;
        self.volume.table().reset();
        Ok(())
    }

    async fn blocking(
        &self,
        work: impl FnOnce(&Store) -> io::Result<()> + Send + 'static,
    ) -> Result<(), TransferError> {
        let store = Arc::clone(self.volume.store());
        if self.engine.is_simulated() {
            // No thread, no chance: a simulation is one thread, and its metadata takes no time.
            return work(&store).map_err(TransferError::Store);
        }
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        done.map_err(io::Error::other).and_then(|result| result).map_err(TransferError::Store)
    }

    /// Lets the guest requests fail that wait for the content of a chunk; returns how many.
    pub fn fail_waiters(&self, chunk: ChunkId) -> usize {
        if self.volume.geometry().has(chunk) { self.volume.table().fail_waiters(chunk) } else { 0 }
    }

    /// Chunks whose content differs from the base image and is whole here: the paper's ModifiedSet. Arm the tracker
    /// first. A chunk that is being filled counts as what it was.
    #[must_use]
    pub fn modified_chunks(&self) -> ChunkSet {
        self.select(|state, mask| match state {
            ChunkState::Modified | ChunkState::Received | ChunkState::Zero => true,
            ChunkState::Base => !mask.is_empty(),
            ChunkState::Local | ChunkState::Remote | ChunkState::Installing => false,
        })
    }

    /// Chunks that are copies of the base image: what the guest uses of it.
    #[must_use]
    pub fn local_chunks(&self) -> ChunkSet {
        self.select(|state, _| state == ChunkState::Local)
    }

    /// Chunks of which something is still at the source: the paper's RemainingSet.
    #[must_use]
    pub fn remote_chunks(&self) -> ChunkSet {
        self.select(|state, _| state == ChunkState::Remote)
    }

    fn select(&self, wanted: impl Fn(ChunkState, BlockMask) -> bool) -> ChunkSet {
        let mut set = ChunkSet::with_capacity(self.volume.geometry().chunk_count());
        for chunk in self.volume.geometry().chunks() {
            let look = self.volume.table().look(chunk);
            if wanted(look.lasting, look.mask) {
                set.insert(chunk);
            }
        }
        set
    }

    /// Installed chunks with the source's versions, for `Message::Have`. Only before the guest runs here.
    #[must_use]
    pub fn received_versions(&self) -> Vec<(ChunkId, Version)> {
        let set = self.modified_chunks();
        set.iter().map(|chunk| (chunk, self.volume.table().look(chunk).version)).collect()
    }
}

#[cfg(test)]
#[path = "transfer_tests.rs"]
mod tests;
