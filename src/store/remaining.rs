// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a destination has been told is at the source: the file `remaining`, written when an offer is prepared.
//!
//! It holds the source's whole modified set and not only what has not come yet: if the host goes down before
//! anything was committed under the new ownership, all that came is dropped and pulled again, and this file says
//! what "all" is. The paper's RemainingSet and write counts are the entries that are marked.

use super::codec::{Reader, Writer};
use super::error::StoreError;
use super::medium::{Folder, read_all, replace};
use crate::core::geometry::ChunkId;
use crate::core::message::Epoch;
use std::io;

/// Name of the file.
pub(super) const NAME: &str = "remaining";
const MAGIC: [u8; 8] = *b"BLKFREMN";
const VERSION: u32 = 1;
const ENTRY: usize = 12;
/// Longest file that is read: every chunk of the largest volume in a run of its own would be longer, but a table of
/// that size would not fit in memory either.
const LONGEST: usize = 1 << 31;

/// Consecutive chunks of the source's modified set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemainingRun {
    /// First chunk.
    pub first: ChunkId,
    /// Number of chunks, at least 1.
    pub run: u32,
    /// How often the source counted a write to each (capped at 255).
    pub count: u8,
    /// The destination lacks the current content.
    pub still_remaining: bool,
}

/// Makes the set of an epoch durable; neighbours that are alike are merged.
///
/// # Errors
/// [`StoreError::Io`]; the set of the epoch before then stands.
pub(super) fn store(
    folder: &dyn Folder,
    epoch: Epoch,
    runs: impl Iterator<Item = RemainingRun>,
) -> Result<(), StoreError> {
    let mut merged: Vec<RemainingRun> = Vec::new();
    for run in runs.filter(|run| run.run > 0) {
        match merged.last_mut() {
            Some(last)
                if last.first.0.checked_add(last.run) == Some(run.first.0)
                    && (last.count, last.still_remaining) == (run.count, run.still_remaining) =>
            {
                last.run = last.run.saturating_add(run.run);
            }
            _ => merged.push(run),
        }
    }
    let mut out = Writer::default();
    out.bytes(&MAGIC).u32(VERSION).u32(0).u64(epoch.0).u64(merged.len() as u64);
    for run in &merged {
        out.u32(run.first.0).u32(run.run).u8(run.count).u8(run.still_remaining.into()).bytes(&[0; 2]);
    }
    let crc = crc32fast::hash(&out.0);
    out.u32(crc);
    replace(folder, NAME, |file| file.write_at(&out.0, 0))
        .map_err(|error: io::Error| StoreError::io("write", &folder.path(NAME))(error))
}

fn decode(bytes: &[u8], chunks: u32) -> Option<(Epoch, Vec<RemainingRun>)> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    let mut input = Reader(body.get(16..)?);
    let (epoch, count) = (Epoch(input.u64()?), usize::try_from(input.u64()?).ok()?);
    if input.0.len() != count.checked_mul(ENTRY)? {
        return None;
    }
    let mut runs = Vec::with_capacity(count);
    let mut next = 0;
    for _ in 0..count {
        let (first, run) = (ChunkId(input.u32()?), input.u32()?);
        let (count, still_remaining, _) = (input.u8()?, input.flag()?, input.bytes(2)?);
        let end = first.0.checked_add(run).filter(|end| *end <= chunks)?;
        if run == 0 || first.0 < next {
            return None;
        }
        next = end;
        runs.push(RemainingRun { first, run, count, still_remaining });
    }
    Some((epoch, runs))
}

/// The set that was stored last, and its epoch, if there is one.
///
/// # Errors
/// [`StoreError`]: unreadable, of another version, or damaged.
pub(super) fn load(
    folder: &dyn Folder,
    chunks: u32,
) -> Result<Option<(Epoch, Vec<RemainingRun>)>, StoreError> {
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
    let found = decode(&bytes, chunks);
    found.map(Some).ok_or_else(|| StoreError::corrupt(&path, "its checksum or an entry is wrong"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fault::{Disk, Fault};
    use super::*;
    use proptest::prelude::*;

    fn each(runs: &[RemainingRun]) -> Vec<(u32, u8, bool)> {
        let chunks =
            runs.iter().flat_map(|r| (r.first.0..r.first.0 + r.run).map(|n| (n, r.count, r.still_remaining)));
        chunks.collect()
    }

    fn one(first: u32, run: u32, count: u8, still_remaining: bool) -> RemainingRun {
        RemainingRun { first: ChunkId(first), run, count, still_remaining }
    }

    proptest! {
        #[test]
        fn a_set_survives_its_file(
            parts in prop::collection::vec((0u32..3, 1u32..5, 0u8..3, any::<bool>()), 0..50),
            epoch: u64,
            flip: prop::sample::Index,
        ) {
            let mut next = 0;
            let runs: Vec<_> = parts.into_iter().map(|(gap, run, count, still)| {
                let first = next + gap;
                next = first + run;
                one(first, run, count, still)
            }).collect();
            let disk = Disk::new();
            store(&disk, Epoch(epoch), runs.iter().copied()).unwrap();
            let (found, again) = load(&disk, next.max(1)).unwrap().unwrap();
            prop_assert_eq!(found, Epoch(epoch));
            prop_assert_eq!(each(&again), each(&runs));
            let len = disk.open(NAME).unwrap().unwrap().len().unwrap();
            disk.flip(NAME, flip.index(usize::try_from(len).unwrap()));
            prop_assert!(load(&disk, next.max(1)).is_err());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode(&bytes, 10);
        }
    }

    #[test]
    fn it_is_replaced_whole_or_not_at_all() {
        assert!(load(&Disk::new(), 10).unwrap().is_none());
        for at in 1..10 {
            for seed in 0..10 {
                let disk = Disk::new();
                store(&disk, Epoch(1), [one(0, 10, 1, true)].into_iter()).unwrap();
                disk.fail_at(at, Fault::Stop);
                let stored = store(&disk, Epoch(2), [one(5, 1, 2, false)].into_iter()).is_ok();
                disk.crash(seed);
                let (epoch, runs) = load(&disk, 10).unwrap().unwrap();
                if epoch == Epoch(2) {
                    assert_eq!(each(&runs), [(5, 2, false)]);
                } else {
                    assert!(!stored);
                    assert_eq!(each(&runs).len(), 10);
                }
            }
        }
    }
}
