// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A daemon around a session: carries out what the session wants as `node` does, writes records, dies, comes back.

use crate::bounds::Bounds;
use crate::seen::Seen;
use crate::world::{Beside, Conn, DESTINATION, Job, NOW, Role, Rule, SOURCE, World, Write};
use blkferry::core::chunk::ChunkState;
use blkferry::core::destination::{DestinationAction, DestinationSession, Installed};
use blkferry::core::geometry::ChunkId;
use blkferry::core::message::{ChunkData, Epoch, Message, Purpose, Version};
use blkferry::core::progress::Outcome;
use blkferry::core::record::{DestinationStage, MigrationRecord, Role as RecordRole, SourceStage};
use blkferry::core::source::{SourceAction, SourceSession};

impl World {
    /// Carries out everything that the session of a side wants done.
    pub(crate) fn pump(&mut self, side: usize) {
        loop {
            match &mut self.side_mut(side).role {
                Role::Source(session) => match session.poll_action() {
                    Some(action) => self.apply_source(action),
                    None => break,
                },
                Role::Destination(session) => match session.poll_action() {
                    Some(action) => self.apply_destination(action),
                    None => break,
                },
                Role::Serving | Role::Idle => break,
            }
            self.follow_epoch(side);
        }
        self.follow_epoch(side);
    }

    fn follow_epoch(&mut self, side: usize) {
        let s = self.side_mut(side);
        let epoch = match &s.role {
            Role::Source(session) => session.epoch(),
            Role::Destination(session) => session.epoch(),
            Role::Serving | Role::Idle => return,
        };
        s.epoch = s.epoch.max(epoch);
    }

    fn apply_source(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(message) => self.say(SOURCE, message),
            SourceAction::SendData(data) => self.send_data(data),
            SourceAction::Capture { chunk, .. } => {
                let s = self.side_mut(SOURCE);
                let job = match s.volume.chunk(chunk).state {
                    ChunkState::Installing => Job::Capture(chunk, None),
                    _ => Job::Capture(chunk, s.volume.begin_capture(chunk)),
                };
                self.start(SOURCE, job);
            }
            SourceAction::Persist { seq, record } => self.persist(SOURCE, seq, record, None),
            SourceAction::SyncLayer => {
                let will_be_safe = self.snapshot(SOURCE);
                self.start(SOURCE, Job::SyncLayer(will_be_safe));
            }
            SourceAction::OpenGate => self.open_gate(SOURCE),
            SourceAction::CloseGate => self.side_mut(SOURCE).gate = false,
            SourceAction::RingsStopAnswered => self.side_mut(SOURCE).stop_wait = false,
            SourceAction::RingsStartAnswered { allowed, .. } => {
                let s = self.side_mut(SOURCE);
                if std::mem::take(&mut s.start_wait) {
                    s.rings = allowed;
                }
                if !allowed {
                    self.see(Seen::LateStartRefused);
                }
            }
            SourceAction::Connect { .. } => self.side_mut(SOURCE).dial = true,
            SourceAction::Disconnect => self.hang_up(SOURCE),
            SourceAction::Finished(outcome) => self.finish(SOURCE, &outcome),
        }
    }

    fn apply_destination(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Send(message) => self.say(DESTINATION, message),
            DestinationAction::Adopt(hello) => {
                let s = self.side_mut(DESTINATION);
                s.virgin = false;
                s.volume_id = hello.volume;
                s.epoch = s.epoch.max(hello.epoch);
            }
            DestinationAction::Install(data) => self.claim(data),
            DestinationAction::MarkRemote { first, run } => {
                let s = self.side_mut(DESTINATION);
                (first.0..first.0 + run).for_each(|chunk| s.volume.mark_remote(ChunkId(chunk)));
            }
            DestinationAction::FetchBase(_) => self.fail(Rule::NoPanic, "a fetch that nobody asked for"),
            DestinationAction::Persist { seq, record, remaining } => {
                if let Some(list) = &remaining {
                    self.check_offer(list);
                }
                self.persist(DESTINATION, seq, record, remaining);
            }
            DestinationAction::SyncVolume => {
                let will_be_safe = self.snapshot(DESTINATION);
                self.start(DESTINATION, Job::SyncVolume(will_be_safe));
            }
            DestinationAction::OpenGate => {
                self.side_mut(DESTINATION).flush_gate = false;
                self.see(Seen::Handoff);
                self.check_handoff();
                self.open_gate(DESTINATION);
                if let Some(will_be_safe) = self.snapshot(DESTINATION) {
                    self.start(DESTINATION, Job::Upkeep(Some(will_be_safe)));
                }
            }
            DestinationAction::OpenFlush => self.side_mut(DESTINATION).flush_gate = true,
            DestinationAction::SetWriteCache(on) => self.side_mut(DESTINATION).write_cache = on,
            DestinationAction::StartAnswered { allowed, .. } => {
                let s = self.side_mut(DESTINATION);
                if std::mem::take(&mut s.start_wait) {
                    s.rings = allowed;
                }
                if !allowed {
                    self.see(Seen::StartDenied);
                }
            }
            // No disk comes back here, and no policy makes errors of a source that is away.
            DestinationAction::Prune(_) | DestinationAction::FailWaiting(_) => {}
            DestinationAction::FailChunk { chunk, .. } => {
                self.side_mut(DESTINATION).volume.chunk_mut(chunk).demanded = false;
                self.see(Seen::LostByName);
            }
            DestinationAction::Wipe => self.start(DESTINATION, Job::Wipe),
            DestinationAction::Finished(outcome) => self.finish(DESTINATION, &outcome),
        }
    }

    /// A session has ended.
    fn finish(&mut self, side: usize, outcome: &Outcome) {
        let source = side == SOURCE;
        match outcome {
            Outcome::Released => self.see(if source { Seen::Released } else { Seen::Settled }),
            Outcome::Cancelled => self.see(Seen::Cancelled),
            Outcome::Failed { .. } => self.see(Seen::Failed),
        }
        if source {
            self.side_mut(side).tracked = None;
            if *outcome == Outcome::Released {
                return;
            }
        }
        self.hang_up(side);
        let serves = source || *outcome == Outcome::Released;
        let s = self.side_mut(side);
        s.jobs.clear();
        s.writes.iter_mut().for_each(|write| write.told = false);
        s.dial = false;
        s.stop_wait = false;
        if serves {
            s.role = Role::Serving;
            self.open_gate(side);
        } else {
            s.role = Role::Idle;
            s.gate = false;
            s.start_wait = false;
        }
    }

    pub(crate) fn open_gate(&mut self, side: usize) {
        self.check_owner(side);
        self.side_mut(side).gate = true;
    }

    // ---- jobs ---------------------------------------------------------------------------------------------------

    pub(crate) fn start(&mut self, side: usize, job: Job) {
        let jobs = &mut self.side_mut(side).jobs;
        jobs.push(job);
        jobs.sort_by_key(Job::key);
    }

    /// The layer as it is now, where hosts crash.
    pub(crate) fn snapshot(&self, side: usize) -> Option<crate::volume::Volume> {
        let s = self.side(side);
        s.safe.as_ref().map(|_| s.volume.clone())
    }

    fn claim(&mut self, data: ChunkData) {
        let s = self.side_mut(DESTINATION);
        if s.volume.chunk(data.chunk).free() {
            self.begin_install(data);
        } else {
            s.volume.chunk_mut(data.chunk).claimed = true;
            self.start(DESTINATION, Job::Claim(data));
        }
    }

    pub(crate) fn begin_install(&mut self, data: ChunkData) {
        let s = self.side_mut(DESTINATION);
        if s.volume.begin_install(data.chunk, data.version, data.purpose == Purpose::Push) {
            return self.start(DESTINATION, Job::Install(data));
        }
        self.see(Seen::Superseded);
        self.installed(data.chunk, data.version, Installed::Superseded);
    }

    pub(crate) fn installed(&mut self, chunk: ChunkId, version: Version, result: Installed) {
        if let Some(session) = self.destination_mut() {
            session.handle_installed(NOW, chunk, version, result);
        }
    }

    pub(crate) fn drain(&mut self) {
        let Some(tracked) = &mut self.side_mut(SOURCE).tracked else { return };
        let written = std::mem::take(tracked);
        if let Some(session) = self.source_mut() {
            written.into_iter().for_each(|chunk| session.handle_wrote(NOW, chunk, 1, 1));
        }
    }

    // ---- records ------------------------------------------------------------------------------------------------

    fn persist(
        &mut self,
        side: usize,
        seq: u64,
        record: MigrationRecord,
        remaining: Option<Vec<(ChunkId, u8, bool)>>,
    ) {
        self.side_mut(side).writes.push_back(Write { told: true, seq: Beside(seq), record, remaining });
    }

    pub(crate) fn make_durable(&mut self, side: usize, write: &Write) {
        let MigrationRecord::V1 { epoch, role, .. } = &write.record;
        let s = self.side_mut(side);
        let mut synced = false;
        match role {
            RecordRole::Destination(r) if r.stage == DestinationStage::Prepared => {
                s.remaining.clone_from(&write.remaining);
                if let Some(safe) = &mut s.safe {
                    safe.since_prepared = false;
                }
            }
            RecordRole::Source(r) => match r.stage {
                SourceStage::Relinquished { synced: now } => (s.granted, synced) = (epoch.0, now),
                SourceStage::Offered => s.offered = epoch.0,
                SourceStage::Pushing | SourceStage::Released { .. } => {}
            },
            RecordRole::Destination(_) | RecordRole::Serving | RecordRole::Idle => {}
        }
        s.record = write.record.clone();
        if let Some(safe) = &mut s.safe {
            safe.same_boot = true;
        }
        if synced {
            self.check_synced();
        }
    }

    pub(crate) fn persisted(&mut self, side: usize) {
        let Some(write) = self.side_mut(side).writes.pop_front() else { return };
        self.make_durable(side, &write);
        if !write.told {
            return;
        }
        match &mut self.side_mut(side).role {
            Role::Source(session) => session.handle_persisted(NOW, write.seq.0),
            Role::Destination(session) => session.handle_persisted(NOW, write.seq.0),
            Role::Serving | Role::Idle => {}
        }
    }

    // ---- death and return ---------------------------------------------------------------------------------------

    /// A daemon dies and comes back; what was being recorded is durable or not. Coming back at once is no loss of
    /// generality: until something is delivered to it, a daemon that is back does what a dead one does.
    pub(crate) fn crash(&mut self, bounds: &Bounds, side: usize, landed: bool, host: Option<bool>) {
        let write = self.side_mut(side).writes.pop_front();
        if let Some(write) = write.filter(|_| landed) {
            self.make_durable(side, &write);
        }
        self.hang_up(side);
        if host.is_some()
            && let Some(conn) = &mut self.conn
        {
            // Nothing of what it said last arrives.
            let conn = conn.edit();
            conn.control[side].clear();
            if side == SOURCE {
                conn.data.clear();
            }
        }
        let s = self.side_mut(side);
        s.life += 1;
        (s.gate, s.dial, s.stop_wait, s.start_wait) = (false, false, false, false);
        s.role = Role::Idle;
        s.tracked = None;
        s.jobs.clear();
        s.writes.clear();
        s.volume.kill();
        if let Some(newer) = host {
            self.host_crash(side, newer);
        }
        let op = self.guest.op.take_if(|op| host.is_some() && op.side == side);
        self.restart(bounds, side);
        if host.is_some() {
            self.guest_after_host_crash(side, op);
        }
    }

    fn host_crash(&mut self, side: usize, newer: bool) {
        let s = self.side_mut(side);
        s.rings = false;
        let MigrationRecord::V1 { role, .. } = &s.record;
        let revert = matches!(role, RecordRole::Destination(r)
            if matches!(r.stage, DestinationStage::Prepared | DestinationStage::Active { .. }));
        let Some(safe) = &mut s.safe else { return };
        s.volume.host_crash(&safe.volume, newer);
        if revert && !safe.since_prepared {
            let list = s.remaining.clone().unwrap_or_default();
            s.volume.revert(list.into_iter().map(|(chunk, ..)| chunk));
        }
        safe.volume = s.volume.clone();
        safe.same_boot = false;
    }

    fn restart(&mut self, bounds: &Bounds, side: usize) {
        let s = self.side_mut(side);
        let MigrationRecord::V1 { volume, epoch, role } = s.record.clone();
        (s.volume_id, s.epoch) = (volume, epoch);
        (s.flush_gate, s.data_lost) = (true, false);
        match role {
            RecordRole::Serving => {
                s.role = Role::Serving;
                self.open_gate(side);
            }
            RecordRole::Idle => {
                s.volume.wipe();
                if let Some(safe) = &mut s.safe {
                    safe.volume = s.volume.clone();
                }
                s.role = Role::Idle;
            }
            RecordRole::Source(record) => {
                let same_boot = s.safe.as_ref().is_none_or(|safe| safe.same_boot);
                let exposed = matches!(
                    record.stage,
                    SourceStage::Offered | SourceStage::Relinquished { synced: false }
                );
                s.tracked = Some(Vec::new());
                s.data_lost = !same_boot && exposed;
                let (modified, lost) = (s.volume.modified(), s.data_lost);
                let params = self.arm_params(bounds, record.migration);
                let session = SourceSession::resume(NOW, params, &record, epoch, modified, lost);
                self.side_mut(side).role = Role::Source(Box::new(session));
                if record.stage == SourceStage::Pushing {
                    self.open_gate(side);
                }
            }
            RecordRole::Destination(record) => self.resume_destination(bounds, &record, epoch),
        }
        if let Some(op) = self.guest.op.filter(|op| op.side == side) {
            // The front-end asks again for what was not answered.
            self.side_mut(side).volume.begin(op.chunk, op.touch, op.value);
        }
        self.pump(side);
    }

    fn resume_destination(
        &mut self,
        bounds: &Bounds,
        record: &blkferry::core::record::DestinationRecord,
        epoch: Epoch,
    ) {
        let facts = self.facts(bounds);
        let s = self.side_mut(DESTINATION);
        let have: Vec<_> =
            s.volume.modified().into_iter().map(|c| (c, Version(s.volume.chunk(c).version))).collect();
        let count = |chunk: ChunkId| {
            let known = s.remaining.iter().flatten().find(|(at, ..)| *at == chunk);
            (chunk, known.map_or(0, |(_, count, _)| *count))
        };
        let remaining: Vec<_> = s.volume.with_lasting(ChunkState::Remote).into_iter().map(count).collect();
        let session = DestinationSession::resume(facts, record, epoch, have, remaining);
        s.flush_gate = record.stage != DestinationStage::Active { source_synced: false };
        s.virgin = false;
        s.write_cache = record.write_cache;
        s.role = Role::Destination(Box::new(session));
        if matches!(record.stage, DestinationStage::Active { .. } | DestinationStage::Complete) {
            self.open_gate(DESTINATION);
        }
    }

    // ---- the connection -----------------------------------------------------------------------------------------

    /// The source dials.
    pub(crate) fn dial(&mut self, bounds: &Bounds) {
        self.side_mut(SOURCE).dial = false;
        self.conn = Some(crate::shared::Shared::new(Conn::new()));
        match &self.side(DESTINATION).role {
            Role::Serving => {
                let text = String::new();
                let reason = blkferry::core::message::Refusal::Busy;
                self.say(DESTINATION, Message::Refuse { reason, text });
            }
            Role::Idle => {
                let session = DestinationSession::idle(self.facts(bounds));
                self.side_mut(DESTINATION).role = Role::Destination(Box::new(session));
            }
            Role::Source(_) | Role::Destination(_) => {}
        }
        if let Some(session) = self.destination_mut() {
            session.handle_connected(NOW);
        }
        self.pump(DESTINATION);
        if let Some(session) = self.source_mut() {
            session.handle_connected(NOW);
        }
    }

    fn open_conn(&mut self, side: usize) -> Option<&mut Conn> {
        let conn = self.conn.as_mut()?;
        (!conn.get().cut && conn.get().up[side]).then(|| conn.edit())
    }

    pub(crate) fn say(&mut self, side: usize, message: Message) {
        self.check_said(side, &message);
        self.see_said(side, &message);
        if let Some(conn) = self.open_conn(side) {
            conn.control[side].push_back(message);
        }
    }

    fn send_data(&mut self, data: ChunkData) {
        self.see_sent(&data);
        if let Some(conn) = self.open_conn(SOURCE) {
            conn.data.push(data);
            conn.data.sort_by_key(|data| (data.chunk, data.version, data.epoch, data.purpose as u8));
        }
    }

    /// An end closes its connection, or dies: what it said may still arrive.
    pub(crate) fn hang_up(&mut self, side: usize) {
        let Some(conn) = &mut self.conn else { return };
        let conn = conn.edit();
        conn.cut = true;
        conn.up[side] = false;
        conn.control[1 - side].clear();
        if side == DESTINATION {
            conn.data.clear();
        }
        if conn.up == [false, false] {
            self.conn = None;
        }
    }

    /// An end notices that its connection is gone.
    pub(crate) fn notice(&mut self, side: usize) {
        self.hang_up(side);
        match &mut self.side_mut(side).role {
            Role::Source(session) => session.handle_disconnected(NOW),
            Role::Destination(session) => session.handle_disconnected(NOW),
            Role::Serving | Role::Idle => {}
        }
    }
}

impl Job {
    /// Puts jobs into one order, so that the order in which they began tells no states apart.
    fn key(&self) -> (u8, u32, u64) {
        match self {
            Self::Capture(chunk, _) => (0, chunk.0, 0),
            Self::Claim(data) => (1, data.chunk.0, data.version.0),
            Self::Install(data) => (2, data.chunk.0, data.version.0),
            Self::SyncLayer(_) => (3, 0, 0),
            Self::SyncVolume(_) => (4, 0, 0),
            Self::Upkeep(_) => (5, 0, 0),
            Self::Wipe => (6, 0, 0),
        }
    }
}
