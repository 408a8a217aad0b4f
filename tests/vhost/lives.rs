// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A front-end that outlives its back-end, a guest that boots again, memory that comes and goes: all with requests
//! under way, of which each is answered exactly once (the guest of these tests insists on that).

use crate::guest::{Ask, Guest, Memory, OK, RING, pattern};
use crate::rig::{Rig, Setup, wait_until};
use blkferry::frontend::signal::HypervisorSignal as S;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{TryRecvError, channel};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

/// An in-flight region of one queue, as a back-end that died has left it.
struct Left(File);

impl Left {
    const BYTES: u64 = 16 + 16 * RING as u64;

    fn new(used: u16, last_batch: u16) -> Self {
        let file = File::from(memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(Self::BYTES.next_multiple_of(64)).unwrap();
        let header = [0, 0, 0, 0, 1, RING, last_batch, used];
        file.write_all_at(&header.map(u16::to_le_bytes).concat(), 0).unwrap();
        Self(file)
    }

    /// A head that was popped: as the `counter`-th.
    fn popped(&self, head: u16, next: u16, counter: u64) {
        let words = [1u8, 0, 0, 0, 0, 0].into_iter().chain(next.to_le_bytes()).chain(counter.to_le_bytes());
        self.0.write_all_at(&words.collect::<Vec<u8>>(), 16 + 16 * u64::from(head)).unwrap();
    }

    fn give(self, guest: &mut Guest) {
        let bytes = Self::BYTES.next_multiple_of(64);
        guest.inflight = Some((VhostUserInflight::new(bytes, 0, 1, RING), self.0));
    }
}

/// The heads in the used ring from `first` on.
fn used_heads(guest: &Guest, first: u16) -> Vec<u16> {
    let ring = guest.queues[0].used_ring();
    let end = guest.memory.read16(ring + 2);
    (first..end).map(|n| guest.memory.read16(ring + 4 + 8 * u64::from(n))).collect()
}

#[test]
fn t22_what_a_dead_back_end_had_popped_is_done_again_in_the_order_of_its_counters() {
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    // These need no disk, so the order of their answers is the order in which they were taken.
    let heads: Vec<u16> = (0..6).map(|_| guest.send(0, &Ask::Id)).collect();
    let order = [heads[3], heads[0], heads[5], heads[1], heads[4], heads[2]];
    let left = Left::new(0, 0);
    for (counter, head) in (1000u64..).zip(order) {
        left.popped(head, 0, counter);
    }
    left.give(&mut guest);
    // One that was not popped comes behind all that were.
    let last = guest.send(0, &Ask::Id);
    guest.start(&[0]);
    let used = guest.queues[0].used_ring() + 2;
    wait_until("all answers", || guest.memory.read16(used) == 7);
    assert_eq!(used_heads(&guest, 0), [&order[..], &[last]].concat());
    assert!(guest.wait(0, 7).iter().all(|done| done.status == OK));
    assert_eq!(guest.ask(0, &Ask::Id).status, OK);
    assert_eq!(guest.stop(), [8]);
    // The region is another process's, so the front-end is older than this one.
    assert_eq!(rig.count(&S::RingsStarting { reconnect: true, fresh: true, resumes: false }), 1);
}

/// Four writes were popped; the second and the third were done and are in the used ring; the back-end died before it
/// had recorded that. Whatever lies on the disk there now is newer than they are.
#[test]
fn t22_a_batch_that_was_published_and_half_recorded_is_not_done_again() {
    for recorded in 0..3 {
        let rig = Rig::new(Setup::default());
        let mut guest = Guest::connect(&rig.socket(), 1);
        guest.start_fresh();
        let newer = pattern(4096, 99);
        for cell in [1, 2] {
            assert_eq!(guest.ask(0, &Ask::Out(cell * 8, &newer)).status, OK);
        }
        let base = guest.stop()[0] as u16;
        let data: Vec<_> = (0..4).map(|n| pattern(4096, n)).collect();
        let heads: Vec<u16> = (0..4u64).map(|n| guest.send(0, &Ask::Out(n * 8, &data[n as usize]))).collect();
        let left = Left::new(base, heads[2]);
        for (counter, head) in (7u64..).zip(&heads) {
            left.popped(*head, if *head == heads[2] { heads[1] } else { 0 }, counter);
        }
        // As far as it came in recording: nothing, the first of the batch, the whole batch but its used index.
        for head in &[heads[2], heads[1]][..recorded] {
            left.0.write_all_at(&[0], 16 + 16 * u64::from(*head)).unwrap();
        }
        left.give(&mut guest);
        let (ring, slots) = (guest.queues[0].used_ring(), guest.queues[0].ring);
        for (n, head) in (base..).zip([heads[1], heads[2]]) {
            let element = [u32::from(head), 1].map(u32::to_le_bytes).concat();
            guest.memory.write(ring + 4 + 8 * u64::from(n % slots), &element);
            let status = guest.queues[0].status(head / 3);
            guest.memory.write(status, &[OK]);
        }
        guest.memory.write(ring + 2, &(base + 2).to_le_bytes());
        guest.start(&[u32::from(base) + 2]);
        wait_until("the answers", || guest.memory.read16(ring + 2) == base + 4);
        let mut again = used_heads(&guest, base + 2);
        again.sort_unstable();
        assert_eq!(again, [heads[0], heads[3]], "recorded: {recorded}");
        assert!(guest.wait(0, 4).iter().all(|done| done.status == OK));
        assert_eq!(guest.stop(), [u32::from(base) + 4]);
        let found: Vec<_> = (0..4).map(|cell| rig.layer(cell * 4096, 4096)).collect();
        let expected = [&data[0], &newer, &newer, &data[3]];
        assert!(found.iter().eq(expected), "recorded: {recorded}");
    }
}

#[test]
fn t22_back_ends_come_and_go_under_load() {
    const QUEUES: usize = 4;
    let mut rig = Rig::new(Setup { queues: QUEUES as u16, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), QUEUES);
    guest.start_fresh();
    for round in 0..20u64 {
        // Some of these wait for another host, so they are still there when the back-end goes.
        rig.volume.flush_gate().close();
        let mut sent = [0; QUEUES];
        for (queue, sent) in sent.iter_mut().enumerate() {
            for n in 0..12u64 {
                let seed = round * 100 + n;
                let cell = (queue as u64 * 16 + n) * 16;
                match (n + round) % 4 {
                    0 => guest.send(queue, &Ask::Flush),
                    _ => guest.send(queue, &Ask::Out(cell, &pattern(8192, seed))),
                };
                *sent += 1;
            }
            guest.kick(queue);
        }
        if round.is_multiple_of(2) {
            drop(rig.frontend.take());
            rig.spawn(QUEUES as u16, round.is_multiple_of(4), Box::new(|_| None));
        }
        guest = guest.reconnect(&rig.socket());
        rig.wait_for(&S::Disconnected, round as usize + 1);
        let bases: Vec<u32> =
            guest.queues.iter().map(|queue| u32::from(guest.memory.read16(queue.used_ring() + 2))).collect();
        guest.start(&bases);
        rig.volume.flush_gate().open();
        for (queue, sent) in sent.iter().enumerate() {
            assert!(guest.wait(queue, *sent).iter().all(|done| done.status == OK), "round {round}");
            for n in (0..12u64).filter(|n| !(n + round).is_multiple_of(4)) {
                let found = guest.ask(queue, &Ask::In((queue as u64 * 16 + n) * 16, 8192)).data;
                assert!(found == pattern(8192, round * 100 + n), "round {round}, queue {queue}, {n}");
            }
        }
    }
    let available: Vec<u32> = guest.queues.iter().map(|queue| u32::from(queue.available)).collect();
    assert_eq!(guest.stop(), available);
}

#[test]
fn t17_g_a_guest_under_load_boots_again() {
    let rig = Rig::new(Setup { queues: 2, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 2);
    guest.start_fresh();
    for round in 0..9u64 {
        for queue in 0..2usize {
            for n in 0..20u64 {
                guest.send(queue, &Ask::Out((queue as u64 * 20 + n) * 16, &pattern(8192, round * 40 + n)));
            }
            // Not all of it was ever kicked for.
            if (round + queue as u64).is_multiple_of(2) {
                guest.kick(queue);
            }
        }
        // QEMU stops the device before it resets it; another front-end may not.
        if round % 3 != 2 {
            guest.stop();
        }
        for _ in 0..=round % 3 {
            guest.link.reset_device().unwrap();
        }
        for queue in 0..2 {
            assert!(guest.reap(queue).iter().all(|done| done.status == OK));
            assert_eq!(guest.in_flight(queue), 0, "round {round}: all that was available is done");
            let rings = (guest.queues[queue].available_ring(), guest.queues[queue].used_ring());
            guest.memory.write(rings.0, &[0; 4 + 2 * RING as usize]);
            guest.memory.write(rings.1, &[0; 4 + 8 * RING as usize]);
            (guest.queues[queue].available, guest.queues[queue].used) = (0, 0);
        }
        guest.inflight = None;
        guest.start_fresh();
        for queue in 0..2usize {
            for n in 0..20u64 {
                let found = guest.ask(queue, &Ask::In((queue as u64 * 20 + n) * 16, 8192)).data;
                assert!(found == pattern(8192, round * 40 + n), "round {round}, queue {queue}");
            }
        }
    }
    assert_eq!(rig.count(&S::RingsStopped), 9);
    assert_eq!(rig.count(&S::Disconnected), 0);
}

#[test]
fn memory_is_plugged_and_unplugged_under_load() {
    let rig = Rig::new(Setup { queues: 2, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 2);
    guest.start_fresh();
    let (link, more) = (guest.link.clone(), Memory::new());
    // Two regions that no request uses; the used ones must stay what they are.
    let extra = more.regions().map(|region| VhostUserMemoryRegionInfo {
        guest_phys_addr: region.guest_phys_addr + (4 << 32),
        userspace_addr: region.userspace_addr + (4 << 32),
        mmap_handle: more.0.as_raw_fd(),
        ..region
    });
    let (busy, is_busy) = channel::<()>();
    let plug = std::thread::spawn(move || {
        let mut link = link;
        let mut rounds = 0;
        while matches!(is_busy.try_recv(), Err(TryRecvError::Empty)) {
            for region in &extra {
                link.add_mem_region(region).unwrap();
            }
            for region in &extra {
                link.remove_mem_region(region).unwrap();
            }
            rounds += 1;
        }
        drop(more);
        rounds
    });
    for high in [false, true, false, true] {
        guest.high = high;
        for queue in 0..2 {
            crate::io::random_load(&mut guest, queue, 60, u64::from(high) + 17);
            // The model of the load begins with zeros.
            let zeros = vec![0; 8192];
            for cell in 0..256 {
                guest.ask(queue, &Ask::Out(queue as u64 * 4096 + cell * 16, &zeros));
            }
        }
    }
    drop(busy);
    assert!(plug.join().unwrap() > 10, "it came and went while the load ran");
    assert_eq!(rig.volume.io().errors, 0);
}

/// Memory may be taken away while a request that names it waits for another host: nothing else is written into, and the
/// ring goes on.
#[test]
fn memory_goes_while_a_request_that_uses_it_waits() {
    let rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    (guest.compact, guest.high) = (true, true);
    rig.volume.flush_gate().close();
    guest.send(0, &Ask::Flush);
    guest.kick(0);
    // The flush has been taken when a later request is answered.
    guest.high = false;
    let data = pattern(4096, 2);
    assert_eq!(guest.ask(0, &Ask::Out(0, &data)).status, OK);
    let [_, high] = guest.memory.regions();
    guest.link.remove_mem_region(&high).unwrap();
    assert!(guest.ask(0, &Ask::In(0, 4096)).data == data, "the ring goes on");
    rig.volume.flush_gate().open();
    assert_eq!(guest.wait(0, 1).len(), 1, "the flush is answered");
    guest.link.add_mem_region(&high).unwrap();
    guest.high = true;
    assert!(guest.ask(0, &Ask::In(0, 4096)).data == data);
}
