// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every way of talking to the device, under a load that is checked: numbers of queues and sizes of rings, with and
//! without EVENT_IDX and indirect descriptors. All queues work at once.

use crate::guest::{Ask, EVENT_IDX, Guest, OK, Queue, T_DISCARD, T_WRITE_ZEROES, pattern};
use crate::rig::{Rig, Setup};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;
use vhost::VhostBackend;

/// Sectors of the disk that a queue uses.
const SECTORS: u64 = 2048;
/// A cell of the disk: requests in flight use different ones.
const CELL: u64 = 16;
const INDIRECT_DESC: u64 = 1 << 28;

/// One queue's program.
struct Load {
    queue: usize,
    rng: ChaCha8Rng,
    model: Vec<u8>,
    /// Reads in flight: what each must return.
    expected: HashMap<u16, Vec<u8>>,
}

impl Load {
    fn new(queue: usize, seed: u64) -> Self {
        let model = vec![0; SECTORS as usize * 512];
        Self { queue, rng: ChaCha8Rng::seed_from_u64(seed), model, expected: HashMap::new() }
    }

    /// Makes up to `most` requests available, with a kick if the device asks for one; returns how many.
    fn begin(&mut self, guest: &mut Guest, most: u16) -> usize {
        let old = guest.queues[self.queue].available;
        let mut cells: Vec<u64> = (0..SECTORS / CELL).collect();
        let count = usize::from(self.rng.random_range(1..=most));
        for _ in 0..count {
            let cell = cells.swap_remove(self.rng.random_range(0..cells.len()));
            let start = cell * CELL + self.rng.random_range(0..CELL / 2);
            let len = self.rng.random_range(1..=CELL / 2) as usize * 512;
            let at = start as usize * 512;
            let sector = self.queue as u64 * SECTORS + start;
            match self.rng.random_range(0..10) {
                0..4 => {
                    let data = pattern(len, self.rng.next_u64() >> 8);
                    self.model[at..at + len].copy_from_slice(&data);
                    guest.send(self.queue, &Ask::Out(sector, &data));
                }
                4 => {
                    self.model[at..at + len].fill(0);
                    let kind = if self.rng.random_bool(0.5) { T_DISCARD } else { T_WRITE_ZEROES };
                    guest.send(self.queue, &Ask::Zero(kind, &[(sector, len as u32 / 512, 0)]));
                }
                5 => {
                    guest.send(self.queue, &Ask::Flush);
                }
                _ => {
                    let head = guest.send(self.queue, &Ask::In(sector, len));
                    self.expected.insert(head, self.model[at..at + len].to_vec());
                }
            }
        }
        if guest.wants_kick(self.queue, old) {
            guest.kick(self.queue);
        }
        count
    }

    fn end(&mut self, guest: &mut Guest, count: usize, what: &str) {
        for done in guest.wait(self.queue, count) {
            assert_eq!(done.status, OK, "{what}");
            if let Some(expected) = self.expected.remove(&done.head) {
                assert!(done.data == expected, "{what}: queue {}", self.queue);
            }
        }
        assert!(self.expected.is_empty(), "{what}");
    }
}

fn run(queues: u16, ring: u16, event_idx: bool, indirect: bool) {
    let what = format!("{queues} queues of {ring}, event_idx {event_idx}, indirect {indirect}");
    let rig = Rig::new(Setup { size: 16 * SECTORS * 512, queues, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), usize::from(queues));
    assert_eq!(guest.features & (EVENT_IDX | INDIRECT_DESC), EVENT_IDX | INDIRECT_DESC, "offered");
    if !event_idx {
        guest.features &= !EVENT_IDX;
    }
    if !indirect {
        guest.features &= !INDIRECT_DESC;
    }
    guest.indirect = indirect;
    // In a ring of two, a request without an indirect table has two descriptors.
    guest.compact = ring < 3;
    let slots = if indirect { ring } else { ring / if guest.compact { 2 } else { 3 } };
    let slots = slots.min(if queues > 4 { 20 } else { 40 });
    guest.queues = (0..usize::from(queues)).map(|index| Queue::with(index, ring, slots)).collect();
    for queue in &guest.queues {
        guest.link.set_vring_call(queue.index, &queue.call).unwrap();
        guest.link.set_vring_err(queue.index, &queue.error).unwrap();
    }
    guest.start_fresh();
    let seed =
        u64::from(queues) << 32 | u64::from(ring) << 2 | u64::from(event_idx) << 1 | u64::from(indirect);
    let mut loads: Vec<Load> =
        (0..usize::from(queues)).map(|queue| Load::new(queue, seed << 8 | queue as u64)).collect();
    for round in 0..24 {
        guest.high = round % 2 == 1;
        let begun: Vec<usize> = loads.iter_mut().map(|load| load.begin(&mut guest, slots)).collect();
        for (load, count) in loads.iter_mut().zip(begun) {
            load.end(&mut guest, count, &what);
        }
        if round == 12 {
            let bases = guest.stop();
            let indices: Vec<u32> = guest.queues.iter().map(|queue| u32::from(queue.available)).collect();
            assert_eq!(bases, indices, "{what}");
            guest.start(&bases);
        }
    }
    for load in &loads {
        let found = rig.layer(load.queue as u64 * SECTORS * 512, load.model.len());
        assert!(found == load.model, "{what}: the disk of queue {}", load.queue);
        assert!(guest.queues[load.queue].error.read().is_err(), "{what}: no ring is broken");
    }
    assert_eq!(rig.volume.io().errors, 0, "{what}");
}

/// Rings of 2 are the smallest that a request fits in, 1024 the largest of QEMU; 64 wraps within the test.
fn all_with(queues: u16) {
    for ring in [2, 8, 64, 256, 1024] {
        for (event_idx, indirect) in [(false, false), (false, true), (true, false), (true, true)] {
            run(queues, ring, event_idx, indirect);
        }
    }
}

#[test]
fn one_queue_in_every_way() {
    all_with(1);
}

#[test]
fn four_queues_in_every_way() {
    all_with(4);
}

#[test]
fn sixteen_queues_in_every_way() {
    all_with(16);
}
