// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source is away while the guest at the destination needs it.

use crate::world::{Setup, World};
use blkferry::node::status::{SourceLossPolicy, StrategyName};
use std::time::Duration;

pub const SOURCE: usize = 0;
pub const DESTINATION: usize = 1;
/// Sectors of a chunk.
pub const CHUNK: u64 = 128;
/// Chunks that have content when the guest moves.
const FULL: u64 = 100;

/// The guest runs at the destination, most of its disk is at the source, and the source is killed.
pub fn orphan(seed: u64, base: Option<[Vec<u8>; 2]>, args: &[&str]) -> World {
    let mut world = World::new(Setup { seed, base, bandwidth: 512 << 10, ..Setup::default() });
    world.idle = true;
    world.settle();
    world.expected.push("the migration source is still away");
    world.sides[DESTINATION].change(args);
    for chunk in 0..FULL {
        world.write(chunk * CHUNK..chunk * CHUNK + 32);
    }
    world.arm(StrategyName::Postcopy, None);
    world.switch_over();
    world.sides[SOURCE].kill();
    world.until("the absence", |world| world.sides[DESTINATION].volume().source.away);
    world
}

/// The first chunk that is still at the source, and one after it. Hotness is equal, so the low ones come first.
fn remote(world: &World) -> [u64; 2] {
    let left = world.sides[DESTINATION].volume().chunks.remote;
    assert!(left > 10, "only {left} chunks are left at the source");
    [FULL - 1, FULL - 2]
}

fn back(world: &mut World) {
    world.sides[SOURCE].spawn();
    world.until("the source", |world| !world.sides[DESTINATION].volume().source.away);
    world.settle();
}

#[test]
fn t27_a_guest_that_stalls_waits_until_its_source_is_back() {
    let mut world = orphan(300, None, &[]);
    let [one, other] = remote(&world);
    world.read(one * CHUNK..one * CHUNK + 8);
    world.read(other * CHUNK..other * CHUNK + 8);
    world.until("the waiting", |world| {
        world.sides[DESTINATION].metric("blkferry_source_waiting_requests") == 2
    });
    // Far longer than any answer takes.
    world.run(Duration::from_secs(2));
    assert_eq!(world.writer.in_flight(), 2, "was answered without the source");
    let source = world.sides[DESTINATION].volume().source;
    assert_eq!((source.on_source_loss, source.failing, source.failed), (SourceLossPolicy::Stall, false, 0));
    assert!(source.away_since_ms > 0 && source.away);
    back(&mut world);
    world.complete();
    assert_eq!(world.sides[DESTINATION].metric("blkferry_source_away"), 0);
    world.finish();
}

#[test]
fn t27_a_guest_that_wants_errors_gets_them_until_its_source_is_back() {
    let mut world = orphan(301, None, &["--on-source-loss", "error", "--source-grace", "1"]);
    let [one, other] = remote(&world);
    world.writer.may_fail = true;
    world.read(one * CHUNK..one * CHUNK + 8);
    world.until("the first error", |world| world.writer.refused == 1);
    let source = world.sides[DESTINATION].volume().source;
    assert_eq!((source.on_source_loss, source.grace_s), (SourceLossPolicy::Error, 1));
    assert!(source.away && source.failing && source.waiting == 0 && source.failed == 1, "{source:?}");
    assert_eq!(world.sides[DESTINATION].metric("blkferry_source_away"), 1);
    // At once from now on.
    world.read(other * CHUNK..other * CHUNK + 8);
    world.settle();
    assert_eq!(world.writer.refused, 2);
    // A write of a part of a block needs the rest of it; one of whole blocks needs nothing.
    world.write(one * CHUNK + 17..one * CHUNK + 18);
    assert_eq!(world.writer.refused, 3);
    world.write(one * CHUNK + 32..one * CHUNK + 40);
    world.read(one * CHUNK + 32..one * CHUNK + 40);
    world.settle();
    assert_eq!(world.writer.refused, 3);
    assert_eq!(world.sides[DESTINATION].metric("blkferry_source_failed_requests_total"), 3);
    back(&mut world);
    world.writer.may_fail = false;
    // Around what the guest wrote meanwhile, everything is the source's.
    world.read(one * CHUNK..one * CHUNK + 32);
    world.read(other * CHUNK..other * CHUNK + 32);
    world.settle();
    world.complete();
    world.finish();
}

#[test]
fn t27_a_restarted_destination_still_gives_errors_and_recovers() {
    let mut world = orphan(302, None, &["--on-source-loss", "error", "--source-grace", "0"]);
    let [one, _] = remote(&world);
    world.sides[DESTINATION].kill();
    world.sides[DESTINATION].spawn();
    world.reconnect(DESTINATION);
    world.writer.may_fail = true;
    world.read(one * CHUNK..one * CHUNK + 8);
    world.until("an error", |world| world.writer.refused == 1);
    back(&mut world);
    world.writer.may_fail = false;
    world.complete();
    // The daemon has forgotten nothing but its counters.
    assert_eq!(world.sides[DESTINATION].volume().io.errors, 1);
    world.finish();
}
