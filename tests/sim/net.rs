// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network: a connection has one ordered control stream each way and two data streams from the source, each in
//! order, with no order between them. A cut loses what is under way, and the two ends notice it at times of their own.

use crate::world::{Event, MS, NodeRole, SECOND, World};
use blkferry::core::message::{Message, Refusal};
use blkferry::core::record::SourceStage;
use std::collections::BTreeMap;

#[derive(Debug)]
struct Conn {
    open: bool,
    /// The end that closed it in order: what it said before still arrives.
    closed_by: Option<usize>,
    ends: [bool; 2],
    /// Latest arrival on each stream: control of either end, two data streams.
    latest: [u64; 4],
}

#[derive(Debug, Default)]
pub(crate) struct Net {
    pub(crate) down: bool,
    conns: BTreeMap<u64, Conn>,
    count: u64,
}

impl World {
    /// The source dials.
    pub(crate) fn dial(&mut self, side: usize) {
        let peer = 1 - side;
        let now = self.clock();
        if self.net.down || !self.sides[peer].alive {
            if let NodeRole::Source(session) = &mut self.sides[side].role {
                session.handle_disconnected(now);
            }
            return;
        }
        self.net.count += 1;
        let conn = self.net.count;
        let latest = [self.now; 4];
        self.net.conns.insert(conn, Conn { open: true, closed_by: None, ends: [true; 2], latest });
        self.tell(|| format!("connection {conn} by side {side}"));
        let old = self.sides[side].conn.replace(conn);
        assert!(old.is_none(), "the source dials while it is connected");
        self.accept(peer, conn);
        if let NodeRole::Source(session) = &mut self.sides[side].role {
            session.handle_connected(now);
        }
    }

    fn accept(&mut self, side: usize, conn: u64) {
        match &self.sides[side].role {
            NodeRole::Serving => {
                let text = "this daemon serves a disk of its own".to_owned();
                self.sides[side].conn = Some(conn);
                return self.say(side, Message::Refuse { reason: Refusal::Busy, text });
            }
            NodeRole::Idle => self.become_destination(side, false, None),
            NodeRole::Source(session) => {
                let SourceStage::Released { synced } = session.stage() else {
                    let delay = self.dice.delay(self.plan.net_delay);
                    self.net.conns.entry(conn).and_modify(|c| c.open = false);
                    return self.after(delay, Event::Closed { side: 1 - side, conn });
                };
                let replica = synced.then(|| session.migration());
                self.become_destination(side, true, replica);
            }
            NodeRole::Destination(_) => {}
        }
        let now = self.clock();
        self.sides[side].conn = Some(conn);
        if let NodeRole::Destination(session) = &mut self.sides[side].role {
            session.handle_connected(now);
        }
    }

    /// A side says something on its connection, if it has one.
    pub(crate) fn say(&mut self, from: usize, message: Message) {
        let Some(number) = self.sides[from].conn else { return };
        self.check_said(from, &message);
        let stream = if matches!(message, Message::Chunk(_)) { 2 + self.dice.index(2) } else { from };
        let delay = self.dice.delay(self.plan.net_delay);
        let now = self.now;
        let Some(conn) = self.net.conns.get_mut(&number).filter(|conn| conn.open) else { return };
        let at = (now + delay).max(conn.latest[stream] + 1);
        conn.latest[stream] = at;
        self.tell(|| format!("  {from} says {message:?}"));
        self.at(at, Event::Deliver { conn: number, from, message });
    }

    pub(crate) fn deliver(&mut self, number: u64, from: usize, message: Message) {
        let to = 1 - from;
        let arrives = |conn: &Conn| conn.open || conn.closed_by == Some(from);
        if self.sides[to].conn != Some(number) || !self.net.conns.get(&number).is_some_and(arrives) {
            return;
        }
        self.tell(|| format!("  {to} hears {message:?}"));
        let now = self.clock();
        self.count_message(&message);
        match &mut self.sides[to].role {
            NodeRole::Source(session) => session.handle_message(now, message),
            NodeRole::Destination(session) => session.handle_message(now, message),
            NodeRole::Serving | NodeRole::Idle => {}
        }
    }

    fn count_message(&mut self, message: &Message) {
        match message {
            Message::Pull { demand, .. } => {
                self.stats.pulls += 1;
                self.stats.demands += u64::from(*demand);
            }
            Message::Mismatch { .. } => self.stats.mismatches += 1,
            Message::Denied { .. } => self.stats.denials += 1,
            _ => {}
        }
    }

    /// An end closes its connection, or dies.
    pub(crate) fn hang_up(&mut self, side: usize, in_order: bool) {
        let Some(number) = self.sides[side].conn.take() else { return };
        let delay = self.dice.delay(self.plan.net_delay);
        let Some(conn) = self.net.conns.get_mut(&number).filter(|conn| conn.open) else { return };
        conn.open = false;
        conn.ends[side] = false;
        conn.closed_by = in_order.then_some(side);
        let last = if in_order { conn.latest.into_iter().max().unwrap_or(0) } else { 0 };
        let at = last.max(self.now + delay);
        self.tell(|| format!("side {side} closes connection {number}"));
        self.at(at, Event::Closed { side: 1 - side, conn: number });
    }

    /// An end notices that its connection is gone.
    pub(crate) fn closed(&mut self, side: usize, conn: u64) {
        if self.sides[side].conn != Some(conn) {
            return;
        }
        self.tell(|| format!("side {side} notices the end of connection {conn}"));
        self.sides[side].conn = None;
        let now = self.clock();
        match &mut self.sides[side].role {
            NodeRole::Source(session) => session.handle_disconnected(now),
            NodeRole::Destination(session) => session.handle_disconnected(now),
            NodeRole::Serving | NodeRole::Idle => {}
        }
    }

    pub(crate) fn cut_tick(&mut self, again: bool) {
        if self.calm {
            return;
        }
        let open: Vec<u64> = self.net.conns.iter().filter(|(_, c)| c.open).map(|(n, _)| *n).collect();
        for number in open {
            self.stats.cuts += 1;
            self.tell(|| format!("connection {number} is cut"));
            self.net.conns.entry(number).and_modify(|conn| conn.open = false);
            for side in 0..2 {
                let typical = [MS, 100 * MS, SECOND][self.dice.index(3)];
                let delay = self.dice.delay(typical);
                self.after(delay, Event::Closed { side, conn: number });
            }
        }
        if !again {
            return;
        }
        if self.dice.coin() {
            self.net.down = true;
            let delay = self.dice.below(2 * SECOND);
            self.after(delay, Event::Heal);
        }
        let delay = self.dice.below(2 * self.plan.cut_every);
        self.after(delay, Event::Cut(true));
    }
}
