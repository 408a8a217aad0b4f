// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A word for each chunk: one slice for the chunks that the volume was opened with, and segments for those that it
//! has grown by.
//!
//! A chunk of the first slice costs what it costs in a table that cannot grow: the comparison with the slice's length is
//! the bounds check. Chunks past it cost two loads more until the volume is opened again. Nothing ever moves, so no
//! thread needs a lock or a count to look at a word. Rejected: segments for all chunks, which would put those two
//! loads on every request of every volume for the sake of the few that grow.

use super::super::tracker::zeroed;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

type Segment = OnceLock<Box<[AtomicU64]>>;

/// See the module's header. A segment has 2^`BITS` chunks, 8 MiB of words that cost memory only where they are used; there
/// are as many as 2^32 chunks need.
pub(super) struct Words<const BITS: u32 = 20, const SEGMENTS: usize = 4096> {
    first: Box<[AtomicU64]>,
    /// Allocated when the volume grows for the first time.
    segments: OnceLock<Box<[Segment]>>,
}

impl<const BITS: u32, const SEGMENTS: usize> Words<BITS, SEGMENTS> {
    pub(super) fn new(chunks: usize) -> Self {
        Self { first: zeroed(chunks), segments: OnceLock::new() }
    }

    /// Makes room for `chunks` chunks; the new ones are 0. Chunks that there are stay where they are.
    pub(super) fn reserve(&self, chunks: usize) {
        let Some(more) = chunks.checked_sub(self.first.len()).filter(|more| *more > 0) else { return };
        let wanted = more.div_ceil(1 << BITS);
        let segments = self.segments.get_or_init(|| (0..SEGMENTS).map(|_| OnceLock::new()).collect());
        for segment in segments.iter().take(wanted) {
            segment.get_or_init(|| zeroed(1 << BITS));
        }
    }

    pub(super) fn get(&self, index: usize) -> Option<&AtomicU64> {
        match self.first.get(index) {
            Some(word) => Some(word),
            None => self.grown(index - self.first.len()),
        }
    }

    #[cold]
    fn grown(&self, index: usize) -> Option<&AtomicU64> {
        let segment = self.segments.get()?.get(index >> BITS)?.get()?;
        segment.get(index & ((1 << BITS) - 1))
    }

    /// All words, of chunks that are not there yet too.
    pub(super) fn iter(&self) -> impl Iterator<Item = &AtomicU64> {
        let segments = self.segments.get().into_iter().flatten();
        self.first.iter().chain(segments.filter_map(OnceLock::get).flatten())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn words_stay_where_they_are_and_new_ones_are_zero() {
        let words = Words::<2, 8>::new(5);
        let mut chunks = 5;
        assert!(words.get(5).is_none());
        for more in [1, 1, 3, 4, 0, 23] {
            words.reserve(chunks + more);
            assert!((chunks..chunks + more).all(|n| words.get(n).unwrap().load(Relaxed) == 0));
            chunks += more;
            (0..chunks).for_each(|n| words.get(n).unwrap().store(n as u64 + 1, Relaxed));
            let kept: Vec<u64> =
                words.iter().map(|word| word.load(Relaxed)).filter(|word| *word > 0).collect();
            assert_eq!(kept, (1..=chunks as u64).collect::<Vec<_>>());
        }
        assert_eq!(chunks, 37);
        assert!(words.get(37).is_none() && words.get(usize::MAX).is_none());
    }
}
