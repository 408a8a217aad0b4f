// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Asynchronous file I/O whose operations own their buffers (layer L1).
//!
//! The kernel may touch the memory of an operation until its completion is seen, and a completion may be seen long
//! after whoever asked for it has gone. So an [`Op`] gives its [`IoBuf`] away, the engine's table keeps it, and the
//! [`Completion`] brings it back; no lifetime and no cancelled future can shorten that.
//!
//! A transfer completes whole or with an error: short reads and writes are resubmitted inside, and a transfer that
//! makes no progress is an error (`UnexpectedEof`, `WriteZero`). A caller that treats a short read as a whole one
//! serves the guest stale memory.
//!
//! [`UringEngine`] is for queue threads: one ring, one thread, submit and sleep in one system call.
//! [`CompanionEngine`] is for the tokio thread. They share the operation table and differ only in who waits. One
//! engine shared by all threads was rejected: its lock would be on the path of every request.
//!
//! [`QueueEngine`] and the companion's engine can stand on a simulated disk too ([`SimDisk`]): which it is follows from
//! the file, as an [`AnyFile`].
//!
//! Writes through the page cache may be carried out by kernel workers, in any order: operations that overlap must
//! be ordered by the caller, and a [`Op::Sync`] covers only what had completed when it was submitted.

mod buffer;
mod companion;
mod direct;
mod fixed;
mod queue;
pub mod sim;
mod slot;
mod uring;

pub use buffer::IoBuf;
pub use companion::CompanionEngine;
pub use direct::{DirectAlign, DirectFile};
pub use queue::QueueEngine;
pub use sim::{SimDisk, SimFile, SimPlan, SimQueue};
pub use uring::UringEngine;

use std::fs::File;
use std::io;

/// A file as an engine is told of it.
#[derive(Debug, Clone, Copy)]
pub enum AnyFile<'a> {
    /// A file of this host.
    Kernel {
        /// Its descriptor.
        file: &'a File,
        /// The same past the page cache.
        direct: Option<&'a DirectFile>,
    },
    /// A file of a simulated disk.
    Simulated(&'a SimFile),
}

impl<'a> AnyFile<'a> {
    /// The descriptor of a file that must be real.
    #[cfg(test)]
    pub(crate) fn kernel(self) -> &'a File {
        match self {
            Self::Kernel { file, .. } => file,
            Self::Simulated(file) => unreachable!("{file:?} has no descriptor"),
        }
    }

    fn other_kind() -> io::Error {
        io::Error::new(io::ErrorKind::InvalidInput, "a file that this kind of engine cannot use")
    }
}

/// A file that an engine was told of; valid for that engine only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId(pub u32);

/// One operation on a file. Offsets and lengths are in bytes.
#[derive(Debug)]
pub enum Op {
    /// Fill `buf` from the file. The file ends inside the range: `UnexpectedEof`.
    Read {
        /// The file.
        file: FileId,
        /// Where in the file.
        offset: u64,
        /// What is filled.
        buf: IoBuf,
    },
    /// Write all of `buf` to the file.
    Write {
        /// The file.
        file: FileId,
        /// Where in the file.
        offset: u64,
        /// What is written.
        buf: IoBuf,
    },
    /// `fdatasync`: whatever completed before this was submitted survives a loss of power.
    Sync {
        /// The file.
        file: FileId,
    },
    /// Make the range a hole that reads as zeros, without changing the length of the file
    /// (`FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`).
    Punch {
        /// The file.
        file: FileId,
        /// Where in the file.
        offset: u64,
        /// How many bytes; at least 1.
        len: u64,
    },
    /// Make the range read as zeros and keep its space where the file system can (`FALLOC_FL_ZERO_RANGE |
    /// FALLOC_FL_KEEP_SIZE`); where it cannot, as on tmpfs, the range is punched.
    ZeroRange {
        /// The file.
        file: FileId,
        /// Where in the file.
        offset: u64,
        /// How many bytes; at least 1.
        len: u64,
    },
}

impl Op {
    /// The file that it is about.
    #[must_use]
    pub fn file(&self) -> FileId {
        match self {
            Self::Read { file, .. }
            | Self::Write { file, .. }
            | Self::Sync { file }
            | Self::Punch { file, .. }
            | Self::ZeroRange { file, .. } => *file,
        }
    }

    /// The buffer of a transfer, given back.
    #[must_use]
    pub fn into_buf(self) -> Option<IoBuf> {
        match self {
            Self::Read { buf, .. } | Self::Write { buf, .. } => Some(buf),
            Self::Sync { .. } | Self::Punch { .. } | Self::ZeroRange { .. } => None,
        }
    }
}

/// An operation that the kernel is done with.
#[derive(Debug)]
pub struct Completion {
    /// What the caller named the operation.
    pub tag: u64,
    /// Whole, or failed. After a failed write any part of the range may have been written.
    pub result: io::Result<()>,
    /// The operation with its buffer, which the kernel no longer touches.
    pub op: Op,
}

/// What an engine has to tell.
#[derive(Debug)]
pub enum Event {
    /// An operation is done.
    Done(Completion),
    /// The descriptor that is polled under this key became readable (or failed). It has not been read.
    Ready(u32),
}

#[cfg(test)]
mod direct_tests;
