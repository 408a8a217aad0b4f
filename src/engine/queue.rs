// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engine of a queue thread: an io_uring, or its twin on a simulated disk. Which one follows from the file.

use super::{AnyFile, Event, FileId, IoBuf, Op, SimQueue, UringEngine};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// See the module's header; the calls are those of [`UringEngine`].
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one for each queue, and no pointer should be on its path"
)]
pub enum QueueEngine {
    /// The kernel's.
    Uring(UringEngine),
    /// For files of a simulated disk.
    Sim(SimQueue),
}

impl QueueEngine {
    /// An engine for about `entries` operations at a time on files like this one.
    ///
    /// # Errors
    /// As [`UringEngine::new`].
    pub fn new(entries: u32, file: AnyFile<'_>) -> io::Result<Self> {
        match file {
            AnyFile::Kernel { .. } => UringEngine::new(entries).map(Self::Uring),
            AnyFile::Simulated(_) => Ok(Self::Sim(SimQueue::default())),
        }
    }

    /// Makes a file known; the engine holds it open.
    ///
    /// # Errors
    /// The engine knows too many files already, or the file is of the other kind.
    pub fn register_file(&mut self, file: AnyFile<'_>) -> io::Result<FileId> {
        match (self, file) {
            (Self::Uring(engine), AnyFile::Kernel { file, direct }) => engine.register_file(file, direct),
            (Self::Sim(engine), AnyFile::Simulated(file)) => Ok(engine.register(file)),
            _ => Err(AnyFile::other_kind()),
        }
    }

    /// As [`UringEngine::register_memory`].
    ///
    /// # Errors
    /// As there.
    pub fn register_memory(&mut self, memory: Option<IoBuf>) -> io::Result<()> {
        match self {
            Self::Uring(engine) => engine.register_memory(memory),
            Self::Sim(_) => Ok(()),
        }
    }

    /// As [`UringEngine::submit`].
    pub fn submit(&mut self, tag: u64, op: Op) {
        match self {
            Self::Uring(engine) => engine.submit(tag, op),
            Self::Sim(engine) => engine.submit(tag, op),
        }
    }

    /// As [`UringEngine::poll_fd`].
    ///
    /// # Errors
    /// As there.
    pub fn poll_fd(&mut self, fd: BorrowedFd<'_>, key: u32, weight: u32) -> io::Result<()> {
        match self {
            Self::Uring(engine) => engine.poll_fd(fd, key, weight),
            Self::Sim(_) => Ok(()),
        }
    }

    /// As [`UringEngine::unpoll`].
    ///
    /// # Errors
    /// As there.
    pub fn unpoll(&mut self, key: u32) -> io::Result<()> {
        match self {
            Self::Uring(engine) => engine.unpoll(key),
            Self::Sim(_) => Ok(()),
        }
    }

    /// As [`UringEngine::enter`]; on a simulated disk it never waits.
    ///
    /// # Errors
    /// As there.
    pub fn enter(&mut self, min_complete: u32, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Uring(engine) => engine.enter(min_complete, timeout),
            Self::Sim(engine) => {
                engine.enter();
                Ok(())
            }
        }
    }

    /// As [`UringEngine::next`].
    #[allow(clippy::should_implement_trait, reason = "the caller submits between two events: no iterator")]
    pub fn next(&mut self) -> Option<Event> {
        match self {
            Self::Uring(engine) => engine.next(),
            Self::Sim(engine) => engine.next(),
        }
    }

    /// As [`UringEngine::has_news`].
    #[must_use]
    pub fn has_news(&mut self) -> bool {
        match self {
            Self::Uring(engine) => engine.has_news(),
            Self::Sim(engine) => engine.has_news(),
        }
    }

    /// As [`UringEngine::in_flight`].
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        match self {
            Self::Uring(engine) => engine.in_flight(),
            Self::Sim(engine) => engine.in_flight(),
        }
    }
}
