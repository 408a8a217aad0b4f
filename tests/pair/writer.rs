// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's program: random requests, several in flight, and a record of what each sector must hold.
//!
//! Requests that overlap a change in flight are not made: then what each read must return is known exactly.

use crate::guest::{Ask, Done, Guest, IOERR, OK, T_DISCARD, T_WRITE_ZEROES};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

pub const SECTOR: usize = 512;
/// Sectors of a block.
const BLOCK: u64 = 8;
/// Largest request in sectors: a slot of the guest.
const MOST: u64 = 32;
/// What nobody has written: the base image, zeros where it ends.
const BASE: u64 = u64::MAX;

/// What a sector holds that was written with `stamp`: it says where it belongs and when it was written.
fn fill(sector: u64, stamp: u64, out: &mut [u8]) {
    for (at, word) in (0u64..).zip(out.chunks_exact_mut(8)) {
        let value = match at {
            0 => stamp,
            1 => sector,
            _ => (stamp ^ sector << 24 ^ at << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// What a request is for.
#[derive(Debug, Clone)]
enum Purpose {
    Read,
    Change(u64),
    Flush,
}

#[derive(Debug, Clone)]
struct Pending {
    sectors: Range<u64>,
    purpose: Purpose,
}

/// The writer and its record.
pub struct Writer {
    pub rng: ChaCha8Rng,
    base: Vec<u8>,
    record: Vec<u64>,
    pending: HashMap<u16, Pending>,
    stamp: u64,
    /// Requests that came back.
    pub done: u64,
    pub flushed: u64,
    /// I/O errors are taken, and counted: a request that fails has changed nothing.
    pub may_fail: bool,
    pub refused: u64,
    /// Errors are taken: what a failed change has left is the old or the new content of each sector.
    pub lenient: bool,
    /// Requests that came back with an error.
    pub failed: u64,
    /// Other stamps that sectors may hold after failed changes.
    doubts: HashMap<u64, Vec<u64>>,
    /// The vCPUs do not run: nobody waits.
    pub paused: bool,
    /// Longest time without an answer while the guest waited for one.
    pub stall: Duration,
    waits_since: Instant,
}

impl Writer {
    pub fn new(seed: u64, sectors: u64, base: Vec<u8>) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            base,
            record: vec![BASE; sectors as usize],
            pending: HashMap::new(),
            stamp: 0,
            done: 0,
            flushed: 0,
            may_fail: false,
            refused: 0,
            lenient: false,
            failed: 0,
            doubts: HashMap::new(),
            paused: false,
            stall: Duration::ZERO,
            waits_since: Instant::now(),
        }
    }

    /// The disk has so many sectors now; nobody has written the new ones.
    pub fn grow(&mut self, sectors: u64) {
        self.record.resize(sectors as usize, BASE);
    }

    pub fn sectors(&self) -> u64 {
        self.record.len() as u64
    }

    fn expected(&self, sector: u64, stamp: u64, out: &mut [u8]) {
        match stamp {
            0 => out.fill(0),
            BASE => {
                let at = sector as usize * SECTOR;
                for (n, byte) in out.iter_mut().enumerate() {
                    *byte = self.base.get(at + n).copied().unwrap_or(0);
                }
            }
            stamp => fill(sector, stamp, out),
        }
    }

    /// Compares what was read from `first` on with the record.
    pub fn check(&self, first: u64, bytes: &[u8]) {
        let mut want = [0; SECTOR];
        for (sector, have) in (first..).zip(bytes.chunks(SECTOR)) {
            let stamp = self.record[sector as usize];
            let mut stamps =
                std::iter::once(stamp).chain(self.doubts.get(&sector).into_iter().flatten().copied());
            let known = stamps.any(|stamp| {
                self.expected(sector, stamp, &mut want);
                have == want
            });
            if !known {
                let word = |at: usize, of: &[u8]| u64::from_le_bytes(of[at..at + 8].try_into().unwrap());
                panic!(
                    "sector {sector} (chunk {} of 64K) holds stamp {} of sector {}, not stamp {}",
                    sector / 128,
                    word(0, have),
                    word(8, have),
                    self.record[sector as usize]
                );
            }
        }
    }

    fn free(&self, sectors: &Range<u64>, reads: bool) -> bool {
        self.pending.values().all(|other| {
            let apart = other.sectors.end <= sectors.start || sectors.end <= other.sectors.start;
            apart || reads && matches!(other.purpose, Purpose::Read)
        })
    }

    /// A range: whole blocks, or anything down to a sector; mostly in a small part of the disk.
    fn range(&mut self) -> Range<u64> {
        let total = self.sectors();
        let area = if self.rng.random_bool(0.7) { total / 8 } else { total };
        let whole = self.rng.random_bool(0.6);
        let (start, len) = if whole {
            let blocks = self.rng.random_range(1..=MOST / BLOCK);
            (self.rng.random_range(0..area / BLOCK) * BLOCK, blocks * BLOCK)
        } else {
            (self.rng.random_range(0..area), self.rng.random_range(1..=MOST))
        };
        start..(start + len).min(total)
    }

    /// Makes one request available.
    pub fn send(&mut self, guest: &mut Guest) {
        let kind = self.rng.random_range(0..100);
        let sectors = if kind >= 97 { 0..0 } else { self.range() };
        if !self.free(&sectors, kind < 30) {
            return;
        }
        match kind {
            0..30 => {
                let len = (sectors.end - sectors.start) as usize * SECTOR;
                self.ask(guest, sectors.clone(), Purpose::Read, &Ask::In(sectors.start, len));
            }
            30..90 => self.write(guest, sectors),
            90..97 => {
                let (kind, flags) = match self.rng.random_range(0..3) {
                    0 => (T_DISCARD, 0),
                    1 => (T_WRITE_ZEROES, 0),
                    _ => (T_WRITE_ZEROES, 1),
                };
                let count = (sectors.end - sectors.start) as u32;
                let segment = [(sectors.start, count, flags)];
                self.ask(guest, sectors, Purpose::Change(0), &Ask::Zero(kind, &segment));
            }
            _ => self.flush(guest),
        }
    }

    pub fn flush(&mut self, guest: &mut Guest) {
        self.ask(guest, 0..0, Purpose::Flush, &Ask::Flush);
    }

    pub fn write(&mut self, guest: &mut Guest, sectors: Range<u64>) {
        self.stamp += 1;
        let mut bytes = vec![0; (sectors.end - sectors.start) as usize * SECTOR];
        for (sector, out) in sectors.clone().zip(bytes.chunks_mut(SECTOR)) {
            fill(sector, self.stamp, out);
        }
        self.ask(guest, sectors.clone(), Purpose::Change(self.stamp), &Ask::Out(sectors.start, &bytes));
    }

    pub fn read(&mut self, guest: &mut Guest, sectors: Range<u64>) {
        let len = (sectors.end - sectors.start) as usize * SECTOR;
        self.ask(guest, sectors.clone(), Purpose::Read, &Ask::In(sectors.start, len));
    }

    fn ask(&mut self, guest: &mut Guest, sectors: Range<u64>, purpose: Purpose, ask: &Ask<'_>) {
        if self.pending.is_empty() {
            self.waits_since = Instant::now();
        }
        let head = guest.send(0, ask);
        assert!(self.pending.insert(head, Pending { sectors, purpose }).is_none());
    }

    /// Takes what has come back.
    pub fn reap(&mut self, guest: &mut Guest) {
        for Done { head, status, data } in guest.reap(0) {
            let Pending { sectors, purpose } = self.pending.remove(&head).unwrap();
            self.answered();
            if self.may_fail && status == IOERR {
                self.refused += 1;
                continue;
            }
            if self.lenient && status == IOERR {
                self.failed += 1;
                if let Purpose::Change(stamp) = purpose {
                    sectors.for_each(|sector| self.doubts.entry(sector).or_default().push(stamp));
                }
                continue;
            }
            assert_eq!(status, OK, "{purpose:?} of sectors {sectors:?}");
            match purpose {
                Purpose::Read => self.check(sectors.start, &data),
                Purpose::Change(stamp) => {
                    self.record[sectors.start as usize..sectors.end as usize].fill(stamp);
                    sectors.for_each(|sector| drop(self.doubts.remove(&sector)));
                }
                Purpose::Flush => self.flushed += 1,
            }
            self.done += 1;
        }
    }

    /// What the disk holds now.
    pub fn snapshot(&self) -> Vec<u64> {
        assert!(self.pending.is_empty());
        self.record.clone()
    }

    /// The disk is what it was.
    pub fn restore(&mut self, record: Vec<u64>) {
        assert!(self.pending.is_empty());
        self.record = record;
    }

    /// These bytes are lost and have become zeros, or the base image's.
    pub fn lose(&mut self, bytes: Range<u64>, to_base: bool) {
        let (first, end) = (bytes.start as usize / SECTOR, bytes.end as usize / SECTOR);
        self.record[first..end].fill(if to_base { BASE } else { 0 });
    }

    fn answered(&mut self) {
        if !self.paused {
            self.stall = self.stall.max(self.waits_since.elapsed());
        }
        self.waits_since = Instant::now();
    }

    /// The vCPUs run (again).
    pub fn resume(&mut self) {
        (self.paused, self.waits_since) = (false, Instant::now());
    }

    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// What waits, for a message.
    pub fn waiting(&self) -> String {
        let mut all: Vec<_> = self.pending.iter().collect();
        all.sort_by_key(|(head, _)| **head);
        format!("{all:?}")
    }

    /// A random number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.rng.next_u64() % end
    }
}
