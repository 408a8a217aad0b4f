// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The volume: what queue threads and the companion thread share.
//!
//! Everything here may be used from any thread. Queue threads come through a `Port` each, the companion thread
//! through one `Transfer`. The volume itself decides nothing: routes are `core::chunk`'s, ownership is `node`'s.

use super::event::{VolumeEvent, VolumeEvents};
use super::gate::{FlushGate, Gate, Ports};
use super::request::{RequestOp, Status};
use super::table::{Notes, Table};
use super::tracker::{DirtyCallback, Tracker};
use crate::core::chunk::ChunkState;
use crate::core::geometry::{ChunkId, Geometry, Span};
use crate::core::message::Version;
use crate::engine::AnyFile;
use crate::store::{ChunkMap, GrowError, Layer, Store, Transition};
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::mpsc;

/// What a volume is opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeOptions {
    /// The guest may not write.
    pub read_only: bool,
    /// Write-back (true): a guest flush makes writes durable; write-through (false): every write is when it ends.
    pub write_cache: bool,
}

/// Guest requests and bytes since the volume was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoTotals {
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards and write-zeroes.
    pub zeroes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Syncs of the layer that the guest's requests waited for: of flushes, and in write-through of all that writes.
    pub syncs: u64,
}

/// Number of chunks in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StateCounts {
    /// Untouched, or written in part over the base image.
    pub base: u64,
    /// Zeroed.
    pub zero: u64,
    /// Copies of the base.
    pub local: u64,
    /// Differing from the base.
    pub modified: u64,
    /// At the migration source.
    pub remote: u64,
    /// Being filled or punched.
    pub installing: u64,
    /// As the last migration's source gave them.
    pub received: u64,
}

/// What one queue thread has done. Only that thread writes it, so that counting costs no locked instruction and no
/// cache line is shared between queues.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    zeroes: AtomicU64,
    errors: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    syncs: AtomicU64,
}

/// A volume; see the module's header.
pub struct Volume {
    options: VolumeOptions,
    store: Arc<Store>,
    table: Arc<Table>,
    tracker: Tracker,
    ports: Arc<Ports>,
    gate: Gate,
    flush_gate: FlushGate,
    write_cache: AtomicBool,
    /// One for each port that ever was.
    counters: Mutex<Vec<Arc<Counters>>>,
    events: mpsc::UnboundedSender<VolumeEvent>,
    faulty: AtomicBool,
    fault: Mutex<Option<String>>,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Volume({} bytes)", self.geometry().size())
    }
}

/// The journal, as the table sees it.
struct Journal(Arc<Store>);

impl Notes for Journal {
    fn note(&self, transitions: &[Transition]) -> io::Result<()> {
        self.0.map.note(transitions)
    }
}

impl Volume {
    /// Opens a volume on what the store recovered. Both gates are as at a start: guest I/O closed, flushes open.
    /// `dirty` is called when the armed tracker has something to drain.
    ///
    /// # Errors
    /// The layer's: ranges that recovery must make zeros cannot be punched.
    pub fn open(
        mut store: Store,
        options: VolumeOptions,
        dirty: DirtyCallback,
    ) -> io::Result<(Arc<Self>, VolumeEvents)> {
        let geometry = store.geometry();
        let base_len = store.base.as_ref().map_or(0, |base| base.len());
        let based = u32::try_from(base_len.div_ceil(u64::from(geometry.chunk_size()))).unwrap_or(u32::MAX);
        // The table says it all from here on; a disk written here and there has as many runs as chunks.
        let runs = std::mem::take(&mut store.recovered.runs);
        let store = Arc::new(store);
        let in_place = store.base.as_ref().filter(|base| base.local().is_some()).map_or(0, |base| base.len());
        let table = Table::new(geometry, based, Arc::new(Journal(Arc::clone(&store))));
        let table = Arc::new(table.with_base_in_place(in_place));
        runs.iter().for_each(|run| table.restore_run(run));
        super::recovery::make_holes(&store, &runs, &table)?;
        let (events, receiver) = mpsc::unbounded_channel();
        let due = events.clone();
        store.map.when_due(move || drop(due.send(VolumeEvent::RotationDue)));
        let ports = Arc::new(Ports::default());
        let volume = Self {
            options,
            store,
            table,
            tracker: Tracker::new(dirty),
            gate: Gate::new(Arc::clone(&ports)),
            flush_gate: FlushGate::new(Arc::clone(&ports)),
            ports,
            write_cache: AtomicBool::new(options.write_cache),
            counters: Mutex::default(),
            events,
            faulty: AtomicBool::new(false),
            fault: Mutex::new(None),
        };
        Ok((Arc::new(volume), receiver))
    }

    /// Size and chunk size, as they are now. An operation that needs them more than once takes them once: the volume may
    /// grow meanwhile.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.table.geometry()
    }

    /// Makes the volume larger while it is used; the new bytes are zeros. Durable when it returns. The caller sees to it
    /// that no peer knows the size (no migration). Blocks for a sync of the layer, and for writes to a short last chunk.
    ///
    /// # Errors
    /// [`GrowError`]: the size is what it was.
    pub fn grow(&self, size: u64) -> Result<(), GrowError> {
        let alone = || self.table.hold_short_end();
        let reserve = |larger: &Geometry| self.table.reserve(larger);
        let grown = self.store.grow(size, alone, reserve).inspect_err(|error| {
            if let GrowError::Sync(error) = error {
                self.layer_lost(error);
            }
        })?;
        self.table.grow(&grown);
        Ok(())
    }

    /// Whether the guest may not write.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.options.read_only
    }

    /// What the volume stands on.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// May guest I/O be done.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// May guest flushes be answered.
    #[must_use]
    pub fn flush_gate(&self) -> &FlushGate {
        &self.flush_gate
    }

    /// Write tracking.
    #[must_use]
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// Write-back (true) or write-through (virtio 1.2, 5.2.5: the `writeback` field).
    #[must_use]
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Acquire)
    }

    /// Switches between write-back and write-through, for requests that end from now on. What was completed under
    /// write-back before becomes durable with the next flush. The mode is durable when this returns: after a restart of
    /// the daemon the guest still believes in it, and under write-through it sends no flush. Blocks.
    pub fn set_write_cache(&self, on: bool) {
        if !on {
            self.write_cache.store(false, Ordering::Release);
        }
        match self.store.set_write_through(!on) {
            Ok(()) => self.write_cache.store(on, Ordering::Release),
            // Write-through holds until the daemon ends, in either direction; what holds then is not known.
            Err(error) => self.fail(&format!("the write-cache mode cannot be made durable: {error}")),
        }
    }

    /// Wakes all queue threads.
    pub fn wake_all(&self) {
        self.ports.wake_all();
    }

    /// The version of a chunk now; a chunk with a write in flight has one that no capture will have.
    #[must_use]
    pub fn version(&self, chunk: ChunkId) -> Option<Version> {
        self.geometry().has(chunk).then(|| self.table.look(chunk).version)
    }

    /// The state of a chunk now.
    #[must_use]
    pub fn state(&self, chunk: ChunkId) -> Option<ChunkState> {
        self.geometry().has(chunk).then(|| self.table.look(chunk).state)
    }

    /// How many chunks are in each state.
    #[must_use]
    pub fn counts(&self) -> StateCounts {
        let count = |state| self.table.count(state);
        let mut counts = StateCounts {
            base: 0,
            zero: count(ChunkState::Zero),
            local: count(ChunkState::Local),
            modified: count(ChunkState::Modified),
            remote: count(ChunkState::Remote),
            installing: count(ChunkState::Installing),
            received: count(ChunkState::Received),
        };
        let others = counts.zero
            + counts.local
            + counts.modified
            + counts.remote
            + counts.installing
            + counts.received;
        counts.base = u64::from(self.geometry().chunk_count()).saturating_sub(others);
        counts
    }

    /// Pieces of guest requests (a request has one in each chunk) that wait for content from the base image or the
    /// source.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.table.waiting() as u64
    }

    /// Requests and bytes since the volume was opened.
    #[must_use]
    pub fn io(&self) -> IoTotals {
        let mut totals = IoTotals::default();
        for c in self.counters.lock().iter() {
            let add = |total: &mut u64, counter: &AtomicU64| *total += counter.load(Ordering::Relaxed);
            add(&mut totals.reads, &c.reads);
            add(&mut totals.writes, &c.writes);
            add(&mut totals.flushes, &c.flushes);
            add(&mut totals.zeroes, &c.zeroes);
            add(&mut totals.errors, &c.errors);
            add(&mut totals.read_bytes, &c.read_bytes);
            add(&mut totals.written_bytes, &c.written_bytes);
            add(&mut totals.syncs, &c.syncs);
        }
        totals
    }

    /// What is wrong with the volume, in words. A faulty volume goes on serving reads and writes, and fails every
    /// flush: it no longer knows what would survive.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.fault.lock().clone()
    }

    pub(super) fn is_faulty(&self) -> bool {
        self.faulty.load(Ordering::Acquire)
    }

    /// Marks the volume faulty; only the first reason is kept and told.
    pub(super) fn fail(&self, reason: &str) {
        let mut fault = self.fault.lock();
        if fault.is_none() {
            log::error!("the volume is faulty: {reason}");
            *fault = Some(reason.to_owned());
            self.faulty.store(true, Ordering::Release);
            self.tell(VolumeEvent::Fault(reason.to_owned()));
        }
    }

    /// The layer could not be synced. The kernel forgets which pages it could not write, so a later sync would lie.
    pub(super) fn layer_lost(&self, error: &io::Error) {
        self.fail(&format!("the layer cannot be synced, and what was written to it may be lost: {error}"));
    }

    pub(super) fn tell(&self, event: VolumeEvent) {
        // Nobody listens any more: the companion has ended, and the daemon with it.
        drop(self.events.send(event));
    }

    pub(super) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    pub(super) fn ports(&self) -> &Ports {
        &self.ports
    }

    pub(super) fn map(&self) -> &ChunkMap {
        &self.store.map
    }

    pub(super) fn layer(&self) -> &Layer {
        &self.store.layer
    }

    /// The base image's file, where it can be read in place.
    pub(super) fn local_base(&self) -> Option<AnyFile<'_>> {
        self.store.base.as_ref().and_then(|base| base.local())
    }

    /// Where a span is in the layer: at the same place as in the volume.
    pub(super) fn offset(&self, span: Span) -> u64 {
        self.geometry().chunk_start(span.chunk) + u64::from(span.start)
    }

    /// Counters for a new port.
    pub(super) fn new_counters(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.counters.lock().push(Arc::clone(&counters));
        counters
    }
}

impl Counters {
    /// Counts a sync that requests waited for; by the one thread that these belong to.
    pub(super) fn count_sync(&self) {
        self.syncs.store(self.syncs.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Counts a request that has ended; by the one thread that these belong to.
    pub(super) fn count(&self, op: RequestOp, len: u64, status: Status) {
        let add = |counter: &AtomicU64, n| {
            counter.store(counter.load(Ordering::Relaxed) + n, Ordering::Relaxed);
        };
        if status != Status::Ok {
            add(&self.errors, 1);
        }
        match op {
            RequestOp::Read => {
                add(&self.reads, 1);
                add(&self.read_bytes, len);
            }
            RequestOp::Write => {
                add(&self.writes, 1);
                add(&self.written_bytes, len);
            }
            RequestOp::Zero { .. } => add(&self.zeroes, 1),
            RequestOp::Flush => add(&self.flushes, 1),
        }
    }
}
