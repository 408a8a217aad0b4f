// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bytes at rest (layer L2): everything that a volume is, in one state directory. docs/on-disk.md has every byte.
//!
//! ```text
//!   superblock            who this directory is; made last, so its presence means that all else is there
//!   layer                 the local data, a sparse file (or an adopted image elsewhere)
//!   journal.g checkpoint.g  the chunk map: what of the layer is valid
//!   record                the migration record
//!   remaining             a destination's remaining set of the prepared epoch
//!   forced recover.log    what an operator has forced, for the daemon and for people
//!   lock                  held as long as the daemon lives
//! ```
//!
//! The rule above all: what the map says must be true of the page cache at every moment, and of the disk after a
//! flush. The guest's data does not pass through here: [`Store::layer`] hands its file to the engines.
//!
//! Nothing here guesses. A directory that is torn, foreign, of another version or in use is refused with a
//! [`StoreError`] that names the file and what to do: a volume that starts with the wrong content is worse than one
//! that does not start.

pub mod base;
mod checkpoint;
mod codec;
mod error;
pub mod fault;
mod files;
mod forced;
mod journal;
mod layer;
mod look;
mod map;
pub mod medium;
mod record;
mod remaining;
mod runs;
mod simulated;
mod state_dir;
mod superblock;
mod takeover;

pub use base::{BaseError, BaseImage, BoxFuture};
pub use error::{GrowError, StoreError};
pub use files::Files;
pub use forced::{Forced, utc};
pub use layer::{Grain, Layer, LayerLook};
pub use look::{Look, Missing, look, look_in};
pub use map::{ChunkMap, ROTATE_AT, Recovered};
pub use record::RecordFile;
pub use remaining::RemainingRun;
pub use runs::{Run, Transition};
pub use simulated::SimBase;
pub use state_dir::StateDir;
pub use superblock::Superblock;
pub use takeover::TakeOver;

use crate::config::{CacheMode, Config};
use crate::core::chunk::ChunkState;
use crate::core::geometry::{ChunkId, DEFAULT_CHUNK_SIZE, Geometry, SECTOR};
use crate::core::message::{BaseIdentity, Epoch, MigrationId, VolumeId};
use crate::core::set::ChunkSet;
use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Names one boot of the host: the page cache of another one is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// That of the running kernel (`/proc/sys/kernel/random/boot_id`).
    ///
    /// # Errors
    /// procfs is missing or strange.
    pub fn current() -> io::Result<Self> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        uuid::Uuid::parse_str(text.trim()).map(|id| Self(id.into_bytes())).map_err(io::Error::other)
    }
}

/// Names one state directory, so that files of two are not mixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct StoreId([u8; 16]);

/// What a volume is asked to be; what is `None` is taken from the directory, or is the default of a new volume.
#[derive(Debug, Clone, Default)]
pub struct StoreParams {
    /// Path or URL of the base image.
    pub base: Option<String>,
    /// Size in bytes; with a base at least its length.
    pub size: Option<u64>,
    /// Chunk size in bytes.
    pub chunk_size: Option<u32>,
    /// Raw image that a new volume adopts as a layer that is modified as a whole.
    pub blk_file: Option<PathBuf>,
    /// What GET_ID answers; for a new volume only.
    pub serial: String,
    /// Use of the page cache.
    pub cache: CacheMode,
}

impl From<&Config> for StoreParams {
    /// A chunk size that is the default counts as not asked for, so that a volume with another one can be opened
    /// again without the flag.
    fn from(config: &Config) -> Self {
        Self {
            base: config.base.clone(),
            size: config.size,
            chunk_size: (config.chunk_size != DEFAULT_CHUNK_SIZE).then_some(config.chunk_size),
            blk_file: config.blk_file.clone(),
            serial: config.serial.clone(),
            cache: config.cache,
        }
    }
}

/// An open state directory.
pub struct Store {
    /// The local data.
    pub layer: Layer,
    /// The chunk map.
    pub map: ChunkMap,
    /// The migration record.
    pub record: RecordFile,
    /// The base image, if the volume has one.
    pub base: Option<Arc<dyn BaseImage>>,
    /// The chunk map as it was found when the store was opened.
    pub recovered: Recovered,
    superblock: Mutex<Superblock>,
    growing: Mutex<()>,
    /// As it was opened.
    geometry: Geometry,
    /// Holds the lock: dropped last.
    state: StateDir,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({}, {} bytes)", self.state.path().display(), self.layer.size())
    }
}

impl Store {
    /// Opens the volume of a state directory; makes it first if the directory is empty or missing.
    ///
    /// # Errors
    /// [`StoreError`]; nothing was changed unless a volume was being made.
    pub fn open(dir: &Path, params: &StoreParams) -> Result<Self, StoreError> {
        Self::open_in(StateDir::claim(dir)?, params)
    }

    /// As [`open`](Self::open), in a directory that has been claimed. A destination claims it at its start and opens
    /// it when a source has said how large the volume is.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_in(state: StateDir, params: &StoreParams) -> Result<Self, StoreError> {
        let boot = BootId::current()
            .map_err(StoreError::io("read", Path::new("/proc/sys/kernel/random/boot_id")))?;
        Self::open_at_boot(state, params, boot)
    }

    /// As [`open_in`](Self::open_in), as if the host had this boot id: for tests of what a crash of the host leaves.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_at_boot(state: StateDir, params: &StoreParams, boot: BootId) -> Result<Self, StoreError> {
        let (mut superblock, base) = match state.superblock()? {
            Some(found) => {
                check_params(state.path(), &found, params)?;
                let base = find_base(&state, &found, params)?;
                (found, base)
            }
            None => create(&state, params, boot)?,
        };
        if params.base.is_some() && params.base != superblock.base_url {
            superblock.base_url.clone_from(&params.base);
            superblock.save(state.folder().as_ref())?;
        }
        let geometry = superblock.geometry()?;
        let layer = state.open_layer(superblock.layer_path.as_deref(), geometry.size(), params.cache)?;
        let files = Files::open(state.folder(), &superblock, boot, |found| settle(&layer, &geometry, found))?;
        let Files { map, recovered, record, .. } = files;
        Ok(Self {
            layer,
            map,
            record,
            base,
            recovered,
            superblock: Mutex::new(superblock),
            growing: Mutex::new(()),
            geometry,
            state,
        })
    }

    /// Size and chunk size, as they are now.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry.resized(self.layer.size()).unwrap_or(self.geometry)
    }

    /// Makes the volume larger, durably: the layer, the superblock, then the chunk map in memory. The new bytes are zeros.
    /// `alone` is called before the length of the layer's file changes; what it returns keeps writes to the last chunk away
    /// until that is done (see [`Layer`]). `prepare` is called when all of that is durable, and before the map takes notes of new chunks; nobody may use
    /// one before this has returned. Blocks for a sync of the layer.
    ///
    /// # Errors
    /// [`GrowError`]: the size is what it was; call it again, also for another size.
    pub fn grow<A>(
        &self,
        size: u64,
        alone: impl FnOnce() -> A,
        prepare: impl FnOnce(&Geometry),
    ) -> Result<Geometry, GrowError> {
        let _one_at_a_time = self.growing.lock();
        let have = self.layer.size();
        if size < have {
            return Err(GrowError::Shrink { have, asked: size });
        }
        let geometry = self.geometry.resized(size)?;
        if size > have {
            let folder = self.state.folder().as_ref();
            Superblock::grow(&self.superblock, folder, size, |size| self.layer.extend(size, alone))?;
            prepare(&geometry);
            self.map.grow(geometry.chunk_count());
            self.layer.grown(size);
        }
        Ok(geometry)
    }

    /// The state directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.state.path()
    }

    /// A copy of the superblock.
    #[must_use]
    pub fn superblock(&self) -> Superblock {
        self.superblock.lock().clone()
    }

    /// Identity of the base image; length 0 when there is none.
    #[must_use]
    pub fn base_identity(&self) -> BaseIdentity {
        self.superblock.lock().base.clone()
    }

    /// Takes over the identity of a source's volume, durably, and the migration that it comes in; `None` for a new disk.
    /// Call it before anything of the volume is kept.
    ///
    /// # Errors
    /// [`StoreError::Io`]; the identity is then the old one.
    pub fn adopt(
        &self,
        volume: VolumeId,
        serial: &str,
        read_only: bool,
        came_in: Option<MigrationId>,
    ) -> Result<(), StoreError> {
        let mut superblock = self.superblock.lock();
        let serial = serial.to_owned();
        let adopted = Superblock { volume, serial, read_only, came_in, ..superblock.clone() };
        adopted.save(self.state.folder().as_ref())?;
        *superblock = adopted;
        Ok(())
    }

    /// Remembers the guest's cache mode, durably: no hypervisor says it again to a daemon that was started anew. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Io`]; what was remembered before then stands.
    pub fn set_write_through(&self, on: bool) -> Result<(), StoreError> {
        let mut superblock = self.superblock.lock();
        if superblock.write_through != on {
            let changed = Superblock { write_through: on, ..superblock.clone() };
            changed.save(self.state.folder().as_ref())?;
            *superblock = changed;
        }
        Ok(())
    }

    /// Forgets all content, durably: every chunk is `Base`, the layer is one hole, there is no remaining set and no
    /// handoff. For a destination whose migration was cancelled; the caller has stopped all I/O, and empties its own
    /// table. Blocks.
    ///
    /// # Errors
    /// [`StoreError`]; call it again. An adopted image is never wiped: [`StoreError::Layer`].
    pub fn wipe(&self) -> Result<(), StoreError> {
        let path = self.layer.path();
        self.check_wipeable()?;
        // The map first: what it calls valid must not be punched away before.
        self.map.reset().map_err(StoreError::io("reset the chunk map in", self.state.path()))?;
        let punched = self.layer.punch(0, self.layer.size()).and_then(|()| self.layer.sync());
        punched.map_err(StoreError::io("empty", path))?;
        let folder = self.state.folder();
        for name in [remaining::NAME, forced::NAME] {
            folder.remove(name).map_err(StoreError::io("remove", &folder.path(name)))?;
        }
        folder.sync_dir().map_err(StoreError::io("sync", self.state.path()))
    }

    fn check_wipeable(&self) -> Result<(), StoreError> {
        if !self.layer.is_adopted() {
            return Ok(());
        }
        let detail = "an adopted image is not wiped; a destination needs a layer of its own".to_owned();
        Err(StoreError::Layer { path: self.layer.path().to_owned(), detail })
    }

    /// Makes holes of these chunks in the layer; the caller's map says already that nothing is in them. Not durable by
    /// itself. Blocks.
    ///
    /// # Errors
    /// [`StoreError`]; call it again. As [`wipe`](Self::wipe) for an adopted image.
    pub fn drop_chunks(&self, chunks: &ChunkSet) -> Result<(), StoreError> {
        self.check_wipeable()?;
        let geometry = self.geometry();
        let hole = |chunk: ChunkId| {
            let (start, len) = (geometry.chunk_start(chunk), geometry.chunk_len(chunk));
            start..start + u64::from(len)
        };
        let mut ranges = chunks.iter().map(hole).peekable();
        while let Some(mut range) = ranges.next() {
            while let Some(next) = ranges.next_if(|next| next.start == range.end) {
                range.end = next.end;
            }
            let dropped = self.layer.make_hole(range.start, range.end - range.start);
            dropped.map_err(StoreError::io("make a hole in", self.layer.path()))?;
        }
        Ok(())
    }

    /// Makes the source's modified set durable as it stands at the offer of `epoch` (runs in rising order).
    ///
    /// # Errors
    /// [`StoreError::Io`]; the set of the epoch before then stands.
    pub fn store_remaining(
        &self,
        epoch: Epoch,
        runs: impl Iterator<Item = RemainingRun>,
    ) -> Result<(), StoreError> {
        remaining::store(self.state.folder().as_ref(), epoch, runs)
    }

    /// The set that was stored last, and its epoch.
    ///
    /// # Errors
    /// [`StoreError`]: unreadable or damaged.
    pub fn load_remaining(&self) -> Result<Option<(Epoch, Vec<RemainingRun>)>, StoreError> {
        remaining::load(self.state.folder().as_ref(), self.geometry().chunk_count())
    }
}

/// Makes the layer true to a recovered map, and durable: then the map may count as committed.
fn settle(layer: &Layer, geometry: &Geometry, found: &Recovered) -> Result<(), StoreError> {
    let zeros = found.runs.iter().filter(|run| found.host_crashed && run.state == ChunkState::Zero);
    for run in zeros {
        let start = geometry.chunk_start(run.first);
        let end = (u64::from(run.end()) * u64::from(geometry.chunk_size())).min(geometry.size());
        layer.punch(start, end - start).map_err(StoreError::io("punch a hole into", layer.path()))?;
    }
    layer.sync().map_err(StoreError::io("sync", layer.path()))
}

/// Refuses parameters that contradict an existing volume.
fn check_params(dir: &Path, found: &Superblock, params: &StoreParams) -> Result<(), StoreError> {
    let refuse = |what, have: String, asked: String, hint| {
        Err(StoreError::Mismatch { path: dir.to_owned(), what, have, asked, hint })
    };
    if let Some(size) = params.size.filter(|size| *size < found.size) {
        // The daemon of a volume that has grown is started with the arguments that it always had.
        log::warn!("--size {size} is less than the volume has: it keeps its {} bytes", found.size);
    }
    if let Some(size) = params.size.filter(|size| *size > found.size) {
        let hint = "leave out --size; a volume grows while it is served (blkferry resize)";
        return refuse("size", found.size.to_string(), size.to_string(), hint);
    }
    if let Some(size) = params.chunk_size.filter(|size| *size != found.chunk_size) {
        let hint = "leave out --chunk-size; it is fixed when a volume is made";
        return refuse("chunk size", found.chunk_size.to_string(), size.to_string(), hint);
    }
    if let Some(image) = &params.blk_file {
        let asked = absolute(image)?;
        if found.layer_path.as_ref() != Some(&asked) {
            let have =
                found.layer_path.as_ref().map_or("of its own".to_owned(), |path| path.display().to_string());
            let hint = "an image is adopted only when a volume is made: give an empty state directory";
            return refuse("layer", have, asked.display().to_string(), hint);
        }
    }
    Ok(())
}

/// Opens the base image of an existing volume and checks that it is the one that the volume was made on.
fn find_base(
    state: &StateDir,
    found: &Superblock,
    params: &StoreParams,
) -> Result<Option<Arc<dyn BaseImage>>, StoreError> {
    let refuse = |have: String, asked: String, hint| {
        let path = state.path().to_owned();
        Err(StoreError::Mismatch { path, what: "base image", have, asked, hint })
    };
    if found.base.length == 0 {
        let hint = "leave out --base; a volume gets its base image when it is made";
        return params.base.as_ref().map_or(Ok(None), |url| refuse("none".to_owned(), url.clone(), hint));
    }
    let Some(url) = params.base.as_ref().or(found.base_url.as_ref()) else {
        return refuse(identity_text(&found.base), "none".to_owned(), "say with --base where it is");
    };
    let base = state.open_base(url, params.cache)?;
    if *base.identity() != found.base {
        let asked = format!("{url} ({})", identity_text(base.identity()));
        let hint = "give the image that the volume was made on, unchanged";
        return refuse(identity_text(&found.base), asked, hint);
    }
    Ok(Some(base))
}

fn identity_text(identity: &BaseIdentity) -> String {
    let digest: String = identity.digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("of {} bytes, digest {digest}..", identity.length)
}

fn absolute(path: &Path) -> Result<PathBuf, StoreError> {
    std::fs::canonicalize(path).map_err(StoreError::io("find", path))
}

/// Makes a new volume; the superblock last.
fn create(
    state: &StateDir,
    params: &StoreParams,
    boot: BootId,
) -> Result<(Superblock, Option<Arc<dyn BaseImage>>), StoreError> {
    let base = params.base.as_deref().map(|url| state.open_base(url, params.cache)).transpose()?;
    let layer_path = params.blk_file.as_deref().map(absolute).transpose()?;
    let length = base.as_ref().map_or(0, |base| base.len());
    let size = match (&layer_path, params.size, length) {
        (Some(path), size, _) => {
            let found = Layer::adoptable(path)?;
            if let Some(size) = size.filter(|size| *size != found) {
                let detail = format!("it has {found} bytes, --size says {size}; leave --size out");
                return Err(StoreError::Layer { path: path.clone(), detail });
            }
            found
        }
        (None, Some(size), _) => size,
        (None, None, 0) => return Err(StoreError::NoSize { path: state.path().to_owned() }),
        (None, None, length) => length.next_multiple_of(SECTOR),
    };
    if length > size {
        return Err(StoreError::BaseTooLong { base: length, size });
    }
    let geometry = Geometry::new(size, params.chunk_size.unwrap_or(DEFAULT_CHUNK_SIZE))?;
    let superblock = Superblock {
        store: StoreId(uuid::Uuid::new_v4().into_bytes()),
        volume: VolumeId(uuid::Uuid::new_v4().into_bytes()),
        size,
        chunk_size: geometry.chunk_size(),
        read_only: false,
        write_through: false,
        came_in: None,
        base: base.as_ref().map(|base| base.identity().clone()).unwrap_or_default(),
        base_url: params.base.clone(),
        serial: params.serial.clone(),
        layer_path,
    };
    state.clear_remains()?;
    let first = if superblock.layer_path.is_some() { ChunkState::Modified } else { ChunkState::Base };
    if superblock.layer_path.is_none() {
        state.create_layer(size)?;
    }
    Files::create(state.folder(), &superblock, boot, first)?;
    Ok((superblock, base))
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod growth_tests;

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
