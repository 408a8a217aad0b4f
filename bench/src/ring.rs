// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of one split virtqueue, made for speed: a request slot keeps its place in memory for the whole run.
//!
//! A slot is a 64-byte control line (request header, discard segment, status byte), a data buffer, and its descriptors:
//! with indirect descriptors a table of its own and one descriptor of the ring, else a fixed run of the ring's
//! descriptors. So nothing is ever allocated or searched for, and a completion's head leads straight back to its slot.
//!
//! Notifications follow the specification's rules for drivers: with EVENT_IDX a kick only when the available index
//! passes avail_event, and used_event is moved on only before sleeping; without it the two flags.

use crate::memory::GuestMemory;
use anyhow::{Result, bail};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Flag of either ring: the other side need not be notified.
const NO_NOTIFY: u16 = 1;
/// Bytes of a control line, and where its parts are.
const LINE: usize = 64;
const HEADER: usize = 0;
const RANGE: usize = 16;
const STATUS: usize = 32;
/// No status that a device writes.
const UNSET: u8 = 0xee;
const SECTOR: u64 = 512;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
}

impl Kind {
    /// The request type of virtio-blk.
    fn code(self) -> u32 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 4,
            Self::Discard => 11,
        }
    }
}

/// A queue's dimensions and features.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Entries of the ring.
    pub(crate) size: u16,
    /// Requests in flight at most.
    pub(crate) slots: u16,
    /// Bytes of a request's data.
    pub(crate) block: u32,
    /// Descriptors that the data is split over.
    pub(crate) segments: u16,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
}

impl Shape {
    /// Descriptors of one request.
    fn chain(&self) -> u16 {
        self.segments + 2
    }

    /// Whether that many slots fit.
    pub(crate) fn check(&self) -> Result<()> {
        let needed = if self.indirect {
            u32::from(self.slots)
        } else {
            u32::from(self.slots) * u32::from(self.chain())
        };
        if needed > u32::from(self.size) {
            bail!(
                "{} requests in flight need a ring of {needed} descriptors: raise --queue-size {}",
                self.slots,
                self.size
            );
        }
        Ok(())
    }
}

/// Where the parts of a queue are, as offsets into the guest memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) descriptors: usize,
    pub(crate) available: usize,
    pub(crate) used: usize,
    lines: usize,
    tables: usize,
    data: usize,
    stride: usize,
    /// The first byte after it.
    pub(crate) end: usize,
}

impl Layout {
    /// Lays out a queue from `start` on.
    pub(crate) fn new(start: usize, shape: &Shape) -> Self {
        let (size, slots) = (usize::from(shape.size), usize::from(shape.slots));
        let page = |at: usize| at.next_multiple_of(4096);
        let descriptors = page(start);
        let available = page(descriptors + 16 * size);
        let used = page(available + 6 + 2 * size);
        let lines = page(used + 6 + 8 * size);
        let tables = page(lines + LINE * slots);
        let data = page(tables + Self::table(shape) * slots);
        let stride = page(usize::try_from(shape.block).unwrap_or(usize::MAX));
        Self { descriptors, available, used, lines, tables, data, stride, end: data + stride * slots }
    }

    /// Bytes of a slot's indirect table, rounded so that no two slots share a cache line.
    fn table(shape: &Shape) -> usize {
        (16 * usize::from(shape.chain())).next_multiple_of(LINE)
    }
}

/// A request that came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) slot: u16,
    /// The device's status byte; 0 is good.
    pub(crate) status: u8,
}

/// The driver's side of a queue.
#[derive(Debug)]
pub(crate) struct Ring {
    memory: Arc<GuestMemory>,
    layout: Layout,
    shape: Shape,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    /// Free-running indices: next entry to make available; what was published; next used entry to look at.
    available: u16,
    published: u16,
    used: u16,
    /// The used index as last read.
    seen: u16,
    busy: Vec<bool>,
}

impl Ring {
    pub(crate) fn new(memory: Arc<GuestMemory>, layout: Layout, shape: Shape) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let busy = vec![false; usize::from(shape.slots)];
        let ring = Self {
            memory,
            layout,
            shape,
            kick: event()?,
            call: event()?,
            available: 0,
            published: 0,
            used: 0,
            seen: 0,
            busy,
        };
        ring.silence();
        Ok(ring)
    }

    /// The call's descriptor, to wait for.
    pub(crate) fn call_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as self lives, and so longer than the borrow.
        unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) }
    }

    pub(crate) fn in_flight(&self) -> u16 {
        self.available.wrapping_sub(self.used)
    }

    fn line(&self, slot: u16) -> usize {
        self.layout.lines + LINE * usize::from(slot)
    }

    fn data(&self, slot: u16) -> usize {
        self.layout.data + self.layout.stride * usize::from(slot)
    }

    /// Fills a free slot's data buffer.
    pub(crate) fn fill(&self, slot: u16, bytes: &[u8]) {
        self.memory.write(self.data(slot), bytes);
    }

    /// Copies out of a free slot's data buffer.
    pub(crate) fn fetch(&self, slot: u16, bytes: &mut [u8]) {
        self.memory.read(self.data(slot), bytes);
    }

    fn descriptor(&self, at: usize, address: usize, len: u32, flags: u16, next: u16) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.memory.atomic64(at).store((address as u64).to_le(), Ordering::Relaxed);
        self.memory.atomic64(at + 8).store(rest.to_le(), Ordering::Relaxed);
    }

    /// Puts a request of a free slot into the ring; [`Ring::publish`] shows it to the device.
    pub(crate) fn put(&mut self, slot: u16, kind: Kind, offset: u64) {
        assert!(!self.busy[usize::from(slot)], "slot {slot} is in flight");
        self.busy[usize::from(slot)] = true;
        let line = self.line(slot);
        let sector = if kind == Kind::Read || kind == Kind::Write { offset / SECTOR } else { 0 };
        self.memory.atomic64(line + HEADER).store(u64::from(kind.code()).to_le(), Ordering::Relaxed);
        self.memory.atomic64(line + HEADER + 8).store(sector.to_le(), Ordering::Relaxed);
        self.memory.atomic8(line + STATUS).store(UNSET, Ordering::Relaxed);
        let (head, table, first) = if self.shape.indirect {
            (slot, self.layout.tables + Layout::table(&self.shape) * usize::from(slot), 0)
        } else {
            let head = slot * self.shape.chain();
            (head, self.layout.descriptors + 16 * usize::from(head), head)
        };
        let count = self.chain(slot, kind, offset, table, first);
        if self.shape.indirect {
            let at = self.layout.descriptors + 16 * usize::from(head);
            self.descriptor(at, table, 16 * u32::from(count), INDIRECT, 0);
        }
        let entry = self.layout.available + 4 + 2 * usize::from(self.available % self.shape.size);
        self.memory.atomic16(entry).store(head.to_le(), Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
    }

    /// Writes the chain of a request; returns its number of descriptors.
    fn chain(&self, slot: u16, kind: Kind, offset: u64, table: usize, first: u16) -> u16 {
        let (line, data) = (self.line(slot), self.data(slot));
        let at = |n: u16| table + 16 * usize::from(n);
        self.descriptor(at(0), line + HEADER, 16, NEXT, first + 1);
        let mut count = 1;
        match kind {
            Kind::Read | Kind::Write => {
                let piece = self.shape.block / u32::from(self.shape.segments);
                let flags = if kind == Kind::Read { NEXT | WRITE } else { NEXT };
                let mut from = data;
                for _ in 0..self.shape.segments {
                    self.descriptor(at(count), from, piece, flags, first + count + 1);
                    from += piece as usize;
                    count += 1;
                }
            }
            Kind::Discard => {
                let sectors = u64::from(self.shape.block) / SECTOR;
                self.memory.atomic64(line + RANGE).store((offset / SECTOR).to_le(), Ordering::Relaxed);
                // The count, and no flags above it.
                self.memory.atomic64(line + RANGE + 8).store(sectors.to_le(), Ordering::Relaxed);
                self.descriptor(at(count), line + RANGE, 16, NEXT, first + count + 1);
                count += 1;
            }
            Kind::Flush => {}
        }
        self.descriptor(at(count), line + STATUS, 1, WRITE, 0);
        count + 1
    }

    /// Shows what was put to the device, and kicks it if it wants that.
    pub(crate) fn publish(&mut self) -> io::Result<()> {
        let old = std::mem::replace(&mut self.published, self.available);
        if old == self.available {
            return Ok(());
        }
        self.memory.atomic16(self.layout.available + 2).store(self.available.to_le(), Ordering::Release);
        // The index must be visible before the device's wish is read: it does the same the other way round.
        fence(Ordering::SeqCst);
        if self.wants_kick(old) { self.kick.write(1) } else { Ok(()) }
    }

    fn wants_kick(&self, old: u16) -> bool {
        if !self.shape.event_idx {
            return u16::from_le(self.memory.atomic16(self.layout.used).load(Ordering::Relaxed)) & NO_NOTIFY
                == 0;
        }
        let at = self.layout.used + 4 + 8 * usize::from(self.shape.size);
        let event = u16::from_le(self.memory.atomic16(at).load(Ordering::Relaxed));
        self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(old)
    }

    /// The used index as the device has it now.
    fn used_index(&self) -> u16 {
        u16::from_le(self.memory.atomic16(self.layout.used + 2).load(Ordering::Acquire))
    }

    /// Takes the next completion.
    pub(crate) fn next(&mut self) -> Result<Option<Done>> {
        if self.used == self.seen {
            self.seen = self.used_index();
            if self.used == self.seen {
                return Ok(None);
            }
        }
        let at = self.layout.used + 4 + 8 * usize::from(self.used % self.shape.size);
        let head = u32::from_le(self.memory.atomic32(at).load(Ordering::Relaxed));
        let run = if self.shape.indirect { 1 } else { u32::from(self.shape.chain()) };
        let slot = u16::try_from(head / run).ok().filter(|_| head.is_multiple_of(run));
        let slot = slot.filter(|slot| self.busy.get(usize::from(*slot)).copied().unwrap_or(false));
        let Some(slot) = slot else { bail!("the back-end completed head {head}, which is not in flight") };
        self.busy[usize::from(slot)] = false;
        self.used = self.used.wrapping_add(1);
        let status = self.memory.atomic8(self.line(slot) + STATUS).load(Ordering::Relaxed);
        Ok(Some(Done { slot, status }))
    }

    /// Asks the device not to call.
    pub(crate) fn silence(&self) {
        if !self.shape.event_idx {
            self.memory.atomic16(self.layout.available).store(NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
        // With EVENT_IDX a used_event that has been passed is silence enough.
    }

    /// Asks the device to call for the next completion; false if there is one already.
    pub(crate) fn arm(&self) -> bool {
        if self.shape.event_idx {
            let at = self.layout.available + 4 + 2 * usize::from(self.shape.size);
            self.memory.atomic16(at).store(self.used.to_le(), Ordering::Relaxed);
        } else {
            self.memory.atomic16(self.layout.available).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.used_index() == self.used
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ring(event_idx: bool, indirect: bool) -> Ring {
        let shape = Shape { size: 16, slots: 4, block: 4096, segments: 2, event_idx, indirect };
        let layout = Layout::new(0, &shape);
        let memory = Arc::new(GuestMemory::new(layout.end, false).unwrap());
        Ring::new(memory, layout, shape).unwrap()
    }

    /// What a device does: completes a head with a status.
    fn complete(ring: &Ring, head: u16, index: u16, status: Option<(u16, u8)>) {
        let used = ring.layout.used;
        ring.memory.write(used + 4 + 8 * usize::from(index % 16), &u32::from(head).to_le_bytes());
        if let Some((slot, status)) = status {
            ring.memory.write(ring.line(slot) + STATUS, &[status]);
        }
        ring.memory.atomic16(used + 2).store((index + 1).to_le(), Ordering::Release);
    }

    fn kicked(ring: &Ring) -> bool {
        ring.kick.read().is_ok()
    }

    fn words(ring: &Ring, at: usize) -> [u64; 2] {
        [0, 8].map(|n| u64::from_le(ring.memory.atomic64(at + n).load(Ordering::Relaxed)))
    }

    #[test]
    fn a_chain_is_header_data_and_status() {
        for indirect in [true, false] {
            let mut ring = ring(true, indirect);
            ring.put(1, Kind::Read, 8192);
            let (line, data) = (ring.line(1) as u64, ring.data(1) as u64);
            let (table, base) = if indirect {
                let [table, rest] = words(&ring, ring.layout.descriptors + 16);
                assert_eq!(rest, (4 * 16) | (u64::from(INDIRECT) << 32));
                (usize::try_from(table).unwrap(), 0)
            } else {
                (ring.layout.descriptors + 16 * 4, 4)
            };
            let expected = [
                (line, 16, NEXT, base + 1),
                (data, 2048, NEXT | WRITE, base + 2),
                (data + 2048, 2048, NEXT | WRITE, base + 3),
                (line + 32, 1, WRITE, 0),
            ];
            for (n, (address, len, flags, next)) in expected.into_iter().enumerate() {
                let rest = len | (u64::from(flags) << 32) | (next << 48);
                assert_eq!(
                    words(&ring, table + 16 * n),
                    [address, rest],
                    "descriptor {n}, indirect {indirect}"
                );
            }
            assert_eq!(words(&ring, ring.line(1)), [0, 16], "type and sector");
        }
    }

    #[test]
    fn completions_lead_back_to_their_slots() {
        for indirect in [true, false] {
            let mut ring = ring(false, indirect);
            let head = |slot: u16| if indirect { slot } else { 4 * slot };
            for round in 0..20u16 {
                ring.put(0, Kind::Write, 0);
                ring.put(3, Kind::Flush, 0);
                ring.publish().unwrap();
                assert!(ring.next().unwrap().is_none() && ring.in_flight() == 2);
                complete(&ring, head(3), 2 * round, Some((3, 0)));
                assert_eq!(ring.next().unwrap(), Some(Done { slot: 3, status: 0 }));
                complete(&ring, head(0), 2 * round + 1, Some((0, 1)));
                assert_eq!(ring.next().unwrap(), Some(Done { slot: 0, status: 1 }));
            }
        }
    }

    #[test]
    fn a_back_end_that_completes_what_was_not_asked_is_an_error() {
        for (head, indirect) in [(2, true), (9, true), (2, false), (999, true)] {
            let mut ring = ring(false, indirect);
            ring.put(0, Kind::Read, 0);
            ring.publish().unwrap();
            complete(&ring, head, 0, None);
            assert!(ring.next().is_err(), "head {head}");
        }
        let mut ring = ring(false, true);
        ring.put(0, Kind::Read, 0);
        ring.publish().unwrap();
        complete(&ring, 0, 0, None);
        assert_eq!(ring.next().unwrap().unwrap().status, UNSET, "a status that was not written is not good");
        complete(&ring, 0, 1, None);
        assert!(ring.next().is_err(), "twice");
    }

    #[test]
    fn kicks_come_when_the_device_wants_them() {
        let mut plain = ring(false, true);
        plain.put(0, Kind::Read, 0);
        plain.publish().unwrap();
        assert!(kicked(&plain));
        plain.publish().unwrap();
        assert!(!kicked(&plain), "nothing new");
        plain.memory.atomic16(plain.layout.used).store(NO_NOTIFY.to_le(), Ordering::Relaxed);
        plain.put(1, Kind::Read, 0);
        plain.publish().unwrap();
        assert!(!kicked(&plain));

        let mut event = ring(true, true);
        let avail_event = event.layout.used + 4 + 8 * 16;
        event.memory.atomic16(avail_event).store(1u16.to_le(), Ordering::Relaxed);
        event.put(0, Kind::Read, 0);
        event.publish().unwrap();
        assert!(!kicked(&event), "index 1 does not pass event 1");
        event.put(1, Kind::Read, 0);
        event.put(2, Kind::Read, 0);
        event.publish().unwrap();
        assert!(kicked(&event));
    }

    #[test]
    fn arming_sees_what_came_in_between() {
        for event_idx in [true, false] {
            let mut ring = ring(event_idx, true);
            ring.put(0, Kind::Read, 0);
            ring.publish().unwrap();
            assert!(ring.arm());
            complete(&ring, 0, 0, Some((0, 0)));
            assert!(!ring.arm());
        }
    }

    #[test]
    fn too_many_slots_are_refused() {
        let shape =
            Shape { size: 128, slots: 43, block: 4096, segments: 1, event_idx: true, indirect: false };
        assert!(shape.check().is_err());
        assert!(Shape { slots: 42, ..shape }.check().is_ok());
        assert!(Shape { slots: 128, indirect: true, ..shape }.check().is_ok());
    }
}
