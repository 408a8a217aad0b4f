// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The migration record on disk: two slots written in turn, one fdatasync each.
//!
//! The slot that was written last is never the one that is written next, so a torn write leaves the record before
//! it. The very first record goes into both slots: from then on a file without a valid slot is damage, and damage
//! must not be taken for "no migration", or a disk that was given away would be served again.
//!
//! A rename for each record was rejected: it costs two syncs and a change of the directory while a hypervisor waits.

use super::BootId;
use super::codec::{Reader, Writer};
use super::error::StoreError;
use super::medium::{Folder, Medium};
use crate::core::message::{
    BaseIdentity, Epoch, Incarnation, MAX_TEXT, MigrationId, RemainingDigest, VolumeId,
};
use crate::core::record::{
    DestinationRecord, DestinationStage, MigrationRecord, Role, SourceRecord, SourceStage,
};
use parking_lot::Mutex;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Name of the file.
pub(super) const NAME: &str = "record";
const MAGIC: [u8; 8] = *b"BLKFRCRD";
const VERSION: u32 = 1;
/// Bytes of a slot: one block of every disk in use.
const SLOT: usize = 4096;
const HEADER: usize = 48;

fn encode_record(record: &MigrationRecord) -> io::Result<Vec<u8>> {
    let MigrationRecord::V1 { volume, epoch, role } = record;
    let mut out = Writer::default();
    out.u8(1).bytes(&volume.0).u64(epoch.0);
    match role {
        Role::Serving => {
            out.u8(0);
        }
        Role::Idle => {
            out.u8(1);
        }
        Role::Source(source) => {
            let (stage, synced) = match source.stage {
                SourceStage::Pushing => (0, false),
                SourceStage::Offered => (1, false),
                SourceStage::Relinquished { synced } => (2, synced),
                SourceStage::Released { synced } => (3, synced),
            };
            out.u8(2).bytes(&source.migration.0).u8(stage).u8(synced.into()).u32(source.threshold);
            out.u8(source.strategy).u8(source.write_cache.into()).bytes(&source.digest.0.to_le_bytes());
            out.text(source.destination.as_bytes(), MAX_TEXT)?;
        }
        Role::Destination(destination) => {
            let (stage, synced) = match destination.stage {
                DestinationStage::Receiving => (0, false),
                DestinationStage::Prepared => (1, false),
                DestinationStage::Active { source_synced } => (2, source_synced),
                DestinationStage::Complete => (3, false),
            };
            out.u8(3).bytes(&destination.migration.0).u8(stage).u8(synced.into());
            out.u64(destination.incarnation.0).u64(destination.base.length).bytes(&destination.base.digest);
            out.u8(destination.write_cache.into()).bytes(&destination.digest.0.to_le_bytes());
        }
    }
    Ok(out.0)
}

fn decode_record(bytes: &[u8]) -> Option<MigrationRecord> {
    let mut input = Reader(bytes);
    if input.u8()? != 1 {
        return None;
    }
    let (volume, epoch) = (VolumeId(input.array()?), Epoch(input.u64()?));
    let role = match input.u8()? {
        0 => Role::Serving,
        1 => Role::Idle,
        2 => Role::Source(decode_source(&mut input)?),
        3 => Role::Destination(decode_destination(&mut input)?),
        _ => return None,
    };
    input.is_empty().then_some(MigrationRecord::V1 { volume, epoch, role })
}

fn decode_source(input: &mut Reader<'_>) -> Option<SourceRecord> {
    let migration = MigrationId(input.array()?);
    let stage = match (input.u8()?, input.flag()?) {
        (0, false) => SourceStage::Pushing,
        (1, false) => SourceStage::Offered,
        (2, synced) => SourceStage::Relinquished { synced },
        (3, synced) => SourceStage::Released { synced },
        _ => return None,
    };
    let (threshold, strategy, write_cache) = (input.u32()?, input.u8()?, input.flag()?);
    let digest = RemainingDigest(u128::from_le_bytes(input.array()?));
    let destination = std::str::from_utf8(input.text(MAX_TEXT)?).ok()?.to_owned();
    Some(SourceRecord { migration, destination, stage, threshold, strategy, write_cache, digest })
}

fn decode_destination(input: &mut Reader<'_>) -> Option<DestinationRecord> {
    let migration = MigrationId(input.array()?);
    let stage = match (input.u8()?, input.flag()?) {
        (0, false) => DestinationStage::Receiving,
        (1, false) => DestinationStage::Prepared,
        (2, source_synced) => DestinationStage::Active { source_synced },
        (3, false) => DestinationStage::Complete,
        _ => return None,
    };
    let incarnation = Incarnation(input.u64()?);
    let base = BaseIdentity { length: input.u64()?, digest: input.array()? };
    let write_cache = input.flag()?;
    let digest = RemainingDigest(u128::from_le_bytes(input.array()?));
    Some(DestinationRecord { migration, incarnation, base, stage, write_cache, digest })
}

struct Slot {
    seq: u64,
    boot: BootId,
    record: MigrationRecord,
}

fn encode_slot(slot: &Slot) -> io::Result<Vec<u8>> {
    let body = encode_record(&slot.record)?;
    let len = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut out = Writer::default();
    out.bytes(&MAGIC).u32(VERSION).u32(len).u64(slot.seq).bytes(&slot.boot.0).u32(0);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&out.0);
    hasher.update(&body);
    out.u32(hasher.finalize()).bytes(&body);
    if out.0.len() > SLOT {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a migration record that fits no slot"));
    }
    out.0.resize(SLOT, 0);
    Ok(out.0)
}

/// The version when the slot is a valid one, and its content when that version is known.
fn decode_slot(bytes: &[u8]) -> Option<(u32, Option<Slot>)> {
    let mut input = Reader(bytes);
    if input.array()? != MAGIC {
        return None;
    }
    let (version, len, seq) = (input.u32()?, input.u32()?, input.u64()?);
    let boot = BootId(input.array()?);
    let (_, crc) = (input.u32()?, input.u32()?);
    let body = input.bytes(usize::try_from(len).ok()?)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(bytes.get(..HEADER - 4)?);
    hasher.update(body);
    if hasher.finalize() != crc {
        return None;
    }
    if version != VERSION {
        return Some((version, None));
    }
    Some((version, Some(Slot { seq, boot, record: decode_record(body)? })))
}

/// The newest valid slot and its index; none while there is no record.
fn newest(file: &dyn Medium, path: &Path) -> Result<Option<(u64, Slot)>, StoreError> {
    let mut bytes = vec![0; 2 * SLOT];
    file.read_at(&mut bytes, 0).map_err(StoreError::io("read", path))?;
    let mut best: Option<(u64, Slot)> = None;
    for (index, bytes) in (0..).zip(bytes.chunks(SLOT)) {
        match decode_slot(bytes) {
            Some((_, Some(slot))) if best.as_ref().is_none_or(|(_, best)| best.seq < slot.seq) => {
                best = Some((index, slot));
            }
            Some((found, None)) => {
                return Err(StoreError::Version { path: path.to_owned(), found, known: VERSION });
            }
            _ => {}
        }
    }
    // The first record goes into slot 0, then into slot 1: while slot 1 is blank there is none.
    if best.is_none() && bytes[SLOT..].iter().any(|byte| *byte != 0) {
        return Err(StoreError::corrupt(path, "neither of its slots is valid"));
    }
    Ok(best)
}

/// The record as [`RecordFile::open`] would load it; nothing is changed.
pub(super) fn look(folder: &dyn Folder, boot: BootId) -> Result<Option<(MigrationRecord, bool)>, StoreError> {
    let path = folder.path(NAME);
    let Some(file) = folder.open(NAME).map_err(StoreError::io("read", &path))? else { return Ok(None) };
    let best = newest(file.as_ref(), &path)?;
    Ok(best.map(|(_, slot)| (slot.record, slot.boot == boot)))
}

#[derive(Debug, Clone, Copy)]
struct Turn {
    seq: u64,
    /// The slot that holds the newest durable record; none before the first one.
    newest: Option<u64>,
}

/// The file with the migration record.
pub struct RecordFile {
    file: Arc<dyn Medium>,
    boot: BootId,
    turn: Mutex<Turn>,
    loaded: Option<(MigrationRecord, bool)>,
}

impl std::fmt::Debug for RecordFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RecordFile({:?})", self.turn.lock())
    }
}

impl RecordFile {
    /// Opens the file, or makes it. What it holds is durable then: a daemon that was killed may have written a record and
    /// not synced it, and a sync that failed is forgotten. Whoever acts on such a record must not find the one before it
    /// after a crash of the host. So it is written again, into the other slot.
    ///
    /// # Errors
    /// [`StoreError`]: unreadable, of another version, or without a valid slot.
    pub(super) fn open(folder: &dyn Folder, boot: BootId) -> Result<Self, StoreError> {
        let path = folder.path(NAME);
        let io = |error| StoreError::io("read", &path)(error);
        let file = match folder.open(NAME).map_err(io)? {
            Some(file) => file,
            None => {
                let file = folder.create(NAME).map_err(io)?;
                file.set_len(2 * SLOT as u64).and_then(|()| file.sync()).map_err(io)?;
                folder.sync_dir().map_err(io)?;
                file
            }
        };
        let best = newest(file.as_ref(), &path)?;
        let turn =
            Turn { seq: best.as_ref().map_or(0, |(_, slot)| slot.seq), newest: best.as_ref().map(|b| b.0) };
        let loaded = best.map(|(_, slot)| (slot.record, slot.boot == boot));
        let opened = Self { file, boot, turn: Mutex::new(turn), loaded };
        if let Some((record, true)) = &opened.loaded {
            opened.store(record).map_err(StoreError::io("write", &path))?;
        }
        Ok(opened)
    }

    /// The record as it was when the file was opened, and whether it was written since the host booted.
    #[must_use]
    pub fn load(&self) -> Option<(MigrationRecord, bool)> {
        self.loaded.clone()
    }

    /// Makes a record durable: blocks for one fdatasync (two for the first record of all).
    ///
    /// # Errors
    /// The kernel's, or `InvalidInput` for a text longer than a message may have. The record before it then stands,
    /// or, after a crash of the host, either of the two.
    pub fn store(&self, record: &MigrationRecord) -> io::Result<()> {
        let mut turn = self.turn.lock();
        let slots: &[u64] = match turn.newest {
            None => &[0, 1],
            Some(0) => &[1],
            Some(_) => &[0],
        };
        for index in slots {
            let slot = Slot { seq: turn.seq + 1, boot: self.boot, record: record.clone() };
            let bytes = encode_slot(&slot)?;
            turn.seq += 1;
            self.file.write_at(&bytes, index * SLOT as u64)?;
            self.file.sync()?;
        }
        turn.newest = slots.last().copied();
        Ok(())
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
