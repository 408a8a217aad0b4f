// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The destination's side of a migration: MIGRATION_NOTIFICATION, TRANSFER_IO_CONTROL (paper, Algorithm 3) and the
//! taking half of the handoff, as a machine that is told what happened and asked what to do.
//!
//! The steps are those of [`ownership`](super::ownership). This file has the life of the session; `pull` has what
//! travels: installs, BACKGROUND_PULL, demand pulls.
//!
//! The destination never decides that it owns the disk: it asks (`Activate`), and only a grant that it has made
//! durable opens its gate. What it was told of the remaining set is checked by a digest at the offer; a chunk is taken for
//! settled only if the very version that the source names is installed here.

mod away;
mod handoff;
mod handshake;
mod pull;
#[cfg(test)]
mod tests;

use super::aside::{Aside, Due};
use super::geometry::{ChunkId, Geometry};
use super::message::{
    BaseIdentity, ChunkData, Epoch, Hello, Incarnation, Message, MigrationId, Offer, Refusal,
    RemainingDigest, Version, VolumeId, Welcome,
};
use super::ownership::{DestinationStep, IllegalStep, check_destination};
use super::progress::{Outcome, Progress};
use super::record::{DestinationRecord, DestinationStage, MigrationRecord, Role};
use away::Away;
pub use away::{OnSourceLoss, SourceLoss};
use pull::Pull;
use std::collections::VecDeque;
use std::time::Duration;

/// Longest time for which the acknowledgement of a ring start waits for the source's grant.
pub const START_HOLD: Duration = Duration::from_secs(20);
/// How long after a failed sync it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What the destination's own side is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LocalFacts {
    /// Geometry of the volume here.
    pub geometry: Geometry,
    /// The base image here.
    pub base: BaseIdentity,
    /// virtio feature bits that this device can offer.
    pub virtio_features: u64,
    /// Request queues that this device offers.
    pub queues: u16,
    /// The guest may not write.
    pub read_only: bool,
    /// The volume's name here; the source's is taken over.
    pub volume: VolumeId,
    /// The newest epoch known here.
    pub epoch: Epoch,
    /// Nothing was ever written here: nothing has to be dropped before a migration comes in.
    pub virgin: bool,
    /// This side has given the volume `volume` away: only that volume may come back, under a newer epoch.
    pub released: bool,
    /// The migration in which it did, if all that it had is still here and durable.
    pub replica: Option<MigrationId>,
}

/// The end of an install.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Installed {
    /// The version is in the layer, around what the guest has written here.
    Done,
    /// It was not needed: the guest has rewritten the chunk, or a newer version is there.
    Superseded,
    /// It could not be written.
    Failed,
}

/// What the driver shall do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Say this on the control stream.
    Send(Message),
    /// Take over the volume's identity, serial and so on.
    Adopt(Hello),
    /// Write a chunk and tell by `handle_installed`. A pushed chunk (by its purpose, not by the stage: pushes go on
    /// while a reclaim is being recorded) replaces an older version; a pulled one only fills what is remote.
    Install(ChunkData),
    /// Mark chunks as remote, with nothing of them valid here.
    MarkRemote {
        /// First chunk.
        first: ChunkId,
        /// Number of chunks.
        run: u32,
    },
    /// Fetch a chunk of the base image from the repository and tell by `handle_base_fetched`.
    FetchBase(ChunkId),
    /// Make this record durable, in the order of these actions, and tell by `handle_persisted`. With `remaining`,
    /// that list first: every chunk of the source's modified set, its write count, and whether it still remains.
    Persist {
        /// Number of the write.
        seq: u64,
        /// The record.
        record: MigrationRecord,
        /// The modified set.
        remaining: Option<Vec<(ChunkId, u8, bool)>>,
    },
    /// Sync data and map and tell by `handle_synced`.
    SyncVolume,
    /// The guest may be served; its flushes wait for `OpenFlush`.
    OpenGate,
    /// Guest flushes may be acknowledged.
    OpenFlush,
    /// Take over the guest's write-cache mode.
    SetWriteCache(bool),
    /// Answer a ring start.
    StartAnswered {
        /// Whether the rings may process requests.
        allowed: bool,
        /// Why not; `None` when time ran out.
        reason: Option<Refusal>,
    },
    /// The chunk cannot be had: what waits for it fails.
    FailChunk {
        /// The chunk.
        chunk: ChunkId,
        /// Why.
        reason: Refusal,
    },
    /// The source is away: what waits for the chunk fails now. The chunk stays remote, and is had when the source is back.
    FailWaiting(ChunkId),
    /// Drop everything that came, durably, and tell by `handle_wiped`.
    Wipe,
    /// Drop everything but these chunks, which are as they came from the disk's owner in these versions, and tell by
    /// `handle_pruned`.
    Prune(Vec<(ChunkId, Version)>),
    /// The session has ended.
    Finished(Outcome),
}

/// A ring start that wants the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Start {
    /// Asked the source since the last (re)connection or offer.
    asked: bool,
    deadline: Option<Due>,
}

/// The destination's session.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DestinationSession {
    facts: LocalFacts,
    step: DestinationStep,
    hello: Option<Hello>,
    migration: MigrationId,
    incarnation: Incarnation,
    /// A new run of the source goes on with the offer that is prepared here. What is here stays good as long as the
    /// offer does; the versions of it mean nothing to that run.
    foreign: bool,
    epoch: Epoch,
    connected: bool,
    welcomed: bool,
    pull: Pull,
    away: Away,
    offer: Option<Offer>,
    /// The epoch that made the offer void while it was being written.
    voided: Option<Epoch>,
    /// A greeting that came while a record was being written.
    greeting: Option<Hello>,
    /// What the source said to keep so far; `None` before it was asked on this connection.
    kept: Option<Vec<(ChunkId, Version)>>,
    write_cache: bool,
    digest: RemainingDigest,
    start: Option<Start>,
    source_synced: bool,
    synced_recorded: bool,
    retry_sync: Option<Due>,
    outcome: Option<Outcome>,
    seq: u64,
    /// The write that ends the step.
    step_seq: Option<u64>,
    actions: VecDeque<DestinationAction>,
}

impl DestinationSession {
    /// Owns nothing and waits for a source.
    #[must_use]
    pub fn idle(facts: LocalFacts) -> Self {
        let pull = Pull::new(facts.geometry);
        Self {
            step: DestinationStep::Idle,
            hello: None,
            migration: MigrationId::default(),
            incarnation: Incarnation::default(),
            foreign: false,
            epoch: facts.epoch,
            connected: false,
            welcomed: false,
            pull,
            away: Away::default(),
            offer: None,
            voided: None,
            greeting: None,
            kept: None,
            write_cache: true,
            digest: RemainingDigest::default(),
            start: None,
            source_synced: false,
            synced_recorded: false,
            retry_sync: None,
            outcome: None,
            seq: 0,
            step_seq: None,
            actions: VecDeque::new(),
            facts,
        }
    }

    /// Goes on after a restart of the daemon. `have` are the chunks installed here with their versions; `remaining`
    /// those that are at the source, with their write counts.
    #[must_use]
    pub fn resume(
        facts: LocalFacts,
        record: &DestinationRecord,
        epoch: Epoch,
        have: impl IntoIterator<Item = (ChunkId, Version)>,
        remaining: impl IntoIterator<Item = (ChunkId, u8)>,
    ) -> Self {
        let mut session = Self::idle(facts);
        session.migration = record.migration;
        session.incarnation = record.incarnation;
        session.epoch = epoch;
        session.write_cache = record.write_cache;
        session.digest = record.digest;
        session.step = match record.stage {
            DestinationStage::Receiving => DestinationStep::Receiving,
            DestinationStage::Prepared => DestinationStep::Prepared,
            DestinationStage::Active { .. } => DestinationStep::Active,
            DestinationStage::Complete => DestinationStep::Complete,
        };
        let synced = matches!(
            record.stage,
            DestinationStage::Active { source_synced: true } | DestinationStage::Complete
        );
        session.source_synced = synced;
        session.synced_recorded = synced;
        session.pull.restore(have);
        if record.stage != DestinationStage::Receiving {
            session.pull.restore_remaining(remaining);
        }
        session
    }

    /// The next thing to do, if any.
    pub fn poll_action(&mut self) -> Option<DestinationAction> {
        if self.actions.is_empty() {
            self.pump();
        }
        self.actions.pop_front()
    }

    /// Stage, in the words of the durable record.
    #[must_use]
    pub fn stage(&self) -> DestinationStage {
        match self.step {
            DestinationStep::Idle
            | DestinationStep::Clearing
            | DestinationStep::Keeping
            | DestinationStep::Pruning
            | DestinationStep::Adopting
            | DestinationStep::Receiving
            | DestinationStep::Preparing
            | DestinationStep::Dropping
            | DestinationStep::Left => DestinationStage::Receiving,
            DestinationStep::Prepared | DestinationStep::Voiding | DestinationStep::Activating => {
                DestinationStage::Prepared
            }
            DestinationStep::Active | DestinationStep::Completing => {
                DestinationStage::Active { source_synced: self.synced_recorded }
            }
            DestinationStep::Complete | DestinationStep::Settling => DestinationStage::Complete,
        }
    }

    /// The step, finer than the stage.
    #[must_use]
    pub fn step(&self) -> DestinationStep {
        self.step
    }

    /// The newest epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether a migration has been accepted.
    #[must_use]
    pub fn agreed(&self) -> bool {
        !matches!(
            self.step,
            DestinationStep::Idle
                | DestinationStep::Clearing
                | DestinationStep::Keeping
                | DestinationStep::Pruning
                | DestinationStep::Adopting
                | DestinationStep::Left
        )
    }

    /// What a device state must carry to be this handoff's; `None` before the offer is prepared.
    #[must_use]
    pub fn ticket(&self) -> Option<(MigrationId, Epoch, RemainingDigest)> {
        let prepared = self.stage() == DestinationStage::Prepared;
        prepared.then_some((self.migration, self.epoch, self.digest))
    }

    /// Counters.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.pull.progress()
    }

    // ---- steps and records ------------------------------------------------------------------------------------

    fn go(&mut self, to: DestinationStep) -> bool {
        let checked: Result<(), IllegalStep> = check_destination(self.step, to);
        debug_assert!(checked.is_ok(), "{checked:?}");
        if checked.is_ok() {
            self.step = to;
        }
        checked.is_ok()
    }

    fn persist(&mut self, stage: DestinationStage, remaining: Option<Vec<(ChunkId, u8, bool)>>) {
        let record = DestinationRecord {
            migration: self.migration,
            incarnation: self.incarnation,
            base: self.facts.base.clone(),
            stage,
            write_cache: self.write_cache,
            digest: self.digest,
        };
        self.persist_role(Role::Destination(record), remaining);
    }

    /// Records beside the steps that the source has synced its layer.
    fn persist_synced(&mut self) {
        let step_seq = self.step_seq;
        self.persist(DestinationStage::Active { source_synced: true }, None);
        self.step_seq = step_seq;
    }

    fn persist_role(&mut self, role: Role, remaining: Option<Vec<(ChunkId, u8, bool)>>) {
        self.seq += 1;
        self.step_seq = Some(self.seq);
        let record = MigrationRecord::V1 { volume: self.facts.volume, epoch: self.epoch, role };
        self.actions.push_back(DestinationAction::Persist { seq: self.seq, record, remaining });
    }

    /// A record is durable.
    pub fn handle_persisted(&mut self, _now: Duration, seq: u64) {
        if self.step_seq == Some(seq) {
            self.step_seq = None;
            self.end_step();
        } else if seq == self.seq && self.source_synced && !self.synced_recorded {
            self.synced_recorded = true;
            self.actions.push_back(DestinationAction::OpenFlush);
        }
        self.greet_again();
    }

    fn end_step(&mut self) {
        match self.step {
            // Nothing is known to be here any more, durably: now it may be dropped.
            DestinationStep::Clearing if self.facts.released && self.facts.replica.is_some() => {
                self.go(DestinationStep::Keeping);
                self.ask_what_is_current();
            }
            DestinationStep::Clearing | DestinationStep::Dropping => {
                self.actions.push_back(DestinationAction::Wipe);
            }
            DestinationStep::Adopting => {
                self.go(DestinationStep::Receiving);
                self.welcome();
            }
            DestinationStep::Preparing => self.prepared(),
            DestinationStep::Voiding => {
                self.go(DestinationStep::Receiving);
                self.ask_for_disk();
            }
            DestinationStep::Activating => self.activated(),
            DestinationStep::Completing => {
                self.go(DestinationStep::Complete);
                // Complete implies that nothing is left at the source that a flush could miss.
                self.synced_recorded = true;
                self.actions.push_back(DestinationAction::OpenFlush);
                self.send(Message::Complete { epoch: self.epoch });
            }
            DestinationStep::Settling => {
                self.go(DestinationStep::Left);
                self.actions.push_back(DestinationAction::Finished(Outcome::Released));
            }
            DestinationStep::Idle
            | DestinationStep::Keeping
            | DestinationStep::Pruning
            | DestinationStep::Receiving
            | DestinationStep::Prepared
            | DestinationStep::Active
            | DestinationStep::Complete
            | DestinationStep::Left => {}
        }
    }

    // ---- connection -------------------------------------------------------------------------------------------

    /// A source has connected; it greets first.
    pub fn handle_connected(&mut self, now: Duration) {
        if self.connected {
            // The source has noticed the end of the last connection first.
            self.handle_disconnected(now);
        }
        self.connected = true;
        self.welcomed = false;
    }

    /// The connection is lost; the source makes it again.
    pub fn handle_disconnected(&mut self, now: Duration) {
        self.source_gone(now);
        self.connected = false;
        self.welcomed = false;
        self.greeting = None;
        self.kept = None;
        self.offer = None;
        self.pull.disconnected();
        if let Some(start) = &mut self.start {
            start.asked = false;
        }
    }

    fn send(&mut self, message: Message) {
        if self.connected {
            self.actions.push_back(DestinationAction::Send(message));
        }
    }

    fn refuse(&mut self, reason: Refusal, text: impl Into<String>) {
        self.send(Message::Refuse { reason, text: text.into() });
    }

    /// Takes what the source says, on any stream.
    pub fn handle_message(&mut self, now: Duration, message: Message) {
        match message {
            Message::Hello(hello) => self.on_hello(hello),
            Message::Ping(number) => self.send(Message::Pong(number)),
            Message::Chunk(data) => self.on_chunk(data),
            Message::Keep { entries, last } => self.on_keep(&entries, last),
            // What comes before the handshake is over belongs to nothing.
            _ if !self.welcomed => {}
            Message::Announce { entries } => self.on_announce(&entries),
            Message::HotBase { chunks } => self.pull.add_hot_base(chunks),
            Message::Offer(offer) => self.on_offer(offer),
            Message::Granted { epoch } => self.on_granted(epoch),
            Message::Denied { reason, .. } => self.on_denied(reason),
            Message::Reclaimed { epoch } => self.on_reclaimed(epoch),
            Message::Synced { epoch } => self.on_synced(epoch),
            Message::PullFailed { chunk, reason } => self.on_pull_failed(now, chunk, reason),
            Message::Released { epoch } => self.on_released(epoch),
            Message::Cancel => self.on_cancel(),
            Message::Refuse { .. } | Message::Pong(_) => {}
            Message::Welcome(_)
            | Message::Replica { .. }
            | Message::Have { .. }
            | Message::Ack { .. }
            | Message::Prepared { .. }
            | Message::Mismatch { .. }
            | Message::Pull { .. }
            | Message::Activate { .. }
            | Message::Complete { .. }
            | Message::Cancelled => {
                self.refuse(Refusal::Protocol, "a source does not say that");
            }
        }
    }

    // ---- end --------------------------------------------------------------------------------------------------

    /// Everything is here: makes it durable.
    pub(super) fn consider_completion(&mut self) {
        if self.step == DestinationStep::Active
            && self.pull.finished()
            && self.retry_sync.is_none()
            && self.go(DestinationStep::Completing)
        {
            self.actions.push_back(DestinationAction::SyncVolume);
        }
    }

    /// Data and map were synced, or could not be.
    pub fn handle_synced(&mut self, now: Duration, ok: bool) {
        if self.step != DestinationStep::Completing {
            return;
        }
        if ok {
            self.persist(DestinationStage::Complete, None);
        } else {
            self.go(DestinationStep::Active);
            self.retry_sync = Some(Aside(now + RETRY));
        }
    }

    fn on_released(&mut self, epoch: Epoch) {
        if self.step == DestinationStep::Complete && epoch == self.epoch && self.go(DestinationStep::Settling)
        {
            self.persist_role(Role::Serving, None);
        }
    }

    fn on_cancel(&mut self) {
        if matches!(self.step, DestinationStep::Receiving | DestinationStep::Prepared) {
            self.leave(Outcome::Cancelled, Refusal::Cancelled);
        }
    }

    /// The operator of this side cancels.
    ///
    /// # Errors
    /// [`Refusal::Busy`] while the source may have granted the disk, or a record is being written;
    /// [`Refusal::StaleEpoch`] when this side owns the disk.
    pub fn handle_cancel(&mut self, _now: Duration) -> Result<(), Refusal> {
        match self.step {
            DestinationStep::Receiving | DestinationStep::Keeping => {
                self.refuse(Refusal::Cancelled, "cancelled by the operator of the destination");
                self.leave(Outcome::Cancelled, Refusal::Cancelled);
                Ok(())
            }
            DestinationStep::Idle | DestinationStep::Left | DestinationStep::Dropping => Ok(()),
            DestinationStep::Clearing
            | DestinationStep::Pruning
            | DestinationStep::Adopting
            | DestinationStep::Preparing
            | DestinationStep::Prepared
            | DestinationStep::Voiding
            | DestinationStep::Activating => Err(Refusal::Busy),
            DestinationStep::Active
            | DestinationStep::Completing
            | DestinationStep::Complete
            | DestinationStep::Settling => Err(Refusal::StaleEpoch),
        }
    }

    fn leave(&mut self, outcome: Outcome, reason: Refusal) {
        if self.start.is_some() {
            self.answer_start(false, Some(reason));
        }
        if self.go(DestinationStep::Dropping) {
            self.outcome = Some(outcome);
            self.pull.reset();
            self.persist_role(Role::Idle, None);
        }
    }

    // ---- time -------------------------------------------------------------------------------------------------

    /// When `handle_timeout` is wanted next.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Duration> {
        // While the ownership is being written it cannot be refused any more.
        let waits = self.step != DestinationStep::Activating;
        let start = self.start.filter(|_| waits).and_then(|start| start.deadline);
        let own = [start, self.retry_sync, self.pull.retry_at()].into_iter().flatten().map(|at| *at);
        own.chain(self.away_deadline()).min()
    }

    /// The time given by `next_timeout` has come.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.start.is_some_and(|start| start.deadline.is_some_and(|at| *at <= now))
            && self.step != DestinationStep::Activating
        {
            self.answer_start(false, None);
        }
        if self.retry_sync.is_some_and(|at| *at <= now) {
            self.retry_sync = None;
            self.consider_completion();
        }
        self.retry_pulls(now);
        self.away_timeout(now);
    }
}
