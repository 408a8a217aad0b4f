// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hypervisor and the operator: stops the guest, starts it at the other side or at the same, gives up, tries
//! again; arms and cancels migrations. It runs the guest at one side only, but it is wrong about who has the disk
//! whenever an answer was lost.

use crate::world::{Event, MS, NodeRole, SECOND, World};
use blkferry::core::destination::DestinationSession;
use blkferry::core::ownership::destination_serves;
use blkferry::core::record::SourceStage;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Running,
    /// Stopping: requests under way end first.
    Draining,
    StopWait,
    Stopped,
    StartWait(usize),
}

#[derive(Debug, Default)]
pub(crate) struct Hv {
    state: State,
    token: u64,
    /// Where the next start is tried.
    target: usize,
    /// A decision to start is on its way.
    deciding: bool,
    final_tries: u32,
    behind_since: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum HvEvent {
    StopAnswered(usize),
    StartAnswered(usize, bool),
    GiveUp(u64),
    Decide,
}

impl Hv {
    pub(crate) fn runs(&self) -> bool {
        matches!(self.state, State::Running | State::Draining)
    }

    pub(crate) fn running(&self) -> bool {
        self.state == State::Running
    }
}

fn owns(session: &DestinationSession) -> bool {
    destination_serves(session.step())
}

impl World {
    // ---- the operator -------------------------------------------------------------------------------------------

    pub(crate) fn operator_tick(&mut self) {
        let delay = self.dice.between(100, 1500) * MS;
        self.after(delay, Event::Operator);
        let home = self.guest.at;
        let gives = (0..2).find(|side| match &self.sides[*side].role {
            NodeRole::Source(session) => !matches!(session.stage(), SourceStage::Released { .. }),
            NodeRole::Serving | NodeRole::Idle | NodeRole::Destination(_) => false,
        });
        if self.calm {
            return self.finally(gives);
        }
        if self.hv.running() && self.dice.permille(self.plan.stop_permille) {
            return self.stop();
        }
        match gives {
            Some(side) if self.dice.permille(self.plan.cancel_permille) => self.cancel(side),
            None if matches!(self.sides[home].role, NodeRole::Serving)
                && self.sides[home].alive
                && self.dice.permille(self.plan.arm_permille) =>
            {
                self.arm(home);
            }
            Some(_) | None => {}
        }
    }

    fn cancel(&mut self, side: usize) {
        let now = self.clock();
        let side = if self.dice.permille(200) { 1 - side } else { side };
        if !self.sides[side].alive {
            return;
        }
        self.tell(|| format!("operator cancels at side {side}"));
        let done = match &mut self.sides[side].role {
            NodeRole::Source(session) => session.handle_cancel(now),
            NodeRole::Destination(session) => session.handle_cancel(now),
            NodeRole::Serving | NodeRole::Idle => return,
        };
        self.stats.cancels += u64::from(done.is_ok());
    }

    /// The end is decided: the guest is moved, or the migration is cancelled.
    fn finally(&mut self, gives: Option<usize>) {
        let Some(side) = gives else { return };
        if !self.hv.running() || !self.sides[side].alive {
            return;
        }
        let now = self.clock();
        let NodeRole::Source(session) = &mut self.sides[side].role else { return };
        session.handle_log_started(now);
        let pushing = session.stage() == SourceStage::Pushing;
        let behind = self.sides[side].precopy && session.progress().remaining_chunks > 8;
        if self.guest.at == side && pushing && behind {
            let since = *self.hv.behind_since.get_or_insert(self.now);
            assert!(self.now < since + 40 * SECOND, "pushes stall: {}", self.describe());
            return;
        }
        self.hv.behind_since = None;
        if self.guest.at == side && pushing {
            self.hv.final_tries += 1;
            if self.hv.final_tries > 6 || self.dice.permille(300) {
                self.cancel(side);
            } else {
                self.stop();
            }
        }
    }

    // ---- stop ---------------------------------------------------------------------------------------------------

    fn stop(&mut self) {
        self.tell(|| "hypervisor stops the guest".to_owned());
        self.guest.issues = false;
        self.hv.state = State::Draining;
        self.drained();
    }

    /// No request is under way: the rings have stopped.
    pub(crate) fn drained(&mut self) {
        let side = self.guest.at;
        if self.hv.state != State::Draining || !self.guest.idle() {
            return;
        }
        if !self.sides[side].alive {
            return self.stopped();
        }
        let pushing = match &self.sides[side].role {
            NodeRole::Source(session) => session.stage() == SourceStage::Pushing,
            NodeRole::Serving | NodeRole::Idle | NodeRole::Destination(_) => false,
        };
        if !pushing {
            return self.stopped();
        }
        self.tell(|| format!("rings stop at side {side}"));
        self.hv.state = State::StopWait;
        self.sides[side].stop_hold = true;
        self.sides[side].gate = false;
        self.drain(side);
        let now = self.clock();
        let write_cache = self.dice.coin();
        self.sides[side].write_cache = write_cache;
        if let NodeRole::Source(session) = &mut self.sides[side].role {
            session.handle_rings_stopped(now, write_cache);
        }
        self.pump(side);
    }

    fn stopped(&mut self) {
        self.hv.state = State::Stopped;
        let away = 1 - self.guest.at;
        let moves = matches!(self.sides[away].role, NodeRole::Destination(_))
            && self.dice.permille(self.plan.to_destination_permille)
            || self.dice.permille(50);
        self.hv.target = if moves { away } else { self.guest.at };
        self.decide_later();
    }

    fn decide_later(&mut self) {
        if !std::mem::replace(&mut self.hv.deciding, true) {
            let delay = self.dice.delay(self.plan.decide);
            self.after(delay, Event::Hv(HvEvent::Decide));
        }
    }

    // ---- start --------------------------------------------------------------------------------------------------

    pub(crate) fn hv_event(&mut self, event: HvEvent) {
        match (event, self.hv.state) {
            (HvEvent::StopAnswered(side), State::StopWait) if side == self.guest.at => self.stopped(),
            (HvEvent::StartAnswered(side, allowed), State::StartWait(at)) if side == at => {
                self.tell(|| format!("start at side {side}: {allowed}"));
                if allowed { self.runs(side) } else { self.refused(side) }
            }
            (HvEvent::GiveUp(token), State::StartWait(at)) if token == self.hv.token => self.give_up(at),
            (HvEvent::Decide, state) => {
                self.hv.deciding = false;
                if state == State::Stopped {
                    self.start(self.hv.target);
                }
            }
            _ => {}
        }
    }

    fn start(&mut self, side: usize) {
        if !self.sides[side].alive {
            self.hv.target = if self.dice.coin() { side } else { 1 - side };
            return self.decide_later();
        }
        self.tell(|| format!("hypervisor starts the rings at side {side}"));
        let now = self.clock();
        self.hv.token += 1;
        let token = self.hv.token;
        match &mut self.sides[side].role {
            NodeRole::Serving => return self.runs(side),
            NodeRole::Destination(session) if owns(session) => return self.runs(side),
            NodeRole::Idle => return self.refused(side),
            NodeRole::Source(session) if matches!(session.stage(), SourceStage::Released { .. }) => {
                return self.refused(side);
            }
            NodeRole::Source(session) => {
                self.hv.state = State::StartWait(side);
                self.sides[side].start_hold = true;
                session.handle_rings_started(now);
            }
            NodeRole::Destination(session) => {
                self.hv.state = State::StartWait(side);
                self.sides[side].start_hold = true;
                let hold = self.dice.permille(900);
                session.handle_start_requested(now, hold);
                let delay = self.dice.below(self.plan.give_up);
                self.after(delay, Event::Hv(HvEvent::GiveUp(token)));
            }
        }
        self.pump(side);
    }

    fn runs(&mut self, side: usize) {
        assert!(self.sides[side].gate, "a start was allowed but the gate is closed: {}", self.describe());
        self.tell(|| format!("the guest runs at side {side}"));
        self.hv.state = State::Running;
        self.guest.at = side;
        self.guest.issues = true;
        if self.dice.permille(self.plan.again_permille) {
            let delay = self.dice.delay(20 * MS);
            self.after(delay, Event::ChangeMind);
        }
    }

    /// Stops what runs, starts here what was to start there.
    pub(crate) fn change_mind(&mut self) {
        match self.hv.state {
            _ if self.calm => {}
            State::Running => self.stop(),
            State::StartWait(at) if at != self.guest.at => self.give_up(at),
            State::Stopped => self.hv.target = self.guest.at,
            State::Draining | State::StopWait | State::StartWait(_) => {}
        }
    }

    fn refused(&mut self, side: usize) {
        self.hv.state = State::Stopped;
        self.hv.target = if self.dice.permille(850) { 1 - side } else { side };
        self.decide_later();
    }

    fn give_up(&mut self, side: usize) {
        self.tell(|| format!("hypervisor gives up the start at side {side}"));
        self.sides[side].start_hold = false;
        let now = self.clock();
        if let NodeRole::Destination(session) = &mut self.sides[side].role
            && !owns(session)
        {
            session.handle_start_withdrawn(now);
        }
        self.refused(side);
    }

    /// A daemon has died: what the hypervisor waited for there will not come.
    pub(crate) fn hv_died(&mut self, side: usize) {
        self.sides[side].stop_hold = false;
        self.sides[side].start_hold = false;
        match self.hv.state {
            State::StopWait if self.guest.at == side => self.stopped(),
            State::StartWait(at) if at == side => self.refused(side),
            State::Running | State::Draining | State::StopWait | State::Stopped | State::StartWait(_) => {}
        }
    }

    /// Nothing more is to come: the guest runs, its side owns the disk, and the other side owns nothing.
    pub(crate) fn settled(&self) -> bool {
        // Data that the source's host took with it is missed for ever: flushes and reads wait.
        let lost = (0..2).any(|side| {
            let granted = matches!(&self.sides[side].role, NodeRole::Source(s) if matches!(s.stage(), SourceStage::Relinquished { .. }));
            granted && self.sides[side].data_lost
        });
        if lost && self.hv.runs() && self.now > self.plan.chaos + 30 * SECOND {
            return true;
        }
        if !self.hv.running() || !self.sides.iter().all(|side| side.alive) {
            return false;
        }
        let (home, away) = (self.guest.at, 1 - self.guest.at);
        let serves = matches!(self.sides[home].role, NodeRole::Serving);
        let gone = match &self.sides[away].role {
            NodeRole::Idle => true,
            NodeRole::Serving => false,
            NodeRole::Source(session) => matches!(session.stage(), SourceStage::Released { .. }),
            NodeRole::Destination(session) => !owns(session),
        };
        serves && gone && self.guest.idle()
    }
}
