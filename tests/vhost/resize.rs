// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk that becomes larger: what the front-end is told on the back-end channel, and what the guest finds.

use crate::guest::{Ask, Guest, IOERR, OK, pattern};
use crate::rig::{Rig, Setup, wait_until};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

const SIZE: u64 = 16 << 20;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no body, no answer wanted.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// A front-end that has given its channel, and its end of that.
fn connected(rig: &Rig) -> (Guest, UnixStream) {
    let mut guest = Guest::connect(&rig.socket(), 1);
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.link.set_backend_request_fd(&theirs).unwrap();
    ours.set_nonblocking(true).unwrap();
    (guest, ours)
}

fn grow(rig: &Rig, size: u64) {
    rig.volume.grow(size).unwrap();
    rig.frontend.as_ref().unwrap().capacity_changed(size);
}

/// Everything that is in the channel; it is sent before the call that causes it returns.
fn told(channel: &mut UnixStream) -> Vec<[u32; 3]> {
    let mut bytes = Vec::new();
    let end = channel.read_to_end(&mut bytes);
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "the channel is open");
    assert_eq!(bytes.len() % 12, 0, "whole messages");
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().unwrap());
    bytes.chunks(12).map(|one| [word(&one[..4]), word(&one[4..8]), word(&one[8..])]).collect()
}

fn capacity(guest: &mut Guest) -> u64 {
    u64::from_le_bytes(guest.config(0, 57)[..8].try_into().unwrap()) * 512
}

#[test]
fn a_running_guest_is_told_and_uses_the_new_room() {
    let rig = Rig::new(Setup::default());
    let (mut guest, mut channel) = connected(&rig);
    assert_eq!(capacity(&mut guest), SIZE);
    guest.start_fresh();
    let data = pattern(4096, 1);
    assert_eq!(guest.ask(0, &Ask::Out(SIZE / 512 - 8, &data)).status, OK);
    assert_eq!(guest.ask(0, &Ask::In(SIZE / 512, 4096)).status, IOERR);
    assert!(told(&mut channel).is_empty());
    let mut size = SIZE;
    for more in [512, 4096, 300 << 10, 40 << 20] {
        let old = size;
        size += more;
        grow(&rig, size);
        assert_eq!(told(&mut channel), [CONFIG_CHANGE]);
        assert_eq!(capacity(&mut guest), size);
        let last = guest.ask(0, &Ask::In(old / 512, 512));
        assert!((last.status, last.data == [0; 512]) == (OK, true), "new bytes are zeros");
        assert_eq!(guest.ask(0, &Ask::Out(size / 512 - 1, &data[..512])).status, OK);
        assert_eq!(guest.ask(0, &Ask::In(size / 512, 512)).status, IOERR);
        assert!(guest.ask(0, &Ask::In(SIZE / 512 - 8, 4096)).data == data, "old bytes stay");
        assert!(guest.ask(0, &Ask::In(size / 512 - 1, 512)).data == data[..512]);
    }
    // Told of what it has read already: nothing.
    rig.frontend.as_ref().unwrap().capacity_changed(size);
    assert!(told(&mut channel).is_empty());
}

#[test]
fn a_stopped_device_is_told_at_its_next_start_and_only_then() {
    let rig = Rig::new(Setup::default());
    let (mut guest, mut channel) = connected(&rig);
    capacity(&mut guest);
    grow(&rig, 2 * SIZE);
    assert!(told(&mut channel).is_empty(), "QEMU would not listen");
    guest.start_fresh();
    assert_eq!(told(&mut channel), [CONFIG_CHANGE]);
    assert_eq!(capacity(&mut guest), 2 * SIZE);
    let bases = guest.stop();
    guest.start(&bases);
    assert!(told(&mut channel).is_empty(), "it knows");
    let bases = guest.stop();
    grow(&rig, 3 * SIZE);
    assert!(told(&mut channel).is_empty());
    guest.start(&bases);
    assert_eq!(told(&mut channel), [CONFIG_CHANGE]);
    // It looked the other way: at the next start it is told again.
    let bases = guest.stop();
    guest.start(&bases);
    assert_eq!(told(&mut channel), [CONFIG_CHANGE]);
}

#[test]
fn a_front_end_that_comes_back_without_reading_is_told() {
    let rig = Rig::new(Setup::default());
    let (mut guest, mut channel) = connected(&rig);
    capacity(&mut guest);
    guest.start_fresh();
    let path = rig.socket();
    let guest = guest.reconnect(&path);
    wait_until("the end of the old channel", || matches!(channel.read(&mut [0; 12]), Ok(0)));
    drop(guest);
    let (mut guest, mut channel) = connected(&rig);
    grow(&rig, 2 * SIZE);
    guest.start_fresh();
    assert_eq!(told(&mut channel), [CONFIG_CHANGE]);
}

#[test]
fn a_channel_that_fails_hurts_nobody() {
    let rig = Rig::new(Setup::default());
    // None at all.
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    let mut size = SIZE + 512;
    grow(&rig, size);
    assert_eq!(capacity(&mut guest), size);
    // One whose other end is closed, one that is no socket, one that nobody reads.
    let (gone, theirs) = UnixStream::pair().unwrap();
    guest.link.set_backend_request_fd(&theirs).unwrap();
    drop(gone);
    let file = tempfile::tempfile().unwrap();
    let (unread, full) = UnixStream::pair().unwrap();
    full.set_nonblocking(true).unwrap();
    while (&full).write(&[0; 4096]).is_ok() {}
    while (&full).write(&[0; 1]).is_ok() {}
    let rounds: [&dyn std::os::fd::AsRawFd; 3] = [&theirs, &file, &full];
    for channel in rounds {
        guest.link.set_backend_request_fd(channel).unwrap();
        for _ in 0..2 {
            size += 512;
            grow(&rig, size);
        }
        assert_eq!(guest.ask(0, &Ask::In(size / 512 - 1, 512)).status, OK);
        assert_eq!(capacity(&mut guest), size);
    }
    drop(unread);
    // A new one replaces it.
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    guest.link.set_backend_request_fd(&theirs).unwrap();
    grow(&rig, size + 512);
    assert_eq!(told(&mut ours), [CONFIG_CHANGE]);
}

/// SET_BACKEND_REQ_FD as bytes.
fn send_channel(stream: &UnixStream, flags: u32, descriptors: &[BorrowedFd<'_>]) {
    let bytes: Vec<u8> = [21, flags, 0u32].into_iter().flat_map(u32::to_ne_bytes).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let sent = sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

fn words(stream: &mut UnixStream, count: usize) -> Vec<u32> {
    let mut bytes = vec![0; 4 * count];
    stream.read_exact(&mut bytes).unwrap();
    bytes.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect()
}

/// The message as QEMU sends it, and as nobody should.
#[test]
fn the_channel_is_acknowledged_when_that_was_asked_for() {
    let rig = Rig::new(Setup::default());
    let mut stream = UnixStream::connect(rig.socket()).unwrap();
    let mut link = vhost::vhost_user::Frontend::from_stream(stream.try_clone().unwrap(), 1);
    let features = link.get_features().unwrap();
    let protocol = link.get_protocol_features().unwrap();
    link.set_features(features & !crate::guest::LOG_ALL).unwrap();
    let backend = vhost::vhost_user::message::VhostUserProtocolFeatures::BACKEND_REQ;
    assert!(protocol.contains(backend));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (fd, other) = (theirs.as_fd(), ours.as_fd());
    const WITH: u32 = 1 | 8;
    // Header of the answer, and its 64 bits: 0 is yes.
    let answer = |result: u32| vec![21, 1 | 4, 8, result, 0];
    link.set_protocol_features(protocol - backend).unwrap();
    send_channel(&stream, WITH, &[fd]);
    assert_eq!(words(&mut stream, 5), answer(1), "it was not negotiated");
    link.set_protocol_features(protocol).unwrap();
    for (descriptors, result) in
        [(&[fd][..], 0), (&[][..], 1), (&[fd, other][..], 1), (&[fd, fd, other][..], 1), (&[fd][..], 0)]
    {
        send_channel(&stream, WITH, descriptors);
        assert_eq!(words(&mut stream, 5), answer(result), "{} descriptors", descriptors.len());
    }
    // Without the flag there is no answer: the next one belongs to the next message.
    send_channel(&stream, 1, &[fd]);
    assert_eq!(link.get_queue_num().unwrap(), 1);
}
