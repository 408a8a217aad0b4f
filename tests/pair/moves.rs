// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Moves in which nobody dies.

use crate::daemon::Daemon;
use crate::guest::{Ask, Guest, Memory, Queue};
use crate::world::{Setup, World};
use blkferry::node::status::{MigrationState, StrategyName};
use std::io::{Read, Write};
use std::time::Duration;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

/// A base image that tells where its bytes come from.
fn image(len: usize, seed: u64) -> Vec<u8> {
    crate::guest::pattern(len, seed)
}

fn world(seed: u64, bandwidth: u64) -> World {
    let mut world = World::new(Setup { seed, bandwidth, ..Setup::default() });
    world.populate(30);
    world
}

#[test]
fn a_disk_with_a_base_image_and_an_odd_size_moves() {
    let base = image((7 << 20) + 5 * 4096 + 512, 3);
    let size = (20 << 20) + 13 * 512;
    let mut world = World::new(Setup { size, base: Some([base.clone(), base]), ..Setup::default() });
    world.populate(20);
    world.run(Duration::from_millis(300));
    world.travel(StrategyName::Hybrid);
    world.run(Duration::from_millis(200));
    world.finish();
}

#[test]
fn daemons_with_nothing_to_do_sleep_and_still_know_what_happened() {
    let mut world = World::new(Setup { seed: 7, ..Setup::default() });
    world.populate(30);
    world.idle = true;
    world.settle();
    let before = world.sides[0].volume();
    // What was asked just now may still be on its way out: the counting begins at a quiet moment, or never.
    world.until("a rest", |world| {
        let before = world.sides.each_ref().map(Daemon::sleeps);
        std::thread::sleep(Duration::from_secs(1));
        before == world.sides.each_ref().map(Daemon::sleeps)
    });
    world.write(0..8);
    let after = world.sides[0].volume();
    assert_eq!(
        (after.io.writes, after.io.written_bytes),
        (before.io.writes + 1, before.io.written_bytes + 4096)
    );
    world.finish();
}

#[test]
fn a_destination_learns_the_size_from_the_source() {
    for strategy in [StrategyName::Precopy, StrategyName::Postcopy] {
        let mut world =
            World::new(Setup { seed: 2, size: (16 << 20) + 512, sized: false, ..Setup::default() });
        world.populate(30);
        world.travel(strategy);
        world.run(Duration::from_millis(100));
        world.finish();
    }
}

#[test]
fn there_and_back_and_there_again() {
    let base = image(9 << 20, 5);
    let mut world = World::new(Setup { seed: 3, base: Some([base.clone(), base]), ..Setup::default() });
    world.populate(30);
    for strategy in [StrategyName::Hybrid, StrategyName::Postcopy, StrategyName::Hybrid] {
        world.run(Duration::from_millis(100));
        world.travel(strategy);
        world.verify();
    }
    assert_eq!(world.here, 1);
    world.finish();
}

#[test]
fn a_migration_cancelled_during_the_push_leaves_nothing_behind() {
    let mut world = world(4, 4 << 20);
    world.arm(StrategyName::Hybrid, None);
    world.run(Duration::from_millis(300));
    world.owner().cancel().unwrap();
    world.until_state(0, MigrationState::Cancelled);
    world.until("the destination to let go", |world| world.sides[1].volume().chunks.modified == 0);
    world.run(Duration::from_millis(100));
    world.incoming = None;
    world.verify();
    world.arm(StrategyName::Hybrid, Some(0));
    world.run(Duration::from_millis(200));
    world.switch_over();
    world.complete();
    world.expected.push("migration failed (Cancelled)");
    world.finish();
}

#[test]
fn the_source_takes_the_disk_back_after_the_stop_and_gives_it_again() {
    let mut world = world(5, 0);
    for _ in 0..3 {
        if world.owner().state() != MigrationState::Active {
            world.arm(StrategyName::Hybrid, None);
        }
        world.run(Duration::from_millis(50));
        let bases = world.stop();
        assert_eq!(world.owner().state(), MigrationState::PreSwitchover);
        world.guest.as_mut().unwrap().start(&bases);
        world.running = true;
        world.run(Duration::from_millis(100));
        world.until_state(0, MigrationState::Active);
    }
    world.switch_over();
    world.complete();
    world.finish();
}

/// The guest is resumed at the side that it left: a hypervisor there starts the rings again, on its own copy of the
/// guest's memory, with a request in them.
fn resume_at_the_source(world: &World, old: &mut Guest, base: u32) {
    old.memory = Memory::new();
    old.queues = vec![Queue::new(0)];
    let queue = &mut old.queues[0];
    (queue.available, queue.used) = (base as u16, base as u16);
    old.memory.write(queue.available_ring() + 2, &queue.available.to_le_bytes());
    old.memory.write(queue.used_ring() + 2, &queue.used.to_le_bytes());
    old.enable(false).unwrap();
    old.set_up(&[base]);
    old.send(0, &Ask::Out(0, &[7; 4096]));
    assert!(old.enable(true).is_err(), "the start is refused");
    old.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(old.reap(0).len(), 0, "nothing is processed");
    assert!(!world.sides[0].volume().serving);
}

#[test]
fn a_source_that_has_given_the_disk_away_refuses_to_start() {
    let mut world = world(6, 3 << 20);
    world.arm(StrategyName::Postcopy, None);
    let bases = world.stop();
    let mut old = world.guest.take().unwrap();
    let mut next = world.incoming.take().unwrap();
    next.queues = std::mem::take(&mut old.queues);
    next.start(&bases);
    (world.guest, world.here, world.running) = (Some(next), 1, true);
    assert_eq!(world.sides[0].state(), MigrationState::PostcopyActive);
    resume_at_the_source(&world, &mut old, bases[0]);
    let denied = world.sides[1].migrate(world.sides[0].port, StrategyName::Hybrid, None).unwrap_err();
    assert_eq!(denied.code(), "not-whole", "{denied}");
    assert_eq!(world.sides[0].cancel().unwrap_err().code(), "handed-over");
    assert_eq!(world.sides[1].cancel().unwrap_err().code(), "handed-over");
    world.complete();
    resume_at_the_source(&world, &mut old, bases[0]);
    world.expected.extend(["the disk has been handed over", "asks for a disk that was handed over"]);
    world.finish();
}

#[test]
fn another_base_image_is_refused_by_name_and_the_source_goes_on() {
    let images = [image(8 << 20, 1), image(8 << 20, 2)];
    let mut world = World::new(Setup { seed: 7, base: Some(images), ..Setup::default() });
    world.populate(20);
    let port = world.sides[1].port;
    world.owner().migrate(port, StrategyName::Hybrid, None).unwrap();
    world.until_state(0, MigrationState::Failed);
    let status = world.owner().migration();
    assert!(status.message.contains("base image"), "{}", status.message);
    world.run(Duration::from_millis(100));
    assert_eq!(world.sides[1].volume().chunks.modified, 0);
    world.expected.push("migration failed (BaseIdentity)");
    world.finish();
}

#[test]
fn a_second_migration_is_denied_while_one_is_under_way() {
    let mut world = world(8, 2 << 20);
    world.arm(StrategyName::Hybrid, None);
    let port = world.sides[1].port;
    assert_eq!(world.owner().migrate(port, StrategyName::Hybrid, None).unwrap_err().code(), "busy");
    let port = world.sides[0].port;
    let denied = world.sides[1].migrate(port, StrategyName::Hybrid, None).unwrap_err();
    assert_eq!(denied.code(), "not-owner");
    world.switch_over();
    world.complete();
    world.finish();
}

/// Device state is what a front-end moves with the guest; here it carries the ticket of the handoff.
fn save(guest: &Guest) -> Result<Vec<u8>, vhost::Error> {
    let (mut read, write) = std::io::pipe().unwrap();
    let stopped = VhostTransferStatePhase::STOPPED;
    guest.link.set_device_state_fd(VhostTransferStateDirection::SAVE, stopped, write.into())?;
    let mut state = Vec::new();
    read.read_to_end(&mut state).unwrap();
    guest.link.check_device_state()?;
    Ok(state)
}

fn load(guest: &Guest, state: &[u8]) -> Result<(), vhost::Error> {
    let (read, mut write) = std::io::pipe().unwrap();
    let stopped = VhostTransferStatePhase::STOPPED;
    guest.link.set_device_state_fd(VhostTransferStateDirection::LOAD, stopped, read.into())?;
    write.write_all(state).unwrap();
    drop(write);
    guest.link.check_device_state()
}

#[test]
fn the_ticket_of_a_handoff_fits_this_handoff_alone() {
    let mut world = world(9, 0);
    assert!(save(world.guest.as_ref().unwrap()).is_err(), "nothing is handed over");
    world.arm(StrategyName::Hybrid, None);
    // A handoff that is taken back: its ticket is stale afterwards.
    let bases = world.stop();
    let stale = save(world.guest.as_ref().unwrap()).unwrap();
    let guest = world.guest.as_mut().unwrap();
    guest.start(&bases);
    world.running = true;
    world.until_state(0, MigrationState::Active);
    world.run(Duration::from_millis(50));
    let bases = world.stop();
    let ticket = save(world.guest.as_ref().unwrap()).unwrap();
    // The front-end here disconnects before the guest is restored elsewhere.
    let mut old = world.guest.take().unwrap();
    let queues = std::mem::take(&mut old.queues);
    drop(old);
    let mut next = world.incoming.take().unwrap();
    assert!(load(&next, &stale).is_err(), "stale");
    let mut wrong = ticket.clone();
    wrong[20] ^= 1;
    assert!(load(&next, &wrong).is_err(), "wrong");
    load(&next, &ticket).unwrap();
    next.queues = queues;
    next.start(&bases);
    (world.guest, world.here, world.running) = (Some(next), 1, true);
    world.run(Duration::from_millis(50));
    world.complete();
    world.finish();
}

/// As Cloud Hypervisor moves a guest: a pause by ENABLE(0) alone, the ticket in the VM's state, the source's front-end
/// gone before the other one connects, which sets all up with ENABLE(1) while the VM is paused, and enables once more.
#[test]
fn a_guest_is_restored_from_its_device_state_by_a_front_end_that_comes_late() {
    let mut world = world(12, 2 << 20);
    let port = world.sides[1].port;
    world.sides[0].migrate(port, StrategyName::Hybrid, None).unwrap();
    world.until_state(0, MigrationState::Active);
    for _ in 0..2 {
        world.run(Duration::from_millis(100));
        let World { guest, writer, .. } = &mut world;
        guest.as_mut().unwrap().enable(false).unwrap();
        writer.reap(guest.as_mut().unwrap());
        assert_eq!(writer.in_flight(), 0, "a pause takes all that is available");
        assert_eq!(world.sides[0].state(), MigrationState::Active, "and proves nothing");
        world.guest.as_mut().unwrap().enable(true).unwrap();
    }
    world.run(Duration::from_millis(50));
    let World { guest, writer, .. } = &mut world;
    let mut old = guest.take().unwrap();
    old.enable(false).unwrap();
    writer.reap(&mut old);
    let base = vhost::VhostBackend::get_vring_base(&old.link, 0).unwrap();
    assert_eq!(world.sides[0].state(), MigrationState::PreSwitchover);
    let ticket = save(&old).unwrap();
    let queues = std::mem::take(&mut old.queues);
    drop(old);
    let mut next = world.connect(1);
    load(&next, &ticket).unwrap();
    next.queues = queues;
    vhost::VhostBackend::set_vring_call(&next.link, 0, &next.queues[0].call).unwrap();
    next.start(&[base]);
    next.enable(true).unwrap();
    (world.guest, world.here) = (Some(next), 1);
    world.run(Duration::from_millis(100));
    world.complete();
    world.finish();
}

#[test]
fn a_flush_at_the_destination_is_answered() {
    let mut world = world(10, 2 << 20);
    world.arm(StrategyName::Postcopy, None);
    world.switch_over();
    world.settle();
    let before = world.writer.flushed;
    world.writer.flush(world.guest.as_mut().unwrap());
    world.until("the flush", |world| world.writer.flushed > before);
    assert_eq!(world.owner().state(), MigrationState::PostcopyActive, "long before the end of the pull");
    world.complete();
    world.finish();
}

#[test]
fn the_chunks_are_counted_once_more_when_the_disk_of_an_idle_guest_has_come() {
    let mut world = world(11, 3 << 20);
    world.idle = true;
    world.arm(StrategyName::Postcopy, None);
    world.switch_over();
    world.until("a count", |world| world.owner().volume().chunks.remote > 0);
    world.complete();
    world.until("the last count", |world| world.owner().volume().chunks.remote == 0);
    world.finish();
}
