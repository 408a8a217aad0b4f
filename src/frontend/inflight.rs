// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The in-flight region: requests that a restarted daemon must do again (vhost-user, "Inflight I/O tracking").
//!
//! Completions are out of order, so after a crash the used ring alone does not say which requests were lost. The
//! front-end keeps a small shared memory for us through our death. Per queue, little-endian as everywhere here:
//!
//! ```text
//! 0   u64 features         0
//! 8   u16 version          1
//! 10  u16 desc_num         ring size
//! 12  u16 last_batch_head  first of the list of heads of the last batch
//! 14  u16 used_idx         used index after the last batch that was recorded whole
//! 16  desc_num times: u8 inflight, u8 padding[5], u16 next, u64 counter
//! ```
//!
//! Popped: counter, then inflight = 1. Completed, per batch: the heads are linked from `last_batch_head`; the used
//! index is published; inflight = 0 for each; `used_idx` = the used index. If `used_idx` differs from the ring's
//! after a crash, the last batch was published but not recorded: it is the list. What is still in flight is
//! submitted again in the order of its counters. The content comes from shared memory: every index is checked.
//!
//! A region belongs to a ring that lives: after a reboot of the guest the front-end asks for a new one.

use super::mapping::Mapping;
use rustix::fs::{MemfdFlags, SealFlags};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

const HEADER: usize = 16;
const ENTRY: usize = 16;
const ALIGN: usize = 64;
const VERSION: u16 = 1;

/// A mapped region for all queues.
#[derive(Debug)]
pub(super) struct InflightRegion {
    map: Mapping,
    queues: u16,
    size: u16,
}

fn queue_bytes(size: u16) -> usize {
    (HEADER + ENTRY * usize::from(size)).next_multiple_of(ALIGN)
}

/// Bytes of a region for so many queues of that size.
#[must_use]
pub(super) fn region_bytes(queues: u16, size: u16) -> u64 {
    (queue_bytes(size) * usize::from(queues)) as u64
}

/// A new region of zeros, for GET_INFLIGHT_FD.
///
/// # Errors
/// No memory.
pub(super) fn create(queues: u16, size: u16) -> io::Result<File> {
    let fd = rustix::fs::memfd_create("inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(region_bytes(queues, size))?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

impl InflightRegion {
    /// Maps the region that the front-end keeps, for SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// It cannot be mapped, or it is too small.
    pub(super) fn open(file: &File, offset: u64, bytes: u64, queues: u16, size: u16) -> io::Result<Self> {
        let wrong = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        let needed = region_bytes(queues, size);
        if size == 0 || queues == 0 || bytes < needed || !offset.is_multiple_of(ALIGN as u64) {
            return Err(wrong("in-flight region is too small for its queues, or not aligned"));
        }
        Ok(Self { map: Mapping::new(file, offset, needed)?, queues, size })
    }

    /// Whether what it says is no longer what the front-end keeps.
    #[must_use]
    pub(super) fn is_lost(&self) -> bool {
        self.map.is_lost()
    }

    fn has(&self, address: usize, len: usize) -> bool {
        let bytes = queue_bytes(self.size) * usize::from(self.queues);
        address.checked_sub(self.map.host()).is_some_and(|at| at + len <= bytes)
    }

    fn half(&self, address: usize) -> &AtomicU16 {
        debug_assert!(address.is_multiple_of(2) && self.has(address, 2));
        // SAFETY: `InflightQueue` gives aligned addresses inside the mapping, which lives as long as `self`; all
        // access from this process is atomic.
        unsafe { AtomicU16::from_ptr(std::ptr::with_exposed_provenance_mut(address)) }
    }

    fn double(&self, address: usize) -> &AtomicU64 {
        debug_assert!(address.is_multiple_of(8) && self.has(address, 8));
        // SAFETY: as for `half`.
        unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(address)) }
    }
}

/// One queue's part; used by its thread alone.
#[derive(Debug)]
pub(super) struct InflightQueue {
    region: Arc<InflightRegion>,
    base: usize,
    counter: u64,
    batch: Vec<u16>,
}

impl InflightQueue {
    /// The part of queue `index`; `None` if the region is not made for it.
    #[must_use]
    pub(super) fn new(region: &Arc<InflightRegion>, index: u16, ring_size: u16) -> Option<Self> {
        if index >= region.queues || ring_size > region.size {
            return None;
        }
        let base = region.map.host() + queue_bytes(region.size) * usize::from(index);
        Some(Self { region: Arc::clone(region), base, counter: 0, batch: Vec::new() })
    }

    /// The first half-word of an entry holds `inflight` and one byte of padding.
    fn inflight(&self, head: u16) -> &AtomicU16 {
        self.region.half(self.base + HEADER + ENTRY * usize::from(head))
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.region.half(self.base + HEADER + ENTRY * usize::from(head) + 6)
    }

    fn count(&self, head: u16) -> &AtomicU64 {
        self.region.double(self.base + HEADER + ENTRY * usize::from(head) + 8)
    }

    fn last_batch_head(&self) -> &AtomicU16 {
        self.region.half(self.base + 12)
    }

    fn used_index(&self) -> &AtomicU16 {
        self.region.half(self.base + 14)
    }

    /// Makes the record agree with the ring's used index and returns the heads that must be done again, in order.
    /// `ring_size` heads are looked at. A fresh region is initialised.
    pub(super) fn recover(&mut self, ring_size: u16, used: u16) -> Vec<u16> {
        let version = self.region.half(self.base + 8);
        if version.load(Ordering::Relaxed) != VERSION {
            self.region.half(self.base + 10).store(ring_size, Ordering::Relaxed);
            self.used_index().store(used, Ordering::Relaxed);
            version.store(VERSION, Ordering::Release);
            return Vec::new();
        }
        let missing = used.wrapping_sub(self.used_index().load(Ordering::Acquire));
        let mut head = self.last_batch_head().load(Ordering::Relaxed);
        for _ in 0..missing.min(ring_size) {
            if head >= ring_size {
                break;
            }
            self.inflight(head).store(0, Ordering::Relaxed);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.used_index().store(used, Ordering::Release);
        let mut again: Vec<(u64, u16)> = (0..ring_size)
            .filter(|head| self.inflight(*head).load(Ordering::Relaxed) & u16::from_le_bytes([0xff, 0]) != 0)
            .map(|head| (self.count(head).load(Ordering::Relaxed), head))
            .collect();
        again.sort_unstable();
        self.counter = again.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        again.into_iter().map(|(_, head)| head).collect()
    }

    /// A head has been taken from the available ring.
    pub(super) fn popped(&mut self, head: u16) {
        self.count(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.inflight(head).store(u16::from_le_bytes([1, 0]), Ordering::Release);
    }

    /// A head is about to be in the used ring: links it into the batch.
    pub(super) fn completing(&mut self, head: u16) {
        self.next(head).store(self.last_batch_head().load(Ordering::Relaxed), Ordering::Relaxed);
        self.last_batch_head().store(head, Ordering::Release);
        self.batch.push(head);
    }

    /// The used index has been published (with release, so after the list) with the whole batch.
    pub(super) fn completed(&mut self, used: u16) {
        fence(Ordering::SeqCst);
        for head in &self.batch {
            self.inflight(*head).store(0, Ordering::Relaxed);
        }
        self.batch.clear();
        self.used_index().store(used, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    fn queue(file: &File, index: u16) -> InflightQueue {
        let region = InflightRegion::open(file, 0, region_bytes(2, 8), 2, 8).unwrap();
        InflightQueue::new(&Arc::new(region), index, 8).unwrap()
    }

    #[test]
    fn what_was_popped_and_not_completed_comes_back_in_order() {
        let file = create(2, 8).unwrap();
        let mut first = queue(&file, 1);
        assert!(first.recover(8, 5).is_empty());
        for head in [3, 1, 7, 2] {
            first.popped(head);
        }
        first.completing(1);
        first.completed(6);
        drop(first);
        let mut second = queue(&file, 1);
        assert_eq!(second.recover(8, 6), [3, 7, 2]);
        second.popped(1);
        assert_eq!(queue(&file, 1).recover(8, 6), [3, 7, 2, 1]);
        assert!(queue(&file, 0).recover(8, 0).is_empty(), "the other queue's part is its own");
    }

    #[test]
    fn a_batch_that_was_published_but_not_recorded_is_done() {
        let file = create(2, 8).unwrap();
        let mut first = queue(&file, 0);
        first.recover(8, 65534);
        for head in [0, 4, 5, 6] {
            first.popped(head);
        }
        for head in [5, 0, 6] {
            first.completing(head);
        }
        drop(first); // died after publishing used index 65534 + 3 = 1
        assert_eq!(queue(&file, 0).recover(8, 1), [4]);
        assert_eq!(queue(&file, 0).recover(8, 1), [4]);
    }

    #[test]
    fn a_batch_that_was_not_published_is_done_again() {
        let file = create(2, 8).unwrap();
        let mut first = queue(&file, 0);
        first.recover(8, 0);
        first.popped(2);
        first.completing(2);
        drop(first);
        assert_eq!(queue(&file, 0).recover(8, 0), [2]);
    }

    #[test]
    fn regions_that_do_not_fit_are_refused() {
        let file = create(1, 8).unwrap();
        let bytes = region_bytes(1, 8);
        assert!(InflightRegion::open(&file, 0, bytes, 2, 8).is_err());
        assert!(InflightRegion::open(&file, 64, bytes, 1, 8).is_err());
        assert!(InflightRegion::open(&file, !63, bytes, 1, 8).is_err());
        assert!(InflightRegion::open(&file, 0, bytes, 0, 0).is_err());
        let region = Arc::new(InflightRegion::open(&file, 0, bytes, 1, 8).unwrap());
        assert!(InflightQueue::new(&region, 1, 8).is_none());
        assert!(InflightQueue::new(&region, 0, 16).is_none());
    }

    proptest! {
        #[test]
        fn garbage_gives_heads_of_the_ring(bytes in prop::collection::vec(any::<u8>(), 320), used: u16) {
            let file = create(2, 8).unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            file.write_all_at(&[1, 0], 8).unwrap();
            let again = queue(&file, 0).recover(8, used);
            prop_assert!(again.iter().all(|head| *head < 8));
        }
    }
}
