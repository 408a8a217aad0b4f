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
//! Ranges are joined across chunks: an untouched disk is one call, whatever its size.

use super::table::Table;
use crate::core::chunk::ChunkState;
use crate::core::geometry::{BlockMask, Geometry};
use crate::store::Store;
use std::io;
use std::ops::Range;

/// Punches every range of the layer that must be a hole.
pub(super) fn make_holes(store: &Store, table: &Table, geometry: Geometry) -> io::Result<()> {
    holes(table, geometry, |range| store.layer.punch(range.start, range.end - range.start))
}

/// Gives every range that must be a hole, joined where they touch, in rising order.
fn holes(
    table: &Table,
    geometry: Geometry,
    mut punch: impl FnMut(Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let mut open: Option<Range<u64>> = None;
    for chunk in geometry.chunks() {
        let look = table.look(chunk);
        let blocks = match look.lasting {
            ChunkState::Base if !table.has_base(chunk) => geometry.full_mask(chunk).minus(look.mask),
            ChunkState::Base
            | ChunkState::Zero
            | ChunkState::Local
            | ChunkState::Modified
            | ChunkState::Remote
            | ChunkState::Installing => BlockMask::EMPTY,
        };
        for run in blocks.runs() {
            let bytes = geometry.block_bytes(chunk, &run);
            let start = geometry.chunk_start(chunk);
            let next = start + u64::from(bytes.start)..start + u64::from(bytes.end);
            open = match open.take() {
                Some(range) if range.end == next.start => Some(range.start..next.end),
                Some(range) => {
                    punch(range)?;
                    Some(next)
                }
                None => Some(next),
            };
        }
    }
    open.map_or(Ok(()), punch)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::core::geometry::ChunkId;
    use crate::core::message::Version;
    use crate::store::Transition;
    use crate::volume::table::Notes;
    use std::sync::Arc;

    struct Nowhere;

    impl Notes for Nowhere {
        fn note(&self, _: &[Transition]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn holes_are_joined_across_chunks_and_masks_are_spared() {
        const K: u64 = 64 << 10;
        let geometry = Geometry::new(5 * K + 512, 64 << 10).unwrap();
        let table = Table::new(geometry, 1, Arc::new(Nowhere));
        let set = |chunk, state, mask| {
            let (chunk, mask, version) = (ChunkId(chunk), BlockMask(mask), Version(0));
            table.restore(&Transition { chunk, state, mask, version });
        };
        // 0 has a base under it, 1 is written in part, 2 is zeroed, 3 is whole, 4 and the short 5 are untouched.
        set(1, ChunkState::Base, 0b10);
        set(2, ChunkState::Zero, 0);
        set(3, ChunkState::Modified, 0);
        let mut found = Vec::new();
        holes(&table, geometry, |range| {
            found.push(range);
            Ok(())
        })
        .unwrap();
        assert_eq!(found, [K..K + 1024, K + 2048..2 * K, 4 * K..5 * K + 512]);
    }
}
