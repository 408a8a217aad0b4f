// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory of the pretended guest: one shared file, mapped here and at the back-end.
//!
//! The back-end writes to it at any time, so nothing here hands out a plain reference. Ring fields are atomics; bulk
//! data is copied in and out. Addresses are offsets from the start of the file, which are the guest-physical ones too.

use anyhow::{Context, Result, bail};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

/// Sizes of files of huge pages are multiples of this.
const HUGE: usize = 2 << 20;

/// A shared mapping of a memory file.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    file: File,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping lives as long as the value, and is only reached through atomics and copies of ranges that one
// thread owns at a time by the rules of the virtqueue.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Makes at least `len` bytes of memory, populated.
    pub(crate) fn new(len: usize, huge: bool) -> Result<Self> {
        let len = len.max(1).next_multiple_of(HUGE);
        let flags = if huge { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
        let file = rustix::fs::memfd_create("blkferry-bench", flags | MemfdFlags::CLOEXEC)
            .map_err(io::Error::from)
            .context("memfd_create")?;
        let file = File::from(file);
        file.set_len(u64::try_from(len)?).context("the size of the guest memory")?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping at an address that the kernel chooses; it touches no memory of ours.
        let mapped = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, &file, 0) };
        match mapped {
            Ok(base) => match NonNull::new(base.cast::<u8>()) {
                Some(base) => Ok(Self { file, base, len }),
                None => bail!("the guest memory was mapped at address 0"),
            },
            Err(error) if huge => bail!(
                "no {} huge pages of 2 MiB for the guest memory ({error}): reserve them with `sysctl vm.nr_hugepages={}`",
                len / HUGE,
                len / HUGE
            ),
            Err(error) => Err(io::Error::from(error)).context("mapping the guest memory"),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Where it is mapped in this process.
    pub(crate) fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    /// A checked pointer to `len` bytes at `offset`, aligned to `align`. The layout of the rings is this program's own:
    /// a range outside is a bug, not an input.
    fn at(&self, offset: usize, len: usize, align: usize) -> *mut u8 {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(inside && offset.is_multiple_of(align), "guest memory: {len} bytes at {offset}");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }

    pub(crate) fn atomic8(&self, offset: usize) -> &AtomicU8 {
        let at = self.at(offset, 1, 1);
        // SAFETY: valid for the life of self, and only ever accessed atomically.
        unsafe { AtomicU8::from_ptr(at) }
    }

    pub(crate) fn atomic16(&self, offset: usize) -> &AtomicU16 {
        let at = self.at(offset, 2, 2).cast();
        // SAFETY: valid and aligned for the life of self, and only ever accessed atomically.
        unsafe { AtomicU16::from_ptr(at) }
    }

    pub(crate) fn atomic32(&self, offset: usize) -> &AtomicU32 {
        let at = self.at(offset, 4, 4).cast();
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(at) }
    }

    pub(crate) fn atomic64(&self, offset: usize) -> &AtomicU64 {
        let at = self.at(offset, 8, 8).cast();
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(at) }
    }

    /// Copies bytes in. The caller owns the range: no request that uses it is in flight.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        let at = self.at(offset, bytes.len(), 1);
        // SAFETY: the range is in the mapping, which no Rust reference ever covers, so it cannot overlap `bytes`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) }
    }

    /// Copies bytes out; the same rule holds.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) {
        let at = self.at(offset, bytes.len(), 1);
        // SAFETY: as for `write`.
        unsafe { std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len()) }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing outlives: everything borrows from self.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn bytes_and_atomics_are_the_same_memory() {
        let memory = GuestMemory::new(1, false).unwrap();
        assert_eq!(memory.len(), HUGE);
        memory.write(64, &[1, 2, 3, 4]);
        assert_eq!(memory.atomic16(66).load(Ordering::Relaxed), u16::from_le_bytes([3, 4]).to_le());
        memory.atomic64(128).store(u64::MAX, Ordering::Relaxed);
        let mut bytes = [0; 9];
        memory.read(128, &mut bytes);
        assert_eq!(bytes, [255, 255, 255, 255, 255, 255, 255, 255, 0]);
    }

    #[test]
    #[should_panic(expected = "guest memory")]
    fn nothing_outside_is_reached() {
        let memory = GuestMemory::new(1, false).unwrap();
        memory.atomic16(HUGE);
    }
}
