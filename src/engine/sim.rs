// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk that does not exist, and the engines that stand on it: for tests of everything above, on a clock of their own.
//!
//! A [`SimDisk`] is the disk of one host, with a page cache before it. It keeps two versions of every file: what
//! processes see (cached) and what a loss of power leaves (durable), sector by sector. An operation of an engine takes
//! time on the disk's clock, which only [`SimDisk::advance`] moves: it ends late, out of order, in two halves between
//! which others may see one, or with an error. Metadata (`store::medium`) is read and written at once on the same disk,
//! so what a crash leaves of it and of the data is one draw.
//!
//! What it does as a kernel does, where that is unpleasant:
//! - a sync covers what had been written when it was submitted, and nothing that came later;
//! - a sync that fails has thrown the pages away: they read well, the next sync succeeds, and a crash loses them;
//! - a write that fails has written some of its sectors;
//! - of what was not synced a crash keeps each sector or not, by itself, and of the changes of names a prefix;
//! - a process that is killed leaves its operations to the kernel, which carries them out, in part, or not.
//!
//! All draws come from one seeded stream, in the order of the calls: the same calls give the same disk.

mod engine;
mod file;
mod inode;
#[cfg(test)]
mod tests;

pub use engine::SimQueue;
pub use file::SimFile;

pub(super) use file::Files;

use super::{Completion, Op};
use inode::{Inode, Snapshot};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// Bytes of a sector: the unit in which a crash keeps or loses.
pub const SIM_SECTOR: usize = 512;

/// How a disk behaves. Times are in microseconds on its clock; chances are parts of a thousand operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SimPlan {
    /// Most operations of an engine take between 1 and twice this.
    pub latency: u64,
    /// How many take [`stall`](Self::stall) more.
    pub stalls: u64,
    /// Time of a stall.
    pub stall: u64,
    /// Reads of an engine that fail (EIO).
    pub read_fails: u64,
    /// Writes, punches and zeroings of an engine that fail (EIO or ENOSPC), having changed a part.
    pub write_fails: u64,
    /// Syncs of an engine that fail (EIO) and lose what they were to make durable.
    pub sync_fails: u64,
    /// Operations on metadata that fail, syncs included.
    pub meta_fails: u64,
    /// Writes after which the kernel has written the pages back by itself.
    pub written_back: u64,
}

/// What happens to an operation that was picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimFault {
    /// It fails with this errno.
    Errno(i32),
    /// The process is gone: this and every later operation of it changes nothing.
    Stop,
}

/// Calls the asker back, outside of all locks.
type Reply = Box<dyn FnOnce(Completion) + Send>;

struct Pending {
    inode: usize,
    tag: u64,
    op: Op,
    /// Bytes that have been carried out.
    done: usize,
    /// What a sync covers.
    snapshot: Option<Snapshot>,
    reply: Reply,
}

#[derive(Default)]
struct State {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    unsynced_names: Vec<BTreeMap<String, usize>>,
    now: u64,
    random: u64,
    plan: SimPlan,
    /// Number of the process that uses the disk.
    life: u64,
    /// Changing operations so far, and the one that was picked.
    operations: u64,
    picked: Option<(u64, SimFault)>,
    failures: u64,
    pending: BTreeMap<u64, Pending>,
    /// When an operation goes on: time and number of the step, the operation, whether it ends then.
    steps: BTreeMap<(u64, u64), (u64, bool)>,
    number: u64,
}

/// The disk of a host, as one process has it open; see the module's header. Clones are the same process.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
    life: u64,
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SimDisk(process {})", self.life)
    }
}

fn gone() -> io::Error {
    io::Error::other("the process is gone")
}

impl State {
    /// splitmix64.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.random;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.draw() % end.max(1)
    }

    fn chance(&mut self, permille: u64) -> bool {
        permille > 0 && self.below(1000) < permille
    }

    /// Counts a changing operation of the process `life`; fails it if it was picked, or by chance.
    fn step(&mut self, life: u64, permille: u64, no_space: bool) -> io::Result<()> {
        if life != self.life {
            return Err(gone());
        }
        self.operations += 1;
        if let Some((_, fault)) = self.picked.take_if(|(at, _)| *at == self.operations) {
            self.failures += 1;
            return match fault {
                SimFault::Errno(errno) => Err(io::Error::from_raw_os_error(errno)),
                SimFault::Stop => {
                    self.life += 1;
                    Err(gone())
                }
            };
        }
        if self.chance(permille) {
            self.failures += 1;
            let full = no_space && self.below(2) == 0;
            return Err(io::Error::from_raw_os_error(if full { libc::ENOSPC } else { libc::EIO }));
        }
        Ok(())
    }

    fn rename_all(&mut self, change: impl FnOnce(&mut BTreeMap<String, usize>)) {
        change(&mut self.names);
        self.unsynced_names.push(self.names.clone());
    }

    /// When an operation that begins now ends.
    fn duration(&mut self) -> u64 {
        let typical = self.plan.latency;
        let time = 1 + self.below(typical * 2);
        if self.chance(self.plan.stalls) { time + self.plan.stall } else { time }
    }

    fn schedule(&mut self, at: u64, op: u64, ends: bool) {
        self.number += 1;
        self.steps.insert((at, self.number), (op, ends));
    }

    fn begin(&mut self, inode: usize, tag: u64, op: Op, reply: Reply) {
        let time = self.duration();
        self.number += 1;
        let id = self.number;
        let half = len_of(&op) > SIM_SECTOR && self.below(3) > 0;
        let snapshot = matches!(op, Op::Sync { .. }).then(|| self.inodes[inode].snapshot());
        self.pending.insert(id, Pending { inode, tag, op, done: 0, snapshot, reply });
        if half {
            let at = self.now + self.below(time);
            self.schedule(at, id, false);
        }
        self.schedule(self.now + time, id, true);
    }

    /// Carries out an operation up to `upto` bytes of it.
    fn carry_on(&mut self, pending: &mut Pending, upto: usize) -> io::Result<()> {
        let (from, written_back) = (pending.done, self.plan.written_back);
        pending.done = upto.max(from);
        let inode = &mut self.inodes[pending.inode];
        let changed = match &pending.op {
            Op::Read { offset, buf, .. } => return inode.read_into(*offset, buf, from, upto),
            Op::Sync { .. } => None,
            Op::Write { offset, buf, .. } => {
                let part = buf.slice(from, upto.saturating_sub(from)).to_vec();
                Some(inode.write(place(*offset, from), &part))
            }
            Op::Punch { offset, .. } | Op::ZeroRange { offset, .. } => {
                Some(inode.zero(place(*offset, from), upto.saturating_sub(from)))
            }
        };
        if let Some(sectors) = changed
            && self.chance(written_back)
        {
            self.inodes[pending.inode].write_back(sectors);
        }
        Ok(())
    }

    fn finish(&mut self, id: u64) -> Option<(Reply, Completion)> {
        let mut pending = self.pending.remove(&id)?;
        let len = len_of(&pending.op);
        let (permille, reads) = match pending.op {
            Op::Read { .. } => (self.plan.read_fails, true),
            Op::Sync { .. } => (self.plan.sync_fails, false),
            _ => (self.plan.write_fails, false),
        };
        let writes = !reads && pending.snapshot.is_none();
        let fate = if reads {
            let fails = self.chance(permille);
            self.failures += u64::from(fails);
            if fails { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
        } else {
            self.step(self.life, permille, writes)
        };
        let result = match (fate, pending.snapshot.take()) {
            (Ok(()), Some(snapshot)) => {
                let late = self.below(2) == 0;
                self.inodes[pending.inode].make_durable(&snapshot, late);
                Ok(())
            }
            (Ok(()), None) => self.carry_on(&mut pending, len),
            (Err(error), Some(snapshot)) => {
                self.inodes[pending.inode].forget(&snapshot);
                Err(error)
            }
            (Err(error), None) => {
                // A part of the rest, in whole sectors.
                let rest = len.saturating_sub(pending.done) / SIM_SECTOR;
                let part = usize::try_from(self.below(rest as u64 + 1)).unwrap_or(0) * SIM_SECTOR;
                let upto = pending.done + part;
                self.carry_on(&mut pending, upto).and(Err(error))
            }
        };
        let Pending { tag, op, reply, .. } = pending;
        Some((reply, Completion { tag, result, op }))
    }

    /// The kernel is left with what a process had under way.
    fn abandon(&mut self) {
        self.steps.clear();
        for (_, mut pending) in std::mem::take(&mut self.pending) {
            let len = len_of(&pending.op);
            let upto = match self.below(3) {
                0 => continue,
                1 => len,
                _ => (len / 2).next_multiple_of(SIM_SECTOR).min(len),
            };
            match pending.snapshot.take() {
                Some(snapshot) => self.inodes[pending.inode].make_durable(&snapshot, false),
                None if matches!(pending.op, Op::Read { .. }) => {}
                // Nobody is there to be told of an error.
                None => drop(self.carry_on(&mut pending, upto)),
            }
        }
    }
}

fn place(offset: u64, from: usize) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(from)
}

fn len_of(op: &Op) -> usize {
    match op {
        Op::Read { buf, .. } | Op::Write { buf, .. } => buf.len(),
        Op::Punch { len, .. } | Op::ZeroRange { len, .. } => usize::try_from(*len).unwrap_or(usize::MAX),
        Op::Sync { .. } => 0,
    }
}

impl SimDisk {
    /// An empty disk; everything that it draws follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = State { random: seed, life: 1, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), life: 1 }
    }

    /// The same disk as the process has it that runs now, after [`kill`](Self::kill) or [`crash`](Self::crash).
    #[must_use]
    pub fn reopened(&self) -> Self {
        let life = self.state.lock().life;
        Self { state: Arc::clone(&self.state), life }
    }

    /// How it behaves from now on; what is under way keeps its time.
    pub fn set_plan(&self, plan: SimPlan) {
        self.state.lock().plan = plan;
    }

    /// Lets the `at`-th changing operation from now on (counted from 1; of engines, when they end) fail.
    pub fn fail_at(&self, at: u64, fault: SimFault) {
        let mut state = self.state.lock();
        state.operations = 0;
        state.picked = Some((at, fault));
    }

    /// Number of operations that were made to fail so far.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.state.lock().failures
    }

    /// Changing operations since the disk was made, or since the last [`fail_at`](Self::fail_at).
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// When something happens next, on the disk's clock.
    #[must_use]
    pub fn next_due(&self) -> Option<u64> {
        self.state.lock().steps.keys().next().map(|key| key.0)
    }

    /// It is now `to` microseconds: carries out what is due by then, in order, and reports what has ended.
    pub fn advance(&self, to: u64) {
        loop {
            let ended = {
                let mut state = self.state.lock();
                let due = state.steps.first_key_value().map(|(key, step)| (*key, *step));
                let Some((key, (id, ends))) = due.filter(|(key, _)| key.0 <= to) else {
                    state.now = state.now.max(to);
                    return;
                };
                state.steps.remove(&key);
                state.now = state.now.max(key.0);
                if ends {
                    state.finish(id)
                } else if let Some(mut pending) = state.pending.remove(&id) {
                    let half = (len_of(&pending.op) / 2).next_multiple_of(SIM_SECTOR);
                    // What a read meets in its first half it meets again at its end.
                    drop(state.carry_on(&mut pending, half));
                    state.pending.insert(id, pending);
                    None
                } else {
                    None
                }
            };
            if let Some((reply, completion)) = ended {
                reply(completion);
            }
        }
    }

    /// The process is killed: its handles are dead, and the kernel carries out what it had under way, in part, or not.
    pub fn kill(&self) {
        let mut state = self.state.lock();
        state.abandon();
        state.life += 1;
        state.picked = None;
    }

    /// The host loses power: of what was not synced each sector survives or not.
    pub fn crash(&self) {
        let mut state = self.state.lock();
        state.abandon();
        state.life += 1;
        state.picked = None;
        let changes = state.unsynced_names.len() as u64;
        let kept = usize::try_from(state.below(changes + 1)).unwrap_or(0);
        if let Some(names) = kept.checked_sub(1).and_then(|last| state.unsynced_names.get(last)).cloned() {
            state.durable_names = names;
        }
        state.unsynced_names.clear();
        state.names = state.durable_names.clone();
        // Nothing, everything, or a draw for each sector.
        let keeps = [0, 1000, 500, 900, 100][usize::try_from(state.below(5)).unwrap_or(0)];
        let mut inodes = std::mem::take(&mut state.inodes);
        for inode in &mut inodes {
            let length = state.chance(keeps);
            inode.crash(length, || state.chance(keeps));
        }
        state.inodes = inodes;
    }

    /// Makes all of it durable: for the time before a test begins.
    pub fn settle(&self) {
        let mut state = self.state.lock();
        state.durable_names = state.names.clone();
        state.unsynced_names.clear();
        for inode in &mut state.inodes {
            let all = inode.snapshot();
            inode.make_durable(&all, true);
        }
    }

    /// The file of a name, if there is one.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<SimFile> {
        let inode = self.state.lock().names.get(name).copied()?;
        Some(SimFile { disk: self.clone(), inode })
    }

    /// Makes an empty file; another one that had the name loses it.
    ///
    /// # Errors
    /// The process is gone, or a fault.
    pub fn create_file(&self, name: &str) -> io::Result<SimFile> {
        let mut state = self.state.lock();
        let fails = state.plan.meta_fails;
        state.step(self.life, fails, true)?;
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        state.rename_all(|names| {
            names.insert(name.to_owned(), inode);
        });
        Ok(SimFile { disk: self.clone(), inode })
    }

    /// Gives a file another name, replacing the one that had it.
    ///
    /// # Errors
    /// As [`create_file`](Self::create_file), or `NotFound`.
    pub fn rename_file(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        let fails = state.plan.meta_fails;
        state.step(self.life, fails, true)?;
        let inode = state.names.get(from).copied().ok_or(io::ErrorKind::NotFound)?;
        state.rename_all(|names| {
            names.remove(from);
            names.insert(to.to_owned(), inode);
        });
        Ok(())
    }

    /// Removes a name; that there is none is no error.
    ///
    /// # Errors
    /// As [`create_file`](Self::create_file).
    pub fn remove_file(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        let fails = state.plan.meta_fails;
        state.step(self.life, fails, false)?;
        state.rename_all(|names| {
            names.remove(name);
        });
        Ok(())
    }

    /// All names, in order.
    #[must_use]
    pub fn file_names(&self) -> Vec<String> {
        self.state.lock().names.keys().cloned().collect()
    }

    /// Makes names durable as they are now.
    ///
    /// # Errors
    /// As [`create_file`](Self::create_file).
    pub fn sync_names(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        let fails = state.plan.meta_fails;
        state.step(self.life, fails, false)?;
        state.durable_names = state.names.clone();
        state.unsynced_names.clear();
        Ok(())
    }

    /// Whether the process has died, by [`kill`](Self::kill), [`crash`](Self::crash) or [`SimFault::Stop`].
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.state.lock().life != self.life
    }
}
