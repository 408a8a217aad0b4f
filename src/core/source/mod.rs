// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source's side of a migration: MIGRATION_REQUEST, BACKGROUND_PUSH and the giving half of the handoff (paper,
//! Algorithms 1 and 2), as a machine that is told what happened (`handle_*`) and asked what to do (`poll_action`).
//!
//! The steps are those of [`ownership`](super::ownership). This file has the life of the session: connections,
//! what it is told of the rings, its records and timers. `link` has connections and the handshake, `handoff` the offer
//! and how it ends, `push` what travels.
//!
//! The rule that everything hangs on: a `Persist` is answered by `handle_persisted` before anything that depends on
//! it is said. While a record is being written the session is in a step that ends in "ing"; what comes meanwhile is
//! remembered in flags and looked at when the step is over.

mod arm;
mod handoff;
mod link;
mod push;
#[cfg(test)]
mod tests;

use super::aside::{Aside, Due};
use super::geometry::{ChunkId, Geometry};
use super::message::{
    Body, ChunkData, Epoch, Hello, Message, MigrationId, Offer, Purpose, Refusal, RemainingDigest, Version,
    Welcome,
};
use super::ownership::{IllegalStep, SourceStep, check_source};
pub use super::progress::{Outcome, Progress};
use super::record::{MigrationRecord, Role, SourceRecord, SourceStage};
pub use arm::{ArmParams, Unchanged};
use push::Push;
use std::collections::VecDeque;
use std::time::Duration;

/// First delay before a lost connection is made again; doubled up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(100);
/// Longest delay between two attempts to connect.
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// How often changes of the remaining set are announced while pushing.
const ANNOUNCE_EVERY: Duration = Duration::from_millis(100);
/// Longest time for which the acknowledgement of the rings' stop waits for the destination.
pub const STOP_HOLD: Duration = Duration::from_secs(5);
/// How long a cancelled source waits for the destination to say that it knows.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often a released source connects again to tell the destination so.
const FAREWELLS: u32 = 16;
/// How long after a failed sync or read it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The end of a capture.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Capture {
    /// The chunk was read.
    Done {
        /// Its version when the read began.
        version: Version,
        /// No write overlapped the read.
        clean: bool,
        /// The content.
        body: Body,
    },
    /// It could not be read.
    Failed,
}

/// What the driver shall do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Say this on the control stream.
    Send(Message),
    /// Send this on any data stream.
    SendData(ChunkData),
    /// Read a chunk and tell by `handle_captured`.
    Capture {
        /// The chunk.
        chunk: ChunkId,
        /// Why.
        purpose: Purpose,
    },
    /// Make this record durable, in the order of these actions, and tell by `handle_persisted`.
    Persist {
        /// Number of the write.
        seq: u64,
        /// The record.
        record: MigrationRecord,
    },
    /// Sync the layer and tell by `handle_layer_synced`.
    SyncLayer,
    /// The guest may be served.
    OpenGate,
    /// The guest may not be served: the disk is being offered although no stop of the rings was told (they had
    /// stopped before the migration was armed). After `handle_rings_stopped` the gate is closed already.
    CloseGate,
    /// The acknowledgement of the rings' stop may go out.
    RingsStopAnswered,
    /// Answer a ring start.
    RingsStartAnswered {
        /// Whether the rings may process requests.
        allowed: bool,
        /// Why not.
        reason: Option<Refusal>,
    },
    /// Connect to the destination, not before this time, and tell by `handle_connected` or `handle_disconnected`.
    Connect {
        /// On the session's clock.
        not_before: Duration,
    },
    /// Drop the connection; `handle_disconnected` is not wanted.
    Disconnect,
    /// The session has ended. Nothing follows but answers of a released source to a peer that asks again.
    Finished(Outcome),
}

/// How far the conversation with the destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Link {
    /// No connection.
    Down,
    /// `Hello` was said.
    Greeted,
    /// `Welcome` came; the lists of what the destination has are coming.
    Listing,
    /// Both sides agree.
    Agreed,
}

/// The source's session.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceSession {
    params: ArmParams,
    step: SourceStep,
    epoch: Epoch,
    /// The epoch of the newest durable record: the only one that a greeting may name.
    durable_epoch: Epoch,
    link: Link,
    welcome: Option<Welcome>,
    ever_agreed: bool,
    push: Push,
    started: bool,
    rings_running: bool,
    write_cache: bool,
    digest: RemainingDigest,
    /// The rings started again while a record was being written, or stopped while arming.
    restart_seen: bool,
    stop_seen: bool,
    stop_answered: bool,
    prepared: Option<Epoch>,
    start_waits: bool,
    synced: bool,
    synced_recorded: bool,
    sync_running: bool,
    /// The sync that runs began before the last reclaim: it says nothing of what was written since.
    sync_stale: bool,
    data_lost: bool,
    cancel_asked: bool,
    outcome: Option<Outcome>,
    seq: u64,
    backoff: Aside<Duration>,
    stop_deadline: Option<Due>,
    farewell: Option<Due>,
    /// Attempts left to tell the destination that it is released.
    farewells: u32,
    announce_at: Option<Due>,
    halve_at: Due,
    retry_sync: Option<Due>,
    actions: VecDeque<SourceAction>,
}

impl SourceSession {
    /// Arms a migration (MIGRATION_REQUEST). The caller has armed its tracker before it copied `modified`: a write in
    /// between is then counted twice, never missed.
    #[must_use]
    pub fn arm(
        now: Duration,
        params: ArmParams,
        modified: impl IntoIterator<Item = ChunkId>,
        hot_base: Vec<ChunkId>,
    ) -> Self {
        let mut session = Self::new(now, params, SourceStep::Arming, modified, hot_base);
        session.persist(SourceStage::Pushing);
        session
    }

    /// Goes on after a restart of the daemon, as the record tells. What the destination has is not known: the
    /// versions of an earlier run mean nothing, so everything modified is pushed, or offered, again. `data_lost`: the
    /// host went down before the layer was synced, so chunks may be stale and none is given out as good.
    #[must_use]
    pub fn resume(
        now: Duration,
        mut params: ArmParams,
        record: &SourceRecord,
        epoch: Epoch,
        modified: impl IntoIterator<Item = ChunkId>,
        data_lost: bool,
    ) -> Self {
        params.hello.epoch = epoch;
        params.write_cache = record.write_cache;
        params.start_now = true;
        params.rings_running = record.stage == SourceStage::Pushing;
        let (step, synced) = match record.stage {
            SourceStage::Pushing => (SourceStep::Pushing, false),
            SourceStage::Offered => (SourceStep::Offered, false),
            SourceStage::Relinquished { synced } => (SourceStep::Relinquished, synced),
            SourceStage::Released { synced } => (SourceStep::Released, synced),
        };
        let mut session = Self::new(now, params, step, modified, Vec::new());
        session.epoch = epoch;
        session.digest = record.digest;
        session.synced = synced;
        session.synced_recorded = synced;
        session.data_lost = data_lost;
        session.stop_answered = true;
        session.connect(now);
        if step == SourceStep::Released {
            session.actions.push_back(SourceAction::Finished(Outcome::Released));
        }
        if matches!(step, SourceStep::Offered | SourceStep::Relinquished) {
            session.sync_layer();
        }
        session
    }

    fn new(
        now: Duration,
        mut params: ArmParams,
        step: SourceStep,
        modified: impl IntoIterator<Item = ChunkId>,
        hot_base: Vec<ChunkId>,
    ) -> Self {
        let geometry = Geometry::new(params.hello.size, params.hello.chunk_size).ok();
        let push = Push::new(geometry, &mut params, modified, hot_base);
        Self {
            step,
            epoch: params.hello.epoch,
            durable_epoch: params.hello.epoch,
            link: Link::Down,
            welcome: None,
            ever_agreed: false,
            push,
            started: params.start_now,
            rings_running: params.rings_running,
            write_cache: params.write_cache,
            digest: RemainingDigest::default(),
            restart_seen: false,
            stop_seen: false,
            stop_answered: true,
            prepared: None,
            start_waits: false,
            synced: false,
            synced_recorded: false,
            sync_running: false,
            sync_stale: false,
            data_lost: false,
            cancel_asked: false,
            outcome: None,
            seq: 0,
            backoff: Aside(MIN_BACKOFF),
            stop_deadline: None,
            farewell: None,
            farewells: FAREWELLS,
            announce_at: None,
            halve_at: Aside(now + params.half_life),
            retry_sync: None,
            actions: VecDeque::new(),
            params,
        }
    }

    /// The next thing to do, if any.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        if self.actions.is_empty() {
            self.pump();
        }
        self.actions.pop_front()
    }

    /// Stage, in the words of the durable record.
    #[must_use]
    pub fn stage(&self) -> SourceStage {
        match self.step {
            SourceStep::Arming
            | SourceStep::Pushing
            | SourceStep::Draining
            | SourceStep::Offering
            | SourceStep::Leaving
            | SourceStep::Left => SourceStage::Pushing,
            SourceStep::Offered | SourceStep::Reclaiming | SourceStep::Granting => SourceStage::Offered,
            SourceStep::Relinquished | SourceStep::Releasing => {
                SourceStage::Relinquished { synced: self.synced_recorded }
            }
            SourceStep::Released => SourceStage::Released { synced: self.synced_recorded },
        }
    }

    /// The step, finer than the stage.
    #[must_use]
    pub fn step(&self) -> SourceStep {
        self.step
    }

    /// The newest epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The migration.
    #[must_use]
    pub fn migration(&self) -> MigrationId {
        self.params.hello.migration
    }

    /// Whether the peers have agreed on this migration (once is enough).
    #[must_use]
    pub fn agreed(&self) -> bool {
        self.ever_agreed
    }

    /// What a device state must carry so that only the right destination takes over; `None` before the offer.
    #[must_use]
    pub fn ticket(&self) -> Option<(MigrationId, Epoch, RemainingDigest)> {
        let offered = self.stage() == SourceStage::Offered;
        offered.then_some((self.params.hello.migration, self.epoch, self.digest))
    }

    /// Counters.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let progress = self.push.progress();
        if self.step == SourceStep::Released {
            return Progress { remaining_chunks: 0, remaining_bytes: 0, ..progress };
        }
        progress
    }

    // ---- steps and records ------------------------------------------------------------------------------------

    fn go(&mut self, to: SourceStep) -> bool {
        let checked: Result<(), IllegalStep> = check_source(self.step, to);
        debug_assert!(checked.is_ok(), "{checked:?}");
        if checked.is_ok() {
            self.step = to;
        }
        checked.is_ok()
    }

    fn persist(&mut self, stage: SourceStage) {
        let record = SourceRecord {
            migration: self.params.hello.migration,
            destination: self.params.destination.clone(),
            stage,
            threshold: self.params.threshold,
            strategy: self.params.strategy as u8,
            write_cache: self.write_cache,
            digest: self.digest,
        };
        self.persist_role(Role::Source(record));
    }

    fn persist_role(&mut self, role: Role) {
        self.seq += 1;
        let record = MigrationRecord::V1 { volume: self.params.hello.volume, epoch: self.epoch, role };
        self.actions.push_back(SourceAction::Persist { seq: self.seq, record });
    }

    /// A record is durable. Only the last one asked for ends a step; records are written in order.
    pub fn handle_persisted(&mut self, now: Duration, seq: u64) {
        if seq != self.seq {
            return;
        }
        self.durable_epoch = self.epoch;
        match self.step {
            SourceStep::Arming => {
                self.go(SourceStep::Pushing);
                self.connect(now);
                if self.cancel_asked {
                    self.leave(Outcome::Cancelled);
                } else if std::mem::take(&mut self.stop_seen) {
                    self.stop(now);
                }
            }
            SourceStep::Offering => self.offered(now),
            SourceStep::Reclaiming => self.reclaimed(now),
            SourceStep::Granting => self.granted(),
            SourceStep::Releasing => {
                self.go(SourceStep::Released);
                if self.synced && !self.synced_recorded {
                    self.persist(SourceStage::Released { synced: true });
                }
                self.send(Message::Released { epoch: self.epoch });
                self.actions.push_back(SourceAction::Finished(Outcome::Released));
            }
            SourceStep::Leaving => self.left(now),
            SourceStep::Relinquished => {
                if self.synced && !self.synced_recorded {
                    self.synced_recorded = true;
                    self.send(Message::Synced { epoch: self.epoch });
                }
            }
            SourceStep::Released => self.synced_recorded = self.synced,
            SourceStep::Pushing | SourceStep::Draining | SourceStep::Offered | SourceStep::Left => {}
        }
    }

    // ---- rings ------------------------------------------------------------------------------------------------

    /// The hypervisor logs dirty pages: pushing begins if it waited for that.
    pub fn handle_log_started(&mut self, _now: Duration) {
        self.started = true;
    }

    /// All rings have stopped; no request is under way, the gate is closed and every write has been told by
    /// `handle_wrote`. Offers the disk. `RingsStopAnswered` follows when the destination holds the offer or
    /// [`STOP_HOLD`] has passed: ownership does not depend on it.
    pub fn handle_rings_stopped(&mut self, now: Duration, write_cache: bool) {
        self.rings_running = false;
        self.write_cache = write_cache;
        self.stop_answered = false;
        self.stop_deadline = Some(Aside(now + STOP_HOLD));
        self.restart_seen = false;
        match self.step {
            SourceStep::Arming => self.stop_seen = true,
            SourceStep::Pushing => self.stop(now),
            // A reclaim is being written: the stop is looked at when it is.
            SourceStep::Reclaiming => self.stop_seen = true,
            // Answered with the offer that is on its way.
            SourceStep::Draining | SourceStep::Offering => {}
            SourceStep::Offered
            | SourceStep::Granting
            | SourceStep::Relinquished
            | SourceStep::Releasing
            | SourceStep::Released
            | SourceStep::Leaving
            | SourceStep::Left => self.answer_stop(),
        }
    }

    fn stop(&mut self, now: Duration) {
        if self.params.strategy.drains_before_offer()
            && self.started
            && self.link == Link::Agreed
            && self.push.remaining() > 0
        {
            self.go(SourceStep::Draining);
            self.stop_deadline.get_or_insert(Aside(now + STOP_HOLD));
        } else {
            self.begin_offer();
        }
    }

    /// The remaining set is final: makes the offer durable.
    fn begin_offer(&mut self) {
        if self.go(SourceStep::Offering) {
            self.epoch = self.epoch.next();
            self.push.stopped();
            self.announce_all();
            self.digest = self.push.told_digest();
            self.persist(SourceStage::Offered);
        }
    }

    fn offered(&mut self, now: Duration) {
        self.go(SourceStep::Offered);
        if self.cancel_asked {
            return self.leave(Outcome::Cancelled);
        }
        if std::mem::take(&mut self.restart_seen) {
            return self.reclaim(now);
        }
        self.sync_layer();
        if self.link == Link::Agreed {
            self.offer();
        } else {
            // Nobody to wait for; a destination that comes later is offered the disk then.
            self.answer_stop();
        }
    }

    /// TRANSFER_IO_CONTROL.
    fn offer(&mut self) {
        self.announce_all();
        self.digest = self.push.told_digest();
        self.send(Message::Offer(Offer {
            epoch: self.epoch,
            digest: self.digest,
            remaining: self.push.told_remaining(),
            write_cache: self.write_cache,
        }));
    }

    fn answer_stop(&mut self) {
        self.stop_deadline = None;
        if !std::mem::replace(&mut self.stop_answered, true) {
            self.actions.push_back(SourceAction::RingsStopAnswered);
        }
    }

    /// The guest runs here (again): proof, not just a reconnect. Before the grant this takes the disk back.
    pub fn handle_rings_started(&mut self, now: Duration) {
        self.rings_running = true;
        match self.step {
            SourceStep::Arming | SourceStep::Pushing | SourceStep::Left => {
                self.stop_seen = false;
                self.serve_again();
                self.answer_start(None);
            }
            SourceStep::Draining => {
                self.go(SourceStep::Pushing);
                self.serve_again();
                self.answer_start(None);
            }
            SourceStep::Offering => {
                self.start_waits = true;
                self.restart_seen = true;
            }
            SourceStep::Offered => {
                self.start_waits = true;
                self.reclaim(now);
            }
            SourceStep::Reclaiming => {
                self.stop_seen = false;
                self.start_waits = true;
            }
            SourceStep::Leaving => self.start_waits = true,
            SourceStep::Granting
            | SourceStep::Relinquished
            | SourceStep::Releasing
            | SourceStep::Released => self.answer_start(Some(Refusal::StaleEpoch)),
        }
    }

    /// Opens the gate; a stop that is still unanswered is over.
    fn serve_again(&mut self) {
        self.answer_stop();
        self.actions.push_back(SourceAction::OpenGate);
    }

    fn answer_start(&mut self, reason: Option<Refusal>) {
        self.start_waits = false;
        self.actions.push_back(SourceAction::RingsStartAnswered { allowed: reason.is_none(), reason });
    }

    // ---- time -------------------------------------------------------------------------------------------------

    /// When `handle_timeout` is wanted next.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Duration> {
        let announce = self.announce_at.filter(|_| self.push.has_news() && self.pushes());
        let halve = self.pushes().then_some(self.halve_at);
        let times =
            [self.stop_deadline, self.farewell, announce, halve, self.retry_sync, self.push.retry_at()];
        times.into_iter().flatten().map(|at| *at).min()
    }

    /// The time given by `next_timeout` has come.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.stop_deadline.is_some_and(|at| *at <= now) {
            if self.step == SourceStep::Draining {
                self.begin_offer();
            }
            self.answer_stop();
        }
        if self.farewell.is_some_and(|at| *at <= now) {
            self.finish();
        }
        if self.announce_at.is_some_and(|at| *at <= now) && self.pushes() {
            self.announce_all();
            self.announce_at = Some(Aside(now + ANNOUNCE_EVERY));
        }
        if *self.halve_at <= now {
            *self.halve_at = now + self.params.half_life;
            if self.pushes() {
                self.push.halve();
            }
        }
        if self.retry_sync.is_some_and(|at| *at <= now) {
            self.retry_sync = None;
            self.sync_layer();
        }
        self.push.retry(now);
    }
}
