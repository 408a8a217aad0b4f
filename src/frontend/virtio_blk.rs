// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a descriptor chain to what it asks for (virtio 1.2, 2.7.5 and 5.2.6).
//!
//! A chain is a list of readable ranges followed by a list of writable ones. The request header is the first 16
//! readable bytes, the status is the last writable byte, the data is what is between; how the bytes are cut into
//! descriptors means nothing. All of it is the guest's: a chain may loop, point outside memory, turn from writable
//! back to readable, be too short, or change while it is read. Each descriptor is therefore read once.
//!
//! Two kinds of wrong. If the chain ends in a writable byte, the guest can be told: IOERR. If not (a loop, an index
//! past the table, no writable byte), nobody can say where the chain ends: a [`ChainError`], which stops the ring.
//! Guessing a status byte would write where the guest did not ask for it.

use super::features::{MAX_DATA, MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS};
use super::memory::{GuestRange, MemoryError, View};
use super::ring_mem::{DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_WRITE, Descriptor, RingMemory};
use crate::core::geometry::SECTOR;
use crate::engine::IoBuf;
use parking_lot::Mutex;
use smallvec::SmallVec;
use std::sync::Arc;
use thiserror::Error;

/// Most descriptors in a chain. A driver may not make one longer than the ring (2.7.5.3.1); rings here have at most
/// 32768, but nothing real uses more than this.
pub(super) const MAX_CHAIN: usize = 2048;
const HEADER: u32 = 16;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const FLAG_UNMAP: u32 = 1;
const ZERO_SEGMENT: usize = 16;
/// Bytes that GET_ID answers.
pub(super) const ID_BYTES: usize = 20;

/// What GET_ID answers (virtio 1.2, 5.2.6.1): shared by the queues, and changed when a disk moves in.
#[derive(Debug, Clone, Default)]
pub(super) struct Serial(Arc<Mutex<[u8; ID_BYTES]>>);

impl Serial {
    /// Cut at 20 bytes, padded with zeros.
    pub(super) fn set(&self, text: &str) {
        let mut bytes = [0u8; ID_BYTES];
        bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        *self.0.lock() = bytes;
    }

    pub(super) fn bytes(&self) -> [u8; ID_BYTES] {
        *self.0.lock()
    }
}

/// Why a ring cannot go on.
#[derive(Debug, Error)]
pub enum ChainError {
    /// A descriptor number past the end of its table.
    #[error("descriptor {0} does not exist")]
    Index(u16),
    /// A loop, or a chain that nothing real would make.
    #[error("the chain has more than {0} descriptors, or loops")]
    TooLong(usize),
    /// An indirect descriptor that is not one table (2.7.5.3).
    #[error("indirect descriptor with length {len} and flags {flags:#x}")]
    Indirect {
        /// Its length.
        len: u32,
        /// Its flags.
        flags: u16,
    },
    /// An indirect table outside guest memory.
    #[error("indirect table: {0}")]
    Table(MemoryError),
    /// No writable byte, so no status can be given.
    #[error("the chain has no writable status byte")]
    NoStatus,
    /// The status byte is not in guest memory.
    #[error("status byte: {0}")]
    Status(MemoryError),
}

/// One range of a discard or write-zeroes request, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroRange {
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The space may be given back.
    pub unmap: bool,
}

/// What a chain asks for. Buffers are checked; offsets are not compared with the disk yet (`volume::request` does).
#[derive(Debug)]
pub enum Action {
    /// Read from this byte of the disk.
    Read(u64, IoBuf),
    /// Write at this byte of the disk.
    Write(u64, IoBuf),
    /// Flush.
    Flush,
    /// Answer with the serial.
    GetId(IoBuf),
    /// Zero these ranges; none of them empty.
    Zero(SmallVec<[ZeroRange; 1]>),
    /// IOERR, for this reason.
    Invalid(&'static str),
    /// UNSUPP.
    Unsupported,
}

/// The ranges of one chain; reused from request to request.
#[derive(Debug, Default)]
pub struct Chain {
    readable: Vec<GuestRange>,
    writable: Vec<GuestRange>,
    /// A readable descriptor came after a writable one.
    disordered: bool,
}

impl Chain {
    /// Reads the chain that starts at `head`, its header and its status byte. Returns what it asks for and a
    /// buffer of the one status byte.
    ///
    /// # Errors
    /// A [`ChainError`]: the ring must stop.
    pub fn parse(
        &mut self,
        ring: &RingMemory,
        view: &View,
        head: u16,
    ) -> Result<(Action, IoBuf), ChainError> {
        self.walk(ring, view, head)?;
        let at = self.take_status().ok_or(ChainError::NoStatus)?;
        let status = view.io_buf(&[at]).map_err(ChainError::Status)?;
        let action = self.action(view);
        self.writable.push(at);
        Ok((action, status))
    }

    /// Gives away the ranges that the request may write, status byte included, and takes an old list to reuse.
    pub fn swap_written(&mut self, list: &mut Vec<GuestRange>) {
        std::mem::swap(&mut self.writable, list);
    }

    /// Empty descriptors mean nothing and are left out.
    fn push(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        if descriptor.len == 0 {
            return Ok(());
        }
        if self.readable.len() + self.writable.len() >= MAX_CHAIN {
            return Err(ChainError::TooLong(MAX_CHAIN));
        }
        let range = GuestRange { address: descriptor.address, len: descriptor.len };
        if descriptor.flags & DESC_WRITE != 0 {
            self.writable.push(range);
        } else {
            self.disordered |= !self.writable.is_empty();
            self.readable.push(range);
        }
        Ok(())
    }

    fn walk(&mut self, ring: &RingMemory, view: &View, head: u16) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        self.disordered = false;
        let mut index = head;
        // A chain can have no more descriptors than the table, or it loops.
        for _ in 0..ring.size() {
            let descriptor = ring.descriptor(index).ok_or(ChainError::Index(index))?;
            if descriptor.flags & DESC_INDIRECT != 0 {
                // Must be the last one; a driver may put direct descriptors before it.
                return self.walk_indirect(view, descriptor);
            }
            self.push(descriptor)?;
            if descriptor.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(ChainError::TooLong(usize::from(ring.size())))
    }

    fn walk_indirect(&mut self, view: &View, table: Descriptor) -> Result<(), ChainError> {
        let wrong = ChainError::Indirect { len: table.len, flags: table.flags };
        if table.len == 0 || !table.len.is_multiple_of(DESC_SIZE) || table.flags & DESC_NEXT != 0 {
            return Err(wrong);
        }
        let count = table.len / DESC_SIZE;
        let mut index = 0u16;
        for _ in 0..MAX_CHAIN {
            if u32::from(index) >= count {
                return Err(ChainError::Index(index));
            }
            let mut words = [[0u8; 8]; 2];
            let at = table.address.wrapping_add(u64::from(index) * u64::from(DESC_SIZE));
            view.read(at, words.as_flattened_mut()).map_err(ChainError::Table)?;
            let [address, rest] = words.map(u64::from_le_bytes);
            let descriptor = Descriptor::from_words(address, rest);
            if descriptor.flags & DESC_INDIRECT != 0 {
                return Err(ChainError::Indirect { len: descriptor.len, flags: descriptor.flags });
            }
            self.push(descriptor)?;
            if descriptor.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(ChainError::TooLong(MAX_CHAIN))
    }

    /// Cuts the last byte off the writable ranges.
    fn take_status(&mut self) -> Option<GuestRange> {
        let last = self.writable.last_mut()?;
        last.len -= 1;
        let address = last.address.wrapping_add(u64::from(last.len));
        if last.len == 0 {
            self.writable.pop();
        }
        Some(GuestRange { address, len: 1 })
    }

    /// Cuts the header off the readable ranges.
    fn take_header(&mut self, view: &View) -> Option<[u8; HEADER as usize]> {
        let mut header = [0u8; HEADER as usize];
        let mut rest = header.as_mut_slice();
        let mut used = 0;
        while !rest.is_empty() {
            let range = self.readable.get_mut(used)?;
            let take = usize::try_from(range.len).ok()?.min(rest.len());
            let (now, later) = rest.split_at_mut(take);
            view.read(range.address, now).ok()?;
            rest = later;
            let taken = u32::try_from(take).ok()?;
            range.address = range.address.wrapping_add(u64::from(taken));
            range.len -= taken;
            used += usize::from(range.len == 0);
        }
        self.readable.drain(..used);
        Some(header)
    }

    fn action(&mut self, view: &View) -> Action {
        if self.disordered {
            return Action::Invalid("a readable descriptor follows a writable one");
        }
        let Some(header) = self.take_header(view) else {
            return Action::Invalid("no header of 16 readable bytes");
        };
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
        let kind = word(0);
        let data = match kind {
            T_IN | T_GET_ID => &self.writable,
            _ => &self.readable,
        };
        if data.iter().map(|range| u64::from(range.len)).sum::<u64>() > MAX_DATA {
            return Action::Invalid("more data than a request may carry");
        }
        let Ok(buf) = view.io_buf(data) else { return Action::Invalid("data outside guest memory") };
        let Some(offset) = sector.checked_mul(SECTOR) else { return Action::Invalid("sector past the end") };
        match kind {
            T_IN if self.readable.is_empty() => Action::Read(offset, buf),
            T_IN => Action::Invalid("a read with data to write"),
            T_OUT if self.writable.is_empty() => Action::Write(offset, buf),
            T_OUT => Action::Invalid("a write with room for data"),
            T_FLUSH => Action::Flush,
            T_GET_ID => Action::GetId(buf),
            T_DISCARD | T_WRITE_ZEROES => zero_action(kind == T_DISCARD, &buf),
            _ => Action::Unsupported,
        }
    }
}

/// The segments of a discard or write-zeroes request (virtio 1.2, 5.2.6: `virtio_blk_discard_write_zeroes`).
fn zero_action(discard: bool, data: &IoBuf) -> Action {
    let most = ZERO_SEGMENT * MAX_ZERO_SEGMENTS as usize;
    if data.is_empty() || data.len() > most || !data.len().is_multiple_of(ZERO_SEGMENT) {
        return Action::Invalid("discard or write-zeroes with a wrong number of segments");
    }
    let bytes = data.to_vec();
    let mut ranges = SmallVec::new();
    for segment in bytes.as_chunks::<ZERO_SEGMENT>().0 {
        let [sector, rest] = [&segment[..8], &segment[8..]]
            .map(|half| half.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte)));
        let (sectors, flags) = (rest & u64::from(u32::MAX), rest >> 32);
        let unmap = flags & u64::from(FLAG_UNMAP) != 0;
        // Reserved flags, and unmap on a discard, must be answered with UNSUPP (5.2.6.2).
        if flags & !u64::from(FLAG_UNMAP) != 0 || (discard && unmap) {
            return Action::Unsupported;
        }
        let offset = sector.checked_mul(SECTOR);
        let Some(offset) = offset.filter(|_| sectors <= u64::from(MAX_ZERO_SECTORS)) else {
            return Action::Invalid("discard or write-zeroes past the limits");
        };
        if sectors > 0 {
            ranges.push(ZeroRange { offset, len: sectors * SECTOR, unmap: discard || unmap });
        }
    }
    Action::Zero(ranges)
}

#[cfg(test)]
#[path = "virtio_blk_tests.rs"]
mod tests;
