// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who a state directory is: one small file, written as a whole by rename.
//!
//! It is the last file that is made, so a directory with a superblock is complete. What changes often is not in it.

use super::StoreId;
use super::codec::{Reader, Writer};
use super::error::StoreError;
use super::medium::{Folder, read_all, replace};
use crate::core::geometry::{Geometry, GeometryError};
use crate::core::message::{BaseIdentity, MigrationId, VolumeId};
use parking_lot::Mutex;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Name of the file.
pub(super) const NAME: &str = "superblock";
const MAGIC: [u8; 8] = *b"BLKFSUPR";
const VERSION: u32 = 1;
/// Longest URL or path in bytes.
const MAX_PATH: usize = 4096;
const LONGEST: usize = 16 << 10;
const READ_ONLY: u32 = 1;
const WRITE_THROUGH: u32 = 2;
const CAME_IN: u32 = 4;

/// What a state directory holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Names this directory; drawn when it was made, and never changed. Journals and checkpoints carry it.
    pub(super) store: StoreId,
    /// Names the disk, through all its moves.
    pub volume: VolumeId,
    /// Size of the volume in bytes.
    pub size: u64,
    /// Size of a chunk in bytes.
    pub chunk_size: u32,
    /// The disk that was taken over from a source is read-only for the guest.
    pub read_only: bool,
    /// The guest has set its write cache to write-through.
    pub write_through: bool,
    /// The migration in which the disk came here; its source has the chunks that are `Received` as they are.
    pub came_in: Option<MigrationId>,
    /// The base image; length 0 when there is none.
    pub base: BaseIdentity,
    /// Where the base image is, as it was given last.
    pub base_url: Option<String>,
    /// What GET_ID answers.
    pub serial: String,
    /// The adopted image, when the layer is one.
    pub layer_path: Option<PathBuf>,
}

impl Superblock {
    /// Size and chunk size.
    ///
    /// # Errors
    /// [`GeometryError`], which a superblock that was loaded cannot have.
    pub fn geometry(&self) -> Result<Geometry, GeometryError> {
        Geometry::new(self.size, self.chunk_size)
    }

    fn encode(&self) -> io::Result<Vec<u8>> {
        let mut out = Writer::default();
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let flags = flag(self.read_only, READ_ONLY)
            | flag(self.write_through, WRITE_THROUGH)
            | flag(self.came_in.is_some(), CAME_IN);
        out.bytes(&MAGIC).u32(VERSION).u32(flags).bytes(&self.store.0).bytes(&self.volume.0);
        out.u64(self.size).u32(self.chunk_size).u32(0).u64(self.base.length).bytes(&self.base.digest);
        out.text(self.base_url.as_deref().unwrap_or_default().as_bytes(), MAX_PATH)?;
        out.text(self.serial.as_bytes(), crate::config::MAX_SERIAL)?;
        out.text(self.layer_path.as_deref().unwrap_or(Path::new("")).as_os_str().as_bytes(), MAX_PATH)?;
        if let Some(migration) = self.came_in {
            out.bytes(&migration.0);
        }
        let crc = crc32fast::hash(&out.0);
        out.u32(crc);
        Ok(out.0)
    }

    /// The fields after magic and version.
    fn decode(input: &mut Reader<'_>) -> Option<Self> {
        let flags = input.u32()?;
        let (store, volume) = (StoreId(input.array()?), VolumeId(input.array()?));
        let (size, chunk_size, _) = (input.u64()?, input.u32()?, input.u32()?);
        let base = BaseIdentity { length: input.u64()?, digest: input.array()? };
        let base_url = std::str::from_utf8(input.text(MAX_PATH)?).ok()?;
        let serial = std::str::from_utf8(input.text(crate::config::MAX_SERIAL)?).ok()?;
        let layer_path = input.text(MAX_PATH)?;
        let came_in = if flags & CAME_IN != 0 { Some(MigrationId(input.array()?)) } else { None };
        if !input.is_empty() || flags & !(READ_ONLY | WRITE_THROUGH | CAME_IN) != 0 {
            return None;
        }
        Some(Self {
            store,
            volume,
            size,
            chunk_size,
            read_only: flags & READ_ONLY != 0,
            write_through: flags & WRITE_THROUGH != 0,
            came_in,
            base,
            base_url: (!base_url.is_empty()).then(|| base_url.to_owned()),
            serial: serial.to_owned(),
            layer_path: (!layer_path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(layer_path))),
        })
    }

    /// Reads the superblock of a folder, if it has one.
    ///
    /// # Errors
    /// [`StoreError`]: unreadable, of another program or version, or damaged.
    pub fn load(folder: &dyn Folder) -> Result<Option<Self>, StoreError> {
        let path = folder.path(NAME);
        let io = |error| StoreError::io("read", &path)(error);
        let Some(file) = folder.open(NAME).map_err(io)? else { return Ok(None) };
        let bytes = match read_all(file.as_ref(), LONGEST) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Vec::new(),
            other => other.map_err(io)?,
        };
        let mut input = Reader(&bytes);
        if input.array() != Some(MAGIC) {
            return Err(StoreError::foreign(&path, "was not written by blkferryd"));
        }
        let damaged = |detail: &str| StoreError::corrupt(&path, detail);
        match input.u32() {
            Some(VERSION) => {}
            Some(found) => return Err(StoreError::Version { path, found, known: VERSION }),
            None => return Err(damaged("it is too short")),
        }
        let (body, crc) = bytes.split_last_chunk::<4>().ok_or_else(|| damaged("it is too short"))?;
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return Err(damaged("its checksum is wrong"));
        }
        let mut input = Reader(body.get(12..).unwrap_or(&[]));
        let found = Self::decode(&mut input).ok_or_else(|| damaged("a field is out of its range"))?;
        found.geometry().map_err(|error| damaged(&error.to_string()))?;
        Ok(Some(found))
    }

    /// Writes the superblock; durable when this returns.
    ///
    /// # Errors
    /// [`StoreError::Io`]; the old superblock then stands.
    pub fn save(&self, folder: &dyn Folder) -> Result<(), StoreError> {
        let write = || {
            let bytes = self.encode()?;
            replace(folder, NAME, |file| file.write_at(&bytes, 0))
        };
        write().map_err(StoreError::io("write", &folder.path(NAME)))
    }
}

impl Superblock {
    /// The steps of a growth: the layer is made longer first (`extend`, durably), then the superblock says so, durably. A
    /// crash in between leaves a layer that is longer than the superblock says, which is told from damage by what is
    /// in the rest: nothing.
    ///
    /// # Errors
    /// That of `extend`, or of [`save`](Self::save).
    pub(super) fn grow<E: From<StoreError>>(
        this: &Mutex<Self>,
        folder: &dyn Folder,
        size: u64,
        extend: impl FnOnce(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        // Without the lock: a sync of the layer takes its time.
        extend(size)?;
        let mut superblock = this.lock();
        let grown = Self { size, ..superblock.clone() };
        grown.save(folder)?;
        *superblock = grown;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fault::{Disk, Fault};
    use super::*;

    pub(super) fn sample() -> Superblock {
        Superblock {
            store: StoreId([3; 16]),
            volume: VolumeId([4; 16]),
            size: 1 << 30,
            chunk_size: 256 << 10,
            read_only: true,
            write_through: true,
            came_in: Some(MigrationId([6; 16])),
            base: BaseIdentity { length: 512, digest: [5; 32] },
            base_url: Some("file:///base.img".into()),
            serial: "blkferry".into(),
            layer_path: Some("/images/disk.raw".into()),
        }
    }

    #[test]
    fn it_survives_its_file_and_every_flipped_byte_is_seen() {
        let disk = Disk::new();
        assert!(Superblock::load(&disk).unwrap().is_none());
        for with in [true, false] {
            let mut one = sample();
            if !with {
                (one.base_url, one.layer_path, one.read_only) = (None, None, false);
                (one.write_through, one.came_in) = (false, None);
            }
            one.save(&disk).unwrap();
            assert_eq!(Superblock::load(&disk).unwrap(), Some(one));
        }
        let len = disk.open(NAME).unwrap().unwrap().len().unwrap();
        for at in 0..usize::try_from(len).unwrap() {
            disk.flip(NAME, at);
            let error = Superblock::load(&disk).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("superblock"), "{text}");
            match at {
                0..8 => assert!(matches!(error, StoreError::Foreign { .. })),
                8..12 => assert!(matches!(error, StoreError::Version { .. })),
                _ => assert!(matches!(error, StoreError::Corrupt { .. })),
            }
            disk.flip(NAME, at);
        }
    }

    #[test]
    fn it_is_replaced_whole_or_not_at_all() {
        for at in 1..20 {
            for seed in 0..20 {
                let disk = Disk::new();
                sample().save(&disk).unwrap();
                let new = Superblock { serial: "new".into(), ..sample() };
                disk.fail_at(at, Fault::Stop);
                let saved = new.save(&disk).is_ok();
                disk.crash(seed);
                let found = Superblock::load(&disk).unwrap().unwrap();
                assert!(found == new || (!saved && found == sample()));
            }
        }
    }
}
