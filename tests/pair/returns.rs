// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk that comes back to where it was, and one that moves on to a third host.

use crate::world::{Setup, World};
use blkferry::node::status::{MigrationState, MigrationStatus, StrategyName};
use std::time::Duration;

/// Sectors of the writer in a chunk.
const CHUNK: u64 = (64 << 10) / crate::writer::SECTOR as u64;
const CHUNK_BYTES: u64 = 64 << 10;

/// A world whose writer only does what it is told, with a part of its disk written.
fn quiet(setup: Setup) -> World {
    let mut world = World::new(setup);
    world.populate(60);
    world.idle = true;
    world.settle();
    world
}

fn write(world: &mut World, sectors: std::ops::Range<u64>) {
    let end = sectors.end;
    for first in sectors.step_by(32) {
        world.write(first..(first + 32).min(end));
    }
}

/// Content that travelled, in bytes.
fn travelled(status: &MigrationStatus) -> u64 {
    status.push_bytes + status.prefetch_bytes + status.demand_bytes
}

/// A whole move; returns what its source says of it.
fn travel(world: &mut World, strategy: StrategyName) -> MigrationStatus {
    let from = world.here;
    world.arm(strategy, None);
    world.run(Duration::from_millis(200));
    world.switch_over();
    // A front-end that comes to a daemon that had one before is believed when the guest asks for something.
    world.read(0..1);
    world.complete();
    let status = world.sides[from].migration();
    assert_eq!(status.state, MigrationState::Completed);
    status
}

#[test]
fn only_what_has_changed_travels_back() {
    let image = crate::guest::pattern((9 << 20) + 4096, 5);
    for (seed, base) in [(1, None), (2, Some([image.clone(), image]))] {
        let mut world = quiet(Setup { seed, base, ..Setup::default() });
        let first = travel(&mut world, StrategyName::Hybrid);
        assert_eq!((first.kept_chunks, first.reconnects), (0, 0));
        for (round, strategy) in [StrategyName::Hybrid, StrategyName::Postcopy].into_iter().enumerate() {
            // A whole chunk, a part of one, two neighbours, and one that nobody has written before.
            let changed = [2 * CHUNK..3 * CHUNK, 8 * CHUNK..8 * CHUNK + 3, 20 * CHUNK - 1..20 * CHUNK + 1];
            let fresh = (300 + round as u64) * CHUNK;
            for range in changed.into_iter().chain(std::iter::once(fresh..fresh + 1)) {
                write(&mut world, range);
            }
            let back = travel(&mut world, strategy);
            // What was on its way when the rings stopped travels once more.
            assert!(travelled(&back) <= 2 * 5 * CHUNK_BYTES, "{back:?}");
            // Parts of chunks over a base image are not whole at the other side, and travel.
            assert!(
                travelled(&back) > 0 && back.kept_bytes + 6 * CHUNK_BYTES >= travelled(&first),
                "{back:?}"
            );
            assert_eq!(back.kept_bytes.div_ceil(CHUNK_BYTES), back.kept_chunks);
            world.verify();
        }
        world.finish();
    }
}

#[test]
fn a_busy_disk_goes_to_and_fro() {
    let mut world = World::new(Setup { seed: 31, ..Setup::default() });
    world.populate(50);
    let mut kept = 0;
    for strategy in
        [StrategyName::Hybrid, StrategyName::Postcopy, StrategyName::Precopy, StrategyName::Hybrid]
    {
        kept += travel(&mut world, strategy).kept_chunks;
        world.verify();
    }
    assert!(kept > 0, "nothing was ever left as it was");
    world.finish();
}

#[test]
fn t23_a_daemon_that_was_started_again_still_has_what_it_gave_away() {
    let mut world = quiet(Setup { seed: 32, ..Setup::default() });
    travel(&mut world, StrategyName::Hybrid);
    let (here, there) = (world.here, world.there());
    world.sides[there].kill();
    world.sides[there].spawn();
    // At the owner's own restart all that was not written is still known as such.
    world.sides[here].kill();
    world.write_soon(5 * CHUNK..5 * CHUNK + 8);
    world.sides[here].spawn();
    world.reconnect(here);
    world.settle();
    let back = travel(&mut world, StrategyName::Hybrid);
    assert!(back.kept_chunks > 100, "{back:?}");
    assert!(travelled(&back) <= 2 * CHUNK_BYTES, "{back:?}");
    world.finish();
}

#[test]
fn t23_a_return_that_is_cut_short_begins_anew() {
    for victim in [0, 1] {
        let mut world = quiet(Setup { seed: 33 + victim as u64, ..Setup::default() });
        travel(&mut world, StrategyName::Hybrid);
        world.populate(30);
        // Slow enough to be killed half way.
        world.arm(StrategyName::Hybrid, Some(1 << 20));
        world.run(Duration::from_millis(400));
        world.sides[victim].kill();
        world.sides[victim].spawn();
        world.reconnect(victim);
        world.until("the connection", |world| world.owner().migration().connected);
        world.owner().cancel().unwrap();
        let here = world.here;
        world.until_state(here, MigrationState::Cancelled);
        travel(&mut world, StrategyName::Hybrid);
        world.finish();
    }
}

#[test]
fn t24_a_disk_that_is_not_whole_yet_does_not_move_on_and_an_older_copy_is_not_trusted() {
    let mut world = quiet(Setup { seed: 35, ..Setup::default() });
    let third = world.sides[1].another("c");
    world.arm(StrategyName::Postcopy, Some(4 << 20));
    world.switch_over();
    let refused = world.owner().migrate(third.port, StrategyName::Hybrid, None).unwrap_err();
    assert_eq!(refused.code(), "not-whole", "{refused}");
    world.complete();
    // On to the third, while the first keeps what it gave away.
    write(&mut world, 0..2 * CHUNK);
    let (first, here) = (std::mem::replace(&mut world.sides[0], third), world.here);
    assert_eq!(here, 1);
    let on = travel(&mut world, StrategyName::Hybrid);
    assert_eq!(on.kept_chunks, 0, "the third has nothing");
    write(&mut world, 4 * CHUNK..6 * CHUNK);
    // And to the first: what it has is not what came to the third.
    let mut second = std::mem::replace(&mut world.sides[1], first);
    let back = travel(&mut world, StrategyName::Hybrid);
    assert_eq!(back.kept_chunks, 0, "{back:?}");
    world.verify();
    second.terminate();
    world.finish();
}
