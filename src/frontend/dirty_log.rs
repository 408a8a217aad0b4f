// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty page log: telling the hypervisor which guest pages we wrote (vhost-user, "Migration").
//!
//! While VHOST_F_LOG_ALL is negotiated, each byte that this process (or the kernel, on its behalf) writes to guest
//! memory must be followed by a set bit for its 4 KiB page: data of reads, the status byte, and the used ring at its
//! `log_guest_addr`. A page that is missed arrives stale at the destination: silent corruption of the guest.
//!
//! *Write first, mark then.* The front-end clears bits while it copies; marking first would let it clear the bit,
//! copy the old page, and never see our write. The memory is shared with the front-end and with the VM's other
//! devices, so bits are set by an atomic OR.

use super::mapping::Mapping;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Bytes of guest memory per bit.
pub(super) const PAGE: u64 = 4096;

/// A mapped log. Immutable as a value; SET_LOG_BASE makes a new one.
#[derive(Debug)]
pub(super) struct DirtyLog {
    map: Mapping,
    /// Bytes of the log.
    len: usize,
    /// Ranges that had pages outside the log.
    outside: AtomicU64,
}

impl DirtyLog {
    /// Maps `size` bytes at `offset` of the file.
    ///
    /// # Errors
    /// It cannot be mapped, or the file is shorter.
    pub(super) fn new(file: &File, offset: u64, size: u64) -> io::Result<Self> {
        let len = usize::try_from(size).map_err(io::Error::other)?;
        Ok(Self { map: Mapping::new(file, offset, size)?, len, outside: AtomicU64::new(0) })
    }

    /// Whether marks may have gone nowhere.
    #[must_use]
    pub(super) fn is_lost(&self) -> bool {
        self.map.is_lost()
    }

    /// Marks the pages of `len` bytes at guest-physical `address`, which have been written. Pages past the end of
    /// the log are left out, and counted: the front-end sizes the log to the guest's memory.
    pub(super) fn mark(&self, address: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|more| address.checked_add(more)) else { return };
        let pages = (self.len as u64).saturating_mul(8);
        let (first, last) = (address / PAGE, last / PAGE);
        if last >= pages && self.outside.fetch_add(1, Ordering::Relaxed) == 0 {
            log::warn!("a write at guest address {address:#x} is outside the dirty log of {pages} pages");
        }
        for page in first..=last.min(pages.saturating_sub(1)) {
            if let Some(byte) = self.byte(page / 8) {
                let bit = 1u8 << (page % 8);
                // Most pages are marked already in a busy ring; a load keeps the line shared.
                if byte.load(Ordering::SeqCst) & bit == 0 {
                    byte.fetch_or(bit, Ordering::SeqCst);
                }
            }
        }
    }

    fn byte(&self, index: u64) -> Option<&AtomicU8> {
        let index = usize::try_from(index).ok().filter(|index| *index < self.len)?;
        // SAFETY: inside the mapping, which lives as long as `self`; other processes access it atomically, and this
        // one only through here.
        Some(unsafe { AtomicU8::from_ptr(std::ptr::with_exposed_provenance_mut(self.map.host() + index)) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::frontend::memory::tests::memory_file;
    use std::os::unix::fs::FileExt;

    fn bytes(file: &File, len: usize, at: u64) -> Vec<u8> {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    #[test]
    fn pages_are_marked_and_other_devices_bits_stay() {
        let file = memory_file(8192);
        let log = DirtyLog::new(&file, 4096 + 16, 4).unwrap();
        file.write_all_at(&[0x80], 4096 + 16).unwrap();
        log.mark(4095, 2);
        log.mark(9 * PAGE, PAGE);
        log.mark(0, 0);
        assert_eq!(bytes(&file, 6, 4096 + 15), [0, 0x83, 0x02, 0, 0, 0]);
    }

    #[test]
    fn pages_outside_are_left_out() {
        let file = memory_file(4096);
        let log = DirtyLog::new(&file, 0, 2).unwrap();
        log.mark(15 * PAGE, 100 * PAGE);
        log.mark(u64::MAX - 10, 20);
        log.mark(u64::MAX, 1);
        log.mark(1 << 40, u64::from(u32::MAX));
        assert_eq!(bytes(&file, 4, 0), [0, 0x80, 0, 0]);
        assert!(DirtyLog::new(&file, 4096, 1).is_err());
        assert!(DirtyLog::new(&file, 0, 0).is_err());
        assert!(DirtyLog::new(&file, u64::MAX, 2).is_err());
    }
}
