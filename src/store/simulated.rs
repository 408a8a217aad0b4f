// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A simulated disk as a folder of metadata, and a base image on one: for tests of whole volumes.

use super::base::{BaseImage, BoxFuture};
use super::medium::{Folder, Medium};
use crate::core::message::BaseIdentity;
use crate::engine::{AnyFile, CompanionEngine, IoBuf, SimDisk, SimFile};
use bytes::Bytes;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

impl Folder for SimDisk {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn Medium>>> {
        Ok(self.file(name).map(|file| Arc::new(file) as Arc<dyn Medium>))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        Ok(Arc::new(self.create_file(name)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.rename_file(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.remove_file(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.file_names())
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.sync_names()
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("simulated").join(name)
    }
}

impl Medium for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(self.read_now(buf, offset))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_now(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_now()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(SimFile::len(self))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.set_len_now(len)
    }
}

/// A base image in a file of a simulated disk.
#[derive(Debug)]
pub struct SimBase {
    file: SimFile,
    identity: BaseIdentity,
    engine: CompanionEngine,
    in_place: bool,
}

impl SimBase {
    /// The file as it is; `in_place` as if it were local (see [`BaseImage::local`]), else as if it were far away.
    ///
    /// # Errors
    /// The file is not of a simulated disk's process that lives.
    pub fn new(file: SimFile, in_place: bool) -> io::Result<Self> {
        let mut bytes = vec![0; usize::try_from(file.len()).map_err(io::Error::other)?];
        file.read_now(&mut bytes, 0);
        let digest = *blake3::hash(&bytes).as_bytes();
        let engine = CompanionEngine::simulated();
        engine.register_file(AnyFile::Simulated(&file))?;
        Ok(Self { identity: BaseIdentity { length: file.len(), digest }, file, engine, in_place })
    }
}

impl BaseImage for SimBase {
    fn identity(&self) -> &BaseIdentity {
        &self.identity
    }

    fn len(&self) -> u64 {
        self.identity.length
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        let inside = usize::try_from(self.len().saturating_sub(offset)).unwrap_or(len).min(len);
        Box::pin(async move {
            let file = crate::engine::FileId(0);
            let (result, buf) = self.engine.read(file, offset, IoBuf::zeroed(inside)).await;
            result?;
            let mut bytes = buf.to_vec();
            bytes.resize(len, 0);
            Ok(Bytes::from(bytes))
        })
    }

    fn local(&self) -> Option<AnyFile<'_>> {
        self.in_place.then_some(AnyFile::Simulated(&self.file))
    }

    fn describe(&self) -> String {
        format!("simulated file of {} bytes", self.len())
    }
}
