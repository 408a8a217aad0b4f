// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each vhost-user message does.
//!
//! The handler holds what the front-end has said; the queue threads hold what is running. It turns messages into
//! commands for them, and into signals for the node where they mean something (`signal`).
//!
//! Start: a ring starts when it has a size, addresses, a kick descriptor and is enabled; the first one after a stop
//! asks the node, and its acknowledgement waits for the verdict. A kick proves nothing: QEMU's is readable from the
//! beginning. QEMU enables rings that it never sets up; those are acknowledged and ignored.
//!
//! Stop: ENABLE(0) drains and holds a ring; GET_VRING_BASE ends it. A stop is complete when no *started* ring is
//! left; the last reply waits for the verdict, for the destination cannot start before it. GET_VRING_BASE of a ring
//! that never started is answered at once, for some front-ends ask about every ring.
//!
//! An error ends no connection here: it refuses the one message (`server` has the rules). QEMU up to 10.0 aborts
//! when logging cannot be switched on, so that is never refused.

mod messages;

use super::back_channel::BackChannel;
use super::device_state::{self, Ticket};
use super::dirty_log::DirtyLog;
use super::features::{self, BlkConfig};
use super::inflight::InflightRegion;
use super::memory::GuestMemory;
use super::ring::{Answer, Command, RingHandle};
use super::ring_mem::{RingAddresses, RingMemory};
use super::signal::{HoldTimes, HypervisorSignal, Signals, Verdict};
use super::virtqueue::RingSetup;
use crate::volume::Volume;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Error, Result};

/// A guest reads ahead twice the best size of a transfer: for larger chunks that would be too much of a good thing.
const LARGEST_OPT_IO: u32 = 1 << 20;

/// What the handler is made of.
#[derive(Debug)]
pub(super) struct Parts {
    /// The volume.
    pub(super) volume: Arc<Volume>,
    /// Back to the front-end.
    pub(super) channel: Arc<BackChannel>,
    /// To the node.
    pub(super) signals: Signals,
    /// For the status.
    pub(super) holds: Arc<HoldTimes>,
    /// One for each queue.
    pub(super) rings: Vec<RingHandle>,
    /// Expected ring size.
    pub(super) queue_size: u16,
    /// A front-end had this volume before this process began.
    pub(super) reconnect: bool,
}

/// What the front-end has said about one ring.
#[derive(Debug, Default)]
struct Queue {
    size: u16,
    base: u16,
    addresses: Option<RingAddresses>,
    /// Said (outer), and whether there is a descriptor (inner).
    kick: Option<Option<Arc<File>>>,
    call: Option<Arc<File>>,
    error: Option<Arc<File>>,
    enabled: bool,
    /// The queue thread has it.
    started: bool,
}

/// The vhost-user device.
#[derive(Debug)]
pub(super) struct Handler {
    parts: Parts,
    queues: Vec<Queue>,
    memory: Arc<GuestMemory>,
    /// The table is a former connection's: the first region of this one replaces it.
    stale: bool,
    features: u64,
    protocol: u64,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightRegion>>,
    /// This process made the in-flight region, so the front-end cannot have had an earlier back-end.
    own_region: bool,
    /// A start was announced and the stop was not.
    running: bool,
    /// No ring has started on this connection.
    fresh: bool,
    start_since: Option<Instant>,
    stop_since: Option<Instant>,
    /// Outcome of the last device state transfer; a LOAD is read at the check.
    transfer: Transfer,
    /// Why the last message was refused by the handler (and not by the crate before it).
    refused: Option<String>,
}

#[derive(Debug, Default)]
enum Transfer {
    #[default]
    None,
    Saved,
    Loading(File),
    Failed,
}

fn elapsed_us(since: Option<Instant>) -> u64 {
    since.map_or(0, |since| u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX))
}

impl Handler {
    /// A device without a front-end.
    #[must_use]
    pub(super) fn new(parts: Parts) -> Self {
        let queues = parts.rings.iter().map(|_| Queue::default()).collect();
        Self {
            parts,
            queues,
            memory: Arc::default(),
            stale: false,
            features: 0,
            protocol: 0,
            log: None,
            inflight: None,
            own_region: false,
            running: false,
            fresh: true,
            start_since: None,
            stop_since: None,
            transfer: Transfer::None,
            refused: None,
        }
    }

    /// A front-end has connected.
    pub(super) fn connected(&mut self) {
        self.parts.signals.tell(HypervisorSignal::Connected);
    }

    /// The front-end is gone: finishes what is in flight, forgets what it said. Guest memory stays mapped for a
    /// front-end that comes back (see [`Self::forget_memory`]).
    pub(super) fn disconnected(&mut self) {
        let since = Instant::now();
        for index in 0..self.queues.len() {
            if self.queues[index].started {
                log::info!("queue {index}: the front-end is gone, the ring is quiesced");
                self.command(index, Command::Quiesce(since)).ok();
            }
            self.queues[index] = Queue::default();
        }
        if self.log.take().is_some() || self.features & features::LOG_ALL != 0 {
            log::debug!("dirty log dropped with the connection");
        }
        self.inflight = None;
        (self.features, self.protocol) = (0, 0);
        (self.own_region, self.running, self.fresh) = (false, false, true);
        (self.start_since, self.stop_since) = (None, None);
        self.transfer = Transfer::None;
        self.parts.channel.clear();
        self.stale = true;
        self.parts.reconnect = true;
        self.parts.signals.tell(HypervisorSignal::Disconnected);
    }

    /// Unmaps a former front-end's guest memory; returns whether there was any. QEMU 7.2 sends no memory table
    /// after a reconnect, so it is kept for a while; for ever would keep a dead VM's memory from the host.
    pub(super) fn forget_memory(&mut self) -> bool {
        let had = self.stale && !self.memory.is_empty();
        if had {
            self.memory = Arc::default();
        }
        had
    }

    /// Whether a former front-end's guest memory is still mapped.
    #[must_use]
    pub(super) fn holds_stale_memory(&self) -> bool {
        self.stale && !self.memory.is_empty()
    }

    /// Takes the reason of the last refusal by this handler.
    pub(super) fn take_refusal(&mut self) -> Option<String> {
        self.refused.take()
    }

    /// Whether acknowledgements were negotiated.
    #[must_use]
    pub(super) fn acknowledges(&self) -> bool {
        self.protocol & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    fn refuse<T>(&mut self, reason: impl Into<String>) -> Result<T> {
        let reason = reason.into();
        log::warn!("refused: {reason}");
        self.refused = Some(reason);
        Err(Error::InvalidParam)
    }

    fn checked(&mut self, index: u32) -> Result<usize> {
        match usize::try_from(index).ok().filter(|index| *index < self.queues.len()) {
            Some(index) => Ok(index),
            None => self.refuse(format!("there is no queue {index}")),
        }
    }

    fn command(&self, index: usize, command: Command) -> std::result::Result<Answer, String> {
        let ring = self.parts.rings.get(index).ok_or("no such queue")?;
        ring.call(command).inspect_err(|why| log::error!("queue {index}: {why}"))
    }

    /// A message of a start has come.
    fn setting_up(&mut self) {
        if !self.running && self.start_since.is_none() {
            self.start_since = Some(Instant::now());
        }
    }

    /// All that a ring needs, if it may start.
    fn setup(&self, index: usize) -> Option<RingSetup> {
        let queue = self.queues.get(index)?;
        let negotiated = self.features & features::PROTOCOL_FEATURES != 0;
        if !queue.enabled && negotiated {
            return None;
        }
        if self.memory.is_empty() {
            log::warn!("queue {index}: enabled without guest memory; it does not start");
            return None;
        }
        Some(RingSetup {
            memory: Arc::clone(&self.memory),
            addresses: queue.addresses?,
            size: (queue.size > 0).then_some(queue.size)?,
            event_idx: self.features & features::EVENT_IDX != 0,
            no_flush: self.features & features::FLUSH == 0,
            log: self.log.clone().filter(|_| self.features & features::LOG_ALL != 0),
            kick: queue.kick.clone()?,
            call: queue.call.clone(),
            error: queue.error.clone(),
            inflight: self.inflight.clone(),
        })
    }

    /// Starts a ring that has all it needs; the first one after a stop asks the node.
    fn start_if_ready(&mut self, index: usize) -> Result<()> {
        if self.queues[index].started {
            return Ok(());
        }
        let Some(setup) = self.setup(index) else { return Ok(()) };
        if let Err(error) = RingMemory::new(&setup.memory, &setup.addresses, setup.size) {
            return self.refuse(format!("queue {index}: {error}"));
        }
        if !self.running {
            // A region that this process did not make is an earlier process's: the front-end is older than we are.
            let reconnect = self.parts.reconnect || (self.inflight.is_some() && !self.own_region);
            let resumes = self.queues.iter().any(|queue| queue.base != 0);
            let signal = HypervisorSignal::RingsStarting { reconnect, fresh: self.fresh, resumes };
            if let Verdict::Refuse(why) = self.parts.signals.ask(signal) {
                return self.refuse(format!("the rings may not start here: {why}"));
            }
            (self.running, self.fresh) = (true, false);
            let held = elapsed_us(self.start_since.take());
            self.parts.holds.start_us.store(held, Ordering::Relaxed);
            log::info!("rings start; {held} us since the first message of the start");
        }
        let base = self.queues[index].base;
        match self.command(index, Command::Start(Box::new(setup), base)) {
            Ok(_) => self.queues[index].started = true,
            Err(why) => return self.refuse(why),
        }
        self.parts.channel.started(self.parts.volume.geometry().size());
        Ok(())
    }

    /// Keeps the back-end channel that the front-end offers; returns whether it was welcome.
    pub(super) fn take_channel(&mut self, socket: Option<OwnedFd>) -> bool {
        let negotiated = self.protocol & VhostUserProtocolFeatures::BACKEND_REQ.bits() != 0;
        let Some(socket) = socket.filter(|_| negotiated) else {
            log::warn!("refused: a back-end channel that was not negotiated, or without its descriptor");
            return false;
        };
        self.parts.channel.set(socket);
        self.parts.channel.changed(self.parts.volume.geometry().size());
        true
    }

    /// Tells running rings what has changed; each has acknowledged when this returns.
    fn update_rings(&mut self) {
        for index in 0..self.queues.len() {
            if !self.queues[index].started {
                continue;
            }
            // Held rings are not enabled: they must hear of the change all the same.
            let enabled = std::mem::replace(&mut self.queues[index].enabled, true);
            let setup = self.setup(index);
            self.queues[index].enabled = enabled;
            if let Some(setup) = setup {
                self.command(index, Command::Update(Box::new(setup))).ok();
            }
        }
    }

    fn update_ring(&mut self, index: usize) {
        if self.queues[index].started {
            self.update_rings();
        }
    }

    /// When the stop that is under way began: now, if none was.
    pub(super) fn stopping(&mut self) -> Instant {
        *self.stop_since.get_or_insert_with(Instant::now)
    }

    /// Drains and ends a ring; the last one tells the node and waits.
    fn stop(&mut self, index: usize) {
        if !self.queues[index].started {
            return;
        }
        let since = self.stopping();
        if let Ok(Answer::Base(base)) = self.command(index, Command::Stop(since)) {
            self.queues[index].base = base;
        }
        self.queues[index].started = false;
        self.queues[index].kick = None;
        if !self.running || self.queues.iter().any(|queue| queue.started) {
            return;
        }
        self.running = false;
        self.parts.channel.stopped();
        let drained = elapsed_us(self.stop_since);
        if let Verdict::Refuse(why) = self.parts.signals.ask(HypervisorSignal::RingsStopped) {
            log::warn!("the stop of the rings cannot be refused: {why}");
        }
        let held = elapsed_us(self.stop_since.take());
        self.parts.holds.stop_us.store(held, Ordering::Relaxed);
        log::info!("rings have stopped; drained in {drained} us, reply held for {held} us in all");
    }

    fn set_memory(&mut self, table: GuestMemory) {
        self.memory = Arc::new(table);
        self.stale = false;
        self.update_rings();
    }

    fn config(&self) -> BlkConfig {
        let geometry = self.parts.volume.geometry();
        let grain = self.parts.volume.store().layer.grain();
        BlkConfig {
            capacity: geometry.size(),
            queues: u16::try_from(self.queues.len()).unwrap_or(u16::MAX),
            queue_size: self.parts.queue_size,
            write_back: self.parts.volume.write_cache(),
            physical_block: grain.physical,
            min_io: grain.preferred.min(geometry.chunk_size()),
            opt_io: geometry.chunk_size().min(LARGEST_OPT_IO),
        }
    }

    fn save(&mut self, stream: File) -> std::result::Result<(), String> {
        let ticket: Ticket = match self.parts.signals.ask(HypervisorSignal::SaveTicket) {
            Verdict::Ticket(ticket) => ticket,
            Verdict::Refuse(why) => return Err(why),
            Verdict::Proceed => return Err("there is no handoff ticket".to_owned()),
        };
        device_state::save(stream, &ticket).map_err(|error| error.to_string())
    }
}
