// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The concurrent skin over `core::chunk`: one atomic word and one block mask a chunk, and a side table for the few that
//! need more.
//!
//! ```text
//! bit 0..3 state | 3 slow | 4..24 writes in flight | 24..64 version
//! ```
//!
//! A chunk that nobody has touched is 0: `Base`, no writes, version 0. So the table is `calloc`ed and costs memory
//! only where the disk is used. The masks lie in an array of their own: most chunks are whole, and then their masks
//! cost nothing either. A chunk that somebody holds or waits for has an [`Entry`] in the side table.
//!
//! `slow` is set exactly while the mask is not empty or the chunk has an entry. Without it nothing but the word matters:
//! a read is one load, a write one compare-and-swap, and no lock is taken. Rejected: masks in the entries. A disk that is
//! written here and there has a mask in every chunk, and an entry is twenty times as large as a mask.
//!
//! # Who may change what
//! *State, mask and `slow`* change only under the lock of the chunk's shard, and the mask is read only under it.
//! *Writes in flight and version* change by atomic read-modify-write, with or without it. So under the lock the word may
//! still move, but only in those two fields, and only as long as `slow` is clear: a writer enters by a compare-and-swap
//! on the *whole* word, which fails when `slow` or the state has changed since it was routed.
//!
//! # A holder against writers
//! Whoever wants a chunk alone sets `slow` first. A writer's compare-and-swap either came before that, and the
//! returned word counts it, or it fails, and the writer comes to the lock. The last writer to leave sees `slow` in
//! the word that its own subtraction returns, and takes the lock to hand the chunk over. Both are operations on one
//! atomic, so they have one order; no fence is needed.
//!
//! # Versions: a capture against writers
//! The version moves at the start *and* at the end of a write, so a capture that overlapped a write has a smaller
//! version than every capture that did not: a torn copy can never replace a clean one at the destination. A capture
//! is clean if no write was in flight when it began and the version is the same when it ends. In `Remote` the
//! version is the one of the source's copy that was installed last, or 0, and writes leave it alone: such a chunk is
//! not captured, and its version decides whether an arriving copy is too old.
//!
//! # Growth
//! The size is one atomic. A volume grows on disk first, then gets room for the new words and masks ([`Words`] has the layout), then
//! the journal takes notes of the new chunks, then the new size is published. A request is checked against a size that was published, so whoever names a new
//! chunk finds its word. The last chunk may be short before and longer after. Nothing that was decided with the old size
//! is wrong then: what lies past the old end is a hole in the layer and past the end of any base image, so it reads
//! as zeros in every state, and a block or chunk that was whole stays whole. One decision is different: to punch a chunk
//! because all of it is discarded. It is made again when no writer can come in between any more.
//!
//! # The journal
//! A transition is noted *before* it is published, under the lock of its shard. If it were published first, another
//! queue could write on the strength of it and acknowledge that write while the journal knows nothing. The lock
//! makes the order of records about one chunk the order in which they became true; records are absolute, so that
//! order is all that recovery needs. The note is a buffered append, never a sync.
//!
//! # Memory ordering
//! All operations on words are sequentially consistent. The tracker relies on it ("publish, then look whether it is
//! armed" against "arm, then look at the table"), and on x86 it costs nothing over acquire and release for loads
//! and read-modify-writes, which are the only operations used. Masks are only used under their shard's lock, which
//! orders them: they are atomic because neighbours belong to other shards, not for any order of their own.

mod batch;
mod exclusive;
mod tally;
mod word;
mod words;

pub(super) use exclusive::Exclusive;

use super::event::Origin;
use super::waiters::{Claimant, Parked, Seat, Waiter, Wake};
use crate::core::chunk::{self, Access, ChunkState, ChunkView, IllegalMove, Route, check_move};
use crate::core::geometry::{BlockMask, ChunkId, Geometry, Span};
use crate::core::message::Version;
use crate::store::{Run, Transition};
use parking_lot::{Mutex, MutexGuard};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use thiserror::Error;

use tally::Tally;
use tokio::sync::oneshot;
use word::{SLOW, WRITER, bumped, state_of, update, version_of, with_state, writers_of};
use words::Words;

const SHARDS: u32 = 64;

/// Where transitions are noted: the store's chunk map, or a test's list.
pub(super) trait Notes: Send + Sync {
    /// Appends the transitions, in this order, so that they survive a crash of the process.
    fn note(&self, transitions: &[Transition]) -> io::Result<()>;
}

/// Why a chunk could not change.
#[derive(Debug, Error)]
pub enum TableError {
    /// A bug: the move is not in the table of legal moves.
    #[error(transparent)]
    Illegal(#[from] IllegalMove),
    /// The journal could not be written; nothing has changed.
    #[error("the chunk map cannot be written: {0}")]
    Note(#[from] io::Error),
}

/// A chunk as one consistent look shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Look {
    /// Its state.
    pub(super) state: ChunkState,
    /// What it is for recovery: `state`, or what a holder found it in.
    pub(super) lasting: ChunkState,
    pub(super) mask: BlockMask,
    pub(super) version: Version,
    pub(super) writers: u64,
}

impl Look {
    /// Whether the chunk has content of its own, and is not just the base image's.
    pub(super) fn has_content(&self) -> bool {
        match self.lasting {
            ChunkState::Base => !self.mask.is_empty(),
            ChunkState::Local => false,
            _ => true,
        }
    }
}

/// What an access may do now.
#[derive(Debug)]
pub(super) enum Begun {
    /// Read the layer.
    Layer,
    /// Read the base image's file.
    Base,
    /// The answer is zeros.
    Zeros,
    /// Nothing is to be done.
    Done,
    /// Write the layer; a write is counted. When it has completed, `publish` the claim if it is not empty, then
    /// `end_write`.
    Write { claim: BlockMask },
    /// Punch the layer, then `finish`.
    Punch(Exclusive),
    /// Wait for `Wake::Retry` (or `Wake::Granted` for a punch). The first that needs content raises the demand.
    Parked { demand: Option<Origin> },
}

/// Blocks that a completed write made valid.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    pub(super) chunk: ChunkId,
    pub(super) blocks: BlockMask,
}

#[derive(Debug, Clone, Copy)]
struct Hold {
    was: ChunkState,
    punch: bool,
}

/// Who holds a chunk and who waits for it.
#[derive(Debug, Default)]
struct Entry {
    hold: Option<Hold>,
    claimants: VecDeque<(Claimant, bool)>,
    parked: Vec<Parked>,
    demanded: bool,
}

impl Entry {
    fn is_idle(&self) -> bool {
        self.hold.is_none() && self.claimants.is_empty() && self.parked.is_empty()
    }

    fn take_parked(&mut self, which: impl Fn(&Parked) -> bool) -> Vec<Waiter> {
        let (out, stay) = std::mem::take(&mut self.parked).into_iter().partition(|parked| which(parked));
        self.parked = stay;
        self.demanded &= self.parked.iter().any(|parked| parked.fill);
        Vec::into_iter(out).map(|parked: Parked| parked.waiter).collect()
    }
}

type Shard = HashMap<ChunkId, Entry>;

/// Wake-ups that are due when the lock has been let go. Dropping an [`Exclusive`] takes the lock again, so none may
/// be dropped under it.
#[derive(Debug, Default)]
struct Due {
    wakes: Vec<Waiter>,
    grant: Option<(Claimant, Exclusive)>,
}

impl Due {
    fn fire(self) {
        self.wakes.into_iter().for_each(Waiter::wake);
        if let Some((claimant, exclusive)) = self.grant {
            claimant.grant(exclusive);
        }
    }
}

/// The chunk table of a volume; see the module's header.
pub(super) struct Table {
    /// Of the volume as it was opened.
    opened: Geometry,
    /// Size of the volume in bytes now.
    size: AtomicU64,
    /// Chunks from this one on have nothing of a base image under them.
    based: u32,
    /// So many bytes of the base image can be read in place.
    in_place: u64,
    words: Words,
    masks: Words,
    tally: Tally,
    shards: Box<[Mutex<Shard>]>,
    notes: Arc<dyn Notes>,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table({} chunks)", self.geometry().chunk_count())
    }
}

impl Table {
    /// All chunks `Base`. The first `based` chunks have some of a base image under them.
    pub(super) fn new(geometry: Geometry, based: u32, notes: Arc<dyn Notes>) -> Self {
        Self {
            opened: geometry,
            size: AtomicU64::new(geometry.size()),
            based,
            in_place: 0,
            words: Words::new(geometry.chunk_count() as usize),
            masks: Words::new(geometry.chunk_count() as usize),
            tally: Tally::default(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            notes,
        }
    }

    /// The first `len` bytes of the base image can be read where they are: reads of what has not been written need
    /// no copy in the layer.
    pub(super) fn with_base_in_place(self, len: u64) -> Self {
        Self { in_place: len, ..self }
    }

    /// Size and chunk size, as they are now.
    pub(super) fn geometry(&self) -> Geometry {
        self.opened.with_size(self.size.load(SeqCst))
    }

    /// Makes room for the chunks of a larger volume. Before anything may note one of them.
    pub(super) fn reserve(&self, larger: &Geometry) {
        let chunks = larger.chunk_count() as usize;
        self.words.reserve(chunks);
        self.masks.reserve(chunks);
    }

    /// The volume has this size now; its words and masks are there. It never becomes smaller.
    pub(super) fn grow(&self, larger: &Geometry) {
        self.size.fetch_max(larger.size(), SeqCst);
    }

    /// Sets chunks as recovery found them; for the time before anybody else has the table.
    pub(super) fn restore_run(&self, run: &Run) {
        let idle = word::idle(run.state, run.version);
        if !run.mask.is_empty() {
            run.transitions().for_each(|transition| self.restore(&transition));
        } else if idle != 0 {
            // What is untouched stays without memory; an adopted disk is one run of millions.
            for word in (run.first.index()..run.end() as usize).filter_map(|index| self.words.get(index)) {
                word.store(idle, Relaxed);
            }
            self.tally.add(run.state, u64::from(run.count));
        }
    }

    /// One chunk of that.
    pub(super) fn restore(&self, transition: &Transition) {
        let Some(word) = self.words.get(transition.chunk.index()) else { return };
        let found = word::idle(transition.state, transition.version);
        if transition.mask.is_empty() && found == word.load(SeqCst) {
            // Untouched: a store would give its page memory.
            return;
        }
        let _shard = self.shard(transition.chunk);
        let before = word.swap(found | if transition.mask.is_empty() { 0 } else { SLOW }, SeqCst);
        self.tally.moved(state_of(before), transition.state);
        self.set_mask(transition.chunk, before, transition.mask);
    }

    /// Whether some of the base image lies under the chunk.
    pub(super) fn has_base(&self, chunk: ChunkId) -> bool {
        chunk.0 < self.based
    }

    /// Chunks that the table says have nothing of a base image under them begin here.
    pub(super) fn based(&self) -> u32 {
        self.based
    }

    /// Chunks in this state now. Only those that are not `Base` are counted: see [`Tally`].
    pub(super) fn count(&self, state: ChunkState) -> u64 {
        self.tally.get(state)
    }

    /// Changes a word whose state may change with it; returns what it was. The caller holds the shard's lock.
    fn set(&self, chunk: ChunkId, change: impl Fn(u64) -> u64) -> u64 {
        let before = update(self.word(chunk), &change);
        self.tally.moved(state_of(before), state_of(change(before)));
        before
    }

    fn shard(&self, chunk: ChunkId) -> MutexGuard<'_, Shard> {
        self.shards[(chunk.0 % SHARDS) as usize].lock()
    }

    fn word(&self, chunk: ChunkId) -> &AtomicU64 {
        // Requests, messages and records are checked against the geometry where they come in.
        #[allow(clippy::expect_used, reason = "the check of an index, as of any slice")]
        self.words.get(chunk.index()).expect("a chunk of the volume")
    }

    /// The mask of a chunk whose word was just `seen` under the shard's lock. Where `slow` is clear it is empty, and not
    /// looked at: the page of a mask that was never set has no memory.
    fn mask(&self, chunk: ChunkId, seen: u64) -> BlockMask {
        match self.masks.get(chunk.index()).filter(|_| seen & SLOW != 0) {
            Some(mask) => BlockMask(mask.load(Relaxed)),
            None => BlockMask::EMPTY,
        }
    }

    /// Changes the mask of a chunk whose word was just `seen`, and sets `slow` if it must be set; [`tidy`](Self::tidy)
    /// clears it. The caller holds the shard's lock.
    fn set_mask(&self, chunk: ChunkId, seen: u64, mask: BlockMask) {
        if mask == self.mask(chunk, seen) {
            return;
        }
        // As the words: what is named here is a chunk of the volume.
        if let Some(place) = self.masks.get(chunk.index()) {
            place.store(mask.0, Relaxed);
        }
        if !mask.is_empty() {
            self.word(chunk).fetch_or(SLOW, SeqCst);
        }
    }

    fn entry<'a>(&self, shard: &'a mut Shard, chunk: ChunkId) -> &'a mut Entry {
        self.word(chunk).fetch_or(SLOW, SeqCst);
        shard.entry(chunk).or_default()
    }

    fn route(&self, view: ChunkView, access: Access, span: Span) -> Route {
        let geometry = self.geometry();
        if !self.has_base(span.chunk) {
            return chunk::route_without_base(&geometry, view, access, span);
        }
        match chunk::route(&geometry, view, access, span) {
            Route::Base if !self.is_in_place(span) => Route::Fill,
            route => route,
        }
    }

    fn is_in_place(&self, span: Span) -> bool {
        let end = self.opened.chunk_start(span.chunk) + u64::from(span.start) + u64::from(span.len);
        end <= self.in_place
    }

    /// Routes an access and, where it can go on, enters it.
    ///
    /// # Errors
    /// [`TableError`]; nothing has changed.
    pub(super) fn begin(
        self: &Arc<Self>,
        access: Access,
        span: Span,
        seat: Seat<'_>,
    ) -> Result<Begun, TableError> {
        let word = self.word(span.chunk);
        let mut seen = word.load(SeqCst);
        while seen & SLOW == 0 {
            let view = ChunkView { state: state_of(seen), mask: BlockMask::EMPTY };
            match self.route(view, access, span) {
                Route::Layer => return Ok(Begun::Layer),
                Route::Base => return Ok(Begun::Base),
                Route::Zeros => return Ok(Begun::Zeros),
                Route::Done => return Ok(Begun::Done),
                Route::Modify { before: None, claim } => {
                    match word.compare_exchange_weak(seen, bumped(seen + WRITER), SeqCst, SeqCst) {
                        Ok(_) => return Ok(Begun::Write { claim }),
                        Err(now) => seen = now,
                    }
                }
                Route::Modify { before: Some(_), .. } | Route::Punch | Route::Fill | Route::Wait => break,
            }
        }
        self.begin_slow(access, span, seat)
    }

    fn begin_slow(self: &Arc<Self>, access: Access, span: Span, seat: Seat<'_>) -> Result<Begun, TableError> {
        let chunk = span.chunk;
        let mut shard = self.shard(chunk);
        let seen = self.word(chunk).load(SeqCst);
        let (view, contended) = self.view(chunk, seen, &shard);
        let waiter = || Waiter::Piece(Arc::clone(seat.waker), seat.piece);
        let fill = match self.route(view, access, span) {
            Route::Layer => return Ok(Begun::Layer),
            Route::Base => return Ok(Begun::Base),
            Route::Zeros => return Ok(Begun::Zeros),
            Route::Done => return Ok(Begun::Done),
            Route::Punch => {
                // With `slow` set every new writer comes to this lock: if all of the chunk is still to be dropped now, and
                // not only of the chunk as it was before the volume grew, then nobody has written the rest.
                self.entry(&mut shard, chunk);
                if self.route(view, access, span) != Route::Punch {
                    self.tidy(&mut shard, chunk);
                    drop(shard);
                    return self.begin_slow(access, span, seat);
                }
                let claimant = Claimant::Piece(Arc::clone(seat.waker), seat.piece);
                let granted = self.claim_alone(&mut shard, chunk, claimant, true)?;
                return Ok(granted.map_or(Begun::Parked { demand: None }, Begun::Punch));
            }
            // Somebody waits for the writes in flight to end: no new ones.
            Route::Modify { .. } if contended => false,
            Route::Modify { before, claim } => {
                self.enter_write(chunk, seen, before)?;
                return Ok(Begun::Write { claim });
            }
            Route::Fill => true,
            Route::Wait => false,
        };
        let entry = self.entry(&mut shard, chunk);
        entry.parked.push(Parked { fill, waiter: waiter() });
        let first = fill && !entry.demanded;
        entry.demanded |= fill;
        let origin = if view.state == ChunkState::Remote { Origin::Source } else { Origin::Base };
        Ok(Begun::Parked { demand: first.then_some(origin) })
    }

    /// What routing sees of a chunk under its lock, and whether somebody waits to hold it.
    fn view(&self, chunk: ChunkId, seen: u64, shard: &Shard) -> (ChunkView, bool) {
        let entry = shard.get(&chunk);
        let dropped = entry.and_then(|entry| entry.hold).is_some_and(|hold| hold.punch);
        let mask = if dropped { BlockMask::EMPTY } else { self.mask(chunk, seen) };
        let contended = entry.is_some_and(|entry| !entry.claimants.is_empty());
        (ChunkView { state: state_of(seen), mask }, contended)
    }

    /// Counts a write in, after entering the state that must be true before it. The caller holds the lock.
    fn enter_write(&self, chunk: ChunkId, seen: u64, before: Option<ChunkState>) -> Result<(), TableError> {
        if let Some(state) = before {
            check_move(state_of(seen), state)?;
            let version = version_of(bumped(seen));
            self.notes.note(&[Transition { chunk, state, mask: BlockMask::EMPTY, version }])?;
        }
        self.set(chunk, |word| {
            let word = before.map_or(word, |state| with_state(word, state));
            bumped(word + WRITER)
        });
        Ok(())
    }

    /// A write has ended, well or not.
    pub(super) fn end_write(self: &Arc<Self>, chunk: ChunkId) {
        let before = update(self.word(chunk), |word| bumped(word.wrapping_sub(WRITER)));
        if before & SLOW != 0 && writers_of(before) == 1 {
            let mut due = Due::default();
            self.settle(&mut self.shard(chunk), chunk, &mut due);
            due.fire();
        }
    }

    /// Forgets the entry when nothing is left in it, and clears `slow` when the mask is empty too. The caller holds the
    /// lock.
    fn tidy(&self, shard: &mut Shard, chunk: ChunkId) {
        if shard.get(&chunk).is_some_and(|entry| !entry.is_idle()) {
            return;
        }
        shard.remove(&chunk);
        let word = self.word(chunk);
        let seen = word.load(SeqCst);
        if seen & SLOW != 0 && self.mask(chunk, seen).is_empty() {
            word.fetch_and(!SLOW, SeqCst);
        }
    }

    /// Gives the chunk to who waits to hold it, if it is free; forgets what is not needed any more.
    fn settle(self: &Arc<Self>, shard: &mut Shard, chunk: ChunkId, due: &mut Due) {
        let Some(entry) = shard.get_mut(&chunk) else { return self.tidy(shard, chunk) };
        let free = entry.hold.is_none() && writers_of(self.word(chunk).load(SeqCst)) == 0;
        if free && let Some((claimant, punch)) = entry.claimants.pop_front() {
            due.grant = Some((claimant, self.hold(entry, chunk, punch)));
        } else {
            self.tidy(shard, chunk);
        }
    }

    /// When somebody holds the chunk: what to wait for before looking again.
    pub(super) fn when_free(&self, chunk: ChunkId) -> Option<oneshot::Receiver<()>> {
        let mut shard = self.shard(chunk);
        let entry = shard.get_mut(&chunk).filter(|entry| entry.hold.is_some())?;
        let (sender, receiver) = oneshot::channel();
        entry.parked.push(Parked { fill: false, waiter: Waiter::Task(sender) });
        Some(receiver)
    }

    /// Takes a piece out of whatever list of the chunk it waits in; it may also be named in an inbox by now.
    pub(super) fn unpark(self: &Arc<Self>, chunk: ChunkId, seat: Seat<'_>) {
        let mut due = Due::default();
        let mut shard = self.shard(chunk);
        if let Some(entry) = shard.get_mut(&chunk) {
            entry.take_parked(|parked| parked.waiter.is(seat.waker, seat.piece));
            entry.claimants.retain(|(claimant, _)| {
                !matches!(claimant, Claimant::Piece(w, p) if Arc::ptr_eq(w, seat.waker) && *p == seat.piece)
            });
            // Those that parked because of that claimant may go on.
            if entry.claimants.is_empty() && entry.hold.is_none() {
                due.wakes = entry.take_parked(|parked| !parked.fill);
            }
            self.settle(&mut shard, chunk, &mut due);
        }
        drop(shard);
        due.fire();
    }

    /// Fails the pieces that wait for content of the chunk; returns how many.
    pub(super) fn fail_waiters(self: &Arc<Self>, chunk: ChunkId) -> usize {
        let mut due = Due::default();
        let mut shard = self.shard(chunk);
        let failed =
            shard.get_mut(&chunk).map_or(Vec::new(), |entry| entry.take_parked(|parked| parked.fill));
        self.settle(&mut shard, chunk, &mut due);
        drop(shard);
        due.fire();
        let count = failed.len();
        for waiter in failed {
            if let Waiter::Piece(waker, piece) = waiter {
                waker.post(Wake::Fail(piece));
            }
        }
        count
    }

    /// Pieces that wait for content of a chunk. Entries are few: only who holds or waits has one.
    pub(super) fn waiting(&self) -> usize {
        let of = |entry: &Entry| entry.parked.iter().filter(|parked| parked.fill).count();
        self.shards.iter().map(|shard| shard.lock().values().map(of).sum::<usize>()).sum()
    }

    /// One consistent look at a chunk.
    pub(super) fn look(&self, chunk: ChunkId) -> Look {
        let word = self.word(chunk).load(SeqCst);
        if word & SLOW == 0 {
            return self.seen(chunk, word, None);
        }
        let shard = self.shard(chunk);
        self.seen(chunk, self.word(chunk).load(SeqCst), shard.get(&chunk))
    }

    fn seen(&self, chunk: ChunkId, word: u64, entry: Option<&Entry>) -> Look {
        let state = state_of(word);
        Look {
            state,
            lasting: entry.and_then(|entry| entry.hold).map_or(state, |hold| hold.was),
            mask: self.mask(chunk, word),
            version: version_of(word),
            writers: writers_of(word),
        }
    }

    /// The chunk as a record for a checkpoint. Always under the lock: a transition that was noted in the journal that
    /// the checkpoint replaces, but is not published yet, would be lost.
    pub(super) fn record(&self, chunk: ChunkId) -> Transition {
        let shard = self.shard(chunk);
        let look = self.seen(chunk, self.word(chunk).load(SeqCst), shard.get(&chunk));
        Transition { chunk, state: look.lasting, mask: look.mask, version: look.version }
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
