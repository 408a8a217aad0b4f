// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What takes time in a daemon: records in their order, captures, installs, syncs, and the tracker that is drained
//! before a capture is judged.

use crate::volume::{BLOCKS, bits};
use crate::world::{CaptureJob, Event, Job, MS, NodeRole, SyncFor, World, Write};
use blkferry::core::chunk::ChunkState;
use blkferry::core::destination::Installed;
use blkferry::core::geometry::{BlockMask, ChunkId};
use blkferry::core::message::{Body, ChunkData, Version};
use blkferry::core::ownership::SourceStep;
use blkferry::core::record::{DestinationStage, MigrationRecord, Role, SourceStage};
use blkferry::core::source::Capture;

impl World {
    // ---- records ------------------------------------------------------------------------------------------------

    pub(crate) fn persist(
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

    pub(crate) fn make_durable(&mut self, side: usize, write: &Write) {
        let MigrationRecord::V1 { epoch, role, .. } = &write.record;
        let s = &mut self.sides[side];
        match role {
            Role::Destination(r) if r.stage == DestinationStage::Prepared => {
                s.remaining.clone_from(&write.remaining);
                s.prepared_at = s.volume.order();
            }
            Role::Source(r) if matches!(r.stage, SourceStage::Relinquished { .. }) => s.granted = epoch.0,
            Role::Source(r) if r.stage == SourceStage::Offered => s.offered = epoch.0,
            _ => {}
        }
        s.record = write.record.clone();
        s.record_boot = s.boot;
        let synced = |stage| matches!(stage, SourceStage::Relinquished { synced } | SourceStage::Released { synced } if synced);
        if matches!(role, Role::Source(r) if synced(r.stage)) {
            self.check_synced(side);
        }
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
                let delay = self.disk() + self.dice.below(self.plan.capture_delay);
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
            Job::Pruned(list) => self.pruned(side, run, list),
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
            ChunkState::Modified | ChunkState::Received => self.sides[side].volume.full(chunk),
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
        let delay = self.disk() * 5 + self.dice.below(self.plan.sync_delay);
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

    fn pruned(&mut self, side: usize, run: u64, list: Vec<(ChunkId, Version)>) {
        if self.sides[side].moving > 0 {
            return self.again(side, run, 500, Job::Pruned(list));
        }
        let kept = self.sides[side].volume.prune(&list);
        self.stats.kept += kept.len() as u64;
        self.tell(|| format!("side {side} has kept {kept:?}"));
        let now = self.clock();
        if run == self.sides[side].run
            && let NodeRole::Destination(session) = &mut self.sides[side].role
        {
            session.handle_pruned(now, kept);
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
}
