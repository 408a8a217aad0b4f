// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that a ring has pinned (`IORING_REGISTER_BUFFERS`), so that a transfer need not pin and look up its pages.
//!
//! Guest memory is registered as a whole. That saves CPU for each transfer and costs what it says: all of the
//! guest's RAM stays resident, cannot be swapped, ballooned away or merged, and counts against `RLIMIT_MEMLOCK`.
//! It is therefore a choice of the operator. Only transfers of one segment use it.

use super::IoBuf;
use libc::iovec;
use std::cell::Cell;

/// The kernel refuses longer buffers.
const MAX_BUFFER: usize = 1 << 30;
/// Most buffers that a ring takes.
const MAX_BUFFERS: usize = 16 << 10;

/// The table of registered buffers, sorted by address.
#[derive(Default)]
pub(super) struct FixedMemory {
    buffers: Vec<Buffer>,
    last: Cell<usize>,
    /// Keeps the memory mapped as long as it is registered.
    _keep: Option<IoBuf>,
}

#[derive(Debug, Clone, Copy)]
struct Buffer {
    start: usize,
    end: usize,
    index: u16,
}

impl FixedMemory {
    /// Cuts the memory into buffers that the kernel takes: the table, and what to register in its order.
    pub(super) fn cut(memory: IoBuf) -> (Self, Vec<iovec>) {
        let mut list = Vec::new();
        for segment in memory.segments() {
            let mut at = 0;
            while at < segment.iov_len && list.len() < MAX_BUFFERS {
                let iov_len = (segment.iov_len - at).min(MAX_BUFFER);
                list.push(iovec { iov_base: segment.iov_base.wrapping_byte_add(at), iov_len });
                at += iov_len;
            }
        }
        let mut buffers: Vec<Buffer> = (0u16..)
            .zip(&list)
            .map(|(index, iov)| {
                let start = iov.iov_base.addr();
                Buffer { start, end: start + iov.iov_len, index }
            })
            .collect();
        buffers.sort_by_key(|buffer| buffer.start);
        (Self { buffers, last: Cell::new(0), _keep: Some(memory) }, list)
    }

    /// Whether nothing is registered.
    pub(super) fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// The registered buffer that has all of this memory.
    pub(super) fn find(&self, start: usize, len: usize) -> Option<u16> {
        if self.buffers.is_empty() {
            return None;
        }
        let has = |buffer: &&Buffer| buffer.start <= start && start + len <= buffer.end;
        if let Some(buffer) = self.buffers.get(self.last.get()).filter(has) {
            return Some(buffer.index);
        }
        let at = self.buffers.partition_point(|buffer| buffer.start <= start).checked_sub(1)?;
        let buffer = self.buffers.get(at).filter(has)?;
        self.last.set(at);
        Some(buffer.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_in_the_buffer_that_has_all_of_it() {
        let memory = IoBuf::zeroed(12288);
        let start = memory.segments()[0].iov_base.addr();
        let (fixed, list) = FixedMemory::cut(memory);
        assert_eq!(list.len(), 1);
        assert_eq!(fixed.find(start, 12288), Some(0));
        assert_eq!(fixed.find(start + 4096, 4096), Some(0));
        assert_eq!(fixed.find(start + 4096, 12288), None);
        assert_eq!(fixed.find(start - 1, 2), None);
        assert_eq!(FixedMemory::default().find(start, 1), None);
    }
}
