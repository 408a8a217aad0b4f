// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A second descriptor of a file, which goes past the page cache (`O_DIRECT`), and what may go through it.
//!
//! Direct transfers need aligned offsets, lengths and memory; the file system says how (`statx`, `STATX_DIOALIGN`).
//! What a guest or the companion asks for need not be aligned so, and nothing is refused for that:
//!
//! - offset and length aligned, memory not: through aligned memory of our own (a *bounce buffer*);
//! - offset or length not aligned: through the page cache, by the plain descriptor.
//!
//! Both descriptors name one file, and the kernel keeps them coherent range by range: a direct transfer first writes
//! back and drops the cached pages that it touches. The one hazard is two *neighbours in one page*, one transferred
//! directly while the other dirties the page in the cache: the page's later write-back would undo the first. It
//! cannot happen here. Where the alignment is that of a sector, no request is misaligned, so nothing is cached. Where
//! it is larger, a direct transfer covers whole units, and a cached one in the same unit overlaps it: two overlapping
//! requests in flight have no order in virtio-blk either. A unit larger than a page is therefore not used.

use super::IoBuf;
use rustix::fs::{AtFlags, StatxFlags, statx};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Used where the file system does not say; right for every disk with sectors up to this size.
const USUAL: u32 = 4096;

/// A file that is open for direct I/O.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
    align: DirectAlign,
}

/// What direct transfers must be multiples of, in bytes; both are powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectAlign {
    /// Offsets in the file, and lengths.
    pub offset: u32,
    /// Addresses in memory.
    pub memory: u32,
}

impl DirectAlign {
    /// Whether a transfer of `len` bytes at `offset` may be direct.
    #[must_use]
    pub fn fits(self, offset: u64, len: u64) -> bool {
        (offset | len) & u64::from(self.offset - 1) == 0
    }

    /// Whether this memory may be used as it is.
    #[must_use]
    pub fn fits_memory(self, buf: &IoBuf) -> bool {
        let (address, len) = (self.memory as usize - 1, self.offset as usize - 1);
        buf.segments().iter().all(|s| s.iov_base.addr() & address == 0 && s.iov_len & len == 0)
    }
}

impl DirectFile {
    /// Opens the file a second time. `None` if the file system has no direct I/O, or one that is not worth it: one
    /// that does not say how (`asked_for` tries all the same), or with units larger than a page.
    ///
    /// # Errors
    /// The kernel's, when `asked_for`; else they mean `None`.
    pub fn open(path: &Path, writable: bool, asked_for: bool) -> io::Result<Option<Self>> {
        match Self::try_open(path, writable, asked_for) {
            Err(error) if !asked_for => {
                log::debug!("{}: no direct I/O: {error}", path.display());
                Ok(None)
            }
            other => other,
        }
    }

    fn try_open(path: &Path, writable: bool, asked_for: bool) -> io::Result<Option<Self>> {
        let stat = statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::DIOALIGN)?;
        let told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
        let align = match (told, stat.stx_dio_offset_align, stat.stx_dio_mem_align) {
            (true, offset, memory) if offset.is_power_of_two() && memory.is_power_of_two() => {
                DirectAlign { offset: offset.max(512), memory }
            }
            // Zeros: this file cannot do it. Nothing: an older kernel, or a file system in memory.
            (false, _, _) if asked_for => DirectAlign { offset: USUAL, memory: USUAL },
            _ => return Ok(None),
        };
        if align.offset > USUAL {
            return Ok(None);
        }
        let file = OpenOptions::new().read(true).write(writable).custom_flags(libc::O_DIRECT).open(path)?;
        let direct = Self { file, align };
        direct.probe()?;
        Ok(Some(direct))
    }

    /// A file system may say yes and mean no.
    fn probe(&self) -> io::Result<()> {
        let mut memory = vec![0u8; 2 * USUAL as usize];
        let skip = memory.as_ptr().align_offset(USUAL as usize);
        self.file.read_at(&mut memory[skip..skip + USUAL as usize], 0).map(drop)
    }

    /// The descriptor.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its rules.
    #[must_use]
    pub fn align(&self) -> DirectAlign {
        self.align
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_aligned_is_told_from_what_is_not() {
        let align = DirectAlign { offset: 512, memory: 4 };
        assert!(align.fits(0, 512) && align.fits(1 << 40, 4096));
        assert!(!align.fits(256, 512) && !align.fits(512, 100));
        let buf = IoBuf::zeroed(4096);
        assert!(align.fits_memory(&buf));
        assert!(align.fits_memory(&buf.slice(4, 512)));
        assert!(!align.fits_memory(&buf.slice(2, 512)));
        assert!(!align.fits_memory(&buf.slice(0, 100)), "a segment must be whole units");
    }

    #[test]
    fn a_file_system_in_memory_is_not_opened_directly_unless_asked() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [1; 8192]).unwrap();
        assert!(DirectFile::open(&path, true, false).unwrap().is_none());
        assert!(DirectFile::open(&dir.path().join("missing"), true, false).unwrap().is_none());
        assert!(DirectFile::open(&dir.path().join("missing"), true, true).is_err());
    }
}
