// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From every state, a world in which nothing more goes wrong comes to a good end.
//!
//! `eventually` of a model checker looks at paths without cycles only, and asks too much: a schedule that never
//! delivers a message proves nothing. So from each state one fair schedule is run: everything under way ends, messages
//! arrive in order, timers fire when nothing else is left, and the hypervisor sticks to one side until that is refused
//! it. The schedule is a function of the state, so a state from which it is known to end well ends every later one
//! that comes by; most states are a step away from such a one.

use crate::bounds::Bounds;
use crate::shared::Mixer;
use crate::step::{Act, Timer};
use crate::world::{Beside, DESTINATION, Left, Role, Rule, SOURCE, World};
use blkferry::core::ownership::{SourceStep, destination_serves};
use blkferry::core::record::SourceStage;
use std::collections::HashSet;
use std::sync::Mutex;

/// Steps after which a schedule counts as endless.
const LONG: usize = 3000;

/// Fingerprints of states from which the world ends well, by the side that the hypervisor prefers.
#[derive(Debug, Default)]
pub(crate) struct Known([Mutex<HashSet<u64>>; 2]);

impl Known {
    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(|set| set.lock().expect("no panic").len()).sum()
    }
}

impl World {
    /// Runs both schedules; says what goes wrong.
    pub(crate) fn ends_well(&self, bounds: &Bounds, known: &Known) -> Result<(), (Rule, String)> {
        for prefers in [SOURCE, DESTINATION] {
            self.clone().heal(bounds, known, prefers)?;
        }
        Ok(())
    }

    fn heal(mut self, bounds: &Bounds, known: &Known, prefers: usize) -> Result<(), (Rule, String)> {
        self.left = Left::default();
        (self.left.stops, self.left.starts, self.left.asks) = (0, 0, 0);
        let mut prefers = prefers;
        let mut path = vec![Vec::new(), Vec::new()];
        for _ in 0..LONG {
            let print = Mixer::print(&self);
            if known.0[prefers].lock().expect("no panic").contains(&print) {
                return self.remember(known, path);
            }
            path[prefers].push(print);
            if self.settled() {
                return self.remember(known, path);
            }
            let Some(act) = self.next_of_schedule(prefers) else {
                return Err((
                    Rule::EndsWell,
                    format!("stuck, side {prefers} preferred: {}", self.describe()),
                ));
            };
            let start = matches!(act, Act::Ask { .. });
            let waits = self.side(DESTINATION).start_wait || start;
            self.seen = Beside(0);
            self.act(bounds, act);
            self.seal();
            if let Some(broken) = self.broken {
                return Err(broken);
            }
            let refused = waits && !self.side(DESTINATION).start_wait && !self.side(DESTINATION).rings;
            if refused {
                prefers = SOURCE;
            } else if prefers == SOURCE && self.owner() == DESTINATION {
                prefers = DESTINATION;
            }
        }
        Err((Rule::EndsWell, format!("no end, side {prefers} preferred: {}", self.describe())))
    }

    fn remember(&self, known: &Known, path: Vec<Vec<u64>>) -> Result<(), (Rule, String)> {
        for (set, prints) in known.0.iter().zip(path) {
            set.lock().expect("no panic").extend(prints);
        }
        Ok(())
    }

    /// The migration is over, the guest runs at its disk's owner, and nothing is under way.
    fn settled(&self) -> bool {
        let (source, destination) = (self.side(SOURCE), self.side(DESTINATION));
        let quiet = [source, destination].iter().all(|s| s.writes.is_empty() && s.jobs.is_empty());
        if !quiet || self.guest.op.is_some() {
            return false;
        }
        if source.role == Role::Serving {
            let idle = match &destination.role {
                Role::Destination(session) => !destination_serves(session.step()),
                Role::Idle => true,
                Role::Serving | Role::Source(_) => false,
            };
            return idle && source.rings && source.gate;
        }
        let Some(session) = self.source() else { return false };
        let owner = destination.gate && destination.rings;
        match session.stage() {
            SourceStage::Released { .. } => owner && destination.role == Role::Serving,
            // What the source's host took with it is missed for ever; it is said by name.
            SourceStage::Relinquished { .. } => {
                owner && source.data_lost && source.volume != destination.volume
            }
            SourceStage::Pushing | SourceStage::Offered => false,
        }
    }

    fn next_of_schedule(&self, prefers: usize) -> Option<Act> {
        self.next_inside().or_else(|| self.next_of_hypervisor(prefers)).or_else(|| self.next_timer())
    }

    /// Everything that goes on by itself, in one order.
    pub(crate) fn next_inside(&self) -> Option<Act> {
        if self.guest.op.is_some() && self.guest.op.is_some_and(|op| self.side(op.side).gate) {
            return Some(Act::TouchEnd);
        }
        for side in [SOURCE, DESTINATION] {
            let s = self.side(side);
            if !s.writes.is_empty() {
                return Some(Act::Persisted(side));
            }
            if let Some(index) = (0..s.jobs.len()).find(|index| self.job_can_end(side, *index)) {
                return Some(Act::Job { side, index, ok: true });
            }
        }
        if self.side(SOURCE).tracked.as_ref().is_some_and(|tracked| !tracked.is_empty()) {
            return Some(Act::Drain);
        }
        if let Some(conn) = self.conn.as_ref().map(crate::shared::Shared::get) {
            for from in [SOURCE, DESTINATION] {
                if conn.up[1 - from] && !conn.control[from].is_empty() {
                    return Some(Act::Control(from));
                }
            }
            if conn.up[DESTINATION] && !conn.data.is_empty() {
                return Some(Act::Data(0));
            }
            if let Some(side) = [SOURCE, DESTINATION].into_iter().find(|side| conn.cut && conn.up[*side]) {
                return Some(Act::Notice(side));
            }
        }
        let dials = self.side(SOURCE).dial;
        dials.then_some(Act::Dial)
    }

    fn next_of_hypervisor(&self, prefers: usize) -> Option<Act> {
        let (source, destination) = (self.side(SOURCE), self.side(DESTINATION));
        let Some(session) = self.source() else {
            return (self.can_start() && source.role == Role::Serving).then_some(Act::Start);
        };
        let runs = source.rings && source.gate;
        match session.step() {
            SourceStep::Granting
            | SourceStep::Relinquished
            | SourceStep::Releasing
            | SourceStep::Released => {
                (self.can_ask() && !destination.rings).then_some(Act::Ask { hold: true })
            }
            SourceStep::Pushing if prefers == SOURCE && runs => Some(Act::Cancel(SOURCE)),
            SourceStep::Pushing if runs && self.can_stop() => Some(Act::Stop),
            SourceStep::Pushing | SourceStep::Offered if prefers == DESTINATION => {
                self.can_ask().then_some(Act::Ask { hold: true })
            }
            SourceStep::Pushing | SourceStep::Offered | SourceStep::Draining => {
                if prefers == SOURCE && destination.start_wait {
                    return Some(Act::Withdraw);
                }
                (prefers == SOURCE && self.can_start()).then_some(Act::Start)
            }
            SourceStep::Arming
            | SourceStep::Offering
            | SourceStep::Reclaiming
            | SourceStep::Leaving
            | SourceStep::Left => None,
        }
    }

    fn next_timer(&self) -> Option<Act> {
        let timer = |side| Some(Act::Timer(side, Timer::Next)).filter(|_| self.next_timeout(side).is_some());
        let soon = |side: &usize| {
            let limit = crate::world::NOW + crate::world::HALF_LIFE;
            self.next_timeout(*side).is_some_and(|at| at < limit)
        };
        [SOURCE, DESTINATION].into_iter().find(soon).and_then(timer).or_else(|| {
            // Only the half-life is left: chunks cool down until they may be pushed.
            timer(SOURCE).or_else(|| timer(DESTINATION))
        })
    }

    pub(crate) fn describe(&self) -> String {
        let one = |side: usize| {
            let s = self.side(side);
            let role = match &s.role {
                Role::Serving => "serving".to_owned(),
                Role::Idle => "idle".to_owned(),
                Role::Source(session) => format!("{:?} {:?}", session.step(), session.epoch()),
                Role::Destination(session) => format!("{:?} {:?}", session.step(), session.epoch()),
            };
            format!(
                "side {side}: {role}, gate {} rings {} waits {} {} dials {} lost {} {:?} {:?} {:?}",
                s.gate,
                s.rings,
                s.stop_wait,
                s.start_wait,
                s.dial,
                s.data_lost,
                s.volume.chunks,
                s.jobs,
                s.writes
            )
        };
        format!("{}; {}; conn {:?}; {:?}", one(SOURCE), one(DESTINATION), self.conn, self.guest)
    }
}
