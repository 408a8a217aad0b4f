// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Lost connections, restarted back-ends, and sockets.

use crate::guest::{Ask, Guest, IOERR, Memory, OK, pattern};
use crate::rig::{Rig, Setup, wait_until};
use blkferry::config::{Config, FrontendSocket};
use blkferry::frontend::server::{Frontend, FrontendError, Options};
use blkferry::frontend::signal::HypervisorSignal as S;
use std::os::fd::IntoRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc::unbounded_channel;

/// What a front-end knows of the indices after it has lost its back-end: the used ones.
fn used(guest: &Guest) -> Vec<u32> {
    guest.queues.iter().map(|queue| u32::from(guest.memory.read16(queue.used_ring() + 2))).collect()
}

fn options(socket: FrontendSocket) -> Options {
    Options::new(&Config::new(socket, PathBuf::new()), false)
}

#[test]
fn t22_a_front_end_that_comes_back_is_named_so() {
    let rig = Rig::new(Setup { queues: 2, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 2);
    guest.start_fresh();
    let data = pattern(4096, 4);
    assert_eq!(guest.ask(0, &Ask::Out(0, &data)).status, OK);
    // Rings are running when the connection is lost.
    let mut guest = guest.reconnect(&rig.socket());
    rig.wait_for(&S::Disconnected, 1);
    let bases = used(&guest);
    guest.start(&bases);
    assert!(guest.ask(0, &Ask::In(0, 4096)).data == data);
    let again = S::RingsStarting { reconnect: true, fresh: true, resumes: true };
    assert_eq!(rig.count(&again), 1);
    assert_eq!(rig.count(&S::RingsStopped), 0, "a lost connection is no stop");
    let bases = guest.stop();
    guest.start(&bases);
    assert_eq!(rig.count(&S::RingsStarting { reconnect: true, fresh: false, resumes: true }), 1);
}

#[test]
fn t22_requests_that_waited_when_the_connection_was_lost_are_done_again() {
    let mut rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    let data = pattern(4096, 6);
    for restart in [false, true] {
        // Flushes that wait for another host; a later request is completed before them.
        rig.volume.flush_gate().close();
        let first = guest.send(0, &Ask::Flush);
        let second = guest.send(0, &Ask::Flush);
        let write = guest.send(0, &Ask::Out(8, &data));
        guest.kick(0);
        assert_eq!(guest.wait(0, 1)[0].head, write);
        if restart {
            drop(rig.frontend.take());
            rig.spawn(1, false, Box::new(|_| None));
        }
        guest = guest.reconnect(&rig.socket());
        rig.wait_for(&S::Disconnected, if restart { 2 } else { 1 });
        assert_eq!(guest.in_flight(0), 2, "no answer was made up");
        let bases = used(&guest);
        guest.start(&bases);
        rig.volume.flush_gate().open();
        let mut heads: Vec<u16> =
            guest.wait(0, 2).iter().map(|done| (done.status == OK).then_some(done.head).unwrap()).collect();
        heads.sort_unstable();
        let mut expected = [first, second];
        expected.sort_unstable();
        assert_eq!(heads, expected);
        assert!(guest.ask(0, &Ask::In(8, 4096)).data == data);
    }
    // The second process did not make the region, so it knows that the front-end is older.
    let again = S::RingsStarting { reconnect: true, fresh: true, resumes: true };
    assert_eq!(rig.count(&again), 2);
    let bases = guest.stop();
    assert_eq!(bases, [u32::from(guest.queues[0].available)]);
}

#[test]
fn a_start_without_a_memory_table_is_survived_and_served_from_the_old_one() {
    let mut rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    let data = pattern(4096, 4);
    assert_eq!(guest.ask(0, &Ask::Out(0, &data)).status, OK);
    let mut guest = guest.reconnect(&rig.socket());
    let bases = used(&guest);
    guest.set_up_rings(&bases);
    guest.enable(true).unwrap();
    assert!(guest.ask(0, &Ask::In(0, 4096)).data == data);
    // A new process has no old table: nothing is served, nothing falls over, and a proper start works.
    drop(rig.frontend.take());
    rig.spawn(1, true, Box::new(|_| None));
    let mut guest = guest.reconnect(&rig.socket());
    let bases = used(&guest);
    guest.set_up_rings(&bases);
    guest.enable(true).unwrap();
    guest.send(0, &Ask::In(0, 4096));
    guest.kick(0);
    guest.enable(false).unwrap();
    assert_eq!(guest.in_flight(0), 1);
    guest.start(&bases);
    assert!(guest.wait(0, 1)[0].data == data);
}

#[test]
fn another_front_end_gets_its_own_memory() {
    let rig = Rig::new(Setup::default());
    let mut first = Guest::connect(&rig.socket(), 1);
    first.start_fresh();
    assert_eq!(first.ask(0, &Ask::Out(0, &pattern(512, 1))).status, OK);
    first.stop();
    let memory = Arc::clone(&first.memory);
    drop(first);
    let before = memory.read(0, 8 << 20);
    let mut second = Guest::connect_with(&rig.socket(), 1, Memory::new());
    second.start_fresh();
    assert!(second.ask(0, &Ask::In(0, 512)).data == pattern(512, 1));
    assert!(memory.read(0, 8 << 20) == before);
}

#[test]
fn a_front_end_waits_until_the_one_before_has_gone() {
    let rig = Rig::new(Setup::default());
    let mut first = Guest::connect(&rig.socket(), 1);
    first.start_fresh();
    let path = rig.socket();
    let second = std::thread::spawn(move || Guest::connect(&path, 1));
    assert_eq!(first.ask(0, &Ask::In(0, 512)).status, OK);
    assert_eq!(rig.count(&S::Connected), 1);
    drop(first);
    let mut second = second.join().unwrap();
    second.start_fresh();
    assert_eq!(second.ask(0, &Ask::In(0, 512)).status, OK);
}

#[test]
fn requests_in_flight_when_the_daemon_ends_are_completed() {
    let mut rig = Rig::new(Setup::default());
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    let data = pattern(16 << 10, 4);
    for n in 0..30 {
        guest.send(0, &Ask::Out(n * 32, &data));
    }
    guest.kick(0);
    drop(rig.frontend.take());
    let done = guest.reap(0);
    assert!(done.iter().all(|done| done.status == OK), "{}", IOERR);
    rig.wait_for(&S::Disconnected, 1);
    assert!(!rig.socket().exists(), "the socket file goes with the daemon");
}

#[test]
fn socket_files_are_replaced_only_when_nobody_listens() {
    let rig = Rig::new(Setup::default());
    let spawn = |socket| {
        let (sender, _receiver) = unbounded_channel();
        let options = options(socket);
        Frontend::spawn(&options, Arc::clone(&rig.volume), sender)
    };
    let busy = spawn(FrontendSocket::Path(rig.socket()));
    assert!(matches!(busy, Err(FrontendError::Busy(_))));
    let stale = rig.dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let frontend = spawn(FrontendSocket::Path(stale.clone())).unwrap();
    assert_eq!(Guest::connect(&stale, 1).config(32, 1), [1]);
    frontend.shutdown();
    let file = rig.dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(spawn(FrontendSocket::Path(file.clone())), Err(FrontendError::Socket(..))));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert!(matches!(spawn(FrontendSocket::Fd(9999)), Err(FrontendError::Fd(9999, _))));
}

#[test]
fn inherited_descriptors_may_listen_or_be_connected() {
    use vhost::VhostBackend;
    let rig = Rig::new(Setup::default());
    let spawn = |fd| {
        let (sender, receiver) = unbounded_channel();
        let options = options(FrontendSocket::Fd(fd));
        (Frontend::spawn(&options, Arc::clone(&rig.volume), sender).unwrap(), receiver)
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (frontend, mut signals) = spawn(theirs.into_raw_fd());
    let link = vhost::vhost_user::Frontend::from_stream(ours, 1);
    assert!(link.get_features().unwrap() > 0);
    drop(link);
    wait_until("the end of the connection", || {
        signals.try_recv().is_ok_and(|envelope| envelope.signal == S::Disconnected)
    });
    frontend.shutdown();
    let path = rig.dir.path().join("inherited.sock");
    let (frontend, _signals) = spawn(UnixListener::bind(&path).unwrap().into_raw_fd());
    assert_eq!(Guest::connect(&path, 1).config(32, 1), [1]);
    assert_eq!(Guest::connect(&path, 1).config(32, 1), [1]);
    frontend.shutdown();
}
