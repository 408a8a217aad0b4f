// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The few file operations that metadata needs, as traits small enough to be failed on purpose.
//!
//! Journal, checkpoint, record and superblock are small and are read and written synchronously; the guest's data
//! goes through `engine` instead. [`super::fault`] is the twin in memory that loses and tears what was not synced.
//!
//! A name becomes durable with [`Folder::sync_dir`], content with [`Medium::sync`]: neither does the other's work.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An open file.
pub trait Medium: Send + Sync {
    /// Fills `buf` from `offset`; returns how many bytes there were before the end of the file.
    ///
    /// # Errors
    /// The kernel's.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// The kernel's; any part may have been written.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// `fdatasync`.
    ///
    /// # Errors
    /// The kernel's. After one, a later success proves nothing about what was written before.
    fn sync(&self) -> io::Result<()>;
    /// Length in bytes.
    ///
    /// # Errors
    /// The kernel's.
    fn len(&self) -> io::Result<u64>;
    /// Whether it has no byte.
    ///
    /// # Errors
    /// The kernel's.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts, or grows with zeros.
    ///
    /// # Errors
    /// The kernel's.
    fn set_len(&self, len: u64) -> io::Result<()>;
}

/// A flat folder of files.
pub trait Folder: Send + Sync {
    /// Opens a file for reading and writing; `None` when there is none of that name.
    ///
    /// # Errors
    /// The kernel's.
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn Medium>>>;
    /// Makes an empty file, or empties the one of that name.
    ///
    /// # Errors
    /// The kernel's.
    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>>;
    /// Gives a file another name, replacing the one that had it.
    ///
    /// # Errors
    /// The kernel's.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file; that there is none is no error.
    ///
    /// # Errors
    /// The kernel's.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// All names, in no order.
    ///
    /// # Errors
    /// The kernel's.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes names durable as they are now.
    ///
    /// # Errors
    /// The kernel's.
    fn sync_dir(&self) -> io::Result<()>;
    /// Where a file is, for messages.
    fn path(&self, name: &str) -> PathBuf;
}

/// Replaces a file as a whole: after a crash it has the old content or the new. `write` fills the new file.
///
/// # Errors
/// That of `write`, or the kernel's; then the old file stands, and a `.tmp` file may be left behind.
pub fn replace<E: From<io::Error>>(
    folder: &dyn Folder,
    name: &str,
    write: impl FnOnce(&dyn Medium) -> Result<(), E>,
) -> Result<(), E> {
    let temporary = format!("{name}{TEMPORARY}");
    let file = folder.create(&temporary)?;
    write(file.as_ref())?;
    file.sync()?;
    folder.rename(&temporary, name)?;
    folder.sync_dir()?;
    Ok(())
}

/// How names of files that are not yet whole end.
pub const TEMPORARY: &str = ".tmp";

/// Reads a whole file that must not be longer than `most` bytes.
///
/// # Errors
/// The kernel's, or `InvalidData` for a longer file.
pub fn read_all(file: &dyn Medium, most: usize) -> io::Result<Vec<u8>> {
    let len = usize::try_from(file.len()?).ok().filter(|len| *len <= most);
    let Some(len) = len else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("longer than {most} bytes")));
    };
    let mut bytes = vec![0; len];
    let got = file.read_at(&mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}

impl Medium for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match FileExt::read_at(self, &mut buf[done..], offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }
}

/// A folder of the file system.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    handle: File,
}

impl Directory {
    /// Opens an existing folder.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), handle: File::open(path)? })
    }
}

impl Folder for Directory {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn Medium>>> {
        match OpenOptions::new().read(true).write(true).open(self.path.join(name)) {
            Ok(file) => Ok(Some(Arc::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        let path = self.path.join(name);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Arc::new(file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let names = std::fs::read_dir(&self.path)?;
        names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}
