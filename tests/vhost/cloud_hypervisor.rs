// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The message sequences of Cloud Hypervisor, as its sources have them: it pauses with ENABLE(0) alone, moves the device
//! state with the VM, and sets a restored device up completely before the guest runs.

use crate::guest::{Ask, Guest, LOG_ALL, Memory, OK, pattern};
use crate::rig::{Rig, Setup, wait_until};
use blkferry::core::message::{Epoch, MigrationId, RemainingDigest, VolumeId};
use blkferry::frontend::device_state::Ticket;
use blkferry::frontend::signal::{HypervisorSignal as S, Verdict};
use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

const QUEUES: usize = 4;
const STOPPED: VhostTransferStatePhase = VhostTransferStatePhase::STOPPED;

fn ticket() -> Ticket {
    Ticket {
        volume: VolumeId([7; 16]),
        migration: MigrationId([8; 16]),
        epoch: Epoch(2),
        digest: RemainingDigest(9),
    }
}

/// A node that hands over with this ticket, and takes it.
fn rig() -> Rig {
    let policy = |signal: &S| match signal {
        S::SaveTicket => Some(Verdict::Ticket(ticket())),
        S::LoadTicket(got) if *got == ticket() => Some(Verdict::Proceed),
        S::LoadTicket(_) => Some(Verdict::Refuse("another disk".to_owned())),
        _ => None,
    };
    Rig::new(Setup { queues: QUEUES as u16, policy: Box::new(policy), ..Setup::default() })
}

/// What the node heard, without the features.
fn expect(rig: &Rig, expected: &[S]) {
    let heard = || {
        let seen = rig.seen().into_iter();
        seen.filter(|signal| !matches!(signal, S::FeaturesAcked(_))).collect::<Vec<_>>()
    };
    wait_until("the last signal", || heard().len() >= expected.len());
    assert_eq!(heard(), expected);
}

const FIRST: S = S::RingsStarting { reconnect: false, fresh: true, resumes: false };

fn log_base(guest: &Guest) {
    let log = tempfile::tempfile().unwrap();
    let bytes = (crate::guest::HIGH + (8 << 20)) / 4096 / 8;
    log.set_len(bytes).unwrap();
    guest.log_base(&log, bytes);
}

fn save(guest: &Guest) -> Result<Vec<u8>, vhost::Error> {
    let (mut read, write) = std::io::pipe().unwrap();
    guest.link.set_device_state_fd(VhostTransferStateDirection::SAVE, STOPPED, write.into())?;
    let mut state = Vec::new();
    read.read_to_end(&mut state).unwrap();
    guest.link.check_device_state()?;
    Ok(state)
}

fn load(guest: &Guest, state: &[u8]) -> Result<(), vhost::Error> {
    let (read, mut write) = std::io::pipe().unwrap();
    guest.link.set_device_state_fd(VhostTransferStateDirection::LOAD, STOPPED, read.into())?;
    write.write_all(state).unwrap();
    drop(write);
    guest.link.check_device_state()
}

fn send_everywhere(guest: &mut Guest, data: &[u8]) {
    for queue in 0..QUEUES {
        for n in 0..8u64 {
            // Not kicked for: a pause takes what is available all the same.
            guest.send(queue, &Ask::Out((queue as u64 * 8 + n) * 16, data));
        }
    }
}

/// Without device state the destination would start at the available index of now, so all that is available must be
/// done when ENABLE(0) is acknowledged.
#[test]
fn a_plain_pause_is_enable_0_alone_and_drains_everything() {
    let rig = rig();
    let mut guest = Guest::connect(&rig.socket(), QUEUES);
    guest.start_fresh();
    for round in 0..5 {
        send_everywhere(&mut guest, &pattern(8192, round));
        guest.enable(false).unwrap();
        for queue in 0..QUEUES {
            assert!(guest.reap(queue).iter().all(|done| done.status == OK));
            assert_eq!(guest.in_flight(queue), 0, "queue {queue}");
        }
        // Made available by nobody that runs, and left alone.
        guest.send(0, &Ask::In(0, 8192));
        guest.kick(0);
        guest.config(0, 8);
        assert_eq!(guest.in_flight(0), 1);
        guest.enable(true).unwrap();
        assert!(guest.wait(0, 1)[0].data == pattern(8192, round));
    }
    expect(&rig, &[S::Connected, FIRST]);
}

#[test]
fn control_transfer_with_device_state_at_the_source() {
    let rig = rig();
    let mut guest = Guest::connect(&rig.socket(), QUEUES);
    guest.start_fresh();
    log_base(&guest);
    guest.set_features(guest.features | LOG_ALL);
    // A fresh log for each round of memory.
    (0..3).for_each(|_| log_base(&guest));
    send_everywhere(&mut guest, &pattern(8192, 1));
    guest.enable(false).unwrap();
    log_base(&guest);
    expect(&rig, &[S::Connected, FIRST, S::LogStarted]);
    let bases: Vec<u32> = (0..QUEUES).map(|queue| guest.link.get_vring_base(queue).unwrap()).collect();
    assert_eq!(bases, [8; QUEUES]);
    assert_eq!(Ticket::decode(&save(&guest).unwrap()).unwrap(), ticket());
    log_base(&guest);
    drop(guest);
    let expected = [S::Connected, FIRST, S::LogStarted, S::RingsStopped, S::SaveTicket, S::Disconnected];
    expect(&rig, &expected);
}

/// The destination's side, with the guest's memory as it came: state first, then all of the set-up with ENABLE(1) while
/// the VM is still paused, then ENABLE(1) again when it runs. The configuration is never read.
#[test]
fn a_restored_device_is_set_up_whole_and_enabled_twice() {
    let (source, destination) = (rig(), rig());
    let mut old = Guest::connect(&source.socket(), QUEUES);
    old.start_fresh();
    old.enable(false).unwrap();
    // The guest had more in its ring than was taken.
    let bases: Vec<u32> = (0..QUEUES).map(|queue| old.link.get_vring_base(queue).unwrap()).collect();
    let state = save(&old).unwrap();
    let memory = Arc::clone(&old.memory);
    let queues = std::mem::take(&mut old.queues);
    drop(old);
    source.wait_for(&S::Disconnected, 1);

    let mut guest = Guest::connect_with(&destination.socket(), QUEUES, memory);
    let mut other = state.clone();
    other[40] ^= 1;
    assert!(load(&guest, &other).is_err(), "damaged");
    assert!(load(&guest, &Ticket { epoch: Epoch(3), ..ticket() }.encode()).is_err(), "of another handoff");
    load(&guest, &state).unwrap();
    guest.queues = queues;
    for queue in &guest.queues {
        guest.link.set_vring_call(queue.index, &queue.call).unwrap();
    }
    guest.start(&bases);
    send_everywhere(&mut guest, &pattern(8192, 4));
    guest.enable(true).unwrap();
    for queue in 0..QUEUES {
        guest.kick(queue);
        assert!(guest.wait(queue, 8).iter().all(|done| done.status == OK));
    }
    let resumed =
        S::RingsStarting { reconnect: false, fresh: true, resumes: bases.iter().any(|base| *base != 0) };
    let other = S::LoadTicket(Ticket { epoch: Epoch(3), ..ticket() });
    expect(&destination, &[S::Connected, other, S::LoadTicket(ticket()), resumed]);
}

/// A migration that fails before its control transfer: the VM is resumed where it was.
#[test]
fn a_paused_vm_is_resumed_at_the_source_after_its_state_was_saved() {
    let rig = rig();
    let mut guest = Guest::connect(&rig.socket(), QUEUES);
    guest.start_fresh();
    send_everywhere(&mut guest, &pattern(8192, 3));
    guest.enable(false).unwrap();
    let bases: Vec<u32> = (0..QUEUES).map(|queue| guest.link.get_vring_base(queue).unwrap()).collect();
    save(&guest).unwrap();
    guest.start(&bases);
    for queue in 0..QUEUES {
        assert!(guest.reap(queue).iter().all(|done| done.status == OK));
        assert!(guest.ask(queue, &Ask::In(queue as u64 * 128, 8192)).data == pattern(8192, 3));
    }
    let again = S::RingsStarting { reconnect: false, fresh: false, resumes: true };
    expect(&rig, &[S::Connected, FIRST, S::RingsStopped, S::SaveTicket, again]);
}

/// A snapshot without a migration: the node has no ticket, the save is refused, and the VM goes on.
#[test]
fn a_snapshot_without_a_migration_is_refused_and_hurts_nothing() {
    let refusals = Arc::new(Mutex::new(0));
    let count = Arc::clone(&refusals);
    let policy = move |signal: &S| {
        matches!(signal, S::SaveTicket).then(|| {
            *count.lock().unwrap() += 1;
            Verdict::Refuse("no disk is being handed over".to_owned())
        })
    };
    let rig = Rig::new(Setup { queues: QUEUES as u16, policy: Box::new(policy), ..Setup::default() });
    let mut guest = Guest::connect_with(&rig.socket(), QUEUES, Memory::new());
    guest.start_fresh();
    guest.enable(false).unwrap();
    assert!(save(&guest).is_err());
    assert!(guest.link.check_device_state().is_err(), "nothing was saved");
    guest.enable(true).unwrap();
    assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK);
    assert_eq!(*refusals.lock().unwrap(), 1);
    expect(&rig, &[S::Connected, FIRST, S::SaveTicket]);
}
