// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A set of chunks: two bits of memory a chunk at most, ordered, and quick to walk when it is nearly empty.
//!
//! One bit a chunk, and above it one bit for each word of 64 that is not empty. A `BTreeSet` would cost some 30
//! bytes a chunk: 120 MB for each TiB.

use super::geometry::ChunkId;
use std::hash::{Hash, Hasher};

/// An ordered set of chunks.
#[derive(Debug, Clone, Default)]
pub struct ChunkSet {
    leaves: Vec<u64>,
    summary: Vec<u64>,
    len: u32,
}

impl ChunkSet {
    /// An empty set that may hold chunks below `chunks` without growing.
    #[must_use]
    pub fn with_capacity(chunks: u32) -> Self {
        let leaves = chunks.div_ceil(64) as usize;
        Self { leaves: vec![0; leaves], summary: vec![0; leaves.div_ceil(64)], len: 0 }
    }

    /// The leaves up to the last chunk.
    fn used(&self) -> &[u64] {
        let end = if self.len == 0 { None } else { self.leaves.iter().rposition(|word| *word != 0) };
        &self.leaves[..end.map_or(0, |last| last + 1)]
    }

    /// Number of chunks in the set.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the set has no chunk.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the chunk is in the set.
    #[must_use]
    pub fn contains(&self, chunk: ChunkId) -> bool {
        self.leaves.get(chunk.index() / 64).is_some_and(|word| word >> (chunk.0 % 64) & 1 == 1)
    }

    /// Adds a chunk; returns whether it is new.
    pub fn insert(&mut self, chunk: ChunkId) -> bool {
        let leaf = chunk.index() / 64;
        if leaf >= self.leaves.len() {
            self.leaves.resize(leaf + 1, 0);
            self.summary.resize((leaf + 1).div_ceil(64), 0);
        }
        let bit = 1u64 << (chunk.0 % 64);
        if self.leaves[leaf] & bit != 0 {
            return false;
        }
        self.leaves[leaf] |= bit;
        self.summary[leaf / 64] |= 1 << (leaf % 64);
        self.len += 1;
        true
    }

    /// Takes a chunk out; returns whether it was in.
    pub fn remove(&mut self, chunk: ChunkId) -> bool {
        let leaf = chunk.index() / 64;
        let bit = 1u64 << (chunk.0 % 64);
        match self.leaves.get_mut(leaf) {
            Some(word) if *word & bit != 0 => {
                *word &= !bit;
                if *word == 0 {
                    self.summary[leaf / 64] &= !(1 << (leaf % 64));
                }
                self.len -= 1;
                true
            }
            _ => false,
        }
    }

    /// The first chunk of the set at or after `from`.
    #[must_use]
    pub fn next(&self, from: ChunkId) -> Option<ChunkId> {
        let leaf = from.index() / 64;
        let here = self.leaves.get(leaf)? & (u64::MAX << (from.0 % 64));
        if here != 0 {
            return Self::at(leaf, here);
        }
        let mut top = (leaf + 1) / 64;
        let mut word = self.summary.get(top)? & (u64::MAX << ((leaf + 1) % 64));
        while word == 0 {
            top += 1;
            word = *self.summary.get(top)?;
        }
        let leaf = top * 64 + word.trailing_zeros() as usize;
        Self::at(leaf, *self.leaves.get(leaf)?)
    }

    fn at(leaf: usize, word: u64) -> Option<ChunkId> {
        let base = u32::try_from(leaf).ok()?.checked_mul(64)?;
        Some(ChunkId(base + word.trailing_zeros()))
    }

    /// Takes the first chunk at or after `from` out of the set.
    pub fn take_next(&mut self, from: ChunkId) -> Option<ChunkId> {
        let chunk = self.next(from)?;
        self.remove(chunk);
        Some(chunk)
    }

    /// All chunks in rising order.
    pub fn iter(&self) -> impl Iterator<Item = ChunkId> + '_ {
        let mut from = Some(ChunkId(0));
        std::iter::from_fn(move || {
            let chunk = self.next(from?)?;
            from = chunk.0.checked_add(1).map(ChunkId);
            Some(chunk)
        })
    }

    /// Empties the set, keeping its memory.
    pub fn clear(&mut self) {
        self.leaves.fill(0);
        self.summary.fill(0);
        self.len = 0;
    }
}

/// Equal sets have equal members, whatever room they have.
impl PartialEq for ChunkSet {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.used() == other.used()
    }
}

impl Eq for ChunkSet {}

impl Hash for ChunkSet {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.used().hash(state);
    }
}

impl FromIterator<ChunkId> for ChunkSet {
    fn from_iter<I: IntoIterator<Item = ChunkId>>(chunks: I) -> Self {
        let mut set = Self::default();
        for chunk in chunks {
            set.insert(chunk);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_btree_set(ops in prop::collection::vec((any::<bool>(), 0u32..20_000), 0..400), probe in 0u32..20_000) {
            let mut set = ChunkSet::with_capacity(1000);
            let mut model = BTreeSet::new();
            for (add, n) in ops {
                if add {
                    prop_assert_eq!(set.insert(ChunkId(n)), model.insert(n));
                } else {
                    prop_assert_eq!(set.remove(ChunkId(n)), model.remove(&n));
                }
            }
            prop_assert_eq!(set.len() as usize, model.len());
            prop_assert_eq!(set.iter().map(|c| c.0).collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.next(ChunkId(probe)).map(|c| c.0), model.range(probe..).next().copied());
        }
    }
}
