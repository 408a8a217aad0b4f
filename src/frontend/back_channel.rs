// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The way back to the front-end (vhost-user, "Back-end communication"), for one message: the configuration has
//! changed, read it again. So a guest learns that its disk has grown.
//!
//! QEMU acts on the message only while the device is started, and never reads the configuration again by itself. So what
//! counts is which capacity the front-end has read on this connection: when rings run and that is not the present one, it
//! is told; at the growth, or at the next start. A front-end that reads nothing after that is told again at the next
//! start, which costs it one look. Without the channel the guest learns of the new size when the VM is started anew.
//!
//! The message wants no answer, and the channel must never hold anybody up: it is sent without waiting, and a channel
//! that fails is given up. The connection that it belongs to does not suffer from it.
//!
//! The `vhost` crate hides the socket that SET_BACKEND_REQ_FD brings and cannot send this message, so that message is
//! read here and not by the crate.
//!
//! QEMU up to 7.2 listens to the channel while it waits for an answer on the main connection, and then takes our
//! message in between; sending it while a message of the front-end is being handled would invite that. At a growth it
//! cannot be ruled out, but takes a message of the front-end in the same few microseconds.

use parking_lot::Mutex;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
const FLAG_VERSION: u32 = 1;

#[derive(Debug, Default)]
struct State {
    socket: Option<OwnedFd>,
    /// Rings run.
    started: bool,
    /// The capacity in bytes that the front-end has read on this connection.
    read: Option<u64>,
}

impl State {
    fn tell(&mut self, capacity: u64) {
        let Some(socket) = self.socket.as_ref().filter(|_| self.started && self.read != Some(capacity))
        else {
            return;
        };
        let message: Vec<u8> =
            [CONFIG_CHANGE, FLAG_VERSION, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        match send(socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) if sent == message.len() => {
                log::info!("the front-end is told that the capacity has changed")
            }
            // Full of earlier ones, which say the same.
            Err(rustix::io::Errno::AGAIN) => {}
            result => {
                log::warn!("the back-end channel does not work and is given up: {result:?}");
                self.socket = None;
            }
        }
    }
}

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct BackChannel(Mutex<State>);

impl BackChannel {
    /// The front-end's end of a new channel; it replaces an older one.
    pub(super) fn set(&self, socket: OwnedFd) {
        self.0.lock().socket = Some(socket);
    }

    /// The connection is gone, and the channel with it.
    pub(super) fn clear(&self) {
        *self.0.lock() = State::default();
    }

    /// The front-end has read this capacity.
    pub(super) fn read(&self, capacity: u64) {
        self.0.lock().read = Some(capacity);
    }

    /// A ring has started.
    pub(super) fn started(&self, capacity: u64) {
        let mut state = self.0.lock();
        if !std::mem::replace(&mut state.started, true) {
            state.tell(capacity);
        }
    }

    /// No ring runs any more.
    pub(super) fn stopped(&self) {
        self.0.lock().started = false;
    }

    /// The capacity is this now.
    pub(super) fn changed(&self, capacity: u64) {
        self.0.lock().tell(capacity);
    }
}

/// Reads a message of `len` bytes that carries one descriptor; `None` if it carries none, or several.
///
/// # Errors
/// The connection's.
pub(super) fn receive(stream: &mut UnixStream, len: usize) -> io::Result<Option<OwnedFd>> {
    let mut bytes = vec![0u8; len];
    // Room for two: that is enough to see that there is not one, and the kernel closes what has no room.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg(stream.as_fd(), &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?.bytes,
        }
    };
    if got == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    stream.read_exact(&mut bytes[got..])?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let first = descriptors.pop();
    Ok(first.filter(|_| descriptors.is_empty()))
}
