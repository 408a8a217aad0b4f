// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! May this volume serve guest I/O at all, and may it answer a guest flush yet?
//!
//! Two peers know the same disk; at most one of them may touch it for a guest. Whether this is the one is decided by
//! `node` alone, and shows here as one flag. A port holds requests that come while the gate is closed; it neither
//! fails nor carries them out: an answer that might be wrong is worse than none. Closing does not wait for what is
//! in flight: the front-end drains its queues first, because only it knows what is still in the rings.
//!
//! A destination owns the disk before the source has synced its layer. A guest flush there promises that *earlier*
//! writes are safe, and those may sit in the source's page cache: the [`FlushGate`] holds flushes until the source
//! says `Synced`. Where the operator wants errors rather than a guest that waits for a source that is away, flushes
//! fail meanwhile: a promise that cannot be kept is not made either way.

use super::waiters::Waker;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Weak};

/// The queue threads of a volume, to be woken when something opens.
#[derive(Debug, Default)]
pub(super) struct Ports(Mutex<Vec<Weak<Waker>>>);

impl Ports {
    pub(super) fn add(&self, waker: &Arc<Waker>) {
        let mut list = self.0.lock();
        list.retain(|weak| weak.strong_count() > 0);
        list.push(Arc::downgrade(waker));
    }

    pub(super) fn wake_all(&self) {
        self.0.lock().iter().filter_map(Weak::upgrade).for_each(|waker| waker.wake());
    }
}

/// Why the gate is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// The daemon has not decided yet what it is.
    Starting,
    /// This side is an empty destination, or one whose migration was cancelled.
    Idle,
    /// Chunks are being received; the disk is the source's.
    Receiving,
    /// The disk is offered to this side but not granted yet.
    Prepared,
    /// The rings have stopped and the disk is offered to the destination.
    Offered,
    /// The disk is the destination's.
    Relinquished,
    /// The destination has everything.
    Released,
    /// The volume is broken; the log and the status say how.
    Fault,
}

impl std::fmt::Display for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Starting => "the daemon is starting",
            Self::Idle => "this side owns no disk",
            Self::Receiving => "the disk is being received",
            Self::Prepared => "the disk has not been granted to this side yet",
            Self::Offered => "the disk is offered to the destination",
            Self::Relinquished => "the disk is the destination's",
            Self::Released => "the disk has moved",
            Self::Fault => "the volume is broken",
        })
    }
}

/// May guest I/O be done; closed when made.
#[derive(Debug)]
pub struct Gate {
    open: AtomicBool,
    reason: Mutex<Closed>,
    ports: Arc<Ports>,
}

impl Gate {
    pub(super) fn new(ports: Arc<Ports>) -> Self {
        Self { open: AtomicBool::new(false), reason: Mutex::new(Closed::Starting), ports }
    }

    /// Whether guest I/O may be done.
    #[must_use]
    pub fn is_open(&self) -> bool {
        // SeqCst: a queue thread that sees it open also sees all that was made ready before.
        self.open.load(Ordering::SeqCst)
    }

    /// Why it is closed; `None` when it is open.
    #[must_use]
    pub fn reason(&self) -> Option<Closed> {
        let reason = self.reason.lock();
        (!self.is_open()).then_some(*reason)
    }

    /// Lets guest I/O through and wakes all queue threads.
    pub fn open(&self) {
        {
            let _reason = self.reason.lock();
            self.open.store(true, Ordering::SeqCst);
        }
        self.ports.wake_all();
    }

    /// Stops guest I/O that has not been started; see the module's header for what this does not do.
    pub fn close(&self, reason: Closed) {
        let mut now = self.reason.lock();
        *now = reason;
        self.open.store(false, Ordering::SeqCst);
    }
}

const HOLDS: u8 = 0;
const OPEN: u8 = 1;
const FAILS: u8 = 2;

/// May guest flushes be answered; open when made.
#[derive(Debug)]
pub struct FlushGate {
    state: AtomicU8,
    ports: Arc<Ports>,
}

impl FlushGate {
    pub(super) fn new(ports: Arc<Ports>) -> Self {
        Self { state: AtomicU8::new(OPEN), ports }
    }

    /// Whether flushes are carried out as they come.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state.load(Ordering::SeqCst) == OPEN
    }

    /// Whether flushes fail as they come.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.state.load(Ordering::SeqCst) == FAILS
    }

    /// The source has synced: carries out the flushes that were held, and all later ones.
    pub fn open(&self) {
        self.state.store(OPEN, Ordering::SeqCst);
        self.ports.wake_all();
    }

    /// Holds flushes from now on. Close it before the gate opens.
    pub fn close(&self) {
        self.state.store(HOLDS, Ordering::SeqCst);
    }

    /// A gate that holds flushes fails them, those that it holds and those that come, until it opens or
    /// [`hold_again`](Self::hold_again). An open gate stays open.
    pub fn fail(&self) {
        if self.state.compare_exchange(HOLDS, FAILS, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            self.ports.wake_all();
        }
    }

    /// A gate that fails flushes holds them.
    pub fn hold_again(&self) {
        // Open already, or holding: then nothing is to do.
        let _ = self.state.compare_exchange(FAILS, HOLDS, Ordering::SeqCst, Ordering::SeqCst);
    }
}
