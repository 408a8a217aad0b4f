// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The message sequences of QEMU around a migration, as they were recorded, and what the node hears of them.

use crate::guest::{Ask, Guest, HIGH, IOERR, LOG_ALL, Memory, OK, pattern};
use crate::rig::{Rig, Setup, wait_until};
use blkferry::core::message::{Epoch, MigrationId, RemainingDigest, VolumeId};
use blkferry::frontend::device_state::Ticket;
use blkferry::frontend::signal::{HypervisorSignal as S, Verdict};
use blkferry::volume::Closed;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

/// Bytes of a log for the guest's two regions.
const LOG_BYTES: u64 = (HIGH + (8 << 20)) / 4096 / 8;

fn rig(queues: u16) -> (Rig, Guest) {
    let rig = Rig::new(Setup { queues, ..Setup::default() });
    let guest = Guest::connect(&rig.socket(), usize::from(queues));
    (rig, guest)
}

/// What the node heard, without the features.
fn heard(rig: &Rig) -> Vec<S> {
    rig.seen().into_iter().filter(|signal| !matches!(signal, S::FeaturesAcked(_))).collect()
}

/// The node hears this, and nothing else.
fn expect(rig: &Rig, expected: &[S]) {
    wait_until("the last signal", || heard(rig).len() >= expected.len());
    assert_eq!(heard(rig), expected);
}

const FIRST: S = S::RingsStarting { reconnect: false, fresh: true, resumes: false };
const AGAIN: S = S::RingsStarting { reconnect: false, fresh: false, resumes: true };
const REBOOT: S = S::RingsStarting { reconnect: false, fresh: false, resumes: false };

fn log_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LOG_BYTES).unwrap();
    file
}

/// Case a: logging begins on running rings.
fn log_on(guest: &mut Guest, log: &File) {
    guest.log_base(log, LOG_BYTES);
    guest.set_features(guest.features | LOG_ALL);
    guest.ring_log = true;
    (0..guest.queues.len()).for_each(|index| guest.set_addresses(index));
}

/// Case d: logging ends on running rings.
fn log_off(guest: &mut Guest) {
    guest.set_features(guest.features & !LOG_ALL);
    guest.ring_log = false;
    (0..guest.queues.len()).for_each(|index| guest.set_addresses(index));
}

/// Takes and clears the log, as the front-end does: the dirty pages.
fn dirty(log: &File) -> Vec<u64> {
    let mut bytes = vec![0; LOG_BYTES as usize];
    log.read_exact_at(&mut bytes, 0).unwrap();
    log.write_all_at(&vec![0; LOG_BYTES as usize], 0).unwrap();
    let pages =
        (0u64..).zip(&bytes).flat_map(|(n, byte)| (0..8).map(move |bit| (n * 8 + bit, byte >> bit & 1)));
    pages.filter(|(_, bit)| *bit == 1).map(|(page, _)| page).collect()
}

/// Pages whose content differs.
fn changed(before: &[u8], memory: &Memory) -> Vec<u64> {
    let after = whole(memory);
    let page = |n: usize| if n >= 2048 { (HIGH >> 12) + n as u64 - 2048 } else { n as u64 };
    let pairs = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    pairs.filter(|(_, (old, new))| old != new).map(|(n, _)| page(n)).collect()
}

fn whole(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; 16 << 20];
    memory.0.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn t18_every_page_that_the_device_writes_is_logged() {
    let (rig, mut guest) = rig(2);
    guest.start_fresh();
    let data = pattern(16 << 10, 3);
    assert_eq!(guest.ask(0, &Ask::Out(0, &data)).status, OK);
    let log = log_file();
    log_on(&mut guest, &log);
    for high in [false, true] {
        for queue in 0..2 {
            guest.high = high;
            dirty(&log);
            guest.send(queue, &Ask::In(0, 16 << 10));
            guest.send(queue, &Ask::In(8, 512));
            guest.send(queue, &Ask::Id);
            // What the driver writes is not the device's to log, so look from here on.
            let before = whole(&guest.memory);
            guest.kick(queue);
            guest.wait(queue, 3);
            let written = changed(&before, &guest.memory);
            // A stop is a barrier: everything is in the log when it is answered.
            let bases = guest.stop();
            let marked = dirty(&log);
            let missing: Vec<_> = written
                .iter()
                // The driver's own event index, which `wait` moves.
                .filter(|page| **page != guest.queues[queue].available_ring() >> 12)
                .filter(|page| !marked.contains(page))
                .collect();
            assert!(missing.is_empty(), "pages {missing:x?} were written and not logged");
            assert!(marked.contains(&(guest.queues[queue].used_ring() >> 12)), "used ring");
            assert!(marked.contains(&(guest.queues[queue].status(0) >> 12)), "status bytes");
            assert!(marked.len() <= 4 + 1 + 1 + 4, "too much is logged: {marked:x?}");
            guest.start(&bases);
        }
    }
    drop(rig);
}

#[test]
fn writes_of_the_guest_dirty_no_data_page() {
    let (_rig, mut guest) = rig(1);
    guest.start_fresh();
    let log = log_file();
    log_on(&mut guest, &log);
    guest.ask(0, &Ask::Out(0, &pattern(8192, 1)));
    let queue = &guest.queues[0];
    let expected = [queue.used_ring() >> 12, queue.status(0) >> 12];
    let mut marked = dirty(&log);
    marked.retain(|page| !expected.contains(page));
    assert!(marked.is_empty(), "{marked:x?}");
}

#[test]
fn used_ring_writes_are_logged_at_their_own_address() {
    let (_rig, mut guest) = rig(1);
    guest.start_fresh();
    let log = log_file();
    // Flags, index and elements 0 to 61 lie on one page, the rest and the event index on the next.
    guest.log_at = Some(0x70_1000 - 500);
    log_on(&mut guest, &log);
    let mut ask = |count: usize| {
        dirty(&log);
        (0..count).for_each(|_| assert_eq!(guest.ask(0, &Ask::Flush).status, OK));
        dirty(&log)
    };
    assert!(ask(1).contains(&0x700), "the first element and the index");
    assert!(ask(62).contains(&0x701), "the last element of 63");
    // Elements 63 to 122 one by one, then 123 to 132 at once, across the wrap.
    ask(60);
    for _ in 0..10 {
        guest.send(0, &Ask::Flush);
    }
    guest.kick(0);
    guest.wait(0, 10);
    guest.stop();
    assert_eq!(dirty(&log).iter().filter(|page| **page >> 1 == 0x380).count(), 2);
}

#[test]
fn a_b_c_migration_switchover_and_exit() {
    let (rig, mut guest) = rig(1);
    guest.start_fresh();
    let log = log_file();
    log_on(&mut guest, &log);
    guest.ask(0, &Ask::Out(0, &pattern(512, 1)));
    // A new log each round, as Cloud Hypervisor does it.
    let second = log_file();
    guest.log_base(&second, LOG_BYTES);
    dirty(&log);
    guest.ask(0, &Ask::In(0, 512));
    assert!(dirty(&log).is_empty(), "the old log is not touched any more");
    assert!(!dirty(&second).is_empty());
    assert_eq!(guest.stop(), [2]);
    drop(guest);
    rig.wait_for(&S::Disconnected, 1);
    let expected = [S::Connected, FIRST, S::LogStarted, S::RingsStopped, S::Disconnected];
    expect(&rig, &expected);
}

#[test]
fn d_a_migration_cancelled_before_the_stop() {
    let (rig, mut guest) = rig(1);
    guest.start_fresh();
    let log = log_file();
    log_on(&mut guest, &log);
    guest.ask(0, &Ask::In(0, 4096));
    log_off(&mut guest);
    dirty(&log);
    guest.ask(0, &Ask::In(0, 4096));
    assert!(dirty(&log).is_empty());
    expect(&rig, &[S::Connected, FIRST, S::LogStarted, S::LogStopped]);
    assert_eq!(guest.stop(), [2]);
}

#[test]
fn e1_a_failure_after_the_stop_restarts_the_rings_with_logging_on() {
    let (rig, mut guest) = rig(2);
    guest.start_fresh();
    let log = log_file();
    log_on(&mut guest, &log);
    guest.ask(1, &Ask::In(0, 512));
    let bases = guest.stop();
    guest.set_up(&bases);
    guest.log_base(&log, LOG_BYTES);
    dirty(&log);
    guest.enable(true).unwrap();
    // A guest request can arrive before the log-off.
    guest.ask(0, &Ask::In(0, 512));
    assert!(!dirty(&log).is_empty());
    log_off(&mut guest);
    guest.ask(1, &Ask::In(0, 512));
    let expected = [S::Connected, FIRST, S::LogStarted, S::RingsStopped, AGAIN, S::LogStopped];
    expect(&rig, &expected);
}

#[test]
fn e2_f_plain_stops_and_starts_keep_the_indices() {
    let (rig, mut guest) = rig(2);
    guest.start_fresh();
    let data = pattern(4096, 7);
    for round in 0..5u32 {
        for queue in 0..2 {
            assert_eq!(guest.ask(queue, &Ask::Out(u64::from(round) * 8, &data)).status, OK);
        }
        let bases = guest.stop();
        assert_eq!(bases, [round + 1, round + 1]);
        guest.start(&bases);
    }
    let mut expected = vec![S::Connected, FIRST];
    (0..5).for_each(|_| expected.extend([S::RingsStopped, AGAIN]));
    expect(&rig, &expected);
    let holds = rig.frontend.as_ref().unwrap().hold_times();
    assert!(holds.stop() > 0 && holds.start() > 0);
}

#[test]
fn t17_g_a_reboot_resets_and_starts_from_nothing() {
    let (rig, mut guest) = rig(1);
    guest.start_fresh();
    let data = pattern(4096, 8);
    assert_eq!(guest.ask(0, &Ask::Out(0, &data)).status, OK);
    guest.stop();
    for _ in 0..3 {
        guest.link.reset_device().unwrap();
    }
    let queue = &mut guest.queues[0];
    guest.memory.write(queue.available_ring(), &[0; 4]);
    guest.memory.write(queue.used_ring(), &[0; 4]);
    (queue.available, queue.used) = (0, 0);
    guest.inflight = None;
    guest.start_fresh();
    assert!(guest.ask(0, &Ask::In(0, 4096)).data == data);
    expect(&rig, &[S::Connected, FIRST, S::RingsStopped, REBOOT]);
    // Without a stop before it, a reset stops the rings itself.
    guest.send(0, &Ask::In(0, 4096));
    guest.link.reset_device().unwrap();
    assert_eq!(guest.reap(0).len(), 1, "drained");
    assert_eq!(rig.count(&S::RingsStopped), 2);
}

#[test]
fn t18_a_stop_drains_what_was_available_without_a_kick() {
    let (_rig, mut guest) = rig(2);
    guest.start_fresh();
    guest.ask(1, &Ask::Flush);
    let data = pattern(4096, 2);
    for n in 0..30 {
        guest.send(0, &Ask::Out(n * 8, &data));
    }
    assert_eq!(guest.stop(), [30, 1]);
    let used = guest.memory.read16(guest.queues[0].used_ring() + 2);
    assert_eq!(used, 30, "the base is the used index");
    let quiet = whole(&guest.memory);
    assert!(guest.reap(0).iter().all(|done| done.status == OK));
    guest.send(0, &Ask::In(0, 4096));
    guest.kick(0);
    // Nothing runs: the message after the kick is answered, and memory is as it was but for the driver's own writes.
    guest.config(0, 8);
    assert_eq!(guest.memory.read16(guest.queues[0].used_ring() + 2), used);
    assert_eq!(changed(&quiet, &guest.memory).iter().filter(|page| **page == 2).count(), 0);
    guest.start(&[30, 1]);
    assert!(guest.wait(0, 1)[0].data == data, "it is served after the start, without another kick");
}

#[test]
fn a_pause_by_enable_alone_drains_and_holds() {
    let (rig, mut guest) = rig(1);
    guest.start_fresh();
    guest.send(0, &Ask::In(0, 4096));
    guest.enable(false).unwrap();
    assert_eq!(guest.reap(0).len(), 1);
    guest.send(0, &Ask::In(0, 4096));
    guest.kick(0);
    guest.config(0, 8);
    assert_eq!(guest.in_flight(0), 1);
    guest.enable(true).unwrap();
    guest.wait(0, 1);
    expect(&rig, &[S::Connected, FIRST]);
}

#[test]
fn rings_that_were_never_set_up_hold_nothing() {
    let (rig, mut guest) = rig(3);
    assert_eq!(guest.link.get_vring_base(2).unwrap(), 0);
    guest.start(&[0]);
    assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK);
    guest.enable(false).unwrap();
    assert_eq!(rig.count(&S::RingsStopped), 0);
    assert_eq!(guest.link.get_vring_base(0).unwrap(), 1);
    assert_eq!(rig.count(&S::RingsStopped), 1, "only configured rings are asked for");
    assert_eq!(guest.link.get_vring_base(1).unwrap(), 0);
    assert_eq!(rig.count(&S::RingsStopped), 1);
}

#[test]
fn the_reply_of_the_last_stop_and_the_ack_of_the_start_wait_for_the_verdict() {
    let (asked, has_asked) = channel();
    let (allow, allowed) = channel();
    let policy = move |signal: &S| {
        if matches!(signal, S::RingsStopped | S::RingsStarting { .. }) {
            asked.send(signal.clone()).unwrap();
            allowed.recv().unwrap();
        }
        None
    };
    let rig = Rig::new(Setup { queues: 2, policy: Box::new(policy), ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 2);
    let returned = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&returned);
    let front = std::thread::spawn(move || {
        guest.set_up(&[0, 0]);
        guest.enable(true).unwrap();
        log.lock().unwrap().push("started");
        guest.ask(1, &Ask::Flush);
        guest.enable(false).unwrap();
        guest.link.get_vring_base(0).unwrap();
        log.lock().unwrap().push("first");
        guest.link.get_vring_base(1).unwrap();
        log.lock().unwrap().push("last");
    });
    assert_eq!(has_asked.recv().unwrap(), FIRST);
    assert!(returned.lock().unwrap().is_empty());
    allow.send(()).unwrap();
    assert_eq!(has_asked.recv().unwrap(), S::RingsStopped);
    assert_eq!(*returned.lock().unwrap(), ["started", "first"]);
    allow.send(()).unwrap();
    front.join().unwrap();
    assert_eq!(*returned.lock().unwrap(), ["started", "first", "last"]);
}

#[test]
fn a_refused_start_keeps_the_rings_stopped_and_the_connection() {
    let refusals = Arc::new(Mutex::new(1));
    let left = Arc::clone(&refusals);
    let policy = move |signal: &S| {
        let mut left = left.lock().unwrap();
        let refuse = matches!(signal, S::RingsStarting { .. }) && *left > 0;
        refuse.then(|| {
            *left -= 1;
            Verdict::Refuse("the disk has moved".to_owned())
        })
    };
    let rig = Rig::new(Setup { policy: Box::new(policy), ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.set_up(&[0]);
    guest.send(0, &Ask::In(0, 512));
    assert!(guest.enable(true).is_err());
    assert_eq!(guest.link.get_vring_base(0).unwrap(), 0, "nothing was served");
    assert_eq!(rig.count(&S::RingsStopped), 0);
    guest.start(&[0]);
    assert_eq!(guest.wait(0, 1)[0].status, OK);
}

#[test]
fn behind_a_closed_gate_nothing_runs_and_work_is_reported_once() {
    let policy = |signal: &S| matches!(signal, S::RingsStarting { .. }).then_some(Verdict::Proceed);
    let rig = Rig::new(Setup { policy: Box::new(policy), ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    assert_eq!(rig.count(&S::RingWork), 0, "a kick descriptor that is readable proves nothing");
    for n in 0..3 {
        guest.send(0, &Ask::In(n * 8, 4096));
        guest.kick(0);
        rig.wait_for(&S::RingWork, 1);
    }
    assert_eq!(guest.stop(), [0], "what was not popped stays in the ring");
    assert_eq!(guest.in_flight(0), 3);
    assert_eq!(rig.count(&S::RingWork), 1);
    guest.start(&[0]);
    rig.wait_for(&S::RingWork, 2);
    rig.volume.gate().open();
    assert_eq!(guest.wait(0, 3).len(), 3);
    rig.volume.gate().close(Closed::Offered);
    guest.send(0, &Ask::In(0, 512));
    guest.kick(0);
    rig.wait_for(&S::RingWork, 3);
    assert_eq!(guest.in_flight(0), 1);
}

#[test]
fn device_state_carries_the_ticket() {
    let ticket = Ticket {
        volume: VolumeId([1; 16]),
        migration: MigrationId([2; 16]),
        epoch: Epoch(3),
        digest: RemainingDigest(4),
    };
    let policy = move |signal: &S| match signal {
        S::SaveTicket => Some(Verdict::Ticket(ticket)),
        S::LoadTicket(got) if *got == ticket => Some(Verdict::Proceed),
        S::LoadTicket(_) => Some(Verdict::Refuse("another disk".to_owned())),
        _ => None,
    };
    let rig = Rig::new(Setup { policy: Box::new(policy), ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    guest.stop();
    let state = |link: &vhost::vhost_user::Frontend, direction, fd| {
        link.set_device_state_fd(direction, VhostTransferStatePhase::STOPPED, fd)
            .map(|back| assert!(back.is_none()))
    };
    let (mut read, write) = std::io::pipe().unwrap();
    state(&guest.link, VhostTransferStateDirection::SAVE, write.into()).unwrap();
    let mut bytes = Vec::new();
    read.read_to_end(&mut bytes).unwrap();
    guest.link.check_device_state().unwrap();
    assert_eq!(Ticket::decode(&bytes).unwrap(), ticket);
    let load = |bytes: &[u8]| {
        let (read, mut write) = std::io::pipe().unwrap();
        state(&guest.link, VhostTransferStateDirection::LOAD, read.into()).unwrap();
        write.write_all(bytes).unwrap();
        drop(write);
        guest.link.check_device_state()
    };
    load(&bytes).unwrap();
    let other = Ticket { epoch: Epoch(9), ..ticket };
    assert!(load(&other.encode()).is_err());
    bytes[20] ^= 1;
    assert!(load(&bytes).is_err());
    assert!(load(&[]).is_err());
    assert!(guest.link.check_device_state().is_err(), "nothing was transferred since");
    guest.start(&[0]);
    assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK, "the connection lives on");
}

#[test]
fn messages_for_other_devices_do_not_end_the_connection() {
    let (rig, guest) = rig(1);
    let file = tempfile::tempfile().unwrap();
    guest.link.set_log_fd(std::os::fd::AsRawFd::as_raw_fd(&file)).unwrap();
    assert!(guest.link.get_features().unwrap() > 0);
    drop(guest);
    rig.wait_for(&S::Disconnected, 1);
    // SET_STATUS, SEND_RARP, an unknown message, a malformed SET_VRING_NUM that wants no answer; then GET_FEATURES.
    let mut stream = UnixStream::connect(rig.socket()).unwrap();
    for (code, body) in
        [(39u32, vec![0u8; 8]), (19, vec![0; 8]), (99, vec![0; 40]), (8, vec![1; 3]), (18, vec![0; 8])]
    {
        let words = [code, 1, body.len() as u32];
        stream.write_all(&words.map(u32::to_ne_bytes).concat()).unwrap();
        stream.write_all(&body).unwrap();
    }
    stream.write_all(&[1u32, 1, 0].map(u32::to_ne_bytes).concat()).unwrap();
    let mut reply = [0u8; 20];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[0..4], 1u32.to_ne_bytes());
}

#[test]
fn impossible_messages_are_refused_one_by_one() {
    let (_rig, mut guest) = rig(1);
    let memory = guest.memory.regions();
    let mut wrong = memory[0];
    wrong.memory_size = 1 << 40;
    assert!(guest.link.set_mem_table(&[wrong]).is_err(), "longer than its file");
    assert!(guest.link.set_mem_table(&[memory[0], memory[0]]).is_err(), "overlap");
    assert!(guest.link.set_vring_num(0, 100).is_err(), "no power of two");
    assert!(guest.link.remove_mem_region(&memory[1]).is_err());
    guest.start_fresh();
    assert_eq!(guest.ask(0, &Ask::In(u64::MAX, 512)).status, IOERR);
    assert_eq!(guest.ask(0, &Ask::In(0, 512)).status, OK);
}

#[test]
fn a_drain_waits_for_other_hosts_only_so_long() {
    let rig = Rig::new(Setup { drain_limit: Duration::from_millis(200), ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    rig.volume.flush_gate().close();
    guest.send(0, &Ask::Flush);
    guest.send(0, &Ask::In(0, 512));
    assert_eq!(guest.stop(), [2]);
    let mut answers: Vec<u8> = guest.reap(0).iter().map(|done| done.status).collect();
    answers.sort_unstable();
    assert_eq!(answers, [OK, IOERR]);
}

#[test]
fn the_end_of_the_daemon_waits_for_no_verdict() {
    let (asked, has_asked) = channel();
    let (done, is_done) = channel::<()>();
    let policy = move |signal: &S| {
        if matches!(signal, S::RingsStarting { .. }) {
            asked.send(()).unwrap();
            is_done.recv().unwrap_err();
        }
        None
    };
    let mut rig = Rig::new(Setup { policy: Box::new(policy), ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 1);
    let front = std::thread::spawn(move || {
        guest.set_up(&[0]);
        guest.enable(true)
    });
    has_asked.recv().unwrap();
    rig.frontend.take().unwrap().shutdown();
    drop(done);
    assert!(front.join().unwrap().is_err());
}

/// QEMU sends all of these while the guest writes. A message that moved an index would lose or repeat requests.
#[test]
fn t18_messages_to_busy_rings_lose_no_request() {
    let (_rig, mut guest) = rig(2);
    guest.start_fresh();
    let (link, memory) = (guest.link.clone(), guest.memory.regions());
    let (off, on) = (guest.ring_config(0, false), guest.ring_config(0, true));
    let features = guest.features;
    let log = log_file();
    let region = vhost::VhostUserDirtyLogRegion {
        mmap_size: LOG_BYTES,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&log),
    };
    let (busy, is_busy) = channel::<()>();
    let front = std::thread::spawn(move || {
        let mut rounds = 0;
        while matches!(is_busy.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty)) {
            link.set_log_base(0, Some(region)).unwrap();
            link.set_features(features | LOG_ALL).unwrap();
            link.set_vring_addr(0, &on).unwrap();
            link.set_mem_table(&memory).unwrap();
            link.set_features(features).unwrap();
            link.set_vring_addr(0, &off).unwrap();
            rounds += 1;
        }
        rounds
    });
    crate::io::random_load(&mut guest, 0, 300, 11);
    drop(busy);
    assert!(front.join().unwrap() > 0);
    let available = u32::from(guest.queues[0].available);
    assert_eq!(guest.stop(), [available, 0]);
}
