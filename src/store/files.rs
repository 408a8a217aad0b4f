// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files of a state directory but for the layer and the lock, in any folder: how they are made and opened.
//!
//! [`super::Store`] puts the layer, the base image and the claim on the directory around it. In a folder in memory
//! ([`super::fault::Disk`]) it is what crash images and damaged files are tried on.

use super::error::StoreError;
use super::map::{ChunkMap, Owner, Recovered};
use super::medium::Folder;
use super::record::RecordFile;
use super::remaining::{self, RemainingRun};
use super::superblock::Superblock;
use super::{BootId, StoreId};
use crate::core::chunk::ChunkState;
use crate::core::geometry::Geometry;
use crate::core::message::{BaseIdentity, Epoch, VolumeId};
use std::sync::Arc;

/// Chunk map, migration record and remaining set of a volume.
pub struct Files {
    /// The chunk map.
    pub map: ChunkMap,
    /// The chunk map as it was found.
    pub recovered: Recovered,
    /// The migration record.
    pub record: RecordFile,
    folder: Arc<dyn Folder>,
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Files({:?}, {:?})", self.map, self.record)
    }
}

impl Superblock {
    /// That of a volume with nothing special: no base image, no serial, a layer of its own. `store` names the state
    /// directory; no other may have the same.
    #[must_use]
    pub fn plain(store: [u8; 16], volume: VolumeId, geometry: &Geometry) -> Self {
        Self {
            store: StoreId(store),
            volume,
            size: geometry.size(),
            chunk_size: geometry.chunk_size(),
            read_only: false,
            write_through: false,
            came_in: None,
            base: BaseIdentity::default(),
            base_url: None,
            serial: String::new(),
            layer_path: None,
        }
    }
}

fn owner(superblock: &Superblock, boot: BootId) -> Result<Owner, StoreError> {
    Ok(Owner { store: superblock.store, boot, chunks: superblock.geometry()?.chunk_count() })
}

impl Files {
    /// Makes the files of a new volume, all chunks in state `first`; the superblock last.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Geometry`]
    pub fn create(
        folder: &Arc<dyn Folder>,
        superblock: &Superblock,
        boot: BootId,
        first: ChunkState,
    ) -> Result<(), StoreError> {
        ChunkMap::create(folder, owner(superblock, boot)?, first)?;
        RecordFile::open(folder.as_ref(), boot)?;
        superblock.save(folder.as_ref())
    }

    /// Opens the files of the volume that `superblock` (as it was loaded from the folder) names. `settle` is told how the
    /// chunks were found, and must make the layer true to that and sync it.
    ///
    /// # Errors
    /// [`StoreError`], also that of `settle`.
    pub fn open(
        folder: &Arc<dyn Folder>,
        superblock: &Superblock,
        boot: BootId,
        settle: impl FnOnce(&Recovered) -> Result<(), StoreError>,
    ) -> Result<Self, StoreError> {
        let (map, recovered) = ChunkMap::open(folder, owner(superblock, boot)?, settle)?;
        let record = RecordFile::open(folder.as_ref(), boot)?;
        Ok(Self { map, recovered, record, folder: Arc::clone(folder) })
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
        remaining::store(self.folder.as_ref(), epoch, runs)
    }

    /// The set that was stored last in a volume of `chunks` chunks, and its epoch.
    ///
    /// # Errors
    /// [`StoreError`]: unreadable, of another version, or damaged.
    pub fn load_remaining(&self, chunks: u32) -> Result<Option<(Epoch, Vec<RemainingRun>)>, StoreError> {
        remaining::load(self.folder.as_ref(), chunks)
    }
}
