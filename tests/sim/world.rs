// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The world of one run: two sides, a network, a guest, a hypervisor, and one queue of events on a virtual clock.

use crate::dice::Dice;
use crate::guest::Guest;
use crate::hypervisor::{Hv, HvEvent};
use crate::model::Model;
use crate::net::Net;
use crate::volume::{BLOCKS, Snapshot, Volume};
use blkferry::core::destination::DestinationSession;
use blkferry::core::geometry::{BlockMask, ChunkId, Geometry};
use blkferry::core::message::{BaseIdentity, ChunkData, Epoch, Message, MigrationId, Version, VolumeId};
use blkferry::core::record::{MigrationRecord, Role};
use blkferry::core::source::{Capture, SourceSession};
use std::collections::{BTreeMap, VecDeque};
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
    pub(crate) capture_fails: u64,
    pub(crate) install_fails: u64,
    pub(crate) pull_install_fails: u64,
    pub(crate) sync_fails: u64,
    pub(crate) cancel_permille: u64,
    pub(crate) stop_permille: u64,
    pub(crate) arm_permille: u64,
    pub(crate) to_destination_permille: u64,
    pub(crate) give_up: u64,
    pub(crate) net_delay: u64,
    pub(crate) disk_delay: u64,
    pub(crate) capture_delay: u64,
    pub(crate) sync_delay: u64,
    /// How soon the hypervisor decides.
    pub(crate) decide: u64,
    pub(crate) again_permille: u64,
    /// How often a step of a session is followed at once by a crash, a cut or a change of mind.
    pub(crate) strike_permille: u64,
    pub(crate) flush_percent: u64,
    pub(crate) guest_every: u64,
    pub(crate) upkeep_every: u64,
    pub(crate) hot_permille: u64,
}

impl Plan {
    fn draw(dice: &mut Dice) -> Self {
        let mut some = |value: u64| if dice.permille(600) { value } else { 0 };
        let (cut, kill, fails) = (some(1), some(1), some(1));
        let cancel = some(60);
        Self {
            chaos: dice.between(4, 12) * SECOND,
            cut_every: cut * dice.between(300, 4000) * MS,
            kill_every: kill * dice.between(1000, 8000) * MS,
            host_crash_permille: dice.between(0, 600),
            capture_fails: fails * dice.below(80),
            install_fails: fails * dice.below(3),
            pull_install_fails: fails * dice.below(100),
            sync_fails: fails * dice.below(300),
            cancel_permille: cancel,
            stop_permille: dice.between(50, 500),
            arm_permille: dice.between(200, 900),
            to_destination_permille: dice.between(500, 950),
            give_up: [20 * MS, 500 * MS, 30 * SECOND][dice.index(3)],
            capture_delay: [0, 0, 20 * MS, 150 * MS][dice.index(4)],
            sync_delay: [0, 0, 100 * MS, SECOND][dice.index(4)],
            decide: [MS, 50 * MS, 300 * MS][dice.index(3)],
            again_permille: [0, 100, 600][dice.index(3)],
            strike_permille: [0, 0, 30, 120][dice.index(4)],
            flush_percent: [1, 10][dice.index(2)],
            net_delay: [200, 2000, 15_000][dice.index(3)],
            disk_delay: [100, 1000, 6000][dice.index(3)],
            guest_every: [3, 10, 30][dice.index(3)] * MS,
            upkeep_every: [300 * MS, 3 * SECOND, 60 * SECOND][dice.index(3)],
            hot_permille: dice.between(200, 950),
        }
    }

    /// Nothing goes wrong any more.
    pub(crate) fn calm(&mut self) {
        self.cut_every = 0;
        self.kill_every = 0;
        self.capture_fails = 0;
        self.install_fails = 0;
        self.pull_install_fails = 0;
        self.sync_fails = 0;
        self.cancel_permille = 0;
        self.arm_permille = 0;
        self.strike_permille = 0;
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

#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) run: u64,
    pub(crate) seq: u64,
    pub(crate) record: MigrationRecord,
    pub(crate) remaining: Option<Vec<(ChunkId, u8, bool)>>,
}

/// Why a sync runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SyncFor {
    Layer,
    Volume,
    Upkeep,
    Flush(u64),
}

/// One daemon and its host.
#[derive(Debug)]
pub(crate) struct Side {
    pub(crate) volume: Volume,
    pub(crate) tracked: Option<BTreeMap<ChunkId, (u32, u32)>>,
    pub(crate) drain_due: bool,
    pub(crate) alive: bool,
    /// Number of this process.
    pub(crate) life: u64,
    /// Number of the migration run in it.
    pub(crate) run: u64,
    pub(crate) boot: u64,
    pub(crate) role: NodeRole,
    pub(crate) gate: bool,
    pub(crate) flush_gate: bool,
    pub(crate) write_cache: bool,
    pub(crate) conn: Option<u64>,
    pub(crate) volume_id: VolumeId,
    /// The migration in which the disk came; durable.
    pub(crate) came_in: Option<MigrationId>,
    pub(crate) epoch: Epoch,
    pub(crate) virgin: bool,
    pub(crate) stop_hold: bool,
    pub(crate) start_hold: bool,
    pub(crate) writes: VecDeque<Write>,
    pub(crate) writing: bool,
    pub(crate) moving: u32,
    pub(crate) data_lost: bool,
    pub(crate) precopy: bool,
    /// The session's step when it was last looked at.
    pub(crate) step: u8,
    // Durable:
    pub(crate) record: MigrationRecord,
    pub(crate) record_boot: u64,
    pub(crate) remaining: Option<Vec<(ChunkId, u8, bool)>>,
    pub(crate) prepared_at: u64,
    /// Highest epoch that this side has given away.
    pub(crate) granted: u64,
    /// Highest epoch that this side has offered.
    pub(crate) offered: u64,
}

#[derive(Debug)]
pub(crate) struct CaptureJob {
    pub(crate) chunk: ChunkId,
    pub(crate) version: u64,
    pub(crate) clean: bool,
    pub(crate) mask: BlockMask,
    pub(crate) values: Vec<u64>,
}

/// Something of one process.
#[derive(Debug)]
pub(crate) enum Job {
    Persisted,
    CaptureStart(ChunkId),
    CaptureMid(CaptureJob),
    CaptureEnd(CaptureJob),
    Captured(ChunkId, Capture),
    InstallStart(ChunkData, bool, bool),
    InstallEnd(ChunkData),
    Synced(SyncFor, Box<Snapshot>),
    Wiped,
    Pruned(Vec<(ChunkId, Version)>),
    Connect,
    Drain,
    WriteMid(u64),
    WriteEnd(u64),
    PunchStart(u64),
    PunchEnd(u64),
    Fetch(ChunkId, bool),
    Upkeep,
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
    Kill(Option<usize>),
    ChangeMind,
    Restart(usize),
    Calm,
}

/// What happened, over all runs.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stats {
    pub(crate) handoffs: u64,
    pub(crate) completions: u64,
    pub(crate) reclaims: u64,
    pub(crate) cancels: u64,
    pub(crate) cuts: u64,
    pub(crate) kills: u64,
    pub(crate) host_crashes: u64,
    pub(crate) pushes: u64,
    pub(crate) pulls: u64,
    pub(crate) demands: u64,
    pub(crate) overwritten: u64,
    pub(crate) torn: u64,
    pub(crate) denials: u64,
    pub(crate) mismatches: u64,
    pub(crate) held_flushes: u64,
    pub(crate) lost: u64,
    pub(crate) returns: u64,
    pub(crate) kept: u64,
    pub(crate) absences: u64,
    pub(crate) reads: u64,
    pub(crate) events: u64,
}

impl Stats {
    pub(crate) fn add(&mut self, one: &Self) {
        self.absences += one.absences;
        self.handoffs += one.handoffs;
        self.completions += one.completions;
        self.reclaims += one.reclaims;
        self.cancels += one.cancels;
        self.cuts += one.cuts;
        self.kills += one.kills;
        self.host_crashes += one.host_crashes;
        self.pushes += one.pushes;
        self.pulls += one.pulls;
        self.demands += one.demands;
        self.overwritten += one.overwritten;
        self.torn += one.torn;
        self.denials += one.denials;
        self.mismatches += one.mismatches;
        self.held_flushes += one.held_flushes;
        self.lost += one.lost;
        self.returns += one.returns;
        self.kept += one.kept;
        self.reads += one.reads;
        self.events += one.events;
    }
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) dice: Dice,
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    number: u64,
    pub(crate) plan: Plan,
    pub(crate) sides: [Side; 2],
    pub(crate) net: Net,
    pub(crate) model: Model,
    pub(crate) guest: Guest,
    pub(crate) hv: Hv,
    pub(crate) geometry: Geometry,
    pub(crate) base: BaseIdentity,
    pub(crate) calm: bool,
    pub(crate) stats: Stats,
    pub(crate) incarnations: u64,
    pub(crate) owners: BTreeMap<u64, usize>,
    pub(crate) trace: Option<VecDeque<String>>,
}

/// Longest time from the heal to the end.
const PATIENCE: u64 = 300 * SECOND;

impl World {
    pub(crate) fn new(seed: u64, trace: bool) -> Self {
        let mut dice = Dice::new(seed);
        let plan = Plan::draw(&mut dice);
        let chunks = dice.between(8, 40);
        let short = dice.below(64) * 1024 + if dice.coin() { 512 } else { 0 };
        let geometry = Geometry::new(chunks * (64 << 10) - short.min(63 << 10), 64 << 10).expect("geometry");
        let based = if dice.coin() { dice.below(u64::from(geometry.chunk_count())) as u32 } else { 0 };
        let base = BaseIdentity { length: u64::from(based) << 16, digest: [7; 32] };
        let mut sides = [0, 1].map(|_| Side::new(geometry, based));
        for value in 1..dice.between(2, 200) {
            let chunk = ChunkId(dice.below(u64::from(geometry.chunk_count())) as u32);
            sides[0].preset(chunk, dice.number(), value | 1 << 50);
        }
        sides[0].record =
            MigrationRecord::V1 { volume: VolumeId([1; 16]), epoch: Epoch(1), role: Role::Serving };
        sides[0].volume_id = VolumeId([1; 16]);
        sides[0].epoch = Epoch(1);
        sides[0].role = NodeRole::Serving;
        sides[0].gate = true;
        sides[1].virgin = dice.coin();
        if !sides[1].virgin {
            for chunk in geometry.chunks().step_by(3) {
                sides[1].preset(chunk, u64::MAX, 0xbad);
            }
        }
        let values: Vec<u64> = geometry
            .chunks()
            .flat_map(|chunk| (0..BLOCKS).map(move |block| (chunk, block)))
            .map(|(chunk, block)| sides[0].volume.value(chunk, block).unwrap_or(0))
            .collect();
        for side in &mut sides {
            let snapshot = side.volume.snapshot();
            side.volume.sync(snapshot);
        }
        let trace = trace.then(VecDeque::new);
        let mut world = Self {
            guest: Guest::new(&mut dice, geometry),
            model: Model::new(values.into_iter()),
            dice,
            now: 0,
            queue: BTreeMap::new(),
            number: 0,
            plan,
            sides,
            net: Net::default(),
            hv: Hv::default(),
            geometry,
            base,
            calm: false,
            stats: Stats::default(),
            incarnations: 10,
            owners: BTreeMap::new(),
            trace,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        let plan = self.plan.clone();
        self.tell(|| format!("plan {plan:?}"));
        self.after(1, Event::Guest);
        self.after(100 * MS, Event::Operator);
        self.after(plan.chaos, Event::Calm);
        for (every, event) in [(plan.cut_every, Event::Cut(true)), (plan.kill_every, Event::Kill(None))] {
            if every > 0 {
                let delay = self.dice.below(2 * every);
                self.after(delay, event);
            }
        }
        for side in 0..2 {
            self.job(side, plan.upkeep_every, Job::Upkeep);
        }
    }

    pub(crate) fn tell(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            if trace.len() > 4000 {
                trace.pop_front();
            }
            trace.push_back(format!("{:>12.6} {}", self.now as f64 / SECOND as f64, text()));
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

    pub(crate) fn disk(&mut self) -> u64 {
        let typical = self.plan.disk_delay;
        self.dice.delay(typical)
    }

    fn timer(&self) -> Option<(u64, usize)> {
        let of = |side: usize| {
            let at = match &self.sides[side].role {
                NodeRole::Source(session) => session.next_timeout(),
                NodeRole::Destination(session) => session.next_timeout(),
                NodeRole::Serving | NodeRole::Idle => None,
            }?;
            Some((u64::try_from(at.as_micros()).expect("time"), side))
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
            if self.calm && self.settled() {
                return self.check_end();
            }
            let limit = self.plan.chaos + PATIENCE;
            assert!(self.now < limit, "no end: {}", self.describe());
        }
    }

    fn step(&mut self) {
        let next = self.queue.keys().next().copied();
        if let Some((at, side)) = self.timer()
            && next.is_none_or(|(time, _)| at < time)
        {
            self.now = self.now.max(at);
            let now = self.clock();
            match &mut self.sides[side].role {
                NodeRole::Source(session) => session.handle_timeout(now),
                NodeRole::Destination(session) => session.handle_timeout(now),
                NodeRole::Serving | NodeRole::Idle => {}
            }
            return self.pump(side);
        }
        let Some(key) = next else { panic!("nothing happens any more: {}", self.describe()) };
        let Some(event) = self.queue.remove(&key) else { return };
        self.now = key.0;
        self.take(event);
        self.pump(0);
        self.pump(1);
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
            Event::Kill(None) => self.kill_tick(),
            Event::Kill(Some(side)) => self.strike_down(side),
            Event::Restart(side) => self.restart(side),
            Event::Calm => self.become_calm(),
        }
    }

    fn become_calm(&mut self) {
        self.tell(|| "---- calm ----".to_owned());
        self.calm = true;
        self.plan.calm();
        self.net.down = false;
        for side in 0..2 {
            if !self.sides[side].alive {
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
            format!(
                "side {side}: {} alive {} gate {} flush {} conn {:?} lost {}",
                role(side),
                s.alive,
                s.gate,
                s.flush_gate,
                s.conn,
                s.data_lost
            )
        };
        format!("{}; {}; hv {:?}; guest {}", one(0), one(1), self.hv, self.guest.describe())
    }
}

impl Side {
    fn new(geometry: Geometry, based: u32) -> Self {
        let volume = VolumeId([9; 16]);
        Self {
            volume: Volume::new(geometry, based),
            tracked: None,
            drain_due: false,
            alive: true,
            life: 1,
            run: 1,
            boot: 1,
            role: NodeRole::Idle,
            gate: false,
            flush_gate: true,
            write_cache: true,
            conn: None,
            volume_id: volume,
            epoch: Epoch(0),
            came_in: None,
            virgin: false,
            stop_hold: false,
            start_hold: false,
            writes: VecDeque::new(),
            writing: false,
            moving: 0,
            data_lost: false,
            precopy: false,
            step: 0,
            record: MigrationRecord::V1 { volume, epoch: Epoch(0), role: Role::Idle },
            record_boot: 1,
            remaining: None,
            prepared_at: 0,
            granted: 0,
            offered: 0,
        }
    }

    /// Content of before the run.
    fn preset(&mut self, chunk: ChunkId, some: u64, value: u64) {
        let full = self.volume.full(chunk);
        let mask = BlockMask(full.0 & some);
        let before = blkferry::core::chunk::route(
            &self.volume.geometry,
            blkferry::core::chunk::ChunkView {
                state: self.volume.chunk(chunk).state,
                mask: self.volume.chunk(chunk).mask,
            },
            blkferry::core::chunk::Access::Write,
            blkferry::core::geometry::Span { chunk, start: 0, len: self.volume.geometry.chunk_len(chunk) },
        );
        let before = match before {
            blkferry::core::chunk::Route::Modify { before, .. } => before,
            _ => None,
        };
        self.volume.begin_write(chunk, before);
        for block in crate::volume::bits(mask) {
            self.volume.put(chunk, block, value);
        }
        self.volume.end_write(chunk, mask);
    }
}
