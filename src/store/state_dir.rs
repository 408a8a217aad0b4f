// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The claim on a state directory: one daemon at a time, and only a directory that is ours.
//!
//! The lock is an flock on the file `lock`: the kernel gives it up with the process, however that ends, so there are
//! no stale locks. The pid in the file only makes the refusal readable. A pid file alone was rejected: pids come
//! again.

use super::base::{self, BaseImage};
use super::error::StoreError;
use super::layer::Layer;
use super::medium::{Directory, Folder, TEMPORARY};
use super::superblock::{self, Superblock};
use super::{checkpoint, forced, journal, layer, record, remaining};
use crate::config::CacheMode;
use crate::engine::SimDisk;
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const LOCK: &str = "lock";

/// A state directory that this process holds until it is dropped.
pub struct StateDir {
    path: PathBuf,
    folder: Arc<dyn Folder>,
    place: Place,
}

/// Where the directory is.
enum Place {
    /// On this host; the lock is only held, and closing it gives it up.
    Host { _lock: File },
    /// On a simulated disk, over this base image.
    Simulated { disk: SimDisk, base: Option<Arc<dyn BaseImage>> },
}

impl std::fmt::Debug for StateDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StateDir({})", self.path.display())
    }
}

impl StateDir {
    /// Claims a directory; makes it if it is missing.
    ///
    /// # Errors
    /// `InUse` when another daemon has it, `Foreign` when it holds files that are not a volume's, `Io`.
    pub fn claim(path: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(path).map_err(StoreError::io("make", path))?;
        let folder = Directory::open(path).map_err(StoreError::io("open", path))?;
        check_names(path)?;
        let lock = lock(path)?;
        let place = Place::Host { _lock: lock };
        Ok(Self { path: path.to_owned(), folder: Arc::new(folder), place })
    }

    /// The directory that is all of a simulated disk. `base` is what every name of a base image stands for.
    #[must_use]
    pub fn simulated(disk: &SimDisk, base: Option<Arc<dyn BaseImage>>) -> Self {
        let place = Place::Simulated { disk: disk.clone(), base };
        Self { path: PathBuf::from("simulated"), folder: Arc::new(disk.clone()), place }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What volume it holds, if it holds one.
    ///
    /// # Errors
    /// [`StoreError`]: the superblock is damaged, foreign or of another version.
    pub fn superblock(&self) -> Result<Option<Superblock>, StoreError> {
        Superblock::load(self.folder.as_ref())
    }

    pub(super) fn folder(&self) -> &Arc<dyn Folder> {
        &self.folder
    }

    /// The base image that a path or URL names.
    pub(super) fn open_base(&self, url: &str, cache: CacheMode) -> Result<Arc<dyn BaseImage>, StoreError> {
        match &self.place {
            Place::Simulated { base: Some(base), .. } => Ok(Arc::clone(base)),
            Place::Simulated { base: None, .. } | Place::Host { .. } => Ok(base::open(url, cache)?),
        }
    }

    /// Makes the layer of a new volume.
    pub(super) fn create_layer(&self, size: u64) -> Result<(), StoreError> {
        let path = self.path.join(layer::NAME);
        match &self.place {
            Place::Host { .. } => Layer::create(&path, size),
            Place::Simulated { disk, .. } => {
                let made =
                    disk.create_file(layer::NAME).and_then(|file| file.set_len_now(size).map(|()| file));
                made.and_then(|file| file.sync_now()).map_err(StoreError::io("create", &path))
            }
        }
    }

    /// Opens the layer: the directory's own, or an adopted image.
    pub(super) fn open_layer(
        &self,
        adopted: Option<&Path>,
        size: u64,
        cache: CacheMode,
    ) -> Result<Layer, StoreError> {
        let path = adopted.map_or_else(|| self.path.join(layer::NAME), Path::to_owned);
        match &self.place {
            Place::Host { .. } => Layer::open(&path, size, adopted.is_some(), cache),
            Place::Simulated { disk, .. } => match disk.file(layer::NAME) {
                Some(file) => Layer::open_simulated(file, &path, size),
                None => Err(StoreError::io("open", &path)(std::io::ErrorKind::NotFound.into())),
            },
        }
    }

    /// Removes what is left of the making of a volume that was cut off, unless there is data in it.
    pub(super) fn clear_remains(&self) -> Result<(), StoreError> {
        match &self.place {
            Place::Host { .. } => check_remains(&self.path)?,
            Place::Simulated { disk, .. }
                if disk.file(layer::NAME).is_some_and(|file| !file.is_hole(0, file.len())) =>
            {
                let path = self.folder.path(superblock::NAME);
                return Err(StoreError::corrupt(&path, "it is missing, and the layer holds data"));
            }
            Place::Simulated { .. } => {}
        }
        let names = self.folder.list().map_err(StoreError::io("list", &self.path))?;
        for name in names.iter().filter(|name| *name != LOCK) {
            self.folder.remove(name).map_err(StoreError::io("remove", &self.folder.path(name)))?;
        }
        self.folder.sync_dir().map_err(StoreError::io("sync", &self.path))
    }
}

/// Refuses a directory without a superblock that has data in it.
pub(super) fn check_remains(dir: &Path) -> Result<(), StoreError> {
    let data = std::fs::metadata(dir.join(layer::NAME)).is_ok_and(|layer| layer.blocks() > 0);
    if data {
        let path = dir.join(superblock::NAME);
        return Err(StoreError::corrupt(&path, "it is missing, and the layer holds data"));
    }
    Ok(())
}

fn check_names(dir: &Path) -> Result<(), StoreError> {
    for entry in std::fs::read_dir(dir).map_err(StoreError::io("list", dir))? {
        let name = entry.map_err(StoreError::io("list", dir))?.file_name().to_string_lossy().into_owned();
        if !is_ours(&name) {
            return Err(StoreError::foreign(dir, format!("holds {name}, which is no file of a volume")));
        }
    }
    Ok(())
}

/// Takes the lock of a directory without changing a byte of it: no daemon starts as long as the file is open. A
/// directory that has no lock has never had a daemon, or is a copy.
///
/// # Errors
/// `InUse`, `Foreign`, `Io`.
pub(super) fn peek(dir: &Path) -> Result<Option<File>, StoreError> {
    check_names(dir)?;
    let path = dir.join(LOCK);
    match File::open(&path) {
        Ok(mut file) => exclusive(&mut file, dir).map(|()| Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("open", &path)(error)),
    }
}

/// Whether a file of this name can be a volume's.
fn is_ours(name: &str) -> bool {
    if name == forced::LOG {
        return true;
    }
    let name = name.strip_suffix(TEMPORARY).unwrap_or(name);
    let numbered = name.split_once('.').and_then(|(_, number)| number.parse::<u64>().ok());
    match numbered {
        Some(number) => name == journal::name(number) || name == checkpoint::name(number),
        None => {
            [superblock::NAME, layer::NAME, record::NAME, remaining::NAME, forced::NAME, LOCK].contains(&name)
        }
    }
}

fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(StoreError::io("open", &path))?;
    exclusive(&mut file, dir)?;
    let mut named = || {
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())
    };
    named().map_err(StoreError::io("write", &path))?;
    Ok(file)
}

/// Locks the open lock file, or tells who has it.
fn exclusive(file: &mut File, dir: &Path) -> Result<(), StoreError> {
    match flock(&*file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            // Only for the message: the holder may be writing it right now.
            let known = file.read_to_string(&mut text).is_ok() && !text.trim().is_empty();
            let pid = if known { text.trim().to_owned() } else { "?".to_owned() };
            Err(StoreError::InUse { path: dir.to_owned(), pid })
        }
        Err(errno) => Err(StoreError::io("lock", &dir.join(LOCK))(errno.into())),
    }
}
