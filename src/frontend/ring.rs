// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A queue thread: one virtqueue, one port with an io_uring, one loop.
//!
//! The loop: take in what has completed, publish it, pop what is available and submit it as one batch, then submit
//! and sleep in one system call. Before it sleeps it arms the driver's notification and looks once more; while it is
//! busy it asks for none. It sleeps for several completions when several local operations are in flight (a quarter
//! of them, at most 16): that alone brought writes at depth 32 from .83 to .98 of what the disk gives. Only local
//! operations count; a pull from another host must never hold a completion back. A kick ends that sleep at once (it
//! weighs as much as the largest batch): new requests must not wait for old ones to leave the disk. With a driver that
//! polls, that is 0.90 instead of 0.75 of what the disk gives.
//!
//! The front-end thread gives commands by a channel and bumps a generation counter, which the loop compares once a
//! batch. Every command is answered when it is done, so the front-end's acknowledgement means what it says. A mutex
//! around the ring was rejected: it would be taken for each batch, and a stop would wait for it under the guest's I/O.
//!
//! *Drain* (stop or pause): the vCPUs stand still, so what is in the available ring at that moment is all there is.
//! It is popped too: Cloud Hypervisor restarts at the available index, and QEMU does not resubmit. Requests that wait
//! for another host hold a drain for at most [`DRAIN_LIMIT`]; then they fail, loudly. Local I/O is always waited for.
//!
//! While the volume's gate is closed nothing is popped; available work is reported once, because after a reconnect
//! it is the only proof that the guest runs.

use super::busy_poll::BusyPoll;
use super::memory::GuestMemory;
use super::signal::{HypervisorSignal, Signals};
use super::virtio_blk::Serial;
use super::virtqueue::{Device, RingSetup, Virtqueue};
use crate::config::QueueTuning;
use crate::volume::{MAX_BATCH, Port, PortEvent, Status, Volume, Waker};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest time for which a drain waits for requests that need another host.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(20);
/// How often a ring without a kick descriptor is looked at.
const POLL: Duration = Duration::from_millis(1);
/// Most requests that are popped while nothing is in flight.
const FIRST_BATCH: u16 = 8;

/// What a queue thread can be told.
#[derive(Debug)]
pub(super) enum Command {
    /// Start at this available index.
    Start(Box<RingSetup>, u16),
    /// Go on with this; indices stay.
    Update(Box<RingSetup>),
    /// Drain and hold (SET_VRING_ENABLE 0).
    Pause(Instant),
    /// Go on after a pause.
    Resume,
    /// Drain and end (GET_VRING_BASE); answered with the base.
    Stop(Instant),
    /// The front-end is gone: finish what is in flight and end, pop nothing. What cannot finish stays in the
    /// in-flight region.
    Quiesce(Instant),
    /// End the thread; the ring must have been stopped.
    Quit,
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Done,
    /// Stopped: the next available index.
    Base(u16),
    /// Refused, in words.
    Failed(String),
}

/// What a queue thread is made with.
#[derive(Debug, Clone)]
pub(super) struct RingOptions {
    /// Its number.
    pub(super) index: u16,
    /// What GET_ID answers, zero-padded.
    pub(super) serial: Serial,
    /// Longest wait of a drain for other hosts.
    pub(super) drain_limit: Duration,
    /// How the thread runs.
    pub(super) tuning: QueueTuning,
}

type Mail = (Command, SyncSender<Answer>);

/// The front-end thread's end of a queue thread.
#[derive(Debug)]
pub(super) struct RingHandle {
    index: u16,
    mail: Sender<Mail>,
    generation: Arc<AtomicU64>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl RingHandle {
    /// Starts the thread of a queue and its port.
    ///
    /// # Errors
    /// No thread, or no io_uring.
    pub(super) fn spawn(options: RingOptions, volume: &Arc<Volume>, signals: &Signals) -> io::Result<Self> {
        let RingOptions { index, serial, drain_limit, tuning } = options;
        let (mail, inbox) = channel();
        let generation = Arc::new(AtomicU64::new(0));
        let (ready, made) = sync_channel(1);
        let (volume, signals, shared) = (Arc::clone(volume), signals.clone(), Arc::clone(&generation));
        let thread = std::thread::Builder::new().name(format!("queue-{index}")).spawn(move || {
            if let Err(error) = pin(index, &tuning.cpus) {
                return drop(ready.send(Err(error)));
            }
            let port = match Port::new(Arc::clone(&volume), usize::from(index)) {
                Ok(port) => port,
                Err(error) => return drop(ready.send(Err(error))),
            };
            if ready.send(Ok(port.waker())).is_err() {
                return;
            }
            QueueThread {
                index,
                volume,
                signals,
                serial,
                drain_limit,
                port,
                inbox,
                generation: shared,
                seen: 0,
                queue: None,
                paused: false,
                drain: None,
                key: 0,
                reported: false,
                register_memory: tuning.register_memory,
                registered: None,
                poll: BusyPoll::new(Duration::from_micros(tuning.poll_us.into())),
            }
            .run();
        })?;
        let waker = made.recv().map_err(io::Error::other)??;
        Ok(Self { index, mail, generation, waker, thread: Some(thread) })
    }

    /// Gives a command and waits for its answer.
    ///
    /// # Errors
    /// In words: the thread is gone, or it refused.
    pub(super) fn call(&self, command: Command) -> Result<Answer, String> {
        let gone = || format!("the thread of queue {} is gone", self.index);
        let (reply, answer) = sync_channel(1);
        self.mail.send((command, reply)).map_err(|_| gone())?;
        self.generation.fetch_add(1, Ordering::Release);
        self.waker.wake();
        match answer.recv().map_err(|_| gone())? {
            Answer::Failed(why) => Err(why),
            answer => Ok(answer),
        }
    }
}

impl Drop for RingHandle {
    fn drop(&mut self) {
        if let Err(error) = self.call(Command::Quit) {
            log::debug!("{error}");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of queue {} has panicked", self.index);
        }
    }
}

/// A drain under way.
#[derive(Debug)]
struct Drain {
    /// Pop up to here.
    end: u16,
    /// Then fail what waits for another host.
    deadline: Instant,
    /// The ring ends afterwards (it is held otherwise).
    ends: bool,
    /// The front-end is gone.
    abandon: bool,
    reply: SyncSender<Answer>,
}

struct QueueThread {
    index: u16,
    volume: Arc<Volume>,
    signals: Signals,
    serial: Serial,
    drain_limit: Duration,
    port: Port,
    inbox: Receiver<Mail>,
    generation: Arc<AtomicU64>,
    /// Generation of the last command taken.
    seen: u64,
    queue: Option<Virtqueue>,
    paused: bool,
    drain: Option<Drain>,
    /// Poll key of the kick descriptor; a new one each time, so that a late report is not mistaken.
    key: u32,
    /// Work behind the closed gate has been reported.
    reported: bool,
    /// Guest memory is to be pinned.
    register_memory: bool,
    /// The table that is pinned, or could not be.
    registered: Option<Arc<GuestMemory>>,
    poll: BusyPoll,
}

/// Binds this thread to the CPU that is meant for queue `index`.
fn pin(index: u16, cpus: &[u16]) -> io::Result<()> {
    let Some(cpu) = cpus.get(usize::from(index) % cpus.len().max(1)) else { return Ok(()) };
    let mut set = rustix::thread::CpuSet::new();
    set.set(usize::from(*cpu));
    rustix::thread::sched_setaffinity(None, &set).map_err(|error| {
        io::Error::other(format!("cannot run on CPU {cpu}, which --queue-cpus names: {error}"))
    })
}

impl QueueThread {
    fn run(&mut self) {
        loop {
            if self.generation.load(Ordering::Acquire) != self.seen && self.commands() {
                break;
            }
            self.collect();
            self.process();
            if let Some(queue) = &mut self.queue {
                queue.publish();
            }
            self.finish_drain();
            if let Err(error) = self.sleep() {
                log::error!("queue {}: io_uring failed, the queue is dead: {error}", self.index);
                break;
            }
        }
    }

    /// Takes the commands; returns whether to quit.
    fn commands(&mut self) -> bool {
        // Read before the channel: a command that comes later bumps it again.
        self.seen = self.generation.load(Ordering::Acquire);
        while let Ok((command, reply)) = self.inbox.try_recv() {
            let answer = match command {
                Command::Start(setup, base) => self.start(*setup, base),
                Command::Update(setup) => self.update(*setup),
                Command::Resume => {
                    self.paused = false;
                    Answer::Done
                }
                Command::Pause(since) | Command::Stop(since) | Command::Quiesce(since) => {
                    self.begin_drain(&command, since, reply);
                    continue;
                }
                Command::Quit => {
                    reply.send(Answer::Done).ok();
                    return true;
                }
            };
            reply.send(answer).ok();
        }
        false
    }

    fn start(&mut self, setup: RingSetup, base: u16) -> Answer {
        let kick = setup.kick.clone();
        match Virtqueue::start(self.index, setup, base) {
            Ok(queue) => self.queue = Some(queue),
            Err(error) => return Answer::Failed(error.to_string()),
        }
        (self.paused, self.reported) = (false, false);
        let answer = self.watch(kick.as_deref());
        if matches!(answer, Answer::Failed(_)) {
            // The handler takes it for stopped, and nothing has been popped yet.
            self.queue = None;
        }
        self.register_memory();
        answer
    }

    /// Pins the memory of the running ring, if that is wanted and not done.
    fn register_memory(&mut self) {
        if !self.register_memory {
            return;
        }
        let wanted = self.queue.as_ref().map(|queue| &queue.setup().memory);
        if wanted.map(Arc::as_ptr) == self.registered.as_ref().map(Arc::as_ptr) {
            return;
        }
        self.registered = wanted.cloned();
        let memory = self.queue.as_ref().map(Virtqueue::whole_memory);
        if let Err(error) = self.port.register_memory(memory) {
            log::warn!(
                "queue {}: guest memory is not registered, requests cost more: {error} (is RLIMIT_MEMLOCK too low?)",
                self.index
            );
        }
    }

    fn update(&mut self, setup: RingSetup) -> Answer {
        let Some(queue) = &mut self.queue else { return Answer::Done };
        let (old, new) = (queue.setup().kick.clone(), setup.kick.clone());
        if let Err(error) = queue.update(setup) {
            return Answer::Failed(error.to_string());
        }
        self.register_memory();
        let same = match (&old, &new) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (old, new) => old.is_none() && new.is_none(),
        };
        if same { Answer::Done } else { self.watch(new.as_deref()) }
    }

    /// Listens to this kick descriptor instead of the last one.
    fn watch(&mut self, kick: Option<&std::fs::File>) -> Answer {
        if let Err(error) = self.port.unpoll(self.key) {
            log::debug!("queue {}: {error}", self.index);
        }
        self.key = (self.key + 1) & 0x7fff_ffff;
        match kick.map(|kick| self.port.poll_fd(kick.as_fd(), self.key, MAX_BATCH)) {
            Some(Err(error)) => Answer::Failed(format!("cannot watch the kick descriptor: {error}")),
            _ => Answer::Done,
        }
    }

    /// `since` is when the stop began that this ring is a part of: all rings together drain within the limit.
    fn begin_drain(&mut self, command: &Command, since: Instant, reply: SyncSender<Answer>) {
        let Some(queue) = &self.queue else {
            reply.send(Answer::Base(0)).ok();
            return;
        };
        let abandon = matches!(command, Command::Quiesce(_));
        // A paused ring is drained already; the driver cannot have been served since.
        let end = if abandon || self.paused { queue.position() } else { queue.available() };
        let ends = !matches!(command, Command::Pause(_));
        self.drain = Some(Drain { end, deadline: since + self.drain_limit, ends, abandon, reply });
    }

    /// Takes in completions.
    fn collect(&mut self) {
        while let Some(event) = self.port.next() {
            let PortEvent::Completed { token, status, .. } = event else { continue };
            let abandon = self.drain.as_ref().is_some_and(|drain| drain.abandon);
            let Some(queue) = &mut self.queue else {
                log::error!("queue {}: request {} ends after its ring", self.index, token.spend());
                continue;
            };
            let serial = self.serial.bytes();
            let mut device = Device { volume: &self.volume, port: &mut self.port, serial: &serial };
            queue.completed(token, status, abandon, &mut device);
        }
    }

    /// Pops and submits what may be processed.
    fn process(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        if !self.volume.gate().is_open() {
            if !self.reported && self.drain.is_none() && !self.paused && queue.has_new() {
                self.reported = true;
                self.signals.tell(HypervisorSignal::RingWork);
            }
            return;
        }
        self.reported = false;
        let end = match &self.drain {
            Some(drain) if drain.abandon => return,
            Some(drain) => drain.end,
            None if self.paused => return,
            None => {
                let (from, available) = (queue.position(), queue.available());
                let waiting = available.wrapping_sub(from);
                // The disk is idle, or answers before `enter` returns (the page cache): a few at a time, so that the
                // driver works on the first answers while this thread works on the next.
                let few =
                    self.port.in_flight() == 0 && waiting > FIRST_BATCH && waiting <= queue.setup().size;
                if few { from.wrapping_add(FIRST_BATCH) } else { available }
            }
        };
        if !queue.popped_to(end) {
            queue.suppress();
            let serial = self.serial.bytes();
            let mut device = Device { volume: &self.volume, port: &mut self.port, serial: &serial };
            queue.pop(end, &mut device);
        }
    }

    /// Ends a drain that is complete; fails what is parked when it takes too long.
    fn finish_drain(&mut self) {
        let (Some(drain), Some(queue)) = (&mut self.drain, &mut self.queue) else { return };
        let popped = drain.abandon || !self.volume.gate().is_open() || queue.popped_to(drain.end);
        if popped && queue.is_idle() {
            return self.end_drain();
        }
        // In a lost connection with an in-flight region nothing is lost by giving up at once.
        let at_once = drain.abandon && queue.setup().inflight.is_some();
        if at_once || Instant::now() >= drain.deadline {
            if !at_once {
                log::error!(
                    "queue {}: requests that wait for other hosts fail, the drain may not take longer",
                    self.index
                );
            }
            drain.deadline = Instant::now() + self.drain_limit;
            self.port.fail_parked(Status::IoError);
        }
    }

    fn end_drain(&mut self) {
        let Some(drain) = self.drain.take() else { return };
        self.paused = true;
        let base = self.queue.as_ref().map_or(0, Virtqueue::base);
        if drain.ends {
            self.queue = None;
            self.register_memory();
            if let Err(error) = self.port.unpoll(self.key) {
                log::debug!("queue {}: {error}", self.index);
            }
        }
        log::debug!("queue {}: drained, next available index {base}", self.index);
        drain.reply.send(Answer::Base(base)).ok();
    }

    /// Submits, and sleeps unless there is something to do.
    fn sleep(&mut self) -> io::Result<()> {
        let Some(queue) = &mut self.queue else { return self.port.wait(1, None) };
        let live = !self.paused && self.drain.is_none();
        if live && self.poll.is_on() && self.volume.gate().is_open() {
            // What was popped is submitted first: nothing comes of it otherwise.
            self.port.wait(0, None)?;
            if self.poll.spin(|| queue.has_new() || self.port.has_news()) {
                return self.port.wait(0, None);
            }
        }
        if live && queue.arm() && (self.volume.gate().is_open() || !self.reported) {
            // What was popped is submitted, and what has ended is heard of, however much more comes.
            return self.port.wait(0, None);
        }
        let wanted = (self.port.in_flight() / 4).clamp(1, MAX_BATCH);
        match &self.drain {
            Some(drain) => {
                let left = drain.deadline.saturating_duration_since(Instant::now());
                self.port.wait(1, Some(left.max(POLL)))
            }
            None if live && queue.setup().kick.is_none() => self.port.wait(1, Some(POLL)),
            None if self.poll.is_on() => {
                let begin = Instant::now();
                let result = self.port.wait(wanted, None);
                self.poll.slept(begin.elapsed());
                result
            }
            None => self.port.wait(wanted, None),
        }
    }
}
