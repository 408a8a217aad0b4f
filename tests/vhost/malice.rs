// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shared memory that goes away, and rings that are rewritten while they are read: the daemon lives, the disk keeps
//! what was not asked for, and a reset brings the device back.

use crate::guest::{Ask, Guest, IOERR, LOG_ALL, Memory, OK, T_FLUSH, T_GET_ID, T_IN, T_OUT, WRITE, pattern};
use crate::raw::{Raw, prepare};
use crate::rig::{Rig, Setup, wait_until};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

/// Where the raw queue lies: behind the areas of the well-behaved ones.
const AREA: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;

/// 128 requests on the raw queue: flushes that wait for their gate, identities, reads and writes of 16 KiB. Returns
/// the disk as it may look afterwards: where a write went, its data.
fn load(raw: &mut Raw, memory: &Memory, seed: u64) {
    for head in 0..128u16 {
        let (at, sector) = (DATA + u64::from(head) * 0x4000, u64::from(head) * 32);
        match head % 4 {
            0 => raw.request(memory, head, (T_FLUSH, 0), &[]),
            1 => raw.request(memory, head, (T_GET_ID, 0), &[(at, 20, WRITE)]),
            2 => raw.request(memory, head, (T_IN, sector), &[(at, 0x4000, WRITE)]),
            _ => {
                memory.write(at, &pattern(0x4000, seed + u64::from(head)));
                raw.request(memory, head, (T_OUT, sector), &[(at, 0x4000, 0)]);
            }
        }
    }
    raw.offer(memory, 0..128);
}

fn disk_before() -> Vec<u8> {
    pattern(8 << 20, 77)
}

/// A rig with a filled disk, and a front-end whose queue 0 is raw and started.
fn raw_guest() -> (Rig, Guest, Raw) {
    let rig = Rig::new(Setup { queues: 2, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 2);
    guest.start_fresh();
    for (n, part) in (0u64..).zip(disk_before().chunks(16 << 10)) {
        assert_eq!(guest.ask(0, &Ask::Out(32 * n, part)).status, OK);
    }
    guest.stop();
    let mut raw = Raw::new(0, 128, AREA);
    prepare(&mut guest, 2, 128);
    raw.start(&mut guest);
    (rig, guest, raw)
}

/// Everything that no write of [`load`] has named is as it was.
fn assert_untouched(rig: &Rig) {
    let (before, now) = (disk_before(), rig.layer(0, 8 << 20));
    for head in (0..128usize).filter(|head| head % 4 != 3) {
        let range = head * 0x4000..(head + 1) * 0x4000;
        assert!(before[range.clone()] == now[range], "16 KiB at {head}");
    }
    assert!(before[128 * 0x4000..] == now[128 * 0x4000..]);
}

/// A front-end that has lost its memory starts again on new memory: the device is whole.
fn comes_back(rig: &Rig, guest: &mut Guest) {
    rig.volume.flush_gate().open();
    guest.stop();
    guest.memory = Memory::new();
    guest.inflight = None;
    guest.queues = (0..2).map(crate::guest::Queue::new).collect();
    for queue in &guest.queues {
        guest.link.set_vring_call(queue.index, &queue.call).unwrap();
        guest.link.set_vring_err(queue.index, &queue.error).unwrap();
    }
    guest.start_fresh();
    for queue in 0..2 {
        let data = pattern(8192, 3 + queue as u64);
        assert_eq!(guest.ask(queue, &Ask::Out(16 << 10, &data)).status, OK);
        assert!(guest.ask(queue, &Ask::In(16 << 10, 8192)).data == data);
        assert!(guest.queues[queue].error.read().is_err(), "the ring is whole");
    }
}

#[test]
fn a_memory_file_that_is_cut_under_128_requests_costs_the_front_end_its_rings() {
    // Cut to nothing; inside the raw queue's tables; behind its rings, so that they go on; at its used ring.
    for (round, cut) in (0u64..).zip([0, AREA + 0x1_9000, DATA + 0x10_0000, AREA + 0xc000].repeat(3)) {
        let (rig, mut guest, mut raw) = raw_guest();
        rig.volume.flush_gate().close();
        load(&mut raw, &guest.memory, round);
        std::thread::sleep(Duration::from_micros(100 * (round / 4)));
        guest.memory.0.set_len(cut).unwrap();
        raw.kick.write(1).unwrap();
        rig.volume.flush_gate().open();
        if cut == AREA + 0x1_9000 {
            // Its table is gone, or it is still in flight: either breaks the ring.
            raw.offer(&guest.memory, [124]);
        }
        if cut > DATA {
            // Requests that the device itself fills (GET_ID) may have met the cut: then the ring is broken, and what had
            // not been taken from it is never answered.
            let used = raw.used_ring() + 2;
            let mut broken = false;
            wait_until("128 answers, or the error event", || {
                broken |= raw.error.read().is_ok();
                broken || guest.memory.read16(used) == 128
            });
            let status = |head| raw.status_of(&guest.memory, head);
            let answered = |head| status(head) == OK || status(head) == IOERR;
            assert!(broken || (0..128).step_by(4).all(answered));
        } else {
            wait_until("the error event", || raw.error.read().is_ok());
        }
        assert_untouched(&rig);
        comes_back(&rig, &mut guest);
        assert_untouched(&rig);
    }
}

#[test]
fn a_new_table_under_a_broken_ring_is_taken_but_the_ring_waits_for_its_restart() {
    let (rig, mut guest, raw) = raw_guest();
    guest.memory.0.set_len(0).unwrap();
    raw.kick.write(1).unwrap();
    wait_until("the error event", || raw.error.read().is_ok());
    guest.memory = Memory::new();
    guest.link.set_mem_table(&guest.memory.regions()).unwrap();
    assert!(raw.error.read().is_err(), "told once");
    comes_back(&rig, &mut guest);
}

#[test]
fn memory_that_is_lost_before_the_start_breaks_the_ring_at_its_first_request() {
    let (rig, mut guest, mut raw) = raw_guest();
    guest.stop();
    let whole = 16 << 20;
    guest.memory.0.set_len(0).unwrap();
    // The mapping is still that of the first table. A front-end that makes the file long again has lost nothing.
    guest.memory.0.set_len(whole).unwrap();
    raw.start(&mut guest);
    raw.request(&guest.memory, 5, (T_IN, 0), &[(DATA, 4096, WRITE)]);
    raw.offer(&guest.memory, [5]);
    let used = raw.used_ring() + 2;
    wait_until("the answer", || guest.memory.read16(used) == 1);
    assert!(guest.memory.read(DATA, 4096) == disk_before()[..4096]);
    guest.stop();
    guest.memory.0.set_len(0).unwrap();
    guest.link.set_vring_num(0, 128).unwrap();
    guest.link.set_vring_addr(0, &raw.config()).unwrap();
    guest.link.set_vring_kick(0, &raw.kick).unwrap();
    guest.link.set_vring_enable(0, true).unwrap();
    wait_until("the error event", || raw.error.read().is_ok());
    comes_back(&rig, &mut guest);
}

#[test]
fn a_dirty_log_that_is_cut_breaks_the_rings_that_write_it() {
    let (rig, mut guest, mut raw) = raw_guest();
    let log = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
    log.set_len(1 << 18).unwrap();
    guest.set_features(guest.features | LOG_ALL);
    guest.log_base(&log, 1 << 18);
    raw.request(&guest.memory, 5, (T_IN, 0), &[(DATA, 4096, WRITE)]);
    raw.offer(&guest.memory, [5]);
    wait_until("the answer", || raw.reap(&guest.memory).len() == 1);
    log.set_len(0).unwrap();
    raw.offer(&guest.memory, [5]);
    // The request that notices has been served; it is answered, and the next one is not.
    raw.kick.write(1).unwrap();
    wait_until("the error event", || {
        raw.kick.write(1).unwrap();
        raw.error.read().is_ok()
    });
    guest.set_features(guest.features & !LOG_ALL);
    comes_back(&rig, &mut guest);
}

#[test]
fn an_in_flight_region_that_is_cut_breaks_the_ring() {
    let (rig, mut guest, mut raw) = raw_guest();
    guest.stop();
    let file = File::from(memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap());
    let region = vhost::vhost_user::message::VhostUserInflight::new(2 << 12, 0, 2, 128);
    file.set_len(2 << 12).unwrap();
    guest.link.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    raw.start(&mut guest);
    file.set_len(0).unwrap();
    raw.request(&guest.memory, 5, (T_IN, 0), &[(DATA, 4096, WRITE)]);
    raw.offer(&guest.memory, [5]);
    wait_until("the error event", || raw.error.read().is_ok());
    comes_back(&rig, &mut guest);
}

#[test]
fn a_region_that_requests_in_flight_use_may_be_removed() {
    let (rig, mut guest, mut raw) = raw_guest();
    let [_, high] = guest.memory.regions();
    // Status bytes and data in the region that goes.
    let at = high.guest_phys_addr;
    for head in 0..128u16 {
        let (status, data) = (at + u64::from(head), at + 0x1_0000 + u64::from(head) * 0x4000);
        let (kind, sector) = if head % 2 == 0 { (T_FLUSH, 0) } else { (T_IN, u64::from(head) * 32) };
        raw.ask(&guest.memory, head, kind, sector);
        guest.memory.write(status, &[0xee]);
        let pieces = [(raw.header(head), 16, 0), (data, 0x4000, WRITE), (status, 1, WRITE)];
        Raw::fill_table(&guest.memory, raw.table(head), &pieces);
        raw.point(&guest.memory, head, raw.table(head), 3);
    }
    rig.volume.flush_gate().close();
    raw.offer(&guest.memory, 0..128);
    let used = raw.used_ring() + 2;
    // The reads are done, so all flushes have been popped.
    wait_until("64 answers", || guest.memory.read16(used) == 64);
    guest.link.remove_mem_region(&high).unwrap();
    rig.volume.flush_gate().open();
    wait_until("128 answers", || guest.memory.read16(used) == 128);
    assert_eq!(guest.memory.read(at, 128), [OK; 128], "they were translated before");
    let disk = disk_before();
    for head in (1..128usize).step_by(2) {
        let data = guest.memory.read(at + 0x1_0000 + head as u64 * 0x4000, 0x4000);
        assert!(data == disk[head * 0x4000..][..0x4000], "head {head}");
    }
    // A new request cannot use it: it has no place for a status.
    raw.reap(&guest.memory);
    raw.offer(&guest.memory, [7]);
    wait_until("the error event", || raw.error.read().is_ok());
    comes_back(&rig, &mut guest);
}
