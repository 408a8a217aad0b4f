// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The companion thread's engine: file I/O as futures on a tokio current-thread runtime.
//!
//! It has a ring of its own with an eventfd, which tokio polls; one task takes completions out and wakes whoever
//! waits. A future that is dropped forgets the result and nothing else: the ring's table keeps the buffer until the
//! kernel is done. `tokio::fs` was rejected: a thread hop for each operation, a pool of threads that may all hang on
//! one slow disk, and buffers copied.

use super::sim::Files;
use super::uring::{Ring, Waiter};
use super::{AnyFile, Completion, Event, FileId, IoBuf, Op};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// Asynchronous file I/O for the tokio thread. Dropping it ends its task; what is in flight is waited for then.
#[derive(Debug)]
pub struct CompanionEngine(Kind);

#[derive(Debug)]
enum Kind {
    Ring {
        shared: Arc<Mutex<Shared>>,
        driver: JoinHandle<()>,
    },
    /// On a simulated disk, which reports by itself.
    Sim {
        files: Mutex<Files>,
        in_flight: Arc<AtomicU32>,
    },
}

struct Shared {
    ring: Ring,
    waiting: HashMap<u64, oneshot::Sender<Completion>>,
    next_tag: u64,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in flight", self.ring.in_flight())
    }
}

impl Shared {
    fn start(&mut self, op: Op) -> io::Result<oneshot::Receiver<Completion>> {
        let (sender, receiver) = oneshot::channel();
        self.next_tag += 1;
        self.waiting.insert(self.next_tag, sender);
        self.ring.submit(self.next_tag, op);
        self.ring.flush()?;
        // What needed no kernel (an operation that was refused) is told now: no eventfd will.
        self.deliver();
        Ok(receiver)
    }

    fn deliver(&mut self) {
        while let Some(event) = self.ring.next() {
            if let Event::Done(done) = event
                && let Some(sender) = self.waiting.remove(&done.tag)
            {
                // Nobody waits any more: the buffer ends here, after the kernel is done with it.
                drop(sender.send(done));
            }
        }
    }
}

impl CompanionEngine {
    /// An engine for about `entries` operations at a time. Call it inside a tokio runtime, and drop it there.
    ///
    /// # Errors
    /// The kernel's refusal of an io_uring or an eventfd.
    ///
    /// # Panics
    /// As [`tokio::spawn`] does, outside a runtime with I/O.
    pub fn new(entries: u32) -> io::Result<Self> {
        let ring = Ring::new(entries, Waiter::Eventfd)?;
        let eventfd = ring.eventfd()?;
        let shared = Arc::new(Mutex::new(Shared { ring, waiting: HashMap::new(), next_tag: 0 }));
        let driver = tokio::spawn(drive(Arc::clone(&shared), eventfd));
        Ok(Self(Kind::Ring { shared, driver }))
    }

    /// An engine for files of a simulated disk. It needs no runtime: its futures wake whoever polls them.
    #[must_use]
    pub fn simulated() -> Self {
        Self(Kind::Sim { files: Mutex::default(), in_flight: Arc::default() })
    }

    /// Whether it is for a simulated disk.
    #[must_use]
    pub fn is_simulated(&self) -> bool {
        matches!(self.0, Kind::Sim { .. })
    }

    /// Makes a file known, with its direct twin if it has one; the engine holds both open.
    ///
    /// # Errors
    /// The engine knows too many files already, or the file is of the other kind.
    pub fn register_file(&self, file: AnyFile<'_>) -> io::Result<FileId> {
        match (&self.0, file) {
            (Kind::Ring { shared, .. }, AnyFile::Kernel { file, direct }) => {
                shared.lock().ring.register_file(file, direct)
            }
            (Kind::Sim { files, .. }, AnyFile::Simulated(file)) => Ok(files.lock().add(file)),
            _ => Err(AnyFile::other_kind()),
        }
    }

    /// Fills `buf` from the file and gives it back.
    pub async fn read(&self, file: FileId, offset: u64, buf: IoBuf) -> (io::Result<()>, IoBuf) {
        self.transfer(Op::Read { file, offset, buf }).await
    }

    /// Writes all of `buf` to the file and gives it back.
    pub async fn write(&self, file: FileId, offset: u64, buf: IoBuf) -> (io::Result<()>, IoBuf) {
        self.transfer(Op::Write { file, offset, buf }).await
    }

    /// `fdatasync` of the file: see [`Op::Sync`].
    ///
    /// # Errors
    /// The kernel's; after one, what was written before may be lost although a later sync succeeds.
    pub async fn sync(&self, file: FileId) -> io::Result<()> {
        self.run(Op::Sync { file }).await?.result
    }

    /// Makes the range a hole: see [`Op::Punch`].
    ///
    /// # Errors
    /// The kernel's; `Unsupported` on a file system without holes.
    pub async fn punch(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.run(Op::Punch { file, offset, len }).await?.result
    }

    /// Makes the range zeros: see [`Op::ZeroRange`].
    ///
    /// # Errors
    /// The kernel's.
    pub async fn zero_range(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.run(Op::ZeroRange { file, offset, len }).await?.result
    }

    /// Number of operations in flight.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        match &self.0 {
            Kind::Ring { shared, .. } => shared.lock().ring.in_flight(),
            Kind::Sim { in_flight, .. } => in_flight.load(Ordering::Relaxed),
        }
    }

    async fn transfer(&self, op: Op) -> (io::Result<()>, IoBuf) {
        match self.run(op).await {
            Ok(done) => (done.result, done.op.into_buf().unwrap_or_else(|| IoBuf::zeroed(0))),
            Err(error) => (Err(error), IoBuf::zeroed(0)),
        }
    }

    async fn run(&self, op: Op) -> io::Result<Completion> {
        let receiver = match &self.0 {
            Kind::Ring { shared, .. } => shared.lock().start(op)?,
            Kind::Sim { files, in_flight } => {
                let (sender, receiver) = oneshot::channel();
                let file = files.lock().get(op.file()).cloned().ok_or_else(AnyFile::other_kind)?;
                in_flight.fetch_add(1, Ordering::Relaxed);
                let left = Arc::clone(in_flight);
                let reply = move |done| {
                    left.fetch_sub(1, Ordering::Relaxed);
                    // Nobody waits any more.
                    drop(sender.send(done));
                };
                file.start(0, op, Box::new(reply));
                receiver
            }
        };
        receiver.await.map_err(|_| io::Error::other("the I/O engine of the companion thread has ended"))
    }
}

impl Drop for CompanionEngine {
    fn drop(&mut self) {
        if let Kind::Ring { driver, .. } = &self.0 {
            driver.abort();
        }
    }
}

/// Takes completions out whenever the eventfd says that there are some.
async fn drive(shared: Arc<Mutex<Shared>>, eventfd: AsyncFd<EventFd>) {
    loop {
        let Ok(mut ready) = eventfd.readable().await else { return };
        // Read before draining: a completion that comes after the drain signals again.
        let outcome = ready.try_io(|fd| fd.get_ref().read());
        if matches!(outcome, Ok(Err(_))) {
            log::error!("the companion engine cannot read its eventfd");
            return;
        }
        let mut shared = shared.lock();
        shared.deliver();
        // Operations that go on (a short transfer) were queued while draining.
        if let Err(error) = shared.ring.flush() {
            log::error!("the companion engine cannot submit: {error}");
        }
    }
}

#[cfg(test)]
#[path = "companion_tests.rs"]
mod tests;
