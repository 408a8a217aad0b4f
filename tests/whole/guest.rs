// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest: reads, writes, discards, zeroes and flushes of any sectors, through the real queues of the volume where it
//! runs. It never has two writes of one sector under way, but reads may overlap writes. Requests survive the death of a
//! daemon and are submitted again, as a front-end with an in-flight log does; a crash of the host takes the guest along.

use crate::dice::Dice;
use crate::world::{Event, SECOND, World};
use blkferry::engine::IoBuf;
use blkferry::volume::{Request, Status, Token};
use std::collections::BTreeMap;
use std::ops::Range;

pub(crate) const SECTOR: u64 = 512;
/// Values of the base image: this and the sector's number.
pub(crate) const BASE: u64 = 1 << 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zero { unmap: bool },
    Flush,
}

#[derive(Debug)]
struct Op {
    kind: Kind,
    sectors: Range<usize>,
    mark: u64,
    buf: Option<IoBuf>,
}

#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) at: usize,
    pub(crate) issues: bool,
    ops: BTreeMap<u64, Op>,
    hot: Vec<u64>,
    count: u64,
    pub(crate) errors: u64,
}

/// Sectors with these values.
pub(crate) fn content(values: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        bytes.extend_from_slice(&[value.to_le_bytes(); SECTOR as usize / 8].concat());
    }
    bytes
}

/// The values of whole sectors; `None` where a sector has parts of two.
fn values(bytes: &[u8]) -> Option<Vec<u64>> {
    let one = |sector: &[u8]| {
        let (first, rest) = sector.split_first_chunk::<8>()?;
        // All words are alike if each is as the one before it.
        (sector[..rest.len()] == *rest).then(|| u64::from_le_bytes(*first))
    };
    bytes.chunks(SECTOR as usize).map(one).collect()
}

impl Guest {
    pub(crate) fn new(dice: &mut Dice, size: u64) -> Self {
        let hot = (0..3).map(|_| dice.below(size / SECTOR)).collect();
        Self { at: 0, issues: true, ops: BTreeMap::new(), hot, count: 0, errors: 0 }
    }

    pub(crate) fn idle(&self) -> bool {
        self.ops.is_empty()
    }

    pub(crate) fn describe(&self) -> String {
        format!("at {} issues {} ops {:?}", self.at, self.issues, self.ops)
    }
}

impl World {
    pub(crate) fn guest_tick(&mut self) {
        let every = self.plan.guest_every;
        let delay = self.dice.delay(every);
        self.after(delay, Event::Guest);
        let side = self.guest.at;
        if self.guest.issues && self.sides[side].alive && self.guest.ops.len() < 8 && !self.finishing {
            self.issue();
        }
    }

    /// Where a request goes: sectors that lie in the disk.
    fn place(&mut self) -> Range<usize> {
        let end = self.geometry.size() / SECTOR;
        let chunk = u64::from(self.geometry.chunk_size()) / SECTOR;
        let around = if self.dice.permille(self.plan.hot_permille) {
            self.guest.hot[self.dice.index(3)] + self.dice.below(16)
        } else {
            self.dice.below(end)
        };
        let start = around.min(end - 1);
        let (start, len) = match self.dice.below(100) {
            0..30 => (start, 1),
            30..60 => (start, self.dice.between(1, 20)),
            60..80 => (start / 2 * 2, 2 * self.dice.between(1, 8)),
            80..92 => (start / chunk * chunk, chunk),
            92..97 => ((start / chunk * chunk).saturating_sub(self.dice.below(9)), self.dice.between(2, 18)),
            _ => (start, chunk + self.dice.below(chunk)),
        };
        start as usize..(start + len).min(end) as usize
    }

    fn issue(&mut self) {
        let kind = match self.dice.below(100) {
            roll if roll < self.plan.flush_percent => Kind::Flush,
            0..55 => Kind::Write,
            55..90 => Kind::Read,
            _ => Kind::Zero { unmap: self.dice.coin() },
        };
        let sectors = if kind == Kind::Flush { 0..0 } else { self.place() };
        let writes = matches!(kind, Kind::Write | Kind::Zero { .. });
        let flushing = self.guest.ops.values().any(|op| op.kind == Kind::Flush);
        if writes && self.oracle.is_writing(sectors.clone()) || kind == Kind::Flush && flushing {
            return;
        }
        self.issue_one(kind, sectors);
    }

    fn issue_one(&mut self, kind: Kind, sectors: Range<usize>) {
        self.guest.count += 1;
        let id = self.guest.count;
        let value = if kind == Kind::Write { id } else { 0 };
        let len = sectors.len() * SECTOR as usize;
        let buf = match kind {
            Kind::Write => Some(IoBuf::copy_of(&content(sectors.clone().map(|_| value)))),
            Kind::Read => Some(IoBuf::copy_of(&vec![0xee; len])),
            Kind::Zero { .. } | Kind::Flush => None,
        };
        match kind {
            Kind::Write | Kind::Zero { .. } => self.oracle.begin(sectors.clone(), value),
            Kind::Read => self.oracle.begin_read(id, sectors.clone()),
            Kind::Flush => {}
        }
        self.tell(|| format!("guest issues {id:#x} {kind:?} {sectors:?}"));
        let mark = self.oracle.flush_mark();
        self.guest.ops.insert(id, Op { kind, sectors, mark, buf });
        self.submit(id);
    }

    fn submit(&mut self, id: u64) {
        let Some(op) = self.guest.ops.get(&id) else { return };
        let Some(daemon) = &mut self.sides[self.guest.at].daemon else { return };
        let (offset, len) = (op.sectors.start as u64 * SECTOR, op.sectors.len() as u64 * SECTOR);
        let token = Token::new(id);
        let buf = || op.buf.as_ref().map_or_else(|| IoBuf::zeroed(0), |buf| buf.slice(0, buf.len()));
        let request = match op.kind {
            Kind::Read => Request::read(&daemon.volume, offset, buf(), token),
            Kind::Write => Request::write(&daemon.volume, offset, buf(), token),
            Kind::Zero { unmap } => Request::zero(&daemon.volume, offset, len, unmap, token),
            Kind::Flush => Ok(Request::flush(token)),
        };
        let held = op.kind == Kind::Flush && !daemon.volume.flush_gate().is_open();
        let port = id as usize % daemon.ports.len();
        match request {
            Ok(request) => daemon.ports[port].submit(request),
            Err(rejected) => {
                let id = rejected.token.spend();
                panic!("request {id:#x} is refused: {:?}", rejected.status);
            }
        }
        self.stats.held_flushes += u64::from(held);
    }

    /// A request has been answered.
    pub(crate) fn answered(&mut self, side: usize, id: u64, status: Status, bytes_read: u32) {
        let Some(op) = self.guest.ops.remove(&id) else { panic!("request {id:#x} is answered twice") };
        assert_eq!(side, self.guest.at, "an answer from where the guest does not run");
        let ok = status == Status::Ok;
        self.tell(|| format!("guest has {id:#x}: {status:?}"));
        if !ok {
            self.may_fail(side, id, &op.kind, status);
        }
        match op.kind {
            Kind::Read if ok => {
                let bytes = op.buf.map(|buf| buf.to_vec()).unwrap_or_default();
                assert_eq!(bytes_read as usize, bytes.len(), "a short read");
                let Some(values) = values(&bytes) else {
                    panic!("a read of {:?} at side {side} has a torn sector: {}", op.sectors, self.describe())
                };
                if let Err(why) = self.oracle.end_read(id, &values) {
                    panic!("stale read of {:?} at side {side}: {why}", op.sectors);
                }
                self.stats.reads += 1;
            }
            Kind::Read => self.oracle.drop_read(id),
            Kind::Write | Kind::Zero { .. } => {
                let stable = self.sides[side].daemon.as_ref().is_some_and(|d| !d.volume.write_cache());
                self.stats.written_through += u64::from(ok && stable);
                self.stats.zeroes += u64::from(ok && op.kind != Kind::Write);
                self.oracle.end(op.sectors, ok, stable);
            }
            Kind::Flush if ok => {
                self.stats.flushes += 1;
                self.oracle.flushed(op.mark);
            }
            Kind::Flush => {}
        }
        self.drained();
    }

    /// A request may fail where a disk has failed, or data is lost with a host; not for nothing.
    fn may_fail(&mut self, side: usize, id: u64, kind: &Kind, status: Status) {
        self.guest.errors += 1;
        self.stats.errors += 1;
        let failed = self.sides.iter().any(|side| side.disk.failures() > 0);
        let late = self.calm && self.now > self.plan.chaos + 20 * SECOND;
        let lost = self.is_lost();
        assert!(
            lost || failed && !late,
            "{kind:?} {id:#x} fails at side {side} for no reason: {status:?}; {}",
            self.describe()
        );
    }

    /// The daemon that serves the guest has died.
    pub(crate) fn guest_lost(&mut self, side: usize, host: bool) {
        if self.guest.at == side && host {
            self.guest.ops.clear();
            self.oracle.guest_gone();
            self.drained();
        }
    }

    /// A daemon is there again: what it had not answered is asked again.
    pub(crate) fn guest_back(&mut self, side: usize) {
        if self.guest.at == side {
            let open: Vec<u64> = self.guest.ops.keys().copied().collect();
            self.stats.resubmitted += open.len() as u64;
            open.into_iter().for_each(|id| self.submit(id));
        }
    }

    /// At the end: the whole disk is read once more.
    pub(crate) fn read_all(&mut self) {
        let end = (self.geometry.size() / SECTOR) as usize;
        for start in (0..end).step_by(32) {
            self.issue_one(Kind::Read, start..(start + 32).min(end));
        }
    }
}
