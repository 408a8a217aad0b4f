// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that the kernel, the guest and this process may all touch.
//!
//! An [`IoBuf`] is a list of raw memory ranges and something that keeps them mapped: a piece of guest memory, or
//! bytes of its own. No Rust reference to the bytes is ever made: a guest may change its memory while we look at
//! it, and two buffers cut from one by [`IoBuf::slice`] may overlap. All access from this process goes through
//! relaxed atomic loads and stores, so such a race gives mixed *content*, which is what the guest asked for, and
//! never undefined behaviour. `copy_nonoverlapping` on guest memory was rejected: it is a data race by the rules
//! of the language, and a compiler may read twice.

use libc::iovec;
use smallvec::SmallVec;
use std::alloc::Layout;
use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// Alignment of owned buffers: enough for direct I/O on every disk.
const ALIGN: usize = 4096;
const WORD: usize = size_of::<u64>();

/// Bytes for a transfer: owned and aligned, or guest memory. Cheap to cut; it may be sent to another thread.
pub struct IoBuf {
    segments: SmallVec<[iovec; 2]>,
    len: usize,
    keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the ranges stay mapped as long as `keep` lives, on any thread (contract of `from_raw`), and every access
// through an `IoBuf` is atomic.
unsafe impl Send for IoBuf {}
// SAFETY: as above; shared access is atomic too.
unsafe impl Sync for IoBuf {}

/// Owned bytes: an allocation that is only ever reached through raw pointers.
struct Block {
    at: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Block` only owns the allocation; it does not access it.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `zeroed`, freed once.
        unsafe { std::alloc::dealloc(self.at.as_ptr(), self.layout) }
    }
}

impl IoBuf {
    /// `len` zero bytes of our own, aligned to 4096.
    ///
    /// # Panics
    /// Never; it aborts when there is no memory, as every allocation does.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(len.max(1), ALIGN) else {
            // Only a length near `isize::MAX` gets here: no allocator could serve it.
            std::alloc::handle_alloc_error(Layout::new::<u8>())
        };
        // SAFETY: the layout's size is not zero.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(at) = NonNull::new(start) else { std::alloc::handle_alloc_error(layout) };
        let keep = Arc::new(Block { at, layout });
        // SAFETY: `keep` owns the range, and nothing else has a pointer to it.
        unsafe { Self::from_raw([(start, len)], keep) }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let buf = Self::zeroed(bytes.len());
        buf.copy_from(bytes);
        buf
    }

    /// Memory that somebody else keeps mapped, in the order given; empty ranges are left out. This is how guest
    /// memory becomes a buffer. `keep` is cloned with every slice: give each queue thread an `Arc` of its own, or
    /// its counter becomes a shared cache line.
    ///
    /// # Safety
    /// Every range must be valid for reads (and for writes, if the buffer is read into, or `copy_from` or
    /// `fill_zero` are called) until the last clone of `keep` is dropped, and for that time this process must hold
    /// no reference to the bytes and access them only by atomic or volatile operations. Other processes and the
    /// kernel may access them at will.
    #[must_use]
    pub unsafe fn from_raw(
        ranges: impl IntoIterator<Item = (*mut u8, usize)>,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let segments: SmallVec<[iovec; 2]> = ranges
            .into_iter()
            .filter(|(_, len)| *len > 0)
            .map(|(start, len)| iovec { iov_base: start.cast(), iov_len: len })
            .collect();
        let len = segments.iter().map(|segment| segment.iov_len).sum();
        Self { segments, len, keep }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes `start..start + len` of this buffer, sharing its memory. What lies outside the buffer is left out,
    /// so the result may be shorter; asking for that is a bug, which debug builds assert.
    #[must_use]
    pub fn slice(&self, start: usize, len: usize) -> Self {
        debug_assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "slice outside its buffer");
        let mut segments = SmallVec::new();
        let (mut skip, mut rest) = (start, len);
        for segment in &self.segments {
            if rest == 0 {
                break;
            }
            if skip >= segment.iov_len {
                skip -= segment.iov_len;
                continue;
            }
            let take = rest.min(segment.iov_len - skip);
            let iov_base = segment.iov_base.cast::<u8>().wrapping_add(skip).cast();
            segments.push(iovec { iov_base, iov_len: take });
            rest -= take;
            skip = 0;
        }
        Self { segments, len: len - rest, keep: Arc::clone(&self.keep) }
    }

    /// Copies from `bytes` into the start of the buffer; returns how many bytes (the shorter of both).
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        for range in self.ranges() {
            let (now, later) = rest.split_at(rest.len().min(range.len));
            range.store(now);
            rest = later;
        }
        bytes.len() - rest.len()
    }

    /// Copies from the start of the buffer into `bytes`; returns how many bytes (the shorter of both).
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for range in self.ranges() {
            let take = range.len.min(bytes.len() - done);
            range.load(&mut bytes[done..done + take]);
            done += take;
        }
        done
    }

    /// Copies the start of this buffer to the start of `to`; returns how many bytes (the shorter of both).
    pub fn copy_into(&self, to: &Self) -> usize {
        // Through the stack: no reference to either may be made.
        let mut bytes = [0u8; 4096];
        let total = self.len.min(to.len);
        for at in (0..total).step_by(bytes.len()) {
            let len = bytes.len().min(total - at);
            self.slice(at, len).copy_to(&mut bytes[..len]);
            to.slice(at, len).copy_from(&bytes[..len]);
        }
        total
    }

    /// A copy of all bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_to(&mut bytes);
        bytes
    }

    /// Makes every byte zero.
    pub fn fill_zero(&self) {
        self.ranges().for_each(Range::clear);
    }

    /// Whether every byte is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.ranges().all(Range::is_zero)
    }

    /// The memory, for the kernel.
    pub(super) fn segments(&self) -> &[iovec] {
        &self.segments
    }

    fn ranges(&self) -> impl Iterator<Item = Range> + '_ {
        self.segments.iter().map(|s| Range { start: s.iov_base.cast(), len: s.iov_len })
    }
}

impl std::fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuf({} bytes in {} segments)", self.len, self.segments.len())
    }
}

/// One range of a live `IoBuf`: accessed bytewise up to a word border, then by words, then bytewise.
#[derive(Clone, Copy)]
struct Range {
    start: *mut u8,
    len: usize,
}

impl Range {
    /// Bytes before the first whole word, and the number of whole words after them.
    fn split(self) -> (usize, usize) {
        let head = self.start.align_offset(WORD).min(self.len);
        (head, (self.len - head) / WORD)
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        debug_assert!(at < self.len);
        let address = self.start.wrapping_add(at);
        // SAFETY: inside the range, which the `IoBuf` keeps mapped; other accesses are atomic (contract of
        // `from_raw`) or outside this program.
        unsafe { AtomicU8::from_ptr(address) }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at + WORD <= self.len);
        let address = self.start.wrapping_add(at).cast::<u64>();
        // SAFETY: as for `byte`; `split` makes `at` a word border and keeps the word inside the range.
        unsafe { AtomicU64::from_ptr(address) }
    }

    /// Stores `bytes`, which are no longer than the range, at its start.
    fn store(self, bytes: &[u8]) {
        let part = Self { len: bytes.len(), ..self };
        let (head, words) = part.split();
        let (first, rest) = bytes.split_at(head);
        let (middle, last) = rest.as_chunks::<WORD>();
        first.iter().enumerate().for_each(|(n, byte)| part.byte(n).store(*byte, Relaxed));
        for (n, word) in middle.iter().enumerate() {
            part.word(head + n * WORD).store(u64::from_ne_bytes(*word), Relaxed);
        }
        let tail = head + words * WORD;
        last.iter().enumerate().for_each(|(n, byte)| part.byte(tail + n).store(*byte, Relaxed));
    }

    /// Loads the start of the range into `bytes`, which are no longer than it.
    fn load(self, bytes: &mut [u8]) {
        let part = Self { len: bytes.len(), ..self };
        let (head, words) = part.split();
        let (first, rest) = bytes.split_at_mut(head);
        let (middle, last) = rest.as_chunks_mut::<WORD>();
        first.iter_mut().enumerate().for_each(|(n, byte)| *byte = part.byte(n).load(Relaxed));
        for (n, word) in middle.iter_mut().enumerate() {
            *word = part.word(head + n * WORD).load(Relaxed).to_ne_bytes();
        }
        let tail = head + words * WORD;
        last.iter_mut().enumerate().for_each(|(n, byte)| *byte = part.byte(tail + n).load(Relaxed));
    }

    fn clear(self) {
        let (head, words) = self.split();
        (0..head).for_each(|n| self.byte(n).store(0, Relaxed));
        (0..words).for_each(|n| self.word(head + n * WORD).store(0, Relaxed));
        (head + words * WORD..self.len).for_each(|n| self.byte(n).store(0, Relaxed));
    }

    fn is_zero(self) -> bool {
        let (head, words) = self.split();
        (0..head).all(|n| self.byte(n).load(Relaxed) == 0)
            && (0..words).all(|n| self.word(head + n * WORD).load(Relaxed) == 0)
            && (head + words * WORD..self.len).all(|n| self.byte(n).load(Relaxed) == 0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::cast_possible_truncation)]
    use super::*;
    use proptest::prelude::*;

    /// A buffer of several ranges at odd addresses inside one allocation.
    fn scattered(lens: &[usize]) -> IoBuf {
        let total: usize = lens.iter().map(|len| len + 3).sum();
        let whole = IoBuf::zeroed(total.max(1));
        let start = whole.segments()[0].iov_base.cast::<u8>();
        let mut at = 1;
        let ranges: Vec<_> = lens
            .iter()
            .map(|len| {
                let range = (start.wrapping_add(at), *len);
                at += len + 3;
                range
            })
            .collect();
        // SAFETY: all ranges lie inside `whole`, which the new buffer keeps.
        unsafe { IoBuf::from_raw(ranges, Arc::new(whole)) }
    }

    proptest! {
        #[test]
        fn behaves_like_a_vec(lens in prop::collection::vec(0usize..50, 1..6), seed: u8, a in 0usize..200, b in 0usize..200) {
            let buf = scattered(&lens);
            let total: usize = lens.iter().sum();
            prop_assert_eq!(buf.len(), total);
            prop_assert!(buf.is_zero());
            let content: Vec<u8> = (0..total).map(|n| (n as u8).wrapping_mul(7).wrapping_add(seed) | 1).collect();
            prop_assert_eq!(buf.copy_from(&content), total);
            prop_assert_eq!(buf.to_vec(), content.clone());
            let (start, end) = (a.min(b).min(total), a.max(b).min(total));
            let part = buf.slice(start, end - start);
            prop_assert_eq!(part.to_vec(), &content[start..end]);
            prop_assert_eq!(part.is_zero(), start == end);
            part.fill_zero();
            prop_assert!(part.is_zero());
            let mut expected = content;
            expected[start..end].fill(0);
            prop_assert_eq!(buf.to_vec(), expected);
        }
    }

    #[test]
    fn owned_buffers_are_aligned_and_slices_outlive_them() {
        let buf = IoBuf::copy_of(&[1, 2, 3, 4]);
        assert_eq!(buf.segments()[0].iov_base.align_offset(ALIGN), 0);
        let part = buf.slice(1, 2);
        drop(buf);
        assert_eq!(part.to_vec(), [2, 3]);
        assert!(IoBuf::zeroed(0).is_empty());
    }
}
