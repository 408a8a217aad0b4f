// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk that becomes larger while its guest writes: before a move, after it, and under kills.

use crate::world::{Setup, World};
use crate::writer::SECTOR;
use blkferry::control::client::ClientError;
use blkferry::node::status::{MigrationState, StrategyName};
use rand::RngExt;
use std::time::Duration;

const SIZE: u64 = (16 << 20) + 13 * 512;

fn code<T>(result: Result<T, ClientError>) -> String {
    result.err().map_or_else(|| "none".to_owned(), |error| error.code().to_owned())
}

impl World {
    /// The owner's disk becomes larger, and the writer uses all of it from now on.
    fn grow(&mut self, size: u64) {
        assert_eq!(self.owner().resize(size).unwrap().size, size);
        self.writer.grow(size / SECTOR as u64);
        let guest = self.guest.as_mut().unwrap();
        assert_eq!(guest.config(0, 8), (size / SECTOR as u64).to_le_bytes());
    }
}

#[test]
fn a_disk_grows_moves_and_grows_again() {
    let base = crate::guest::pattern((5 << 20) + 700, 3);
    for base in [None, Some([base.clone(), base])] {
        // A daemon with a base image takes its size from that, unless it is told.
        let sized = base.is_some();
        let setup = Setup { seed: 21, size: SIZE, base, sized, bandwidth: 3 << 20, ..Setup::default() };
        let mut world = World::new(setup);
        world.populate(30);
        let mut size = SIZE;
        for more in [512, 100 << 10, 5 << 20] {
            world.run(Duration::from_millis(50));
            size += more;
            world.grow(size);
        }
        world.run(Duration::from_millis(100));
        if sized {
            // The other side has the size that the disk had.
            let port = world.sides[1].port;
            world.owner().migrate(port, StrategyName::Hybrid, None).unwrap();
            world.until_state(0, MigrationState::Failed);
            world.expected.push("migration failed (Geometry)");
            world.sides[1].renew(size);
        }
        world.arm(StrategyName::Hybrid, None);
        assert_eq!(code(world.sides[0].resize(size + 512)), "busy");
        assert_eq!(code(world.sides[1].resize(size + 512)), "not-owner");
        world.switch_over();
        assert_eq!(code(world.sides[1].resize(size + 512)), "busy");
        assert_eq!(code(world.sides[0].resize(size + 512)), "handed-over");
        world.complete();
        world.until("the end of the migration", |world| world.sides[1].resize(size).is_ok());
        world.grow(size + (3 << 20));
        world.run(Duration::from_millis(100));
        // Started again with the arguments that it always had.
        world.sides[1].kill();
        world.sides[1].spawn();
        world.reconnect(1);
        assert_eq!(world.sides[1].volume().size, size + (3 << 20));
        world.finish();
    }
}

#[test]
fn what_cannot_be_is_refused_by_name_and_changes_nothing() {
    let mut world = World::new(Setup { seed: 22, size: SIZE, ..Setup::default() });
    for (size, wanted) in [
        (SIZE - 512, "shrink"),
        (0, "shrink"),
        (SIZE + 1, "invalid"),
        (u64::MAX, "invalid"),
        (u64::from(u32::MAX) * (64 << 10), "limit"),
    ] {
        assert_eq!(code(world.sides[0].resize(size)), wanted, "{size}");
        assert_eq!(world.sides[0].volume().size, SIZE);
    }
    assert_eq!(world.sides[0].resize(SIZE).unwrap().size, SIZE, "it has that size already");
    assert_eq!(code(world.sides[1].resize(2 * SIZE)), "not-owner");
    world.run(Duration::from_millis(50));
    world.finish();
}

/// The daemon is killed somewhere in a growth; it has one size or the other then, and all that was written.
#[test]
fn a_kill_in_a_growth_loses_nothing() {
    let mut world = World::new(Setup { seed: 23, size: SIZE, ..Setup::default() });
    world.populate(20);
    let mut size = SIZE;
    for round in 0..10 {
        let wanted = size + 512 * world.writer.rng.random_range(1..3000u64);
        let wait = Duration::from_micros(world.writer.rng.random_range(0..6000));
        let client = world.sides[0].client();
        let asked = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(client.resize(wanted)).is_ok()
        });
        world.tick();
        std::thread::sleep(wait);
        world.sides[0].kill();
        let answered = asked.join().unwrap();
        world.sides[0].spawn();
        let found = world.sides[0].volume().size;
        assert!(found == wanted || (found == size && !answered), "round {round}: {found}");
        size = found;
        world.writer.grow(size / SECTOR as u64);
        world.reconnect(0);
        world.run(Duration::from_millis(30));
    }
    world.verify();
    world.grow(size + (2 << 20));
    world.run(Duration::from_millis(50));
    world.finish();
}
