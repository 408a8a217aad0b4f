// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The local layer: one sparse file as long as the volume, or an adopted raw image.
//!
//! Byte n of the volume is byte n of the file. What no state of the chunk map calls valid is never read, so the file
//! needs no other structure, and an adopted image stays a plain image that any other program can read. Holes are
//! needed (`Zero` is one), so a file system that cannot punch them is refused at once and not at the first discard.

use super::error::{GrowError, StoreError};
use crate::config::CacheMode;
use crate::engine::{AnyFile, DirectFile, SimFile};
use rustix::fs::{
    AtFlags, FallocateFlags, FlockOperation, SeekFrom, StatxFlags, fallocate, flock, seek, statx,
};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Name of the file in the state directory.
pub(super) const NAME: &str = "layer";
/// Writes through the page cache are made of these.
const PAGE: u32 = 4096;
/// Larger than this no file system wants its transfers to be.
const LARGEST_GRAIN: u32 = 1 << 20;
/// No file system has larger blocks.
const BORDER: u64 = 64 << 10;

/// Longest wait for the I/O of a daemon that was killed.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// The local layer of a volume.
#[derive(Debug)]
pub struct Layer {
    medium: LayerFile,
    path: PathBuf,
    size: AtomicU64,
    adopted: bool,
}

/// Where the bytes are.
#[derive(Debug)]
enum LayerFile {
    Kernel { file: File, direct: Option<DirectFile> },
    Simulated(SimFile),
}

impl LayerFile {
    fn set_len(&self, size: u64) -> io::Result<()> {
        match self {
            Self::Kernel { file, .. } => file.set_len(size),
            Self::Simulated(file) => file.set_len_now(size),
        }
    }

    fn sync_all(&self) -> io::Result<()> {
        match self {
            Self::Kernel { file, .. } => file.sync_all(),
            Self::Simulated(file) => file.sync_now(),
        }
    }
}

/// Whether the file has nothing but zeros from `end` on.
fn is_empty_from(file: &File, end: u64, len: u64) -> io::Result<bool> {
    // What file systems call data begins at one of their blocks: look at the bytes up to the next border.
    let border = end.next_multiple_of(BORDER).min(len);
    let mut bytes = vec![0; usize::try_from(border - end).unwrap_or(0)];
    file.read_exact_at(&mut bytes, end)?;
    if bytes.iter().any(|byte| *byte != 0) {
        return Ok(false);
    }
    match seek(file, SeekFrom::Data(border)) {
        Err(rustix::io::Errno::NXIO) => Ok(true),
        found => Ok(found? >= len),
    }
}

/// Sizes in bytes, powers of two; hints for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grain {
    /// A write of less costs the medium a read: a page, or what direct I/O needs if that is more.
    pub physical: u32,
    /// What the file system calls its preferred size.
    pub preferred: u32,
}

impl Default for Grain {
    fn default() -> Self {
        Self { physical: PAGE, preferred: PAGE }
    }
}

impl Grain {
    /// From `statx`: zeros, and what is no power of two or absurd, mean that nothing is known.
    fn of(direct: u32, blksize: u32) -> Self {
        let known = |bytes: u32| if bytes.is_power_of_two() && bytes <= LARGEST_GRAIN { bytes } else { 0 };
        let physical = known(direct).max(PAGE);
        Self { physical, preferred: known(blksize).max(physical) }
    }
}

impl Layer {
    /// Makes the sparse file of a new volume; its name becomes durable with the folder.
    pub(super) fn create(path: &Path, size: u64) -> Result<(), StoreError> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.map_err(StoreError::io("create", path))?;
        file.set_len(size).and_then(|()| file.sync_all()).map_err(StoreError::io("grow", path))
    }

    /// Opens a layer that must have `size` bytes. One that is longer is what a crash leaves of a growth, if nothing is in
    /// the rest; then that is cut off.
    pub(super) fn open(path: &Path, size: u64, adopted: bool, cache: CacheMode) -> Result<Self, StoreError> {
        let file =
            OpenOptions::new().read(true).write(true).open(path).map_err(StoreError::io("open", path))?;
        let metadata = file.metadata().map_err(StoreError::io("examine", path))?;
        let refuse = |detail: String| StoreError::Layer { path: path.to_owned(), detail };
        if !metadata.is_file() {
            return Err(refuse("it is not a regular file".to_owned()));
        }
        if !lock(&file) {
            let detail = "another daemon uses it, or the last one was killed and its I/O has not ended yet";
            return Err(refuse(detail.to_owned()));
        }
        let len = metadata.len();
        if !is_sound(&file, size, len).map_err(StoreError::io("examine", path))? {
            return Err(refuse(format!("it has {len} bytes, the volume has {size}")));
        }
        if len > size {
            log::warn!(
                "{}: cut back from {len} to {size} bytes: a growth did not come to its end",
                path.display()
            );
            file.set_len(size).and_then(|()| file.sync_all()).map_err(StoreError::io("cut", path))?;
        }
        let direct = open_direct(path, true, cache)?;
        let medium = LayerFile::Kernel { file, direct };
        let layer = Self { medium, path: path.to_owned(), size: AtomicU64::new(size), adopted };
        // Past the end: this asks whether holes are possible and changes nothing.
        layer
            .punch(size, 4096)
            .map_err(|error| refuse(format!("its file system cannot punch holes: {error}")))?;
        Ok(layer)
    }

    /// The layer on a simulated disk, which must have `size` bytes.
    pub(super) fn open_simulated(file: SimFile, path: &Path, size: u64) -> Result<Self, StoreError> {
        let len = file.len();
        if len != size {
            let detail = format!("it has {len} bytes, the volume has {size}");
            return Err(StoreError::Layer { path: path.to_owned(), detail });
        }
        let (medium, path) = (LayerFile::Simulated(file), path.to_owned());
        Ok(Self { medium, path, size: AtomicU64::new(size), adopted: false })
    }

    /// Size of an image that is to be adopted.
    pub(super) fn adoptable(path: &Path) -> Result<u64, StoreError> {
        let metadata = std::fs::metadata(path).map_err(StoreError::io("open", path))?;
        if !metadata.is_file() {
            let detail = "only a regular file can be adopted".to_owned();
            return Err(StoreError::Layer { path: path.to_owned(), detail });
        }
        Ok(metadata.len())
    }

    /// The open file, to be registered with engines; with its twin past the page cache, where that is asked for and
    /// possible.
    #[must_use]
    pub fn file(&self) -> AnyFile<'_> {
        match &self.medium {
            LayerFile::Kernel { file, direct } => AnyFile::Kernel { file, direct: direct.as_ref() },
            LayerFile::Simulated(file) => AnyFile::Simulated(file),
        }
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the volume, and of the file, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Makes the file longer, by a hole, durably. [`size`](Self::size) stays as it is until
    /// [`grown`](Self::grown). Blocks.
    ///
    /// If the old end is not at a border of blocks, the file system fills the last block with zeros *in the page cache*,
    /// and does not wait for direct writes to that block that are under way: one of the two would be lost, and the next
    /// sync would fail. What `alone` returns keeps such writes away until the length has changed.
    ///
    /// # Errors
    /// [`GrowError::Extend`], [`GrowError::Sync`]
    pub(super) fn extend<A>(&self, size: u64, alone: impl FnOnce() -> A) -> Result<(), GrowError> {
        let held = alone();
        let changed = self.medium.set_len(size);
        drop(held);
        changed.map_err(|source| GrowError::Extend { path: self.path.clone(), source })?;
        self.medium.sync_all().map_err(GrowError::Sync)
    }

    /// The volume has this size now.
    pub(super) fn grown(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// How the medium likes to be written, as its file system says now.
    #[must_use]
    pub fn grain(&self) -> Grain {
        let LayerFile::Kernel { file, .. } = &self.medium else { return Grain::default() };
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN;
        let Ok(stat) = statx(file, "", AtFlags::EMPTY_PATH, wanted) else { return Grain::default() };
        Grain::of(stat.stx_dio_offset_align, stat.stx_blksize)
    }

    /// Whether it is an image that was there before the volume.
    #[must_use]
    pub fn is_adopted(&self) -> bool {
        self.adopted
    }

    /// Makes a range a hole, at once and in this thread. For opening and wiping; guest I/O goes through an engine.
    ///
    /// # Errors
    /// The kernel's.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let file = match &self.medium {
            LayerFile::Kernel { file, .. } => file,
            LayerFile::Simulated(file) => return file.punch_now(offset, len),
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(file, flags, offset, len) {
                Err(rustix::io::Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }

    /// Sees to it that a range is a hole. What is one already, as nearly all of a sparse volume is when it is opened, costs
    /// a look and no change of the file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let file = match &self.medium {
            LayerFile::Kernel { file, .. } => file,
            LayerFile::Simulated(file) if file.is_hole(offset, len) => return Ok(()),
            LayerFile::Simulated(file) => return file.punch_now(offset, len),
        };
        match seek(file, SeekFrom::Data(offset)) {
            // No data up to the end of the file, or none in the range.
            Err(rustix::io::Errno::NXIO) => Ok(()),
            Ok(data) if data >= offset.saturating_add(len) => Ok(()),
            // Data; or a file system that cannot tell, and says so or calls everything data.
            Ok(_) | Err(_) => self.punch(offset, len),
        }
    }

    /// `fdatasync`, at once and in this thread.
    ///
    /// # Errors
    /// The kernel's. After one, what was written before may be lost although a later sync succeeds.
    pub fn sync(&self) -> io::Result<()> {
        match &self.medium {
            LayerFile::Kernel { file, .. } => file.sync_data(),
            LayerFile::Simulated(file) => file.sync_now(),
        }
    }
}

/// What a look at a layer's file shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLook {
    /// Where it is.
    pub path: PathBuf,
    /// Its length in bytes; more than the volume has is what a crash leaves of a growth, and is cut off at a start.
    pub len: u64,
    /// Bytes that the file system has allocated for it.
    pub allocated: u64,
}

/// Looks at a layer that must have `size` bytes, and refuses what [`Layer::open`] would; nothing is changed.
pub(super) fn look(path: &Path, size: u64) -> Result<LayerLook, StoreError> {
    let file = File::open(path).map_err(StoreError::io("open", path))?;
    let metadata = file.metadata().map_err(StoreError::io("examine", path))?;
    let refuse = |detail: String| StoreError::Layer { path: path.to_owned(), detail };
    if !metadata.is_file() {
        return Err(refuse("it is not a regular file".to_owned()));
    }
    let len = metadata.len();
    if !is_sound(&file, size, len).map_err(StoreError::io("examine", path))? {
        return Err(refuse(format!("it has {len} bytes, the volume has {size}")));
    }
    Ok(LayerLook { path: path.to_owned(), len, allocated: metadata.blocks() * 512 })
}

/// Whether a file of `len` bytes can be the layer of a volume of `size`.
fn is_sound(file: &File, size: u64, len: u64) -> io::Result<bool> {
    match len.cmp(&size) {
        std::cmp::Ordering::Less => Ok(false),
        std::cmp::Ordering::Equal => Ok(true),
        std::cmp::Ordering::Greater => is_empty_from(file, size, len),
    }
}

/// Locks the file for this daemon alone, and waits for the I/O of one that was killed.
///
/// The state directory's lock is free as soon as a process is gone, but the kernel may carry out its last writes after
/// that. Whoever starts then would have new writes overtaken by old ones. The layer's lock belongs to the open file,
/// which the rings of a daemon keep until their last operation has ended: it is free when nothing can come any more.
/// It also covers an adopted image, which lies outside of the state directory.
fn lock(file: &File) -> bool {
    let begin = Instant::now();
    while flock(file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if begin.elapsed() > LOCK_WAIT {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    if begin.elapsed() > Duration::from_millis(10) {
        log::info!("waited {} ms for the I/O of the last daemon", begin.elapsed().as_millis());
    }
    true
}

/// The direct twin of a file, as the cache mode wants it.
pub(super) fn open_direct(
    path: &Path,
    writable: bool,
    cache: CacheMode,
) -> Result<Option<DirectFile>, StoreError> {
    if cache == CacheMode::Buffered {
        return Ok(None);
    }
    let asked_for = cache == CacheMode::Direct;
    let direct =
        DirectFile::open(path, writable, asked_for).map_err(StoreError::io("open for direct I/O", path))?;
    if asked_for && direct.is_none() {
        let detail = "its file system has no direct I/O with units up to 4096 bytes; leave --cache at auto";
        return Err(StoreError::Layer { path: path.to_owned(), detail: detail.to_owned() });
    }
    Ok(direct)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_of_the_medium_are_powers_of_two_within_bounds() {
        for (direct, blksize, physical, preferred) in [
            (0, 0, 4096, 4096),
            (512, 4096, 4096, 4096),
            (4096, 4096, 4096, 4096),
            (16 << 10, 4096, 16 << 10, 16 << 10),
            (512, 128 << 10, 4096, 128 << 10),
            (3000, 1_000_000, 4096, 4096),
            (u32::MAX, 1 << 30, 4096, 4096),
        ] {
            assert_eq!(Grain::of(direct, blksize), Grain { physical, preferred });
        }
    }
}
