// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The base image: read-only content that source and destination both have (the paper's shared repository).
//!
//! The trait is shaped for an object store: ranges, asynchronously, by several at once. This version has raw files
//! ([`file::FileBase`]); other schemes are refused by name.
//!
//! The identity says whether two daemons mean the same image; equal length proves nothing. Its digest covers what
//! the implementation can read at a start without reading the image.

pub mod file;

use crate::config::CacheMode;
use crate::core::message::BaseIdentity;
use crate::engine::AnyFile;
use bytes::Bytes;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use thiserror::Error;

/// A future on the heap, as `dyn` traits need.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Why a base image cannot be had.
#[derive(Debug, Error)]
pub enum BaseError {
    /// This version knows files only.
    #[error(
        "base image {url}: {scheme}:// images are not available in this version; give a path or a file:// URL"
    )]
    Scheme {
        /// What was given.
        url: String,
        /// Its scheme.
        scheme: String,
    },
    /// A system call failed.
    #[error("cannot read base image {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// An image of no bytes, or not a file.
    #[error("base image {} is {what}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
}

/// A base image.
pub trait BaseImage: Send + Sync {
    /// Which image this is.
    fn identity(&self) -> &BaseIdentity;

    /// Length in bytes, at least 1.
    fn len(&self) -> u64;

    /// Never: an image of no bytes is refused.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads `len` bytes from `offset`, always all of them: past the end of the image there are zeros, because a
    /// volume may be larger than its base. Await it in a tokio runtime.
    ///
    /// # Errors
    /// That of the medium. The image has not changed in length, or this is `UnexpectedEof`.
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>>;

    /// The image as a file of this host, if it is one: whoever reads it itself needs no copy and no other thread. It has
    /// [`len`](Self::len) bytes.
    fn local(&self) -> Option<AnyFile<'_>> {
        None
    }

    /// The image in words, for logs and status.
    fn describe(&self) -> String;
}

impl std::fmt::Debug for dyn BaseImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}

/// Opens the image that a path or URL names. Reads the sample of its identity (at most 6 MiB, or 16 MiB of a small
/// image) in this thread. A local file is opened past the page cache too if the mode allows it and the file system
/// can.
///
/// # Errors
/// [`BaseError`]: a scheme of another version, or the file's.
pub fn open(url: &str, cache: CacheMode) -> Result<Arc<dyn BaseImage>, BaseError> {
    let path = match url.split_once("://") {
        Some(("file", path)) => path,
        Some((scheme, _)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric()) => {
            return Err(BaseError::Scheme { url: url.to_owned(), scheme: scheme.to_owned() });
        }
        _ => url,
    };
    Ok(Arc::new(file::FileBase::open(PathBuf::from(path), cache)?))
}
