// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The node: one queue of inputs, one owner of the role.
//!
//! ```text
//!   front-end --signals--+                                  +--> sessions (core) --actions--+
//!   volume ----events----+                                  |                               |
//!   peer ------messages--+--> inputs --> Node::take(input) -+                               v
//!   clients ---commands--+                                  +--> status          gate, holds, peer, jobs
//!   jobs ------results---+
//! ```
//!
//! `take` never waits. What the session wants done is drained after every input, so that an action never sits
//! behind the next event.

use super::admission::{self, Admission, Standing};
use super::away::SourceWatch;
use super::destination::DestinationDriver;
use super::drain::DrainPace;
use super::forced::ForcedOwner;
use super::holds::Holds;
use super::input::{Done, Input};
use super::jobs::Jobs;
use super::report::{Outcome, Report};
use super::source::SourceDriver;
use super::status::{Command, Denied, MigrationState, Snapshot};
use crate::config::Config;
use crate::core::destination::DestinationSession;
use crate::core::message::{BaseIdentity, Epoch, Message, Refusal, VolumeId};
use crate::core::ownership::DestinationStep;
use crate::core::record::{DestinationStage, MigrationRecord, Role, SourceStage};
use crate::frontend::server::Frontend;
use crate::peer::{LinkEvent, Throttle, TlsClient};
use crate::store::Store;
use crate::volume::{Closed, Transfer, Volume};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

/// What this node is.
pub(super) enum RoleDriver {
    /// Owns the disk.
    Serving,
    /// Owns nothing; may become a destination.
    Idle,
    /// Gives the disk away, or has given it away.
    Source(Box<SourceDriver>),
    /// Gets the disk.
    Destination(Box<DestinationDriver>),
}

/// What a node is made of; see the module's picture.
pub(super) struct Node {
    pub(super) config: Config,
    pub(super) volume: Arc<Volume>,
    pub(super) volume_id: VolumeId,
    pub(super) base: BaseIdentity,
    /// What this device offers; what the guest has chosen of it, if it has.
    pub(super) device_features: u64,
    pub(super) guest_features: Option<u64>,
    pub(super) epoch: Epoch,
    /// Nothing was ever kept here.
    pub(super) virgin: bool,
    /// What came in a migration that is off could not be dropped.
    pub(super) unwiped: bool,
    pub(super) incarnation: u64,
    pub(super) transfer: Rc<Transfer>,
    pub(super) store: Arc<Store>,
    pub(super) jobs: Jobs,
    pub(super) holds: Holds,
    pub(super) report: Report,
    pub(super) throttle: Throttle,
    pub(super) tls: Option<TlsClient>,
    pub(super) role: RoleDriver,
    pub(super) frontend: Frontend,
    pub(super) frontend_connected: bool,
    pub(super) rings_running: bool,
    /// Who waits for the volume to grow; no migration is armed meanwhile.
    pub(super) resizing: Option<oneshot::Sender<Result<(), Denied>>>,
    /// When the tracker is drained next, at the earliest.
    pub(super) drain: DrainPace,
    pub(super) wire_before: u64,
    pub(super) link_number: u64,
    pub(super) inputs: mpsc::UnboundedSender<Input>,
    pub(super) snapshots: watch::Sender<Snapshot>,
    pub(super) started: Instant,
    pub(super) fault: String,
    pub(super) source_watch: SourceWatch,
    pub(super) forced: ForcedOwner,
    /// What the last snapshot says.
    pub(super) shown: Option<(Standing, MigrationState)>,
}

impl Node {
    /// Time since an arbitrary origin, as the sessions want it.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes inputs until a shutdown is asked for. Nothing here happens only because time passes: many idle daemons on
    /// one host must cost nothing. Who wants to know how things are asks.
    pub(super) async fn run(mut self, mut inputs: mpsc::UnboundedReceiver<Input>) {
        // What was due before anybody listened is not told again.
        self.jobs.upkeep(false);
        loop {
            self.pump();
            let timeout = self.next_timeout();
            tokio::select! {
                input = inputs.recv() => match input {
                    Some(Input::Shutdown) | None => break,
                    Some(input) => self.take(input),
                },
                () = tokio::time::sleep(timeout) => self.handle_timeout(),
            }
        }
        self.publish();
    }

    fn next_timeout(&self) -> Duration {
        let at = match &self.role {
            RoleDriver::Source(source) => source.session.next_timeout(),
            RoleDriver::Destination(destination) => destination.session.next_timeout(),
            RoleDriver::Serving | RoleDriver::Idle => None,
        };
        at.map_or(Duration::from_secs(3600), |at| at.saturating_sub(self.now()))
    }

    fn handle_timeout(&mut self) {
        let now = self.now();
        match &mut self.role {
            RoleDriver::Source(source) => source.session.handle_timeout(now),
            RoleDriver::Destination(destination) => destination.session.handle_timeout(now),
            RoleDriver::Serving | RoleDriver::Idle => {}
        }
    }

    /// Carries out everything that the session wants done.
    fn pump(&mut self) {
        while !self.jobs.marking() {
            match &mut self.role {
                RoleDriver::Source(source) => match source.session.poll_action() {
                    Some(action) => self.apply_source(action),
                    None => break,
                },
                RoleDriver::Destination(destination) => match destination.session.poll_action() {
                    Some(action) => self.apply_destination(action),
                    None => break,
                },
                RoleDriver::Serving | RoleDriver::Idle => break,
            }
        }
        self.follow_epoch();
        self.follow_source();
        // An input may have moved the session before any action: compare with what was published, not with before.
        if self.shown != Some((self.standing(), self.migration_state())) {
            self.publish();
        }
    }

    fn follow_epoch(&mut self) {
        let epoch = match &self.role {
            RoleDriver::Source(source) => source.session.epoch(),
            RoleDriver::Destination(destination) => destination.session.epoch(),
            RoleDriver::Serving | RoleDriver::Idle => return,
        };
        self.epoch = Epoch(self.epoch.0.max(epoch.0));
    }

    /// Takes one input.
    fn take(&mut self, input: Input) {
        match input {
            Input::Signal(envelope) => self.on_signal(envelope),
            Input::Volume(event) => self.on_volume(event),
            Input::Command(command) => self.on_command(command),
            Input::Accepted(link) => self.on_accepted(link),
            Input::Greeted(link, hello) => {
                self.on_accepted(link);
                self.on_link(LinkEvent::Message(Message::Hello(*hello)));
            }
            Input::Link(number, event) if number == self.link_number => self.on_link(event),
            Input::Link(..) | Input::Shutdown => {}
            Input::Wrote => self.drain_soon(),
            Input::DrainDue => self.drain_due(),
            Input::Upkeep => self.jobs.upkeep(false),
            Input::Done(run, done) => self.on_done(run, done),
        }
    }

    /// What this node is, as far as commands care.
    pub(super) fn standing(&self) -> Standing {
        match &self.role {
            RoleDriver::Serving => Standing::Serving,
            RoleDriver::Idle => Standing::Idle,
            RoleDriver::Source(source) => match source.session.stage() {
                SourceStage::Pushing => Standing::Pushing,
                SourceStage::Offered => Standing::Offered,
                SourceStage::Relinquished { .. } => Standing::Relinquished,
                SourceStage::Released { .. } => Standing::Released,
            },
            RoleDriver::Destination(destination) if destination.session.step() == DestinationStep::Idle => {
                if destination.released {
                    Standing::Released
                } else {
                    Standing::Idle
                }
            }
            RoleDriver::Destination(destination) => match destination.session.stage() {
                DestinationStage::Receiving => Standing::Receiving,
                DestinationStage::Prepared => Standing::Prepared,
                DestinationStage::Active { .. } => Standing::Pulling,
                DestinationStage::Complete => Standing::Complete,
            },
        }
    }

    /// Whether the guest's disk is this node's now.
    pub(super) fn owns(&self) -> bool {
        matches!(
            self.standing(),
            Standing::Serving | Standing::Pushing | Standing::Pulling | Standing::Complete
        )
    }

    pub(super) fn source_mut(&mut self) -> Option<&mut SourceDriver> {
        match &mut self.role {
            RoleDriver::Source(source) => Some(source),
            RoleDriver::Serving | RoleDriver::Idle | RoleDriver::Destination(_) => None,
        }
    }

    pub(super) fn destination_mut(&mut self) -> Option<&mut DestinationDriver> {
        match &mut self.role {
            RoleDriver::Destination(destination) => Some(destination),
            RoleDriver::Serving | RoleDriver::Idle | RoleDriver::Source(_) => None,
        }
    }

    pub(super) fn become_source(&mut self, driver: SourceDriver) {
        self.role = RoleDriver::Source(Box::new(driver));
    }

    pub(super) fn become_destination(&mut self, driver: DestinationDriver) {
        self.role = RoleDriver::Destination(Box::new(driver));
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Migrate(request, answer) => {
                let result = match admission::migrate(self.standing()) {
                    Admission::Accept if self.resizing.is_some() => {
                        Err(Denied::new("busy", "the volume is being resized: ask again"))
                    }
                    Admission::Accept if self.lost_chunks() > 0 => {
                        Err(admission::not_whole(self.lost_chunks()))
                    }
                    Admission::Accept => self.arm(&request),
                    Admission::Deny(denied) => Err(denied),
                };
                // A client that went away does not want the answer.
                let _ = answer.send(result);
            }
            Command::Cancel(answer) => {
                let _ = answer.send(self.cancel());
            }
            Command::Resize(size, answer) => self.resize(size, answer),
            Command::Refresh(answer) => {
                self.publish();
                let _ = answer.send(Ok(()));
                return;
            }
        }
        self.publish();
    }

    fn cancel(&mut self) -> Result<(), Denied> {
        match admission::cancel(self.standing()) {
            Admission::Accept => {}
            Admission::Deny(denied) => return Err(denied),
        }
        let now = self.now();
        let result = match &mut self.role {
            RoleDriver::Source(source) => source.session.handle_cancel(now),
            RoleDriver::Destination(destination) => destination.session.handle_cancel(now),
            RoleDriver::Serving | RoleDriver::Idle => Ok(()),
        };
        result.map_err(|reason| {
            let code = if reason == Refusal::Busy { "busy" } else { "handed-over" };
            Denied::new(code, format!("the migration cannot be cancelled now: {reason:?}"))
        })
    }

    fn on_done(&mut self, run: u64, done: Done) {
        if let Done::Persisted { .. } = done {
            self.jobs.persisted();
        }
        if let Done::Marked(Ok(())) = done {
            self.jobs.marked();
        }
        // No part of a migration.
        if let Done::Resized(result) = done {
            return self.on_resized(result);
        }
        if run != self.jobs.run() {
            return;
        }
        let now = self.now();
        match done {
            Done::PersistFailed(error) => {
                self.fault(&format!("the migration record cannot be written, and is tried again: {error}"));
            }
            Done::Connected(result) => self.on_connected(result),
            Done::Captured { chunk, capture } => {
                // What was written while the capture ran must be known before it is judged.
                self.drain_tracker();
                if let Some(source) = self.source_mut() {
                    source.session.handle_captured(now, chunk, capture);
                }
            }
            Done::LayerSynced(ok) => {
                if let Some(source) = self.source_mut() {
                    source.session.handle_layer_synced(now, ok);
                }
            }
            Done::Persisted { seq } => match &mut self.role {
                RoleDriver::Source(source) => source.session.handle_persisted(now, seq),
                RoleDriver::Destination(destination) => {
                    destination.session.handle_persisted(now, seq);
                    // Commits from here on are commits of a disk that was handed over.
                    if destination.session.stage() == DestinationStage::Prepared {
                        self.store.map.set_handoff(destination.session.epoch());
                    }
                }
                RoleDriver::Serving | RoleDriver::Idle => {}
            },
            Done::Installed { chunk, version, installed } => {
                self.count_installed();
                if let Some(destination) = self.destination_mut() {
                    destination.session.handle_installed(now, chunk, version, installed);
                }
            }
            Done::BaseFetched { chunk } => {
                if let Some(destination) = self.destination_mut() {
                    destination.session.handle_base_fetched(now, chunk);
                }
            }
            Done::VolumeSynced(ok) => {
                if let Some(destination) = self.destination_mut() {
                    destination.session.handle_synced(now, ok);
                }
            }
            Done::Marked(Ok(())) | Done::Resized(_) => {}
            Done::Marked(Err(error)) => self.fault(&format!("chunks cannot be marked remote yet: {error}")),
            Done::Wiped(result) => self.on_dropped(result, |session, ()| session.handle_wiped(now)),
            Done::Pruned(result) => {
                self.on_dropped(result, |session, kept| session.handle_pruned(now, kept));
            }
        }
    }

    /// What had come before was dropped, or could not be.
    fn on_dropped<T>(&mut self, result: Result<T, String>, tell: impl FnOnce(&mut DestinationSession, T)) {
        if result.is_ok() && std::mem::take(&mut self.unwiped) {
            // What could not be dropped before is dropped now.
            self.fault.clear();
        }
        match (result, self.destination_mut()) {
            (Ok(kept), Some(destination)) => tell(&mut destination.session, kept),
            (Ok(_), None) => {}
            (Err(error), _) => self.cannot_wipe(&error),
        }
    }

    /// A destination that cannot be emptied can take nothing in.
    fn cannot_wipe(&mut self, error: &str) {
        self.unwiped = true;
        let text = format!("the volume cannot be emptied for a migration: {error}");
        self.fault(&text);
        self.send(Message::Refuse { reason: Refusal::Io, text: text.clone() });
        self.finish(Outcome::Failed { reason: Refusal::Io, text });
    }

    /// A migration has ended at this side.
    pub(super) fn finish(&mut self, outcome: Outcome) {
        // An epoch that a record names is never used again.
        self.follow_epoch();
        match &outcome {
            Outcome::Completed => log::info!("migration completed"),
            Outcome::Cancelled => log::info!("migration cancelled"),
            Outcome::Failed { reason, text } => log::error!("migration failed ({reason:?}): {text}"),
        }
        self.publish();
        self.report.ended(&outcome);
        if !matches!((&self.role, &outcome), (RoleDriver::Source(_), Outcome::Completed)) {
            self.drop_link();
            // What is still under way, a connection for one, is nobody's now.
            self.jobs.begin_run();
        }
        let gives = matches!(self.role, RoleDriver::Source(_));
        if gives {
            self.volume.tracker().disarm();
        }
        match (gives, &outcome) {
            // Keeps saying that it has let go, until the same disk comes back.
            (true, Outcome::Completed) => {}
            (true, _) | (false, Outcome::Completed) => {
                self.role = RoleDriver::Serving;
                self.open_gate();
            }
            (false, _) => {
                self.role = RoleDriver::Idle;
                self.close_gate(Closed::Idle);
            }
        }
        self.publish();
    }

    pub(super) fn open_gate(&mut self) {
        self.volume.gate().open();
    }

    pub(super) fn close_gate(&mut self, reason: Closed) {
        self.volume.gate().close(reason);
    }

    /// Something is wrong with this volume that an operator must see.
    pub(super) fn fault(&mut self, text: &str) {
        log::error!("{text}");
        text.clone_into(&mut self.fault);
    }

    /// Makes this node the owner of a disk that no migration brought: durable before the guest runs.
    pub(super) fn claim(&mut self) -> Result<(), String> {
        if self.unwiped {
            return Err("what is left of another volume could not be dropped: restart this daemon".to_owned());
        }
        self.drop_link();
        if !std::mem::take(&mut self.virgin) && matches!(self.standing(), Standing::Idle) {
            // What was here belonged to a migration that did not come to its end: this is another disk.
            self.volume_id = VolumeId(*uuid::Uuid::new_v4().as_bytes());
            let (serial, read_only) = (&self.config.serial, self.config.read_only);
            self.store.adopt(self.volume_id, serial, read_only, None).map_err(|e| e.to_string())?;
            self.frontend.set_serial(serial);
        }
        let record = MigrationRecord::V1 { volume: self.volume_id, epoch: self.epoch, role: Role::Serving };
        self.store.record.store(&record).map_err(|e| e.to_string())?;
        self.role = RoleDriver::Serving;
        self.open_gate();
        Ok(())
    }

    /// State of the migration in QEMU's words.
    pub(super) fn migration_state(&self) -> MigrationState {
        match self.standing() {
            Standing::Serving | Standing::Idle => MigrationState::None,
            Standing::Pushing | Standing::Receiving => {
                let agreed = match &self.role {
                    RoleDriver::Source(source) => source.session.agreed(),
                    RoleDriver::Destination(destination) => destination.session.agreed(),
                    RoleDriver::Serving | RoleDriver::Idle => false,
                };
                if agreed { MigrationState::Active } else { MigrationState::Setup }
            }
            Standing::Offered | Standing::Prepared => MigrationState::PreSwitchover,
            Standing::Relinquished | Standing::Pulling => MigrationState::PostcopyActive,
            Standing::Released | Standing::Complete => MigrationState::Completed,
        }
    }
}
