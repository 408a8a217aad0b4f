// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two disks of one guest, moved by the `blkferry` program: four real daemons, and a hypervisor that this test plays
//! (so without `--qmp`, as under libvirt). With QEMU: `qemu-scripts/e2e two-disks`.

use crate::daemon::LIMIT;
use crate::world::{Setup, World};
use blkferry::control::cli::summary::SetSummary;
use blkferry::control::follow::account::Owner;
use blkferry::node::status::MigrationState;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The guest's disks.
struct Disks {
    worlds: [World; 2],
    dir: tempfile::TempDir,
}

/// The program at work.
struct Move {
    child: Child,
    out: PathBuf,
    notes: PathBuf,
}

impl Disks {
    fn new(seed: u64, bandwidth: u64) -> Self {
        Self::made(|disk| Setup { seed: seed + disk, bandwidth, ..Setup::default() })
    }

    fn made(setup: impl Fn(u64) -> Setup) -> Self {
        let worlds = [0, 1].map(|disk| {
            let mut world = World::new(setup(disk));
            world.populate(20);
            world.incoming = Some(world.connect(1));
            world
        });
        Self { worlds, dir: tempfile::tempdir().unwrap() }
    }

    /// Starts the program; `from` are the API sockets of the sources.
    fn start(&self, from: [&Path; 2]) -> Move {
        let (out, notes) = (self.dir.path().join("out"), self.dir.path().join("notes"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkferry"));
        command.args(["migrate", "--json"]);
        for (socket, world) in from.iter().zip(&self.worlds) {
            command.arg("--disk").arg(format!("{}=127.0.0.1:{}", socket.display(), world.sides[1].port));
        }
        let file = |path: &Path| Stdio::from(File::create(path).unwrap());
        let child = command.stdin(Stdio::null()).stdout(file(&out)).stderr(file(&notes)).spawn().unwrap();
        Move { child, out, notes }
    }

    fn migrate(&self) -> Move {
        let [first, second] = self.worlds.each_ref().map(|world| world.sides[0].api());
        self.start([&first, &second])
    }

    fn until_state(&mut self, state: MigrationState) {
        for world in &mut self.worlds {
            world.until_state(0, state);
        }
    }

    /// Both guests work on where they are, and both disks are whole.
    fn finish(self) {
        for mut world in self.worlds {
            world.run(Duration::from_millis(50));
            world.finish();
        }
    }

    fn expect(&mut self, words: &'static str) {
        for world in &mut self.worlds {
            world.expected.push(words);
        }
    }
}

impl Move {
    fn interrupt(&self) {
        let sent = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    fn notes(&self) -> String {
        std::fs::read_to_string(&self.notes).unwrap()
    }

    fn until_it_says(&self, words: &str) {
        let since = Instant::now();
        while !self.notes().contains(words) {
            assert!(since.elapsed() < LIMIT, "'{words}' is not said: {}", self.notes());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The end, which must have this exit status; the last object that was written.
    fn end(mut self, code: i32) -> serde_json::Value {
        let since = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(since.elapsed() < LIMIT, "the program does not end: {}", self.notes());
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.code(), Some(code), "{}", self.notes());
        let text = std::fs::read_to_string(&self.out).unwrap();
        serde_json::from_str(text.lines().last().expect("an object")).unwrap()
    }

    fn summary(self, code: i32) -> SetSummary {
        serde_json::from_value(self.end(code)).unwrap()
    }
}

impl Drop for Move {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn states(told: &SetSummary) -> Vec<MigrationState> {
    told.disks.iter().map(|disk| disk.summary.state).collect()
}

fn owners(told: &SetSummary) -> Vec<Owner> {
    told.disks.iter().map(|disk| disk.owner).collect()
}

#[test]
fn two_disks_move_together() {
    let mut disks = Disks::new(1, 0);
    let program = disks.migrate();
    disks.until_state(MigrationState::Active);
    for world in &mut disks.worlds {
        world.run(Duration::from_millis(100));
        let bases = world.stop();
        world.until("the offer is held", |world| world.sides[0].migration().prepared);
        world.start_there(&bases);
    }
    for world in &mut disks.worlds {
        world.complete();
    }
    let told = program.summary(0);
    assert_eq!(
        (states(&told), owners(&told)),
        (vec![MigrationState::Completed; 2], vec![Owner::Destination; 2])
    );
    assert_eq!(told.all.volume_bytes, 2 * told.disks[0].summary.volume_bytes);
    disks.finish();
}

#[test]
fn t20_a_destination_that_refuses_brings_both_disks_back() {
    let image = |seed| crate::guest::pattern(4 << 20, seed);
    // The second disk's destination has another base image; the first pushes too slowly to be done before.
    let mut disks = Disks::made(|disk| Setup {
        seed: 20 + disk,
        base: Some([image(1), image(1 + disk)]),
        bandwidth: 1 << 20,
        ..Setup::default()
    });
    disks.expect("migration failed (");
    let told = disks.migrate().summary(1);
    assert!(told.all.message.contains("base image"), "{}", told.all.message);
    assert_eq!(states(&told), [MigrationState::Cancelled, MigrationState::Failed]);
    assert_eq!(owners(&told), [Owner::Source; 2]);
    disks.finish();
}

#[test]
fn t20_a_source_that_owns_nothing_leaves_the_other_disk_unarmed() {
    let mut disks = Disks::new(30, 0);
    disks.expect("migration failed (");
    let program = disks.start([&disks.worlds[0].sides[0].api(), &disks.worlds[1].sides[1].api()]);
    assert_eq!(program.end(1)["code"], "not-owner");
    disks.worlds[0].until_state(0, MigrationState::Cancelled);
    assert_eq!(disks.worlds[1].sides[0].state(), MigrationState::None);
    disks.finish();
}

#[test]
fn t20_ctrl_c_in_the_push_leaves_both_disks_where_they_were() {
    let mut disks = Disks::new(40, 1 << 20);
    disks.expect("migration failed (");
    let program = disks.migrate();
    disks.until_state(MigrationState::Active);
    program.interrupt();
    let told = program.summary(1);
    assert_eq!((states(&told), owners(&told)), (vec![MigrationState::Cancelled; 2], vec![Owner::Source; 2]));
    assert!(told.all.message.contains("cancelled by the operator"), "{}", told.all.message);
    disks.finish();
}

#[test]
fn t20_a_disk_cancelled_alone_takes_the_other_with_it() {
    let mut disks = Disks::new(50, 1 << 20);
    disks.expect("migration failed (");
    let program = disks.migrate();
    disks.until_state(MigrationState::Active);
    disks.worlds[1].sides[0].cancel().unwrap();
    assert_eq!(states(&program.summary(1)), [MigrationState::Cancelled; 2]);
    disks.finish();
}

#[test]
fn t20_once_a_disk_is_granted_the_other_follows_over_a_killed_destination_and_an_interrupt() {
    let mut disks = Disks::new(60, 0);
    let program = disks.migrate();
    disks.until_state(MigrationState::Active);
    let bases = disks.worlds.each_mut().map(World::stop);
    let [first, second] = &mut disks.worlds;
    first.start_there(&bases[0]);
    second.incoming = None;
    second.sides[1].kill();
    program.until_it_says("the disks are on both sides");
    program.interrupt();
    program.until_it_says("the migration goes on");
    assert_eq!(second.sides[0].state(), MigrationState::PreSwitchover, "the offer stands");
    second.sides[1].spawn();
    second.start_there(&bases[1]);
    first.complete();
    second.complete();
    assert_eq!(states(&program.summary(0)), [MigrationState::Completed; 2]);
    disks.finish();
}
