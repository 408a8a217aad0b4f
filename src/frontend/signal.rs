// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the hypervisor's messages mean to the owner of the volume's role.
//!
//! vhost-user has no message that says "migration". Meaning is inferred: logging on, rings stopped, rings started.
//! The handler only reports; the node decides. Where an acknowledgement is a *barrier* (the hypervisor does not go
//! on without it), the envelope carries a reply channel and the front-end thread waits for the verdict. Every such
//! wait is bounded by [`VERDICT_LIMIT`], because QEMU holds its big lock meanwhile: going on late is safe, for the
//! volume's gate, and not the acknowledgement, decides whether the guest's requests are served.
//!
//! Rejected: calling back into the node through a trait object. The node is single-threaded on purpose, and a
//! callback on the front-end thread would run its code on a second one.

use super::device_state::Ticket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// Longest time for which an acknowledgement is held for a verdict.
pub const VERDICT_LIMIT: Duration = Duration::from_secs(25);

/// How often a wait looks whether the process ends.
const SLICE: Duration = Duration::from_millis(50);

/// What happened at the vhost-user socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HypervisorSignal {
    /// A front-end has connected.
    Connected,
    /// It is gone. Rings that were running have been quiesced.
    Disconnected,
    /// Dirty logging is on. Only probably a migration: `calc-dirty-rate` does it too.
    LogStarted,
    /// Dirty logging is off.
    LogStopped,
    /// All started rings have been stopped and drained; the last GET_VRING_BASE reply is held for the verdict.
    RingsStopped,
    /// Rings start: the ENABLE acknowledgement is held for the verdict.
    RingsStarting {
        /// Not the first front-end connection of this volume, so that a start does not prove that the guest runs:
        /// only [`Self::RingWork`] does.
        reconnect: bool,
        /// The first start on this connection.
        fresh: bool,
        /// A ring goes on from where another back-end left it: the guest is not a freshly booted one.
        resumes: bool,
    },
    /// A started ring holds a request that waits for the gate. Said once per start, and again after the gate
    /// was open and closed again.
    RingWork,
    /// The front-end has chosen these features (virtio and vhost bits).
    FeaturesAcked(u64),
    /// The guest (or its front-end) has set the write-cache mode: write-back (true) or write-through.
    WriteCache(bool),
    /// SET_DEVICE_STATE_FD(SAVE): answer [`Verdict::Ticket`], or refuse.
    SaveTicket,
    /// SET_DEVICE_STATE_FD(LOAD) brought this; it is asked at CHECK_DEVICE_STATE.
    LoadTicket(Ticket),
}

/// The node's answer to a held signal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Proceed,
    /// Answer with an error, for this reason. Where the protocol has no error answer it is logged.
    Refuse(String),
    /// What the device state shall carry; only for [`HypervisorSignal::SaveTicket`].
    Ticket(Ticket),
}

/// A signal on its way to the node.
#[derive(Debug)]
pub struct Envelope {
    /// What happened.
    pub signal: HypervisorSignal,
    /// Where the verdict goes, for signals that hold an acknowledgement. Dropping it means [`Verdict::Proceed`].
    pub reply: Option<SyncSender<Verdict>>,
}

/// How long the last acknowledgements were held, in microseconds; 0 before the first.
#[derive(Debug, Default)]
pub struct HoldTimes {
    /// From the first message of a stop (ENABLE(0) or GET_VRING_BASE) to the reply for the last ring, drain included.
    pub stop_us: AtomicU64,
    /// From the first message of a start (memory or ring set-up) to the first ENABLE(1) acknowledgement.
    pub start_us: AtomicU64,
}

impl HoldTimes {
    /// The last stop in microseconds.
    #[must_use]
    pub fn stop(&self) -> u64 {
        self.stop_us.load(Ordering::Relaxed)
    }

    /// The last start in microseconds.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start_us.load(Ordering::Relaxed)
    }
}

/// The front-end's sending side.
#[derive(Debug, Clone)]
pub struct Signals {
    sender: UnboundedSender<Envelope>,
    ended: Arc<AtomicBool>,
}

impl Signals {
    /// Sends to `sender`. Unbounded, but bounded in fact: the protocol has one message at a time.
    #[must_use]
    pub fn new(sender: UnboundedSender<Envelope>) -> Self {
        Self { sender, ended: Arc::default() }
    }

    /// Nobody will be waited for from now on, by any clone: the process ends.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Tells, without waiting.
    pub fn tell(&self, signal: HypervisorSignal) {
        log::debug!("signal: {signal:?}");
        if self.sender.send(Envelope { signal, reply: None }).is_err() {
            log::debug!("nobody listens for hypervisor signals any more");
        }
    }

    /// Tells and waits for the verdict, at most [`VERDICT_LIMIT`]. Without an answer the verdict is `Proceed`.
    #[must_use]
    pub fn ask(&self, signal: HypervisorSignal) -> Verdict {
        log::debug!("signal, held: {signal:?}");
        let (reply, answer) = sync_channel(1);
        let since = Instant::now();
        let name = format!("{signal:?}");
        if self.sender.send(Envelope { signal, reply: Some(reply) }).is_err() {
            log::warn!("{name}: nobody listens; going on without a verdict");
            return Verdict::Proceed;
        }
        loop {
            match answer.recv_timeout(SLICE) {
                Ok(verdict) => {
                    log::debug!("{name}: {verdict:?} after {} us", since.elapsed().as_micros());
                    return verdict;
                }
                Err(RecvTimeoutError::Timeout) if since.elapsed() >= VERDICT_LIMIT => {
                    log::warn!("{name}: no verdict in {} s; going on without", VERDICT_LIMIT.as_secs());
                    return Verdict::Proceed;
                }
                Err(RecvTimeoutError::Timeout) if !self.ended.load(Ordering::Acquire) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Verdict::Proceed,
            }
        }
    }
}
