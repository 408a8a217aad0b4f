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

/// Write-back and write-through, chosen by the guest while it runs (virtio 1.2, 5.2.5.1): in write-through each write has
/// been synced when it is answered.
#[test]
fn the_guest_switches_its_write_cache_and_write_through_syncs_every_write() {
    use vhost::vhost_user::VhostUserFrontend;
    let (rig, mut guest) = started(Setup { queues: 2, ..Setup::default() });
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    let data = pattern(4096, 6);
    for round in 0..3u64 {
        for through in [false, true] {
            guest.link.set_config(32, flags, &[u8::from(!through)]).unwrap();
            assert_eq!(guest.config(32, 1), [u8::from(!through)]);
            for n in 0..10u64 {
                for queue in 0..2 {
                    let asks = [
                        Ask::Out((n + 20 * round) * 8, &data),
                        Ask::Zero(T_DISCARD, &[((n + 500) * 8, 8, 0)]),
                        Ask::Zero(T_WRITE_ZEROES, &[((n + 500) * 8, 4, 0)]),
                        Ask::In((n + 20 * round) * 8, 4096),
                    ];
                    for (at, ask) in asks.iter().enumerate() {
                        let before = rig.volume.io().syncs;
                        assert_eq!(guest.ask(queue, ask).status, OK);
                        let synced = rig.volume.io().syncs - before;
                        let wanted = u64::from(through && at < 3);
                        assert_eq!(synced, wanted, "write-through {through}, request {at}");
                    }
                }
            }
            let before = rig.volume.io().syncs;
            assert_eq!(guest.ask(0, &Ask::Flush).status, OK);
            assert_eq!(rig.volume.io().syncs - before, 1, "a flush syncs in both");
        }
    }
}

/// A guest that cannot flush cannot make its writes safe: the device writes through for it, whatever `writeback` says.
#[test]
fn without_the_flush_feature_every_write_is_synced() {
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.features &= !(1 << 9 | 1 << 11);
    guest.start_fresh();
    for n in 1..20 {
        assert_eq!(guest.ask(0, &Ask::Out(n * 8, &pattern(4096, n))).status, OK);
        assert_eq!(rig.volume.io().syncs, n);
    }
}

/// A chunk that is dropped whole gives its space back and is `Zero`; a part of one gives back what it can.
#[test]
fn discards_punch_holes_and_write_zeroes_only_if_it_may() {
    use blkferry::core::chunk::ChunkState;
    use blkferry::core::geometry::ChunkId;
    use std::os::unix::fs::MetadataExt;
    const CHUNK: u64 = 256 << 10;
    let (rig, mut guest) = started(Setup::default());
    let sectors = (CHUNK / 512) as u32;
    // The file system may count a few blocks of its own: less than what any step here gives back.
    let allocated = |bytes: u64| {
        let layer = std::fs::File::open(rig.dir.path().join("state/layer")).unwrap();
        layer.sync_all().unwrap();
        let found = layer.metadata().unwrap().blocks() * 512;
        assert!((bytes..bytes + (32 << 10)).contains(&found), "{found} bytes are allocated, not {bytes}");
    };
    let fill = |guest: &mut Guest| {
        for at in (0..4 * CHUNK).step_by(16 << 10) {
            assert_eq!(guest.ask(0, &Ask::Out(at / 512, &pattern(16 << 10, at))).status, OK);
        }
    };
    fill(&mut guest);
    allocated(4 * CHUNK);
    let zero = |guest: &mut Guest, kind, ranges: &[(u64, u32, u32)]| {
        assert_eq!(guest.ask(0, &Ask::Zero(kind, ranges)).status, OK);
    };
    // Two whole chunks in one request of two segments.
    zero(&mut guest, T_DISCARD, &[(0, sectors, 0), (2 * u64::from(sectors), sectors, 0)]);
    allocated(2 * CHUNK);
    let states = || [0, 1, 2, 3].map(|chunk| rig.volume.state(ChunkId(chunk)).unwrap());
    use ChunkState::{Modified, Zero};
    assert_eq!(states(), [Zero, Modified, Zero, Modified]);
    // A part of a chunk: its pages go, its state stays.
    zero(&mut guest, T_DISCARD, &[(u64::from(sectors), 128, 0)]);
    allocated(2 * CHUNK - 64 * 1024);
    assert_eq!(states()[1], Modified);
    // Without UNMAP the space stays allocated, with it it goes; both read as zeros.
    zero(&mut guest, T_WRITE_ZEROES, &[(u64::from(sectors) + 128, 128, 0)]);
    allocated(2 * CHUNK - 64 * 1024);
    zero(&mut guest, T_WRITE_ZEROES, &[(u64::from(sectors) + 128, 128, 1)]);
    allocated(2 * CHUNK - 128 * 1024);
    for at in (0..3 * CHUNK).step_by(16 << 10) {
        let zeros = !(CHUNK + (128 << 10)..2 * CHUNK).contains(&at);
        let expected = if zeros { vec![0; 16 << 10] } else { pattern(16 << 10, at) };
        assert!(guest.ask(0, &Ask::In(at / 512, 16 << 10)).data == expected, "at {at}");
    }
    // Dropped space is there again when it is written.
    fill(&mut guest);
    allocated(4 * CHUNK);
    assert_eq!(states(), [Modified; 4]);
}

#[test]
fn the_offered_features_and_limits_are_those_of_the_configuration() {
    let (_rig, mut guest) = started(Setup::default());
    // SIZE_MAX, SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES.
    for bit in [1, 2, 6, 9, 10, 11, 12, 13, 14] {
        assert_ne!(guest.features & 1 << bit, 0, "feature {bit}");
    }
    let config = guest.config(0, 60);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let (size_max, seg_max) = (u64::from(word(8)), u64::from(word(12)));
    assert_eq!((size_max, seg_max), (2 << 20, 126));
    assert_eq!(word(20), 512, "logical blocks");
    assert!(config[24] >= 3, "physical blocks of a page at least");
    let (min_io, opt_io) = (u16::from_le_bytes([config[26], config[27]]), word(28));
    assert!(u32::from(min_io) >= 1 << config[24] && u32::from(min_io) <= opt_io);
    assert_eq!(opt_io * 512, 256 << 10, "a chunk");
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
