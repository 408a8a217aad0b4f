// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest may see: for each sector the values that a read may return.
//!
//! A value is the number of the write that it comes from, and fills its sector. Normally a sector has one value: that of
//! the last acknowledged write. A write that failed leaves two, until a read shows which. A crash of the owner's host
//! leaves any value since the last flush that was acknowledged, until a read shows which. Beside these a read may
//! return what was being written at any time while it was under way.

use smallvec::{SmallVec, smallvec};
use std::collections::BTreeMap;
use std::ops::Range;

type Values = SmallVec<[u64; 2]>;

#[derive(Debug, Clone, Default)]
struct Cell {
    /// What is there.
    now: Values,
    /// What a crash of the owner's host leaves at least.
    durable: Values,
    /// What has been there since, with the number of the acknowledgement.
    since: SmallVec<[(u64, Values); 2]>,
    writing: Option<u64>,
    /// Number of the last change of any of this.
    change: u64,
}

/// A read that is under way.
#[derive(Debug)]
struct Reading {
    sectors: Range<usize>,
    /// What was there when it began, and the change that made it so.
    began: Vec<(Values, u64)>,
    /// What has been written since.
    came: Vec<u64>,
}

#[derive(Debug)]
pub(crate) struct Oracle {
    cells: Vec<Cell>,
    readings: BTreeMap<u64, Reading>,
    acked: u64,
    changes: u64,
}

fn join(values: &mut Values, more: impl IntoIterator<Item = u64>) {
    for value in more {
        if !values.contains(&value) {
            values.push(value);
        }
    }
}

impl Oracle {
    pub(crate) fn new(initial: impl Iterator<Item = u64>) -> Self {
        let cell = |value| Cell { now: smallvec![value], durable: smallvec![value], ..Cell::default() };
        Self { cells: initial.map(cell).collect(), readings: BTreeMap::new(), acked: 0, changes: 0 }
    }

    pub(crate) fn is_writing(&self, sectors: Range<usize>) -> bool {
        self.cells[sectors].iter().any(|cell| cell.writing.is_some())
    }

    pub(crate) fn begin(&mut self, sectors: Range<usize>, value: u64) {
        self.changes += 1;
        for cell in &mut self.cells[sectors.clone()] {
            cell.writing = Some(value);
            cell.change = self.changes;
        }
        for reading in self.readings.values_mut() {
            if reading.sectors.start < sectors.end && sectors.start < reading.sectors.end {
                reading.came.push(value);
            }
        }
    }

    /// A write has ended; `stable` when that alone makes it durable.
    pub(crate) fn end(&mut self, sectors: Range<usize>, ok: bool, stable: bool) {
        self.changes += 1;
        self.acked += 1;
        for cell in &mut self.cells[sectors] {
            let Some(value) = cell.writing.take() else { continue };
            cell.change = self.changes;
            if ok {
                cell.now = smallvec![value];
            } else {
                join(&mut cell.now, [value]);
            }
            if ok && stable {
                cell.durable = cell.now.clone();
                cell.since.clear();
            } else {
                cell.since.push((self.acked, cell.now.clone()));
            }
        }
    }

    pub(crate) fn begin_read(&mut self, id: u64, sectors: Range<usize>) {
        let began = |cell: &Cell| {
            let mut values = cell.now.clone();
            join(&mut values, cell.writing);
            (values, cell.change)
        };
        let began = self.cells[sectors.clone()].iter().map(began).collect();
        self.readings.insert(id, Reading { sectors, began, came: Vec::new() });
    }

    pub(crate) fn drop_read(&mut self, id: u64) {
        self.readings.remove(&id);
    }

    /// What a read returned, sector by sector; else the first sector that must not be so, and why.
    pub(crate) fn end_read(&mut self, id: u64, values: &[u64]) -> Result<(), String> {
        let Some(reading) = self.readings.remove(&id) else { return Err("no such read".to_owned()) };
        for ((sector, value), (began, change)) in reading.sectors.zip(values).zip(reading.began) {
            if !began.contains(value) && !reading.came.contains(value) {
                let cell = &self.cells[sector];
                return Err(format!(
                    "sector {sector} has {value:#x}, not one of {began:x?} or {:x?}: {cell:x?}",
                    reading.came
                ));
            }
            let cell = &mut self.cells[sector];
            if cell.change == change && cell.writing.is_none() && cell.now.len() > 1 {
                cell.now = smallvec![*value];
                if cell.since.is_empty() {
                    cell.durable = cell.now.clone();
                }
            }
        }
        Ok(())
    }

    /// A flush begins: it covers what is acknowledged now.
    pub(crate) fn flush_mark(&self) -> u64 {
        self.acked
    }

    pub(crate) fn flushed(&mut self, mark: u64) {
        for cell in &mut self.cells {
            let covered = cell.since.iter().rposition(|(at, _)| *at <= mark);
            if let Some(covered) = covered {
                cell.durable = cell.since[covered].1.clone();
                cell.since.drain(..=covered);
            }
        }
    }

    /// The owner's host went down. Writes under way are lost or not; so is all that was not flushed.
    pub(crate) fn host_crash(&mut self) {
        self.changes += 1;
        self.readings.clear();
        for cell in &mut self.cells {
            let mut values = std::mem::take(&mut cell.durable);
            join(&mut values, cell.since.drain(..).flat_map(|(_, values)| values));
            join(&mut values, cell.now.iter().copied());
            join(&mut values, cell.writing.take());
            cell.durable = values.clone();
            cell.now = values;
            cell.change = self.changes;
        }
    }

    /// The guest is gone, and what it was writing is there or not.
    pub(crate) fn guest_gone(&mut self) {
        self.changes += 1;
        self.acked += 1;
        self.readings.clear();
        for cell in &mut self.cells {
            if let Some(value) = cell.writing.take() {
                join(&mut cell.now, [value]);
                cell.since.push((self.acked, cell.now.clone()));
                cell.change = self.changes;
            }
        }
    }
}

#[test]
fn the_oracle_knows_what_a_disk_may_do() {
    let mut oracle = Oracle::new([1, 1, 1].into_iter());
    let read = |oracle: &mut Oracle, values: &[u64]| {
        oracle.begin_read(7, 0..values.len());
        oracle.end_read(7, values).is_ok()
    };
    oracle.begin(0..2, 5);
    assert!(read(&mut oracle, &[1, 5, 1]) && !read(&mut oracle, &[1, 5, 5]));
    oracle.begin_read(8, 0..1);
    oracle.end(0..2, true, false);
    assert!(!read(&mut oracle, &[1, 5, 1]), "stale");
    assert!(oracle.end_read(8, &[1]).is_ok(), "it had begun before");
    let mark = oracle.flush_mark();
    oracle.begin(0..1, 6);
    oracle.end(0..1, true, false);
    oracle.flushed(mark);
    oracle.host_crash();
    assert!(!read(&mut oracle, &[1, 5, 1]), "flushed");
    assert!(read(&mut oracle, &[5, 5, 1]) && !read(&mut oracle, &[6, 5, 1]), "stable once read");
    oracle.begin(1..3, 9);
    oracle.end(1..3, false, false);
    assert!(read(&mut oracle, &[5, 9, 1]) && !read(&mut oracle, &[5, 5, 1]));
    oracle.begin(0..1, 10);
    oracle.end(0..1, true, true);
    oracle.host_crash();
    assert!(!read(&mut oracle, &[5, 9, 1]), "written through");
}
