// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two daemons, one guest, and what its hypervisor does with them.

use crate::daemon::{Daemon, LIMIT, Place};
use crate::guest::{Guest, Memory};
use crate::writer::{SECTOR, Writer};
use blkferry::node::status::{MigrationState, StrategyName};
use std::ops::Range;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Requests that the writer keeps in flight.
const DEPTH: usize = 12;
/// Lines of each log that a failed test shows.
const TAIL: usize = 40;

/// What a world is made with.
pub struct Setup {
    pub seed: u64,
    pub size: u64,
    /// Bytes of the base image of each side.
    pub base: Option<[Vec<u8>; 2]>,
    /// The destination is told the size.
    pub sized: bool,
    /// Bytes a second that go to the peer; 0 is no cap.
    pub bandwidth: u64,
    /// Where all files go: one that was prepared, or a new one.
    pub dir: Option<TempDir>,
    pub places: [Place; 2],
}

impl Default for Setup {
    fn default() -> Self {
        let places = [Place::default(), Place::default()];
        Self { seed: 1, size: 24 << 20, base: None, sized: true, bandwidth: 0, dir: None, places }
    }
}

/// The whole stage. Side 0 is where the guest begins.
pub struct World {
    seed: u64,
    dir: Option<TempDir>,
    pub sides: [Daemon; 2],
    pub memory: std::sync::Arc<Memory>,
    /// The running front-end, at side `here`.
    pub guest: Option<Guest>,
    /// The hypervisor that waits at the other side.
    pub incoming: Option<Guest>,
    pub here: usize,
    pub writer: Writer,
    /// The vCPUs run.
    pub running: bool,
    /// The writer makes no requests of its own.
    pub idle: bool,
    /// What may stand as an error in the logs.
    pub expected: Vec<&'static str>,
    /// The owner may have counted requests that ended with an error.
    pub may_fail: bool,
}

impl World {
    pub fn new(setup: Setup) -> Self {
        let Setup { seed, size, base, sized, bandwidth, dir, places } = setup;
        let dir = dir.unwrap_or_else(|| tempfile::tempdir().unwrap());
        let mut content = Vec::new();
        let mut sides = Vec::new();
        for ((side, name), place) in ["a", "b"].into_iter().enumerate().zip(places) {
            let mut args = vec!["--bandwidth".to_owned(), bandwidth.to_string()];
            if sized || side == 0 {
                args.extend(["--size", &size.to_string(), "--chunk-size", "64K"].map(str::to_owned));
            }
            if let Some(images) = &base {
                let path = dir.path().join(format!("base-{name}"));
                std::fs::write(&path, &images[side]).unwrap();
                args.extend(["--base".to_owned(), path.display().to_string()]);
                if side == 0 {
                    content.clone_from(&images[0]);
                }
            }
            sides.push(Daemon::start(name, dir.path(), place, &args));
        }
        let memory = Memory::new();
        let mut world = Self {
            seed,
            dir: Some(dir),
            sides: sides.try_into().ok().unwrap(),
            memory,
            guest: None,
            incoming: None,
            here: 0,
            writer: Writer::new(seed, size / SECTOR as u64, content),
            running: true,
            idle: false,
            expected: Vec::new(),
            may_fail: false,
        };
        let mut guest = world.connect(0);
        guest.start_fresh();
        world.guest = Some(guest);
        world
    }

    pub fn there(&self) -> usize {
        1 - self.here
    }

    pub fn owner(&mut self) -> &mut Daemon {
        &mut self.sides[self.here]
    }

    /// A new hypervisor at a side, with the guest's memory.
    pub fn connect(&self, side: usize) -> Guest {
        let since = Instant::now();
        while !self.sides[side].listens() {
            assert!(since.elapsed() < LIMIT, "no front-end socket at {}", self.sides[side].name);
            std::thread::sleep(Duration::from_millis(1));
        }
        Guest::connect_with(&self.sides[side].socket(), 1, self.memory.clone())
    }

    /// One step of the writer, about a millisecond.
    pub fn tick(&mut self) {
        if let Some(guest) = &mut self.guest
            && self.running
        {
            self.writer.reap(guest);
            for _ in 0..2 {
                if self.writer.in_flight() < DEPTH && !self.idle {
                    self.writer.send(guest);
                }
            }
            guest.kick(0);
        }
        std::thread::sleep(Duration::from_millis(1));
    }

    pub fn run(&mut self, time: Duration) {
        let since = Instant::now();
        while since.elapsed() < time {
            self.tick();
        }
    }

    /// The writer goes on until this is so.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let since = Instant::now();
        while !done(self) {
            assert!(since.elapsed() < LIMIT, "{what} does not come; waiting: {}", self.writer.waiting());
            for _ in 0..5 {
                self.tick();
            }
        }
    }

    pub fn until_state(&mut self, side: usize, state: MigrationState) {
        let what = format!("{state:?} at {}", self.sides[side].name);
        self.until(&what, |world| world.sides[side].state() == state);
    }

    /// Writes over a part of the disk, so that there is something to move.
    pub fn populate(&mut self, percent: u64) {
        let sectors = self.writer.sectors() * percent / 100;
        for first in (0..sectors).step_by(32) {
            self.write(first..(first + 32).min(sectors));
        }
    }

    /// Writes a range, and waits for it.
    pub fn write(&mut self, sectors: Range<u64>) {
        self.settle();
        let guest = self.guest.as_mut().unwrap();
        self.writer.write(guest, sectors);
        guest.kick(0);
        self.settle();
    }

    /// Writes a range that is answered when it can be.
    pub fn write_soon(&mut self, sectors: Range<u64>) {
        let guest = self.guest.as_mut().unwrap();
        self.writer.write(guest, sectors);
    }

    /// Asks for a range.
    pub fn read(&mut self, sectors: Range<u64>) {
        let guest = self.guest.as_mut().unwrap();
        self.writer.read(guest, sectors);
        guest.kick(0);
    }

    fn reap_below(&mut self, most: usize) {
        let (guest, since) = (self.guest.as_mut().unwrap(), Instant::now());
        loop {
            self.writer.reap(guest);
            if self.writer.in_flight() < most {
                return;
            }
            assert!(since.elapsed() < LIMIT, "requests stay unanswered: {}", self.writer.waiting());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits until nothing is in flight.
    pub fn settle(&mut self) {
        self.reap_below(1);
    }

    /// Arms a migration to the other side and waits until it moves.
    pub fn arm(&mut self, strategy: StrategyName, bandwidth: Option<u64>) {
        if self.incoming.is_none() && self.sides[self.there()].listens() {
            self.incoming = Some(self.connect(self.there()));
        }
        let port = self.sides[self.there()].port;
        self.sides[self.here].migrate(port, strategy, bandwidth).unwrap();
        self.until_state(self.here, MigrationState::Active);
    }

    /// The rings stop; what was in flight has come back then.
    pub fn stop(&mut self) -> Vec<u32> {
        let guest = self.guest.as_mut().unwrap();
        let bases = guest.stop();
        self.writer.reap(guest);
        assert_eq!(self.writer.in_flight(), 0, "a stop answers everything");
        self.running = false;
        bases
    }

    /// The guest goes on at the other side; the hypervisor here ends.
    pub fn start_there(&mut self, bases: &[u32]) {
        let mut next = match self.incoming.take() {
            Some(next) => next,
            None => self.connect(self.there()),
        };
        let old = self.guest.take().unwrap();
        take_rings(old, &mut next);
        next.start(bases);
        self.guest = Some(next);
        self.here = self.there();
        self.running = true;
    }

    pub fn switch_over(&mut self) {
        let bases = self.stop();
        self.start_there(&bases);
    }

    /// The migration that brought the guest here ends well at both sides.
    pub fn complete(&mut self) {
        self.until_state(self.there(), MigrationState::Completed);
        self.until("the end at the destination", |world| {
            matches!(world.owner().state(), MigrationState::Completed | MigrationState::None)
        });
    }

    /// A whole move.
    pub fn travel(&mut self, strategy: StrategyName) {
        self.arm(strategy, None);
        self.run(Duration::from_millis(200));
        self.switch_over();
        self.complete();
    }

    /// The hypervisor of a side connects again after its daemon was started again.
    pub fn reconnect(&mut self, side: usize) {
        if side != self.here {
            if self.incoming.take().is_some() {
                self.incoming = Some(self.connect(side));
            }
            return;
        }
        let mut next = self.connect(side);
        let mut old = self.guest.take().unwrap();
        next.inflight = old.inflight.take();
        take_rings(old, &mut next);
        let used = next.memory.read16(next.queues[0].used_ring() + 2);
        next.start(&[u32::from(used)]);
        self.guest = Some(next);
    }

    /// The whole disk equals the record.
    pub fn verify(&mut self) {
        self.settle();
        let total = self.writer.sectors();
        for first in (0..total).step_by(32) {
            self.reap_below(DEPTH);
            self.read(first..(first + 32).min(total));
        }
        self.settle();
    }

    /// The end of every test: content, roles, logs.
    pub fn finish(mut self) {
        self.verify();
        let (here, there) = (self.here, self.there());
        self.until("the last count", |world| world.sides[here].volume().chunks.remote == 0);
        let (mine, other) = (self.sides[here].volume(), self.sides[there].volume());
        assert!(mine.serving && mine.fault.is_empty(), "{mine:?}");
        assert!(!other.serving && other.fault.is_empty(), "{other:?}");
        assert!(mine.io.errors == self.writer.refused || self.may_fail, "{mine:?}");
        for side in &self.sides {
            let errors = side.errors(&self.expected);
            assert!(errors.is_empty(), "{}: {errors:#?}", side.name);
        }
    }
}

/// Hands the driver's rings over to another front-end.
pub fn take_rings(mut old: Guest, next: &mut Guest) {
    use vhost::VhostBackend;
    next.queues = std::mem::take(&mut old.queues);
    next.link.set_vring_call(0, &next.queues[0].call).unwrap();
    next.link.set_vring_err(0, &next.queues[0].error).unwrap();
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let kept = self.dir.take().unwrap().keep();
            eprintln!("seed {}; files kept in {}", self.seed, kept.display());
            for side in &self.sides {
                let log = side.log();
                let lines: Vec<_> = log.lines().collect();
                let tail = &lines[lines.len().saturating_sub(TAIL)..];
                eprintln!("--- log of {}:\n{}", side.name, tail.join("\n"));
            }
        }
    }
}
