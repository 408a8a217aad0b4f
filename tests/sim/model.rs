// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest may see: for each block the values that a read may return.
//!
//! Normally that is the last acknowledged write, and beside it a write that is under way. After a crash of the
//! host of the owner it is any value since the last acknowledged flush, until a read has shown which.

#[derive(Debug, Clone, Default)]
struct Cell {
    allowed: Vec<u64>,
    /// What a crash of the owner's host leaves at least.
    durable: Vec<u64>,
    /// Acknowledged since: number of the acknowledgement, value.
    since: Vec<(u64, u64)>,
    writing: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Model {
    cells: Vec<Cell>,
    acked: u64,
}

impl Model {
    pub(crate) fn new(initial: impl Iterator<Item = u64>) -> Self {
        let cell = |value| Cell { allowed: vec![value], durable: vec![value], ..Cell::default() };
        Self { cells: initial.map(cell).collect(), acked: 0 }
    }

    pub(crate) fn writing(&self, block: usize) -> bool {
        self.cells[block].writing.is_some()
    }

    pub(crate) fn begin(&mut self, block: usize, value: u64) {
        self.cells[block].writing = Some(value);
    }

    pub(crate) fn acknowledge(&mut self, block: usize) {
        self.acked += 1;
        let cell = &mut self.cells[block];
        if let Some(value) = cell.writing.take() {
            cell.allowed = vec![value];
            cell.since.push((self.acked, value));
        }
    }

    /// What a read returned; false if it must not.
    pub(crate) fn read(&mut self, block: usize, value: u64) -> bool {
        let cell = &mut self.cells[block];
        if cell.writing == Some(value) {
            return true;
        }
        if !cell.allowed.contains(&value) {
            return false;
        }
        if cell.writing.is_none() && cell.allowed.len() > 1 {
            cell.allowed = vec![value];
            cell.durable = vec![value];
        }
        true
    }

    pub(crate) fn expected(&self, block: usize) -> String {
        format!("{:x?}", self.cells[block])
    }

    /// A flush begins: covers what is acknowledged now.
    pub(crate) fn flush_mark(&self) -> u64 {
        self.acked
    }

    pub(crate) fn flushed(&mut self, mark: u64) {
        for cell in &mut self.cells {
            if let Some((_, value)) = cell.since.iter().rev().find(|(at, _)| *at <= mark) {
                cell.durable = vec![*value];
                cell.since.retain(|(at, _)| *at > mark);
            }
        }
    }

    /// The owner's host went down. Writes under way are lost or not.
    pub(crate) fn host_crash(&mut self) {
        for cell in &mut self.cells {
            let writing = cell.writing.take();
            let since = cell.since.drain(..).map(|(_, value)| value);
            let more: Vec<u64> = cell.durable.iter().copied().chain(since).chain(writing).collect();
            for value in more {
                if !cell.allowed.contains(&value) {
                    cell.allowed.push(value);
                }
            }
            cell.durable = cell.allowed.clone();
        }
    }
}
