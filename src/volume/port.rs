// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One queue thread's way into the volume.
//!
//! A request is cut at chunk borders into pieces; the chunk table says where each goes: the layer, zeros, a punch,
//! or a place to wait. The last piece completes the request, the first error is its status. A piece waits only for
//! the chunk that it needs, and only it: requests complete in any order, as virtio-blk allows.
//!
//! The loop of a queue thread is: `submit` what the ring has, `wait`, then `next` until it is empty. All disk
//! operations of a batch are submitted in the one system call of `wait`, all claims of a batch of completions are
//! noted in the journal by one append, before any of those completions is handed out.
//!
//! A guest FLUSH (and in write-through mode the end of every write) is: n = the journal's position; fdatasync of
//! the layer, asynchronously; then commit of the journal up to n, which is an fdatasync *in this thread*, and only
//! if something was noted since the last commit. A disk whose chunks are all `Modified` never pays it. Handing it
//! to another thread was rejected: two hops for what a steady guest does once a chunk.
//!
//! Requests are bounded by what the guest has put into its rings (see `waiters`). A request may be hundreds of MiB
//! long, and there may be a thousand of them, so a request has at most [`WINDOW`] pieces at a time; the next one begins
//! when one ends.

mod pieces;
mod slab;
#[cfg(test)]
mod tests;

use super::event::VolumeEvent;
use super::request::{Request, RequestOp, Status, Token};
use super::table::{Claim, Exclusive};
use super::volume::{Counters, Volume};
use super::waiters::{Seat, Wake, Waker};
use crate::core::geometry::{BlockMask, Span};
use crate::engine::{Event, FileId, IoBuf, Op, QueueEngine};
use slab::{FLAG, Slab};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Disk operations that the ring takes at a time; more are queued in the engine.
const RING_ENTRIES: u32 = 512;
/// Most pieces of one request that have begun and not ended: enough to keep a disk busy with one request.
const WINDOW: u32 = 16;
/// Most disk operations that are worth sleeping for: a ring of the door bell counts as so many.
pub const MAX_BATCH: u32 = 16;
/// The key of the port's own eventfd.
const OWN_KEY: u32 = u32::MAX;

/// What a port has to tell its queue thread.
#[derive(Debug)]
pub enum PortEvent {
    /// A request is done.
    Completed {
        /// Its token; spend it when the guest has the answer.
        token: Token,
        /// What became of it.
        status: Status,
        /// Bytes of guest memory that hold the answer: the length of a successful read, else 0. A failed read may
        /// have changed any part of its buffer.
        bytes_read: u32,
    },
    /// The descriptor polled under this key has become readable; it has not been read.
    Ready(u32),
    /// Somebody called [`Waker::wake`] (also: a gate has opened).
    Woken,
}

/// A request that has begun.
#[derive(Debug)]
struct Active {
    token: Token,
    op: RequestOp,
    offset: u64,
    buf: Option<IoBuf>,
    len: u64,
    /// Bytes from the start of which pieces have been made.
    cut: u64,
    /// Pieces that have begun and not ended.
    pieces_left: u32,
    /// Pieces are being made: one that ends at once leaves the next to who makes them.
    cutting: bool,
    status: Status,
    /// Journal position to commit once the layer has been synced.
    position: u64,
}

/// Part of a request, inside one chunk.
#[derive(Debug)]
struct Piece {
    request: u64,
    span: Span,
    /// Where in the request's buffer.
    at: usize,
    step: Step,
}

/// What a piece does now.
#[derive(Debug)]
enum Step {
    /// Waits for its chunk; a wake-up begins it again.
    Parked,
    /// Reads the layer or the base image.
    Reading,
    /// Writes the layer or zeroes a range in it; counted as a write.
    Writing { claim: BlockMask },
    /// Punches the chunk.
    Punching(Exclusive),
}

/// One queue thread's handle; see the module's header. It stays in the thread that made it.
pub struct Port {
    volume: Arc<Volume>,
    engine: QueueEngine,
    file: FileId,
    /// The base image, where it can be read in place.
    base: Option<FileId>,
    waker: Arc<Waker>,
    counters: Arc<Counters>,
    requests: Slab<Active>,
    pieces: Slab<Piece>,
    /// Requests that came while the gate was closed.
    held: VecDeque<Request>,
    /// Flushes that came while the flush gate was closed.
    held_flushes: Vec<u64>,
    /// Parked pieces whose wake-up came while the gate was closed.
    stalled: Vec<u64>,
    /// File operations that are done, and how.
    batch: Vec<(u64, io::Result<()>)>,
    wakes: Vec<Wake>,
    out: VecDeque<PortEvent>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Port({} outstanding, {} on the disk)", self.outstanding(), self.in_flight())
    }
}

impl Port {
    /// A port with an io_uring of its own; call it in the thread that will use it. `queue_index` only names it.
    ///
    /// # Errors
    /// No io_uring, or no descriptor left.
    pub fn new(volume: Arc<Volume>, queue_index: usize) -> io::Result<Self> {
        let mut engine = QueueEngine::new(RING_ENTRIES, volume.layer().file())?;
        let file = engine.register_file(volume.layer().file())?;
        let base = volume.local_base().map(|base| engine.register_file(base)).transpose()?;
        let waker = Arc::new(Waker::new()?);
        engine.poll_fd(waker.as_fd(), OWN_KEY, MAX_BATCH)?;
        volume.ports().add(&waker);
        log::debug!("queue {queue_index} has a port");
        let counters = volume.new_counters();
        Ok(Self {
            volume,
            engine,
            file,
            base,
            waker,
            counters,
            requests: Slab::new(),
            pieces: Slab::new(),
            held: VecDeque::new(),
            held_flushes: Vec::new(),
            stalled: Vec::new(),
            batch: Vec::new(),
            wakes: Vec::new(),
            out: VecDeque::new(),
        })
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Begins a request. Its completion may be there at once, in [`next`](Self::next); disk operations start at
    /// [`wait`](Self::wait). While the gate is closed the request is held.
    pub fn submit(&mut self, request: Request) {
        if self.volume.gate().is_open() {
            self.start(request);
        } else {
            self.held.push_back(request);
        }
    }

    /// Reports wake-ups of a descriptor as [`PortEvent::Ready`] with this key, until [`unpoll`](Self::unpoll), and
    /// never reads it. A wake-up counts as `weight` disk operations for [`wait`](Self::wait). `u32::MAX` is taken.
    ///
    /// # Errors
    /// No descriptor left, or the reserved key.
    pub fn poll_fd(&mut self, fd: BorrowedFd<'_>, key: u32, weight: u32) -> io::Result<()> {
        if key == OWN_KEY {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "this poll key is the port's own"));
        }
        self.engine.poll_fd(fd, key, weight)
    }

    /// Pins guest memory, so that requests that use it cost less; `None` pins none.
    ///
    /// # Errors
    /// The kernel's; requests then work as before.
    pub fn register_memory(&mut self, memory: Option<IoBuf>) -> io::Result<()> {
        self.engine.register_memory(memory)
    }

    /// Whether something has happened that [`wait`](Self::wait) would report at once; no system call.
    #[must_use]
    pub fn has_news(&mut self) -> bool {
        !self.out.is_empty() || self.waker.is_ringing() || self.engine.has_news()
    }

    /// Stops the reports under a key.
    ///
    /// # Errors
    /// The ring is unusable.
    pub fn unpoll(&mut self, key: u32) -> io::Result<()> {
        self.out.retain(|event| !matches!(event, PortEvent::Ready(ready) if *ready == key));
        self.engine.unpoll(key)
    }

    /// Starts what was submitted and sleeps until `min_complete` disk operations (or wake-ups) are there, the time
    /// is over, or somebody rings; not at all when [`next`](Self::next) has something, or with 0. May return early
    /// with nothing.
    ///
    /// # Errors
    /// The ring is unusable.
    pub fn wait(&mut self, min_complete: u32, timeout: Option<Duration>) -> io::Result<()> {
        if self.out.is_empty() && !self.waker.is_ringing() {
            self.engine.enter(min_complete, timeout)?;
        } else {
            self.engine.enter(0, None)?;
        }
        self.gather();
        Ok(())
    }

    /// The next thing to tell; no system call.
    #[allow(clippy::should_implement_trait, reason = "the caller submits between two events: no iterator")]
    pub fn next(&mut self) -> Option<PortEvent> {
        self.out.pop_front()
    }

    /// Local disk operations under way: what is worth sleeping for. Parked pieces do not count.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.engine.in_flight()
    }

    /// Requests that have been submitted and whose completion has not been put into [`next`](Self::next) yet:
    /// parked and held ones too.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.requests.len() + self.held.len()
    }

    /// The door bell of this thread.
    #[must_use]
    pub fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    /// Completes with `status` every request that waits for something other than the local disk; for a drain that
    /// may not take longer. What is on the disk already goes on. Pieces of these requests that have been written
    /// stay written.
    pub fn fail_parked(&mut self, status: Status) {
        for request in std::mem::take(&mut self.held) {
            self.answer(request.token, status, 0);
        }
        self.stalled.clear();
        for key in self.pieces.keys_where(|piece| matches!(piece.step, Step::Parked)) {
            if let Some(chunk) = self.pieces.get_mut(key).map(|piece| piece.span.chunk) {
                self.volume.table().unpark(chunk, Seat { waker: &self.waker, piece: key });
                self.piece_done(key, status);
            }
        }
        for key in std::mem::take(&mut self.held_flushes) {
            self.complete(key, Some(status));
        }
    }

    /// Takes in everything that has happened.
    fn gather(&mut self) {
        while let Some(event) = self.engine.next() {
            match event {
                Event::Done(done) => self.batch.push((done.tag, done.result)),
                // The inbox is looked at in any case.
                Event::Ready(OWN_KEY) => {}
                Event::Ready(key) => self.out.push_back(PortEvent::Ready(key)),
            }
        }
        self.finish_batch();
        if self.waker.is_ringing() {
            self.hear();
        }
    }

    fn hear(&mut self) {
        let mut wakes = std::mem::take(&mut self.wakes);
        let called = self.waker.take(&mut wakes);
        for wake in wakes.drain(..) {
            match wake {
                Wake::Retry(key) => self.resume(key),
                Wake::Granted(key, exclusive) => self.granted(key, exclusive),
                Wake::Fail(key) => self.fail_one(key),
            }
        }
        self.wakes = wakes;
        if called {
            self.out.push_back(PortEvent::Woken);
            self.reopen();
        }
    }

    /// A gate may have opened.
    fn reopen(&mut self) {
        if self.volume.gate().is_open() {
            for key in std::mem::take(&mut self.stalled) {
                self.resume(key);
            }
            for request in std::mem::take(&mut self.held) {
                self.start(request);
            }
        }
        if self.volume.flush_gate().is_open() {
            for key in std::mem::take(&mut self.held_flushes) {
                self.start_sync(key);
            }
        } else if self.volume.flush_gate().is_failing() {
            for key in std::mem::take(&mut self.held_flushes) {
                self.complete(key, Some(Status::IoError));
            }
        }
    }

    fn answer(&mut self, token: Token, status: Status, bytes_read: u32) {
        self.out.push_back(PortEvent::Completed { token, status, bytes_read });
    }
}

impl Drop for Port {
    /// Waits for the disk operations, so that the chunk table is left in order. Requests that nobody will hear of
    /// are named in the log.
    fn drop(&mut self) {
        self.fail_parked(Status::IoError);
        while self.in_flight() > 0 {
            if self.wait(1, None).is_err() {
                break;
            }
            self.fail_parked(Status::IoError);
            self.abandon();
        }
        for key in self.requests.keys_where(|_| true) {
            self.complete(key, Some(Status::IoError));
        }
        self.abandon();
    }
}

impl Port {
    fn abandon(&mut self) {
        for event in self.out.drain(..) {
            if let PortEvent::Completed { token, .. } = event {
                // Outside of the log's arguments, which are not looked at when nobody logs.
                let id = token.spend();
                log::warn!("request {id} ends with its queue, unanswered");
            }
        }
    }
}
