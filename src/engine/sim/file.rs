// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An open file of a simulated disk: operations that take time, for engines, and such that are done at once.

use super::inode::Inode;
use super::{Reply, SimDisk, gone, place};
use crate::engine::{FileId, Op};
use std::io;

/// An open file of a [`SimDisk`].
#[derive(Debug, Clone)]
pub struct SimFile {
    pub(super) disk: SimDisk,
    pub(super) inode: usize,
}

impl SimFile {
    /// Starts an operation; `reply` is called when it has ended, and never if the process dies before.
    pub(in crate::engine) fn start(&self, tag: u64, op: Op, reply: Reply) {
        let mut state = self.disk.state.lock();
        if state.life == self.disk.life {
            state.begin(self.inode, tag, op, reply);
        }
    }

    pub(super) fn disk(&self) -> &SimDisk {
        &self.disk
    }

    /// A change at once, as metadata is written.
    fn at_once<T>(&self, no_space: bool, change: impl FnOnce(&mut Inode, bool) -> T) -> io::Result<T> {
        let mut state = self.disk.state.lock();
        let fails = state.plan.meta_fails;
        let stepped = state.step(self.disk.life, fails, no_space);
        if state.life != self.disk.life {
            return Err(stepped.err().unwrap_or_else(gone));
        }
        let done = change(&mut state.inodes[self.inode], stepped.is_ok());
        stepped.map(|()| done)
    }

    /// Fills `buf` from `offset`; returns how many bytes there were before the end.
    #[allow(clippy::must_use_candidate, reason = "most callers know how long the file is")]
    pub fn read_now(&self, buf: &mut [u8], offset: u64) -> usize {
        self.disk.state.lock().inodes[self.inode].read(place(offset, 0), buf)
    }

    /// Writes all of `bytes`, or fails and has written half of them.
    ///
    /// # Errors
    /// The process is gone, or a fault.
    pub fn write_now(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.at_once(true, |inode, ok| {
            let part = if ok { bytes } else { &bytes[..bytes.len() / 2] };
            inode.write(place(offset, 0), part);
        })
    }

    /// `fdatasync`.
    ///
    /// # Errors
    /// As [`write_now`](Self::write_now); the content is then lost to every later sync.
    pub fn sync_now(&self) -> io::Result<()> {
        self.at_once(false, |inode, ok| {
            let all = inode.snapshot();
            if ok { inode.make_durable(&all, true) } else { inode.forget(&all) }
        })
    }

    /// Zeroes a range, without changing the length.
    ///
    /// # Errors
    /// As [`write_now`](Self::write_now); nothing has changed then.
    pub fn punch_now(&self, offset: u64, len: u64) -> io::Result<()> {
        self.at_once(true, |inode, ok| {
            if ok {
                inode.zero(place(offset, 0), place(len, 0));
            }
        })
    }

    /// Cuts, or grows with zeros.
    ///
    /// # Errors
    /// As [`write_now`](Self::write_now); nothing has changed then.
    pub fn set_len_now(&self, len: u64) -> io::Result<()> {
        self.at_once(true, |inode, ok| {
            if ok {
                inode.set_len(place(len, 0));
            }
        })
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.disk.state.lock().inodes[self.inode].len() as u64
    }

    /// Whether it has no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a sync has failed since the host booted and thrown something away that reads well.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        self.disk.state.lock().inodes[self.inode].has_lost()
    }

    /// Whether a range has zeros only, or lies past the end.
    #[must_use]
    pub fn is_hole(&self, offset: u64, len: u64) -> bool {
        self.disk.state.lock().inodes[self.inode].is_zero(place(offset, 0), place(len, 0))
    }
}

/// Files by the numbers that an engine gives them.
#[derive(Debug, Default)]
pub(in crate::engine) struct Files(Vec<SimFile>);

impl Files {
    pub(in crate::engine) fn add(&mut self, file: &SimFile) -> FileId {
        self.0.push(file.clone());
        FileId(u32::try_from(self.0.len() - 1).unwrap_or(u32::MAX))
    }

    pub(in crate::engine) fn get(&self, id: FileId) -> Option<&SimFile> {
        self.0.get(id.0 as usize)
    }
}
