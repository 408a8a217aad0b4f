// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can happen in a state, and what comes of it.

use crate::bounds::Bounds;
use crate::seen::Seen;
use crate::volume::{Touch, ZERO};
use crate::world::{DESTINATION, HALF_LIFE, Job, NOW, Op, Role, Rule, SOURCE, World};
use blkferry::core::chunk::ChunkState;
use blkferry::core::destination::Installed;
use blkferry::core::geometry::ChunkId;
use blkferry::core::message::Message;
use blkferry::core::ownership::destination_serves;
use blkferry::core::record::SourceStage;
use blkferry::core::source::{Capture, STOP_HOLD};
use std::time::Duration;

/// Which timers fire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Timer {
    /// The next one.
    Next,
    /// All up to the bound of a hold.
    Hold,
    /// All up to the half-life of write counts.
    Halving,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Act {
    /// The next control message of this side arrives.
    Control(usize),
    Data(usize),
    Persisted(usize),
    Job {
        side: usize,
        index: usize,
        ok: bool,
    },
    Dial,
    Notice(usize),
    Cut,
    Crash {
        side: usize,
        landed: bool,
    },
    HostCrash {
        side: usize,
        landed: bool,
        newer: bool,
    },
    Stop,
    Start,
    Ask {
        hold: bool,
    },
    Withdraw,
    Cancel(usize),
    Arm,
    Touch(u32, Touch),
    TouchEnd,
    Read(u32),
    Flush,
    Drain,
    Timer(usize, Timer),
}

/// Longest hold of either side.
const LONGEST_HOLD: Duration = Duration::from_secs(30);
/// When a pull is served again.
const LATE: Duration = Duration::from_secs(5);

impl World {
    /// Everything that can happen.
    pub(crate) fn acts(&self, bounds: &Bounds, acts: &mut Vec<Act>) {
        if self.broken.is_some() {
            return;
        }
        self.inner_acts(bounds, acts);
        self.fault_acts(acts);
        self.hypervisor_acts(bounds, acts);
        self.guest_acts(bounds, acts);
    }

    /// What goes on by itself.
    fn inner_acts(&self, bounds: &Bounds, acts: &mut Vec<Act>) {
        for side in [SOURCE, DESTINATION] {
            let s = self.side(side);
            if !s.writes.is_empty() {
                acts.push(Act::Persisted(side));
            }
            for index in 0..s.jobs.len() {
                if self.job_can_end(side, index) {
                    acts.push(Act::Job { side, index, ok: true });
                    if self.left.faults > 0 && self.job_can_fail(side, index) {
                        acts.push(Act::Job { side, index, ok: false });
                    }
                }
            }
            let timeout = self.next_timeout(side);
            if timeout.is_some_and(|at| at < NOW + HALF_LIFE) {
                acts.push(Act::Timer(side, Timer::Next));
                if bounds.holds
                    && timeout.is_some_and(|at| at < NOW + STOP_HOLD)
                    && (s.stop_wait || s.start_wait)
                {
                    acts.push(Act::Timer(side, Timer::Hold));
                }
            }
            if side == SOURCE && self.left.halvings > 0 && timeout.is_some() {
                acts.push(Act::Timer(side, Timer::Halving));
            }
        }
        if self.side(SOURCE).dial && !self.conn.as_ref().is_some_and(|conn| conn.get().up[SOURCE]) {
            acts.push(Act::Dial);
        }
        if let Some(tracked) = &self.side(SOURCE).tracked
            && bounds.lazy
            && !tracked.is_empty()
        {
            acts.push(Act::Drain);
        }
        let Some(conn) = self.conn.as_ref().map(crate::shared::Shared::get) else { return };
        for from in [SOURCE, DESTINATION] {
            if conn.up[1 - from] && !conn.control[from].is_empty() {
                acts.push(Act::Control(from));
            }
            if conn.cut && conn.up[from] {
                acts.push(Act::Notice(from));
            }
        }
        if conn.up[DESTINATION] {
            let new = |at: &usize| *at == 0 || conn.data[*at] != conn.data[*at - 1];
            acts.extend((0..conn.data.len()).filter(new).map(Act::Data));
        }
    }

    fn fault_acts(&self, acts: &mut Vec<Act>) {
        if self.left.cuts > 0 && self.conn.as_ref().is_some_and(|conn| !conn.get().cut) {
            acts.push(Act::Cut);
        }
        for side in [SOURCE, DESTINATION] {
            let writes = !self.side(side).writes.is_empty();
            for landed in [false, true].into_iter().filter(|landed| writes || !landed) {
                if self.left.crashes[side] > 0 {
                    acts.push(Act::Crash { side, landed });
                }
                if self.left.host_crashes[side] > 0 {
                    acts.push(Act::HostCrash { side, landed, newer: false });
                    acts.push(Act::HostCrash { side, landed, newer: true });
                }
            }
        }
    }

    pub(crate) fn can_stop(&self) -> bool {
        let s = self.side(SOURCE);
        let stage = self.source().map(|session| session.stage());
        matches!(stage, Some(SourceStage::Pushing | SourceStage::Offered))
            && !s.stop_wait
            && !s.start_wait
            && self.guest.op.is_none_or(|op| op.side != SOURCE)
    }

    pub(crate) fn can_start(&self) -> bool {
        let s = self.side(SOURCE);
        !s.stop_wait && !s.start_wait && !s.rings
    }

    pub(crate) fn can_ask(&self) -> bool {
        let s = self.side(DESTINATION);
        !s.start_wait && !s.rings && s.role != Role::Idle
    }

    fn hypervisor_acts(&self, bounds: &Bounds, acts: &mut Vec<Act>) {
        let left = &self.left;
        if left.stops > 0 && self.can_stop() {
            acts.push(Act::Stop);
        }
        if left.starts > 0 && self.can_start() {
            acts.push(Act::Start);
        }
        let stopped = !self.side(SOURCE).rings && !self.side(SOURCE).stop_wait;
        if left.asks > 0 && self.can_ask() && (bounds.hasty || stopped) {
            acts.push(Act::Ask { hold: true });
            if bounds.unheld {
                acts.push(Act::Ask { hold: false });
            }
        }
        if left.withdrawals > 0 && self.side(DESTINATION).start_wait {
            acts.push(Act::Withdraw);
        }
        if left.cancels > 0 {
            if self.source().is_some() {
                acts.push(Act::Cancel(SOURCE));
            }
            if self.destination().is_some() {
                acts.push(Act::Cancel(DESTINATION));
            }
        }
        if left.arms > 0 && self.side(SOURCE).role == Role::Serving {
            acts.push(Act::Arm);
        }
    }

    fn guest_acts(&self, bounds: &Bounds, acts: &mut Vec<Act>) {
        if self.guest.op.is_some() {
            acts.push(Act::TouchEnd);
        }
        let Some(side) = [SOURCE, DESTINATION].into_iter().find(|side| self.guest_runs(*side)) else {
            return;
        };
        let s = self.side(side);
        if self.left.writes > 0 && self.guest.op.is_none() {
            let can = |(chunk, touch): &&(u32, Touch)| s.volume.can_begin(ChunkId(*chunk), *touch);
            acts.extend(bounds.touches.iter().filter(can).map(|(chunk, touch)| Act::Touch(*chunk, *touch)));
        }
        if self.left.reads > 0 && side == DESTINATION {
            let waits = s.volume.with_lasting(ChunkState::Remote).into_iter();
            let waits = waits.filter(|chunk| !s.volume.chunk(*chunk).demanded);
            acts.extend(waits.map(|chunk| Act::Read(chunk.0)));
        }
        if self.left.flushes > 0 && self.guest.op.is_none() && s.flush_gate {
            acts.push(Act::Flush);
        }
    }

    pub(crate) fn guest_runs(&self, side: usize) -> bool {
        let s = self.side(side);
        s.gate && s.rings
    }

    pub(crate) fn next_timeout(&self, side: usize) -> Option<Duration> {
        match &self.side(side).role {
            Role::Source(session) => session.next_timeout(),
            Role::Destination(session) => session.next_timeout(),
            Role::Serving | Role::Idle => None,
        }
    }

    pub(crate) fn job_can_end(&self, side: usize, index: usize) -> bool {
        let s = self.side(side);
        match &s.jobs[index] {
            Job::Capture(chunk, None) => s.volume.chunk(*chunk).state != ChunkState::Installing,
            Job::Claim(data) => s.volume.chunk(data.chunk).free(),
            Job::Wipe => !s.jobs.iter().any(|job| matches!(job, Job::Claim(_) | Job::Install(_))),
            Job::Capture(..) | Job::Install(_) | Job::SyncLayer(_) | Job::SyncVolume(_) | Job::Upkeep(_) => {
                true
            }
        }
    }

    fn job_can_fail(&self, side: usize, index: usize) -> bool {
        !matches!(
            self.side(side).jobs[index],
            Job::Wipe | Job::Claim(_) | Job::Upkeep(_) | Job::Capture(_, None)
        )
    }

    /// What comes of it.
    pub(crate) fn act(&mut self, bounds: &Bounds, act: Act) {
        match act {
            // Where installs fail, pulls are repeated, and the repetition is late.
            Act::Control(from) => self.hear(from, if bounds.left.faults > 0 { NOW + LATE } else { NOW }),
            Act::Data(index) => {
                let conn = self.conn.as_mut().expect("a connection").edit();
                let data = conn.data.remove(index);
                self.deliver(SOURCE, NOW, Message::Chunk(data));
            }
            Act::Persisted(side) => self.persisted(side),
            Act::Job { side, index, ok } => {
                self.left.faults -= u8::from(!ok);
                let job = self.side_mut(side).jobs.remove(index);
                self.end_job(side, job, ok);
            }
            Act::Dial => self.dial(bounds),
            Act::Notice(side) => self.notice(side),
            Act::Cut => {
                self.left.cuts -= 1;
                self.conn.as_mut().expect("a connection").edit().cut = true;
            }
            Act::Crash { side, landed } => {
                self.left.crashes[side] -= 1;
                self.crash(bounds, side, landed, None);
            }
            Act::HostCrash { side, landed, newer } => {
                self.left.host_crashes[side] -= 1;
                self.crash(bounds, side, landed, Some(newer));
            }
            Act::Stop | Act::Start | Act::Ask { .. } | Act::Withdraw | Act::Cancel(_) | Act::Arm => {
                self.hypervisor(bounds, act);
            }
            Act::Touch(..) | Act::TouchEnd | Act::Read(_) | Act::Flush => self.guest(bounds, act),
            Act::Drain => self.drain(),
            Act::Timer(side, timer) => self.fire(side, timer),
        }
        // A session that was told nothing wants nothing.
        for side in [SOURCE, DESTINATION] {
            if self.sides[side].edited() {
                self.pump(side);
            }
        }
        self.check();
    }

    fn hear(&mut self, from: usize, now: Duration) {
        let conn = self.conn.as_mut().expect("a connection").edit();
        let Some(message) = conn.control[from].pop_front() else { return };
        self.deliver(from, now, message);
    }

    fn deliver(&mut self, from: usize, now: Duration, message: Message) {
        self.see_heard(from, &message);
        match &mut self.side_mut(1 - from).role {
            Role::Source(session) => session.handle_message(now, message),
            Role::Destination(session) => session.handle_message(now, message),
            Role::Serving | Role::Idle => {}
        }
    }

    fn fire(&mut self, side: usize, timer: Timer) {
        let Some(next) = self.next_timeout(side) else { return };
        let now = match timer {
            Timer::Next => next,
            Timer::Hold => NOW + LONGEST_HOLD,
            Timer::Halving => {
                self.left.halvings -= 1;
                next.max(NOW + HALF_LIFE * 2 * (u32::from(u8::MAX - self.left.halvings)))
            }
        };
        match &mut self.side_mut(side).role {
            Role::Source(session) => session.handle_timeout(now),
            Role::Destination(session) => session.handle_timeout(now),
            Role::Serving | Role::Idle => {}
        }
    }

    fn end_job(&mut self, side: usize, job: Job, ok: bool) {
        match job {
            Job::Capture(chunk, None) => {
                let reading = self.side(SOURCE).volume.begin_capture(chunk);
                if reading.is_some() {
                    return self.start(SOURCE, Job::Capture(chunk, reading));
                }
                self.captured(chunk, Capture::Failed);
            }
            Job::Capture(chunk, Some(_)) if !ok => self.captured(chunk, Capture::Failed),
            Job::Capture(chunk, Some(reading)) => {
                let (version, clean, body) = self.side(SOURCE).volume.end_capture(chunk, reading);
                if !clean {
                    self.see(Seen::TornCapture);
                }
                self.captured(chunk, Capture::Done { version, clean, body });
            }
            Job::Claim(data) => {
                self.side_mut(side).volume.chunk_mut(data.chunk).claimed = false;
                self.begin_install(data);
            }
            Job::Install(data) => {
                let volume = &mut self.side_mut(side).volume;
                let result = if ok {
                    volume.end_install(data.chunk, data.version, &data.body);
                    Installed::Done
                } else {
                    volume.let_go(data.chunk);
                    Installed::Failed
                };
                self.installed(data.chunk, data.version, result);
            }
            Job::SyncLayer(snapshot) => {
                self.now_safe(side, snapshot.filter(|_| ok));
                if let Some(session) = self.source_mut() {
                    session.handle_layer_synced(NOW, ok);
                }
            }
            Job::SyncVolume(snapshot) => {
                // An upkeep that still runs began before: what it will have made safe is older.
                for job in self.side_mut(side).jobs.iter_mut().filter(|_| ok) {
                    if let Job::Upkeep(older) = job {
                        *older = None;
                    }
                }
                self.now_safe(side, snapshot.filter(|_| ok));
                if let Some(session) = self.destination_mut() {
                    session.handle_synced(NOW, ok);
                }
            }
            Job::Upkeep(snapshot) => self.now_safe(side, snapshot),
            Job::Wipe => {
                self.side_mut(side).volume.wipe();
                let empty = self.snapshot(side);
                self.now_safe(side, empty);
                if let Some(session) = self.destination_mut() {
                    session.handle_wiped(NOW);
                }
            }
        }
    }

    /// A volume as it was is synced; older snapshots of syncs that still run say nothing new.
    fn now_safe(&mut self, side: usize, snapshot: Option<crate::volume::Volume>) {
        if let (Some(snapshot), Some(safe)) = (snapshot, &mut self.side_mut(side).safe) {
            safe.volume = snapshot;
            safe.since_prepared = true;
        }
    }

    fn captured(&mut self, chunk: ChunkId, capture: Capture) {
        // What was written while the capture ran is told before it is judged.
        self.drain();
        if let Some(session) = self.source_mut() {
            session.handle_captured(NOW, chunk, capture);
        }
    }

    // ---- hypervisor and operator --------------------------------------------------------------------------------

    fn hypervisor(&mut self, bounds: &Bounds, act: Act) {
        let less = |number: &mut u8| *number = number.saturating_sub(1);
        match act {
            Act::Stop => {
                less(&mut self.left.stops);
                self.drain();
                let s = self.side_mut(SOURCE);
                (s.rings, s.gate, s.stop_wait) = (false, false, true);
                let write_cache = s.write_cache;
                if let Some(session) = self.source_mut() {
                    session.handle_rings_stopped(NOW, write_cache);
                }
            }
            Act::Start => {
                less(&mut self.left.starts);
                match &mut self.side_mut(SOURCE).role {
                    Role::Serving => self.side_mut(SOURCE).rings = true,
                    Role::Source(session) if !matches!(session.stage(), SourceStage::Released { .. }) => {
                        session.handle_rings_started(NOW);
                        self.side_mut(SOURCE).start_wait = true;
                    }
                    Role::Source(_) => self.see(Seen::LateStartRefused),
                    Role::Idle | Role::Destination(_) => {}
                }
            }
            Act::Ask { hold } => {
                less(&mut self.left.asks);
                match &mut self.side_mut(DESTINATION).role {
                    Role::Serving => self.side_mut(DESTINATION).rings = true,
                    Role::Destination(session) if destination_serves(session.step()) => {
                        self.side_mut(DESTINATION).rings = true;
                    }
                    Role::Destination(session) => {
                        session.handle_start_requested(NOW, hold);
                        self.side_mut(DESTINATION).start_wait = true;
                    }
                    Role::Idle | Role::Source(_) => {}
                }
            }
            Act::Withdraw => {
                less(&mut self.left.withdrawals);
                self.side_mut(DESTINATION).start_wait = false;
                if let Some(session) = self.destination_mut() {
                    session.handle_start_withdrawn(NOW);
                }
            }
            Act::Cancel(side) => {
                less(&mut self.left.cancels);
                // Refused where it comes too late.
                let _ = match &mut self.side_mut(side).role {
                    Role::Source(session) => session.handle_cancel(NOW),
                    Role::Destination(session) => session.handle_cancel(NOW),
                    Role::Serving | Role::Idle => Ok(()),
                };
            }
            Act::Arm => {
                less(&mut self.left.arms);
                self.arm(bounds);
            }
            other => self.fail(Rule::NoPanic, format!("{other:?} is not the hypervisor's")),
        }
    }

    // ---- guest --------------------------------------------------------------------------------------------------

    fn guest(&mut self, bounds: &Bounds, act: Act) {
        let side = [SOURCE, DESTINATION].into_iter().find(|side| self.guest_runs(*side));
        match (act, side) {
            (Act::Touch(chunk, touch), Some(side)) => {
                self.left.writes -= 1;
                let value = if touch == Touch::Zero { ZERO } else { self.guest.next };
                self.guest.next += 1;
                let op = Op { side, chunk: ChunkId(chunk), touch, value };
                self.guest.op = Some(op);
                self.side_mut(side).volume.begin(op.chunk, touch, value);
            }
            (Act::TouchEnd, _) => self.touched(bounds),
            (Act::Read(chunk), _) => {
                self.left.reads -= 1;
                let chunk = ChunkId(chunk);
                self.side_mut(DESTINATION).volume.chunk_mut(chunk).demanded = true;
                if let Some(session) = self.destination_mut() {
                    session.handle_demand(NOW, chunk);
                }
            }
            (Act::Flush, Some(side)) => {
                self.left.flushes -= 1;
                self.see(Seen::Flushed);
                self.check_flush(side);
                let snapshot = self.snapshot(side);
                for job in &mut self.side_mut(side).jobs {
                    if let Job::SyncLayer(old) | Job::SyncVolume(old) | Job::Upkeep(old) = job {
                        *old = None;
                    }
                }
                self.now_safe(side, snapshot);
                for cell in self.guest.cells.iter_mut().flatten() {
                    cell.flushed = cell.acked;
                    cell.since.clear();
                }
            }
            _ => {}
        }
    }

    /// A request of the guest ends and is acknowledged.
    fn touched(&mut self, bounds: &Bounds) {
        let Some(op) = self.guest.op.take() else { return };
        let s = self.side_mut(op.side);
        let whole = s.volume.end(op.chunk, op.touch, op.value);
        if let Some(tracked) = &mut s.tracked
            && !tracked.contains(&op.chunk)
        {
            tracked.push(op.chunk);
            tracked.sort_unstable();
        }
        for cell in op.touch.cells() {
            let cell = &mut self.guest.cells[op.chunk.index()][cell];
            cell.acked = op.value;
            if bounds.safe() {
                cell.since.push(op.value);
            }
        }
        if whole && op.side == DESTINATION {
            self.see(Seen::Overwritten);
            if let Some(session) = self.destination_mut() {
                session.handle_overwritten(NOW, op.chunk);
            }
        }
        if !bounds.lazy {
            self.drain();
        }
    }
}
