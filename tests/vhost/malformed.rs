// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that breaks the rules hurts only itself.

use crate::guest::{Ask, Guest, IOERR, NEXT, OK, WRITE, pattern};
use crate::rig::{Rig, Setup, wait_until};
use vhost::VhostBackend;

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
    breaks("an available index that jumps", |guest| {
        let ring = guest.queues[0].available_ring();
        guest.memory.write(ring + 2, &(guest.queues[0].available + 129).to_le_bytes());
    });
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
