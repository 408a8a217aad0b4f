// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A daemon around a session: carries out actions as `node` does, with time between the asking and the end.

use crate::hypervisor::HvEvent;
use crate::world::{Event, Job, MS, NodeRole, SyncFor, World};
use blkferry::core::destination::DestinationAction;
use blkferry::core::geometry::ChunkId;
use blkferry::core::message::{Epoch, Message, Purpose};
use blkferry::core::progress::Outcome;
use blkferry::core::source::SourceAction;

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
            self.look_at_step(side);
        }
        self.follow_epoch(side);
        self.look_at_step(side);
    }

    /// A step is a good moment for something to go wrong.
    fn look_at_step(&mut self, side: usize) {
        let step = match &self.sides[side].role {
            NodeRole::Source(session) => session.step() as u8,
            NodeRole::Destination(session) => 100 + session.step() as u8,
            NodeRole::Serving | NodeRole::Idle => 200,
        };
        if std::mem::replace(&mut self.sides[side].step, step) == step
            || !self.dice.permille(self.plan.strike_permille)
        {
            return;
        }
        let soon = [500, 20 * MS, 300 * MS][self.dice.index(3)];
        let delay = self.dice.below(soon);
        let event = match self.dice.below(4) {
            0 => Event::Kill(Some(side)),
            1 => Event::Kill(Some(1 - side)),
            2 => Event::Cut(false),
            _ => Event::ChangeMind,
        };
        self.after(delay, event);
    }

    fn follow_epoch(&mut self, side: usize) {
        let epoch = match &self.sides[side].role {
            NodeRole::Source(session) => session.epoch(),
            NodeRole::Destination(session) => session.epoch(),
            NodeRole::Serving | NodeRole::Idle => return,
        };
        self.sides[side].epoch = Epoch(self.sides[side].epoch.0.max(epoch.0));
    }

    // ---- actions ------------------------------------------------------------------------------------------------

    fn apply_source(&mut self, side: usize, action: SourceAction) {
        if !matches!(action, SourceAction::Send(_) | SourceAction::SendData(_)) {
            self.tell(|| format!("{side} does {action:?}"));
        }
        match action {
            SourceAction::Send(message) => self.say(side, message),
            SourceAction::SendData(data) => {
                self.stats.pushes += u64::from(data.purpose == Purpose::Push);
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
                s.came_in = Some(hello.migration);
                s.epoch = Epoch(s.epoch.0.max(hello.epoch.0));
            }
            DestinationAction::Install(data) => {
                let receiving = data.purpose == Purpose::Push;
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
            DestinationAction::FailWaiting(chunk) => {
                self.stats.absences += 1;
                self.fail_waiters(side, chunk);
            }
            DestinationAction::Wipe => self.job(side, 1, Job::Wiped),
            DestinationAction::Prune(list) => self.job(side, 1, Job::Pruned(list)),
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

    pub(crate) fn open_gate(&mut self, side: usize) {
        self.sides[side].gate = true;
        self.check_owner(side);
        self.kick(side);
    }
}
