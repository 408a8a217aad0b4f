// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What takes time, started by the node and reported back to it as [`Done`].
//!
//! Every job carries the number of the migration run that started it: what comes back late, after a cancel or under
//! a newer migration, is recognised and dropped. Records are written one after the other in the order asked for:
//! an older one must never overwrite a newer one.

use super::input::{Done, Input};
use crate::core::destination::Installed;
use crate::core::geometry::ChunkId;
use crate::core::message::{ChunkData, Version};
use crate::core::record::MigrationRecord;
use crate::core::source::Capture;
use crate::peer::{ConnectParams, PeerLink, connect};
use crate::store::{GrowError, RemainingRun, Store};
use crate::volume::{InstallPhase, Transfer};
use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::spawn_local;

/// Pause before a record that could not be written is tried again.
const RETRY_WRITE: Duration = Duration::from_secs(1);

/// Entries of the file `remaining`: chunk, write count, still remaining.
pub(super) type RemainingEntries = Vec<(ChunkId, u8, bool)>;

struct Write {
    run: u64,
    seq: u64,
    record: MigrationRecord,
    remaining: Option<RemainingEntries>,
}

/// Held by whoever works on journal and map. When it is dropped, what came too late is asked for again.
struct Tidying {
    inputs: UnboundedSender<Input>,
    tidying: Rc<Cell<bool>>,
    owed: Rc<Cell<Option<bool>>>,
}

impl Tidying {
    /// One more look is needed.
    fn owe(&self) {
        self.owed.set(Some(self.owed.get().unwrap_or(false)));
    }
}

impl Drop for Tidying {
    fn drop(&mut self) {
        self.tidying.set(false);
        if self.owed.get().is_some() {
            // The node ends last; if it is gone, nothing is looked after any more.
            let _ = self.inputs.send(Input::Upkeep);
        }
    }
}

/// Starts jobs.
pub(super) struct Jobs {
    inputs: UnboundedSender<Input>,
    transfer: Rc<Transfer>,
    store: Arc<Store>,
    marking: bool,
    run: u64,
    writes: VecDeque<Write>,
    writing: bool,
    moving: Rc<Cell<u32>>,
    tidying: Rc<Cell<bool>>,
    /// What was asked of the upkeep while it was busy, and whether that was a commit too.
    owed: Rc<Cell<Option<bool>>>,
}

impl Jobs {
    pub(super) fn new(inputs: UnboundedSender<Input>, transfer: Rc<Transfer>, store: Arc<Store>) -> Self {
        Self {
            inputs,
            transfer,
            store,
            marking: false,
            run: 0,
            writes: VecDeque::new(),
            writing: false,
            moving: Rc::default(),
            tidying: Rc::default(),
            owed: Rc::default(),
        }
    }

    /// Number of the current migration run.
    pub(super) fn run(&self) -> u64 {
        self.run
    }

    /// Starts a new run: results of older jobs are no longer wanted.
    pub(super) fn begin_run(&mut self) {
        self.run += 1;
    }

    fn spawn(&self, job: impl Future<Output = Done> + 'static) {
        let (inputs, run) = (self.inputs.clone(), self.run);
        spawn_local(async move {
            // The node ends last; if it is gone, nobody wants the result.
            let _ = inputs.send(Input::Done(run, job.await));
        });
    }

    /// Makes a record durable, after those asked for before.
    pub(super) fn persist(&mut self, seq: u64, record: MigrationRecord, remaining: Option<RemainingEntries>) {
        self.writes.push_back(Write { run: self.run, seq, record, remaining });
        self.next_write();
    }

    /// A record write has ended: the next one may begin.
    pub(super) fn persisted(&mut self) {
        self.writing = false;
        self.next_write();
    }

    fn next_write(&mut self) {
        if self.writing {
            return;
        }
        let Some(write) = self.writes.pop_front() else { return };
        self.writing = true;
        let (inputs, store) = (self.inputs.clone(), Arc::clone(&self.store));
        spawn_local(async move {
            let (run, seq) = (write.run, write.seq);
            let write = Arc::new(write);
            let job = move || -> Result<(), String> {
                if let Some(entries) = &write.remaining {
                    let MigrationRecord::V1 { epoch, .. } = &write.record;
                    let runs = entries.iter().map(|(first, count, still_remaining)| RemainingRun {
                        first: *first,
                        run: 1,
                        count: *count,
                        still_remaining: *still_remaining,
                    });
                    store.store_remaining(*epoch, runs).map_err(|e| e.to_string())?;
                }
                store.record.store(&write.record).map_err(|e| e.to_string())
            };
            // An older record must never come after a newer one, and none may be left out: it is written again until
            // it is durable. Whoever waits for it stalls, and the status says why.
            loop {
                let result = match tokio::task::spawn_blocking(job.clone()).await {
                    Ok(result) => result,
                    Err(error) => Err(error.to_string()),
                };
                let Err(error) = result else { break };
                let _ = inputs.send(Input::Done(run, Done::PersistFailed(error)));
                tokio::time::sleep(RETRY_WRITE).await;
            }
            let _ = inputs.send(Input::Done(run, Done::Persisted { seq }));
        });
    }

    /// Reads a chunk for the peer.
    pub(super) fn capture(&self, chunk: ChunkId) {
        let transfer = Rc::clone(&self.transfer);
        self.spawn(async move {
            let capture = match transfer.capture(chunk).await {
                Ok(captured) => {
                    Capture::Done { version: captured.version, clean: captured.clean, body: captured.body }
                }
                Err(error) => {
                    log::error!("{chunk} cannot be read for the destination: {error}");
                    Capture::Failed
                }
            };
            Done::Captured { chunk, capture }
        });
    }

    /// Writes a chunk that came from the peer.
    pub(super) fn install(&self, data: ChunkData, phase: InstallPhase) {
        let transfer = Rc::clone(&self.transfer);
        let moving = Rc::clone(&self.moving);
        moving.set(moving.get() + 1);
        self.spawn(async move {
            let (chunk, version) = (data.chunk, data.version);
            let installed = match transfer.install(chunk, version, &data.body, phase).await {
                Ok(crate::volume::Installed::Done) => Installed::Done,
                Ok(crate::volume::Installed::Superseded) => Installed::Superseded,
                Err(error) => {
                    log::error!("{chunk} cannot be stored: {error}");
                    Installed::Failed
                }
            };
            moving.set(moving.get().saturating_sub(1));
            Done::Installed { chunk, version, installed }
        });
    }

    /// Fetches a chunk of the base image because the guest waits for it. Nothing is reported back: the guest's
    /// request goes on, or fails, by itself.
    pub(super) fn fetch_for_guest(&self, chunk: ChunkId) {
        let transfer = Rc::clone(&self.transfer);
        spawn_local(async move {
            if let Err(error) = transfer.fetch_base(chunk).await {
                log::error!("{chunk} cannot be fetched from the base image: {error}");
                transfer.fail_waiters(chunk);
            }
        });
    }

    /// Fetches a hot chunk of the base image ahead of need.
    pub(super) fn fetch_ahead(&self, chunk: ChunkId) {
        let transfer = Rc::clone(&self.transfer);
        let moving = Rc::clone(&self.moving);
        moving.set(moving.get() + 1);
        self.spawn(async move {
            if let Err(error) = transfer.fetch_base(chunk).await {
                log::warn!("{chunk} was not fetched ahead from the base image: {error}");
            }
            moving.set(moving.get().saturating_sub(1));
            Done::BaseFetched { chunk }
        });
    }

    /// Syncs the layer and commits the map.
    pub(super) fn sync(&self, done: fn(bool) -> Done) {
        let transfer = Rc::clone(&self.transfer);
        self.spawn(async move {
            let result = transfer.sync().await;
            if let Err(error) = &result {
                log::error!("the volume cannot be made durable: {error}");
            }
            done(result.is_ok())
        });
    }

    /// Commits what has come so far, and rotates the journal when it has grown; reports nothing. A rotation that failed
    /// is tried again: nobody asks for it twice.
    pub(super) fn upkeep(&self, commit: bool) {
        // One at a time; what is left out comes with the next.
        let commit = self.owed.take().unwrap_or(false) || commit;
        if self.tidying.get() {
            return self.owed.set(Some(commit));
        }
        let (transfer, tidied) = (Rc::clone(&self.transfer), self.tidy());
        spawn_local(async move {
            if commit && let Err(error) = transfer.sync().await {
                log::error!("the volume cannot be made durable: {error}");
            }
            if let Err(error) = transfer.maybe_rotate().await {
                log::error!("the chunk map's journal cannot be rotated: {error}");
                tokio::time::sleep(RETRY_WRITE).await;
                tidied.owe();
            }
        });
    }

    /// Keeps others from the journal and the map until it is dropped.
    fn tidy(&self) -> Tidying {
        self.tidying.set(true);
        Tidying {
            inputs: self.inputs.clone(),
            tidying: Rc::clone(&self.tidying),
            owed: Rc::clone(&self.owed),
        }
    }

    /// Drops everything that came, once no chunk is being written any more.
    pub(super) fn wipe(&self) {
        let transfer = Rc::clone(&self.transfer);
        self.alone(async move { Done::Wiped(transfer.wipe().await.map_err(|e| e.to_string())) });
    }

    /// Drops everything but these chunks of a disk that comes back.
    pub(super) fn prune(&self, current: Vec<(ChunkId, Version)>) {
        let transfer = Rc::clone(&self.transfer);
        self.alone(async move { Done::Pruned(transfer.prune(&current).await.map_err(|e| e.to_string())) });
    }

    /// Runs a job that drops content: once no chunk is being written any more, and no checkpoint of what is dropped can
    /// come after it.
    fn alone(&self, job: impl Future<Output = Done> + 'static) {
        let (moving, tidying, owed) =
            (Rc::clone(&self.moving), Rc::clone(&self.tidying), Rc::clone(&self.owed));
        let inputs = self.inputs.clone();
        self.spawn(async move {
            while moving.get() > 0 || tidying.get() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            tidying.set(true);
            let tidied = Tidying { inputs, tidying, owed };
            let done = job.await;
            drop(tidied);
            done
        });
    }

    /// Marks chunks remote. Until that is over nothing else is taken from the session: a chunk that is installed, or
    /// an offer that is recorded, must find them marked.
    pub(super) fn mark_remote(&mut self, first: ChunkId, run: u32) {
        self.marking = true;
        let transfer = Rc::clone(&self.transfer);
        let (inputs, number) = (self.inputs.clone(), self.run);
        self.spawn(async move {
            // A chunk that is not marked would be taken for good: it is tried again until it is.
            while let Err(error) = transfer.mark_remote(first, run).await {
                let _ = inputs.send(Input::Done(number, Done::Marked(Err(error.to_string()))));
                tokio::time::sleep(RETRY_WRITE).await;
            }
            Done::Marked(Ok(()))
        });
    }

    /// Whether chunks are being marked.
    pub(super) fn marking(&self) -> bool {
        self.marking
    }

    /// The marking is over.
    pub(super) fn marked(&mut self) {
        self.marking = false;
    }

    /// Makes the volume larger.
    pub(super) fn grow(&self, size: u64) {
        let volume = Arc::clone(self.transfer.volume());
        self.spawn(async move {
            let grown = tokio::task::spawn_blocking(move || volume.grow(size)).await;
            let lost = |error| GrowError::Sync(std::io::Error::other(error));
            Done::Resized(grown.map_err(lost).and_then(|result| result))
        });
    }

    /// Connects to the destination after a delay.
    pub(super) fn connect(&self, delay: Duration, destination: String, params: ConnectParams) {
        self.spawn(async move {
            tokio::time::sleep(delay).await;
            let result: Result<PeerLink, String> =
                connect(&destination, &params).await.map_err(|e| e.to_string());
            Done::Connected(result)
        });
    }
}
