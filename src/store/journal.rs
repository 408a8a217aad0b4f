// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One generation of the journal: a header, then frames of notes and commits, appended.
//!
//! A note is a buffered write: it survives the process, not the host. A commit frame says that everything up to a
//! sequence number is true of the *synced* layer; the fdatasync after it makes all frames before it durable.
//!
//! The hazard is the tail. Frames after the last fdatasync may reach the disk in any order before a loss of power,
//! so an invalid frame with valid ones behind it is no proof of damage. Every frame therefore carries the sequence
//! number up to which the journal was known to be durable when it was written: a hole below that number is damage,
//! any other hole is a torn tail. After a mere kill the page cache is whole, and every hole is damage.
//!
//! Space is written with zeros in steps ahead of the frames, so that the fdatasync of a commit has no file size and
//! no block map to make durable. A ring of fixed size was rejected: it needs a durable head pointer.

use super::codec::{Reader, Writer};
use super::error::StoreError;
use super::medium::{Folder, Medium, read_all};
use super::runs::{RUN_BYTES, Run, Transition, merged};
use super::{BootId, StoreId};
use crate::core::chunk::ChunkState;
use crate::core::message::Epoch;
use std::io;
use std::path::Path;
use std::sync::Arc;

const MAGIC: [u8; 8] = *b"BLKFJRNL";
pub(super) const VERSION: u32 = 1;
/// Bytes of the header.
pub(super) const HEADER: usize = 64;
const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"FRME");
const FRAME_HEADER: usize = 32;
const NOTES: u8 = 1;
const COMMIT: u8 = 2;
/// Bytes of zeros written ahead at a time; few in tests, so that they cross that border often.
const STEP: usize = if cfg!(test) { 1 << 10 } else { 256 << 10 };
/// Longest journal that is read; rotation keeps it far shorter.
const LONGEST: usize = 1 << 30;
/// A journal that nobody rotates takes no frame from here on: better an error now than a volume that cannot be opened.
const FULL: u64 = 1 << 29;

/// Name of the journal of a generation.
pub(super) fn name(generation: u64) -> String {
    format!("journal.{generation}")
}

/// Where and when a journal was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) generation: u64,
    pub(super) boot: BootId,
    pub(super) store: StoreId,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.bytes(&MAGIC).u32(VERSION).u32(0).u64(self.generation).bytes(&self.boot.0).bytes(&self.store.0);
        out.u32(0);
        let crc = crc32fast::hash(&out.0);
        out.u32(crc);
        out.0
    }

    fn decode(bytes: &[u8], path: &Path) -> Result<Self, StoreError> {
        let damaged = || StoreError::corrupt(path, "its header is torn or foreign");
        let mut input = Reader(bytes.get(..HEADER).ok_or_else(damaged)?);
        let crc = crc32fast::hash(&bytes[..HEADER - 4]);
        let parse = |input: &mut Reader<'_>| {
            let magic = input.array()?;
            let (version, _) = (input.u32()?, input.u32()?);
            let header = Self {
                generation: input.u64()?,
                boot: BootId(input.array()?),
                store: StoreId(input.array()?),
            };
            input.u32()?;
            Some((magic, version, header, input.u32()?))
        };
        let (magic, version, header, stored): ([u8; 8], _, _, _) = parse(&mut input).ok_or_else(damaged)?;
        if magic != MAGIC || stored != crc {
            return Err(damaged());
        }
        if version != VERSION {
            return Err(StoreError::Version { path: path.to_owned(), found: version, known: VERSION });
        }
        Ok(header)
    }
}

/// What a frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    Notes(Vec<Run>),
    /// Everything up to `upto` is true of the synced layer; `handoff` is the epoch that the daemon had prepared.
    Commit {
        upto: u64,
        handoff: Epoch,
    },
}

/// A frame and its place in the order of all frames of a run of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) seq: u64,
    /// The journal was durable up to this sequence number when the frame was written.
    pub(super) synced: u64,
    pub(super) content: Content,
}

fn frame_crc(generation: u64, header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

impl Frame {
    fn encode(&self, generation: u64) -> io::Result<Vec<u8>> {
        let mut payload = Writer::default();
        let (kind, count) = match &self.content {
            Content::Notes(runs) => {
                runs.iter().for_each(|run| run.write(&mut payload));
                (NOTES, u32::try_from(runs.len()).map_err(io::Error::other)?)
            }
            Content::Commit { upto, handoff } => {
                payload.u64(*upto).u64(handoff.0);
                (COMMIT, 1)
            }
        };
        let mut out = Writer::default();
        out.u32(FRAME_MAGIC).u8(kind).bytes(&[0; 3]).u32(count).u64(self.seq).u64(self.synced);
        let crc = frame_crc(generation, &out.0, &payload.0);
        out.u32(crc).bytes(&payload.0);
        Ok(out.0)
    }

    /// The frame at the start of `bytes` and its length, if a valid one is there.
    fn decode(bytes: &[u8], generation: u64, chunks: u32) -> Option<(Self, usize)> {
        let mut input = Reader(bytes);
        if input.u32()? != FRAME_MAGIC {
            return None;
        }
        let kind = input.u8()?;
        input.bytes(3)?;
        let (count, seq, synced, crc) = (input.u32()?, input.u64()?, input.u64()?, input.u32()?);
        let count = usize::try_from(count).ok()?;
        let len = if kind == COMMIT { 16 } else { count.checked_mul(RUN_BYTES)? };
        let payload = input.bytes(len)?;
        if frame_crc(generation, &bytes[..FRAME_HEADER - 4], payload) != crc {
            return None;
        }
        let mut payload = Reader(payload);
        let content = match kind {
            NOTES => {
                Content::Notes((0..count).map(|_| Run::read(&mut payload, chunks)).collect::<Option<_>>()?)
            }
            COMMIT => Content::Commit { upto: payload.u64()?, handoff: Epoch(payload.u64()?) },
            _ => return None,
        };
        Some((Self { seq, synced, content }, FRAME_HEADER + len))
    }
}

/// What a journal file holds.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) header: Header,
    /// The frames from the start on, up to the first that is invalid or out of order.
    pub(super) frames: Vec<Frame>,
    /// Highest `synced` of the valid frames behind that point, if there are such frames.
    pub(super) beyond: Option<u64>,
}

/// Reads a whole journal.
pub(super) fn read(file: &dyn Medium, path: &Path, chunks: u32) -> Result<Contents, StoreError> {
    let bytes = read_all(file, LONGEST).map_err(StoreError::io("read", path))?;
    let header = Header::decode(&bytes, path)?;
    let mut at = HEADER;
    let mut frames: Vec<Frame> = Vec::new();
    while let Some((frame, len)) = bytes.get(at..).and_then(|b| Frame::decode(b, header.generation, chunks)) {
        if frames.last().is_some_and(|last| frame.seq != last.seq + 1) {
            break;
        }
        frames.push(frame);
        at += len;
    }
    // Frames start at multiples of 4: header and payloads are.
    let mut beyond = None;
    while let Some(rest) = bytes.get(at..).filter(|rest| rest.len() >= FRAME_HEADER) {
        match Frame::decode(rest, header.generation, chunks) {
            Some((frame, len)) => {
                beyond = beyond.max(Some(frame.synced));
                at += len;
            }
            None => at += 4,
        }
    }
    Ok(Contents { header, frames, beyond })
}

/// Whether a journal without a valid header never had a frame: its making was cut off by a crash.
pub(super) fn is_blank(file: &dyn Medium) -> io::Result<bool> {
    let bytes = read_all(file, LONGEST)?;
    let frames = bytes.get(HEADER..).unwrap_or(&[]);
    Ok(frames.iter().all(|byte| *byte == 0))
}

/// The end of a journal, where frames are appended.
pub(super) struct Journal {
    file: Arc<dyn Medium>,
    generation: u64,
    /// Where the next frame goes.
    end: u64,
    /// Up to where the file is written with frames or zeros.
    allocated: u64,
}

impl Journal {
    /// Makes the journal of a generation; its name and header are durable when this returns.
    pub(super) fn create(folder: &dyn Folder, header: &Header) -> io::Result<Self> {
        let file = folder.create(&name(header.generation))?;
        let mut start = header.encode();
        let end = start.len() as u64;
        start.resize(STEP, 0);
        file.write_at(&start, 0)?;
        file.sync()?;
        folder.sync_dir()?;
        Ok(Self { file, generation: header.generation, end, allocated: STEP as u64 })
    }

    pub(super) fn file(&self) -> &Arc<dyn Medium> {
        &self.file
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Bytes of frames.
    pub(super) fn len(&self) -> u64 {
        self.end
    }

    /// Appends a frame, without sync. After an error the next frame takes its place.
    pub(super) fn append(&mut self, frame: &Frame) -> io::Result<()> {
        if self.end >= FULL {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the journal was not rotated in time"));
        }
        let bytes = frame.encode(self.generation)?;
        let end = self.end + bytes.len() as u64;
        while self.allocated < end {
            self.file.write_at(&[0; STEP], self.allocated)?;
            self.allocated += STEP as u64;
        }
        self.file.write_at(&bytes, self.end)?;
        self.end = end;
        Ok(())
    }
}

/// Transitions as runs, for a frame.
///
/// # Errors
/// `InvalidInput` for a chunk in `Installing`: what it was before is what must be noted.
pub(super) fn runs_of(transitions: &[Transition]) -> io::Result<Vec<Run>> {
    if let Some(one) = transitions.iter().find(|one| one.state == ChunkState::Installing) {
        let why = format!("{} is noted as Installing, which is not a lasting state", one.chunk);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(merged(transitions.iter().map(|one| Run::from(*one))).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fault::Disk;
    use super::super::runs::tests::any_run;
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header { generation: 3, boot: BootId([1; 16]), store: StoreId([2; 16]) }
    }

    fn note(seq: u64, synced: u64) -> Frame {
        Frame { seq, synced, content: Content::Notes(vec![Run::whole(10, ChunkState::Modified)]) }
    }

    fn reread(disk: &Disk) -> Result<Contents, StoreError> {
        let file = disk.open(&name(3)).unwrap().unwrap();
        read(file.as_ref(), Path::new("journal.3"), 1000)
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        let content = prop_oneof![
            prop::collection::vec(any_run(1000), 0..20).prop_map(Content::Notes),
            (any::<u64>(), any::<u64>()).prop_map(|(upto, e)| Content::Commit { upto, handoff: Epoch(e) }),
        ];
        (any::<u64>(), any::<u64>(), content).prop_map(|(seq, synced, content)| Frame {
            seq,
            synced,
            content,
        })
    }

    proptest! {
        #[test]
        fn a_frame_survives_its_bytes_and_no_other_generation_reads_it(frame in any_frame(), flip: prop::sample::Index) {
            let mut bytes = frame.encode(7).unwrap();
            let len = bytes.len();
            prop_assert_eq!(Frame::decode(&bytes, 7, 1000), Some((frame, len)));
            prop_assert_eq!(Frame::decode(&bytes, 8, 1000), None);
            bytes[flip.index(len)] ^= 0x10;
            prop_assert_eq!(Frame::decode(&bytes, 7, 1000), None);
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), framed: bool) {
            if framed && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
            }
            let _ = Frame::decode(&bytes, 1, 1000);
            let _ = Header::decode(&bytes, Path::new("x"));
        }
    }

    #[test]
    fn what_was_appended_is_read_and_a_hole_is_seen_with_what_lies_behind() {
        let disk = Disk::new();
        let mut journal = Journal::create(&disk, &header()).unwrap();
        // More than one step of zeros.
        for seq in 1..=10_000 {
            journal.append(&note(seq, seq / 2)).unwrap();
        }
        let contents = reread(&disk).unwrap();
        assert_eq!(contents.header, header());
        assert_eq!((contents.frames.len(), contents.beyond), (10_000, None));
        disk.flip(&name(3), HEADER + 64 * 100 + 40);
        let contents = reread(&disk).unwrap();
        assert_eq!((contents.frames.len(), contents.beyond), (100, Some(5000)));
        disk.flip(&name(3), 20);
        assert!(matches!(reread(&disk), Err(StoreError::Corrupt { .. })));
    }

    #[test]
    fn a_failed_append_leaves_its_place_to_the_next() {
        let disk = Disk::new();
        let mut journal = Journal::create(&disk, &header()).unwrap();
        journal.append(&note(1, 0)).unwrap();
        disk.fail_at(1, super::super::fault::Fault::Errno(libc::ENOSPC));
        assert!(journal.append(&note(2, 0)).is_err());
        let contents = reread(&disk).unwrap();
        assert_eq!((contents.frames.len(), contents.beyond), (1, None));
        journal.append(&note(2, 0)).unwrap();
        assert_eq!(reread(&disk).unwrap().frames.len(), 2);
    }

    #[test]
    fn installing_is_never_noted() {
        let one = Transition {
            chunk: crate::core::geometry::ChunkId(1),
            state: ChunkState::Installing,
            mask: crate::core::geometry::BlockMask::EMPTY,
            version: crate::core::message::Version(1),
        };
        assert!(runs_of(&[one]).is_err());
    }
}
