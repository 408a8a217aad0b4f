// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One file of a simulated disk: what processes see of it, and what a loss of power leaves.
//!
//! Each sector has the number of its last change and the number of the change that counts as durable. A sector is
//! dirty while they differ. A sync that failed makes them equal and leaves the durable content old: that is how a
//! kernel lies.

use super::SIM_SECTOR;
use crate::engine::IoBuf;
use std::io;
use std::ops::Range;

#[derive(Debug, Clone, Copy, Default)]
struct Sector {
    changed: u32,
    durable: u32,
}

#[derive(Debug, Default)]
pub(super) struct Inode {
    cached: Vec<u8>,
    durable: Vec<u8>,
    sectors: Vec<Sector>,
    changes: u32,
    lost: bool,
}

/// What was dirty at some time: sector, change, content.
#[derive(Debug)]
pub(super) struct Snapshot {
    len: usize,
    sectors: Vec<(usize, u32, Box<[u8]>)>,
}

fn bytes_of(sector: usize, len: usize) -> Range<usize> {
    let start = (sector * SIM_SECTOR).min(len);
    start..(start + SIM_SECTOR).min(len)
}

/// `Vec::resize` with zeros, but fast in unoptimised builds too.
fn set_len(content: &mut Vec<u8>, len: usize) {
    match len.checked_sub(content.len()) {
        Some(more) => content.append(&mut vec![0; more]),
        None => content.truncate(len),
    }
}

/// Puts the bytes of a sector into place.
fn put(content: &mut Vec<u8>, sector: usize, bytes: &[u8]) {
    let start = sector * SIM_SECTOR;
    if content.len() < start + bytes.len() {
        set_len(content, start + bytes.len());
    }
    content[start..start + bytes.len()].copy_from_slice(bytes);
}

impl Inode {
    pub(super) fn len(&self) -> usize {
        self.cached.len()
    }

    /// The range has changed: its sectors.
    fn touch(&mut self, range: Range<usize>) -> Range<usize> {
        self.changes += 1;
        let sectors = range.start / SIM_SECTOR..range.end.div_ceil(SIM_SECTOR);
        if self.sectors.len() < sectors.end {
            self.sectors.resize(sectors.end, Sector::default());
        }
        for sector in &mut self.sectors[sectors.clone()] {
            sector.changed = self.changes;
        }
        sectors
    }

    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) -> Range<usize> {
        let range = at..at + bytes.len();
        if self.cached.len() < range.end {
            set_len(&mut self.cached, range.end);
        }
        self.cached[range.clone()].copy_from_slice(bytes);
        self.touch(range)
    }

    pub(super) fn zero(&mut self, at: usize, len: usize) -> Range<usize> {
        let start = at.min(self.cached.len());
        let range = start..start.saturating_add(len).min(self.cached.len());
        self.cached[range.clone()].fill(0);
        self.touch(range)
    }

    pub(super) fn set_len(&mut self, len: usize) {
        let (old, new) = (self.cached.len().min(len), self.cached.len().max(len));
        set_len(&mut self.cached, len);
        self.touch(old..new);
    }

    pub(super) fn read(&self, at: usize, buf: &mut [u8]) -> usize {
        let rest = self.cached.get(at..).unwrap_or_default();
        let count = rest.len().min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        count
    }

    /// The bytes `from..upto` of a transfer of `buf`.
    pub(super) fn read_into(&self, offset: u64, buf: &IoBuf, from: usize, upto: usize) -> io::Result<()> {
        let at = super::place(offset, from);
        let wanted = at..at.saturating_add(upto.saturating_sub(from));
        let Some(bytes) = self.cached.get(wanted) else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        buf.slice(from, bytes.len()).copy_from(bytes);
        Ok(())
    }

    pub(super) fn is_zero(&self, at: usize, len: usize) -> bool {
        let start = at.min(self.cached.len());
        let end = start.saturating_add(len).min(self.cached.len());
        self.cached[start..end].iter().all(|byte| *byte == 0)
    }

    fn content(&self, sector: usize) -> &[u8] {
        &self.cached[bytes_of(sector, self.cached.len())]
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let dirty = self.sectors.iter().enumerate().filter(|(_, sector)| sector.changed != sector.durable);
        let sectors = dirty.map(|(at, sector)| (at, sector.changed, self.content(at).into()));
        Snapshot { len: self.cached.len(), sectors: sectors.collect() }
    }

    /// Makes durable what a snapshot has, `late` as it is now; never goes back.
    pub(super) fn make_durable(&mut self, snapshot: &Snapshot, late: bool) {
        set_len(&mut self.durable, if late { self.cached.len() } else { snapshot.len });
        for (at, change, then) in &snapshot.sectors {
            let now: Box<[u8]>;
            let (change, bytes) = if late {
                now = self.content(*at).into();
                (self.sectors[*at].changed, &now)
            } else {
                (*change, then)
            };
            if change > self.sectors[*at].durable {
                self.sectors[*at].durable = change;
                put(&mut self.durable, *at, bytes);
            }
        }
    }

    /// A sync has failed: the sectors count as clean, and are not on the disk.
    pub(super) fn forget(&mut self, snapshot: &Snapshot) {
        self.lost |= !snapshot.sectors.is_empty();
        for (at, change, _) in &snapshot.sectors {
            let sector = &mut self.sectors[*at];
            sector.durable = sector.durable.max(*change);
        }
    }

    pub(super) fn has_lost(&self) -> bool {
        self.lost
    }

    /// The kernel has written sectors by itself.
    pub(super) fn write_back(&mut self, sectors: Range<usize>) {
        for at in sectors {
            let bytes: Box<[u8]> = self.content(at).into();
            if self.sectors[at].changed > self.sectors[at].durable {
                self.sectors[at].durable = self.sectors[at].changed;
                put(&mut self.durable, at, &bytes);
            }
        }
    }

    /// Power is lost; `length` says whether the new length was on the disk, `keeps` draws for each dirty sector.
    pub(super) fn crash(&mut self, length: bool, mut keeps: impl FnMut() -> bool) {
        if length {
            set_len(&mut self.durable, self.cached.len());
        }
        let len = self.durable.len();
        for at in 0..self.sectors.len() {
            let sector = self.sectors[at];
            if sector.changed != sector.durable && keeps() {
                let bytes = self.content(at).to_vec();
                let room = bytes_of(at, len);
                let count = room.len().min(bytes.len());
                self.durable[room.start..room.start + count].copy_from_slice(&bytes[..count]);
            }
        }
        self.cached.clone_from(&self.durable);
        self.sectors.clear();
        self.sectors.resize(self.cached.len().div_ceil(SIM_SECTOR), Sector::default());
        self.changes = 0;
        self.lost = false;
    }
}
