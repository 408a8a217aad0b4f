// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an operator has forced: the file `forced`, for the daemon, and `recover.log`, for people.
//!
//! The record says only that this side owns the disk. That it took it, from whom and at what price, must outlive the
//! command: a source that comes back is told by it, and whoever wonders months later about a block of zeros finds it.

use super::codec::{Reader, Writer};
use super::error::StoreError;
use super::medium::{Folder, read_all, replace};
use crate::core::message::{Epoch, MigrationId};
use crate::core::takeover::{LostChunks, Was};

/// Name of the file.
pub(super) const NAME: &str = "forced";
/// Name of the log.
pub(super) const LOG: &str = "recover.log";
const MAGIC: [u8; 8] = *b"BLKFFORC";
const VERSION: u32 = 1;
const LONGEST: usize = 4096;

/// An ownership that was forced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forced {
    /// The migration that was given up.
    pub migration: MigrationId,
    /// What this side was.
    pub was: Was,
    /// The epoch of the record before.
    pub before: Epoch,
    /// That of the forced owner.
    pub after: Epoch,
    /// When, in seconds of Unix time.
    pub at: u64,
    /// What became of what is lost.
    pub lost: LostChunks,
    /// Chunks of which a part was lost.
    pub chunks: u64,
    /// Bytes that were lost.
    pub bytes: u64,
}

/// A time in words, as RFC 3339 has it, in UTC.
#[must_use]
pub fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days are counted from 0000-03-01 in eras of 400 years, so that a leap day is the last of its year.
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let date = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Makes the file durable.
pub(super) fn store(folder: &dyn Folder, forced: &Forced) -> Result<(), StoreError> {
    let mut out = Writer::default();
    out.bytes(&MAGIC).u32(VERSION).u32(0).bytes(&forced.migration.0).u64(forced.before.0).u64(forced.after.0);
    out.u64(forced.at).u64(forced.chunks).u64(forced.bytes);
    out.u8(forced.was as u8).u8(forced.lost as u8).bytes(&[0; 2]);
    let crc = crc32fast::hash(&out.0);
    out.u32(crc);
    replace(folder, NAME, |file| file.write_at(&out.0, 0))
        .map_err(|error: std::io::Error| StoreError::io("write", &folder.path(NAME))(error))
}

fn decode(bytes: &[u8]) -> Option<Forced> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    let mut input = Reader(body.get(16..)?);
    let migration = MigrationId(input.array()?);
    let (before, after) = (Epoch(input.u64()?), Epoch(input.u64()?));
    let (at, chunks, bytes) = (input.u64()?, input.u64()?, input.u64()?);
    let (was, lost) = (Was::from_number(input.u8()?)?, LostChunks::from_number(input.u8()?)?);
    input.bytes(2)?;
    input.is_empty().then_some(Forced { migration, was, before, after, at, lost, chunks, bytes })
}

/// The file's content, if there is one.
pub(super) fn load(folder: &dyn Folder) -> Result<Option<Forced>, StoreError> {
    let path = folder.path(NAME);
    let io = |error| StoreError::io("read", &path)(error);
    let Some(file) = folder.open(NAME).map_err(io)? else { return Ok(None) };
    let bytes = read_all(file.as_ref(), LONGEST).map_err(io)?;
    let mut input = Reader(&bytes);
    match (input.array(), input.u32()) {
        (Some(MAGIC), Some(VERSION)) => {}
        (Some(MAGIC), Some(found)) => return Err(StoreError::Version { path, found, known: VERSION }),
        _ => return Err(StoreError::corrupt(&path, "its header is torn or foreign")),
    }
    decode(&bytes).map(Some).ok_or_else(|| StoreError::corrupt(&path, "its checksum or a field is wrong"))
}

/// Appends lines to the log, durably.
pub(super) fn log(folder: &dyn Folder, text: &str) -> Result<(), StoreError> {
    let append = || {
        let file = match folder.open(LOG)? {
            Some(file) => file,
            None => {
                let file = folder.create(LOG)?;
                folder.sync_dir()?;
                file
            }
        };
        file.write_at(text.as_bytes(), file.len()?)?;
        file.sync()
    };
    append().map_err(StoreError::io("write", &folder.path(LOG)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fault::Disk;
    use super::*;

    fn sample() -> Forced {
        Forced {
            migration: MigrationId([7; 16]),
            was: Was::Active,
            before: Epoch(3),
            after: Epoch(1_000_003),
            at: 1_700_000_000,
            lost: LostChunks::Zero,
            chunks: 12,
            bytes: 12 << 18,
        }
    }

    #[test]
    fn it_survives_its_file_and_every_flipped_byte_is_seen() {
        let disk = Disk::new();
        assert!(load(&disk).unwrap().is_none());
        store(&disk, &sample()).unwrap();
        assert_eq!(load(&disk).unwrap(), Some(sample()));
        let len = usize::try_from(disk.open(NAME).unwrap().unwrap().len().unwrap()).unwrap();
        for at in 0..len {
            disk.flip(NAME, at);
            assert!(load(&disk).unwrap_err().to_string().contains("forced"), "byte {at}");
            disk.flip(NAME, at);
        }
    }

    #[test]
    fn the_log_only_grows() {
        let disk = Disk::new();
        log(&disk, "one\n").unwrap();
        log(&disk, "two\n").unwrap();
        disk.crash(1);
        let file = disk.open(LOG).unwrap().unwrap();
        assert_eq!(read_all(file.as_ref(), 100).unwrap(), b"one\ntwo\n");
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_704_067_199, "2023-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
