// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A daemon around a real volume and a real session. It stands for these parts of `src/node`, and does what they do in the
//! same order:
//!
//! - `node`: inputs one after the other, then everything that the session wants done, but for the time in which chunks
//!   are being marked; late results of an older run are dropped; the end of a migration;
//! - `jobs`: records one after the other and again until they are durable; captures, installs, fetches, syncs, upkeep;
//!   what drops content waits until nothing is being installed and no checkpoint is being written;
//! - `source`, `destination`, `signals`: what an action or an event of the volume means to volume, store and session.
//!
//! Not here: the front-end and its rings (the guest submits to the ports, the hypervisor is a model), the peer
//! connection (a model), the API. A record takes time before it is written and none while it is.

use crate::hypervisor::HvEvent;
use crate::tasks::Tasks;
use crate::world::{Event, Job, MS, NodeRole, SECOND, World};
use blkferry::core::destination::{DestinationAction, DestinationSession, Installed};
use blkferry::core::geometry::ChunkId;
use blkferry::core::message::{
    BaseIdentity, ChunkData, Epoch, Hello, Message, Purpose, Refusal, Version, VolumeId,
};
use blkferry::core::ownership::SourceStep;
use blkferry::core::progress::Outcome;
use blkferry::core::record::{DestinationStage, MigrationRecord, Role, SourceStage};
use blkferry::core::source::{Capture, SourceAction};
use blkferry::engine::SimDisk;
use blkferry::store::RemainingRun;
use blkferry::volume::{
    Closed, InstallPhase, Origin, Port, PortEvent, Transfer, TransferError, Volume, VolumeEvent, VolumeEvents,
};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Entries of the file `remaining`: chunk, write count, still remaining.
pub(crate) type RemainingEntries = Vec<(ChunkId, u8, bool)>;

#[derive(Debug)]
pub(crate) struct Write {
    run: u64,
    seq: u64,
    pub(crate) record: MigrationRecord,
    remaining: Option<RemainingEntries>,
}

/// The end of a task, with what the node does of it.
pub(crate) enum Done {
    Captured { chunk: ChunkId, capture: Capture },
    Installed { chunk: ChunkId, version: Version, installed: Installed },
    FetchedAhead(ChunkId),
    Fetched,
    LayerSynced(bool),
    VolumeSynced(bool),
    Marked(Result<(), TransferError>),
    Wiped(Result<(), TransferError>),
    Pruned(Result<Vec<(ChunkId, Version)>, TransferError>),
    Tidied { rotated: Result<bool, TransferError> },
    Reverted(Result<(), TransferError>),
}

/// What lives as long as a process.
pub(crate) struct Daemon {
    // Dropped in this order: tasks use the transfer, ports the volume.
    pub(crate) tasks: Tasks<(u64, Done)>,
    pub(crate) ports: Vec<Port>,
    pub(crate) transfer: Rc<Transfer>,
    pub(crate) events: VolumeEvents,
    pub(crate) volume: Arc<Volume>,
    pub(crate) dirty: Arc<AtomicBool>,
    /// Not serving yet: what had come is being taken back.
    pub(crate) starting: Option<blkferry::core::record::DestinationRecord>,
}

/// A host and its daemon.
pub(crate) struct Side {
    pub(crate) disk: SimDisk,
    pub(crate) base_disk: Option<SimDisk>,
    pub(crate) in_place: bool,
    pub(crate) base: BaseIdentity,
    pub(crate) daemon: Option<Daemon>,
    pub(crate) alive: bool,
    /// Number of this process.
    pub(crate) life: u64,
    /// Number of the migration run in it.
    pub(crate) run: u64,
    pub(crate) boot: u8,
    pub(crate) role: NodeRole,
    /// What the gate should be.
    pub(crate) gate: bool,
    pub(crate) write_cache: bool,
    pub(crate) conn: Option<u64>,
    pub(crate) volume_id: VolumeId,
    pub(crate) epoch: Epoch,
    pub(crate) virgin: bool,
    pub(crate) unwiped: bool,
    pub(crate) stop_hold: bool,
    pub(crate) start_hold: bool,
    pub(crate) writes: VecDeque<Write>,
    pub(crate) writing: bool,
    pub(crate) marking: bool,
    pub(crate) moving: u32,
    pub(crate) tidying: bool,
    pub(crate) owed: Option<bool>,
    pub(crate) installed: u32,
    pub(crate) data_lost: bool,
    pub(crate) precopy: bool,
    /// A sync of the layer has failed, and the daemon was started anew on the same boot.
    pub(crate) poisoned: bool,
    /// The newest record that is durable.
    pub(crate) record: MigrationRecord,
    /// Highest epoch that this side has given away, and has offered.
    pub(crate) granted: u64,
    pub(crate) offered: u64,
}

impl World {
    /// The daemon takes in what has happened to it; whether anything had.
    pub(crate) fn work(&mut self, side: usize) -> bool {
        let Some(daemon) = &mut self.sides[side].daemon else { return false };
        let mut answers = Vec::new();
        for port in &mut daemon.ports {
            port.wait(0, None).expect("a simulated engine");
            while let Some(event) = port.next() {
                if let PortEvent::Completed { token, status, bytes_read } = event {
                    answers.push((token.spend(), status, bytes_read));
                }
            }
        }
        if self.is_struck(side) {
            return true;
        }
        let mut busy = !answers.is_empty();
        for (id, status, bytes_read) in answers {
            self.answered(side, id, status, bytes_read);
        }
        while let Some(event) = self.sides[side].daemon.as_mut().and_then(|d| d.events.try_recv().ok()) {
            busy = true;
            self.on_volume(side, event);
        }
        let Some(daemon) = &mut self.sides[side].daemon else { return true };
        if daemon.dirty.swap(false, Ordering::SeqCst) {
            self.job(side, 20 * MS, Job::Drain);
        }
        let Some(daemon) = &mut self.sides[side].daemon else { return true };
        let ended = daemon.tasks.run();
        if self.is_struck(side) {
            return true;
        }
        for (run, done) in ended {
            busy = true;
            self.on_done(side, run, done);
        }
        busy
    }

    /// The process has died inside of something.
    fn is_struck(&mut self, side: usize) -> bool {
        let struck = self.sides[side].disk.is_dead();
        if struck {
            self.stats.strikes += 1;
            let host = self.dice.permille(self.plan.host_crash_permille);
            self.kill(side, host);
        }
        struck
    }

    /// Carries out everything that the session of a side wants done.
    pub(crate) fn pump(&mut self, side: usize) {
        self.follow_guest(side);
        while self.sides[side].alive && !self.sides[side].marking && !self.is_struck(side) {
            match &mut self.sides[side].role {
                NodeRole::Source(session) => match session.poll_action() {
                    Some(action) => self.apply_source(side, action),
                    None => break,
                },
                NodeRole::Destination(session) => match session.poll_action() {
                    Some(action) => self.apply_destination(side, action),
                    None => break,
                },
                NodeRole::Serving | NodeRole::Idle => break,
            }
        }
        self.follow_epoch(side);
    }

    fn follow_epoch(&mut self, side: usize) {
        let epoch = match &self.sides[side].role {
            NodeRole::Source(session) => session.epoch(),
            NodeRole::Destination(session) => session.epoch(),
            NodeRole::Serving | NodeRole::Idle => return,
        };
        self.sides[side].epoch = Epoch(self.sides[side].epoch.0.max(epoch.0));
    }

    /// What the hypervisor's model has changed at the side becomes so in the volume: the gate at a stop of the rings, and
    /// the guest's cache mode.
    fn follow_guest(&mut self, side: usize) {
        let s = &mut self.sides[side];
        let Some(daemon) = &s.daemon else { return };
        if !s.gate && daemon.volume.gate().is_open() {
            daemon.volume.gate().close(Closed::Offered);
        }
        if s.alive && s.write_cache != daemon.volume.write_cache() {
            daemon.volume.set_write_cache(s.write_cache);
            s.write_cache = daemon.volume.write_cache();
        }
    }

    fn spawn(&mut self, side: usize, future: impl Future<Output = Done> + 'static) {
        let run = self.sides[side].run;
        if let Some(daemon) = &mut self.sides[side].daemon {
            daemon.tasks.spawn(async move { (run, future.await) });
        }
    }

    pub(crate) fn transfer(&self, side: usize) -> Rc<Transfer> {
        Rc::clone(&self.sides[side].daemon.as_ref().expect("a daemon").transfer)
    }

    pub(crate) fn volume(&self, side: usize) -> Arc<Volume> {
        Arc::clone(&self.sides[side].daemon.as_ref().expect("a daemon").volume)
    }

    // ---- actions ------------------------------------------------------------------------------------------------

    fn apply_source(&mut self, side: usize, action: SourceAction) {
        let quiet = matches!(
            action,
            SourceAction::Send(_) | SourceAction::SendData(_) | SourceAction::Persist { .. }
        );
        if !quiet {
            self.tell(|| format!("{side} does {action:?}"));
        }
        match action {
            SourceAction::Send(message) => self.say(side, message),
            SourceAction::SendData(data) => {
                self.stats.pushes += u64::from(data.purpose == Purpose::Push);
                self.say(side, Message::Chunk(data));
            }
            SourceAction::Capture { chunk, .. } => {
                let transfer = self.transfer(side);
                self.spawn(side, async move {
                    let capture = match transfer.capture(chunk).await {
                        Ok(c) => Capture::Done { version: c.version, clean: c.clean, body: c.body },
                        Err(_) => Capture::Failed,
                    };
                    Done::Captured { chunk, capture }
                });
            }
            SourceAction::Persist { seq, record } => self.persist(side, seq, record, None),
            SourceAction::SyncLayer => {
                let transfer = self.transfer(side);
                self.spawn(side, async move { Done::LayerSynced(transfer.sync().await.is_ok()) });
            }
            SourceAction::OpenGate => self.open_gate(side),
            SourceAction::CloseGate => self.close_gate(side, Closed::Offered),
            SourceAction::RingsStopAnswered => {
                if std::mem::take(&mut self.sides[side].stop_hold) {
                    self.hv_event(HvEvent::StopAnswered(side));
                }
            }
            SourceAction::RingsStartAnswered { allowed, .. } => self.answer_start(side, allowed),
            SourceAction::Connect { not_before } => {
                let at = u64::try_from(not_before.as_micros()).expect("time").max(self.now);
                let delay = at - self.now + self.dice.delay(self.plan.net_delay);
                self.job(side, delay, Job::Connect);
            }
            SourceAction::Disconnect => {
                let in_order = self.dice.coin();
                self.hang_up(side, in_order);
            }
            SourceAction::Finished(outcome) => self.finish(side, &outcome),
        }
    }

    fn answer_start(&mut self, side: usize, allowed: bool) {
        if std::mem::take(&mut self.sides[side].start_hold) {
            self.hv_event(HvEvent::StartAnswered(side, allowed));
        }
    }

    fn apply_destination(&mut self, side: usize, action: DestinationAction) {
        let quiet = matches!(
            action,
            DestinationAction::Send(_)
                | DestinationAction::Install(_)
                | DestinationAction::Adopt(_)
                | DestinationAction::Persist { .. }
        );
        if !quiet {
            self.tell(|| format!("{side} does {action:?}"));
        }
        let transfer = self.transfer(side);
        match action {
            DestinationAction::Send(message) => self.say(side, message),
            DestinationAction::Adopt(hello) => self.adopt(side, &hello),
            DestinationAction::Install(data) => self.install(side, data),
            DestinationAction::MarkRemote { first, run } => {
                self.sides[side].marking = true;
                self.spawn(side, async move { Done::Marked(transfer.mark_remote(first, run).await) });
            }
            DestinationAction::FetchBase(chunk) => {
                self.sides[side].moving += 1;
                self.spawn(side, async move {
                    // It was only ahead of need.
                    drop(transfer.fetch_base(chunk).await);
                    Done::FetchedAhead(chunk)
                });
            }
            DestinationAction::Persist { seq, record, remaining } => {
                self.persist(side, seq, record, remaining);
            }
            DestinationAction::SyncVolume => {
                self.spawn(side, async move { Done::VolumeSynced(transfer.sync().await.is_ok()) });
            }
            DestinationAction::OpenGate => {
                self.volume(side).flush_gate().close();
                self.stats.handoffs += 1;
                self.open_gate(side);
                self.upkeep(side, true);
            }
            DestinationAction::OpenFlush => self.volume(side).flush_gate().open(),
            DestinationAction::SetWriteCache(on) => self.sides[side].write_cache = on,
            DestinationAction::StartAnswered { allowed, .. } => self.answer_start(side, allowed),
            DestinationAction::FailChunk { chunk, .. } | DestinationAction::FailWaiting(chunk) => {
                transfer.fail_waiters(chunk);
            }
            DestinationAction::Wipe => self.job(side, 0, Job::Wipe),
            DestinationAction::Prune(current) => self.job(side, 0, Job::Prune(current)),
            DestinationAction::Finished(outcome) => self.finish(side, &outcome),
        }
        self.follow_guest(side);
    }

    fn adopt(&mut self, side: usize, hello: &Hello) {
        let s = &mut self.sides[side];
        s.virgin = false;
        s.run += 1;
        s.volume_id = hello.volume;
        s.epoch = Epoch(s.epoch.0.max(hello.epoch.0));
        let Some(daemon) = &s.daemon else { return };
        let store = daemon.volume.store();
        let adopted = store.adopt(hello.volume, &hello.serial, hello.read_only, Some(hello.migration));
        store.map.keep_versions(true);
        self.tell(|| format!("{side} adopts: {adopted:?}"));
    }

    fn install(&mut self, side: usize, data: ChunkData) {
        let phase =
            if data.purpose == Purpose::Push { InstallPhase::Receiving } else { InstallPhase::Pulling };
        let transfer = self.transfer(side);
        self.sides[side].moving += 1;
        self.spawn(side, async move {
            let (chunk, version) = (data.chunk, data.version);
            let installed = match transfer.install(chunk, version, &data.body, phase).await {
                Ok(blkferry::volume::Installed::Done) => Installed::Done,
                Ok(blkferry::volume::Installed::Superseded) => Installed::Superseded,
                Err(_) => Installed::Failed,
            };
            Done::Installed { chunk, version, installed }
        });
    }

    pub(crate) fn finish(&mut self, side: usize, outcome: &Outcome) {
        self.follow_epoch(side);
        let source = matches!(self.sides[side].role, NodeRole::Source(_));
        let released = *outcome == Outcome::Released;
        if !(source && released) {
            let in_order = self.dice.coin();
            self.hang_up(side, in_order);
            self.sides[side].run += 1;
        }
        if source {
            self.volume(side).tracker().disarm();
        }
        match (source, released) {
            (true, true) => self.stats.completions += 1,
            (true, false) | (false, true) => {
                self.sides[side].role = NodeRole::Serving;
                self.open_gate(side);
            }
            (false, false) => {
                self.sides[side].role = NodeRole::Idle;
                self.close_gate(side, Closed::Idle);
            }
        }
    }

    pub(crate) fn open_gate(&mut self, side: usize) {
        self.sides[side].gate = true;
        self.check_owner(side);
        self.volume(side).gate().open();
    }

    pub(crate) fn close_gate(&mut self, side: usize, reason: Closed) {
        self.sides[side].gate = false;
        self.volume(side).gate().close(reason);
    }

    // ---- jobs ---------------------------------------------------------------------------------------------------

    fn persist(
        &mut self,
        side: usize,
        seq: u64,
        record: MigrationRecord,
        remaining: Option<RemainingEntries>,
    ) {
        let run = self.sides[side].run;
        self.sides[side].writes.push_back(Write { run, seq, record, remaining });
        self.next_write(side);
    }

    fn next_write(&mut self, side: usize) {
        if !self.sides[side].writing && !self.sides[side].writes.is_empty() {
            self.sides[side].writing = true;
            let delay = self.dice.delay(self.plan.disk.latency * 2);
            self.job(side, delay, Job::Persist);
        }
    }

    fn write_record(&mut self, side: usize) {
        self.maybe_strike(side, 8);
        let volume = self.volume(side);
        let Some(write) = self.sides[side].writes.front() else { return };
        let remaining = write.remaining.as_ref().map(|entries| {
            let MigrationRecord::V1 { epoch, .. } = &write.record;
            let run = |(first, count, still_remaining): &(ChunkId, u8, bool)| RemainingRun {
                first: *first,
                run: 1,
                count: *count,
                still_remaining: *still_remaining,
            };
            volume.store().store_remaining(*epoch, entries.iter().map(run)).map_err(|e| e.to_string())
        });
        let stored = remaining.unwrap_or(Ok(()));
        let stored =
            stored.and_then(|()| volume.store().record.store(&write.record).map_err(|e| e.to_string()));
        if self.is_struck(side) {
            return;
        }
        if let Err(error) = stored {
            self.tell(|| format!("{side} cannot write a record: {error}"));
            return self.job(side, SECOND, Job::Persist);
        }
        let Some(write) = self.sides[side].writes.pop_front() else { return };
        self.persisted(side, &write);
    }

    fn persisted(&mut self, side: usize, write: &Write) {
        let MigrationRecord::V1 { epoch, role, .. } = &write.record;
        self.tell(|| format!("{side} has durably {epoch:?} {role:?}"));
        self.is_durable(side, &write.record);
        self.sides[side].writing = false;
        self.next_write(side);
        if write.run != self.sides[side].run {
            return;
        }
        let now = self.clock();
        let volume = self.volume(side);
        match &mut self.sides[side].role {
            NodeRole::Source(session) => {
                let reclaiming = session.step() == SourceStep::Reclaiming;
                session.handle_persisted(now, write.seq);
                self.stats.reclaims += u64::from(reclaiming && session.step() != SourceStep::Reclaiming);
            }
            NodeRole::Destination(session) => {
                session.handle_persisted(now, write.seq);
                if session.stage() == DestinationStage::Prepared {
                    volume.store().map.set_handoff(session.epoch());
                }
            }
            NodeRole::Serving | NodeRole::Idle => {}
        }
    }

    /// A record is durable: what the rules say of it can be checked from now on.
    pub(crate) fn is_durable(&mut self, side: usize, record: &MigrationRecord) {
        let MigrationRecord::V1 { epoch, role, .. } = record;
        let s = &mut self.sides[side];
        s.record = record.clone();
        match role {
            Role::Source(r) if matches!(r.stage, SourceStage::Relinquished { .. }) => s.granted = epoch.0,
            Role::Source(r) if r.stage == SourceStage::Offered => s.offered = epoch.0,
            _ => {}
        }
    }

    pub(crate) fn take_job(&mut self, side: usize, run: u64, job: Job) {
        let current = run == self.sides[side].run;
        match job {
            Job::Persist => self.write_record(side),
            Job::Connect if current && matches!(self.sides[side].role, NodeRole::Source(_)) => {
                self.dial(side);
            }
            Job::Connect => {}
            Job::Drain => self.drain(side),
            Job::Wipe | Job::Prune(_) if self.sides[side].moving > 0 || self.sides[side].tidying => {
                let life = self.sides[side].life;
                self.after(2 * MS, Event::Job { side, life, run, job });
            }
            Job::Wipe => {
                self.maybe_strike(side, 30);
                self.sides[side].tidying = true;
                let transfer = self.transfer(side);
                self.spawn_for(side, run, async move { Done::Wiped(transfer.wipe().await) });
            }
            Job::Prune(list) => {
                self.maybe_strike(side, 30);
                self.sides[side].tidying = true;
                let transfer = self.transfer(side);
                self.spawn_for(side, run, async move { Done::Pruned(transfer.prune(&list).await) });
            }
            Job::TidiedUp => {
                self.sides[side].owed = Some(self.sides[side].owed.unwrap_or(false));
                self.tidied(side);
            }
        }
    }

    fn spawn_for(&mut self, side: usize, run: u64, future: impl Future<Output = Done> + 'static) {
        if let Some(daemon) = &mut self.sides[side].daemon {
            daemon.tasks.spawn(async move { (run, future.await) });
        }
    }

    pub(crate) fn upkeep(&mut self, side: usize, commit: bool) {
        let s = &mut self.sides[side];
        let commit = s.owed.take().unwrap_or(false) || commit;
        if s.tidying {
            s.owed = Some(commit);
            return;
        }
        s.tidying = true;
        self.maybe_strike(side, 30);
        let transfer = self.transfer(side);
        self.spawn(side, async move {
            if commit {
                // Tried again with the next.
                drop(transfer.sync().await);
            }
            Done::Tidied { rotated: transfer.maybe_rotate().await }
        });
    }

    fn tidied(&mut self, side: usize) {
        self.sides[side].tidying = false;
        if self.sides[side].owed.is_some() {
            self.upkeep(side, false);
        }
    }

    /// The process may die at one of the next changes of its disk.
    pub(crate) fn maybe_strike(&mut self, side: usize, within: u64) {
        if !self.calm && self.dice.permille(self.plan.strike_permille) {
            let at = self.dice.between(1, within);
            self.tell(|| format!("side {side} will die at its change {at}"));
            self.sides[side].disk.fail_at(at, blkferry::engine::sim::SimFault::Stop);
        }
    }

    pub(crate) fn drain(&mut self, side: usize) {
        self.follow_guest(side);
        let now = self.clock();
        let Some(daemon) = &self.sides[side].daemon else { return };
        let volume = Arc::clone(&daemon.volume);
        if let NodeRole::Source(session) = &mut self.sides[side].role {
            volume.tracker().drain(|chunk, passes, plain| session.handle_wrote(now, chunk, passes, plain));
        }
    }

    fn on_done(&mut self, side: usize, run: u64, done: Done) {
        // What is counted in a daemon by the task itself.
        match &done {
            Done::Installed { .. } | Done::FetchedAhead(_) => self.sides[side].moving -= 1,
            Done::Wiped(_) | Done::Pruned(_) => self.tidied(side),
            Done::Tidied { rotated: Ok(rotated) } => {
                self.stats.rotations += u64::from(*rotated);
                self.tidied(side);
            }
            Done::Tidied { rotated: Err(_) } => self.job(side, SECOND, Job::TidiedUp),
            Done::Marked(_) => self.sides[side].marking = false,
            Done::Fetched => self.stats.fetched += 1,
            _ => {}
        }
        if let Done::Reverted(result) = done {
            return self.reverted(side, result);
        }
        if run != self.sides[side].run {
            return;
        }
        let now = self.clock();
        match done {
            Done::Captured { chunk, capture } => {
                self.drain(side);
                self.stats.torn += u64::from(matches!(capture, Capture::Done { clean: false, .. }));
                if let NodeRole::Source(session) = &mut self.sides[side].role {
                    session.handle_captured(now, chunk, capture);
                }
            }
            Done::LayerSynced(ok) => {
                if let NodeRole::Source(session) = &mut self.sides[side].role {
                    session.handle_layer_synced(now, ok);
                }
            }
            Done::Installed { chunk, version, installed } => {
                self.tell(|| format!("{side} installed {chunk} {version:?}: {installed:?}"));
                self.stats.installed += u64::from(installed == Installed::Done);
                self.stats.superseded += u64::from(installed == Installed::Superseded);
                self.sides[side].installed += 1;
                if self.sides[side].installed.is_multiple_of(self.plan.commit_every) {
                    self.upkeep(side, true);
                }
                self.destination(side, |session| session.handle_installed(now, chunk, version, installed));
            }
            Done::FetchedAhead(chunk) => {
                self.destination(side, |session| session.handle_base_fetched(now, chunk));
            }
            Done::VolumeSynced(ok) => self.destination(side, |session| session.handle_synced(now, ok)),
            Done::Wiped(Ok(())) => self.destination(side, |session| session.handle_wiped(now)),
            Done::Pruned(Ok(kept)) => {
                self.tell(|| format!("side {side} has kept {kept:?}"));
                self.stats.kept += kept.len() as u64;
                self.destination(side, |session| session.handle_pruned(now, kept));
            }
            Done::Wiped(Err(error)) | Done::Pruned(Err(error)) => self.cannot_wipe(side, &error),
            Done::Marked(result) => self.tell(|| format!("{side} has marked: {result:?}")),
            Done::Fetched | Done::Tidied { .. } | Done::Reverted(_) => {}
        }
    }

    fn destination(&mut self, side: usize, tell: impl FnOnce(&mut DestinationSession)) {
        if let NodeRole::Destination(session) = &mut self.sides[side].role {
            tell(session);
        }
    }

    fn cannot_wipe(&mut self, side: usize, error: &TransferError) {
        self.sides[side].unwiped = true;
        self.tell(|| format!("side {side} cannot be emptied: {error}"));
        self.say(side, Message::Refuse { reason: Refusal::Io, text: error.to_string() });
        self.finish(side, &Outcome::Failed { reason: Refusal::Io, text: error.to_string() });
    }

    fn on_volume(&mut self, side: usize, event: VolumeEvent) {
        self.tell(|| format!("volume {side} tells {event:?}"));
        let now = self.clock();
        match event {
            VolumeEvent::Demand { chunk, origin: Origin::Base } => {
                let transfer = self.transfer(side);
                self.spawn(side, async move {
                    if transfer.fetch_base(chunk).await.is_err() {
                        transfer.fail_waiters(chunk);
                    }
                    Done::Fetched
                });
            }
            VolumeEvent::Demand { chunk, origin: Origin::Source } => match &mut self.sides[side].role {
                NodeRole::Destination(session) => session.handle_demand(now, chunk),
                NodeRole::Serving | NodeRole::Idle | NodeRole::Source(_) => {
                    panic!("{chunk} is said to be at a source, but there is none: {}", self.describe())
                }
            },
            VolumeEvent::Overwritten(chunk) => {
                self.stats.overwritten += 1;
                self.destination(side, |session| session.handle_overwritten(now, chunk));
            }
            VolumeEvent::Fault(_) => self.stats.faulty += 1,
            VolumeEvent::RotationDue => self.upkeep(side, false),
        }
    }
}
