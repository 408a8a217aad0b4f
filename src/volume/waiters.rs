// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a queue thread is woken, and what waits for a chunk.
//!
//! A piece of a guest request that cannot go on (its chunk is remote, or held) is parked in the chunk's entry of the
//! side table. Whoever changes the chunk pushes a wake-up into the inbox of the queue thread and rings its eventfd;
//! the queue thread looks at the chunk again, from the start. Nothing is decided at the time of the wake-up, so one
//! too many does no harm.
//!
//! Bounds: a parked piece belongs to a request, and a request to a descriptor chain that the guest has not got back.
//! There are at most (ring size) requests a queue, and each piece sits in exactly one place: in flight, parked, or
//! named once in an inbox. So no list here can outgrow the rings, and no limit of its own is needed.

use super::table::Exclusive;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::oneshot;

/// A queue thread's door bell. Anybody may hold one and ring it, from any thread.
pub struct Waker {
    eventfd: OwnedFd,
    /// The bell has been rung and not been heard: coalesces.
    ringing: AtomicBool,
    /// Somebody outside `volume` rang: the thread is told.
    called: AtomicBool,
    inbox: Mutex<Vec<Wake>>,
}

/// What an inbox can hold.
#[derive(Debug)]
pub(super) enum Wake {
    /// Look at this piece's chunk again.
    Retry(u64),
    /// The piece now holds its chunk alone.
    Granted(u64, Exclusive),
    /// The piece fails: what it waits for will not come.
    Fail(u64),
}

impl Waker {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            eventfd: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            ringing: AtomicBool::new(false),
            called: AtomicBool::new(false),
            inbox: Mutex::new(Vec::new()),
        })
    }

    /// Makes the thread return from `Port::wait` and see `PortEvent::Woken`. Calls before it does so count as one.
    pub fn wake(&self) {
        self.called.store(true, Ordering::Release);
        self.ring();
    }

    pub(super) fn post(&self, wake: Wake) {
        self.inbox.lock().push(wake);
        self.ring();
    }

    fn ring(&self) {
        // AcqRel: what was stored before this is seen by the thread that clears the flag.
        if !self.ringing.swap(true, Ordering::AcqRel)
            && let Err(error) = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes())
        {
            // The counter is never read, so it is only full after 2^64 wake-ups.
            log::error!("cannot wake a queue thread: {error}");
        }
    }

    /// Empties the inbox into `out`; returns whether somebody called [`Waker::wake`]. The flag is cleared first, so
    /// whoever comes after that rings again.
    pub(super) fn take(&self, out: &mut Vec<Wake>) -> bool {
        self.ringing.swap(false, Ordering::AcqRel);
        out.append(&mut self.inbox.lock());
        self.called.swap(false, Ordering::AcqRel)
    }

    /// Whether the bell has been rung since the last `take`.
    pub(super) fn is_ringing(&self) -> bool {
        self.ringing.load(Ordering::Acquire)
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

impl std::fmt::Debug for Waker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waker")
    }
}

/// A piece of a guest request, as others name it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seat<'a> {
    pub(super) waker: &'a Arc<Waker>,
    pub(super) piece: u64,
}

/// Who waits for a chunk to change.
#[derive(Debug)]
pub(super) enum Waiter {
    /// A piece of a request.
    Piece(Arc<Waker>, u64),
    /// A task of the companion thread.
    Task(oneshot::Sender<()>),
}

impl Waiter {
    pub(super) fn wake(self) {
        match self {
            Self::Piece(waker, piece) => waker.post(Wake::Retry(piece)),
            // Nobody there any more: nothing to do.
            Self::Task(sender) => drop(sender.send(())),
        }
    }

    pub(super) fn is(&self, waker: &Arc<Waker>, piece: u64) -> bool {
        matches!(self, Self::Piece(w, p) if Arc::ptr_eq(w, waker) && *p == piece)
    }
}

/// A waiter in a chunk's entry.
#[derive(Debug)]
pub(super) struct Parked {
    /// It waits for content from the base image or the source, not for somebody to let go.
    pub(super) fill: bool,
    pub(super) waiter: Waiter,
}

/// Who waits to hold a chunk alone.
#[derive(Debug)]
pub(super) enum Claimant {
    /// A piece of a request (a punch).
    Piece(Arc<Waker>, u64),
    /// A task of the companion thread.
    Task(oneshot::Sender<Exclusive>),
}

impl Claimant {
    /// Gives the chunk to the claimant. If nobody is there any more, the holder's drop gives it back.
    pub(super) fn grant(self, exclusive: Exclusive) {
        match self {
            Self::Piece(waker, piece) => waker.post(Wake::Granted(piece, exclusive)),
            Self::Task(sender) => drop(sender.send(exclusive)),
        }
    }
}
