// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that breaks the rules hurts only itself.

use crate::guest::{Ask, Guest, IOERR, NEXT, OK, T_GET_ID, T_IN, WRITE, pattern};
use crate::raw::{Raw, USER, prepare};
use crate::rig::{Rig, Setup, wait_until};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

/// A broken ring: nothing more is served, the error event is there, the rest of the device goes on, and after a
/// reset it works again.
fn breaks(name: &str, act: impl FnOnce(&mut Guest)) {
    let rig = Rig::new(Setup { queues: 2, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 2);
    guest.start_fresh();
    let data = pattern(4096, 5);
    assert_eq!(guest.ask(0, &Ask::Out(0, &data)).status, OK);
    let used = guest.memory.read16(guest.queues[0].used_ring() + 2);
    act(&mut guest);
    guest.kick(0);
    wait_until(name, || guest.queues[0].error.read().is_ok());
    assert!(guest.ask(1, &Ask::In(0, 4096)).data == data, "{name}: the other queue");
    assert_eq!(guest.memory.read16(guest.queues[0].used_ring() + 2), used, "{name}: nothing is answered");
    guest.stop();
    drop(guest);
    let mut guest = Guest::connect(&rig.socket(), 2);
    guest.start_fresh();
    assert!(guest.ask(0, &Ask::In(0, 4096)).data == data, "{name}: after a reset");
}

/// Address, length, flags, next.
type Words = (u64, u32, u16, u16);

fn raw(guest: &mut Guest, descriptors: &[Words]) {
    for (n, entry) in (0u64..).zip(descriptors) {
        guest.descriptor(guest.queues[0].base + 16 * n, *entry);
    }
    guest.offer(0, 0);
}

#[test]
fn rings_that_cannot_be_understood_stop() {
    breaks("a loop", |guest| raw(guest, &[(0x8000, 16, NEXT, 1), (0x9000, 16, NEXT, 0)]));
    breaks("no status byte", |guest| raw(guest, &[(0x8000, 16, 0, 0)]));
    breaks("a status byte outside memory", |guest| {
        raw(guest, &[(0x8000, 16, NEXT, 1), (1 << 50, 1, WRITE, 0)])
    });
    breaks("a descriptor past the table", |guest| raw(guest, &[(0x8000, 16, NEXT, 128)]));
    breaks("a head past the table", |guest| guest.offer(0, 128));
    for jump in [129, 1000, 0x8000, u16::MAX] {
        breaks(&format!("an available index that jumps by {jump}"), |guest| {
            let ring = guest.queues[0].available_ring();
            let index = guest.queues[0].available.wrapping_add(jump);
            guest.memory.write(ring + 2, &index.to_le_bytes());
        });
    }
}

#[test]
fn bad_requests_get_an_error_and_the_ring_goes_on() {
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    let status = (0xb000, 1, WRITE, 0);
    let bad: &[(&str, Vec<Words>)] = &[
        ("short header", vec![(0x8000, 8, NEXT, 1), status]),
        ("header outside", vec![(1 << 40, 16, NEXT, 1), status]),
        (
            "wrong direction",
            vec![(0x8000, 16, NEXT, 1), (0x9000, 512, NEXT | WRITE, 2), (0x9000, 512, NEXT, 3), status],
        ),
        ("data outside", vec![(0x8000, 16, NEXT, 1), (1 << 40, 512, NEXT | WRITE, 2), status]),
        ("absurd length", vec![(0x8000, 16, NEXT, 1), (0x9000, u32::MAX, NEXT | WRITE, 2), status]),
        ("no data", vec![(0x8000, 16, NEXT, 1), status]),
    ];
    guest.memory.write(0x8000, &[0; 16]);
    for (name, descriptors) in bad {
        let used = guest.memory.read16(guest.queues[0].used_ring() + 2);
        guest.memory.write(0xb000, &[0xee]);
        raw(&mut guest, descriptors);
        guest.kick(0);
        let at = guest.queues[0].used_ring() + 2;
        wait_until(name, || guest.memory.read16(at) == used.wrapping_add(1));
        assert_eq!(guest.memory.read(0xb000, 1), [IOERR], "{name}");
        guest.queues[0].used = used.wrapping_add(1);
    }
    assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK);
    assert!(guest.queues[0].error.read().is_err(), "the ring is whole");
}

#[test]
fn a_head_in_flight_cannot_be_offered_again() {
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    // Both entries are in one batch, so the first cannot be done before the second is seen.
    let head = guest.send(0, &Ask::In(0, 4096));
    guest.offer(0, head);
    guest.kick(0);
    wait_until("the error event", || guest.queues[0].error.read().is_ok());
    assert_eq!(guest.wait(0, 1)[0].status, OK, "what was in flight is completed");
    assert_eq!(guest.stop().len(), 1);
}

#[test]
fn rings_outside_memory_are_refused_at_the_start() {
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.set_up(&[0]);
    let config = vhost::VringConfigData {
        queue_max_size: 128,
        queue_size: 128,
        flags: 0,
        desc_table_addr: 0x7f00_0000_0000,
        used_ring_addr: 0x7f00_007f_fff0,
        avail_ring_addr: 0x7f00_0000_1000,
        log_addr: None,
    };
    guest.link.set_vring_addr(0, &config).unwrap();
    assert!(guest.enable(true).is_err());
    guest.set_addresses(0);
    guest.enable(true).unwrap();
    assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK);
    assert!(guest.link.set_vring_addr(0, &config).is_err(), "a running ring does not follow to nowhere");
    assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK);
}

/// Messages as bytes, for what the crate's front-end would not send.
struct Wire(UnixStream);

impl Wire {
    /// Connects and negotiates acknowledgements and the configuration space.
    fn connect(rig: &Rig) -> Self {
        let stream = UnixStream::connect(rig.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut wire = Self(stream);
        wire.send(1, 0, &[]);
        wire.reply().unwrap();
        wire.send(2, 0, &(1u64 << 30).to_ne_bytes());
        wire.send(15, 0, &[]);
        wire.reply().unwrap();
        wire.send(16, 0, &(1u64 << 3 | 1 << 9).to_ne_bytes());
        wire
    }

    /// A message of that code, with these flags besides the version.
    fn send(&mut self, code: u32, flags: u32, body: &[u8]) {
        let words = [code, 1 | flags, body.len() as u32].map(u32::to_ne_bytes);
        // The other side may have closed already.
        drop(self.0.write_all(&[words.as_flattened(), body].concat()));
    }

    /// The body of the next reply; `None` when the connection is closed.
    fn reply(&mut self) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).ok()?;
        let mut body = vec![0; u32::from_ne_bytes(header[8..].try_into().unwrap()) as usize];
        self.0.read_exact(&mut body).ok()?;
        Some(body)
    }

    /// Whether a message with numbers of 32 bits is acknowledged as done; `None` when the connection is closed.
    fn ask(&mut self, code: u32, words: &[u32]) -> Option<bool> {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.send(code, 8, &body);
        self.reply().map(|body| body == [0; 8])
    }
}

fn works(rig: &Rig) {
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK);
}

#[test]
fn the_configuration_space_is_answered_at_any_offset() {
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    let mut whole = guest.config(0, 60);
    whole.resize(0x1000, 0);
    for offset in (0..70).chain([100, 255, 256, 0xffe, 0xfff]) {
        for len in [1, 2, 3, 57, 60, 256, 0xf00] {
            if offset + len <= 0x1000 {
                assert!(guest.config(offset as u32, len) == whole[offset..offset + len], "{offset} +{len}");
            }
        }
    }
    drop(guest);
    // Outside of what the protocol allows: no answer is made up, and the next front-end is served.
    for (offset, size, sent) in
        [(0x1000, 1, 1), (0, 0, 0), (u32::MAX, 1, 1), (0, u32::MAX, 8), (0, 8, 4), (8, 4, 8)]
    {
        let mut wire = Wire::connect(&rig);
        let words = [offset, size, 0].map(u32::to_ne_bytes);
        wire.send(24, 0, &[words.as_flattened(), &vec![0; sent]].concat());
        assert!(wire.reply().is_none(), "{offset} +{size}");
    }
    let mut wire = Wire::connect(&rig);
    let words = [58, 4, 0].map(u32::to_ne_bytes);
    wire.send(24, 0, &[words.as_flattened(), &[9; 4]].concat());
    assert_eq!(wire.reply().unwrap(), [words.as_flattened(), &[0; 4]].concat());
    drop(wire);
    works(&rig);
}

#[test]
fn only_the_write_cache_can_be_configured() {
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    let before = guest.config(0, 60);
    let (writable, migration) = (VhostUserConfigFlags::WRITABLE, VhostUserConfigFlags::LIVE_MIGRATION);
    let mut set = |offset: u32, bytes: &[u8], flags| {
        guest.link.set_config(offset, flags, bytes).unwrap();
        let config = guest.config(0, 60);
        assert_eq!((&config[..32], &config[33..]), (&before[..32], &before[33..]), "{bytes:?} at {offset}");
        config[32]
    };
    assert_eq!(set(32, &[0], writable), 0);
    assert_eq!(set(32, &[7], writable), 1, "anything that is not 0 is on");
    assert_eq!(set(31, &[0xff, 0], writable), 0);
    assert_eq!(set(33, &[1, 1], writable), 0);
    assert_eq!(set(0, &[1; 60], migration), 1);
    assert_eq!(set(30, &[0, 0, 0, 9, 9], writable), 0);
    for (offset, len) in [(0, 32), (33, 27), (60, 100), (0xfff, 1), (100, 0xf00)] {
        assert_eq!(set(offset, &vec![1; len], writable), 0, "{len} bytes at {offset}");
    }
    assert!(!rig.volume.write_cache());
}

#[test]
fn odd_ring_sizes_and_bases_are_refused_and_small_rings_work() {
    let rig = Rig::new(Setup { queues: 2, ..Setup::default() });
    let mut wire = Wire::connect(&rig);
    let (num, base) = (8, 10);
    for size in [0, 3, 127, 129, 65535, 65536, 1 << 31, u32::MAX] {
        assert_eq!(wire.ask(num, &[0, size]), Some(false), "size {size}");
    }
    for size in [1, 2, 1024, 32768] {
        assert_eq!(wire.ask(num, &[0, size]), Some(true), "size {size}");
    }
    for value in [65536, 1 << 31, u32::MAX] {
        assert_eq!(wire.ask(base, &[0, value]), Some(false), "base {value}");
    }
    for queue in [2, 255, u32::MAX] {
        assert_eq!(wire.ask(num, &[queue, 128]), Some(false), "queue {queue}");
        assert_eq!(wire.ask(base, &[queue, 0]), Some(false), "queue {queue}");
    }
    drop(wire);
    for size in [1, 2, 4] {
        let mut guest = Guest::connect(&rig.socket(), 2);
        prepare(&mut guest, 2, 128);
        let mut raw = Raw::new(0, size, 0x10_0000);
        raw.start(&mut guest);
        for n in 0..20 {
            raw.request(&guest.memory, n % size, (T_IN, 0), &[(0x20_0000, 512, WRITE)]);
            raw.offer(&guest.memory, [n % size]);
            wait_until("an answer", || raw.reap(&guest.memory) == [(n % size, 513)]);
            assert_eq!(raw.status_of(&guest.memory, n % size), OK, "a ring of {size}");
        }
    }
}

#[test]
fn rings_that_lie_on_top_of_each_other_hurt_nobody_else() {
    let rig = Rig::new(Setup { queues: 2, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 2);
    // Where descriptors, available and used ring begin.
    let places: &[(&str, [u64; 3])] = &[
        ("the used ring on the descriptors", [0, 0x8000, 0]),
        ("the used ring inside the descriptors", [0, 0x8000, 0x50]),
        ("the used ring on the available one", [0, 0x8000, 0x8000]),
        ("the used ring two bytes into the available one", [0, 0x8002, 0x8004]),
        ("the available ring on the descriptors", [0, 0, 0xc000]),
        ("all in one place", [0, 0, 0]),
        ("on the requests themselves", [0x1_0000, 0x1_4000, 0x1_8000]),
    ];
    for (name, [descriptors, available, used]) in places {
        guest.inflight = None;
        guest.queues[1] = crate::guest::Queue::new(1);
        guest.memory.write(0, &vec![0; 8 << 20]);
        guest.link.set_vring_call(1, &guest.queues[1].call).unwrap();
        guest.start_fresh();
        guest.link.get_vring_base(0).unwrap();
        let mut raw = Raw::new(0, 128, 0x10_0000);
        let config = raw.config();
        raw.start(&mut guest);
        let config = vhost::VringConfigData {
            desc_table_addr: USER + raw.base + descriptors,
            avail_ring_addr: USER + raw.base + available,
            used_ring_addr: USER + raw.base + used,
            ..config
        };
        guest.link.set_vring_addr(0, &config).unwrap();
        for n in 0..64u16 {
            raw.request(&guest.memory, n, (T_GET_ID, 0), &[(0x20_0000, 20, WRITE)]);
            raw.offer(&guest.memory, [n]);
            // As the device sees it, wherever that is.
            let at = raw.base + available + 2;
            guest.memory.write(at, &(n + 1).to_le_bytes());
            raw.kick.write(1).unwrap();
        }
        for n in 0..32 {
            let data = pattern(8192, n);
            assert_eq!(guest.ask(1, &Ask::Out(64 * n, &data)).status, OK, "{name}");
            assert!(guest.ask(1, &Ask::In(64 * n, 8192)).data == data, "{name}");
        }
        guest.stop();
    }
    drop(guest);
    works(&rig);
}

#[test]
fn ring_addresses_that_wrap_or_are_not_aligned_do_not_start() {
    let rig = Rig::new(Setup::default());
    let good = Raw::new(0, 128, 0x10_0000).config();
    let end = USER + (8 << 20);
    let [d, a, u] = [good.desc_table_addr, good.avail_ring_addr, good.used_ring_addr];
    let bad = [
        [u64::MAX - 15, a, u],
        [d, u64::MAX - 1, u],
        [d, a, u64::MAX - 3],
        [0, a, u],
        [d, 0, u],
        [d, a, 0],
        [end - 2032, a, u],
        [d, end - 260, u],
        [d, a, end - 1028],
        [USER - 16, a, u],
        // Guest-physical addresses are no front-end addresses.
        [0x10_0000, 0x10_8000, 0x10_c000],
    ];
    for [descriptors, available, used] in bad {
        let mut guest = Guest::connect(&rig.socket(), 1);
        guest.set_up(&[0]);
        let config = vhost::VringConfigData {
            desc_table_addr: descriptors,
            avail_ring_addr: available,
            used_ring_addr: used,
            ..good
        };
        guest.link.set_vring_addr(0, &config).unwrap();
        assert!(guest.enable(true).is_err(), "{descriptors:#x} {available:#x} {used:#x}");
        guest.set_addresses(0);
        guest.enable(true).unwrap();
        assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK);
    }
    for odd in [[8, 0, 0], [0, 1, 0], [0, 0, 2]] {
        // The crate ends the connection of such a message.
        let mut wire = Wire::connect(&rig);
        let words = [d + odd[0], u + odd[2], a + odd[1], 0].map(u64::to_ne_bytes);
        wire.send(9, 8, &[&[0; 8][..], words.as_flattened()].concat());
        assert!(wire.reply().is_none_or(|body| body != [0; 8]), "{odd:?}");
    }
    works(&rig);
}

#[test]
fn a_head_may_come_again_when_it_is_done_and_not_before() {
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    prepare(&mut guest, 1, 128);
    let mut raw = Raw::new(0, 128, 0x10_0000);
    raw.start(&mut guest);
    raw.request(&guest.memory, 7, (T_IN, 0), &[(0x20_0000, 4096, WRITE)]);
    for _ in 0..300 {
        raw.offer(&guest.memory, [7]);
        wait_until("an answer", || raw.reap(&guest.memory) == [(7, 4097)]);
    }
    // Two heads that share their descriptors, buffers and status are two requests.
    raw.point(&guest.memory, 8, raw.table(7), 3);
    raw.offer(&guest.memory, [7, 8]);
    let mut done = Vec::new();
    wait_until("two answers", || {
        done.append(&mut raw.reap(&guest.memory));
        done.len() == 2
    });
    raw.offer(&guest.memory, [8, 7, 9, 8]);
    wait_until("the error event", || raw.error.read().is_ok());
}

#[test]
fn random_messages_end_connections_and_nothing_else() {
    let rig = Rig::new(Setup { queues: 2, ..Setup::default() });
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for _ in 0..300 {
        let mut wire = Wire::connect(&rig);
        wire.0.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        for _ in 0..rng.random_range(1..30) {
            let code = rng.random_range(0..50);
            let mut body = vec![0; [0, 8, 8, 8, 12, 16, 20, 24, 40, 48, 300][rng.random_range(0..11)]];
            rng.fill_bytes(&mut body);
            // Small numbers get further.
            body.chunks_mut(4).filter(|_| rng.random_bool(0.7)).for_each(|word| {
                let last = word.len() - 1;
                word[..last].fill(0);
                word.reverse();
            });
            wire.send(code, [0, 8, 8, 4][rng.random_range(0..4)], &body);
            if rng.random_bool(0.1) {
                // A header that promises more than comes, or another protocol.
                let garbage: [u8; 12] = rng.random();
                drop(wire.0.write_all(&garbage));
            }
            if rng.random_bool(0.3) {
                drop(wire.0.read(&mut [0; 4096]));
            }
        }
    }
    works(&rig);
}
