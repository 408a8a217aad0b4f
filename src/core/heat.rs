// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Write counts, and queues ordered by them.
//!
//! The paper counts every write. Sixty-four sequential 4 KiB writes fill a 256 KiB chunk once, yet count 64: so by
//! default *passes* are counted: a write counts when it is the first since the chunk was captured, or when it hits a
//! block that was already written since. Counts halve in every half-life, or a long migration would push
//! nothing any more. Counts are capped at [`MAX_COUNT`]: above it chunks are equally hot.

use super::geometry::ChunkId;
use super::set::ChunkSet;

/// Largest write count.
pub const MAX_COUNT: u8 = 253;

/// What a write counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Counting {
    /// Passes over the chunk.
    #[default]
    Passes,
    /// Every write, as the paper does.
    Paper,
}

/// Write counts of all chunks: one byte each.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Heat {
    counting: Counting,
    counts: Vec<u8>,
}

impl Heat {
    /// All counts 0 (paper, Algorithm 1, lines 3 to 5).
    #[must_use]
    pub fn new(chunks: u32, counting: Counting) -> Self {
        Self { counting, counts: vec![0; chunks as usize] }
    }

    /// Adds what was seen of a chunk since the last call.
    pub fn add(&mut self, chunk: ChunkId, passes: u32, plain: u32) {
        let more = match self.counting {
            Counting::Passes => passes,
            Counting::Paper => plain,
        };
        if let Some(count) = self.counts.get_mut(chunk.index()) {
            let more = u8::try_from(more).unwrap_or(u8::MAX);
            *count = count.saturating_add(more).min(MAX_COUNT);
        }
    }

    /// The count of a chunk.
    #[must_use]
    pub fn count(&self, chunk: ChunkId) -> u8 {
        self.counts.get(chunk.index()).copied().unwrap_or(0)
    }

    /// Halves all counts; calls `changed` for each chunk whose count differs now.
    pub fn halve(&mut self, mut changed: impl FnMut(ChunkId)) {
        for (index, count) in self.counts.iter_mut().enumerate() {
            if *count > 0 {
                *count /= 2;
                if let Ok(index) = u32::try_from(index) {
                    changed(ChunkId(index));
                }
            }
        }
    }
}

/// Number of buckets: counts up to 15 have one each, above they share one for each power of two.
const BUCKETS: usize = 20;

fn bucket_of(count: u8) -> usize {
    if count < 16 { usize::from(count) } else { 12 + count.ilog2() as usize }
}

/// Chunks ordered by write count; every operation costs the same however many there are. Scanning for the maximum
/// at each step, as the published pseudo-code does, is quadratic.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BucketQueue {
    buckets: Vec<ChunkSet>,
    len: u32,
}

impl Default for BucketQueue {
    fn default() -> Self {
        Self { buckets: vec![ChunkSet::default(); BUCKETS], len: 0 }
    }
}

impl BucketQueue {
    /// An empty queue.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of chunks.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a chunk with its count, or moves it there.
    pub fn insert(&mut self, chunk: ChunkId, count: u8) {
        self.remove(chunk);
        if self.buckets[bucket_of(count)].insert(chunk) {
            self.len += 1;
        }
    }

    /// Takes a chunk out; returns whether it was in.
    pub fn remove(&mut self, chunk: ChunkId) -> bool {
        let removed = self.buckets.iter_mut().any(|bucket| bucket.remove(chunk));
        self.len -= u32::from(removed);
        removed
    }

    /// Whether the chunk is queued.
    #[must_use]
    pub fn contains(&self, chunk: ChunkId) -> bool {
        self.buckets.iter().any(|bucket| bucket.contains(chunk))
    }

    /// Takes a chunk with the highest count; among equals the lowest chunk.
    pub fn take_hottest(&mut self) -> Option<ChunkId> {
        let chunk = self.buckets.iter_mut().rev().find_map(|bucket| bucket.take_next(ChunkId(0)))?;
        self.len -= 1;
        Some(chunk)
    }

    /// Takes a chunk with the lowest count below `limit`, looking from `from` on in each bucket and then from its
    /// start, so that a pass over the disk is sequential.
    pub fn take_coldest(&mut self, limit: u32, from: ChunkId) -> Option<ChunkId> {
        let buckets = self.buckets.iter_mut().enumerate();
        let mut below = buckets.filter(|(bucket, _)| lowest(*bucket) < limit);
        let chunk = below.find_map(|(_, set)| set.take_next(from).or_else(|| set.take_next(ChunkId(0))))?;
        self.len -= 1;
        Some(chunk)
    }

    /// All chunks, hottest first.
    pub fn iter(&self) -> impl Iterator<Item = ChunkId> + '_ {
        self.buckets.iter().rev().flat_map(ChunkSet::iter)
    }

    /// Empties the queue.
    pub fn clear(&mut self) {
        self.buckets.iter_mut().for_each(ChunkSet::clear);
        self.len = 0;
    }
}

/// The lowest count in a bucket.
fn lowest(bucket: usize) -> u32 {
    let bucket = u32::try_from(bucket).unwrap_or(u32::MAX);
    if bucket < 16 { bucket } else { 1 << (bucket - 12).min(31) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t25_a_sequential_pass_counts_once_and_counts_decay() {
        let mut heat = Heat::new(2, Counting::Passes);
        heat.add(ChunkId(0), 1, 64);
        assert_eq!(heat.count(ChunkId(0)), 1);
        let mut paper = Heat::new(2, Counting::Paper);
        paper.add(ChunkId(0), 1, 64);
        assert_eq!(paper.count(ChunkId(0)), 64);
        let mut changed = Vec::new();
        paper.halve(|chunk| changed.push(chunk));
        assert_eq!((paper.count(ChunkId(0)), changed), (32, vec![ChunkId(0)]));
        paper.add(ChunkId(0), 0, 1_000_000);
        assert_eq!(paper.count(ChunkId(0)), MAX_COUNT);
    }

    #[test]
    fn t26_hottest_first_without_scanning() {
        let mut queue = BucketQueue::new();
        for (chunk, count) in [(1, 0), (2, 9), (3, 200), (4, 9), (5, 255)] {
            queue.insert(ChunkId(chunk), count);
        }
        let order: Vec<u32> = std::iter::from_fn(|| queue.take_hottest()).map(|c| c.0).collect();
        assert_eq!(order, [3, 5, 2, 4, 1]);
        assert!(queue.is_empty());
    }

    #[test]
    fn coldest_first_below_the_limit() {
        let mut queue = BucketQueue::new();
        for (chunk, count) in [(1, 1), (2, 0), (3, 3), (9, 0)] {
            queue.insert(ChunkId(chunk), count);
        }
        let mut order = Vec::new();
        while let Some(chunk) = queue.take_coldest(3, ChunkId(5)) {
            order.push(chunk.0);
        }
        assert_eq!(order, [9, 2, 1]);
        assert_eq!(queue.len(), 1);
        assert!(queue.contains(ChunkId(3)));
    }

    #[test]
    fn buckets_are_monotonic() {
        for count in 1..=255u8 {
            assert!(bucket_of(count) >= bucket_of(count - 1) && bucket_of(count) < BUCKETS);
            assert!(lowest(bucket_of(count)) <= u32::from(count));
        }
    }
}
