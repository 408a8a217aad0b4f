// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must be a hole in the layer is made one when a volume is opened.
//!
//! Where no base image is underneath, `Base` says that the layer has holes outside the mask. After a crash that need
//! not be true. A write that was never acknowledged may have reached the layer without its claim; after a crash of
//! the host, claims that were not yet committed are undone in the map but perhaps not in the layer. Such a range
//! would read as zeros now, and as old data later, when a write to its neighbour makes the block valid: data that
//! comes back is worse than data that was lost. Over a base image nothing is to do, for there a block is filled
//! before it is written in part. `Zero` says the same of a whole chunk; the store sees to it after a host crash, and
//! after a kill it is true.
//!
//! Ranges are joined across chunks: an untouched disk is one call, whatever its size. A range without data is only looked
//! at: a disk that is written in part all over has very many.

use super::table::Table;
use super::volume::Volume;
use crate::core::chunk::ChunkState;
use crate::core::geometry::{BlockMask, ChunkId, Geometry, Span};
use crate::store::{Run, Store};
use std::io;
use std::ops::Range;

impl Volume {
    /// Whether blocks of the chunk that are not valid are holes, and not somebody else's content.
    pub(super) fn stands_on_nothing(&self, chunk: ChunkId) -> bool {
        !self.table().has_base(chunk) && self.table().look(chunk).state == ChunkState::Base
    }

    /// A write of `span` has reached the layer, and its claim of `blocks` could not be noted: where they must be holes, they
    /// become such again. Only what this write has written: a block may have a part that another one has written.
    /// Blocks, for it is rare.
    pub(super) fn take_back(&self, span: Span, blocks: BlockMask) {
        let chunk = span.chunk;
        if !self.stands_on_nothing(chunk) {
            return;
        }
        let geometry = self.geometry();
        for run in blocks.minus(self.table().look(chunk).mask).runs() {
            let range = geometry.block_bytes(chunk, &run);
            let (start, end) = (range.start.max(span.start), range.end.min(span.start + span.len));
            let offset = geometry.chunk_start(chunk) + u64::from(start);
            if let Err(error) = self.layer().punch(offset, u64::from(end.saturating_sub(start))) {
                self.fail(&format!("what is left of a failed write to {chunk} cannot be dropped: {error}"));
            }
        }
    }
}

/// Punches every range of the layer that must be a hole.
pub(super) fn make_holes(store: &Store, runs: &[Run], table: &Table) -> io::Result<()> {
    let punch = |range: Range<u64>| store.layer.make_hole(range.start, range.end - range.start);
    holes(runs, table.based(), table.geometry(), punch)
}

/// Gives every range that must be a hole, joined where they touch, in rising order. Chunks from `based` on have no base
/// image under them.
fn holes(
    runs: &[Run],
    based: u32,
    geometry: Geometry,
    mut punch: impl FnMut(Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let mut open: Option<Range<u64>> = None;
    let mut add = |next: Range<u64>| {
        match open.take() {
            Some(range) if range.end == next.start => open = Some(range.start..next.end),
            Some(range) => {
                punch(range)?;
                open = Some(next);
            }
            None => open = Some(next),
        }
        Ok::<(), io::Error>(())
    };
    for run in runs.iter().filter(|run| run.state == ChunkState::Base) {
        let chunks = run.first.0.max(based)..run.end();
        if run.mask.is_empty()
            && let Some(last) = chunks.clone().next_back()
        {
            let end = geometry.chunk_start(ChunkId(last)) + u64::from(geometry.chunk_len(ChunkId(last)));
            add(geometry.chunk_start(ChunkId(chunks.start))..end)?;
            continue;
        }
        for chunk in chunks.map(ChunkId) {
            for blocks in geometry.full_mask(chunk).minus(run.mask).runs() {
                let (bytes, start) = (geometry.block_bytes(chunk, &blocks), geometry.chunk_start(chunk));
                add(start + u64::from(bytes.start)..start + u64::from(bytes.end))?;
            }
        }
    }
    open.map_or(Ok(()), punch)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::core::message::Version;

    #[test]
    fn holes_are_joined_across_chunks_and_masks_are_spared() {
        const K: u64 = 64 << 10;
        let geometry = Geometry::new(8 * K + 512, 64 << 10).unwrap();
        let run = |first, count, state, mask| {
            let (first, mask, version) = (ChunkId(first), BlockMask(mask), Version(0));
            Run { first, count, state, mask, version }
        };
        // 0 and 1 have a base under them, 2 has none; 3 is written in part, 4 is zeroed, 5 is whole,
        // the others, of which the last one is short, are untouched.
        let runs = [
            run(0, 3, ChunkState::Base, 0),
            run(3, 1, ChunkState::Base, 0b10),
            run(4, 1, ChunkState::Zero, 0),
            run(5, 1, ChunkState::Modified, 0),
            run(6, 3, ChunkState::Base, 0),
        ];
        let mut found = Vec::new();
        let mut note = |range| {
            found.push(range);
            Ok(())
        };
        holes(&runs, 2, geometry, &mut note).unwrap();
        assert_eq!(found, [2 * K..3 * K + 1024, 3 * K + 2048..4 * K, 6 * K..8 * K + 512]);
        let mut nothing = |range: Range<u64>| Err(io::Error::other(format!("{range:?}")));
        holes(&runs, 9, geometry, &mut nothing).unwrap();
        assert!(holes(&runs, 8, geometry, &mut nothing).is_err());
    }
}
