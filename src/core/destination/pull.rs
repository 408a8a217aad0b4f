// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What travels to the destination: chunks that are pushed, BACKGROUND_PULL and demand pulls (paper, Algorithms 3
//! and 4), and the table of what the source has told.
//!
//! Until the offer, chunks are installed as they come and acknowledged by version; an older version never replaces a
//! newer one. At the offer the remaining set is what was told to remain. Then each chunk of it is in one of these:
//!
//! ```text
//!   queued (hottest first) --pull asked--> asked --arrived--> installing --> gone from the set
//!     ^  ^                                  |  |                   |
//!     |  +------- connection lost ----------+  |                   | failed: queued again, later
//!     +----------------------------------------+-------------------+
//!   anywhere: the guest has rewritten the whole chunk --> gone from the set
//! ```
//!
//! A chunk stays in the set until it is installed: taking it out before the pull, as the published pseudo-code does,
//! loses it when the pull fails. There is no suspended and resumed prefetcher either: demands go first by order.

use super::{DestinationAction, DestinationSession, Installed};
use crate::core::aside::{Aside, Due};
use crate::core::geometry::{ChunkId, Geometry};
use crate::core::heat::BucketQueue;
use crate::core::message::{
    Announcement, Body, ChunkData, MAX_ENTRIES, Message, Purpose, Refusal, RemainingDigest, Version,
};
use crate::core::ownership::DestinationStep;
use crate::core::progress::Progress;
use crate::core::set::ChunkSet;
use crate::core::standing::{Standings, Told, told_of};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Most background pulls under way: 2 MiB at the default chunk size, so that a demand never waits long behind them.
const PREFETCH_WINDOW: usize = 8;
/// Most chunks of the base image that are fetched ahead at a time.
const BASE_WINDOW: u32 = 2;
/// Acknowledgements are sent when this many have gathered, or when nothing else is to be done.
const MAX_ACKS: usize = 256;
/// How long after a failure a chunk is asked for again.
const RETRY: Duration = Duration::from_secs(1);

/// See the module's header.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Pull {
    geometry: Geometry,
    told: Standings,
    /// Version installed here plus one; 0 for none.
    versions: Vec<u64>,
    /// Installs under way, by chunk.
    installs: BTreeMap<ChunkId, u32>,
    acks: Vec<(ChunkId, Version)>,
    /// The remaining set after the offer: what is queued, and what was asked for (and whether by demand).
    begun: bool,
    queue: BucketQueue,
    asked: BTreeMap<ChunkId, bool>,
    demands: VecDeque<ChunkId>,
    remaining: ChunkSet,
    failed: ChunkSet,
    retry_at: Option<Due>,
    hot_base: VecDeque<ChunkId>,
    fetching: u32,
    progress: Aside<Progress>,
}

impl Pull {
    pub(super) fn new(geometry: Geometry) -> Self {
        let chunks = geometry.chunk_count();
        Self {
            geometry,
            told: Standings::new(chunks),
            versions: vec![0; chunks as usize],
            installs: BTreeMap::new(),
            acks: Vec::new(),
            begun: false,
            queue: BucketQueue::new(),
            asked: BTreeMap::new(),
            demands: VecDeque::new(),
            remaining: ChunkSet::default(),
            failed: ChunkSet::default(),
            retry_at: None,
            hot_base: VecDeque::new(),
            fetching: 0,
            progress: Aside::default(),
        }
    }

    /// After a restart: what is here.
    pub(super) fn restore(&mut self, have: impl IntoIterator<Item = (ChunkId, Version)>) {
        for (chunk, version) in have {
            self.set_version(chunk, Some(version));
        }
    }

    /// After a restart with an offer at hand: what is at the source.
    pub(super) fn restore_remaining(&mut self, remaining: impl IntoIterator<Item = (ChunkId, u8)>) {
        for (chunk, count) in remaining {
            if self.geometry.has(chunk) && self.remaining.insert(chunk) {
                self.queue.insert(chunk, count);
            }
        }
        self.begun = true;
        self.count_remaining();
    }

    /// Everything that came is dropped; installs under way are still awaited.
    pub(super) fn reset(&mut self) {
        let installs = std::mem::take(&mut self.installs);
        *self = Self { installs, ..Self::new(self.geometry) };
    }

    fn set_version(&mut self, chunk: ChunkId, version: Option<Version>) {
        if let Some(slot) = self.versions.get_mut(chunk.index()) {
            *slot = version.map_or(0, |version| version.0 + 1);
        }
    }

    fn version(&self, chunk: ChunkId) -> Option<Version> {
        self.versions.get(chunk.index()).and_then(|version| version.checked_sub(1)).map(Version)
    }

    // ---- what was told ----------------------------------------------------------------------------------------

    pub(super) fn told_digest(&self) -> RemainingDigest {
        self.told.digest()
    }

    /// What another run of the source told is not compared with what this one tells.
    pub(super) fn forget_told(&mut self) {
        self.told.clear();
    }

    pub(super) fn told_remaining(&self) -> u32 {
        self.told.remaining()
    }

    /// Everything installed here, as lists of bounded length.
    pub(super) fn have_lists(&self) -> Vec<Vec<(ChunkId, Version)>> {
        let all: Vec<_> = self.geometry.chunks().filter_map(|c| Some((c, self.version(c)?))).collect();
        all.chunks(MAX_ENTRIES).map(<[_]>::to_vec).collect()
    }

    /// Chunks that remain although an older version is installed here, as runs: that version is void now.
    pub(super) fn void_stale(&mut self) -> Vec<(ChunkId, u32)> {
        let mut runs: Vec<(ChunkId, u32)> = Vec::new();
        for (chunk, told) in self.told.iter() {
            let Told::Remaining(_) = told else { continue };
            if let Some(slot) = self.versions.get_mut(chunk.index()) {
                *slot = 0;
            }
            match runs.last_mut() {
                Some((first, run)) if first.0 + *run == chunk.0 => *run += 1,
                _ => runs.push((chunk, 1)),
            }
        }
        runs
    }

    /// The source's modified set, for the record of the offer.
    pub(super) fn modified_set(&self) -> Vec<(ChunkId, u8, bool)> {
        let entry = |(chunk, told)| match told {
            Told::Remaining(count) => Some((chunk, count, true)),
            Told::Settled => Some((chunk, 0, false)),
            Told::Nothing => None,
        };
        self.told.iter().filter_map(entry).collect()
    }

    // ---- the remaining set ------------------------------------------------------------------------------------

    /// The offer is durable: what was told to remain is pulled from now on.
    pub(super) fn begin(&mut self) {
        self.begun = true;
        for (chunk, told) in self.told.iter() {
            if let Told::Remaining(count) = told
                && self.remaining.insert(chunk)
            {
                self.queue.insert(chunk, count);
            }
        }
        self.count_remaining();
    }

    /// The offer is void.
    pub(super) fn end(&mut self) {
        self.begun = false;
        self.queue.clear();
        self.asked.clear();
        self.demands.clear();
        self.failed.clear();
        self.remaining.clear();
        self.count_remaining();
    }

    fn count_remaining(&mut self) {
        let chunk_size = u64::from(self.geometry.chunk_size());
        let chunks = if self.begun { self.remaining.len() } else { self.told.remaining() };
        self.progress.remaining_chunks = u64::from(chunks);
        self.progress.remaining_bytes = (u64::from(chunks) * chunk_size).min(self.geometry.size());
    }

    /// The chunk is not the source's any more.
    fn settle(&mut self, chunk: ChunkId) {
        self.remaining.remove(chunk);
        self.queue.remove(chunk);
        self.asked.remove(&chunk);
        self.failed.remove(chunk);
        self.count_remaining();
    }

    pub(super) fn disconnected(&mut self) {
        self.acks.clear();
        for (chunk, demand) in std::mem::take(&mut self.asked) {
            if demand {
                self.demands.push_front(chunk);
            }
            self.queue_again(chunk);
        }
    }

    fn queue_again(&mut self, chunk: ChunkId) {
        if self.remaining.contains(chunk) {
            let count = match self.told.get(chunk) {
                Told::Remaining(count) => count,
                Told::Nothing | Told::Settled => 0,
            };
            self.queue.insert(chunk, count);
        }
    }

    /// The next chunk that the guest waits for and that is not being pulled; it is queued for later.
    pub(super) fn give_up_next(&mut self) -> Option<ChunkId> {
        loop {
            let chunk = self.demands.pop_front().or_else(|| self.failed.take_next(ChunkId(0)))?;
            if self.remaining.contains(chunk) {
                self.failed.remove(chunk);
                self.queue_again(chunk);
                return Some(chunk);
            }
        }
    }

    pub(super) fn installing(&self) -> bool {
        !self.installs.is_empty()
    }

    pub(super) fn finished(&self) -> bool {
        self.begun && self.remaining.is_empty() && self.installs.is_empty()
    }

    pub(super) fn add_hot_base(&mut self, chunks: Vec<ChunkId>) {
        self.hot_base.extend(chunks.into_iter().filter(|chunk| self.geometry.has(*chunk)));
    }

    pub(super) fn retry_at(&self) -> Option<Due> {
        self.retry_at
    }

    pub(super) fn progress(&self) -> Progress {
        *self.progress
    }

    fn count(&mut self, data: &ChunkData) {
        let bytes = data.body.len() as u64;
        self.progress.zero_chunks += u64::from(matches!(data.body, Body::Zero));
        match data.purpose {
            Purpose::Push => {
                self.progress.chunks_pushed += 1;
                self.progress.push_bytes += bytes;
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

impl DestinationSession {
    fn pulls(&self) -> bool {
        let step = matches!(
            self.step,
            DestinationStep::Prepared | DestinationStep::Activating | DestinationStep::Active
        );
        self.welcomed && step && self.pull.begun
    }

    /// How chunks stand at the source, ahead of the offer or, in a prepared session, since it.
    pub(super) fn on_announce(&mut self, entries: &[Announcement]) {
        if !matches!(
            self.step,
            DestinationStep::Receiving
                | DestinationStep::Preparing
                | DestinationStep::Prepared
                | DestinationStep::Voiding
        ) {
            return;
        }
        for entry in entries {
            let (told, version) = told_of(entry.standing);
            for number in entry.first.0..entry.first.0.saturating_add(entry.run) {
                let chunk = ChunkId(number);
                if !self.pull.geometry.has(chunk) {
                    break;
                }
                self.take_announcement(chunk, told, version);
            }
        }
        self.pull.count_remaining();
    }

    fn take_announcement(&mut self, chunk: ChunkId, told: Told, version: Option<Version>) {
        // Settled by a version that is not here: it remains, the digests will differ, and all is told again.
        if version.is_some() && self.pull.version(chunk) != version {
            return self.pull.told.set(chunk, Told::Remaining(crate::core::heat::MAX_COUNT));
        }
        if let Told::Remaining(_) = told
            && self.pull.told.get(chunk) == Told::Nothing
            && self.pull.version(chunk).is_none()
            && self.step == DestinationStep::Receiving
            && !self.pull.installs.contains_key(&chunk)
        {
            self.mark_remote(chunk);
        }
        self.pull.told.set(chunk, told);
    }

    /// Marks a chunk, joined to the run marked last.
    fn mark_remote(&mut self, chunk: ChunkId) {
        if let Some(DestinationAction::MarkRemote { first, run }) = self.actions.back_mut()
            && first.0 + *run == chunk.0
        {
            *run += 1;
        } else {
            self.actions.push_back(DestinationAction::MarkRemote { first: chunk, run: 1 });
        }
    }

    /// A chunk has arrived.
    pub(super) fn on_chunk(&mut self, data: ChunkData) {
        if data.migration != self.migration || !self.pull.geometry.has(data.chunk) || !self.welcomed {
            return;
        }
        if data.purpose == Purpose::Push {
            self.learn_epoch(data.epoch);
        }
        let wanted = match self.step {
            // With an offer at hand it is too late: the chunk was counted as remaining.
            DestinationStep::Receiving => self.offer.is_none() && data.epoch >= self.epoch,
            // The guest went on at the source before the end of the offer is durable here. Dropping its pushes would
            // leave them in the source's window for ever.
            DestinationStep::Preparing => {
                data.purpose == Purpose::Push && self.voided.is_some_and(|epoch| data.epoch >= epoch)
            }
            DestinationStep::Voiding => data.purpose == Purpose::Push && data.epoch >= self.epoch,
            DestinationStep::Prepared | DestinationStep::Activating | DestinationStep::Active => {
                data.epoch == self.epoch
                    && data.purpose != Purpose::Push
                    && self.pull.remaining.contains(data.chunk)
                    && !self.pull.installs.contains_key(&data.chunk)
            }
            DestinationStep::Idle
            | DestinationStep::Clearing
            | DestinationStep::Keeping
            | DestinationStep::Pruning
            | DestinationStep::Adopting
            | DestinationStep::Completing
            | DestinationStep::Complete
            | DestinationStep::Settling
            | DestinationStep::Dropping
            | DestinationStep::Left => false,
        };
        if !wanted {
            return;
        }
        if self.pull.version(data.chunk).is_some_and(|here| here >= data.version) {
            // Several streams: an older push may arrive after a newer one.
            self.pull.acks.push((data.chunk, data.version));
            return;
        }
        self.pull.count(&data);
        *self.pull.installs.entry(data.chunk).or_default() += 1;
        self.actions.push_back(DestinationAction::Install(data));
    }

    /// An install has ended.
    pub fn handle_installed(
        &mut self,
        now: Duration,
        chunk: ChunkId,
        version: Version,
        installed: Installed,
    ) {
        if let Some(count) = self.pull.installs.get_mut(&chunk) {
            *count -= 1;
            if *count == 0 {
                self.pull.installs.remove(&chunk);
            }
        }
        match (self.step, installed) {
            (
                DestinationStep::Receiving | DestinationStep::Preparing | DestinationStep::Voiding,
                Installed::Done,
            ) => {
                if self.pull.version(chunk).is_none_or(|here| here < version) {
                    self.pull.set_version(chunk, Some(version));
                }
                self.acknowledge(chunk, version);
            }
            (
                DestinationStep::Receiving | DestinationStep::Preparing | DestinationStep::Voiding,
                Installed::Superseded,
            ) if self.pull.version(chunk).is_some_and(|here| here >= version) => {
                // Only for something newer: an acknowledgement settles the chunk at the source.
                self.acknowledge(chunk, version);
            }
            (
                DestinationStep::Receiving | DestinationStep::Preparing | DestinationStep::Voiding,
                Installed::Failed,
            ) => {
                self.refuse(Refusal::Io, format!("{chunk} cannot be stored at the destination"));
            }
            (
                DestinationStep::Prepared | DestinationStep::Activating | DestinationStep::Active,
                Installed::Done | Installed::Superseded,
            ) => {
                self.pull.set_version(chunk, Some(version));
                self.acknowledge(chunk, version);
                self.pull.settle(chunk);
            }
            (
                DestinationStep::Prepared | DestinationStep::Activating | DestinationStep::Active,
                Installed::Failed,
            ) => self.pull_later(now, chunk),
            _ => {}
        }
        self.consider_offer();
        self.consider_completion();
    }

    fn acknowledge(&mut self, chunk: ChunkId, version: Version) {
        self.pull.acks.push((chunk, version));
        if self.pull.acks.len() >= MAX_ACKS {
            self.send_acks();
        }
    }

    fn send_acks(&mut self) {
        if !self.pull.acks.is_empty() {
            let entries = std::mem::take(&mut self.pull.acks);
            self.send(Message::Ack { entries });
        }
    }

    /// The guest waits for a remote chunk (paper, Algorithm 4): it goes ahead of everything.
    pub fn handle_demand(&mut self, _now: Duration, chunk: ChunkId) {
        if self.pull.remaining.contains(chunk) {
            self.pull.demands.push_back(chunk);
        }
    }

    /// The guest has rewritten a whole remote chunk (paper, Algorithm 2): its pull is needless. One that is under way
    /// is recognised when it arrives.
    pub fn handle_overwritten(&mut self, _now: Duration, chunk: ChunkId) {
        if self.pull.remaining.contains(chunk) {
            self.pull.progress.chunks_cancelled += 1;
            self.pull.settle(chunk);
            self.consider_completion();
        }
    }

    /// A chunk of the base image was fetched ahead, or could not be.
    pub fn handle_base_fetched(&mut self, _now: Duration, _chunk: ChunkId) {
        self.pull.fetching = self.pull.fetching.saturating_sub(1);
    }

    pub(super) fn on_pull_failed(&mut self, now: Duration, chunk: ChunkId, reason: Refusal) {
        if !self.pull.remaining.contains(chunk) {
            return;
        }
        self.pull_later(now, chunk);
        // Data is never invented: what the source has lost for good fails, anything else is tried again.
        if reason == Refusal::Lost {
            self.actions.push_back(DestinationAction::FailChunk { chunk, reason });
        }
    }

    fn pull_later(&mut self, now: Duration, chunk: ChunkId) {
        self.pull.asked.remove(&chunk);
        self.pull.queue.remove(chunk);
        self.pull.failed.insert(chunk);
        self.pull.retry_at = Some(Aside(now + RETRY));
    }

    pub(super) fn retry_pulls(&mut self, now: Duration) {
        if self.pull.retry_at.is_some_and(|at| *at <= now) {
            self.pull.retry_at = None;
            while let Some(chunk) = self.pull.failed.take_next(ChunkId(0)) {
                self.pull.demands.push_back(chunk);
            }
        }
    }

    /// Starts what may be started: demands, then background pulls, then base chunks.
    pub(super) fn pump(&mut self) {
        self.consider_offer();
        self.send_acks();
        self.fail_what_waits();
        if self.pulls() {
            while let Some(chunk) = self.pull.demands.pop_front() {
                self.demand(chunk);
            }
            while self.pull.asked.len() < PREFETCH_WINDOW {
                let Some(chunk) = self.pull.queue.take_hottest() else { break };
                self.ask(chunk, false);
            }
            self.consider_completion();
        }
        self.fetch_hot_base();
    }

    fn demand(&mut self, chunk: ChunkId) {
        let known = self.pull.asked.get(&chunk).copied();
        let failed = self.pull.failed.contains(chunk);
        // One that failed is asked for again when its retry is due.
        if self.pull.remaining.contains(chunk) && known != Some(true) && !failed {
            self.pull.queue.remove(chunk);
            self.ask(chunk, true);
        }
    }

    fn ask(&mut self, chunk: ChunkId, demand: bool) {
        self.pull.asked.insert(chunk, demand);
        self.send(Message::Pull { epoch: self.epoch, chunk, demand });
    }

    fn fetch_hot_base(&mut self) {
        let receives = matches!(
            self.step,
            DestinationStep::Receiving
                | DestinationStep::Prepared
                | DestinationStep::Active
                | DestinationStep::Completing
                | DestinationStep::Complete
        );
        while receives && self.pull.fetching < BASE_WINDOW {
            let Some(chunk) = self.pull.hot_base.pop_front() else { break };
            // Part of the modified set by now: what the base has is not wanted.
            if self.pull.told.get(chunk) == Told::Nothing && self.pull.version(chunk).is_none() {
                self.pull.fetching += 1;
                self.actions.push_back(DestinationAction::FetchBase(chunk));
            }
        }
    }
}
