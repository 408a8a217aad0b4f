// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source's side of a migration: MIGRATION_REQUEST, BACKGROUND_PUSH and the giving half of the handoff (paper,
//! Algorithms 1 and 2), as a machine that is told what happened (`handle_*`) and asked what to do (`poll_action`).
//!
//! The steps are those of [`ownership`](super::ownership). This file has the life of the session: connections,
//! handshake, stop and start of the rings, offer, grant, reclaim, release. [`push`] has what travels.
//!
//! The rule that everything hangs on: a `Persist` is answered by `handle_persisted` before anything that depends on
//! it is said. While a record is being written the session is in a step that ends in "ing"; what comes meanwhile is
//! remembered in flags and looked at when the step is over.

mod push;
#[cfg(test)]
mod tests;

use super::geometry::{ChunkId, Geometry};
use super::heat::Counting;
use super::message::{
    Body, ChunkData, Epoch, Hello, Message, MigrationId, Offer, Purpose, Refusal, RemainingDigest, Version,
    Welcome,
};
use super::ownership::{IllegalStep, SourceStep, check_source};
pub use super::progress::{Outcome, Progress};
use super::record::{MigrationRecord, Role, SourceRecord, SourceStage};
use super::strategy::Strategy;
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

/// What a session is made with.
#[derive(Debug, Clone)]
pub struct ArmParams {
    /// What the source says of itself; its epoch is the current one.
    pub hello: Hello,
    /// `HOST:PORT` of the destination.
    pub destination: String,
    /// Strategy; an unavailable one pushes nothing.
    pub strategy: Strategy,
    /// Push threshold.
    pub threshold: u32,
    /// What a write counts.
    pub counting: Counting,
    /// Most chunks that are being captured or are unacknowledged.
    pub push_window: u32,
    /// Time in which write counts halve.
    pub half_life: Duration,
    /// Push at once, not only when the hypervisor starts to log dirty pages.
    pub start_now: bool,
    /// Whether the guest's rings run now.
    pub rings_running: bool,
    /// The guest's write-cache mode now.
    pub write_cache: bool,
}

/// The end of a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
#[derive(Debug)]
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
    backoff: Duration,
    stop_deadline: Option<Duration>,
    farewell: Option<Duration>,
    /// Attempts left to tell the destination that it is released.
    farewells: u32,
    announce_at: Option<Duration>,
    halve_at: Duration,
    retry_sync: Option<Duration>,
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
            SourceStage::Released => (SourceStep::Released, true),
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
        params: ArmParams,
        step: SourceStep,
        modified: impl IntoIterator<Item = ChunkId>,
        hot_base: Vec<ChunkId>,
    ) -> Self {
        let geometry = Geometry::new(params.hello.size, params.hello.chunk_size).ok();
        let push = Push::new(geometry, &params, modified, hot_base);
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
            start_waits: false,
            synced: false,
            synced_recorded: false,
            sync_running: false,
            sync_stale: false,
            data_lost: false,
            cancel_asked: false,
            outcome: None,
            seq: 0,
            backoff: MIN_BACKOFF,
            stop_deadline: None,
            farewell: None,
            farewells: FAREWELLS,
            announce_at: None,
            halve_at: now + params.half_life,
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
            SourceStep::Released => SourceStage::Released,
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
            SourceStep::Pushing
            | SourceStep::Draining
            | SourceStep::Offered
            | SourceStep::Released
            | SourceStep::Left => {}
        }
    }

    // ---- connection -------------------------------------------------------------------------------------------

    fn connect(&mut self, now: Duration) {
        self.link = Link::Down;
        self.actions.push_back(SourceAction::Connect { not_before: now });
    }

    fn send(&mut self, message: Message) {
        if self.link != Link::Down {
            self.actions.push_back(SourceAction::Send(message));
        }
    }

    /// A connection is there: says who this is.
    pub fn handle_connected(&mut self, _now: Duration) {
        self.link = Link::Greeted;
        self.backoff = MIN_BACKOFF;
        let hello = Hello { epoch: self.durable_epoch, ..self.params.hello.clone() };
        self.send(Message::Hello(hello));
    }

    /// The connection is lost, or could not be made: it is made again, for ever.
    pub fn handle_disconnected(&mut self, now: Duration) {
        self.link = Link::Down;
        self.welcome = None;
        self.push.disconnected();
        if self.step == SourceStep::Left {
            return self.finish();
        }
        if self.step == SourceStep::Released {
            // The destination may not have heard that it is released; it refuses a source that it has forgotten.
            if self.farewells == 0 {
                return;
            }
            self.farewells -= 1;
        }
        self.actions.push_back(SourceAction::Connect { not_before: now + self.backoff });
        self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
    }

    fn hang_up(&mut self, now: Duration) {
        self.actions.push_back(SourceAction::Disconnect);
        self.handle_disconnected(now);
    }

    /// Takes what the destination says.
    pub fn handle_message(&mut self, now: Duration, message: Message) {
        match message {
            Message::Welcome(welcome) => self.on_welcome(now, welcome),
            Message::Have { entries, last } => {
                if self.link == Link::Listing {
                    self.push.confirm(&entries);
                    if last {
                        self.agree(now);
                    }
                }
            }
            Message::Ack { entries } => {
                for (chunk, version) in entries {
                    self.push.acknowledged(chunk, version);
                }
            }
            Message::Prepared { epoch } if epoch == self.epoch => self.answer_stop(),
            // What counts as settled here is not there. The lists of a new handshake find out what is.
            Message::Mismatch { epoch } if epoch == self.epoch && self.step == SourceStep::Offered => {
                self.hang_up(now);
            }
            Message::Pull { epoch, chunk, demand } => self.on_pull(now, epoch, chunk, demand),
            Message::Activate { epoch } => self.on_activate(now, epoch),
            Message::Complete { epoch } => self.on_complete(epoch),
            Message::Refuse { reason, text } => self.on_refuse(now, reason, text),
            Message::Cancelled => self.on_cancelled(now),
            Message::Ping(number) => self.send(Message::Pong(number)),
            Message::Prepared { .. } | Message::Mismatch { .. } | Message::Pong(_) => {}
            Message::Hello(_)
            | Message::Announce { .. }
            | Message::HotBase { .. }
            | Message::Chunk(_)
            | Message::Offer(_)
            | Message::PullFailed { .. }
            | Message::Granted { .. }
            | Message::Denied { .. }
            | Message::Reclaimed { .. }
            | Message::Synced { .. }
            | Message::Released { .. }
            | Message::Cancel => self.hang_up(now),
        }
    }

    fn on_welcome(&mut self, now: Duration, welcome: Welcome) {
        if self.link != Link::Greeted {
            return self.hang_up(now);
        }
        self.push.begin_listing();
        if welcome.standing != Some(self.push.told_digest()) {
            self.push.forget_told();
        }
        let listed = !welcome.have_follows;
        self.welcome = Some(welcome);
        self.link = Link::Listing;
        if listed {
            self.agree(now);
        }
    }

    /// What the destination has is known: goes on where the last connection ended.
    fn agree(&mut self, now: Duration) {
        let Some(welcome) = self.welcome.take() else { return };
        self.push.end_listing();
        self.link = Link::Agreed;
        self.ever_agreed = true;
        self.announce_at = Some(now);
        match self.step {
            SourceStep::Offered => self.offer(),
            SourceStep::Relinquished => {
                if welcome.active.is_none() {
                    self.send(Message::Granted { epoch: self.epoch });
                }
                if self.synced_recorded {
                    self.send(Message::Synced { epoch: self.epoch });
                }
                if welcome.complete {
                    self.on_complete(self.epoch);
                }
            }
            SourceStep::Released => self.send(Message::Released { epoch: self.epoch }),
            SourceStep::Left => self.send(Message::Cancel),
            // It waits for a grant that will not come, and takes no pushes meanwhile.
            SourceStep::Pushing | SourceStep::Draining if welcome.prepared.is_some() => {
                self.send(Message::Reclaimed { epoch: self.epoch });
            }
            SourceStep::Arming
            | SourceStep::Pushing
            | SourceStep::Draining
            | SourceStep::Offering
            | SourceStep::Reclaiming
            | SourceStep::Granting
            | SourceStep::Releasing
            | SourceStep::Leaving => {}
        }
    }

    fn on_refuse(&mut self, now: Duration, reason: Refusal, text: String) {
        match self.step {
            SourceStep::Pushing | SourceStep::Draining | SourceStep::Offered => {
                self.leave(Outcome::Failed { reason, text });
            }
            SourceStep::Left => self.finish(),
            SourceStep::Released => {
                self.farewells = 0;
                self.hang_up(now);
            }
            // Nothing that the destination says can give the disk back now, and a record that is being written
            // decides first: ask again later.
            SourceStep::Arming
            | SourceStep::Offering
            | SourceStep::Reclaiming
            | SourceStep::Granting
            | SourceStep::Relinquished
            | SourceStep::Releasing
            | SourceStep::Leaving => self.hang_up(now),
        }
    }

    fn on_cancelled(&mut self, now: Duration) {
        if self.step == SourceStep::Left {
            self.finish();
        } else {
            let text = "the destination has dropped the migration".to_owned();
            self.on_refuse(now, Refusal::Cancelled, text);
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
        self.stop_deadline = Some(now + STOP_HOLD);
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
            self.stop_deadline.get_or_insert(now + STOP_HOLD);
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

    // ---- offer, grant, reclaim, release -----------------------------------------------------------------------

    fn reclaim(&mut self, _now: Duration) {
        if self.go(SourceStep::Reclaiming) {
            self.epoch = self.epoch.next();
            self.persist(SourceStage::Pushing);
        }
    }

    fn reclaimed(&mut self, now: Duration) {
        self.go(SourceStep::Pushing);
        self.synced = false;
        self.synced_recorded = false;
        self.sync_stale = self.sync_running;
        self.retry_sync = None;
        self.data_lost = false;
        self.push.reclaimed();
        self.send(Message::Reclaimed { epoch: self.epoch });
        if self.cancel_asked {
            return self.leave(Outcome::Cancelled);
        }
        if std::mem::take(&mut self.stop_seen) {
            return self.stop(now);
        }
        self.serve_again();
        if self.start_waits {
            self.answer_start(None);
        }
    }

    fn on_activate(&mut self, now: Duration, asked: Option<Epoch>) {
        let deny = |reason| Message::Denied { epoch: asked, reason };
        match self.step {
            SourceStep::Offered if asked.is_none_or(|epoch| epoch == self.epoch) => {
                if self.data_lost {
                    self.send(deny(Refusal::Lost));
                } else if asked.is_some() && self.go(SourceStep::Granting) {
                    self.synced_recorded = self.synced;
                    self.persist(SourceStage::Relinquished { synced: self.synced });
                }
                // Without an epoch the destination has not prepared the offer yet: it asks again when it has.
            }
            SourceStep::Relinquished if asked.is_none_or(|epoch| epoch == self.epoch) => {
                self.send(Message::Granted { epoch: self.epoch });
            }
            SourceStep::Released => self.send(Message::Released { epoch: self.epoch }),
            // The rings stopped before the migration was armed: no stop will be seen, so the offer is made now.
            SourceStep::Pushing if !self.rings_running && asked.is_none() => {
                self.actions.push_back(SourceAction::CloseGate);
                self.stop(now);
            }
            // Decided by a record that is being written, or by what is still to be pushed.
            SourceStep::Arming
            | SourceStep::Draining
            | SourceStep::Offering
            | SourceStep::Granting
            | SourceStep::Releasing => {}
            SourceStep::Pushing | SourceStep::Reclaiming => self.send(deny(Refusal::Reclaimed)),
            SourceStep::Leaving | SourceStep::Left => self.send(deny(Refusal::Cancelled)),
            SourceStep::Offered | SourceStep::Relinquished => self.send(deny(Refusal::StaleEpoch)),
        }
    }

    fn granted(&mut self) {
        self.go(SourceStep::Relinquished);
        self.answer_stop();
        self.send(Message::Granted { epoch: self.epoch });
        if self.synced_recorded {
            self.send(Message::Synced { epoch: self.epoch });
        } else if self.synced {
            self.persist(SourceStage::Relinquished { synced: true });
        }
        if self.start_waits {
            self.answer_start(Some(Refusal::StaleEpoch));
        }
    }

    fn on_complete(&mut self, epoch: Epoch) {
        match self.step {
            SourceStep::Relinquished if epoch == self.epoch => {
                self.go(SourceStep::Releasing);
                self.persist(SourceStage::Released);
            }
            SourceStep::Released => self.send(Message::Released { epoch: self.epoch }),
            SourceStep::Arming
            | SourceStep::Pushing
            | SourceStep::Draining
            | SourceStep::Offering
            | SourceStep::Offered
            | SourceStep::Reclaiming
            | SourceStep::Granting
            | SourceStep::Relinquished
            | SourceStep::Releasing
            | SourceStep::Leaving
            | SourceStep::Left => {}
        }
    }

    fn sync_layer(&mut self) {
        if !self.synced && !self.sync_running && !self.data_lost {
            self.sync_running = true;
            self.actions.push_back(SourceAction::SyncLayer);
        }
    }

    /// The layer was synced, or could not be.
    pub fn handle_layer_synced(&mut self, now: Duration, ok: bool) {
        self.sync_running = false;
        let wanted =
            matches!(self.step, SourceStep::Offered | SourceStep::Granting | SourceStep::Relinquished);
        if std::mem::take(&mut self.sync_stale) {
            if wanted {
                self.sync_layer();
            }
            return;
        }
        if !wanted {
            return;
        }
        if !ok {
            self.retry_sync = Some(now + RETRY);
            return;
        }
        self.synced = true;
        if self.step == SourceStep::Relinquished {
            self.persist(SourceStage::Relinquished { synced: true });
        }
    }

    // ---- cancel and failure -----------------------------------------------------------------------------------

    /// The operator cancels. Needs nobody's consent: the disk is still here.
    ///
    /// # Errors
    /// [`Refusal::StaleEpoch`] when the disk has been handed over.
    pub fn handle_cancel(&mut self, _now: Duration) -> Result<(), Refusal> {
        match self.step {
            SourceStep::Pushing | SourceStep::Draining | SourceStep::Offered => {
                self.leave(Outcome::Cancelled);
                Ok(())
            }
            SourceStep::Arming | SourceStep::Offering | SourceStep::Reclaiming => {
                self.cancel_asked = true;
                Ok(())
            }
            SourceStep::Leaving | SourceStep::Left => Ok(()),
            SourceStep::Granting
            | SourceStep::Relinquished
            | SourceStep::Releasing
            | SourceStep::Released => Err(Refusal::StaleEpoch),
        }
    }

    fn leave(&mut self, outcome: Outcome) {
        if self.go(SourceStep::Leaving) {
            self.epoch = self.epoch.next();
            self.outcome = Some(outcome);
            self.persist_role(Role::Serving);
        }
    }

    fn left(&mut self, now: Duration) {
        self.go(SourceStep::Left);
        self.answer_stop();
        self.actions.push_back(SourceAction::OpenGate);
        if self.start_waits {
            self.answer_start(None);
        }
        if self.link == Link::Down || matches!(self.outcome, Some(Outcome::Failed { .. })) {
            return self.finish();
        }
        self.send(Message::Cancel);
        self.farewell = Some(now + FAREWELL);
    }

    fn finish(&mut self) {
        self.farewell = None;
        if let Some(outcome) = self.outcome.take() {
            if self.link != Link::Down {
                self.link = Link::Down;
                self.actions.push_back(SourceAction::Disconnect);
            }
            self.actions.push_back(SourceAction::Finished(outcome));
        }
    }

    // ---- time -------------------------------------------------------------------------------------------------

    /// When `handle_timeout` is wanted next.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Duration> {
        let announce = self.announce_at.filter(|_| self.push.has_news() && self.pushes());
        let halve = self.pushes().then_some(self.halve_at);
        let times =
            [self.stop_deadline, self.farewell, announce, halve, self.retry_sync, self.push.retry_at()];
        times.into_iter().flatten().min()
    }

    /// The time given by `next_timeout` has come.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.stop_deadline.is_some_and(|at| at <= now) {
            if self.step == SourceStep::Draining {
                self.begin_offer();
            }
            self.answer_stop();
        }
        if self.farewell.is_some_and(|at| at <= now) {
            self.finish();
        }
        if self.announce_at.is_some_and(|at| at <= now) && self.pushes() {
            self.announce_all();
            self.announce_at = Some(now + ANNOUNCE_EVERY);
        }
        if self.halve_at <= now {
            self.halve_at = now + self.params.half_life;
            if self.pushes() {
                self.push.halve();
            }
        }
        if self.retry_sync.is_some_and(|at| at <= now) {
            self.retry_sync = None;
            self.sync_layer();
        }
        self.push.retry(now);
    }
}
