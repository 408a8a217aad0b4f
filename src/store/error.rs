// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why a state directory cannot be used: each error names the file and says what to do.

use super::base::BaseError;
use crate::core::geometry::GeometryError;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// What the store refuses or cannot do.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another daemon has the directory.
    #[error("state directory {} is in use by pid {pid}: stop that daemon, or give each volume its own directory", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Who holds it; `?` when that is not known.
        pid: String,
    },
    /// The directory or file was not made by this program, or for another volume.
    #[error("{} {detail}: give an empty directory, or one that blkferryd made", path.display())]
    Foreign {
        /// The directory or file.
        path: PathBuf,
        /// What is strange about it.
        detail: String,
    },
    /// Content that this program wrote is damaged.
    #[error("{} is damaged ({detail}): restore the state directory from a copy, or empty it to start anew", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// How that shows.
        detail: String,
    },
    /// A file of another version of this program.
    #[error("{} has format version {found}, this program reads {known}: use the program that wrote it", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        known: u32,
    },
    /// Nothing says how large a new volume is.
    #[error("state directory {} is empty and nothing says how large the volume is: give --size, --base or --blk-file", path.display())]
    NoSize {
        /// The directory.
        path: PathBuf,
    },
    /// There is nothing to look at.
    #[error("state directory {} holds no volume: it is empty, or the making of one was cut off", path.display())]
    NoVolume {
        /// The directory.
        path: PathBuf,
    },
    /// What was asked for is not what the directory holds.
    #[error("{} holds a volume with {what} {have}, not {asked}: {hint}", path.display())]
    Mismatch {
        /// The directory.
        path: PathBuf,
        /// Which property.
        what: &'static str,
        /// What the volume has.
        have: String,
        /// What was asked for.
        asked: String,
        /// What to do.
        hint: &'static str,
    },
    /// The base image is longer than the volume.
    #[error("the base image has {base} bytes, more than the volume's {size}: --size may only grow the disk")]
    BaseTooLong {
        /// Length of the image.
        base: u64,
        /// Size of the volume.
        size: u64,
    },
    /// The layer cannot be what a volume needs.
    #[error("{} cannot be the volume's layer: {detail}", path.display())]
    Layer {
        /// The file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// The geometry is impossible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The base image cannot be had.
    #[error(transparent)]
    Base(#[from] BaseError),
}

/// Why a volume was not made larger; it serves on with the size that it had.
#[derive(Debug, Error)]
pub enum GrowError {
    /// A volume only grows: what lies past its end would be lost.
    #[error(
        "the volume has {have} bytes and cannot be made smaller ({asked}): what is past the new end would be lost"
    )]
    Shrink {
        /// Its size.
        have: u64,
        /// What was asked for.
        asked: u64,
    },
    /// No volume can have this size.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The layer's file cannot be longer.
    #[error("cannot make {} longer: {source}", path.display())]
    Extend {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The layer cannot be synced: what was written to it before may be lost too.
    #[error("the layer cannot be synced: {0}")]
    Sync(io::Error),
    /// The superblock cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl StoreError {
    /// Wraps an I/O error: `map_err(StoreError::io("read", path))`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(super) fn corrupt(path: &Path, detail: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), detail: detail.into() }
    }

    pub(super) fn foreign(path: &Path, detail: impl Into<String>) -> Self {
        Self::Foreign { path: path.to_owned(), detail: detail.into() }
    }
}
