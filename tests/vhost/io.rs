// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What goes in comes out: every request type, every way of notifying, several queues.

use crate::guest::{Ask, EVENT_IDX, Guest, IOERR, OK, T_DISCARD, T_WRITE_ZEROES, UNSUPP, pattern};
use crate::rig::{Rig, Setup, wait_until};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::{Duration, Instant};

fn started(setup: Setup) -> (Rig, Guest) {
    let queues = usize::from(setup.queues);
    let rig = Rig::new(setup);
    let mut guest = Guest::connect(&rig.socket(), queues);
    guest.start_fresh();
    (rig, guest)
}

#[test]
fn every_request_type_is_answered() {
    let (rig, mut guest) = started(Setup::default());
    let data = pattern(8192, 1);
    assert_eq!(guest.ask(0, &Ask::Out(16, &data)).status, OK);
    assert_eq!(guest.ask(0, &Ask::Flush).status, OK);
    let read = guest.ask(0, &Ask::In(16, 8192));
    assert_eq!((read.status, read.data == data), (OK, true));
    assert_eq!(rig.layer(8192, 8192), data);
    let id = guest.ask(0, &Ask::Id);
    assert_eq!((id.status, &id.data[..]), (OK, &b"test-serial\0\0\0\0\0\0\0\0\0"[..]));
    rig.frontend.as_ref().unwrap().set_serial("a serial that is longer than twenty");
    assert_eq!(guest.ask(0, &Ask::Id).data, b"a serial that is lon");
    assert_eq!(guest.ask(0, &Ask::Zero(T_DISCARD, &[(16, 1, 0), (18, 2, 0)])).status, OK);
    assert_eq!(guest.ask(0, &Ask::Zero(T_WRITE_ZEROES, &[(24, 1, 1)])).status, OK);
    let mut expected = data;
    expected[0..512].fill(0);
    expected[1024..2048].fill(0);
    expected[4096..4608].fill(0);
    assert!(guest.ask(0, &Ask::In(16, 8192)).data == expected);
    assert_eq!(guest.ask(0, &Ask::Zero(T_DISCARD, &[(0, 8, 1)])).status, UNSUPP);
    assert_eq!(guest.ask(0, &Ask::Other(14)).status, UNSUPP);
    assert_eq!(guest.ask(0, &Ask::Other(0xffff_ffff)).status, UNSUPP);
}

#[test]
fn what_is_outside_the_disk_or_no_whole_sector_is_an_error() {
    let (_rig, mut guest) = started(Setup::default());
    let end = (16 << 20) / 512;
    let data = pattern(1024, 2);
    assert_eq!(guest.ask(0, &Ask::Out(end - 2, &data)).status, OK);
    for sector in [end - 1, end, u64::MAX, u64::MAX / 512] {
        assert_eq!(guest.ask(0, &Ask::Out(sector, &data)).status, IOERR, "sector {sector}");
        assert_eq!(guest.ask(0, &Ask::In(sector, 1024)).status, IOERR, "sector {sector}");
    }
    assert_eq!(guest.ask(0, &Ask::Out(0, &data[..100])).status, IOERR);
    assert_eq!(guest.ask(0, &Ask::In(0, 513)).status, IOERR);
    assert_eq!(guest.ask(0, &Ask::Zero(T_WRITE_ZEROES, &[(end - 1, 2, 0)])).status, IOERR);
    assert!(guest.ask(0, &Ask::In(end - 2, 1024)).data == data);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let (_rig, mut guest) = started(Setup { read_only: true, ..Setup::default() });
    assert_ne!(guest.features & 1 << 5, 0);
    assert_eq!(guest.ask(0, &Ask::Out(0, &pattern(512, 3))).status, IOERR);
    assert_eq!(guest.ask(0, &Ask::Zero(T_DISCARD, &[(0, 1, 0)])).status, IOERR);
    assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK);
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let (rig, mut guest) = started(Setup { queues: 3, ..Setup::default() });
    let config = guest.config(0, 57);
    assert_eq!(config[0..8], ((16u64 << 20) / 512).to_le_bytes());
    assert_eq!(config[34..36], 3u16.to_le_bytes());
    assert_eq!(guest.config(0, 60).len(), 60);
    assert_eq!(guest.config(56, 200)[1..], [0; 199]);
    assert_eq!(guest.config(32, 1), [1]);
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    use vhost::vhost_user::VhostUserFrontend;
    guest.link.set_config(32, flags, &[0]).unwrap();
    assert_eq!(guest.config(32, 1), [0]);
    assert!(!rig.volume.write_cache());
    // A daemon that is started again must know it: the guest sends no flush, and the hypervisor does not say it again.
    assert!(rig.volume.store().superblock().write_through);
    assert_eq!(guest.ask(0, &Ask::Out(0, &pattern(4096, 4))).status, OK);
    guest.link.set_config(8, flags, &[1, 2, 3]).unwrap();
    rig.wait_for(&blkferry::frontend::signal::HypervisorSignal::WriteCache(false), 1);
}

/// A random load against a model, a slot of the disk per slot of the ring so that requests do not overlap.
pub fn random_load(guest: &mut Guest, queue: usize, rounds: usize, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let base = queue as u64 * 4096;
    let mut model = vec![0u8; 2 << 20];
    for round in 0..rounds {
        let mut order: Vec<u64> = (0..128).collect();
        let batch = 1 + (rng.next_u32() % 36) as usize;
        let mut reads = Vec::new();
        for _ in 0..batch {
            let cell = order.swap_remove((rng.next_u32() as usize) % order.len());
            let start = rng.random_range(0..8u64);
            let sectors = rng.random_range(1..=(16 - start)) as usize;
            let sector = cell * 16 + start;
            let at = sector as usize * 512;
            if rng.random_bool(0.5) {
                let data = pattern(sectors * 512, rng.next_u64() >> 8);
                model[at..at + data.len()].copy_from_slice(&data);
                guest.send(queue, &Ask::Out(base + sector, &data));
            } else {
                let head = guest.send(queue, &Ask::In(base + sector, sectors * 512));
                reads.push((head, at, sectors * 512));
            }
        }
        guest.kick(queue);
        for done in guest.wait(queue, batch) {
            assert_eq!(done.status, OK);
            if let Some((_, at, len)) = reads.iter().find(|(head, ..)| *head == done.head) {
                assert!(done.data == model[*at..*at + *len], "round {round}, seed {seed}");
            }
        }
    }
}

#[test]
fn random_load_on_several_queues_direct_and_indirect() {
    for (indirect, high, features) in
        [(false, false, 0), (true, true, 0), (false, true, EVENT_IDX), (true, false, EVENT_IDX)]
    {
        let rig = Rig::new(Setup { queues: 3, ..Setup::default() });
        let mut guest = Guest::connect(&rig.socket(), 3);
        guest.features = guest.features & !EVENT_IDX | features;
        (guest.indirect, guest.high) = (indirect, high);
        guest.start_fresh();
        for queue in 0..3 {
            random_load(&mut guest, queue, 40, 7 + queue as u64);
        }
        assert_eq!(guest.stop(), guest.queues.iter().map(|q| u32::from(q.available)).collect::<Vec<_>>());
    }
}

#[test]
fn the_driver_is_called_and_may_refuse_to_be() {
    for features in [0, EVENT_IDX] {
        let rig = Rig::new(Setup::default());
        let mut guest = Guest::connect(&rig.socket(), 1);
        guest.features = guest.features & !EVENT_IDX | features;
        guest.start_fresh();
        let called = |guest: &Guest| guest.queues[0].call.read().is_ok();
        assert!(called(&guest), "a start calls once: nobody may have heard of what was used before");
        for _ in 0..20 {
            guest.send(0, &Ask::In(0, 512));
            guest.kick(0);
            wait_until("a call", || called(&guest));
            assert_eq!(guest.reap(0).len(), 1);
        }
        // No interrupts now: by the flag, or by an event index that lies far ahead.
        let ring = guest.queues[0].available_ring();
        guest.memory.write(ring, &1u16.to_le_bytes());
        guest.memory.write(ring + 4 + 2 * 128, &(guest.queues[0].used + 1000).to_le_bytes());
        guest.send(0, &Ask::In(0, 512));
        guest.kick(0);
        let used = guest.queues[0].used_ring() + 2;
        wait_until("the used index", || guest.memory.read16(used) == guest.queues[0].used.wrapping_add(1));
        // The stop is behind the completion, so a call would have been made by now.
        guest.stop();
        assert!(!called(&guest), "features {features:#x}");
    }
}

#[test]
fn a_sleeping_ring_hears_a_kick_and_a_busy_one_needs_none() {
    for features in [0, EVENT_IDX] {
        let rig = Rig::new(Setup::default());
        let mut guest = Guest::connect(&rig.socket(), 1);
        guest.features = guest.features & !EVENT_IDX | features;
        guest.start_fresh();
        let mut rng = ChaCha8Rng::seed_from_u64(features);
        for round in 0..4000usize {
            // The next request comes about when the ring goes to sleep, and a kick only when the device asks for
            // one, as a driver does it: a lost wake-up hangs here.
            (0..rng.random_range(0..2000)).for_each(|_| std::hint::spin_loop());
            let (old, count) = (guest.queues[0].available, round % 3 + 1);
            for _ in 0..count {
                guest.send(0, &Ask::Id);
            }
            if guest.wants_kick(0, old) {
                guest.kick(0);
            }
            let since = Instant::now();
            let mut done = 0;
            while done < count {
                done += guest.reap(0).len();
                assert!(since.elapsed() < Duration::from_secs(20), "round {round}: a wake-up is lost");
            }
        }
    }
}

#[test]
fn memory_may_come_and_go_while_rings_run() {
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.set_up(&[0]);
    guest.enable(true).unwrap();
    let [_, high] = guest.memory.regions();
    guest.high = true;
    let data = pattern(4096, 9);
    assert_eq!(guest.ask(0, &Ask::Out(0, &data)).status, OK);
    guest.link.remove_mem_region(&high).unwrap();
    assert!(guest.link.remove_mem_region(&high).is_err(), "twice");
    assert_eq!(guest.ask(0, &Ask::In(0, 4096)).status, IOERR, "the buffer is not guest memory now");
    guest.link.add_mem_region(&high).unwrap();
    assert!(guest.link.add_mem_region(&high).is_err(), "overlap");
    assert!(guest.ask(0, &Ask::In(0, 4096)).data == data);
    guest.link.set_mem_table(&guest.memory.regions()).unwrap();
    guest.set_addresses(0);
    assert!(guest.ask(0, &Ask::In(0, 4096)).data == data);
}
