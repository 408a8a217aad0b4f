// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory: what the front-end shares with us, and the only way to an address in it.
//!
//! The front-end sends file descriptors with a guest-physical address, a length, its own virtual address and an
//! offset each (vhost-user, "Memory region description"). Descriptors in a ring name guest-physical addresses;
//! ring addresses in SET_VRING_ADDR are the *front-end's* virtual ones. Both are looked up here, checked for
//! bounds, and split where a range spans regions.
//!
//! A table is immutable. A change makes a new one that shares the mappings, and the old one lives until the last
//! request that was translated through it is done: the kernel may write to an address long after a SET_MEM_TABLE
//! has taken it away (docs: vhost-user says nothing about in-flight requests; unmapping under io_uring would let
//! it write into whatever is mapped there next).
//!
//! No reference to guest bytes is ever made: the guest changes them while we look. Loads and stores are atomic.
//! `vm-memory` was rejected on the request path: its slices cost 0.6 us a request when a bitmap type is present.
//!
//! The length of a file is checked when its region arrives. A front-end that cuts it afterwards loses the region, and
//! with it every ring that uses the table ([`GuestMemory::is_lost`]); this process goes on (`sigbus`).

use super::mapping::{Mapping, MappingError};
use crate::engine::IoBuf;
use std::any::Any;
use std::cell::Cell;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use thiserror::Error;

/// Most regions in a table: what GET_MAX_MEM_SLOTS answers (QEMU's own limit is 512).
pub(super) const MAX_REGIONS: usize = 509;

/// Why guest memory was refused.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// Mapping or looking at the file failed.
    #[error("cannot map guest memory: {0}")]
    Map(#[from] std::io::Error),
    /// The file ends before the region does.
    #[error(
        "guest memory region of {size} bytes at file offset {offset} is longer than its file ({file} bytes)"
    )]
    Short {
        /// Region size.
        size: u64,
        /// Offset in the file.
        offset: u64,
        /// Length of the file.
        file: u64,
    },
    /// Empty, or its end is past the end of the address space.
    #[error("guest memory region at {0:#x} has an impossible size")]
    Size(u64),
    /// Two regions claim the same guest-physical addresses.
    #[error("guest memory regions overlap at {0:#x}")]
    Overlap(u64),
    /// More than [`MAX_REGIONS`].
    #[error("more than {MAX_REGIONS} guest memory regions")]
    TooMany,
    /// An address outside every region.
    #[error("address {address:#x} (+{len}) is outside guest memory")]
    Outside {
        /// First byte that is in no region.
        address: u64,
        /// Bytes left of the range there.
        len: u64,
    },
}

/// A range of guest-physical memory, as a descriptor names it; nothing is checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// What a region looks like in the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest-physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// The front-end's virtual address.
    pub user: u64,
    /// Offset in the file.
    pub offset: u64,
}

#[derive(Debug, Clone)]
struct Region {
    info: RegionInfo,
    /// Where byte `info.guest` is in this process.
    host: usize,
    /// Keeps it there.
    mapping: Arc<Mapping>,
}

/// An immutable table of guest memory. The empty table has no address.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// Sorted by guest-physical address, without overlaps.
    regions: Vec<Region>,
}

impl GuestMemory {
    /// A table of these regions.
    ///
    /// # Errors
    /// What cannot be mapped, and overlaps.
    pub fn new(regions: impl IntoIterator<Item = (RegionInfo, File)>) -> Result<Self, MemoryError> {
        regions.into_iter().try_fold(Self::default(), |table, (info, file)| table.with(info, &file))
    }

    /// This table and one region more.
    ///
    /// # Errors
    /// What cannot be mapped, and overlaps.
    pub fn with(&self, info: RegionInfo, file: &File) -> Result<Self, MemoryError> {
        let end = info.guest.checked_add(info.size).ok_or(MemoryError::Size(info.guest))?;
        if info.size == 0 || info.user.checked_add(info.size).is_none() {
            return Err(MemoryError::Size(info.guest));
        }
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        let overlaps = |r: &&Region| r.info.guest < end && info.guest < r.info.guest + r.info.size;
        if let Some(other) = self.regions.iter().find(overlaps) {
            return Err(MemoryError::Overlap(other.info.guest.max(info.guest)));
        }
        let mapping = Mapping::new(file, info.offset, info.size).map_err(|error| match error {
            MappingError::Map(error) => MemoryError::Map(error),
            MappingError::Size => MemoryError::Size(info.guest),
            MappingError::Short(file) => MemoryError::Short { size: info.size, offset: info.offset, file },
        })?;
        let mut regions = self.regions.clone();
        regions.push(Region { info, host: mapping.host(), mapping: Arc::new(mapping) });
        regions.sort_by_key(|region| region.info.guest);
        Ok(Self { regions })
    }

    /// This table without a region; `None` if it has no such region. Only the addresses and the size count: the
    /// front-end's REM_MEM_REG need not repeat the offset.
    #[must_use]
    pub fn without(&self, info: RegionInfo) -> Option<Self> {
        let same =
            |r: &Region| (r.info.guest, r.info.size, r.info.user) == (info.guest, info.size, info.user);
        let regions: Vec<Region> = self.regions.iter().filter(|r| !same(r)).cloned().collect();
        (regions.len() < self.regions.len()).then_some(Self { regions })
    }

    /// Whether the table has no region.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Whether memory of a region is gone, so that what is read there means nothing.
    #[must_use]
    pub(super) fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// Where `len` bytes at the front-end's virtual address `user` are in this process, if one region has them all.
    pub(super) fn user_range(&self, user: u64, len: u64) -> Option<usize> {
        self.regions.iter().find_map(|region| {
            let skip = user.checked_sub(region.info.user)?;
            let fits = skip.checked_add(len)? <= region.info.size;
            fits.then(|| Some(region.host + usize::try_from(skip).ok()?))?
        })
    }
}

/// What a thread's buffers keep alive: an `Arc` of that thread alone, so that its counter is no shared cache line.
#[derive(Debug)]
struct Keep(Arc<GuestMemory>);

/// One thread's look at a table, with the region of the last hit: requests of a guest mostly lie in one region.
#[derive(Debug)]
pub struct View {
    keep: Arc<Keep>,
    last: Cell<usize>,
}

impl View {
    /// Looks at this table.
    #[must_use]
    pub fn new(table: Arc<GuestMemory>) -> Self {
        Self { keep: Arc::new(Keep(table)), last: Cell::new(0) }
    }

    fn region_of(&self, address: u64) -> Option<&Region> {
        let regions = &self.keep.0.regions;
        let has = |r: &Region| address.wrapping_sub(r.info.guest) < r.info.size;
        if let Some(region) = regions.get(self.last.get()).filter(|r| has(r)) {
            return Some(region);
        }
        let after = regions.partition_point(|r| r.info.guest <= address);
        let index = after.checked_sub(1)?;
        let region = regions.get(index).filter(|r| has(r))?;
        self.last.set(index);
        Some(region)
    }

    /// Calls `piece(address in this process, bytes)` for each part of the range that lies in one region.
    fn pieces(
        &self,
        address: u64,
        len: u64,
        mut piece: impl FnMut(*mut u8, usize),
    ) -> Result<(), MemoryError> {
        let (mut at, mut rest) = (address, len);
        while rest > 0 {
            let outside = MemoryError::Outside { address: at, len: rest };
            let Some(region) = self.region_of(at) else { return Err(outside) };
            let skip = at - region.info.guest;
            let take = rest.min(region.info.size - skip);
            let (Ok(skip), Ok(bytes)) = (usize::try_from(skip), usize::try_from(take)) else {
                return Err(outside);
            };
            piece(std::ptr::with_exposed_provenance_mut(region.host + skip), bytes);
            rest -= take;
            if rest > 0 {
                at = at.checked_add(take).ok_or(outside)?;
            }
        }
        Ok(())
    }

    /// Copies guest memory into `bytes`.
    ///
    /// # Errors
    /// [`MemoryError::Outside`]; then `bytes` may be filled in part.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        self.pieces(address, bytes.len() as u64, |at, len| {
            let part = &mut bytes[done..done + len];
            let (words, rest) = part.as_chunks_mut::<8>();
            let aligned = at.addr().is_multiple_of(8);
            if aligned {
                for (n, word) in words.iter_mut().enumerate() {
                    let at = at.wrapping_add(8 * n).cast::<u64>();
                    // SAFETY: `pieces` gives ranges inside a mapping that `self.keep` holds; aligned, and atomic.
                    *word = unsafe { AtomicU64::from_ptr(at) }.load(Relaxed).to_ne_bytes();
                }
            }
            let (skip, rest) = if aligned { (len - rest.len(), rest) } else { (0, part) };
            for (n, byte) in rest.iter_mut().enumerate() {
                // SAFETY: as above.
                *byte = unsafe { AtomicU8::from_ptr(at.wrapping_add(skip + n)) }.load(Relaxed);
            }
            done += len;
        })
    }

    /// All of guest memory as one buffer, for pinning it.
    pub(super) fn whole(&self) -> IoBuf {
        let regions = &self.keep.0.regions;
        let ranges = regions.iter().filter_map(|region| {
            let len = usize::try_from(region.info.size).ok()?;
            Some((std::ptr::with_exposed_provenance_mut(region.host), len))
        });
        let keep: Arc<dyn Any + Send + Sync> = Arc::clone(&self.keep) as _;
        // SAFETY: as in `io_buf`: whole regions are ranges of the mappings that the table in `keep` holds.
        unsafe { IoBuf::from_raw(ranges, keep) }
    }

    /// A buffer of these ranges, in their order; it keeps the memory mapped.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] if any byte is in no region.
    pub fn io_buf(&self, ranges: &[GuestRange]) -> Result<IoBuf, MemoryError> {
        let mut pieces = smallvec::SmallVec::<[(*mut u8, usize); 8]>::new();
        for range in ranges {
            self.pieces(range.address, u64::from(range.len), |at, len| pieces.push((at, len)))?;
        }
        let keep: Arc<dyn Any + Send + Sync> = Arc::clone(&self.keep) as _;
        // SAFETY: the pieces lie in readable and writable mappings that the table in `keep` holds; this module, the
        // rings and `IoBuf` access guest memory only by atomic operations and make no references to it.
        Ok(unsafe { IoBuf::from_raw(pieces, keep) })
    }
}

/// Takes over a descriptor that the starter of this process left open (`--fd N`).
///
/// # Errors
/// Nothing is open under that number.
pub(super) fn adopt_fd(fd: RawFd) -> std::io::Result<OwnedFd> {
    // SAFETY: F_GETFD only looks at the descriptor.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the convention of vhost-user back-end programs it is given to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::FileExt;

    /// A memory file of `size` zero bytes.
    pub(crate) fn memory_file(size: u64) -> File {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(size).unwrap();
        file
    }

    fn info(guest: u64, size: u64, user: u64, offset: u64) -> RegionInfo {
        RegionInfo { guest, size, user, offset }
    }

    #[test]
    fn a_range_across_adjacent_regions_is_split_and_one_past_the_end_is_refused() {
        let (a, b) = (memory_file(8192), memory_file(12288));
        a.write_all_at(&[1; 4096], 4096).unwrap();
        b.write_all_at(&[2; 4096], 8192).unwrap();
        let table = GuestMemory::new([
            (info(0x11000, 4096, 0x9000_0000, 8192), b),
            (info(0x10000, 4096, 0x7000_0000, 4096), a.try_clone().unwrap()),
        ])
        .unwrap();
        let view = View::new(Arc::new(table));
        let mut bytes = [0; 8];
        view.read(0x10ffc, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 1, 1, 1, 2, 2, 2, 2]);
        let buf = view.io_buf(&[GuestRange { address: 0x10fff, len: 2 }]).unwrap();
        assert_eq!(buf.copy_from(&[7, 8]), 2);
        view.read(0x10ffe, &mut bytes[..4]).unwrap();
        assert_eq!(bytes[..4], [1, 7, 8, 2]);
        let mut byte = [0];
        a.read_exact_at(&mut byte, 8191).unwrap();
        assert_eq!(byte, [7]);
        for (address, len) in
            [(0xffff, 2), (0x11fff, 2), (0x12000, 1), (u64::MAX, 2), (0, 1), (0x10000, u32::MAX)]
        {
            assert!(view.io_buf(&[GuestRange { address, len }]).is_err(), "{address:#x} +{len}");
        }
    }

    #[test]
    fn user_addresses_need_one_region() {
        let table = GuestMemory::new([
            (info(0, 4096, 0x1000, 0), memory_file(4096)),
            (info(4096, 4096, 0x2000, 0), memory_file(4096)),
        ])
        .unwrap();
        assert!(table.user_range(0x1ff0, 16).is_some());
        assert!(table.user_range(0x1ff0, 17).is_none());
        assert!(table.user_range(0xfff, 1).is_none());
        assert!(table.user_range(u64::MAX, 2).is_none());
        assert!(table.user_range(0x1000, u64::MAX).is_none());
    }

    #[test]
    fn impossible_regions_are_refused() {
        let table = GuestMemory::new([(info(0x1000, 4096, 0, 0), memory_file(4096))]).unwrap();
        let file = memory_file(4096);
        assert!(matches!(table.with(info(0x1800, 4096, 0, 0), &file), Err(MemoryError::Overlap(0x1800))));
        assert!(matches!(table.with(info(0x8000, 8192, 0, 0), &file), Err(MemoryError::Short { .. })));
        assert!(matches!(table.with(info(u64::MAX, 4096, 0, 0), &file), Err(MemoryError::Size(_))));
        assert!(matches!(table.with(info(0x8000, 4096, 0, u64::MAX), &file), Err(MemoryError::Size(_))));
        assert!(matches!(table.with(info(0x8000, 0, 0, 0), &file), Err(MemoryError::Size(_))));
    }

    #[test]
    fn a_buffer_outlives_the_removal_of_its_region() {
        let region = info(0x1000, 4096, 0x5000, 0);
        let table = GuestMemory::new([(region, memory_file(4096))]).unwrap();
        let smaller = table.without(RegionInfo { offset: 77, ..region }).unwrap();
        let view = View::new(Arc::new(table));
        let buf = view.io_buf(&[GuestRange { address: 0x1000, len: 4096 }]).unwrap();
        drop(view);
        assert!(smaller.is_empty());
        assert!(smaller.without(region).is_none());
        assert_eq!(buf.copy_from(&[9; 4096]), 4096);
        assert_eq!(buf.to_vec(), [9; 4096]);
    }
}
