// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One io_uring and the table of the operations that it carries out.
//!
//! The hazard is memory: from the moment an entry is in the submission queue until its completion is taken out, the
//! kernel may read or write the buffer and read the list of segments. Both live in a slot of the table; a slot is
//! emptied only by its own completion, and dropping the ring first waits for every slot (or, if the kernel refuses
//! to wait, leaks them).
//!
//! A queue thread's ring is set up with `SINGLE_ISSUER | DEFER_TASKRUN`: completions are then worked out inside
//! `enter`, in the thread that wants them, and not by an interrupt of the guest's vCPU. Such a ring must never be
//! polled as a descriptor: nothing would run its completions. The companion's ring is polled through an eventfd and
//! therefore is a plain one.
//!
//! Descriptors are polled with multishot `POLL_ADD`, which reports each wake-up and never reads; reading a kick
//! eventfd would be a system call for each batch, and would make a lost wake-up possible when a poll is armed again.
//! A kick must not wait for the completions that a thread sleeps for: new requests would reach the disk only when old
//! ones have left it. `enter` cannot wait for "one kick or eight completions", so a kick descriptor is polled several
//! times over, and one kick makes as many completions.

use super::direct::DirectFile;
use super::fixed::FixedMemory;
use super::slot::{Slot, Target};
use super::{Completion, Event, FileId, IoBuf, Op};
use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Files that a ring can know: layer and base image, each with a direct twin.
const MAX_FILES: usize = 8;
/// Most bytes of aligned memory that stand in for misaligned memory at a time. What needs more waits; one transfer
/// alone may be larger.
const MAX_BOUNCE: usize = 32 << 20;
/// Marks the user data of a poll: `POLL | generation << 32 | key`.
const POLL: u64 = 1 << 63;
/// User data of entries whose completion means nothing.
const IGNORE: u64 = u64::MAX;
const GENERATIONS: u32 = (1 << 31) - 1;
/// Most completions that a wake-up of a polled descriptor counts for.
const MAX_WEIGHT: u32 = 64;

/// Who waits for the ring's completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiter {
    /// The thread that submits, inside `enter`.
    Submitter,
    /// An eventfd.
    Eventfd,
}

struct Poll {
    fd: OwnedFd,
    /// Generations of its entries in the kernel.
    generations: Range<u32>,
}

/// The ring and its tables; see the module's header.
pub(super) struct Ring {
    ring: IoUring,
    files: Vec<Target>,
    fixed_files: u32,
    memory: FixedMemory,
    slots: Vec<Slot>,
    free: Vec<u32>,
    in_flight: u32,
    /// Bytes of aligned memory in use, and who waits for some.
    bounced: usize,
    waiting: VecDeque<u32>,
    backlog: VecDeque<squeue::Entry>,
    ready: VecDeque<Event>,
    polls: HashMap<u32, Poll>,
    generation: u32,
}

// SAFETY: the raw pointers in `Slot::iov` and `backlog` point into buffers that the slots own, and those are `Send`.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring for about `entries` operations at a time; more are queued inside.
    ///
    /// # Errors
    /// The kernel's refusal: no io_uring, a sysctl or seccomp filter against it, or no memory.
    pub(super) fn new(entries: u32, waiter: Waiter) -> io::Result<Self> {
        let entries = entries.clamp(8, 4096);
        let build = |modify: fn(&mut io_uring::Builder)| {
            let mut builder = IoUring::builder();
            builder.setup_clamp().setup_cqsize(entries * 4);
            modify(&mut builder);
            builder.build(entries)
        };
        let plain: fn(&mut io_uring::Builder) = |_| {};
        let ring = match waiter {
            Waiter::Eventfd => build(plain)?,
            Waiter::Submitter => build(|b| {
                b.setup_submit_all().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
            })
            .or_else(|_| {
                build(|b| {
                    b.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
                })
            })
            .or_else(|_| build(plain))?,
        };
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_ext_arg() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "io_uring of Linux 5.11 or newer is needed",
            ));
        }
        ring.submitter().register_files(&[-1; MAX_FILES])?;
        Ok(Self {
            ring,
            files: Vec::new(),
            fixed_files: 0,
            memory: FixedMemory::default(),
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            bounced: 0,
            waiting: VecDeque::new(),
            backlog: VecDeque::new(),
            ready: VecDeque::new(),
            polls: HashMap::new(),
            generation: 0,
        })
    }

    /// An eventfd that is signalled at every completion, watched by the tokio runtime that this is called in.
    pub(super) fn eventfd(&self) -> io::Result<AsyncFd<EventFd>> {
        let eventfd = EventFd::new(EFD_NONBLOCK)?;
        self.ring.submitter().register_eventfd(eventfd.as_raw_fd())?;
        // SAFETY: `EventFd` owns its descriptor, always names the same one, and closes it only when it is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(eventfd, Interest::READABLE) };
        watched.map_err(|error| error.into_parts().1)
    }

    /// Puts the file, and its direct twin if there is one, into the ring's table of files, which holds them open.
    pub(super) fn register_file(&mut self, file: &File, direct: Option<&DirectFile>) -> io::Result<FileId> {
        let id = u32::try_from(self.files.len()).map_err(io::Error::other)?;
        let plain = self.fix(file)?;
        let direct =
            direct.map(|twin| self.fix(twin.file()).map(|fixed| (fixed, twin.align()))).transpose()?;
        self.files.push(Target { plain, direct });
        Ok(FileId(id))
    }

    fn fix(&mut self, file: &File) -> io::Result<Fixed> {
        if self.fixed_files as usize >= MAX_FILES {
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, "the engine's table of files is full"));
        }
        self.ring.submitter().register_files_update(self.fixed_files, &[file.as_raw_fd()])?;
        self.fixed_files += 1;
        Ok(Fixed(self.fixed_files - 1))
    }

    /// Pins this memory instead of what was pinned before; without any, pins nothing. After an error the old memory
    /// may still be pinned, which keeps its addresses its own, or nothing is.
    pub(super) fn register_memory(&mut self, memory: Option<IoBuf>) -> io::Result<()> {
        if !self.memory.is_empty() {
            // Entries that name the old buffers must have reached the kernel; it keeps what they use.
            self.flush()?;
            if !self.ring.submission().is_empty() {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            self.ring.submitter().unregister_buffers()?;
            self.memory = FixedMemory::default();
        }
        let Some(memory) = memory else { return Ok(()) };
        let (fixed, list) = FixedMemory::cut(memory);
        // SAFETY: `fixed` keeps the memory mapped, and lives until it is unregistered here or the ring is gone.
        unsafe { self.ring.submitter().register_buffers(&list) }?;
        self.memory = fixed;
        Ok(())
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    pub(super) fn submit(&mut self, tag: u64, op: Op) {
        if self.files.get(op.file().0 as usize).is_none() {
            let result = Err(io::Error::new(io::ErrorKind::InvalidInput, "a file of another engine"));
            self.ready.push_back(Event::Done(Completion { tag, result, op }));
            return;
        }
        let index = self.free.pop().or_else(|| {
            let index = u32::try_from(self.slots.len()).ok()?;
            self.slots.push(Slot::default());
            Some(index)
        });
        let Some(slot) = index.and_then(|index| self.slots.get_mut(index as usize)) else {
            let result = Err(io::Error::from(io::ErrorKind::OutOfMemory));
            self.ready.push_back(Event::Done(Completion { tag, result, op }));
            return;
        };
        slot.fill(tag, op);
        self.in_flight += 1;
        self.begin(index.unwrap_or_default());
    }

    fn target(&self, index: u32) -> Option<Target> {
        let op = self.slots.get(index as usize)?.op.as_ref()?;
        self.files.get(op.file().0 as usize).copied()
    }

    /// Launches a new operation, with aligned memory if it needs some and there is some.
    fn begin(&mut self, index: u32) {
        let Some(target) = self.target(index) else { return };
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        let bytes = slot.bounce_bytes(&target);
        if bytes > 0 {
            if self.bounced > 0 && self.bounced + bytes > MAX_BOUNCE {
                return self.waiting.push_back(index);
            }
            self.bounced += bytes;
            slot.bounce(bytes);
        }
        self.launch(index, &target);
    }

    /// Aligned memory has been given back: goes on with who waits for it.
    fn unbounced(&mut self, bytes: usize) {
        self.bounced -= bytes;
        for _ in 0..self.waiting.len() {
            let before = self.waiting.len();
            let Some(index) = self.waiting.pop_front() else { return };
            self.begin(index);
            if self.waiting.len() == before {
                // It waits again, now as the last; its turn is the first.
                self.waiting.rotate_right(1);
                return;
            }
        }
    }

    /// Queues the entry for what is left of a slot's operation.
    fn launch(&mut self, index: u32, target: &Target) {
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        if let Some(entry) = slot.entry(target, &self.memory) {
            self.push(entry.user_data(u64::from(index)));
        }
    }

    fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            let mut queue = self.ring.submission();
            // SAFETY: what the entry points to lives in a slot until its completion is taken out, and `Drop` waits
            // for that; entries without memory are always fine.
            if unsafe { queue.push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    /// Moves as much of the backlog as fits into the submission queue.
    fn refill(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Submits everything queued, without waiting. What the kernel does not take now stays queued.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        loop {
            self.refill();
            let taken = tolerate(self.ring.submit())?;
            if self.backlog.is_empty() || taken == 0 {
                return Ok(());
            }
        }
    }

    pub(super) fn enter(&mut self, min_complete: u32, timeout: Option<Duration>) -> io::Result<()> {
        self.refill();
        if !self.backlog.is_empty() {
            self.flush()?;
        }
        let want = if self.ready.is_empty() { min_complete as usize } else { 0 };
        let submitter = self.ring.submitter();
        match timeout {
            Some(timeout) if want > 0 => {
                let time = Timespec::from(timeout);
                tolerate(submitter.submit_with_args(want, &SubmitArgs::new().timespec(&time)))?;
            }
            _ => {
                tolerate(submitter.submit_and_wait(want))?;
            }
        }
        Ok(())
    }

    fn has_news(&mut self) -> bool {
        !self.ready.is_empty() || self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    pub(super) fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let entry = self.ring.completion().next()?;
            let data = entry.user_data();
            if data & POLL == 0 {
                if let Some(event) = self.settle(data, entry.result()) {
                    return Some(event);
                }
            } else if data != IGNORE {
                self.polled(data, &entry);
            }
        }
    }

    /// Takes note of a completion: the operation is done, or goes on.
    fn settle(&mut self, data: u64, result: i32) -> Option<Event> {
        let index = u32::try_from(data).ok()?;
        let slot = self.slots.get_mut(index as usize)?;
        let Some(result) = slot.progress(result) else {
            let target = self.target(index)?;
            self.launch(index, &target);
            return None;
        };
        let (op, bounced) = slot.empty(result.is_ok())?;
        let tag = slot.tag;
        self.free.push(index);
        self.in_flight -= 1;
        if bounced > 0 {
            self.unbounced(bounced);
        }
        Some(Event::Done(Completion { tag, result, op }))
    }

    fn polled(&mut self, data: u64, entry: &cqueue::Entry) {
        let Ok(key) = u32::try_from(data & u64::from(u32::MAX)) else { return };
        // A completion of a poll that has been taken back says nothing about its successor.
        let generation = u32::try_from(data >> 32 & u64::from(GENERATIONS)).unwrap_or(u32::MAX);
        let Some(poll) = self.polls.get(&key).filter(|poll| poll.generations.contains(&generation)) else {
            return;
        };
        self.ready.push_back(Event::Ready(key));
        // A poll that ended with a wake-up (the completion queue was full) is armed again. One that failed would
        // fail again at once; the caller has been told, and its next look at the descriptor shows why.
        if !cqueue::more(entry.flags()) && (entry.result() >= 0 || entry.result() == -libc::ECANCELED) {
            let fd = Fd(poll.fd.as_raw_fd());
            self.push(poll_entry(fd, data));
        }
    }

    fn poll_fd(&mut self, fd: BorrowedFd<'_>, key: u32, weight: u32) -> io::Result<()> {
        self.unpoll(key)?;
        let fd = fd.try_clone_to_owned()?;
        if self.generation >= GENERATIONS - weight {
            self.generation = 0;
        }
        let generations = self.generation..self.generation + weight;
        self.generation = generations.end;
        for generation in generations.clone() {
            self.push(poll_entry(Fd(fd.as_raw_fd()), poll_data(key, generation)));
        }
        self.polls.insert(key, Poll { fd, generations });
        Ok(())
    }

    fn unpoll(&mut self, key: u32) -> io::Result<()> {
        let Some(poll) = self.polls.remove(&key) else { return Ok(()) };
        for generation in poll.generations {
            let entry = opcode::PollRemove::new(poll_data(key, generation)).build().user_data(IGNORE);
            self.push(entry);
        }
        self.ready.retain(|event| !matches!(event, Event::Ready(ready) if *ready == key));
        // Before the duplicate is closed the kernel must have seen every entry that names its number.
        self.flush()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if self.enter(1, None).is_err() {
                // The kernel may still use the buffers: better lost than written to by surprise.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while self.next().is_some() {}
        }
        // The kernel takes a ring down some time after it is closed; the files are given back now.
        if let Err(error) = self.ring.submitter().unregister_files() {
            log::debug!("files stay open until the ring is gone: {error}");
        }
    }
}

fn poll_data(key: u32, generation: u32) -> u64 {
    POLL | u64::from(generation) << 32 | u64::from(key)
}

fn poll_entry(fd: Fd, data: u64) -> squeue::Entry {
    let events = u32::try_from(libc::POLLIN).unwrap_or(1);
    opcode::PollAdd::new(fd, events).multi(true).build().user_data(data)
}

/// Results of `enter` that only mean: look at the completions, then come again.
fn tolerate(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
            ) =>
        {
            Ok(0)
        }
        other => other,
    }
}

/// A queue thread's engine. It must be made, used and dropped in one thread; dropping it waits for what is in
/// flight.
pub struct UringEngine {
    ring: Ring,
    /// Not `Send`: the kernel lets only the thread that made the ring submit and wait.
    here: PhantomData<*const ()>,
}

impl UringEngine {
    /// An engine for about `entries` operations at a time (8 to 4096); more are queued inside.
    ///
    /// # Errors
    /// The kernel's refusal: io_uring missing, switched off or older than Linux 5.11, or no memory.
    pub fn new(entries: u32) -> io::Result<Self> {
        Ok(Self { ring: Ring::new(entries, Waiter::Submitter)?, here: PhantomData })
    }

    /// Makes a file known, with its direct twin if it has one; the engine holds both open.
    ///
    /// # Errors
    /// The engine knows too many files already.
    pub fn register_file(&mut self, file: &File, direct: Option<&DirectFile>) -> io::Result<FileId> {
        self.ring.register_file(file, direct)
    }

    /// Pins this memory, so that transfers from and to it cost less, instead of what was pinned before; `None` pins
    /// nothing. It stays resident, and counts against `RLIMIT_MEMLOCK`.
    ///
    /// # Errors
    /// The kernel's: `RLIMIT_MEMLOCK`, or no memory. Everything works all the same, only not faster.
    pub fn register_memory(&mut self, memory: Option<IoBuf>) -> io::Result<()> {
        self.ring.register_memory(memory)
    }

    /// Queues an operation; it starts at the next [`enter`](Self::enter). Its [`Completion`] carries `tag`.
    pub fn submit(&mut self, tag: u64, op: Op) {
        self.ring.submit(tag, op);
    }

    /// Reports every wake-up of `fd` (readable, or failed) as [`Event::Ready`] with `key`, until
    /// [`unpoll`](Self::unpoll); the descriptor is never read. It is reported at once if it is readable now. A poll
    /// under the same key is replaced. The engine keeps a duplicate. A wake-up counts as `weight` completions for
    /// [`enter`](Self::enter), and may be reported that often: so a caller that sleeps for many completions is woken
    /// by one kick. Poll far fewer descriptors than the engine was
    /// made for operations: when all wake-ups together overflow the completion queue, polls are armed in vain.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn poll_fd(&mut self, fd: BorrowedFd<'_>, key: u32, weight: u32) -> io::Result<()> {
        self.ring.poll_fd(fd, key, weight.clamp(1, MAX_WEIGHT))
    }

    /// Stops the reports under `key`; none comes after this, not even one that was due.
    ///
    /// # Errors
    /// The kernel refused to take entries.
    pub fn unpoll(&mut self, key: u32) -> io::Result<()> {
        self.ring.unpoll(key)
    }

    /// Submits what is queued and waits, in one system call, until `min_complete` completions are there, or
    /// `timeout` has passed. Wake-ups of polled descriptors count too. It may return early (a signal, a full
    /// completion queue): drain [`next`](Self::next) and decide again. With 0 it does not wait.
    ///
    /// # Errors
    /// The ring is unusable.
    pub fn enter(&mut self, min_complete: u32, timeout: Option<Duration>) -> io::Result<()> {
        self.ring.enter(min_complete, timeout)
    }

    /// The next event, if one is there; no system call. Drain it before each [`enter`](Self::enter).
    #[allow(clippy::should_implement_trait, reason = "the caller submits between two events: no iterator")]
    pub fn next(&mut self) -> Option<Event> {
        self.ring.next()
    }

    /// Whether [`next`](Self::next) has something, or would after an [`enter`](Self::enter) that does not wait. No
    /// system call.
    #[must_use]
    pub fn has_news(&mut self) -> bool {
        self.ring.has_news()
    }

    /// Number of file operations queued or being carried out; polls do not count.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.ring.in_flight()
    }
}

impl std::fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "UringEngine({} in flight)", self.in_flight())
    }
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
