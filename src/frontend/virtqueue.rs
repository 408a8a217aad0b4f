// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A started virtqueue: what has been popped, what is in flight, what is ready to be published.
//!
//! Life of a head: popped from the available ring, parsed, given to the volume in one or more requests; when the
//! last part is done (and flushed, for a driver that knows no flush) the status byte is written, pages are logged, and
//! the used element is filled. A batch of used elements becomes visible with one index store, one fence and at most
//! one call. All heads are below the ring size, so the table of pending requests is indexed by them; a head that is
//! made available again while it is in flight is a broken driver.
//!
//! A broken ring stops popping for good: what is in flight is completed, the front-end's error event is signalled,
//! and the reason is logged once. Resetting the device brings it back. Shared memory that is gone breaks a ring too:
//! after everything that was read from it, and before it is acted on, comes a look at what is lost (`sigbus`).

use super::dirty_log::DirtyLog;
use super::inflight::{InflightQueue, InflightRegion};
use super::memory::{GuestMemory, GuestRange, View};
use super::ring_mem::{RingAddresses, RingError, RingMemory, fence};
use super::sigbus;
use super::virtio_blk::{Action, Chain, ID_BYTES};
use crate::engine::IoBuf;
use crate::volume::{Port, Rejected, Request, Status, Token, Volume};
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;
const LOST: &str = "shared memory is gone (its file was cut, or the host has no page for it)";

/// All that the front-end has said about a ring. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct RingSetup {
    /// Guest memory.
    pub(super) memory: Arc<GuestMemory>,
    /// Where the ring is.
    pub(super) addresses: RingAddresses,
    /// Number of descriptors.
    pub(super) size: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub(super) event_idx: bool,
    /// The driver did not negotiate FLUSH: every write must be stable before it is completed.
    pub(super) no_flush: bool,
    /// Dirty log, while LOG_ALL is negotiated.
    pub(super) log: Option<Arc<DirtyLog>>,
    /// Readable when the driver has made something available. Without it the ring is polled.
    pub(super) kick: Option<Arc<File>>,
    /// Written when something was used.
    pub(super) call: Option<Arc<File>>,
    /// Written when the ring is broken.
    pub(super) error: Option<Arc<File>>,
    /// In-flight region.
    pub(super) inflight: Option<Arc<InflightRegion>>,
}

/// A popped request.
#[derive(Debug, Default)]
struct Pending {
    /// One byte; `None` when the head is not in flight.
    status: Option<IoBuf>,
    /// Guest pages that may have been written, status byte last.
    written: Vec<GuestRange>,
    /// Requests at the volume that are not done.
    parts: u32,
    /// The worst result so far.
    result: u8,
    /// Bytes for the guest, without the status byte.
    data: u32,
    /// It changes the disk, and a flush must follow because the driver cannot ask for one.
    unstable: bool,
}

/// What a queue needs besides its own state for each request.
#[derive(Debug)]
pub(super) struct Device<'a> {
    /// The volume.
    pub(super) volume: &'a Volume,
    /// This thread's port.
    pub(super) port: &'a mut Port,
    /// What GET_ID answers, zero-padded.
    pub(super) serial: &'a [u8; ID_BYTES],
}

/// A started split virtqueue.
#[derive(Debug)]
pub(super) struct Virtqueue {
    index: u16,
    setup: RingSetup,
    ring: RingMemory,
    view: View,
    chain: Chain,
    pending: Vec<Pending>,
    /// Heads in flight.
    outstanding: u32,
    /// Count of lost pages at the last look at `setup`; none yet if `None`.
    losses: Option<u64>,
    /// Memory, log or in-flight region is lost.
    lost: bool,
    /// Heads of a former life that must be done again first.
    again: VecDeque<u16>,
    inflight: Option<InflightQueue>,
    next_available: u16,
    /// Used index with what is filled but not published.
    used: u16,
    published: u16,
    broken: bool,
    suppressed: bool,
}

impl Virtqueue {
    /// Starts at available index `base`, or where an in-flight region says. The driver is called once: what was used
    /// while the front-end was away, or before it moved, may have been announced to nobody.
    ///
    /// # Errors
    /// The ring is not in guest memory.
    pub(super) fn start(index: u16, setup: RingSetup, base: u16) -> Result<Self, RingError> {
        let ring = RingMemory::new(&setup.memory, &setup.addresses, setup.size)?;
        let used = ring.used_index();
        let mut inflight =
            setup.inflight.as_ref().and_then(|region| InflightQueue::new(region, index, setup.size));
        let again: VecDeque<u16> =
            inflight.as_mut().map(|queue| queue.recover(setup.size, used)).unwrap_or_default().into();
        let lost = u16::try_from(again.len()).unwrap_or(0);
        // What is in flight lies between the used and the available index; a front-end that lost its back-end
        // can only know the used index.
        let next_available = if lost > 0 { used.wrapping_add(lost) } else { base };
        if lost > 0 {
            log::info!("queue {index}: {lost} requests of the last run are done again");
        } else if base != used {
            log::debug!("queue {index}: starts at available index {base}, used index {used}");
        }
        call(setup.call.as_ref(), index);
        Ok(Self {
            index,
            ring,
            view: View::new(Arc::clone(&setup.memory)),
            chain: Chain::default(),
            pending: (0..setup.size).map(|_| Pending::default()).collect(),
            setup,
            outstanding: 0,
            losses: None,
            lost: false,
            again,
            inflight,
            next_available,
            used,
            published: used,
            broken: false,
            suppressed: false,
        })
    }

    /// Takes over new memory, addresses, log, features and descriptors; never an index: QEMU sends SET_VRING_ADDR
    /// to a running ring when a migration begins.
    ///
    /// # Errors
    /// The ring is not in the new memory; then nothing has changed.
    pub(super) fn update(&mut self, setup: RingSetup) -> Result<(), RingError> {
        self.ring = RingMemory::new(&setup.memory, &setup.addresses, self.ring.size())?;
        if !Arc::ptr_eq(&setup.memory, &self.setup.memory) {
            self.view = View::new(Arc::clone(&setup.memory));
        }
        let same = self.setup.call.as_ref().map(Arc::as_ptr) == setup.call.as_ref().map(Arc::as_ptr);
        if !same {
            call(setup.call.as_ref(), self.index);
        }
        let (size, inflight) = (self.setup.size, self.setup.inflight.take());
        self.setup = RingSetup { size, inflight, ..setup };
        self.losses = None;
        Ok(())
    }

    /// All of guest memory, for pinning it.
    pub(super) fn whole_memory(&self) -> IoBuf {
        self.view.whole()
    }

    /// What the front-end said last.
    pub(super) fn setup(&self) -> &RingSetup {
        &self.setup
    }

    /// The next available index to be popped: what GET_VRING_BASE returns.
    pub(super) fn base(&self) -> u16 {
        // Not yet resubmitted heads have been popped by a former life only.
        self.next_available.wrapping_sub(u16::try_from(self.again.len()).unwrap_or(0))
    }

    /// The available index up to which heads have been taken.
    pub(super) fn position(&self) -> u16 {
        self.next_available
    }

    /// The driver's available index.
    pub(super) fn available(&self) -> u16 {
        self.ring.available_index()
    }

    /// Whether the driver has made something available that is not popped.
    pub(super) fn has_new(&mut self) -> bool {
        let available = self.ring.available_index();
        self.check_memory();
        !self.broken && available != self.next_available
    }

    /// Whether nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.outstanding == 0
    }

    /// Whether everything up to available index `end` has been popped.
    pub(super) fn popped_to(&self, end: u16) -> bool {
        self.broken || (self.again.is_empty() && self.next_available == end)
    }

    /// Whether memory that the front-end shares is gone: what was read from it so far is not to be acted on.
    fn is_lost(&mut self) -> bool {
        let losses = sigbus::losses();
        if self.losses != Some(losses) {
            self.losses = Some(losses);
            let setup = &self.setup;
            self.lost |= setup.memory.is_lost()
                || setup.log.as_ref().is_some_and(|log| log.is_lost())
                || setup.inflight.as_ref().is_some_and(|region| region.is_lost());
        }
        self.lost
    }

    /// Breaks the ring if memory that it needs is gone.
    fn check_memory(&mut self) {
        if !self.broken && self.is_lost() {
            self.fail(LOST);
        }
    }

    /// Pops and submits what is available, up to index `end`.
    pub(super) fn pop(&mut self, end: u16, device: &mut Device<'_>) {
        self.check_memory();
        while !self.broken
            && let Some(head) = self.again.pop_front()
        {
            self.accept(head, device);
        }
        let count = end.wrapping_sub(self.next_available);
        if count > self.ring.size() && !self.broken {
            self.fail(&format!("available index jumped from {} to {end}", self.next_available));
        }
        while !self.broken && self.next_available != end {
            let head = self.ring.head(self.next_available);
            self.next_available = self.next_available.wrapping_add(1);
            self.take(head, device);
        }
    }

    fn take(&mut self, head: u16, device: &mut Device<'_>) {
        match self.pending.get(usize::from(head)) {
            None => self.fail(&format!("head {head} does not exist")),
            Some(pending) if pending.status.is_some() => {
                self.fail(&format!("head {head} is made available while it is in flight"));
            }
            Some(_) => {
                if let Some(inflight) = &mut self.inflight {
                    inflight.popped(head);
                }
                self.accept(head, device);
            }
        }
    }

    fn fail(&mut self, reason: &str) {
        // Garbage that comes from lost memory is no fault of the driver.
        let reason = if self.is_lost() { LOST } else { reason };
        log::error!("queue {}: {reason}; the ring is stopped until the device is reset", self.index);
        self.broken = true;
        if let Some(error) = &self.setup.error {
            signal(error, "error", self.index);
        }
    }

    /// Parses a popped head and gives it to the volume.
    fn accept(&mut self, head: u16, device: &mut Device<'_>) {
        let parsed = self.chain.parse(&self.ring, &self.view, head);
        // Zeros instead of what the driver wrote: index, head and chain could be anything, even an old request.
        self.check_memory();
        if self.broken {
            return;
        }
        let (action, status) = match parsed {
            Ok(parsed) => parsed,
            Err(error) => return self.fail(&format!("head {head}: {error}")),
        };
        let Some(pending) = self.pending.get_mut(usize::from(head)) else { return };
        self.chain.swap_written(&mut pending.written);
        *pending = Pending {
            status: Some(status),
            written: std::mem::take(&mut pending.written),
            ..Pending::default()
        };
        self.outstanding += 1;
        // The part that stands for the parsing itself: the request cannot be done before all parts are given out.
        pending.parts = 1;
        let (id, no_flush) = (u64::from(head), self.setup.no_flush);
        let result = match action {
            Action::Read(offset, buf) => {
                pending.data = u32::try_from(buf.len()).unwrap_or(u32::MAX);
                self.submit(head, Request::read(device.volume, offset, buf, Token::new(id)), device)
            }
            Action::Write(offset, buf) => {
                pending.unstable = no_flush;
                self.submit(head, Request::write(device.volume, offset, buf, Token::new(id)), device)
            }
            Action::Flush => self.submit(head, Ok(Request::flush(Token::new(id))), device),
            Action::Zero(ranges) => {
                pending.unstable = no_flush;
                ranges.iter().fold(S_OK, |worst, range| {
                    let request =
                        Request::zero(device.volume, range.offset, range.len, range.unmap, Token::new(id));
                    worst.max(self.submit(head, request, device))
                })
            }
            Action::GetId(buf) => {
                pending.data = u32::try_from(buf.copy_from(device.serial)).unwrap_or(0);
                S_OK
            }
            Action::Invalid(reason) => {
                log::warn!("queue {}: head {head}: {reason}", self.index);
                S_IOERR
            }
            Action::Unsupported => S_UNSUPP,
        };
        self.part_done(head, result, device);
    }

    /// Gives one request of a head to the volume; a refused one is only a status.
    fn submit(&mut self, head: u16, request: Result<Request, Rejected>, device: &mut Device<'_>) -> u8 {
        match request {
            Ok(request) => {
                if let Some(pending) = self.pending.get_mut(usize::from(head)) {
                    pending.parts += 1;
                }
                device.port.submit(request);
                S_OK
            }
            Err(Rejected { token, status }) => {
                token.spend();
                status_byte(status)
            }
        }
    }

    /// The volume is done with a request. In `abandon` mode a failed one stays in the in-flight region, to be done
    /// again in the next life, and the guest is told nothing.
    pub(super) fn completed(&mut self, token: Token, status: Status, abandon: bool, device: &mut Device<'_>) {
        let Ok(head) = u16::try_from(token.spend()) else { return };
        if abandon && status != Status::Ok && self.inflight.is_some() {
            if let Some(pending) = self.pending.get_mut(usize::from(head)) {
                pending.parts = pending.parts.saturating_sub(1);
                pending.result = u8::MAX;
                self.drop_if_abandoned(head);
            }
            return;
        }
        self.part_done(head, status_byte(status), device);
    }

    fn drop_if_abandoned(&mut self, head: u16) {
        if let Some(pending) = self.pending.get_mut(usize::from(head))
            && pending.parts == 0
            && pending.status.take().is_some()
        {
            self.outstanding -= 1;
        }
    }

    fn part_done(&mut self, head: u16, result: u8, device: &mut Device<'_>) {
        let Some(pending) = self.pending.get_mut(usize::from(head)) else { return };
        pending.parts = pending.parts.saturating_sub(1);
        if pending.result == u8::MAX {
            return self.drop_if_abandoned(head);
        }
        // OK < IOERR < UNSUPP: the worst part counts.
        pending.result = pending.result.max(result);
        if pending.parts > 0 {
            return;
        }
        if pending.unstable && pending.result == S_OK {
            pending.unstable = false;
            self.submit(head, Ok(Request::flush(Token::new(u64::from(head)))), device);
            return;
        }
        self.finish(head);
    }

    /// Writes the status byte, marks what was written, fills the used element.
    fn finish(&mut self, head: u16) {
        // What was copied from or to lost memory is not what the driver meant.
        let lost = self.is_lost();
        let Some(pending) = self.pending.get_mut(usize::from(head)) else { return };
        let Some(status) = pending.status.take() else { return };
        if lost {
            pending.result = pending.result.max(S_IOERR);
        }
        status.copy_from(&[pending.result]);
        if let Some(log) = &self.setup.log {
            for range in &pending.written {
                log.mark(range.address, u64::from(range.len));
            }
        }
        let len = if pending.result == S_OK { pending.data.saturating_add(1) } else { 1 };
        self.ring.put_used(self.used, head, len);
        if let Some(inflight) = &mut self.inflight {
            inflight.completing(head);
        }
        self.used = self.used.wrapping_add(1);
        self.outstanding -= 1;
    }

    /// Makes the filled batch visible and interrupts the driver if it wants that.
    pub(super) fn publish(&mut self) {
        let (old, new) = (self.published, self.used);
        if old == new {
            return;
        }
        self.ring.publish(new);
        self.published = new;
        if let Some(inflight) = &mut self.inflight {
            inflight.completed(new);
        }
        self.log_used(old, new);
        fence();
        let wanted = if self.setup.event_idx {
            need_event(self.ring.used_event(), new, old)
        } else {
            !self.ring.no_interrupt()
        };
        if wanted {
            call(self.setup.call.as_ref(), self.index);
        }
    }

    /// Marks the used elements `old..new` and the index.
    fn log_used(&self, old: u16, new: u16) {
        let (Some(log), Some(at)) = (&self.setup.log, self.setup.addresses.used_log) else { return };
        let mark = |offset, len| log.mark(at.wrapping_add(offset), len);
        mark(0, 4);
        let count = u64::from(new.wrapping_sub(old)).min(u64::from(self.ring.size()));
        let (first, end) = (self.ring.used_offset(old), self.ring.event_offset());
        let straight = (8 * count).min(end - first);
        mark(first, straight);
        mark(4, 8 * count - straight);
    }

    /// Asks the driver to notify from now on; returns whether it has made something available meanwhile, so that
    /// sleeping now would miss it.
    pub(super) fn arm(&mut self) -> bool {
        if self.broken {
            return false;
        }
        let (offset, len) = if self.setup.event_idx {
            self.ring.set_available_event(self.next_available);
            (self.ring.event_offset(), 2)
        } else {
            self.ring.set_notify(true);
            self.suppressed = false;
            (0, 2)
        };
        if let (Some(log), Some(at)) = (&self.setup.log, self.setup.addresses.used_log) {
            log.mark(at.wrapping_add(offset), len);
        }
        fence();
        self.has_new()
    }

    /// Asks the driver not to notify while this thread is busy. With EVENT_IDX there is nothing to do: the index
    /// that was armed lies behind.
    pub(super) fn suppress(&mut self) {
        if !self.setup.event_idx && !self.suppressed && !self.broken {
            self.ring.set_notify(false);
            self.suppressed = true;
        }
    }
}

/// Whether the index passed `event` on its way from `old` to `new` (virtio 1.2, 2.7.10).
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn status_byte(status: Status) -> u8 {
    match status {
        Status::Ok => S_OK,
        Status::IoError => S_IOERR,
        Status::Unsupported => S_UNSUPP,
    }
}

fn call(event: Option<&Arc<File>>, index: u16) {
    if let Some(event) = event {
        signal(event, "call", index);
    }
}

fn signal(event: &Arc<File>, what: &str, index: u16) {
    if let Err(error) = event.as_ref().write(&1u64.to_ne_bytes())
        && error.kind() != std::io::ErrorKind::WouldBlock
    {
        log::warn!("queue {index}: {what} event: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::need_event;

    #[test]
    fn an_event_is_due_when_the_index_passes_it_also_across_the_wrap() {
        assert!(need_event(4, 5, 4));
        assert!(need_event(4, 9, 2));
        assert!(!need_event(5, 5, 4));
        assert!(!need_event(3, 5, 4));
        assert!(need_event(65535, 0, 65535));
        assert!(need_event(65534, 3, 65530));
        assert!(!need_event(3, 3, 65530));
    }
}
