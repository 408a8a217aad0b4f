// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A raw file as base image.
//!
//! Identity: an image of terabytes cannot be read at every start, so the digest is blake3 over a fixed sample. **An
//! image that differs only outside the sample has the same identity**: the sample tells images apart that were made
//! separately, it does not prove that two copies are equal. Whoever edits a base image in place must not expect to be
//! caught. The sample of an image of `n` bytes, in this order:
//!
//! - the length as a 64-bit little-endian number;
//! - `n` up to 16 MiB: all bytes;
//! - else: the first 1 MiB, then 64 pieces of 64 KiB, the i-th (0 to 63) at `floor(n / 65) * (i + 1)` rounded down to
//!   a multiple of 4096, then the last 1 MiB.
//!
//! Reads run on tokio's blocking threads: a base image may lie on a network file system that blocks for long, and must
//! then not hold up the companion thread.

use super::{BaseError, BaseImage, BoxFuture};
use crate::config::CacheMode;
use crate::core::message::BaseIdentity;
use crate::engine::{AnyFile, DirectFile};
use bytes::Bytes;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

const WHOLE: u64 = 16 << 20;
const END: usize = 1 << 20;
const PIECE: usize = 64 << 10;
const PIECES: u64 = 64;

/// A raw image in a file.
#[derive(Debug)]
pub struct FileBase {
    file: Arc<File>,
    direct: Option<DirectFile>,
    path: PathBuf,
    identity: BaseIdentity,
}

impl FileBase {
    /// Opens an image and reads the sample of its identity.
    ///
    /// # Errors
    /// [`BaseError`] with the file's name.
    pub fn open(path: PathBuf, cache: CacheMode) -> Result<Self, BaseError> {
        let read = || {
            let file = File::open(&path)?;
            let metadata = file.metadata()?;
            let identity = if metadata.is_file() && metadata.len() > 0 {
                Some(identify(&file, metadata.len())?)
            } else {
                None
            };
            Ok((file, metadata.is_file(), identity))
        };
        match read() {
            Err(source) => Err(BaseError::Io { path, source }),
            Ok((_, false, _)) => Err(BaseError::Unusable { path, what: "not a regular file" }),
            Ok((_, true, None)) => Err(BaseError::Unusable { path, what: "empty" }),
            Ok((file, true, Some(identity))) => {
                // Whether it is possible is the image's file system's affair: the layer's may differ.
                let direct = (cache != CacheMode::Buffered).then(|| DirectFile::open(&path, false, false));
                let direct = direct.and_then(Result::ok).flatten();
                Ok(Self { file: Arc::new(file), direct, path, identity })
            }
        }
    }
}

/// Where the sample of an image of `len` bytes lies, in the order in which it is hashed.
fn sample(len: u64) -> Vec<(u64, usize)> {
    if len <= WHOLE {
        let whole = (0..len).step_by(END);
        return whole.map(|at| (at, usize::try_from(len - at).unwrap_or(END).min(END))).collect();
    }
    let pieces = (1..=PIECES).map(|n| (len / (PIECES + 1) * n / 4096 * 4096, PIECE));
    std::iter::once((0, END)).chain(pieces).chain(std::iter::once((len - END as u64, END))).collect()
}

fn identify(file: &File, len: u64) -> io::Result<BaseIdentity> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&len.to_le_bytes());
    let mut buffer = vec![0; END];
    for (at, count) in sample(len) {
        file.read_exact_at(&mut buffer[..count], at)?;
        hasher.update(&buffer[..count]);
    }
    Ok(BaseIdentity { length: len, digest: *hasher.finalize().as_bytes() })
}

impl BaseImage for FileBase {
    fn identity(&self) -> &BaseIdentity {
        &self.identity
    }

    fn len(&self) -> u64 {
        self.identity.length
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        let (file, total) = (Arc::clone(&self.file), self.identity.length);
        Box::pin(async move {
            let read = move || {
                let mut bytes = vec![0; len];
                let inside = usize::try_from(total.saturating_sub(offset)).unwrap_or(len).min(len);
                file.read_exact_at(&mut bytes[..inside], offset)?;
                Ok(Bytes::from(bytes))
            };
            tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
        })
    }

    fn local(&self) -> Option<AnyFile<'_>> {
        Some(AnyFile::Kernel { file: &self.file, direct: self.direct.as_ref() })
    }

    fn describe(&self) -> String {
        format!("raw file {} of {} bytes", self.path.display(), self.identity.length)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::open;
    use super::*;

    fn image(dir: &std::path::Path, name: &str, len: u64, change: impl FnOnce(&File)) -> Arc<dyn BaseImage> {
        let path = dir.join(name);
        let file = File::options().create(true).truncate(true).write(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        change(&file);
        open(path.to_str().unwrap(), CacheMode::Auto).unwrap()
    }

    #[tokio::test]
    async fn reads_and_gives_zeros_past_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let base = image(dir.path(), "a", 1000, |file| file.write_all_at(&[7; 1000], 0).unwrap());
        assert_eq!(base.len(), 1000);
        let bytes = base.read(900, 300).await.unwrap();
        assert_eq!((&bytes[..100], &bytes[100..]), (&[7; 100][..], &[0; 200][..]));
        assert_eq!(base.read(u64::MAX, 10).await.unwrap(), vec![0; 10]);
        File::options().write(true).open(dir.path().join("a")).unwrap().set_len(950).unwrap();
        assert_eq!(base.read(900, 100).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn another_image_has_another_identity() {
        let dir = tempfile::tempdir().unwrap();
        let plain = image(dir.path(), "a", 64 << 20, |_| {});
        let same = image(dir.path(), "b", 64 << 20, |_| {});
        assert_eq!(plain.identity(), same.identity());
        let piece = (64u64 << 20) / 65 * 30 / 4096 * 4096;
        for at in [0, (1 << 20) - 1, (63 << 20) + 5, (64 << 20) - 1, piece] {
            let other = image(dir.path(), "c", 64 << 20, |file| file.write_all_at(&[1], at).unwrap());
            assert_ne!(plain.identity(), other.identity(), "at {at}");
        }
        let longer = image(dir.path(), "d", (64 << 20) + 512, |_| {});
        assert_ne!(plain.identity(), longer.identity());
        let small = image(dir.path(), "e", 5 << 20, |_| {});
        let edited = image(dir.path(), "f", 5 << 20, |file| file.write_all_at(&[1], 3_333_333).unwrap());
        assert_ne!(small.identity(), edited.identity(), "all of a small image counts");
    }

    #[test]
    fn other_schemes_and_non_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for url in ["http://host/x", "https://host/x", "s3://bucket/key"] {
            let error = open(url, CacheMode::Auto).unwrap_err().to_string();
            assert!(error.contains(url) && error.contains("not available in this version"), "{error}");
        }
        assert!(matches!(
            open(dir.path().to_str().unwrap(), CacheMode::Auto),
            Err(BaseError::Unusable { .. } | BaseError::Io { .. })
        ));
        let missing = dir.path().join("missing");
        assert!(matches!(open(missing.to_str().unwrap(), CacheMode::Auto), Err(BaseError::Io { .. })));
        image(dir.path(), "g", 512, |_| {});
        assert!(open(&format!("file://{}", dir.path().join("g").display()), CacheMode::Auto).is_ok());
    }
}
