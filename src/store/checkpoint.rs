// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The whole chunk map as runs, in one file that is replaced by rename.
//!
//! It is written and read in pieces, so that its size in memory does not matter. A checkpoint of generation g holds
//! everything noted in journals before g; journal g and later ones come on top. It is renamed in place only after
//! the layer was synced: everything in it counts as committed.

use super::StoreId;
use super::codec::{Reader, Writer};
use super::error::StoreError;
use super::medium::{Folder, Medium, replace};
use super::runs::{RUN_BYTES, Run, merged};
use crate::core::message::Epoch;
use std::io;
use std::path::Path;

const MAGIC: [u8; 8] = *b"BLKFCKPT";
const TRAILER_MAGIC: u32 = u32::from_le_bytes(*b"TAIL");
const VERSION: u32 = 1;
const HEADER: usize = 64;
const TRAILER: usize = 16;
/// Bytes written and read at a time: a multiple of a run.
const PIECE: usize = 64 << 10;

/// Name of the checkpoint of a generation.
pub(super) fn name(generation: u64) -> String {
    format!("checkpoint.{generation}")
}

/// What a checkpoint is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) generation: u64,
    pub(super) store: StoreId,
    pub(super) chunks: u32,
    /// The handoff under which the last commit before it was made.
    pub(super) handoff: Epoch,
    /// Sequence number of the first frame of the journal of this generation.
    pub(super) first_seq: u64,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.bytes(&MAGIC).u32(VERSION).u32(0).u64(self.generation).bytes(&self.store.0);
        out.u32(self.chunks).u32(0).u64(self.handoff.0).u64(self.first_seq);
        out.0
    }

    fn decode(bytes: &[u8]) -> Option<(u32, Self)> {
        let mut input = Reader(bytes);
        if input.array()? != MAGIC {
            return None;
        }
        let (version, _) = (input.u32()?, input.u32()?);
        let (generation, store) = (input.u64()?, StoreId(input.array()?));
        let (chunks, _) = (input.u32()?, input.u32()?);
        let (handoff, first_seq) = (Epoch(input.u64()?), input.u64()?);
        Some((version, Self { generation, store, chunks, handoff, first_seq }))
    }
}

/// Collects bytes and writes them in pieces, with their CRC.
struct Stream<'a> {
    file: &'a dyn Medium,
    offset: u64,
    buffer: Writer,
    crc: crc32fast::Hasher,
}

impl Stream<'_> {
    fn flush(&mut self) -> io::Result<()> {
        self.crc.update(&self.buffer.0);
        self.file.write_at(&self.buffer.0, self.offset)?;
        self.offset += self.buffer.0.len() as u64;
        self.buffer.0.clear();
        Ok(())
    }
}

/// Writes a checkpoint: the content, then `before_sync` (the layer's sync), then it is renamed in place.
///
/// # Errors
/// The kernel's, or that of `before_sync` or of a run; the checkpoint then does not exist.
pub(super) fn write(
    folder: &dyn Folder,
    header: &Header,
    runs: impl Iterator<Item = io::Result<Run>>,
    before_sync: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    replace(folder, &name(header.generation), |file| {
        let buffer = Writer(header.encode());
        let mut stream = Stream { file, offset: 0, buffer, crc: crc32fast::Hasher::new() };
        let (mut count, mut failed) = (0u64, None);
        let sound = runs.map_while(|run| run.map_err(|error| failed = Some(error)).ok());
        for run in merged(sound) {
            run.write(&mut stream.buffer);
            count += 1;
            if stream.buffer.0.len() >= PIECE {
                stream.flush()?;
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        stream.buffer.u64(count);
        stream.flush()?;
        let crc = stream.crc.clone().finalize();
        stream.buffer.u32(crc).u32(TRAILER_MAGIC);
        stream.flush()?;
        before_sync()
    })
}

/// Reads a checkpoint of a volume of `chunks` chunks; every run is given to `sink` in rising order. One that was
/// written before the volume grew covers fewer chunks, as its header says.
pub(super) fn read(
    file: &dyn Medium,
    path: &Path,
    chunks: u32,
    mut sink: impl FnMut(Run),
) -> Result<Header, StoreError> {
    let damaged = |detail: &str| StoreError::corrupt(path, detail);
    let io = |error| StoreError::io("read", path)(error);
    let len = file.len().map_err(io)?;
    let body = len.checked_sub((HEADER + TRAILER) as u64).ok_or_else(|| damaged("it is too short"))?;
    let mut crc = crc32fast::Hasher::new();
    let mut bytes = [0; HEADER];
    file.read_at(&mut bytes, 0).map_err(io)?;
    crc.update(&bytes);
    let (version, header) = Header::decode(&bytes).ok_or_else(|| damaged("its header is foreign"))?;
    if version != VERSION {
        return Err(StoreError::Version { path: path.to_owned(), found: version, known: VERSION });
    }
    let covered = header.chunks;
    if covered == 0 || covered > chunks {
        return Err(damaged("it covers more chunks than the volume has, or none"));
    }
    let (mut at, end, mut next) = (HEADER as u64, HEADER as u64 + body, 0);
    let mut piece = vec![0; PIECE];
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
        let got = file.read_at(&mut piece[..want], at).map_err(io)?;
        crc.update(&piece[..got]);
        for run in piece[..got].chunks(RUN_BYTES) {
            let run = Run::read(&mut Reader(run), covered).filter(|run| run.first.0 == next);
            let run = run.ok_or_else(|| damaged("its runs do not cover the volume"))?;
            next = run.end();
            sink(run);
        }
        at += want as u64;
    }
    let mut trailer = [0; TRAILER];
    file.read_at(&mut trailer, end).map_err(io)?;
    crc.update(&trailer[..8]);
    let mut input = Reader(&trailer);
    let (count, stored, magic) = (input.u64(), input.u32(), input.u32());
    let whole = count == Some(body / RUN_BYTES as u64) && magic == Some(TRAILER_MAGIC);
    if !whole || stored != Some(crc.finalize()) || next != covered {
        return Err(damaged("its checksum or length is wrong"));
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fault::{Disk, Fault};
    use super::super::runs::tests::any_run;
    use super::super::runs::{RunTable, Transition};
    use super::*;
    use crate::core::chunk::ChunkState;
    use crate::core::geometry::{BlockMask, ChunkId};
    use crate::core::message::Version;
    use proptest::prelude::*;

    fn header(chunks: u32) -> Header {
        Header { generation: 5, store: StoreId([9; 16]), chunks, handoff: Epoch(4), first_seq: 8 }
    }

    fn reread(disk: &Disk, chunks: u32) -> Result<(Header, Vec<Run>), StoreError> {
        let file = disk.open(&name(5)).unwrap().unwrap();
        let mut runs = Vec::new();
        let header = read(file.as_ref(), Path::new("checkpoint.5"), chunks, |run| runs.push(run))?;
        Ok((header, runs))
    }

    proptest! {
        #[test]
        fn a_map_survives_its_file_and_every_flipped_byte_is_seen(
            changes in prop::collection::vec(any_run(5000), 0..60),
            flip: prop::sample::Index,
        ) {
            let mut table = RunTable::new(std::iter::once(Run::whole(5000, ChunkState::Base)));
            changes.into_iter().for_each(|run| table.set(run));
            let runs = table.into_runs();
            let disk = Disk::new();
            write(&disk, &header(5000), runs.iter().copied().map(Ok), || Ok(())).unwrap();
            prop_assert_eq!(reread(&disk, 5000).unwrap(), (header(5000), runs));
            prop_assert!(reread(&disk, 5001).is_ok(), "it has grown since");
            prop_assert!(reread(&disk, 4999).is_err());
            let len = disk.open(&name(5)).unwrap().unwrap().len().unwrap();
            disk.flip(&name(5), flip.index(usize::try_from(len).unwrap()));
            prop_assert!(reread(&disk, 5000).is_err());
        }
    }

    #[test]
    fn an_adopted_tebibyte_is_one_run_and_a_fragmented_map_takes_several_pieces() {
        let disk = Disk::new();
        let chunks = 4 << 20;
        let one = |n: u32, state| {
            Run::from(Transition { chunk: ChunkId(n), state, mask: BlockMask::EMPTY, version: Version(0) })
        };
        let alike = (0..chunks).map(|n| Ok(one(n, ChunkState::Modified)));
        write(&disk, &header(chunks), alike, || Ok(())).unwrap();
        assert_eq!(disk.open(&name(5)).unwrap().unwrap().len().unwrap(), 64 + 32 + 16);
        assert_eq!(reread(&disk, chunks).unwrap().1, [Run::whole(chunks, ChunkState::Modified)]);
        let states = [ChunkState::Base, ChunkState::Zero, ChunkState::Local];
        let mixed = (0..10_000).map(|n| Ok(one(n, states[n as usize % 3])));
        write(&disk, &header(10_000), mixed, || Ok(())).unwrap();
        assert_eq!(reread(&disk, 10_000).unwrap().1.len(), 10_000);
    }

    #[test]
    fn a_failure_on_the_way_leaves_the_old_one() {
        let disk = Disk::new();
        let whole = |state| std::iter::once(Ok(Run::whole(100, state)));
        write(&disk, &header(100), whole(ChunkState::Base), || Ok(())).unwrap();
        for at in 1.. {
            disk.fail_at(at, Fault::Errno(libc::EIO));
            let failed = write(&disk, &header(100), whole(ChunkState::Modified), || Ok(())).is_err();
            disk.heal();
            let (_, runs) = reread(&disk, 100).unwrap();
            let renamed = runs == [Run::whole(100, ChunkState::Modified)];
            assert!(renamed || (failed && runs == [Run::whole(100, ChunkState::Base)]));
            if !failed {
                return;
            }
        }
    }
}
