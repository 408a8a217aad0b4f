// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What travels from the source: BACKGROUND_PUSH (paper, Algorithm 1), the answers to pulls, the announcements.
//!
//! ```text
//!   Absent --written--> Pending --captured--> Flying --acknowledged, not written since--> Clean
//!                          ^                     | written, torn, lost, refused               | written
//!                          +---------------------+--------------------------------------------+
//! ```
//!
//! A chunk becomes `Clean` by one way only: a capture that no write overlapped, acknowledged by its version, with no
//! write told since the capture was asked for. The published pseudo-code takes a chunk out of RemainingSet after the
//! push, and so forgets a write that came during it. `Pending` and `Flying` together are RemainingSet.

use super::{ArmParams, Capture, Link, SourceAction, SourceSession};
use crate::core::aside::{Aside, Due};
use crate::core::geometry::{ChunkId, Geometry};
use crate::core::heat::{BucketQueue, Heat};
use crate::core::message::{
    Announcement, Body, ChunkData, Epoch, MAX_ENTRIES, Message, MigrationId, Purpose, Refusal,
    RemainingDigest, Standing, Version,
};
use crate::core::ownership::SourceStep;
use crate::core::progress::Progress;
use crate::core::set::ChunkSet;
use crate::core::standing::{Standings, Told, push_announcement};
use std::collections::BTreeMap;
use std::time::Duration;

/// Announced at once when this many chunks stand otherwise than told.
const MANY_NEWS: u32 = 1024;
/// A pull that is asked for again this long after its chunk was sent is served again.
const RESEND_AFTER: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
enum View {
    Absent,
    Pending,
    Flying,
    Clean,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Flight {
    purpose: Purpose,
    /// A write was told since the capture was asked for.
    dirtied: bool,
    /// Version and time of sending, once sent.
    sent: Option<(Version, Due)>,
}

/// See the module's header.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Push {
    geometry: Option<Geometry>,
    view: Vec<View>,
    heat: Heat,
    pending: BucketQueue,
    failed: ChunkSet,
    flights: BTreeMap<ChunkId, Flight>,
    settled: Vec<u64>,
    told: Standings,
    untold: ChunkSet,
    confirmed: ChunkSet,
    hot_base: Vec<ChunkId>,
    /// The migration in which the disk came, and its chunks that have not been written since; `settled` has their versions.
    came_in: Option<MigrationId>,
    unchanged: ChunkSet,
    /// Only for the counters.
    pushed_before: Aside<ChunkSet>,
    cursor: ChunkId,
    limit: u32,
    window: usize,
    retry_at: Option<Due>,
    progress: Aside<Progress>,
}

impl Push {
    pub(super) fn new(
        geometry: Option<Geometry>,
        params: &mut ArmParams,
        modified: impl IntoIterator<Item = ChunkId>,
        hot_base: Vec<ChunkId>,
    ) -> Self {
        let chunks = geometry.map_or(0, |g| g.chunk_count());
        let mut push = Self {
            geometry,
            view: vec![View::Absent; chunks as usize],
            heat: Heat::new(chunks, params.counting),
            pending: BucketQueue::new(),
            failed: ChunkSet::default(),
            flights: BTreeMap::new(),
            settled: vec![0; chunks as usize],
            told: Standings::new(chunks),
            untold: ChunkSet::with_capacity(chunks),
            confirmed: ChunkSet::default(),
            hot_base,
            came_in: params.unchanged.as_ref().map(|unchanged| unchanged.migration),
            unchanged: ChunkSet::default(),
            pushed_before: Aside::default(),
            cursor: ChunkId(0),
            limit: params.strategy.push_below(params.threshold),
            window: params.push_window as usize,
            retry_at: None,
            progress: Aside::default(),
        };
        for chunk in modified {
            if push.view_of(chunk) == Some(View::Absent) {
                push.make_pending(chunk);
            }
        }
        for (chunk, version) in params.unchanged.take().into_iter().flat_map(|unchanged| unchanged.chunks) {
            if push.view_of(chunk) == Some(View::Pending) {
                push.unchanged.insert(chunk);
                push.settled[chunk.index()] = version.0;
            }
        }
        push
    }

    fn view_of(&self, chunk: ChunkId) -> Option<View> {
        self.view.get(chunk.index()).copied()
    }

    fn chunk_bytes(&self, chunk: ChunkId) -> u64 {
        self.geometry.map_or(0, |g| u64::from(g.chunk_len(chunk)))
    }

    fn set_view(&mut self, chunk: ChunkId, to: View) {
        let bytes = self.chunk_bytes(chunk);
        let Some(slot) = self.view.get_mut(chunk.index()) else { return };
        let counts = |view| matches!(view, View::Pending | View::Flying);
        match (counts(*slot), counts(to)) {
            (false, true) => {
                self.progress.remaining_chunks += 1;
                self.progress.remaining_bytes += bytes;
            }
            (true, false) => {
                self.progress.remaining_chunks -= 1;
                self.progress.remaining_bytes -= bytes;
            }
            (true, true) | (false, false) => {}
        }
        *slot = to;
    }

    fn make_pending(&mut self, chunk: ChunkId) {
        self.set_view(chunk, View::Pending);
        self.pending.insert(chunk, self.heat.count(chunk));
        self.untold.insert(chunk);
    }

    /// A guest write was told.
    fn wrote(&mut self, chunk: ChunkId, passes: u32, plain: u32) {
        self.heat.add(chunk, passes, plain);
        self.unchanged.remove(chunk);
        match self.view_of(chunk) {
            Some(View::Absent | View::Clean | View::Pending) => self.make_pending(chunk),
            Some(View::Flying) => {
                self.untold.insert(chunk);
                if let Some(flight) = self.flights.get_mut(&chunk) {
                    flight.dirtied = true;
                }
            }
            None => {}
        }
    }

    /// The destination has this version.
    pub(super) fn acknowledged(&mut self, chunk: ChunkId, version: Version) {
        let current = self.flights.get(&chunk).is_some_and(|f| f.sent.is_some_and(|sent| sent.0 == version));
        if !current {
            return;
        }
        match self.flights.remove(&chunk) {
            Some(flight) if !flight.dirtied => self.settle(chunk, version),
            Some(_) | None => self.make_pending(chunk),
        }
    }

    fn settle(&mut self, chunk: ChunkId, version: Version) {
        self.set_view(chunk, View::Clean);
        if let Some(slot) = self.settled.get_mut(chunk.index()) {
            *slot = version.0;
        }
        self.untold.insert(chunk);
    }

    // ---- reconnection -----------------------------------------------------------------------------------------

    /// Chunks under way are in doubt until the destination lists what it has.
    pub(super) fn disconnected(&mut self) {
        self.confirmed.clear();
    }

    pub(super) fn begin_listing(&mut self) {
        self.confirmed.clear();
    }

    /// The destination has all of the disk as it was at the end of `migration`. What is still the same counts as settled
    /// there; a list of what the destination really keeps follows in the handshake, as after any loss of the connection.
    pub(super) fn keep(&mut self, migration: MigrationId) -> Vec<(ChunkId, Version)> {
        let mut kept = Vec::new();
        if self.came_in != Some(migration) {
            return kept;
        }
        for chunk in self.geometry.iter().flat_map(Geometry::chunks).filter(|c| self.unchanged.contains(*c)) {
            // One that is on its way travels.
            if matches!(self.view.get(chunk.index()), Some(View::Pending | View::Clean)) {
                kept.push((chunk, Version(self.settled[chunk.index()])));
            }
        }
        for (chunk, version) in &kept {
            self.pending.remove(*chunk);
            self.failed.remove(*chunk);
            self.settle(*chunk, *version);
        }
        self.progress.kept_chunks = kept.len() as u64;
        self.progress.kept_bytes = kept.iter().map(|(chunk, _)| self.chunk_bytes(*chunk)).sum();
        kept
    }

    /// The destination has these versions: those that are current need not travel again.
    pub(super) fn confirm(&mut self, entries: &[(ChunkId, Version)]) {
        for (chunk, version) in entries {
            match self.view_of(*chunk) {
                Some(View::Clean) if self.settled.get(chunk.index()) == Some(&version.0) => {
                    self.confirmed.insert(*chunk);
                }
                Some(View::Flying) => {
                    self.acknowledged(*chunk, *version);
                    if self.view_of(*chunk) == Some(View::Clean) {
                        self.confirmed.insert(*chunk);
                    }
                }
                Some(View::Absent | View::Pending | View::Clean) | None => {}
            }
        }
    }

    /// What was not listed is not there.
    pub(super) fn end_listing(&mut self) {
        let chunks = self.geometry.iter().flat_map(Geometry::chunks);
        let missing: Vec<ChunkId> = chunks
            .filter(|chunk| self.view_of(*chunk) == Some(View::Clean) && !self.confirmed.contains(*chunk))
            .collect();
        missing.into_iter().for_each(|chunk| self.make_pending(chunk));
        self.ground_sent();
    }

    /// Chunks that were sent count as not sent.
    fn ground_sent(&mut self) {
        let sent = self.flights.iter().filter(|(_, flight)| flight.sent.is_some());
        let sent: Vec<ChunkId> = sent.map(|(chunk, _)| *chunk).collect();
        for chunk in sent {
            self.flights.remove(&chunk);
            self.make_pending(chunk);
        }
    }

    /// The remaining set is final: what was sent and is not acknowledged belongs to it. An acknowledgement that comes
    /// later is of a version that the destination makes void when it takes the offer.
    pub(super) fn stopped(&mut self) {
        self.ground_sent();
    }

    /// The disk is the source's again: pulls are void, and captures that run for them may be torn from now on.
    pub(super) fn reclaimed(&mut self) {
        self.ground_sent();
        for flight in self.flights.values_mut() {
            flight.purpose = Purpose::Push;
            flight.dirtied = true;
        }
    }

    // ---- announcements ----------------------------------------------------------------------------------------

    pub(super) fn told_digest(&self) -> RemainingDigest {
        self.told.digest()
    }

    pub(super) fn told_remaining(&self) -> u32 {
        self.told.remaining()
    }

    pub(super) fn has_news(&self) -> bool {
        !self.untold.is_empty()
    }

    /// The destination has lost what it was told: everything is told again.
    pub(super) fn forget_told(&mut self) {
        self.told.clear();
        for chunk in self.geometry.iter().flat_map(Geometry::chunks) {
            if self.view_of(chunk) != Some(View::Absent) {
                self.untold.insert(chunk);
            }
        }
    }

    /// Everything that stands otherwise than told, as lists of bounded length.
    fn news(&mut self) -> Vec<Vec<Announcement>> {
        let mut lists = Vec::new();
        let mut list = Vec::new();
        let mut from = ChunkId(0);
        while let Some(chunk) = self.untold.take_next(from) {
            from = chunk;
            let version = Version(self.settled.get(chunk.index()).copied().unwrap_or(0));
            let (told, standing) = match self.view_of(chunk) {
                Some(View::Clean) => (Told::Settled, Standing::Settled { version }),
                Some(View::Pending | View::Flying) => {
                    let count = self.heat.count(chunk);
                    (Told::Remaining(count), Standing::Remaining { count })
                }
                Some(View::Absent) | None => continue,
            };
            if self.told.get(chunk) == told && told != Told::Settled {
                continue;
            }
            self.told.set(chunk, told);
            if list.len() == MAX_ENTRIES {
                lists.push(std::mem::take(&mut list));
            }
            push_announcement(&mut list, chunk, standing);
        }
        if !list.is_empty() {
            lists.push(list);
        }
        lists
    }

    // ---- time and counters ------------------------------------------------------------------------------------

    pub(super) fn halve(&mut self) {
        let Self { heat, untold, view, .. } = self;
        let mut queued = Vec::new();
        heat.halve(|chunk| match view.get(chunk.index()) {
            Some(View::Pending) => queued.push(chunk),
            Some(View::Flying) => {
                untold.insert(chunk);
            }
            Some(View::Absent | View::Clean) | None => {}
        });
        queued.into_iter().for_each(|chunk| self.make_pending(chunk));
    }

    pub(super) fn retry_at(&self) -> Option<Due> {
        self.retry_at
    }

    pub(super) fn retry(&mut self, now: Duration) {
        if self.retry_at.is_some_and(|at| *at <= now) {
            self.retry_at = None;
            while let Some(chunk) = self.failed.take_next(ChunkId(0)) {
                if self.view_of(chunk) == Some(View::Pending) {
                    self.make_pending(chunk);
                }
            }
        }
    }

    pub(super) fn remaining(&self) -> u64 {
        self.progress.remaining_chunks
    }

    pub(super) fn progress(&self) -> Progress {
        *self.progress
    }

    fn count_sent(&mut self, chunk: ChunkId, purpose: Purpose, body: &Body) {
        let bytes = body.len() as u64;
        self.progress.zero_chunks += u64::from(matches!(body, Body::Zero));
        match purpose {
            Purpose::Push => {
                self.progress.chunks_pushed += 1;
                self.progress.push_bytes += bytes;
                self.progress.chunks_repushed += u64::from(!self.pushed_before.insert(chunk));
            }
            Purpose::Prefetch => {
                self.progress.chunks_pulled += 1;
                self.progress.prefetch_bytes += bytes;
            }
            Purpose::Demand => {
                self.progress.chunks_pulled += 1;
                self.progress.demand_bytes += bytes;
            }
        }
    }
}

impl SourceSession {
    /// Whether the session pushes now.
    pub(super) fn pushes(&self) -> bool {
        self.link == Link::Agreed && matches!(self.step, SourceStep::Pushing | SourceStep::Draining)
    }

    fn answers_pulls(&self) -> bool {
        self.link == Link::Agreed
            && matches!(self.step, SourceStep::Offered | SourceStep::Granting | SourceStep::Relinquished)
    }

    /// A guest write of a chunk was tracked: `passes` and `plain` are its write counts since the last call.
    pub fn handle_wrote(&mut self, _now: Duration, chunk: ChunkId, passes: u32, plain: u32) {
        self.push.wrote(chunk, passes, plain);
    }

    /// Starts what may be started: hot base chunks are named, pushes fill the window.
    pub(super) fn pump(&mut self) {
        if !self.pushes() || !self.started {
            return;
        }
        let hot = std::mem::take(&mut self.push.hot_base);
        for chunks in hot.chunks(MAX_ENTRIES) {
            self.send(Message::HotBase { chunks: chunks.to_vec() });
        }
        if self.push.untold.len() >= MANY_NEWS {
            self.announce_all();
        }
        while self.push.flights.len() < self.push.window {
            let Some(chunk) = self.push.pending.take_coldest(self.push.limit, self.push.cursor) else {
                break;
            };
            self.push.cursor = chunk;
            self.push.set_view(chunk, View::Flying);
            self.begin_capture(chunk, Purpose::Push);
        }
        if self.step == SourceStep::Draining && self.push.remaining() == 0 {
            self.begin_offer();
        }
    }

    fn begin_capture(&mut self, chunk: ChunkId, purpose: Purpose) {
        self.push.flights.insert(chunk, Flight { purpose, dirtied: false, sent: None });
        self.actions.push_back(SourceAction::Capture { chunk, purpose });
    }

    /// A chunk was read, or could not be. Every write that the driver knows of must have been told before.
    pub fn handle_captured(&mut self, now: Duration, chunk: ChunkId, capture: Capture) {
        let Some(flight) = self.push.flights.get(&chunk) else { return };
        if flight.sent.is_some() {
            return;
        }
        let (purpose, dirtied) = (flight.purpose, flight.dirtied);
        let pushing = purpose == Purpose::Push;
        let wanted = if pushing { self.pushes() } else { self.answers_pulls() };
        match capture {
            Capture::Done { version, clean, body } if wanted && clean && !dirtied => {
                self.send_chunk(now, chunk, version, purpose, body);
            }
            // The capture began before the rings stopped, for a push: what is pulled must not be torn.
            Capture::Done { .. } if wanted && !pushing => self.begin_capture(chunk, purpose),
            Capture::Done { .. } => {
                self.push.flights.remove(&chunk);
                self.push.make_pending(chunk);
            }
            Capture::Failed => {
                self.push.flights.remove(&chunk);
                self.push.make_pending(chunk);
                if pushing {
                    // Not at once again: the pending queue gets it back after a while.
                    self.push.pending.remove(chunk);
                    self.push.failed.insert(chunk);
                    self.push.retry_at = Some(Aside(now + super::RETRY));
                } else {
                    self.send(Message::PullFailed { chunk, reason: Refusal::Io });
                }
            }
        }
    }

    fn send_chunk(&mut self, now: Duration, chunk: ChunkId, version: Version, purpose: Purpose, body: Body) {
        if let Some(flight) = self.push.flights.get_mut(&chunk) {
            flight.sent = Some((version, Aside(now)));
        }
        self.push.count_sent(chunk, purpose, &body);
        let (migration, epoch) = (self.params.hello.migration, self.epoch);
        self.actions.push_back(SourceAction::SendData(ChunkData {
            migration,
            epoch,
            chunk,
            version,
            purpose,
            body,
        }));
    }

    /// `pull(c)` (paper, Algorithms 3 and 4).
    pub(super) fn on_pull(&mut self, now: Duration, epoch: Epoch, chunk: ChunkId, demand: bool) {
        if !self.answers_pulls() || epoch != self.epoch {
            return;
        }
        let purpose = if demand { Purpose::Demand } else { Purpose::Prefetch };
        match self.push.view_of(chunk) {
            Some(View::Pending | View::Flying | View::Clean) if self.data_lost => {
                self.send(Message::PullFailed { chunk, reason: Refusal::Lost });
            }
            Some(View::Absent) | None => {
                self.send(Message::PullFailed { chunk, reason: Refusal::Protocol });
            }
            Some(View::Pending | View::Clean) => {
                self.push.pending.remove(chunk);
                self.push.failed.remove(chunk);
                self.push.set_view(chunk, View::Flying);
                self.begin_capture(chunk, purpose);
            }
            Some(View::Flying) => self.pull_again(now, chunk, purpose),
        }
    }

    /// A pull of a chunk that is under way: a push of before the offer is void, a pull is only made urgent.
    fn pull_again(&mut self, now: Duration, chunk: ChunkId, purpose: Purpose) {
        let Some(flight) = self.push.flights.get_mut(&chunk) else { return };
        match flight.sent {
            None => flight.purpose = purpose,
            Some((_, at)) if flight.purpose == Purpose::Push || now >= *at + RESEND_AFTER => {
                self.begin_capture(chunk, purpose);
            }
            Some(_) => {}
        }
    }

    /// Tells the destination everything that it does not know yet. Without a connection it is only noted as told: a
    /// destination that comes back with another digest is told everything.
    pub(super) fn announce_all(&mut self) {
        for entries in self.push.news() {
            self.send(Message::Announce { entries });
        }
    }
}
