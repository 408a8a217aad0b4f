// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A mapped part of a file that the front-end shares with us: guest memory, the dirty log, the in-flight region.
//!
//! The length of the file is checked when it comes. The front-end may cut it later: see `sigbus`.

use super::sigbus::Watch;
use rustix::fs::{FileType, fstat};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::fs::File;
use std::io;
use thiserror::Error;

/// Largest page size that a file may be backed by.
const MAX_PAGE: u64 = 1 << 30;
const MIN_PAGE: u64 = 4096;

/// Why a part of a file was not mapped.
#[derive(Debug, Error)]
pub(super) enum MappingError {
    /// The kernel's refusal.
    #[error(transparent)]
    Map(#[from] io::Error),
    /// Empty, or its end is past all addresses.
    #[error("impossible size or offset")]
    Size,
    /// The file, of this many bytes, ends before it.
    #[error("it is longer than its file of {0} bytes")]
    Short(u64),
}

impl From<MappingError> for io::Error {
    fn from(error: MappingError) -> Self {
        match error {
            MappingError::Map(error) => error,
            MappingError::Size | MappingError::Short(_) => Self::new(io::ErrorKind::InvalidInput, error),
        }
    }
}

/// A mapped range of this process, readable and writable; unmapped on drop.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Address as a number: it becomes a pointer only where it is used, so that the type stays `Send`.
    start: usize,
    len: usize,
    /// Where the part that was asked for begins.
    host: usize,
    /// Until it is unmapped.
    watch: Option<Watch>,
}

impl Mapping {
    /// Maps `size` bytes at `offset` of the file.
    ///
    /// # Errors
    /// A [`MappingError`].
    pub(super) fn new(file: &File, offset: u64, size: u64) -> Result<Self, MappingError> {
        let stat = fstat(file).map_err(io::Error::from)?;
        let end = offset.checked_add(size).filter(|_| size > 0).ok_or(MappingError::Size)?;
        let file_len = u64::try_from(stat.st_size).unwrap_or(0);
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && end > file_len {
            return Err(MappingError::Short(file_len));
        }
        // hugetlbfs wants offset and (on unmap) length in whole huge pages; st_blksize says how large they are.
        let page = u64::try_from(stat.st_blksize).unwrap_or(MIN_PAGE);
        let page = if page.is_power_of_two() { page.clamp(MIN_PAGE, MAX_PAGE) } else { MIN_PAGE };
        let first = offset & !(page - 1);
        let len = (end - first).checked_next_multiple_of(page).ok_or(MappingError::Size)?;
        let number = |value| usize::try_from(value).map_err(|_| MappingError::Size);
        let (len, page, skip) = (number(len)?, number(page)?, number(offset - first)?);
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice; nothing existing is replaced.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, file, first) }
            .map_err(io::Error::from)?;
        let at = start.expose_provenance();
        // From here on a failure unmaps it.
        let mut mapping = Self { start: at, len, host: at + skip, watch: None };
        mapping.watch = Some(Watch::new(at, len, page)?);
        // SAFETY: advice on the mapping just made. A core dump need not hold the guest's memory.
        if let Err(error) = unsafe { rustix::mm::madvise(start, len, Advice::LinuxDontDump) } {
            log::debug!("madvise(DONTDUMP): {error}");
        }
        Ok(mapping)
    }

    /// The address of the first byte that was asked for.
    #[must_use]
    pub(super) fn host(&self) -> usize {
        self.host
    }

    /// Whether a page of it was lost: what is read is no longer what the front-end shares.
    #[must_use]
    pub(super) fn is_lost(&self) -> bool {
        self.watch.as_ref().is_some_and(Watch::is_lost)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.watch = None;
        let start = std::ptr::with_exposed_provenance_mut(self.start);
        // SAFETY: mapped by `Mapping::new` with this length, unmapped once; every user of an address inside holds or
        // borrows this mapping.
        if let Err(error) = unsafe { rustix::mm::munmap(start, self.len) } {
            log::warn!("munmap of shared memory: {error}");
        }
    }
}
