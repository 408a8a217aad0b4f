// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A daemon around a session: carries out actions as `node` does, with time between the asking and the end.

use crate::hypervisor::HvEvent;
use crate::volume::{BLOCKS, bits};
use crate::world::{CaptureJob, Event, Job, MS, NodeRole, SyncFor, World, Write};
use blkferry::core::chunk::ChunkState;
use blkferry::core::destination::{DestinationAction, DestinationSession, Installed, LocalFacts};
use blkferry::core::geometry::{BlockMask, ChunkId};
use blkferry::core::heat::Counting;
use blkferry::core::message::{Body, ChunkData, Epoch, Hello, Incarnation, Message, MigrationId, Version};
use blkferry::core::ownership::{DestinationStep, SourceStep};
use blkferry::core::progress::Outcome;
use blkferry::core::record::{DestinationStage, MigrationRecord, Role, SourceStage};
use blkferry::core::source::{ArmParams, Capture, SourceAction, SourceSession};
use blkferry::core::strategy::Strategy;
use std::collections::BTreeMap;
use std::time::Duration;

impl World {
    /// Carries out everything that the session of a side wants done.
    pub(crate) fn pump(&mut self, side: usize) {
        if !self.sides[side].alive {
            return;
        }
        loop {
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
            self.follow_epoch(side);
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

    // ---- becoming -----------------------------------------------------------------------------------------------

    fn arm_params(
        &mut self,
        side: usize,
        migration: MigrationId,
        strategy: Strategy,
        threshold: u32,
    ) -> ArmParams {
        self.incarnations += 1;
        let running = self.hv.runs();
        self.sides[side].precopy = strategy == Strategy::Precopy;
        let s = &self.sides[side];
        let hello = Hello {
            migration,
            volume: s.volume_id,
            incarnation: Incarnation(s.life << 32 | side as u64),
            epoch: s.epoch,
            size: self.geometry.size(),
            chunk_size: self.geometry.chunk_size(),
            base: self.base.clone(),
            virtio_features: 3,
            queues: 1,
            read_only: false,
            serial: "sim".to_owned(),
        };
        ArmParams {
            hello,
            destination: "peer:1".to_owned(),
            strategy,
            threshold,
            counting: if self.dice.coin() { Counting::Passes } else { Counting::Paper },
            push_window: self.dice.between(1, 16) as u32,
            half_life: Duration::from_millis(self.dice.between(200, 10_000)),
            start_now: self.dice.permille(800),
            rings_running: running,
            write_cache: s.write_cache,
        }
    }

    pub(crate) fn arm(&mut self, side: usize) {
        self.hang_up(side, true);
        self.sides[side].run += 1;
        self.sides[side].tracked = Some(BTreeMap::new());
        let strategy = [Strategy::Hybrid, Strategy::Hybrid, Strategy::Precopy, Strategy::Postcopy];
        let strategy = strategy[self.dice.index(4)];
        let threshold = self.dice.between(1, 6) as u32;
        self.incarnations += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.incarnations.to_le_bytes());
        let params = self.arm_params(side, MigrationId(id), strategy, threshold);
        let modified = self.sides[side].volume.modified();
        let hot = self.sides[side].volume.with_lasting(ChunkState::Local);
        self.tell(|| format!("side {side} is armed: {strategy:?} {threshold} {modified:?}"));
        let session = SourceSession::arm(self.clock(), params, modified, hot);
        self.sides[side].role = NodeRole::Source(Box::new(session));
        if self.dice.coin() {
            let now = self.clock();
            if let NodeRole::Source(session) = &mut self.sides[side].role {
                session.handle_log_started(now);
            }
        }
    }

    fn facts(&self, side: usize, released: bool) -> LocalFacts {
        let s = &self.sides[side];
        LocalFacts {
            geometry: self.geometry,
            base: self.base.clone(),
            virtio_features: 7,
            queues: 1,
            read_only: false,
            volume: s.volume_id,
            epoch: s.epoch,
            virgin: s.virgin,
            released,
        }
    }

    pub(crate) fn become_destination(&mut self, side: usize, released: bool) {
        self.sides[side].run += 1;
        let session = DestinationSession::idle(self.facts(side, released));
        self.stats.returns += u64::from(released);
        self.sides[side].role = NodeRole::Destination(Box::new(session));
    }

    // ---- crash and restart --------------------------------------------------------------------------------------

    pub(crate) fn kill_tick(&mut self) {
        if self.calm || self.plan.kill_every == 0 {
            return;
        }
        let delay = self.dice.below(2 * self.plan.kill_every);
        self.after(delay, Event::Kill);
        let side = self.dice.index(2);
        if self.sides[side].alive {
            let host = self.dice.permille(self.plan.host_crash_permille);
            self.kill(side, host);
        }
    }

    fn kill(&mut self, side: usize, host: bool) {
        self.tell(|| format!("side {side} {}", if host { "host crash" } else { "is killed" }));
        if self.dice.coin()
            && self.sides[side].writing
            && let Some(write) = self.sides[side].writes.pop_front()
        {
            self.make_durable(side, &write);
        }
        let in_order = self.dice.coin() && !host;
        self.hang_up(side, in_order);
        let s = &mut self.sides[side];
        s.alive = false;
        s.life += 1;
        s.gate = false;
        s.role = NodeRole::Idle;
        s.tracked = None;
        s.drain_due = false;
        s.writes.clear();
        s.writing = false;
        s.moving = 0;
        s.conn = None;
        s.volume.kill();
        if host {
            self.stats.host_crashes += 1;
            self.host_crash(side);
        } else {
            self.stats.kills += 1;
        }
        self.guest_lost(side, host);
        self.hv_died(side);
        let delay = self.dice.delay(500 * MS);
        self.after(delay, Event::Restart(side));
    }

    fn host_crash(&mut self, side: usize) {
        let MigrationRecord::V1 { role, .. } = &self.sides[side].record;
        let owner = match role {
            Role::Serving => true,
            Role::Source(r) => matches!(r.stage, SourceStage::Pushing | SourceStage::Offered),
            Role::Destination(r) => {
                matches!(r.stage, DestinationStage::Active { .. } | DestinationStage::Complete)
            }
            Role::Idle => false,
        };
        let revert = matches!(role, Role::Destination(r) if matches!(r.stage, DestinationStage::Prepared | DestinationStage::Active { .. }));
        if owner {
            self.model.host_crash();
        }
        let dice = &mut self.dice;
        let s = &mut self.sides[side];
        s.boot += 1;
        s.volume.host_crash(|| dice.coin());
        if revert && s.volume.synced.order < s.prepared_at {
            let list = s.remaining.clone().unwrap_or_default();
            s.volume.revert(list.into_iter().map(|(chunk, ..)| chunk));
        }
    }

    /// As the daemon takes up its role.
    pub(crate) fn restart(&mut self, side: usize) {
        if self.sides[side].alive {
            return;
        }
        let s = &mut self.sides[side];
        s.alive = true;
        s.run += 1;
        let MigrationRecord::V1 { volume, epoch, role } = s.record.clone();
        s.epoch = epoch;
        s.volume_id = volume;
        s.flush_gate = true;
        s.data_lost = false;
        self.tell(|| format!("side {side} restarts as {role:?} {epoch:?}"));
        match role {
            Role::Serving => {
                self.sides[side].role = NodeRole::Serving;
                self.open_gate(side);
            }
            Role::Idle => self.sides[side].role = NodeRole::Idle,
            Role::Source(record) => {
                self.sides[side].tracked = Some(BTreeMap::new());
                let strategy = Strategy::from_number(record.strategy).expect("strategy");
                let params = self.arm_params(side, record.migration, strategy, record.threshold);
                let modified = self.sides[side].volume.modified();
                let same_boot = self.sides[side].boot == self.sides[side].record_boot;
                let exposed = matches!(
                    record.stage,
                    SourceStage::Offered | SourceStage::Relinquished { synced: false }
                );
                let lost = !same_boot && exposed;
                let session = SourceSession::resume(self.clock(), params, &record, epoch, modified, lost);
                self.sides[side].data_lost = lost;
                self.sides[side].role = NodeRole::Source(Box::new(session));
                if record.stage == SourceStage::Pushing {
                    self.open_gate(side);
                }
            }
            Role::Destination(record) => self.resume_destination(side, &record, epoch),
        }
        self.guest_back(side);
        self.job(side, 50 * MS, Job::Upkeep);
    }

    fn resume_destination(
        &mut self,
        side: usize,
        record: &blkferry::core::record::DestinationRecord,
        epoch: Epoch,
    ) {
        let volume = &self.sides[side].volume;
        let have: Vec<_> =
            volume.modified().into_iter().map(|c| (c, Version(volume.chunk(c).version))).collect();
        let counts: BTreeMap<ChunkId, u8> =
            self.sides[side].remaining.iter().flatten().map(|(c, n, _)| (*c, *n)).collect();
        let remaining: Vec<_> = volume
            .with_lasting(ChunkState::Remote)
            .into_iter()
            .map(|c| (c, counts.get(&c).copied().unwrap_or(0)))
            .collect();
        self.tell(|| format!("  has {have:?}, remaining {remaining:?}"));
        let owner = matches!(record.stage, DestinationStage::Active { .. } | DestinationStage::Complete);
        let facts = self.facts(side, false);
        let session = DestinationSession::resume(facts, record, epoch, have, remaining);
        let s = &mut self.sides[side];
        s.flush_gate = record.stage != DestinationStage::Active { source_synced: false };
        s.virgin = false;
        if owner {
            s.write_cache = record.write_cache;
        }
        s.role = NodeRole::Destination(Box::new(session));
        if owner {
            self.open_gate(side);
        }
    }

    // ---- actions ------------------------------------------------------------------------------------------------

    fn apply_source(&mut self, side: usize, action: SourceAction) {
        if !matches!(action, SourceAction::Send(_) | SourceAction::SendData(_)) {
            self.tell(|| format!("{side} does {action:?}"));
        }
        match action {
            SourceAction::Send(message) => self.say(side, message),
            SourceAction::SendData(data) => {
                self.stats.pushes += u64::from(data.purpose == blkferry::core::message::Purpose::Push);
                self.say(side, Message::Chunk(data));
            }
            SourceAction::Capture { chunk, .. } => {
                let delay = self.dice.below(100);
                self.job(side, delay, Job::CaptureStart(chunk));
            }
            SourceAction::Persist { seq, record } => self.persist(side, seq, record, None),
            SourceAction::SyncLayer => self.start_sync(side, SyncFor::Layer),
            SourceAction::OpenGate => self.open_gate(side),
            SourceAction::CloseGate => self.sides[side].gate = false,
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
        if !matches!(action, DestinationAction::Send(_) | DestinationAction::Install(_)) {
            self.tell(|| format!("{side} does {action:?}"));
        }
        match action {
            DestinationAction::Send(message) => self.say(side, message),
            DestinationAction::Adopt(hello) => {
                let s = &mut self.sides[side];
                s.run += 1;
                s.virgin = false;
                s.volume_id = hello.volume;
                s.epoch = Epoch(s.epoch.0.max(hello.epoch.0));
            }
            DestinationAction::Install(data) => {
                let receiving = matches!(&self.sides[side].role, NodeRole::Destination(d) if d.stage() == DestinationStage::Receiving);
                self.sides[side].moving += 1;
                let delay = self.dice.below(100);
                self.job(side, delay, Job::InstallStart(data, receiving, false));
            }
            DestinationAction::MarkRemote { first, run } => {
                for chunk in (first.0..first.0 + run).map(ChunkId) {
                    self.sides[side].volume.mark_remote(chunk);
                }
                self.kick(side);
            }
            DestinationAction::FetchBase(chunk) => {
                self.sides[side].moving += 1;
                let delay = self.disk();
                self.job(side, delay, Job::Fetch(chunk, true));
            }
            DestinationAction::Persist { seq, record, remaining } => {
                if let Some(list) = &remaining {
                    self.check_offer(side, list);
                }
                self.persist(side, seq, record, remaining);
            }
            DestinationAction::SyncVolume => self.start_sync(side, SyncFor::Volume),
            DestinationAction::OpenGate => {
                self.sides[side].flush_gate = false;
                self.stats.handoffs += 1;
                self.check_handoff(side);
                self.open_gate(side);
                self.start_sync(side, SyncFor::Upkeep);
            }
            DestinationAction::OpenFlush => {
                self.sides[side].flush_gate = true;
                self.kick(side);
            }
            DestinationAction::SetWriteCache(on) => self.sides[side].write_cache = on,
            DestinationAction::StartAnswered { allowed, .. } => self.answer_start(side, allowed),
            DestinationAction::FailChunk { chunk, .. } => self.fail_waiters(side, chunk),
            DestinationAction::Wipe => self.job(side, 1, Job::Wiped),
            DestinationAction::Finished(outcome) => self.finish(side, &outcome),
        }
    }

    fn finish(&mut self, side: usize, outcome: &Outcome) {
        let source = matches!(self.sides[side].role, NodeRole::Source(_));
        if source {
            self.sides[side].tracked = None;
        }
        match (source, outcome) {
            (true, Outcome::Released) => self.stats.completions += 1,
            (true, _) | (false, Outcome::Released) => {
                self.sides[side].role = NodeRole::Serving;
                let in_order = self.dice.coin();
                self.hang_up(side, in_order);
                self.open_gate(side);
            }
            (false, _) => {
                self.sides[side].role = NodeRole::Idle;
                let in_order = self.dice.coin();
                self.hang_up(side, in_order);
                self.sides[side].gate = false;
            }
        }
    }

    fn open_gate(&mut self, side: usize) {
        self.sides[side].gate = true;
        self.check_owner(side);
        self.kick(side);
    }

    // ---- records ------------------------------------------------------------------------------------------------

    fn persist(
        &mut self,
        side: usize,
        seq: u64,
        record: MigrationRecord,
        remaining: Option<Vec<(ChunkId, u8, bool)>>,
    ) {
        let run = self.sides[side].run;
        self.sides[side].writes.push_back(Write { run, seq, record, remaining });
        self.next_write(side);
    }

    fn next_write(&mut self, side: usize) {
        if !self.sides[side].writing && !self.sides[side].writes.is_empty() {
            self.sides[side].writing = true;
            let delay = self.disk() * 2;
            self.job(side, delay, Job::Persisted);
        }
    }

    fn make_durable(&mut self, side: usize, write: &Write) {
        let MigrationRecord::V1 { epoch, role, .. } = &write.record;
        let s = &mut self.sides[side];
        match role {
            Role::Destination(r) if r.stage == DestinationStage::Prepared => {
                s.remaining.clone_from(&write.remaining);
                s.prepared_at = s.volume.order();
            }
            Role::Source(r) if matches!(r.stage, SourceStage::Relinquished { .. }) => s.granted = epoch.0,
            _ => {}
        }
        s.record = write.record.clone();
        s.record_boot = s.boot;
        self.tell(|| format!("{side} has durably {:?}", write.record));
    }

    fn persisted(&mut self, side: usize) {
        self.sides[side].writing = false;
        let Some(write) = self.sides[side].writes.pop_front() else { return };
        self.make_durable(side, &write);
        self.next_write(side);
        if write.run != self.sides[side].run {
            return;
        }
        let now = self.clock();
        match &mut self.sides[side].role {
            NodeRole::Source(session) => {
                let reclaiming = session.step() == SourceStep::Reclaiming;
                session.handle_persisted(now, write.seq);
                self.stats.reclaims += u64::from(reclaiming && session.step() != SourceStep::Reclaiming);
            }
            NodeRole::Destination(session) => session.handle_persisted(now, write.seq),
            NodeRole::Serving | NodeRole::Idle => {}
        }
    }

    // ---- jobs ---------------------------------------------------------------------------------------------------

    pub(crate) fn take_job(&mut self, side: usize, run: u64, job: Job) {
        let now = self.clock();
        let current = run == self.sides[side].run;
        match job {
            Job::Persisted => self.persisted(side),
            Job::CaptureStart(chunk) => self.capture(side, run, chunk),
            Job::CaptureMid(mut job) => {
                self.capture_half(side, &mut job, 0..BLOCKS / 2);
                let delay = self.disk();
                self.again(side, run, delay, Job::CaptureEnd(job));
            }
            Job::CaptureEnd(mut job) => {
                self.capture_half(side, &mut job, BLOCKS / 2..BLOCKS);
                let capture = self.captured(side, &job);
                self.take_job(side, run, Job::Captured(job.chunk, capture));
            }
            Job::Captured(chunk, capture) if current => {
                self.drain(side);
                self.tell(|| format!("{side} captured {chunk}: {capture:?}"));
                if let NodeRole::Source(session) = &mut self.sides[side].role {
                    session.handle_captured(now, chunk, capture);
                }
            }
            Job::InstallStart(data, receiving, claimed) => self.install(side, run, data, receiving, claimed),
            Job::InstallEnd(data) => self.install_end(side, run, data),
            Job::Synced(what, snapshot) => self.synced(side, current, what, *snapshot),
            Job::Wiped => self.wiped(side, run, current),
            Job::Connect if current && matches!(self.sides[side].role, NodeRole::Source(_)) => {
                self.dial(side)
            }
            Job::Connect | Job::Captured(..) => {}
            Job::Drain => self.drain(side),
            Job::WriteMid(op) => self.write_mid(side, op),
            Job::WriteEnd(op) => self.write_end(side, op),
            Job::PunchStart(op) => self.punch_start(side, op),
            Job::PunchEnd(op) => self.punch_end(side, op),
            Job::Fetch(chunk, ahead) => self.fetched(side, run, chunk, ahead),
            Job::Upkeep => {
                self.start_sync(side, SyncFor::Upkeep);
                let every = self.plan.upkeep_every;
                self.job(side, every, Job::Upkeep);
            }
        }
    }

    /// The next part of a job, of the run that it belongs to.
    pub(crate) fn again(&mut self, side: usize, run: u64, delay: u64, job: Job) {
        let life = self.sides[side].life;
        self.after(delay, Event::Job { side, life, run, job });
    }

    fn capture(&mut self, side: usize, run: u64, chunk: ChunkId) {
        let c = *self.sides[side].volume.chunk(chunk);
        if c.state == ChunkState::Installing {
            return self.again(side, run, 200, Job::CaptureStart(chunk));
        }
        let mask = match c.state {
            ChunkState::Modified => self.sides[side].volume.full(chunk),
            ChunkState::Base if !c.mask.is_empty() => c.mask,
            ChunkState::Zero => {
                let capture =
                    Capture::Done { version: Version(c.version), clean: c.writers == 0, body: Body::Zero };
                return self.again(side, run, 1, Job::Captured(chunk, capture));
            }
            ChunkState::Base | ChunkState::Local | ChunkState::Remote | ChunkState::Installing => {
                return self.again(side, run, 1, Job::Captured(chunk, Capture::Failed));
            }
        };
        let clean = c.writers == 0;
        let job = CaptureJob { chunk, version: c.version, clean, mask, values: vec![0; BLOCKS] };
        let delay = self.disk();
        self.again(side, run, delay, Job::CaptureMid(job));
    }

    fn capture_half(&mut self, side: usize, job: &mut CaptureJob, half: std::ops::Range<usize>) {
        for block in half {
            job.values[block] = self.sides[side].volume.value(job.chunk, block).unwrap_or(0xdead);
        }
    }

    fn captured(&mut self, side: usize, job: &CaptureJob) -> Capture {
        if self.dice.permille(self.plan.capture_fails) {
            return Capture::Failed;
        }
        let clean = job.clean && self.sides[side].volume.chunk(job.chunk).version == job.version;
        self.stats.torn += u64::from(!clean);
        let full = self.sides[side].volume.full(job.chunk);
        let values: Vec<u64> = bits(job.mask).map(|block| job.values[block]).collect();
        let body = if job.mask == full && values.iter().all(|value| *value == 0) {
            Body::Zero
        } else {
            Body::Blocks { mask: job.mask, bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
        };
        Capture::Done { version: Version(job.version), clean, body }
    }

    fn install(&mut self, side: usize, run: u64, data: ChunkData, receiving: bool, claimed: bool) {
        let volume = &mut self.sides[side].volume;
        if !volume.free(data.chunk) {
            volume.chunk_mut(data.chunk).claimants += u32::from(!claimed);
            return self.again(side, run, 150, Job::InstallStart(data, receiving, true));
        }
        volume.chunk_mut(data.chunk).claimants -= u32::from(claimed);
        if volume.begin_install(data.chunk, data.version, receiving) {
            let delay = self.disk();
            self.again(side, run, delay, Job::InstallEnd(data));
        } else {
            self.installed(side, run, data.chunk, data.version, Installed::Superseded);
        }
    }

    fn install_end(&mut self, side: usize, run: u64, data: ChunkData) {
        let pull = data.purpose != blkferry::core::message::Purpose::Push;
        let fails = if pull { self.plan.pull_install_fails } else { self.plan.install_fails };
        let result = if self.dice.permille(fails) {
            self.sides[side].volume.let_go(data.chunk);
            Installed::Failed
        } else {
            self.sides[side].volume.end_install(data.chunk, data.version, &data.body);
            Installed::Done
        };
        self.installed(side, run, data.chunk, data.version, result);
        self.kick(side);
    }

    fn installed(&mut self, side: usize, run: u64, chunk: ChunkId, version: Version, result: Installed) {
        self.tell(|| format!("{side} installed {chunk} {version:?}: {result:?}"));
        self.sides[side].moving -= 1;
        let now = self.clock();
        if run == self.sides[side].run
            && let NodeRole::Destination(session) = &mut self.sides[side].role
        {
            session.handle_installed(now, chunk, version, result);
        }
    }

    pub(crate) fn start_sync(&mut self, side: usize, what: SyncFor) {
        let snapshot = Box::new(self.sides[side].volume.snapshot());
        let delay = self.disk() * 5;
        self.job(side, delay, Job::Synced(what, snapshot));
    }

    fn synced(&mut self, side: usize, current: bool, what: SyncFor, snapshot: crate::volume::Snapshot) {
        let ok = !self.dice.permille(self.plan.sync_fails);
        if ok {
            self.sides[side].volume.sync(snapshot);
        }
        let now = self.clock();
        match (what, &mut self.sides[side].role) {
            (SyncFor::Layer, NodeRole::Source(session)) if current => session.handle_layer_synced(now, ok),
            (SyncFor::Volume, NodeRole::Destination(session)) if current => session.handle_synced(now, ok),
            (SyncFor::Flush(op), _) => self.flush_synced(side, op, ok),
            _ => {}
        }
    }

    fn wiped(&mut self, side: usize, run: u64, current: bool) {
        if self.sides[side].moving > 0 {
            return self.again(side, run, 500, Job::Wiped);
        }
        self.sides[side].volume.wipe();
        self.tell(|| format!("side {side} is wiped"));
        let now = self.clock();
        if current && let NodeRole::Destination(session) = &mut self.sides[side].role {
            session.handle_wiped(now);
        }
    }

    fn fetched(&mut self, side: usize, run: u64, chunk: ChunkId, ahead: bool) {
        let volume = &mut self.sides[side].volume;
        if !volume.free(chunk) {
            return self.again(side, run, 300, Job::Fetch(chunk, ahead));
        }
        volume.fetch(chunk);
        self.kick(side);
        if ahead {
            self.sides[side].moving -= 1;
            let now = self.clock();
            if run == self.sides[side].run
                && let NodeRole::Destination(session) = &mut self.sides[side].role
            {
                session.handle_base_fetched(now, chunk);
            }
        }
    }

    // ---- tracker ------------------------------------------------------------------------------------------------

    pub(crate) fn track(&mut self, side: usize, chunk: ChunkId, blocks: BlockMask) {
        let Some(tracked) = &mut self.sides[side].tracked else { return };
        let counts = tracked.entry(chunk).or_default();
        counts.0 += 1;
        counts.1 += blocks.count();
        if !std::mem::replace(&mut self.sides[side].drain_due, true) {
            let delay = self.dice.below(5 * MS);
            self.job(side, delay, Job::Drain);
        }
    }

    pub(crate) fn drain(&mut self, side: usize) {
        self.sides[side].drain_due = false;
        let now = self.clock();
        let Some(tracked) = &mut self.sides[side].tracked else { return };
        let written = std::mem::take(tracked);
        if let NodeRole::Source(session) = &mut self.sides[side].role {
            for (chunk, (passes, plain)) in written {
                session.handle_wrote(now, chunk, passes, plain);
            }
        }
    }

    /// The step of a side's session, in words, for the checks.
    pub(crate) fn may_serve(&self, side: usize) -> bool {
        match &self.sides[side].role {
            NodeRole::Serving => true,
            NodeRole::Idle => false,
            // Until the record of the offer is asked for.
            NodeRole::Source(session) => {
                blkferry::core::ownership::source_serves(session.step())
                    || session.step() == SourceStep::Leaving
            }
            NodeRole::Destination(session) => {
                blkferry::core::ownership::destination_serves(session.step())
                    || (session.step() == DestinationStep::Left)
            }
        }
    }
}
