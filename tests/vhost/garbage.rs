// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One queue whose rings are rewritten at random while the device reads them, beside one that works: nothing falls
//! over, nothing outside is written, the other queue's data are right, and memory stays bounded.
//!
//! Where the garbage may legally reach is kept apart by addresses that no combination of its bytes gives: the good
//! queue lies in another region, and its part of the disk, with canaries around it, at a sector with odd digits.

use crate::guest::{
    Ask, Guest, HIGH, Memory, OK, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, WRITE, pattern,
};
use crate::raw::{Raw, USER, alone, memory_use, new_region, prepare};
use crate::rig::{Rig, Setup, wait_until};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

const AREA: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const RING: u16 = 128;
const DISK: u64 = 64 << 30;
/// First sector of the good queue's cells.
const GOOD: u64 = 0x5a3_c000;
const CELLS: u64 = 64;
/// Canaries on the disk: a MiB on either side of the cells.
const CANARIES: [u64; 2] = [GOOD - 2048, GOOD + CELLS * 32];
/// A region that begins and ends inside pages, so that its neighbours in the file are mapped too.
const ODD: VhostUserMemoryRegionInfo = VhostUserMemoryRegionInfo {
    guest_phys_addr: 0x2_0000_0800,
    memory_size: 0x4c00,
    userspace_addr: USER + 0x2_0000_0800,
    mmap_offset: 0x1800,
    mmap_handle: -1,
};
const ODD_FILE: usize = 0x8000;
const MARK: u8 = 0xc5;

/// An address as a bad driver might give it.
fn address(rng: &mut ChaCha8Rng) -> u64 {
    let odd = ODD.guest_phys_addr;
    match rng.random_range(0..16) {
        0..4 => AREA + rng.random_range(0..0x4_0000u64),
        4..10 => DATA + rng.random_range(0..0x60_0000u64),
        10 => odd.wrapping_sub(rng.random_range(0..64)),
        11 => odd + rng.random_range(0..ODD.memory_size),
        12 => odd + ODD.memory_size - rng.random_range(0..64),
        13 => 0x80_0000 - rng.random_range(0..64),
        14 => u64::MAX - rng.random_range(0..64),
        _ => rng.next_u64() | 1 << 40,
    }
}

fn length(rng: &mut ChaCha8Rng) -> u32 {
    match rng.random_range(0..16) {
        0 => 0,
        1..5 => rng.random_range(0..40),
        5..13 => 512 * rng.random_range(0..40),
        13 => rng.random_range(0..0x1_0000),
        14 => 16 * rng.random_range(0..20),
        _ => rng.next_u32(),
    }
}

fn descriptor(rng: &mut ChaCha8Rng) -> [u8; 16] {
    let flags: u16 = if rng.random_bool(0.05) { rng.random() } else { rng.random_range(0..8) };
    let next: u16 = if rng.random_bool(0.1) { rng.random() } else { rng.random_range(0..RING) };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address(rng).to_le_bytes());
    bytes[8..12].copy_from_slice(&length(rng).to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// A request that would be fine if nobody touched it.
fn good_request(raw: &Raw, memory: &Memory, head: u16, rng: &mut ChaCha8Rng) {
    let at = DATA + 512 * rng.random_range(0..0x1000u64);
    let len = 512 * rng.random_range(1..=64u32);
    let sector = rng.random_range(0..0x8000);
    match rng.random_range(0..7) {
        0..2 => raw.request(memory, head, (T_IN, sector), &[(at, len, WRITE)]),
        2..4 => raw.request(memory, head, (T_OUT, sector), &[(at, len, 0)]),
        4 => raw.request(memory, head, (T_FLUSH, 0), &[]),
        5 => raw.request(memory, head, (T_GET_ID, 0), &[(at, 20, WRITE)]),
        _ => {
            let kind = if rng.random_bool(0.5) { T_DISCARD } else { T_WRITE_ZEROES };
            memory.write(at, &[&sector.to_le_bytes()[..], &64u64.to_le_bytes()].concat());
            raw.request(memory, head, (kind, 0), &[(at, 16, 0)]);
        }
    }
}

/// One rewrite of something.
fn scribble(raw: &mut Raw, memory: &Memory, rng: &mut ChaCha8Rng) {
    let slot = rng.random_range(0..RING);
    match rng.random_range(0..40) {
        0..2 => memory.write(raw.base + 16 * u64::from(slot), &descriptor(rng)),
        2..6 => memory.write(raw.table(slot) + 16 * rng.random_range(0..8u64), &descriptor(rng)),
        6 => {
            let sector = if rng.random_bool(0.7) { rng.random_range(0..0x8000) } else { DISK / 512 - 8 };
            let kind = if rng.random_bool(0.8) { rng.random_range(0..14) } else { rng.next_u32() };
            raw.ask(memory, slot, kind, sector);
        }
        7 => {
            let (table, count) = (address(rng), rng.random_range(0..10));
            raw.point(memory, slot, table, count);
        }
        8 if rng.random_bool(0.1) => {
            let index: u16 = rng.random();
            memory.write(raw.available_ring() + 2, &index.to_le_bytes());
        }
        9 => {
            // The used ring is the device's, but who stops a driver.
            let bytes: [u8; 8] = rng.random();
            memory.write(raw.used_ring() + rng.random_range(0..0x400u64), &bytes);
        }
        10 => memory.write(raw.available_ring(), &rng.next_u32().to_le_bytes()[..2]),
        11 if rng.random_bool(0.2) => raw.offer(memory, [rng.random_range(0..2 * RING)]),
        12..24 => good_request(raw, memory, slot, rng),
        _ => {
            let count = rng.random_range(1..6);
            let heads: Vec<u16> = (0..count).map(|_| rng.random_range(0..RING)).collect();
            raw.offer(memory, heads);
        }
    }
}

fn odd_region() -> File {
    let file = File::from(memfd_create("odd", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(&[MARK; ODD_FILE], 0).unwrap();
    file
}

fn odd_canaries(file: &File) {
    let mut bytes = vec![0; ODD_FILE];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let (start, end) = (ODD.mmap_offset as usize, (ODD.mmap_offset + ODD.memory_size) as usize);
    assert!(bytes[..start].iter().all(|byte| *byte == MARK), "a write before a region");
    assert!(bytes[end..].iter().all(|byte| *byte == MARK), "a write behind a region");
}

/// Writes and reads of the good queue, against a model.
struct Good {
    model: Vec<Vec<u8>>,
    rng: ChaCha8Rng,
}

impl Good {
    fn round(&mut self, guest: &mut Guest) {
        let mut reads = Vec::new();
        let first = self.rng.random_range(0..CELLS);
        for n in 0..16 {
            let cell = (first + n * 3) % CELLS;
            let model = &mut self.model[cell as usize];
            if self.rng.random_bool(0.5) {
                *model = pattern(16 << 10, self.rng.next_u64() >> 8);
                guest.send(1, &Ask::Out(GOOD + cell * 32, model));
            } else {
                reads.push((guest.send(1, &Ask::In(GOOD + cell * 32, 16 << 10)), cell as usize));
            }
        }
        guest.kick(1);
        for done in guest.wait(1, 16) {
            assert_eq!(done.status, OK);
            if let Some((_, cell)) = reads.iter().find(|(head, _)| *head == done.head) {
                assert!(done.data == self.model[*cell], "cell {cell}");
            }
        }
    }
}

/// Garbage from `seed` on queue 0 while queue 1 works for so many rounds. Returns how often the ring broke.
fn run(guest: &mut Guest, raw: &mut Raw, good: &mut Good, seed: u64, rounds: usize) -> usize {
    let (stop, pause, paused) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    let memory = std::sync::Arc::clone(&guest.memory);
    let mut driver = Raw::new(0, RING, AREA);
    driver.kick = raw.kick.try_clone().unwrap();
    let mut breaks = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            while !stop.load(Ordering::SeqCst) {
                if pause.load(Ordering::SeqCst) {
                    (driver.available, driver.used) = (0, 0);
                    paused.store(true, Ordering::SeqCst);
                    std::thread::yield_now();
                    continue;
                }
                (0..64).for_each(|_| scribble(&mut driver, &memory, &mut rng));
                std::thread::sleep(std::time::Duration::from_micros(rng.random_range(0..300)));
            }
        });
        for _ in 0..rounds {
            good.round(guest);
            if raw.error.read().is_err() {
                continue;
            }
            // Broken: the driver resets its queue, and begins again at once.
            breaks += 1;
            pause.store(true, Ordering::SeqCst);
            wait_until("the garbage thread", || paused.load(Ordering::SeqCst));
            guest.link.set_vring_enable(0, false).unwrap();
            guest.link.get_vring_base(0).unwrap();
            new_region(guest, 2, RING);
            raw.start(guest);
            paused.store(false, Ordering::SeqCst);
            pause.store(false, Ordering::SeqCst);
        }
        stop.store(true, Ordering::SeqCst);
    });
    breaks
}

#[test]
fn garbage_on_one_queue_stays_there() {
    if let Some(status) = alone("garbage::garbage_on_one_queue_stays_there") {
        return assert!(status.success(), "{status}");
    }
    let rig = Rig::new(Setup { queues: 2, size: DISK, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 2);
    guest.queues[1].base = HIGH;
    guest.high = true;
    let odd = odd_region();
    prepare(&mut guest, 2, RING);
    let [low, high] = guest.memory.regions();
    let odd_info = VhostUserMemoryRegionInfo { mmap_handle: odd.as_raw_fd(), ..ODD };
    guest.link.set_mem_table(&[low, high, odd_info]).unwrap();
    let mut raw = Raw::new(0, RING, AREA);
    raw.start(&mut guest);
    let queue = &guest.queues[1];
    guest.link.set_vring_num(1, RING).unwrap();
    guest.link.set_vring_base(1, 0).unwrap();
    guest.set_addresses(1);
    guest.link.set_vring_kick(1, &queue.kick).unwrap();
    guest.link.set_vring_enable(1, true).unwrap();
    for (canary, part) in CANARIES.into_iter().flat_map(|canary| (0..64).map(move |part| (canary, part))) {
        let data = pattern(16 << 10, canary + part);
        assert_eq!(guest.ask(1, &Ask::Out(canary + 32 * part, &data)).status, OK);
    }
    let rng = ChaCha8Rng::seed_from_u64(1);
    let mut good = Good { model: vec![vec![0; 16 << 10]; CELLS as usize], rng };
    // The first seed is also what makes buffers and tables as large as they get in an ordinary life.
    run(&mut guest, &mut raw, &mut good, 1, 50);
    let before = memory_use();
    let breaks: usize = (2..6).map(|seed| run(&mut guest, &mut raw, &mut good, seed, 150)).sum();
    let (after, io) = (memory_use(), rig.volume.io());
    println!("{breaks} breaks, {io:?}, {before:?}, then {after:?}");
    // The good queue makes no such requests: these are of the other one, and were understood.
    assert!(breaks > 20 && io.flushes > 20 && io.zeroes > 20, "{breaks} breaks, {io:?}");
    assert!(after.anonymous < before.anonymous + (96 << 20), "{before:?} then {after:?}");
    assert!(after.data < before.data + (192 << 20), "{before:?} then {after:?}");
    for (canary, part) in CANARIES.into_iter().flat_map(|canary| (0..64).map(move |part| (canary, part))) {
        let data = rig.layer((canary + 32 * part) * 512, 16 << 10);
        assert!(data == pattern(16 << 10, canary + part), "the disk at sector {}", canary + 32 * part);
    }
    let layer = std::fs::metadata(rig.dir.path().join("state/layer")).unwrap();
    assert_eq!(layer.len(), DISK);
    odd_canaries(&odd);
    // A reset brings the queue back.
    guest.link.set_vring_enable(0, false).unwrap();
    guest.link.get_vring_base(0).unwrap();
    raw.error.read().ok();
    new_region(&mut guest, 2, RING);
    raw.start(&mut guest);
    raw.request(&guest.memory, 9, (T_GET_ID, 0), &[(DATA, 20, WRITE)]);
    raw.offer(&guest.memory, [9]);
    wait_until("an answer", || raw.reap(&guest.memory).len() == 1);
    assert_eq!(raw.status_of(&guest.memory, 9), OK);
    assert!(raw.error.read().is_err());
}
