// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A side is lost for good: what `blkferry recover` tells of the other one in every stage, and what it forces.

use crate::away::{CHUNK, DESTINATION, SOURCE, orphan};
use crate::daemon::Daemon;
use crate::world::{Setup, World};
use blkferry::node::status::{MigrationState, StrategyName};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;

/// The answer of a `recover` that exits with this.
fn answer(daemon: &Daemon, words: &[&str], status: i32) -> Value {
    let output = daemon.recover(words);
    let text = String::from_utf8(output.stdout).unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{words:?}: {text}{complaint}");
    assert_eq!(complaint.is_empty(), status == 0, "{complaint}");
    serde_json::from_str(text.trim()).unwrap()
}

fn contents(daemon: &Daemon) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(daemon.state_dir()).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.display().to_string(), std::fs::read(path).unwrap())).collect()
}

/// What a directory says, after a look that has changed no byte; and what a force says that is not accepted.
fn stand(daemon: &Daemon) -> (String, Value) {
    let before = contents(daemon);
    let told = answer(daemon, &[], 0);
    answer(daemon, &["--force", "serve"], 1);
    assert_eq!(contents(daemon), before, "{} was changed by a look", daemon.name);
    let word = |name: &str| told[name].as_str().unwrap().to_owned();
    (format!("{} {} {}", word("role"), word("stage"), word("owner")), told)
}

/// A force that is refused although the loss is accepted.
fn refused(daemon: &Daemon, code: &str) {
    let before = contents(daemon);
    let told = answer(daemon, &["--force", "serve", "--accept-loss"], 1);
    assert_eq!(told["code"], code);
    assert_eq!(contents(daemon), before);
}

fn force(daemon: &Daemon, lost: &str) -> Value {
    let told = answer(daemon, &["--force", "serve", "--accept-loss", "--lost-chunks", lost], 0);
    assert_eq!((&told["role"], &told["owner"]), (&"serving".into(), &"here".into()));
    told
}

fn ranges(told: &Value) -> Vec<Range<u64>> {
    let pairs: Vec<[u64; 2]> = serde_json::from_value(told["missing"]["ranges"].clone()).unwrap();
    pairs.into_iter().map(|[start, end]| start..end).collect()
}

impl World {
    fn kill_both(&mut self) {
        self.sides.iter_mut().for_each(Daemon::kill);
    }

    fn spawn_both(&mut self) {
        self.sides.iter_mut().for_each(Daemon::spawn);
    }

    fn log_of_recover(&self, side: usize) -> String {
        std::fs::read_to_string(self.sides[side].state_dir().join("recover.log")).unwrap()
    }
}

#[test]
fn every_stage_is_explained_and_nothing_is_changed() {
    let mut world = World::new(Setup { seed: 400, bandwidth: 256 << 10, ..Setup::default() });
    world.idle = true;
    world.write(0..8);
    let running = answer(&world.sides[SOURCE], &[], 1);
    assert_eq!(running["code"], "in-use");
    assert!(running["message"].as_str().unwrap().contains("in use by pid"), "{running}");
    for chunk in 0..100 {
        world.write(chunk * CHUNK..chunk * CHUNK + 32);
    }
    world.kill_both();
    assert_eq!(stand(&world.sides[SOURCE]).0, "serving serving here");
    assert_eq!(stand(&world.sides[DESTINATION]).0, "none none nobody");
    refused(&world.sides[SOURCE], "owner");
    refused(&world.sides[DESTINATION], "nothing");
    world.spawn_both();
    world.reconnect(SOURCE);

    world.arm(StrategyName::Postcopy, None);
    world.kill_both();
    let (source, told) = stand(&world.sides[SOURCE]);
    assert_eq!(source, "source pushing here");
    assert_eq!(told["peer"], format!("127.0.0.1:{}", world.sides[DESTINATION].port));
    assert_eq!(stand(&world.sides[DESTINATION]).0, "destination receiving peer");
    refused(&world.sides[SOURCE], "owner");
    refused(&world.sides[DESTINATION], "torn");
    world.spawn_both();
    world.reconnect(SOURCE);
    world.reconnect(DESTINATION);
    world.until("the agreement", |world| {
        let status = world.owner().migration();
        status.connected && status.state == MigrationState::Active
    });

    let bases = world.stop();
    world.kill_both();
    let (source, told) = stand(&world.sides[SOURCE]);
    assert_eq!((source.as_str(), &told["force"]["loses"]), ("source offered here", &Value::Array(vec![])));
    let (destination, told) = stand(&world.sides[DESTINATION]);
    assert_eq!(destination, "destination prepared undecided");
    let lost = told["missing"]["chunks"].as_u64().unwrap();
    assert!((50..=100).contains(&lost), "{told}");
    world.spawn_both();
    world.reconnect(DESTINATION);

    world.start_there(&bases);
    // To a daemon that was started again only a request proves that the guest runs.
    world.read(200 * CHUNK..200 * CHUNK + 8);
    world.settle();
    world.kill_both();
    let (source, told) = stand(&world.sides[SOURCE]);
    assert_eq!((source.as_str(), &told["flushes_at_risk"]), ("source relinquished peer", &true.into()));
    let (destination, told) = stand(&world.sides[DESTINATION]);
    assert_eq!(destination, "destination active here");
    let left = told["missing"]["chunks"].as_u64().unwrap();
    assert!(left > 0 && left <= lost && told["chunks"]["remote"] == left, "{told}");
    assert_eq!((&told["rebooted"], &told["reverts"]), (&false.into(), &false.into()));
    assert_eq!(told["missing"]["bytes"], left * (CHUNK * 512));
    world.spawn_both();
    world.reconnect(DESTINATION);
    world.complete();
    world.until_state(DESTINATION, MigrationState::Completed);
    world.verify();
    world.kill_both();
    let (source, told) = stand(&world.sides[SOURCE]);
    assert_eq!((source.as_str(), &told["force"]["possible"]), ("source released peer", &true.into()));
    assert_eq!(stand(&world.sides[DESTINATION]).0, "serving serving here");
    world.spawn_both();
    world.reconnect(DESTINATION);
    world.expected.push("handed over");
    world.finish();
}

#[test]
fn directories_that_are_no_volumes_are_explained_by_name() {
    let mut world = World::new(Setup { seed: 401, ..Setup::default() });
    world.sides[DESTINATION].terminate();
    let state = world.sides[DESTINATION].state_dir();
    let code = |world: &World, code: &str| {
        let told = answer(&world.sides[DESTINATION], &["--force", "serve", "--accept-loss"], 1);
        assert_eq!(told["code"], code, "{told}");
        assert!(told["message"].as_str().unwrap().contains(&state.display().to_string()), "{told}");
    };
    let superblock = std::fs::read(state.join("superblock")).unwrap();
    std::fs::write(state.join("superblock"), &superblock[..40]).unwrap();
    code(&world, "damaged");
    std::fs::write(state.join("superblock"), [&superblock[..8], &[9], &superblock[9..]].concat()).unwrap();
    code(&world, "version");
    std::fs::write(state.join("superblock"), b"something else").unwrap();
    code(&world, "foreign");
    std::fs::remove_file(state.join("superblock")).unwrap();
    code(&world, "empty");
    std::fs::write(state.join("holiday.jpg"), b"").unwrap();
    code(&world, "foreign");
    std::fs::remove_dir_all(&state).unwrap();
    code(&world, "unreadable");
    assert!(!state.exists());
}

/// The guest goes on at a side whose daemon was started anew.
fn go_on(world: &mut World, side: usize) {
    world.sides[side].spawn();
    world.here = side;
    world.incoming = None;
    world.guest.as_mut().unwrap().inflight = None;
    world.reconnect(side);
}

/// The source comes back after all, and gets nothing.
fn source_comes_back(world: &mut World) {
    world.sides[SOURCE].spawn();
    world.until("the source to be turned away", |world| {
        world.sides[DESTINATION].log().contains("this source is given up")
    });
    let (mine, other) = (world.sides[DESTINATION].volume(), world.sides[SOURCE].volume());
    assert!(mine.serving && !other.serving, "{mine:?} {other:?}");
    assert!(mine.epoch > other.epoch + 1000, "{} is not ahead of {}", mine.epoch, other.epoch);
    assert_eq!(world.sides[SOURCE].migration().stage, "relinquished");
}

#[test]
fn t27_a_destination_without_its_source_serves_what_it_has_and_errors_for_the_rest() {
    let mut world = orphan(402, None, &[]);
    world.sides[DESTINATION].kill();
    let (_, told) = stand(&world.sides[DESTINATION]);
    let lost = ranges(&told);
    let chunks = told["missing"]["chunks"].as_u64().unwrap();
    assert!(told["force"]["loses"][0].as_str().unwrap().starts_with(&format!("{chunks} chunks")), "{told}");
    let told = force(&world.sides[DESTINATION], "error");
    assert_eq!((&told["forced"]["lost_chunks"], ranges(&told)), (&chunks.into(), lost.clone()));
    let log = world.log_of_recover(DESTINATION);
    for range in &lost {
        assert!(log.contains(&format!("lost: bytes {} to {}\n", range.start, range.end - 1)), "{log}");
    }
    assert!(log.trim_end().ends_with("done"), "{log}");

    go_on(&mut world, DESTINATION);
    world.expected.push("a part of which is lost");
    source_comes_back(&mut world);
    let volume = world.sides[DESTINATION].volume();
    assert_eq!((volume.lost_chunks, volume.forced.is_empty()), (chunks, false));
    assert!(world.sides[DESTINATION].log().contains("made the owner by force"));
    // The first sector of each lost range fails; all that is not lost reads right.
    world.writer.may_fail = true;
    for range in &lost {
        let first = range.start / 512;
        world.read(first..first + 8);
        world.settle();
    }
    assert_eq!(world.writer.refused, lost.len() as u64);
    let before = world.writer.refused;
    let last = lost.last().unwrap().start / 512;
    world.write(last + 1..last + 2);
    assert_eq!(world.writer.refused, before + 1, "a part of a lost block cannot be written");
    world.write(last..last + 8);
    world.read(last..last + 8);
    world.settle();
    assert_eq!(world.writer.refused, before + 1, "what was written is healed");
    world.writer.may_fail = false;
    let port = world.sides[SOURCE].port;
    let denied = world.sides[DESTINATION].migrate(port, StrategyName::Hybrid, None);
    assert_eq!(denied.unwrap_err().code(), "not-whole");
    assert_eq!(world.sides[DESTINATION].resize(25 << 20).unwrap_err().code(), "not-whole");

    // Later the rest is given up too: it becomes zeros, exactly where it was lost, and the disk moves again.
    world.sides[DESTINATION].terminate();
    let (_, told) = stand(&world.sides[DESTINATION]);
    let left = ranges(&told);
    assert!(left.iter().all(|range| !range.contains(&(last * 512))), "healed: {left:?}");
    force(&world.sides[DESTINATION], "zero");
    refused(&world.sides[DESTINATION], "owner");
    left.into_iter().for_each(|range| world.writer.lose(range, false));
    // The counters begin anew.
    world.writer.refused = 0;
    go_on(&mut world, DESTINATION);
    world.verify();
    world.sides[SOURCE].renew(24 << 20);
    world.travel(StrategyName::Hybrid);
    world.finish();
}

#[test]
fn t27_lost_chunks_become_the_base_image_only_where_that_was_asked_for() {
    let image = crate::guest::pattern(9 << 20, 5);
    let mut world = orphan(403, Some([image.clone(), image]), &[]);
    // Written around what is remote: this is kept.
    world.write(99 * CHUNK + 2..99 * CHUNK + 6);
    world.sides[DESTINATION].kill();
    let (_, told) = stand(&world.sides[DESTINATION]);
    assert_eq!(told["base"]["state"], "found");
    force(&world.sides[DESTINATION], "base");
    ranges(&told).into_iter().for_each(|range| world.writer.lose(range, true));
    go_on(&mut world, DESTINATION);
    source_comes_back(&mut world);
    world.idle = false;
    world.run(std::time::Duration::from_millis(100));
    world.finish();
}

#[test]
fn a_source_takes_back_the_disk_of_a_destination_that_is_gone() {
    let mut world = World::new(Setup { seed: 404, bandwidth: 1 << 20, ..Setup::default() });
    world.idle = true;
    for chunk in 0..100 {
        world.write(chunk * CHUNK..chunk * CHUNK + 32);
    }
    world.arm(StrategyName::Postcopy, None);
    let bases = world.stop();
    let handed_over = world.writer.snapshot();
    world.start_there(&bases);
    world.write(0..32);
    world.write(99 * CHUNK..99 * CHUNK + 32);
    world.kill_both();
    let (_, told) = stand(&world.sides[SOURCE]);
    let loses = told["force"]["loses"].to_string();
    assert!(
        loses.contains("Every write that the guest made at the destination") && loses.contains("two owners")
    );
    let told = force(&world.sides[SOURCE], "error");
    assert!(told["epoch"].as_u64().unwrap() > 1000 && told["missing"]["chunks"] == 0);
    world.writer.restore(handed_over);
    go_on(&mut world, SOURCE);
    world.idle = false;
    world.run(std::time::Duration::from_millis(100));
    world.idle = true;
    world.verify();
    // The destination comes back: it has a disk of its own, and is not overwritten by the next migration.
    world.sides[DESTINATION].spawn();
    let port = world.sides[DESTINATION].port;
    world.sides[SOURCE].migrate(port, StrategyName::Hybrid, None).unwrap();
    world.until_state(SOURCE, MigrationState::Failed);
    world.expected.push("migration failed (Busy)");
    assert!(world.sides[SOURCE].volume().serving);
    world.sides[DESTINATION].renew(24 << 20);
    world.travel(StrategyName::Hybrid);
    world.finish();
}

/// The rings have stopped at the source and start nowhere: the offer is prepared, and both daemons are gone.
fn offered(seed: u64) -> (World, Vec<u32>) {
    let mut world = World::new(Setup { seed, bandwidth: 1 << 20, ..Setup::default() });
    world.idle = true;
    for chunk in 0..100 {
        world.write(chunk * CHUNK..chunk * CHUNK + 32);
    }
    world.arm(StrategyName::Postcopy, None);
    let bases = world.stop();
    world.kill_both();
    (world, bases)
}

#[test]
fn t21_a_source_that_comes_back_grants_the_offer_that_was_taken_by_force() {
    let (mut world, bases) = offered(405);
    let (_, told) = stand(&world.sides[DESTINATION]);
    assert!(told["force"]["loses"].to_string().contains("taken the disk back"), "{told}");
    force(&world.sides[DESTINATION], "zero");
    ranges(&told).into_iter().for_each(|range| world.writer.lose(range, false));
    world.sides[DESTINATION].spawn();
    world.incoming = None;
    world.start_there(&bases);
    world.verify();
    source_comes_back(&mut world);
    // A guest that starts at the source now is not served: the grant is durable there.
    world.sides[SOURCE].kill();
    assert_eq!(stand(&world.sides[SOURCE]).0, "source relinquished peer");
    world.sides[SOURCE].spawn();
    world.idle = false;
    world.run(std::time::Duration::from_millis(100));
    world.finish();
}

#[test]
fn an_offer_that_nobody_took_is_taken_back_without_loss() {
    let (mut world, _) = offered(406);
    assert_eq!(stand(&world.sides[SOURCE]).1["force"]["loses"], Value::Array(vec![]));
    let told = force(&world.sides[SOURCE], "error");
    assert_eq!(told["missing"]["chunks"], 0);
    go_on(&mut world, SOURCE);
    world.running = true;
    world.verify();
    world.idle = false;
    world.run(std::time::Duration::from_millis(100));
    // The destination that still holds the offer takes the next one.
    world.sides[DESTINATION].spawn();
    world.travel(StrategyName::Hybrid);
    world.finish();
}
