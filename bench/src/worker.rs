// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One thread of load: keeps a ring busy, takes what comes back, judges and counts it.

use crate::cpu;
use crate::load::{Load, Pace};
use crate::ring::{Done, Kind, Ring};
use crate::stats::Stats;
use crate::verify::{Book, Expected};
use anyhow::{Context, Result, bail};
use rustix::event::{Timespec, epoll};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A back-end that completes nothing for so long, with requests in flight, is given up.
const PATIENCE: u64 = 30_000_000_000;
/// How often a busy thread looks whether the connection still stands.
const LOOK: u64 = 200_000_000;
/// Messages about wrong blocks of one queue; the rest is only counted.
const MESSAGES: u64 = 8;
const CALL: u64 = 0;
const SOCKET: u64 = 1;

/// Times of a run, in nanoseconds of its clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// The clock's zero.
    pub(crate) zero: Instant,
    /// What completes in here is counted.
    pub(crate) measured: Window,
}

/// From one time to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub(crate) from: u64,
    pub(crate) to: u64,
}

impl Window {
    fn contains(&self, at: u64) -> bool {
        (self.from..self.to).contains(&at)
    }
}

impl Times {
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.zero.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// What a slot is doing.
#[derive(Debug, Clone, Copy)]
struct Slot {
    kind: Kind,
    block: u64,
    /// When it was started, or was meant to be.
    started: u64,
    expected: Option<Expected>,
}

/// Where requests come from.
#[derive(Debug)]
enum Source {
    Load(Load),
    /// Blocks to read again.
    Sweep(Vec<u64>, usize),
}

/// What a worker is made with.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) block: u32,
    pub(crate) poll: bool,
    /// Requests a second of this queue; `None` for a closed loop.
    pub(crate) rate: Option<f64>,
    pub(crate) cpu: Option<usize>,
    /// Requests until the end; `None` for as many as the time allows.
    pub(crate) budget: Option<u64>,
}

/// One queue's thread.
#[derive(Debug)]
pub(crate) struct Worker {
    ring: Ring,
    plan: Plan,
    source: Source,
    book: Option<Book>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Slots of the batch that is being put together.
    batch: Vec<u16>,
    buffer: Vec<u8>,
    scratch: Vec<u8>,
    epoll: OwnedFd,
    last_completion: u64,
    next_look: u64,
    /// When its part of the measured window ended.
    pub(crate) ended: u64,
    pub(crate) stats: Stats,
}

impl Worker {
    pub(crate) fn new(
        ring: Ring,
        slots: u16,
        load: Load,
        book: Option<Book>,
        plan: Plan,
        socket: &UnixStream,
    ) -> Result<Self> {
        let idle = Slot { kind: Kind::Read, block: 0, started: 0, expected: None };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("epoll_create")?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        // Edge-triggered: the call's counter is never read, which saves a system call a wake-up.
        epoll::add(&epoll, ring.call_fd(), epoll::EventData::new_u64(CALL), edge).context("epoll_ctl")?;
        epoll::add(&epoll, socket, epoll::EventData::new_u64(SOCKET), epoll::EventFlags::RDHUP)
            .context("epoll_ctl")?;
        let bytes = usize::try_from(plan.block)?;
        Ok(Self {
            ring,
            source: Source::Load(load),
            book,
            slots: vec![idle; usize::from(slots)],
            free: (0..slots).rev().collect(),
            batch: Vec::new(),
            buffer: vec![0; bytes],
            scratch: vec![0; bytes],
            epoll,
            last_completion: 0,
            next_look: 0,
            ended: 0,
            stats: Stats::new()?,
            plan,
        })
    }

    /// Runs the load until its end, then waits for what is in flight. Stops early when `abort` is set.
    pub(crate) fn run(&mut self, times: &Times, abort: &AtomicBool) -> Result<()> {
        let started = times.now();
        let mut pace = match self.plan.rate {
            Some(rate) => Pace::open(rate, started),
            None => Pace::Closed,
        };
        self.settle(started);
        let mut cpu_at_start = None;
        loop {
            let now = times.now();
            if cpu_at_start.is_none() && now >= times.measured.from {
                cpu_at_start = Some(cpu::this_thread());
            }
            let reaped = self.reap(now, times.measured.contains(now))?;
            let spent = self.spent() && self.ring.in_flight() == 0;
            if spent || now >= times.measured.to || abort.load(Ordering::Relaxed) {
                self.ended = now.min(times.measured.to);
                break;
            }
            let queued = self.submit(times, &mut pace)?;
            if reaped == 0 && queued == 0 {
                self.rest(now, wake_at(&pace, times, self.free.is_empty()))?;
            }
        }
        if let Some(before) = cpu_at_start {
            self.stats.cpu += cpu::this_thread().saturating_sub(before);
        }
        self.drain(times)
    }

    /// One flush on an idle ring; returns how long it took.
    pub(crate) fn flush(&mut self, times: &Times) -> Result<u64> {
        self.settle(times.now());
        let Some(slot) = self.free.pop() else { bail!("no slot is free for the flush") };
        let (started, errors) = (times.now(), self.stats.errors);
        self.slots[usize::from(slot)] = Slot { kind: Kind::Flush, block: 0, started, expected: None };
        self.ring.put(slot, Kind::Flush, 0);
        self.ring.publish().context("kick")?;
        self.drain(times)?;
        if self.stats.errors > errors {
            bail!("the flush failed");
        }
        Ok(self.last_completion.saturating_sub(started))
    }

    /// Whether it ended because it had done all its requests.
    pub(crate) fn spent(&self) -> bool {
        self.plan.budget == Some(0)
    }

    /// Reads again and judges everything that was written.
    pub(crate) fn sweep(&mut self, times: &Times) -> Result<()> {
        let Some(book) = &self.book else { return Ok(()) };
        self.source = Source::Sweep(book.certain(), 0);
        let mut pace = Pace::Closed;
        self.settle(times.now());
        loop {
            let now = times.now();
            let reaped = self.reap(now, false)?;
            let queued = self.submit(times, &mut pace)?;
            if self.ring.in_flight() == 0 {
                return Ok(());
            }
            if reaped == 0 && queued == 0 {
                self.rest(now, now + LOOK)?;
            }
        }
    }

    /// What concerns the thread itself.
    fn settle(&mut self, now: u64) {
        (self.last_completion, self.next_look) = (now, now + LOOK);
        if let Some(cpu) = self.plan.cpu {
            let mut set = rustix::thread::CpuSet::new();
            set.set(cpu);
            if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
                eprintln!("blkferry-bench: not pinned to cpu {cpu}: {error}");
            }
        }
        // An open loop sleeps until its next request: the default slack of 50 us would be late by that much.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
    }

    fn drain(&mut self, times: &Times) -> Result<()> {
        while self.ring.in_flight() > 0 {
            let now = times.now();
            if self.reap(now, false)? == 0 {
                self.rest(now, now + LOOK)?;
            }
        }
        Ok(())
    }

    /// Takes all that came back.
    fn reap(&mut self, now: u64, counted: bool) -> Result<usize> {
        let mut count = 0;
        while let Some(done) = self.ring.next()? {
            self.finish(done, now, counted);
            self.free.push(done.slot);
            count += 1;
        }
        if count > 0 {
            self.last_completion = now;
        }
        Ok(count)
    }

    fn finish(&mut self, done: Done, now: u64, counted: bool) {
        let slot = self.slots[usize::from(done.slot)];
        let good = done.status == 0;
        if good && counted {
            let bytes = if slot.kind == Kind::Flush { 0 } else { u64::from(self.plan.block) };
            self.stats.count(slot.kind, bytes, now.saturating_sub(slot.started));
        }
        if !good {
            self.stats.failed(slot.kind, slot.block * u64::from(self.plan.block), done.status);
        }
        let Some(book) = &mut self.book else { return };
        match slot.kind {
            Kind::Write => book.end_write(slot.block, good),
            Kind::Discard => book.end_write(slot.block, false),
            Kind::Read if good => {
                if let Some(expected) = slot.expected.filter(|expected| book.still(slot.block, *expected)) {
                    let offset = slot.block * u64::from(self.plan.block);
                    self.ring.fetch(done.slot, &mut self.buffer);
                    self.stats.verified += 1;
                    if let Err(wrong) = book.check(offset, expected, &self.buffer, &mut self.scratch) {
                        self.stats.wrong += 1;
                        if self.stats.wrong <= MESSAGES {
                            eprintln!("blkferry-bench: {wrong}");
                        }
                    }
                }
            }
            Kind::Read | Kind::Flush => {}
        }
    }

    /// Starts as many requests as there are slots for and the pace allows.
    fn submit(&mut self, times: &Times, pace: &mut Pace) -> Result<usize> {
        let now = times.now();
        while let Some(slot) = self.free.pop() {
            let due = pace.due();
            if due.is_some_and(|due| due > now) {
                self.free.push(slot);
                break;
            }
            let Some((kind, block)) = self.choose() else {
                self.free.push(slot);
                break;
            };
            let expected = self.begin(slot, kind, block);
            self.slots[usize::from(slot)] = Slot { kind, block, started: due.unwrap_or(0), expected };
            self.ring.put(slot, kind, block * u64::from(self.plan.block));
            self.batch.push(slot);
            pace.took();
        }
        let count = self.batch.len();
        if count > 0 {
            if matches!(pace, Pace::Closed) {
                let started = times.now();
                for slot in &self.batch {
                    self.slots[usize::from(*slot)].started = started;
                }
            }
            self.batch.clear();
            self.ring.publish().context("kick")?;
        }
        Ok(count)
    }

    /// The next request; with verification one whose block has no write in flight if it is to be written. None when
    /// there is nothing (more) to do at present.
    fn choose(&mut self) -> Option<(Kind, u64)> {
        let load = match &mut self.source {
            Source::Sweep(blocks, next) => {
                let block = *blocks.get(*next)?;
                *next += 1;
                return Some((Kind::Read, block));
            }
            Source::Load(load) => load,
        };
        if let Some(budget) = &mut self.plan.budget {
            *budget = budget.checked_sub(1)?;
        }
        let Some(book) = &self.book else { return Some(load.next()) };
        (0..64)
            .map(|_| load.next())
            .find(|(kind, block)| matches!(kind, Kind::Read | Kind::Flush) || !book.is_writing(*block))
    }

    /// Notes what begins, and stamps what is written.
    fn begin(&mut self, slot: u16, kind: Kind, block: u64) -> Option<Expected> {
        let book = self.book.as_mut()?;
        match kind {
            Kind::Read => return book.begin_read(block),
            Kind::Write => {
                if let Some(generation) = book.begin_write(block) {
                    book.stamp(block * u64::from(self.plan.block), generation, &mut self.buffer);
                    self.ring.fill(slot, &self.buffer);
                }
            }
            Kind::Discard => {
                book.begin_write(block);
            }
            Kind::Flush => {}
        }
        None
    }

    /// Nothing to do until the back-end calls or `until` comes.
    fn rest(&mut self, now: u64, until: u64) -> Result<()> {
        let in_flight = self.ring.in_flight();
        if in_flight > 0 && now.saturating_sub(self.last_completion) > PATIENCE {
            bail!("the back-end has completed nothing for 30 s, with {in_flight} requests in flight");
        }
        if self.plan.poll {
            std::hint::spin_loop();
            if now < self.next_look {
                return Ok(());
            }
            self.next_look = now + LOOK;
            return self.sleep(Duration::ZERO);
        }
        if !self.ring.arm() {
            return Ok(());
        }
        self.sleep(Duration::from_nanos(until.saturating_sub(now).min(LOOK)))?;
        self.ring.silence();
        Ok(())
    }

    fn sleep(&self, longest: Duration) -> Result<()> {
        let timeout = Timespec {
            tv_sec: i64::try_from(longest.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(longest.subsec_nanos()),
        };
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(CALL) }; 2];
        let count = match epoll::wait(self.epoll.as_fd(), &mut events, Some(&timeout)) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(std::io::Error::from(error)).context("epoll_wait"),
        };
        if events[..count].iter().any(|event| event.data.u64() == SOCKET) {
            bail!("the back-end closed the connection");
        }
        Ok(())
    }
}

/// When a resting thread must look up: at the next stage of the run, or for its next request.
fn wake_at(pace: &Pace, times: &Times, full: bool) -> u64 {
    let Window { from, to } = times.measured;
    let stage = if times.now() < from { from } else { to };
    match pace.due() {
        Some(due) if !full => stage.min(due),
        _ => stage,
    }
}

/// The blocks of a range that belong to one queue of several.
pub(crate) fn share(blocks: &Range<u64>, queue: u16, queues: u16) -> Range<u64> {
    let (count, queue, queues) = (blocks.end - blocks.start, u64::from(queue), u64::from(queues));
    let each = count / queues;
    let start = blocks.start + each * queue;
    start..if queue + 1 == queues { blocks.end } else { start + each }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_range_and_do_not_overlap() {
        assert_eq!(share(&(10..110), 0, 1), 10..110);
        let shares: Vec<_> = (0..3).map(|queue| share(&(10..111), queue, 3)).collect();
        assert_eq!(shares, [10..43, 43..76, 76..111]);
    }
}
