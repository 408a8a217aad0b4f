// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The world of one run: two hosts with a disk and a daemon each, a network, a guest, a hypervisor, and one queue of events
//! on a virtual clock. Each seed draws what the volume is like, what goes wrong and how often.

use crate::dice::Dice;
use crate::guest::{BASE, Guest, SECTOR};
use crate::hypervisor::{Hv, HvEvent};
use crate::net::Net;
use crate::node::{Daemon, Side};
use crate::oracle::Oracle;
use blkferry::core::destination::DestinationSession;
use blkferry::core::geometry::{ChunkId, Geometry};
use blkferry::core::message::{Message, Version};
use blkferry::core::record::SourceStage;
use blkferry::core::source::SourceSession;
use blkferry::engine::{SimDisk, SimPlan};
use std::collections::{BTreeMap, VecDeque};
use std::hash::Hasher;
use std::time::Duration;

pub(crate) const MS: u64 = 1000;
pub(crate) const SECOND: u64 = 1_000_000;

/// What may go wrong in a run, and how often.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) chaos: u64,
    pub(crate) cut_every: u64,
    pub(crate) kill_every: u64,
    pub(crate) host_crash_permille: u64,
    /// How often a daemon dies in the middle of something that it makes durable.
    pub(crate) strike_permille: u64,
    pub(crate) disk: SimPlan,
    pub(crate) cancel_permille: u64,
    pub(crate) stop_permille: u64,
    pub(crate) arm_permille: u64,
    pub(crate) to_destination_permille: u64,
    pub(crate) give_up: u64,
    pub(crate) net_delay: u64,
    pub(crate) decide: u64,
    pub(crate) again_permille: u64,
    pub(crate) flush_percent: u64,
    pub(crate) guest_every: u64,
    pub(crate) hot_permille: u64,
    pub(crate) queues: usize,
    /// Chunks that are installed between two commits; fewer than in a daemon, for there are few chunks.
    pub(crate) commit_every: u32,
}

impl Plan {
    fn draw(dice: &mut Dice) -> Self {
        let mut some = |value: u64| if dice.permille(500) { value } else { 0 };
        let (cut, kill, strike, fails, meta) = (some(1), some(1), some(1), some(1), some(1));
        let (cancel, syncs) = (some(60), some(fails));
        let disk = SimPlan {
            latency: [50, 500, 3000][dice.index(3)],
            stalls: [0, 0, 10, 50][dice.index(4)],
            stall: [20 * MS, 300 * MS][dice.index(2)],
            read_fails: fails * dice.below(15),
            write_fails: fails * dice.below(15),
            sync_fails: syncs * dice.below(10),
            meta_fails: meta * dice.below(10),
            written_back: [0, 200, 900][dice.index(3)],
        };
        Self {
            chaos: dice.between(2000, 7000) * MS,
            cut_every: cut * dice.between(200, 2000) * MS,
            kill_every: kill * dice.between(500, 5000) * MS,
            host_crash_permille: [0, 300, 800][dice.index(3)],
            strike_permille: strike * [10, 40, 150][dice.index(3)],
            disk,
            cancel_permille: cancel,
            stop_permille: dice.between(100, 600),
            arm_permille: dice.between(500, 1000),
            to_destination_permille: dice.between(500, 980),
            give_up: [20 * MS, 500 * MS, 30 * SECOND][dice.index(3)],
            net_delay: [200, 2000, 15_000][dice.index(3)],
            decide: [MS, 20 * MS, 100 * MS][dice.index(3)],
            again_permille: [0, 100, 600][dice.index(3)],
            flush_percent: [1, 10, 20][dice.index(3)],
            guest_every: [4, 10, 30][dice.index(3)] * MS,
            hot_permille: dice.between(200, 950),
            queues: dice.between(1, 3) as usize,
            commit_every: [2, 8, 256][dice.index(3)],
        }
    }

    /// Nothing goes wrong any more.
    fn calm(&mut self) {
        self.cut_every = 0;
        self.kill_every = 0;
        self.strike_permille = 0;
        self.disk = SimPlan { latency: self.disk.latency, ..SimPlan::default() };
        self.cancel_permille = 0;
        self.arm_permille = 0;
        self.again_permille = 0;
        self.give_up = 60 * SECOND;
        self.guest_every = 50 * MS;
    }
}

/// What a side is, as in the daemon.
#[derive(Debug)]
pub(crate) enum NodeRole {
    Serving,
    Idle,
    Source(Box<SourceSession>),
    Destination(Box<DestinationSession>),
}

/// Something of one process, after a time.
#[derive(Debug)]
pub(crate) enum Job {
    Persist,
    Connect,
    Drain,
    Wipe,
    Prune(Vec<(ChunkId, Version)>),
    /// The pause before an upkeep that failed is tried again is over.
    TidiedUp,
}

#[derive(Debug)]
pub(crate) enum Event {
    Job { side: usize, life: u64, run: u64, job: Job },
    Deliver { conn: u64, from: usize, message: Message },
    Closed { side: usize, conn: u64 },
    Guest,
    Hv(HvEvent),
    Operator,
    Cut(bool),
    Heal,
    Kill,
    ChangeMind,
    Restart(usize),
    Calm,
}

macro_rules! stats {
    ($($name:ident)*) => {
        /// What happened, over all runs.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub(crate) struct Stats { $(pub(crate) $name: u64),* }

        impl Stats {
            pub(crate) fn add(&mut self, one: &Self) {
                $(self.$name += one.$name;)*
            }

            /// Everything by name.
            pub(crate) fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),*]
            }
        }
    };
}

stats! {
    handoffs completions reclaims cancels denials returns kept cuts kills host_crashes strikes failures faulty
    fetched rotations reverts torn lost pushes pulls demands overwritten installed superseded held_flushes mismatches
    reads zeroes flushes written_through errors resubmitted excused events
}

pub(crate) struct World {
    pub(crate) dice: Dice,
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    number: u64,
    pub(crate) plan: Plan,
    pub(crate) sides: [Side; 2],
    pub(crate) net: Net,
    pub(crate) oracle: Oracle,
    pub(crate) guest: Guest,
    pub(crate) hv: Hv,
    pub(crate) geometry: Geometry,
    pub(crate) calm: bool,
    /// Everything has come to rest: the disk is read as a whole.
    pub(crate) finishing: bool,
    /// A disk has lied about a sync, and then its host went down: nothing can be said of the rest.
    pub(crate) excused: bool,
    pub(crate) stats: Stats,
    pub(crate) incarnations: u64,
    pub(crate) owners: BTreeMap<u64, usize>,
    pub(crate) trace: Option<VecDeque<String>>,
    /// Of the whole trace.
    pub(crate) digest: std::hash::DefaultHasher,
}

impl Drop for World {
    /// A queue that is dropped waits for its disk, which nobody moves on any more.
    fn drop(&mut self) {
        self.disks().for_each(SimDisk::kill);
    }
}

/// Longest time from the heal to the end.
const PATIENCE: u64 = 300 * SECOND;

impl World {
    pub(crate) fn new(seed: u64, trace: bool) -> Self {
        let mut dice = Dice::new(seed);
        let plan = Plan::draw(&mut dice);
        let chunk = 64 << 10;
        let chunks = dice.between(2, 6);
        let short = if dice.coin() { dice.below(chunk / SECTOR) * SECTOR } else { 0 };
        let geometry = Geometry::new(chunks * chunk - short, 64 << 10).expect("geometry");
        let sectors = geometry.size() / SECTOR;
        // Ending anywhere, also inside a chunk, a block or at the end of the disk.
        let based = if dice.coin() { dice.between(1, sectors) } else { 0 };
        let in_place = dice.coin();
        let sides = [0, 1].map(|_| Side::new(&mut dice, geometry, based, in_place));
        let values = (0..sectors).map(|sector| if sector < based { BASE | sector } else { 0 });
        let mut world = Self {
            guest: Guest::new(&mut dice, geometry.size()),
            oracle: Oracle::new(values),
            dice,
            now: 0,
            queue: BTreeMap::new(),
            number: 0,
            plan,
            sides,
            net: Net::default(),
            hv: Hv::default(),
            geometry,
            calm: false,
            finishing: false,
            excused: false,
            stats: Stats::default(),
            incarnations: 10,
            owners: BTreeMap::new(),
            trace: trace.then(VecDeque::new),
            digest: std::hash::DefaultHasher::new(),
        };
        world.begin(based, in_place);
        world
    }

    fn begin(&mut self, based: u64, in_place: bool) {
        let (plan, geometry) = (self.plan.clone(), self.geometry);
        self.tell(|| format!("{geometry:?}, base of {based} sectors, in place {in_place}; {plan:?}"));
        for side in 0..2 {
            self.restart(side);
            self.sides[side].disk.settle();
            self.sides[side].disk.set_plan(plan.disk);
        }
        self.after(1, Event::Guest);
        self.after(100 * MS, Event::Operator);
        self.after(plan.chaos, Event::Calm);
        for (every, event) in [(plan.cut_every, Event::Cut(true)), (plan.kill_every, Event::Kill)] {
            if every > 0 {
                let delay = self.dice.below(2 * every);
                self.after(delay, event);
            }
        }
    }

    pub(crate) fn tell(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            if trace.len() > 4000 {
                trace.pop_front();
            }
            let line = format!("{:>12.6} {}", self.now as f64 / SECOND as f64, text());
            self.digest.write(line.as_bytes());
            trace.push_back(line);
        }
    }

    pub(crate) fn clock(&self) -> Duration {
        Duration::from_micros(self.now)
    }

    pub(crate) fn at(&mut self, time: u64, event: Event) {
        self.number += 1;
        self.queue.insert((time.max(self.now), self.number), event);
    }

    pub(crate) fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    /// Something that ends with the process and belongs to its migration run.
    pub(crate) fn job(&mut self, side: usize, delay: u64, job: Job) {
        let (life, run) = (self.sides[side].life, self.sides[side].run);
        self.after(delay, Event::Job { side, life, run, job });
    }

    fn timer(&self) -> Option<u64> {
        let of = |side: usize| {
            let at = match &self.sides[side].role {
                NodeRole::Source(session) => session.next_timeout(),
                NodeRole::Destination(session) => session.next_timeout(),
                NodeRole::Serving | NodeRole::Idle => None,
            }?;
            Some(u64::try_from(at.as_micros()).expect("time"))
        };
        (0..2).filter(|side| self.sides[*side].alive).filter_map(of).min()
    }

    /// Runs to the end; panics where the design is broken.
    pub(crate) fn run(&mut self) {
        let mut same_time = 0;
        loop {
            let before = self.now;
            self.step();
            self.stats.events += 1;
            same_time = if self.now == before { same_time + 1 } else { 0 };
            assert!(same_time < 20_000, "time does not go on");
            self.check();
            self.check_gates();
            if self.excused || self.ends() {
                break;
            }
            assert!(self.now < self.plan.chaos + PATIENCE, "no end: {}", self.describe());
        }
        self.stats.excused += u64::from(self.excused);
        self.stats.failures += self.sides.iter().map(|side| side.disk.failures()).sum::<u64>();
    }

    /// The disk is read as a whole when nothing more is to come; then it is over.
    fn ends(&mut self) -> bool {
        if !self.calm || !self.settled() {
            return false;
        }
        let lost = self.is_lost();
        self.stats.lost += u64::from(lost);
        if lost || self.finishing {
            return true;
        }
        self.finishing = true;
        self.read_all();
        self.settle();
        false
    }

    fn disks(&self) -> impl Iterator<Item = &SimDisk> {
        self.sides.iter().flat_map(|side| std::iter::once(&side.disk).chain(&side.base_disk))
    }

    /// Data that a host took with it is missed for ever.
    pub(crate) fn is_lost(&self) -> bool {
        self.sides.iter().any(|side| {
            let relinquished = matches!(&side.role, NodeRole::Source(s) if matches!(s.stage(), SourceStage::Relinquished { .. }));
            relinquished && side.data_lost
        })
    }

    fn step(&mut self) {
        let event = self.queue.keys().next().map(|key| key.0);
        let disks = self.disks().filter_map(SimDisk::next_due).min();
        let Some(next) = [event, disks, self.timer()].into_iter().flatten().min() else {
            panic!("nothing happens any more: {}", self.describe())
        };
        self.now = self.now.max(next);
        if disks == Some(next) {
            self.disks().for_each(|disk| disk.advance(next));
        } else if event == Some(next) {
            self.disks().for_each(|disk| disk.advance(next));
            if let Some((_, event)) = self.queue.pop_first() {
                self.take(event);
            }
        } else {
            let now = self.clock();
            for side in self.sides.iter_mut().filter(|side| side.alive) {
                match &mut side.role {
                    NodeRole::Source(session) => session.handle_timeout(now),
                    NodeRole::Destination(session) => session.handle_timeout(now),
                    NodeRole::Serving | NodeRole::Idle => {}
                }
            }
        }
        self.settle();
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Job { side, life, run, job } => {
                if self.sides[side].alive && self.sides[side].life == life {
                    self.take_job(side, run, job);
                }
            }
            Event::Deliver { conn, from, message } => self.deliver(conn, from, message),
            Event::Closed { side, conn } => self.closed(side, conn),
            Event::Guest => self.guest_tick(),
            Event::Hv(event) => self.hv_event(event),
            Event::Operator => self.operator_tick(),
            Event::Cut(again) => self.cut_tick(again),
            Event::ChangeMind => self.change_mind(),
            Event::Heal => self.net.down = false,
            Event::Kill => self.kill_tick(),
            Event::Restart(side) => self.restart(side),
            Event::Calm => self.become_calm(),
        }
    }

    /// Whoever has something to do does it, until nobody has.
    pub(crate) fn settle(&mut self) {
        for _ in 0..10_000 {
            let mut busy = false;
            for side in 0..2 {
                busy |= self.work(side);
                self.pump(side);
                let ready = |daemon: &Daemon| daemon.tasks.is_ready() || !daemon.events.is_empty();
                busy |= self.sides[side].daemon.as_ref().is_some_and(ready);
            }
            if !busy {
                return;
            }
        }
        panic!("a daemon never comes to rest: {}", self.describe());
    }

    /// The network and the disks heal, and the operator restarts what has failed for good.
    fn become_calm(&mut self) {
        self.tell(|| "---- calm ----".to_owned());
        self.calm = true;
        self.plan.calm();
        self.net.down = false;
        for side in 0..2 {
            self.sides[side].disk.set_plan(self.plan.disk);
            let s = &self.sides[side];
            let broken = s.unwiped || s.daemon.as_ref().is_some_and(|d| d.volume.fault().is_some());
            if s.alive && broken {
                self.kill(side, false);
            } else if !s.alive {
                self.after(10 * MS, Event::Restart(side));
            }
        }
    }

    pub(crate) fn describe(&self) -> String {
        let role = |side: usize| match &self.sides[side].role {
            NodeRole::Serving => "serving".to_owned(),
            NodeRole::Idle => "idle".to_owned(),
            NodeRole::Source(s) => format!("source {:?} {:?} {:?}", s.step(), s.epoch(), s.progress()),
            NodeRole::Destination(d) => {
                format!("destination {:?} {:?} {:?}", d.step(), d.epoch(), d.progress())
            }
        };
        let one = |side: usize| {
            let s = &self.sides[side];
            let states = s.daemon.as_ref().map(|d| d.volume.counts());
            format!(
                "side {side}: {} alive {} gate {} conn {:?} lost {} {states:?}",
                role(side),
                s.alive,
                s.gate,
                s.conn,
                s.data_lost
            )
        };
        format!("{}; {}; hv {:?}; guest {}", one(0), one(1), self.hv, self.guest.describe())
    }

    /// What the volumes say of themselves is what the daemons mean.
    fn check_gates(&self) {
        for side in &self.sides {
            if let Some(daemon) = &side.daemon {
                assert_eq!(side.gate, daemon.volume.gate().is_open(), "a gate is not as its daemon means");
            }
        }
    }
}
