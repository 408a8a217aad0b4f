// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A real volume on a real store in a temporary directory, one queue and a companion, driven from one thread.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

use super::*;
use crate::engine::{CompanionEngine, IoBuf};
use crate::store::{BootId, StateDir, Store, StoreParams};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

pub(super) const CHUNK: u32 = 64 << 10;

/// What outlives a daemon.
pub(super) struct Disk {
    dir: TempDir,
    size: u64,
    base: Option<PathBuf>,
    boot: u8,
}

impl Disk {
    pub(super) fn new(size: u64, base: Option<Vec<u8>>) -> Self {
        let dir = TempDir::new().unwrap();
        let base = base.map(|bytes| {
            let path = dir.path().join("base");
            std::fs::write(&path, bytes).unwrap();
            path
        });
        Self { dir, size, base, boot: 0 }
    }

    /// The host goes down: another boot id at the next open.
    pub(super) fn crash(&mut self) {
        self.boot += 1;
    }

    pub(super) fn layer(&self) -> PathBuf {
        self.dir.path().join("state").join("layer")
    }

    fn store(&self) -> Store {
        let params = StoreParams {
            base: self.base.as_ref().map(|path| path.display().to_string()),
            size: Some(self.size),
            chunk_size: Some(CHUNK),
            ..StoreParams::default()
        };
        let state = StateDir::claim(&self.dir.path().join("state")).unwrap();
        Store::open_at_boot(state, &params, BootId([self.boot; 16])).unwrap()
    }

    pub(super) fn open(&self) -> Daemon {
        self.open_with(VolumeOptions { read_only: false, write_cache: true })
    }

    pub(super) fn open_with(&self, options: VolumeOptions) -> Daemon {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (volume, events) = Volume::open(self.store(), options, Box::new(|| {})).unwrap();
        let engine = runtime.block_on(async { CompanionEngine::new(64) }).unwrap();
        let transfer = {
            let _in = runtime.enter();
            Arc::new(Transfer::new(Arc::clone(&volume), engine).unwrap())
        };
        volume.gate().open();
        let port = Port::new(Arc::clone(&volume), 0).unwrap();
        Daemon { port, transfer, events, volume, runtime, seen: Vec::new(), tasks: Vec::new(), next: 0 }
    }
}

/// A running daemon, as far as this room goes.
pub(super) struct Daemon {
    pub(super) port: Port,
    pub(super) transfer: Arc<Transfer>,
    pub(super) events: VolumeEvents,
    pub(super) volume: Arc<Volume>,
    pub(super) runtime: tokio::runtime::Runtime,
    /// Events other than demands of the base image, which are answered.
    pub(super) seen: Vec<VolumeEvent>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    next: u64,
}

impl Daemon {
    fn token(&mut self) -> Token {
        self.next += 1;
        Token::new(self.next)
    }

    pub(super) fn read(&mut self, offset: u64, len: usize) -> (u64, IoBuf) {
        let buf = IoBuf::copy_of(&vec![0xee; len]);
        let token = self.token();
        let request = Request::read(&self.volume, offset, buf.slice(0, len), token).unwrap();
        self.port.submit(request);
        (self.next, buf)
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> u64 {
        let token = self.token();
        let request = Request::write(&self.volume, offset, IoBuf::copy_of(bytes), token).unwrap();
        self.port.submit(request);
        self.next
    }

    pub(super) fn zero(&mut self, offset: u64, len: u64, unmap: bool) -> u64 {
        let token = self.token();
        let request = Request::zero(&self.volume, offset, len, unmap, token).unwrap();
        self.port.submit(request);
        self.next
    }

    pub(super) fn flush(&mut self) -> u64 {
        let token = self.token();
        self.port.submit(Request::flush(token));
        self.next
    }

    /// Lets things happen once; base image demands are answered.
    pub(super) fn turn(&mut self) -> Vec<(u64, Status)> {
        self.port.wait(u32::from(self.port.in_flight() > 0), Some(Duration::from_millis(20))).unwrap();
        let mut done = Vec::new();
        while let Some(event) = self.port.next() {
            if let PortEvent::Completed { token, status, .. } = event {
                done.push((token.spend(), status));
            }
        }
        while let Ok(event) = self.events.try_recv() {
            match event {
                VolumeEvent::Demand { chunk, origin: Origin::Base } => {
                    self.fetch(chunk);
                }
                event => self.seen.push(event),
            }
        }
        // A task may wait for a write of this queue: a short look at a time.
        if let Some(task) = self.tasks.last_mut() {
            let short = Duration::from_micros(300);
            let ended = self.runtime.block_on(async { tokio::time::timeout(short, task).await });
            if let Ok(ended) = ended {
                ended.unwrap();
                self.tasks.pop();
            }
        }
        done
    }

    pub(super) fn fetch(&mut self, chunk: crate::core::geometry::ChunkId) {
        let transfer = Arc::clone(&self.transfer);
        self.tasks.push(self.runtime.spawn(async move { transfer.fetch_base(chunk).await.unwrap() }));
    }

    /// Runs until nothing is outstanding; everything must have gone well.
    pub(super) fn settle(&mut self) {
        while self.port.outstanding() > 0 || !self.tasks.is_empty() {
            for (token, status) in self.turn() {
                assert_eq!(status, Status::Ok, "request {token}");
            }
        }
        self.turn();
    }

    pub(super) fn read_now(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let (_, buf) = self.read(offset, len);
        self.settle();
        buf.to_vec()
    }

    pub(super) fn write_now(&mut self, offset: u64, bytes: &[u8]) {
        self.write(offset, bytes);
        self.settle();
    }
}
