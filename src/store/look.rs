// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A look at a state directory that changes nothing in it.
//!
//! Opening a volume changes much: it names itself in the lock, begins a generation of the map, deletes older ones,
//! cuts a layer that is too long, punches holes, syncs. An operator who asks what a directory holds may be looking at
//! the only copy of something, or at a disk that is about to fail. So this reads through a folder that refuses every
//! change, and tells what an opening would find, by the same rules and with the same errors.

use super::error::StoreError;
use super::layer::LayerLook;
use super::medium::{Folder, Medium};
use super::{
    BootId, Forced, Recovered, Run, StateDir, Superblock, forced, layer, map, record, remaining, state_dir,
};
use crate::core::chunk::ChunkState;
use crate::core::geometry::{BlockMask, ChunkId, Geometry};
use crate::core::message::{Epoch, Version};
use crate::core::record::{DestinationStage, MigrationRecord, Role};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A folder of the file system in which nothing can be changed.
#[derive(Debug)]
struct ReadOnlyDirectory(PathBuf);

fn refused<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "nothing is changed by a look"))
}

impl Folder for ReadOnlyDirectory {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn Medium>>> {
        match File::open(self.0.join(name)) {
            Ok(file) => Ok(Some(Arc::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&self, _name: &str) -> io::Result<Arc<dyn Medium>> {
        refused()
    }

    fn rename(&self, _from: &str, _to: &str) -> io::Result<()> {
        refused()
    }

    fn remove(&self, _name: &str) -> io::Result<()> {
        refused()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let names = std::fs::read_dir(&self.0)?;
        names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn sync_dir(&self) -> io::Result<()> {
        refused()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// What a state directory holds.
#[derive(Debug)]
pub struct Look {
    /// Who it is.
    pub superblock: Superblock,
    /// The layer's file.
    pub layer: LayerLook,
    /// The chunk map as an opening would find it.
    pub recovered: Recovered,
    /// The migration record, and whether it was written since the host booted.
    pub record: Option<(MigrationRecord, bool)>,
    /// What an operator has forced, if it is in force.
    pub forced: Option<Forced>,
    /// The chunks as a daemon that starts now would have them: as in `recovered`, unless `reverts`.
    pub runs: Vec<Run>,
    /// The host went down before what had come was committed: all of it counts as not come.
    pub reverts: bool,
    /// Keeps a daemon from starting meanwhile.
    _lock: Option<File>,
}

/// What is not here of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Missing {
    /// Chunks of which a part is not here.
    pub chunks: u64,
    /// Bytes that are not here.
    pub bytes: u64,
    /// Where they are, in bytes of the volume: rising, and joined where they touch.
    pub ranges: Vec<Range<u64>>,
}

impl Missing {
    /// What the remote chunks of `runs` lack.
    #[must_use]
    pub fn of(geometry: &Geometry, runs: &[Run]) -> Self {
        let mut missing = Self::default();
        for run in runs.iter().filter(|run| run.state == ChunkState::Remote) {
            missing.chunks += u64::from(run.count);
            if run.mask.is_empty() {
                let end = u64::from(run.end()) * u64::from(geometry.chunk_size());
                missing.add(geometry.chunk_start(run.first)..end.min(geometry.size()));
                continue;
            }
            for chunk in (run.first.0..run.end()).map(ChunkId) {
                for blocks in geometry.full_mask(chunk).minus(run.mask).runs() {
                    let (start, bytes) = (geometry.chunk_start(chunk), geometry.block_bytes(chunk, &blocks));
                    missing.add(start + u64::from(bytes.start)..start + u64::from(bytes.end));
                }
            }
        }
        missing
    }

    fn add(&mut self, range: Range<u64>) {
        self.bytes += range.end - range.start;
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
    }
}

/// Looks at a state directory; see the module's header.
///
/// # Errors
/// `InUse` while a daemon has it; `NoVolume`; else what an opening would refuse, by the same names.
pub fn look(dir: &Path) -> Result<Look, StoreError> {
    let lock = state_dir::peek(dir)?;
    look_at(dir, lock)
}

/// Looks at a directory that this process has claimed.
///
/// # Errors
/// As [`look`].
pub fn look_in(state: &StateDir) -> Result<Look, StoreError> {
    look_at(state.path(), None)
}

fn look_at(dir: &Path, lock: Option<File>) -> Result<Look, StoreError> {
    let boot =
        BootId::current().map_err(StoreError::io("read", Path::new("/proc/sys/kernel/random/boot_id")))?;
    let folder = ReadOnlyDirectory(dir.to_owned());
    let Some(superblock) = Superblock::load(&folder)? else {
        state_dir::check_remains(dir)?;
        return Err(StoreError::NoVolume { path: dir.to_owned() });
    };
    let geometry = superblock.geometry()?;
    let path = superblock.layer_path.clone().unwrap_or_else(|| dir.join(layer::NAME));
    let layer = layer::look(&path, geometry.size())?;
    let owner = map::Owner { store: superblock.store, boot, chunks: geometry.chunk_count() };
    let recovered = map::look(&folder, owner)?;
    let record = record::look(&folder, boot)?;
    let forced = in_force(forced::load(&folder)?, record.as_ref().map(|(record, _)| record));
    let reverts = reverts(record.as_ref(), &recovered);
    let runs = match reverts {
        Some(epoch) => reverted(&folder, geometry.chunk_count(), epoch)?,
        None => recovered.runs.clone(),
    };
    let reverts = reverts.is_some();
    Ok(Look { superblock, layer, recovered, record, forced, runs, reverts, _lock: lock })
}

/// What was forced counts from the record on that made it so: the file is written first.
pub(super) fn in_force(forced: Option<Forced>, record: Option<&MigrationRecord>) -> Option<Forced> {
    let MigrationRecord::V1 { epoch, .. } = record?;
    forced.filter(|forced| forced.after <= *epoch)
}

/// The epoch whose modified set is remote again, if the host went down before anything was committed under it.
fn reverts(record: Option<&(MigrationRecord, bool)>, recovered: &Recovered) -> Option<Epoch> {
    let (MigrationRecord::V1 { epoch, role, .. }, same_boot) = record?;
    let Role::Destination(destination) = role else { return None };
    let holds = matches!(destination.stage, DestinationStage::Prepared | DestinationStage::Active { .. });
    let committed = recovered.committed_handoff.is_some_and(|handoff| handoff >= *epoch);
    (holds && !same_boot && !committed).then_some(*epoch)
}

/// Everything as it was before anything came, and the source's modified set remote.
fn reverted(folder: &dyn Folder, chunks: u32, epoch: Epoch) -> Result<Vec<Run>, StoreError> {
    let stored = remaining::load(folder, chunks)?.filter(|(of, _)| *of == epoch);
    let missing = || StoreError::corrupt(&folder.path(remaining::NAME), "it is missing, or of another epoch");
    let (_, set) = stored.ok_or_else(missing)?;
    let run = |first: u32, end: u32, state| Run {
        first: ChunkId(first),
        count: end - first,
        state,
        mask: BlockMask::EMPTY,
        version: Version(0),
    };
    let (mut runs, mut next) = (Vec::new(), 0);
    for one in set {
        runs.push(run(next, one.first.0, ChunkState::Base));
        next = one.first.0 + one.run;
        runs.push(run(one.first.0, next, ChunkState::Remote));
    }
    runs.push(run(next, chunks, ChunkState::Base));
    Ok(super::runs::merged(runs.into_iter().filter(|run| run.count > 0)).collect())
}

#[cfg(test)]
#[path = "look_tests.rs"]
mod tests;
