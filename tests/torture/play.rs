// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One migration with one fault in it: what the hypervisor does, what befalls the daemons, and what must hold at the
//! end.

use crate::cases::{At, Blow, Case, Ground, Phase, Role, Route};
use crate::daemon::Daemon;
use crate::ground::{Link, SmallDisk, Spoil};
use crate::guest::{Guest, Queue};
use crate::hypervisor;
use crate::proxy::{Harm, Proxy, Trap};
use crate::report::{Recovered, Row};
use crate::stranger;
use crate::world::{Setup, World};
use blkferry::node::status::{MigrationState, MigrationStatus, StrategyName};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for anything that must come.
const LIMIT: Duration = Duration::from_secs(40);
/// Bytes a second between the daemons: push and pull stay open for a while.
const BANDWIDTH: u64 = 5 << 20;
/// Loops of a wait between two looks at who owns the disk.
const LOOKS: u32 = 4;

/// Plays a case to its end.
pub fn play(case: &Case, seed: u64) -> Row {
    let mut row = Row::new(seed, case.fault(), case.point());
    eprintln!("seed {seed}: {} at {}", row.fault, row.point);
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let mut play = Play::new(case, seed);
        play.lay();
        play.go();
        play.finish()
    }));
    match ended {
        Ok((recovered, owners, stall)) => {
            (row.recovered, row.owners, row.stall) = (Some(recovered), owners, stall);
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            row.failure = text.unwrap_or_default();
            row.wrong = u64::from(row.failure.contains("holds stamp"));
        }
    }
    row
}

/// The stage and everybody on it.
pub struct Play {
    pub world: World,
    proxy: Option<Proxy>,
    link: Option<Link>,
    disk: Option<SmallDisk>,
    source: usize,
    destination: usize,
    case: Case,
    /// Daemons that the blow ends.
    victims: Vec<usize>,
    /// The blow has fallen.
    struck: Arc<AtomicBool>,
    seed: u64,
    /// The victims live again.
    revived: bool,
    /// They have fallen for the second time.
    again: bool,
    owners: u64,
    reclaims: u32,
    /// Migrations that failed.
    failures: u32,
    looks: u32,
}

impl Play {
    /// Two daemons, and a disk with something on it at the first.
    pub fn new(case: &Case, seed: u64) -> Self {
        let (mut setup, mut link, mut disk) = (Setup::default(), None, None);
        match case.ground {
            Ground::Loopback => {}
            Ground::Link { .. } => setup.places = link.insert(Link::new()).places(),
            Ground::SmallDisk(role) => {
                let (small, dir) = SmallDisk::new(usize::from(role == Role::Destination));
                (disk, setup.dir) = (Some(small), Some(dir));
            }
        }
        let image = crate::guest::pattern((7 << 20) + 4096 + 512, seed);
        let base = (seed % 3 == 1).then(|| [image.clone(), image]);
        let mut world = World::new(Setup { seed, bandwidth: BANDWIDTH, base, ..setup });
        world.expected.push("handed over");
        if matches!(case.blow, Blow::Full(_)) {
            world.writer.lenient = true;
            world.expected.extend(["No space left on device", "cannot be stored"]);
        }
        if case.route == Route::Cancel {
            world.expected.push("migration failed (Cancelled)");
        }
        // A request that is given up with its front-end, for the next one to find, is counted as well.
        world.may_fail = matches!(case.blow, Blow::Full(_) | Blow::FrontEnd);
        world.populate(20);
        let mut play = Self {
            world,
            proxy: None,
            link,
            disk,
            source: 0,
            destination: 1,
            case: case.clone(),
            seed,
            victims: Vec::new(),
            struck: Arc::new(AtomicBool::new(false)),
            revived: false,
            again: false,
            owners: 0,
            reclaims: 0,
            failures: 0,
            looks: 0,
        };
        if case.route == Route::Return {
            play.world.arm(StrategyName::Hybrid, Some(0));
            play.world.run(Duration::from_millis(100));
            play.world.switch_over();
            play.world.complete();
            (play.source, play.destination) = (1, 0);
        }
        play.victims = case.victims.iter().map(|side| play.side(*side)).collect();
        play
    }

    fn side(&self, role: Role) -> usize {
        match role {
            Role::Source => self.source,
            Role::Destination => self.destination,
        }
    }

    fn struck(&self) -> bool {
        self.struck.load(Ordering::Acquire)
    }

    /// Puts the proxy between the peers, with the trap if a message is waited for.
    pub fn lay(&mut self) {
        let target = self.world.sides[self.destination].address();
        self.proxy = match (&self.link, self.case.ground) {
            (_, Ground::Link { direct: true }) => None,
            (Some(link), _) => Some(link.proxy(&target)),
            _ => Some(Proxy::new("127.0.0.1", &target)),
        };
        if let At::Message(point, moment, skip) = self.case.at {
            let harm = match self.case.blow {
                Blow::Flip => Harm::Flip(self.world.writer.below(u64::MAX)),
                _ => Harm::None,
            };
            let strike = self.blow();
            self.proxy.as_ref().unwrap().set(Trap { point, skip, moment, harm, strike });
        }
    }

    /// What happens when the time has come; for daemons that live now.
    fn blow(&self) -> Box<dyn FnOnce() + Send> {
        let struck = Arc::clone(&self.struck);
        let pids: Vec<_> = self.victims.iter().map(|side| self.world.sides[*side].pid()).collect();
        let (blow, seed) = (self.case.blow, self.seed);
        let network = self.proxy.as_ref().map(Proxy::network);
        let address = self.world.sides[self.destination].address();
        let down = |time| self.link.as_ref().unwrap().down(time);
        let full = |time| self.disk.as_ref().unwrap().fill(time);
        let deed: Box<dyn Fn() + Send> = match blow {
            Blow::LinkDown(time) => Box::new(down(time)),
            Blow::Full(time) => Box::new(full(time)),
            _ => Box::new(|| {}),
        };
        Box::new(move || {
            let network = network.as_ref();
            match blow {
                Blow::Kill => pids.iter().for_each(|pid| kill(*pid)),
                Blow::LinkDown(_) | Blow::Full(_) => deed(),
                Blow::Reset => network.unwrap().cut(),
                Blow::Silent(time) => network.unwrap().be_silent(time),
                Blow::Slow(speed) => network.unwrap().speed(speed),
                Blow::Stranger(talk) => stranger::talk(talk, &address, seed),
                // Done by the hypervisor.
                Blow::Terminate | Blow::Flip | Blow::FrontEnd | Blow::SecondGuest => {}
            }
            struck.store(true, Ordering::Release);
        })
    }

    /// After the blow: the victims are started again, and their hypervisors connect again.
    fn attend(&mut self) {
        if !self.struck() || self.victims.is_empty() {
            return;
        }
        if !self.revived {
            self.revived = true;
            self.revive();
        }
        if self.case.twice && !self.again {
            self.again = true;
            let pause = Duration::from_millis(self.world.writer.below(200));
            self.world.run(pause);
            self.revive();
        }
    }

    fn revive(&mut self) {
        let pause = Duration::from_millis(self.world.writer.below(150));
        for side in &self.victims {
            bury(&mut self.world.sides[*side], self.case.blow);
        }
        self.world.run(pause);
        for side in &self.victims {
            revive(&mut self.world.sides[*side], self.case.spoil);
        }
        self.reconnect();
    }

    fn reconnect(&mut self) {
        for side in self.victims.clone() {
            self.world.reconnect(side);
        }
    }

    /// Both are asked, the destination first: the disk only ever goes there, so if both say yes, both own it.
    fn look(&mut self) {
        self.looks += 1;
        if !self.looks.is_multiple_of(LOOKS) {
            return;
        }
        let serves = |side: usize| self.world.sides[side].try_volume().is_ok_and(|volume| volume.serving);
        if serves(self.destination) && serves(self.source) {
            self.owners += 1;
        }
    }

    /// The guest goes on until this is so; what falls meanwhile is attended to.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let since = Instant::now();
        loop {
            self.attend();
            self.look();
            if done(self) {
                return;
            }
            assert!(
                since.elapsed() < LIMIT,
                "{what} does not come; waiting: {}",
                self.world.writer.waiting()
            );
            for _ in 0..5 {
                self.world.tick();
            }
        }
    }

    fn status(&self, side: usize) -> Option<MigrationStatus> {
        self.world.sides[side].try_migration().ok()
    }

    fn is(&self, side: usize, states: &[MigrationState]) -> bool {
        self.status(side).is_some_and(|status| states.contains(&status.state))
    }

    /// The push is under way, on a connection. A migration that has failed for want of space is asked for again.
    fn until_pushing(&mut self) {
        let full = matches!(self.case.blow, Blow::Full(_));
        self.until("the push", |play| {
            let Some(status) = play.status(play.source) else { return false };
            // Not before there is space: a destination that cannot drop what came names that as its fault until it ends.
            let space = play.disk.as_ref().is_some_and(SmallDisk::has_space);
            if full && space && status.state == MigrationState::Failed && play.ask() {
                play.failures += 1;
            }
            status.connected && status.state == MigrationState::Active
        });
    }

    /// Arms the migration.
    fn ask(&mut self) -> bool {
        let direct = self.world.sides[self.destination].address();
        let url = self.proxy.as_ref().map_or(direct, |proxy| proxy.address.clone());
        self.world.sides[self.source].migrate_to(url, self.case.strategy, None).is_ok()
    }

    fn run(&mut self, most_ms: u64) {
        let time = Duration::from_millis(self.world.writer.below(most_ms));
        let since = Instant::now();
        self.until("time to pass", |_| since.elapsed() >= time);
    }

    /// The blow falls now, if this is its phase; or the message is waited for that it comes with.
    fn fall(&mut self, phase: Phase) {
        match self.case.at {
            At::Time(when) if when == phase => {
                self.run(400);
                (self.blow())();
                self.act();
                self.attend();
            }
            At::Message(point, ..) if Phase::of(point) == phase => {
                self.until("the point", |play| play.struck());
            }
            _ => {}
        }
    }

    /// What the blow is that a hypervisor gives.
    fn act(&mut self) {
        match self.case.blow {
            Blow::FrontEnd => {
                let mut old = self.world.guest.take().unwrap();
                let (queues, inflight) = (std::mem::take(&mut old.queues), old.inflight.take());
                drop(old);
                let mut next = self.world.connect(self.world.here);
                (next.queues, next.inflight) = (queues, inflight);
                let used = next.memory.read16(next.queues[0].used_ring() + 2);
                hypervisor::start(&mut next, used.into()).unwrap();
                self.world.guest = Some(next);
            }
            Blow::SecondGuest if hypervisor::is_served_as_well(&self.world, self.source) => self.owners += 1,
            _ => {}
        }
    }

    fn arm(&mut self) {
        self.world.incoming = Some(self.world.connect(self.destination));
        self.until("the migration", |play| {
            // A daemon that died before it had answered may have armed all the same.
            let armed = play.status(play.source).is_some_and(|status| {
                !matches!(status.state, MigrationState::None | MigrationState::Completed)
            });
            armed || play.ask()
        });
    }

    /// Calls the front-end, which may block, while victims fall and are started again.
    fn watched<R>(&mut self, guest: &mut Guest, call: impl FnOnce(&mut Guest) -> R) -> R {
        let pause = Duration::from_millis(self.world.writer.below(100));
        let timer = (self.case.at == At::Time(Phase::Handoff) && !self.struck())
            .then(|| (Instant::now() + Duration::from_micros(self.world.writer.below(12_000)), self.blow()));
        let (mut timer, mut revived) = (timer, self.revived || self.victims.is_empty());
        let ended = AtomicBool::new(false);
        let (victims, blow, struck) = (&self.victims, self.case.blow, &self.struck);
        let spoil = self.case.spoil;
        let (sides, done) = (&mut self.world.sides, &ended);
        let (result, revived) = std::thread::scope(|scope| {
            let watcher = scope.spawn(move || {
                // What was timed falls, even if the call has ended.
                while timer.is_some() || !done.load(Ordering::Acquire) {
                    if let Some((_, strike)) = timer.take_if(|(when, _)| *when <= Instant::now()) {
                        strike();
                    }
                    if !revived && struck.load(Ordering::Acquire) {
                        victims.iter().for_each(|side| bury(&mut sides[*side], blow));
                        std::thread::sleep(pause);
                        victims.iter().for_each(|side| revive(&mut sides[*side], spoil));
                        revived = true;
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
                revived
            });
            let result = call(guest);
            done.store(true, Ordering::Release);
            (result, watcher.join().unwrap())
        });
        self.revived = revived && !self.victims.is_empty();
        result
    }

    /// Stops the rings at the source; a source that dies meanwhile is started again, and the guest goes on there.
    fn stop(&mut self) -> Option<u32> {
        let before = self.revived;
        self.world.writer.paused = true;
        let mut guest = self.world.guest.take().unwrap();
        let base = self.watched(&mut guest, hypervisor::stop);
        if base.is_ok() {
            self.world.writer.reap(&mut guest);
            assert_eq!(self.world.writer.in_flight(), 0, "a stop answers everything");
            self.world.running = false;
        }
        self.world.guest = Some(guest);
        if self.revived && !before {
            self.reconnect();
        }
        match base {
            Ok(base) => Some(base),
            Err(error) => {
                assert!(self.victims.contains(&self.source), "the stop has failed: {error}");
                // It may have died a moment ago, without anybody having looked.
                self.world.writer.resume();
                self.until("the source", |play| play.revived);
                None
            }
        }
    }

    /// Starts the rings at the destination; whether that was right, or the guest has to go on at the source.
    fn start(&mut self, base: u32) -> bool {
        let before = self.revived;
        let mut next = self.world.incoming.take().unwrap_or_else(|| self.world.connect(self.destination));
        let mut old = self.world.guest.take().unwrap();
        next.queues = std::mem::take(&mut old.queues);
        let started = self.watched(&mut next, |guest| hypervisor::start(guest, base));
        let died = self.victims.contains(&self.destination);
        if started.is_err() && !died {
            old.queues = std::mem::take(&mut next.queues);
            next.queues = vec![Queue::new(0)];
            (self.world.guest, self.world.incoming) = (Some(old), Some(next));
            return false;
        }
        drop(old);
        self.world.guest = Some(next);
        self.world.here = self.destination;
        self.world.running = true;
        self.world.writer.resume();
        if self.revived && !before {
            self.reconnect();
        } else if started.is_err() {
            self.until("the destination", |play| play.revived);
        }
        true
    }

    /// The guest goes on where it was stopped.
    fn start_here(&mut self, base: u32) {
        let mut guest = self.world.guest.take().unwrap();
        hypervisor::start(&mut guest, base).unwrap();
        self.world.guest = Some(guest);
        self.world.running = true;
        self.world.writer.resume();
        self.reclaims += 1;
    }

    fn hand_over(&mut self) {
        let mut reclaim = self.case.route == Route::Reclaim;
        loop {
            match self.stop() {
                Some(base) if reclaim => {
                    reclaim = false;
                    self.start_here(base);
                    self.fall(Phase::Reclaim);
                }
                Some(base) if self.start(base) => return,
                Some(base) => self.start_here(base),
                None => self.reclaims += 1,
            }
            self.until_pushing();
            self.run(100);
        }
    }

    fn cancel(&mut self) {
        self.until("the cancellation", |play| {
            let source = &play.world.sides[play.source];
            if play.is(play.source, &[MigrationState::Active, MigrationState::Setup]) {
                source.cancel().ok();
            }
            play.is(play.source, &[MigrationState::Cancelled, MigrationState::None])
        });
        self.fall(Phase::Cancel);
        if self.victims.contains(&self.source) {
            // A source that is started again as an owner tells nobody of what it had cancelled before; the destination
            // has to take the next migration all the same.
            self.case.route = Route::Plain;
            self.failures += 1;
            return self.until("the next migration", Self::ask);
        }
        self.until("the destination to let go", |play| {
            play.world.sides[play.destination]
                .try_volume()
                .is_ok_and(|volume| volume.chunks.modified + volume.chunks.remote == 0)
        });
    }

    fn complete(&mut self) {
        self.until("the end at the source", |play| play.is(play.source, &[MigrationState::Completed]));
        self.until("the end at the destination", |play| {
            play.is(play.destination, &[MigrationState::Completed, MigrationState::None])
        });
    }

    /// The whole migration.
    pub fn go(&mut self) {
        self.fall(Phase::Armed);
        self.arm();
        self.fall(Phase::Connect);
        self.until_pushing();
        self.fall(Phase::Push);
        self.until_pushing();
        self.run(250);
        if self.case.route == Route::Cancel {
            self.cancel();
        }
        if self.case.route != Route::Cancel {
            self.until_pushing();
            self.hand_over();
            self.fall(Phase::Pull);
            self.complete();
        }
        self.fall(Phase::End);
        self.until("the blow", |play| play.struck());
        self.until("the owner", |play| {
            let here = play.world.here;
            play.world.sides[here].try_volume().is_ok_and(|volume| volume.serving)
        });
    }

    /// The end: content, roles, logs.
    pub fn finish(mut self) -> (Recovered, u64, Duration) {
        let recovered = self.recovered();
        if self.case.route != Route::Cancel && hypervisor::is_served_as_well(&self.world, self.source) {
            self.owners += 1;
        }
        let bad = self.proxy.as_ref().map(Proxy::bad).unwrap_or_default();
        assert!(bad.is_empty(), "what passed was not of the protocol: {bad:?}");
        let stranger = matches!(self.case.blow, Blow::Stranger(_));
        assert!(!stranger || recovered == Recovered::Migrated, "a stranger has cut the connection");
        if self.case.route == Route::Cancel {
            self.world.incoming = None;
        }
        let stall = self.world.writer.stall;
        self.world.finish();
        (recovered, self.owners, stall)
    }

    fn recovered(&self) -> Recovered {
        let reconnected = self.status(self.source).is_some_and(|status| status.reconnects > 0);
        if self.case.route == Route::Cancel {
            Recovered::Cancelled
        } else if self.failures > 0 {
            Recovered::Again
        } else if self.reclaims > 0 {
            Recovered::Reclaimed
        } else if reconnected || !self.victims.is_empty() {
            Recovered::Resumed
        } else {
            Recovered::Migrated
        }
    }
}

/// A victim is taken away.
fn bury(daemon: &mut Daemon, blow: Blow) {
    match blow {
        Blow::Terminate => daemon.terminate(),
        _ => daemon.kill(),
    }
}

/// A victim is started again; with a spoilt state directory it has to refuse clearly first.
fn revive(daemon: &mut Daemon, spoil: Option<Spoil>) {
    if let Some(spoil) = spoil {
        let state = daemon.state_dir();
        spoil.spoil(&state);
        let log = daemon.log().len();
        // The API may be up before the directory has been looked at.
        let ended = daemon.try_spawn().unwrap_or_else(|| daemon.ended());
        let words = daemon.log()[log..].to_owned();
        spoil.repair(&state);
        assert_eq!(ended.code(), Some(1));
        let last = words.lines().last().unwrap_or_default();
        assert!(last.starts_with("blkferryd: ") && last.contains(spoil.complaint()), "{last}");
    }
    daemon.spawn();
}

/// SIGKILL, and waits until the process does nothing any more.
pub fn kill(pid: u32) {
    // SAFETY: the process is a child that nobody has waited for yet, so the number is still its own.
    unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) };
    let ended = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')),
        Err(_) => true,
    };
    while !ended() {
        std::thread::sleep(Duration::from_micros(200));
    }
}
