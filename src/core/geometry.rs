// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Offsets, chunks and blocks: all rounding of the project lives here.
//!
//! A volume of `size` bytes (a multiple of 512) is cut into chunks of a power of two between 64 KiB and 4 MiB; the
//! last chunk may be short. A chunk has 64 blocks, so that one `u64` says which of them are valid: 4 KiB each at
//! the default chunk size of 256 KiB. The guest addresses 512-byte sectors, so a request may cover a block in part.

use thiserror::Error;

/// Size of a virtio-blk sector in bytes (virtio 1.2, 5.2).
pub const SECTOR: u64 = 512;
/// Smallest chunk size in bytes.
pub const MIN_CHUNK_SIZE: u32 = 64 << 10;
/// Largest chunk size in bytes.
pub const MAX_CHUNK_SIZE: u32 = 4 << 20;
/// Chunk size when nothing else is asked for: the stripe size of the paper (section 5.2.1).
pub const DEFAULT_CHUNK_SIZE: u32 = 256 << 10;
/// Blocks in a chunk: the bits of a [`BlockMask`].
pub const BLOCKS_PER_CHUNK: u32 = 64;

/// Why a geometry was refused.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum GeometryError {
    /// The chunk size is no power of two in the allowed range.
    #[error("chunk size {0} is not a power of two between 64 KiB and 4 MiB")]
    ChunkSize(u32),
    /// The volume size is zero or not a multiple of 512.
    #[error("volume size {0} is not a positive multiple of 512 bytes")]
    Size(u64),
    /// The volume would have more chunks than a chunk number can name.
    #[error("volume size {0} needs more than 2^32 - 1 chunks; choose a larger chunk size")]
    TooManyChunks(u64),
}

/// The number of a chunk, counted from the start of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub u32);

impl ChunkId {
    /// The number as an index into a table.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl std::fmt::Display for ChunkId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "chunk {}", self.0)
    }
}

/// One bit for each of the 64 blocks of a chunk, block 0 in the lowest bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct BlockMask(pub u64);

impl BlockMask {
    /// No block.
    pub const EMPTY: Self = Self(0);

    /// The blocks `first..end`; an empty or reversed range gives no block.
    #[must_use]
    pub fn range(first: u32, end: u32) -> Self {
        let end = end.min(BLOCKS_PER_CHUNK);
        if first >= end {
            return Self::EMPTY;
        }
        let width = end - first;
        let ones = if width == BLOCKS_PER_CHUNK { u64::MAX } else { (1u64 << width) - 1 };
        Self(ones << first)
    }

    /// Whether no block is in the mask.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every block of `other` is in this mask.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the masks share a block.
    #[must_use]
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Blocks in either mask.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Blocks of this mask that are not in `other`.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Number of blocks in the mask.
    #[must_use]
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// The maximal runs of consecutive blocks, as `first..end`, in rising order.
    pub fn runs(self) -> impl Iterator<Item = std::ops::Range<u32>> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let first = rest.trailing_zeros();
            let width = (rest >> first).trailing_ones();
            rest &= !Self::range(first, first + width).0;
            Some(first..first + width)
        })
    }
}

/// A byte range inside one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The chunk.
    pub chunk: ChunkId,
    /// First byte, counted from the start of the chunk.
    pub start: u32,
    /// Number of bytes, at least 1.
    pub len: u32,
}

/// Size and chunk size of a volume, and every conversion that follows from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    size: u64,
    chunk_bits: u32,
}

impl Geometry {
    /// The geometry of a volume of `size` bytes in chunks of `chunk_size` bytes.
    ///
    /// # Errors
    /// A [`GeometryError`] that names the value that cannot be.
    pub fn new(size: u64, chunk_size: u32) -> Result<Self, GeometryError> {
        if !chunk_size.is_power_of_two() || !(MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&chunk_size) {
            return Err(GeometryError::ChunkSize(chunk_size));
        }
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(GeometryError::Size(size));
        }
        let geometry = Self { size, chunk_bits: chunk_size.trailing_zeros() };
        if size.div_ceil(u64::from(chunk_size)) >= u64::from(u32::MAX) {
            return Err(GeometryError::TooManyChunks(size));
        }
        Ok(geometry)
    }

    /// The same chunks in a volume of another size.
    ///
    /// # Errors
    /// A [`GeometryError`] that names the size that cannot be.
    pub fn resized(&self, size: u64) -> Result<Self, GeometryError> {
        Self::new(size, self.chunk_size())
    }

    /// As [`resized`](Self::resized), for a size that was checked before.
    pub(crate) fn with_size(self, size: u64) -> Self {
        Self { size, ..self }
    }

    /// Size of the volume in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Size of a chunk in bytes (the last chunk of the volume may be shorter).
    #[must_use]
    pub fn chunk_size(&self) -> u32 {
        1 << self.chunk_bits
    }

    /// Size of a block in bytes.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.chunk_size() / BLOCKS_PER_CHUNK
    }

    /// Number of chunks.
    #[must_use]
    pub fn chunk_count(&self) -> u32 {
        // Fits: `new` refused anything larger.
        u32::try_from(self.size.div_ceil(u64::from(self.chunk_size()))).unwrap_or(u32::MAX)
    }

    /// All chunks in rising order.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkId> + use<> {
        (0..self.chunk_count()).map(ChunkId)
    }

    /// Whether the volume has this chunk.
    #[must_use]
    pub fn has(&self, chunk: ChunkId) -> bool {
        chunk.0 < self.chunk_count()
    }

    /// First byte of a chunk in the volume.
    #[must_use]
    pub fn chunk_start(&self, chunk: ChunkId) -> u64 {
        u64::from(chunk.0) << self.chunk_bits
    }

    /// Bytes in a chunk: the chunk size, or what is left for the last one; 0 past the end.
    #[must_use]
    pub fn chunk_len(&self, chunk: ChunkId) -> u32 {
        let rest = self.size.saturating_sub(self.chunk_start(chunk));
        u32::try_from(rest.min(u64::from(self.chunk_size()))).unwrap_or(0)
    }

    /// Every block that the chunk has; fewer than 64 for a short last chunk, whose last block may be short too.
    #[must_use]
    pub fn full_mask(&self, chunk: ChunkId) -> BlockMask {
        BlockMask::range(0, self.chunk_len(chunk).div_ceil(self.block_size()))
    }

    /// Byte range of a run of blocks inside the chunk, cut at the end of the volume.
    #[must_use]
    pub fn block_bytes(&self, chunk: ChunkId, run: &std::ops::Range<u32>) -> std::ops::Range<u32> {
        let len = self.chunk_len(chunk);
        (run.start * self.block_size()).min(len)..(run.end * self.block_size()).min(len)
    }

    /// Number of bytes that the blocks of `mask` hold in this chunk.
    #[must_use]
    pub fn mask_bytes(&self, chunk: ChunkId, mask: BlockMask) -> u32 {
        mask.runs()
            .map(|run| self.block_bytes(chunk, &run).len())
            .map(|n| u32::try_from(n).unwrap_or(0))
            .sum()
    }

    /// Whether `offset..offset + len` lies inside the volume.
    #[must_use]
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    /// Cuts a byte range of the volume at chunk borders, in rising order. Bytes past the end are left out.
    pub fn spans(&self, offset: u64, len: u64) -> impl Iterator<Item = Span> + use<> {
        let end = offset.saturating_add(len).min(self.size);
        let bits = self.chunk_bits;
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let chunk = at >> bits;
            let start = at - (chunk << bits);
            let stop = end.min((chunk + 1) << bits);
            let span = Span {
                chunk: ChunkId(u32::try_from(chunk).ok()?),
                start: u32::try_from(start).ok()?,
                len: u32::try_from(stop - at).ok()?,
            };
            at = stop;
            Some(span)
        })
    }

    /// The blocks that a span touches, in whole or in part.
    #[must_use]
    pub fn outer(&self, span: Span) -> BlockMask {
        let block = self.block_size();
        BlockMask::range(span.start / block, (span.start + span.len).div_ceil(block))
    }

    /// The blocks that a span covers whole. A span that reaches the end of a short last chunk covers its last
    /// block whole, however short that block is.
    #[must_use]
    pub fn inner(&self, span: Span) -> BlockMask {
        let block = self.block_size();
        let stop = span.start + span.len;
        let end = if stop >= self.chunk_len(span.chunk) { stop.div_ceil(block) } else { stop / block };
        BlockMask::range(span.start.div_ceil(block), end)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_what_cannot_be() {
        assert_eq!(Geometry::new(1 << 20, 100_000), Err(GeometryError::ChunkSize(100_000)));
        assert_eq!(Geometry::new(1 << 20, 32 << 10), Err(GeometryError::ChunkSize(32 << 10)));
        assert_eq!(Geometry::new(0, 1 << 18), Err(GeometryError::Size(0)));
        assert_eq!(Geometry::new(1000, 1 << 18), Err(GeometryError::Size(1000)));
        assert!(matches!(Geometry::new(1 << 60, 1 << 16), Err(GeometryError::TooManyChunks(_))));
    }

    #[test]
    fn an_odd_last_chunk_has_its_own_length_and_mask() {
        let g = Geometry::new((256 << 10) + 4096 + 512, 256 << 10).unwrap();
        assert_eq!(g.chunk_count(), 2);
        assert_eq!(g.chunk_len(ChunkId(1)), 4608);
        assert_eq!(g.full_mask(ChunkId(1)), BlockMask(0b11));
        assert_eq!(g.inner(Span { chunk: ChunkId(1), start: 0, len: 4608 }), BlockMask(0b11));
        assert_eq!(g.inner(Span { chunk: ChunkId(1), start: 0, len: 4096 }), BlockMask(0b01));
        assert_eq!(g.mask_bytes(ChunkId(1), BlockMask(0b10)), 512);
    }

    proptest! {
        #[test]
        fn spans_cover_the_range_once(size in 1u64..5000, bits in 16u32..23, offset in 0u64..5000, len in 0u64..5000) {
            let g = Geometry::new(size * 1024, 1 << bits).unwrap();
            let (offset, len) = (offset * 512, len * 512);
            let mut at = offset;
            for span in g.spans(offset, len) {
                prop_assert_eq!(g.chunk_start(span.chunk) + u64::from(span.start), at);
                prop_assert!(span.len > 0 && span.start + span.len <= g.chunk_len(span.chunk));
                prop_assert!(g.outer(span).contains(g.inner(span)));
                prop_assert!(g.full_mask(span.chunk).contains(g.outer(span)));
                at += u64::from(span.len);
            }
            prop_assert_eq!(at, (offset + len).min(g.size()).max(offset));
        }

        #[test]
        fn runs_rebuild_the_mask(bits: u64) {
            let mut again = BlockMask::EMPTY;
            for run in BlockMask(bits).runs() {
                again = again.union(BlockMask::range(run.start, run.end));
            }
            prop_assert_eq!(again, BlockMask(bits));
        }
    }
}
