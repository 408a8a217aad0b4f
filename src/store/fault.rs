// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A folder in memory that can fail and crash: the twin of [`super::medium::Directory`] for tests.
//!
//! It keeps two versions of everything: what this process sees (the page cache), and what a loss of power leaves.
//! [`Disk::crash`] keeps what was synced; of the rest each write survives whole, in part, or not, and of the
//! changes of names a prefix, as a journaling file system orders them. A killed process loses nothing: just open
//! the folder again. [`Disk::images`] goes through everything that a crash may leave, [`Disk::killed`] through what a
//! kill may.
//!
//! A sync that failed is not made good by one that succeeds: the kernel has forgotten that those pages were dirty, so what
//! was to be written then may survive a crash or not, for ever.

mod images;

pub use images::Wear;

use super::medium::{Folder, Medium};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// What the disk does at an operation that was picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The operation fails with this errno; a failed write has written some of its bytes.
    Errno(i32),
    /// The process is gone: this and every later operation fails, and nothing changes any more.
    Stop,
}

#[derive(Debug, Clone)]
enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    SetLen(u64),
}

/// What a loss of power may do to a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// Not synced.
    Open,
    /// A sync of it failed: no later one makes it durable.
    Lost,
    /// Synced; it waits here only because a lost change comes before it.
    Kept,
}

#[derive(Debug, Default)]
struct Inode {
    cached: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<(Change, Hold)>,
}

impl Inode {
    fn synced(&mut self) {
        for (_, hold) in self.unsynced.iter_mut().filter(|(_, hold)| *hold == Hold::Open) {
            *hold = Hold::Kept;
        }
        let lost = self.unsynced.iter().position(|(_, hold)| *hold == Hold::Lost);
        for (change, _) in self.unsynced.drain(..lost.unwrap_or(self.unsynced.len())) {
            apply(&mut self.durable, &change);
        }
    }

    fn sync_failed(&mut self) {
        for (_, hold) in self.unsynced.iter_mut().filter(|(_, hold)| *hold == Hold::Open) {
            *hold = Hold::Lost;
        }
    }
}

#[derive(Debug, Default)]
struct State {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    unsynced_names: Vec<BTreeMap<String, usize>>,
    operations: u64,
    syncs: u64,
    fault: Option<(u64, Fault)>,
    /// Counts syncs alone.
    sync_fault: Option<(u64, Fault)>,
    stopped: bool,
    /// The change that the process was about to make when it was stopped.
    cut: Option<(usize, Change)>,
}

/// The folder; clones are the same folder.
#[derive(Debug, Clone, Default)]
pub struct Disk(Arc<Mutex<State>>);

#[derive(Debug)]
struct OpenFile {
    disk: Disk,
    inode: usize,
}

fn apply(content: &mut Vec<u8>, change: &Change) {
    match change {
        Change::SetLen(len) => content.resize(usize::try_from(*len).unwrap_or(0), 0),
        Change::Write { offset, bytes } => {
            let start = usize::try_from(*offset).unwrap_or(0);
            if content.len() < start + bytes.len() {
                content.resize(start + bytes.len(), 0);
            }
            content[start..start + bytes.len()].copy_from_slice(bytes);
        }
    }
}

/// A small generator, so that a crash is reproduced by its seed (splitmix64).
fn draw(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *seed;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

impl State {
    /// Counts an operation that changes something, and fails it if it was picked.
    fn step(&mut self) -> io::Result<()> {
        if self.stopped {
            return Err(io::Error::other("the process is gone"));
        }
        self.operations += 1;
        let picked = self.fault.filter(|(at, _)| *at == self.operations);
        self.fail(picked)
    }

    /// As [`step`](Self::step), for a sync.
    fn step_sync(&mut self) -> io::Result<()> {
        self.step()?;
        self.syncs += 1;
        let picked = self.sync_fault.filter(|(at, _)| *at == self.syncs);
        self.fail(picked)
    }

    fn fail(&mut self, picked: Option<(u64, Fault)>) -> io::Result<()> {
        match picked {
            Some((_, Fault::Errno(errno))) => Err(io::Error::from_raw_os_error(errno)),
            Some((_, Fault::Stop)) => {
                self.stopped = true;
                Err(io::Error::other("the process is gone"))
            }
            None => Ok(()),
        }
    }

    /// No fault any more, and a process that lives.
    fn healed(&mut self) {
        (self.fault, self.sync_fault, self.cut) = (None, None, None);
        self.stopped = false;
    }

    fn rename_all(&mut self, change: impl FnOnce(&mut BTreeMap<String, usize>)) {
        change(&mut self.names);
        self.unsynced_names.push(self.names.clone());
    }
}

impl Disk {
    /// An empty folder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the `at`-th changing operation from now on (counted from 1) fail.
    pub fn fail_at(&self, at: u64, fault: Fault) {
        let mut state = self.0.lock();
        state.operations = 0;
        state.fault = Some((at, fault));
    }

    /// As [`fail_at`](Self::fail_at), but counts only syncs, of files and of the folder.
    pub fn fail_at_sync(&self, at: u64, fault: Fault) {
        let mut state = self.0.lock();
        state.syncs = 0;
        state.sync_fault = Some((at, fault));
    }

    /// Whether the process was stopped by a fault.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.lock().stopped
    }

    /// Lets everything succeed again, as for the next process.
    pub fn heal(&self) {
        self.0.lock().healed();
    }

    /// Number of changing operations since the last [`fail_at`](Self::fail_at).
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    /// The host loses power: what was not synced survives or not, as `seed` says; 0 loses all of it.
    pub fn crash(&self, seed: u64) {
        let mut state = self.0.lock();
        let mut random = seed;
        let mut keep = move || if seed == 0 { 0 } else { draw(&mut random) };
        let kept = usize::try_from(keep() % (state.unsynced_names.len() as u64 + 1)).unwrap_or(0);
        if let Some(names) = kept.checked_sub(1).and_then(|last| state.unsynced_names.get(last)).cloned() {
            state.durable_names = names;
        }
        state.unsynced_names.clear();
        state.names = state.durable_names.clone();
        for inode in &mut state.inodes {
            for (change, hold) in std::mem::take(&mut inode.unsynced) {
                let fate = if hold == Hold::Kept { 2 } else { keep() };
                match (fate % 3, change) {
                    (0, _) => {}
                    (1, Change::Write { offset, bytes }) => {
                        // Torn at a sector's border.
                        let cut = usize::try_from(fate >> 8).unwrap_or(0) % (bytes.len() + 1) / 512 * 512;
                        let bytes = bytes[..cut].to_vec();
                        apply(&mut inode.durable, &Change::Write { offset, bytes });
                    }
                    (_, change) => apply(&mut inode.durable, &change),
                }
            }
            inode.cached = inode.durable.clone();
        }
        state.healed();
    }

    /// Changes a byte of a file where it lies, as a failing disk does.
    pub fn flip(&self, name: &str, offset: usize) {
        let mut state = self.0.lock();
        if let Some(inode) = state.names.get(name).copied().and_then(|inode| state.inodes.get_mut(inode)) {
            for content in [&mut inode.cached, &mut inode.durable] {
                if let Some(byte) = content.get_mut(offset) {
                    *byte ^= 0x40;
                }
            }
        }
    }

    fn handle(&self, inode: usize) -> Arc<dyn Medium> {
        Arc::new(OpenFile { disk: self.clone(), inode })
    }
}

impl Folder for Disk {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn Medium>>> {
        let inode = self.0.lock().names.get(name).copied();
        Ok(inode.map(|inode| self.handle(inode)))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        let mut state = self.0.lock();
        state.step()?;
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        state.rename_all(|names| {
            names.insert(name.to_owned(), inode);
        });
        Ok(self.handle(inode))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.step()?;
        let inode = state.names.get(from).copied().ok_or(io::ErrorKind::NotFound)?;
        state.rename_all(|names| {
            names.remove(from);
            names.insert(to.to_owned(), inode);
        });
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.step()?;
        state.rename_all(|names| {
            names.remove(name);
        });
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().names.keys().cloned().collect())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.step_sync()?;
        state.durable_names = state.names.clone();
        state.unsynced_names.clear();
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("memory").join(name)
    }
}

impl OpenFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let stepped = state.step();
        let stopped = state.stopped;
        if stopped && state.cut.is_none() {
            state.cut = Some((self.inode, change.clone()));
        }
        let Some(inode) = state.inodes.get_mut(self.inode) else { return stepped };
        let change = match (&stepped, change) {
            (Ok(()), change) => change,
            // A failed write leaves some of itself behind.
            (Err(_), Change::Write { offset, bytes }) if !stopped => {
                Change::Write { offset, bytes: bytes[..bytes.len() / 2].to_vec() }
            }
            _ => return stepped,
        };
        apply(&mut inode.cached, &change);
        inode.unsynced.push((change, Hold::Open));
        stepped
    }
}

impl Medium for OpenFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.disk.0.lock();
        let content = state.inodes.get(self.inode).map_or(&[][..], |inode| &inode.cached);
        let rest = usize::try_from(offset).ok().and_then(|offset| content.get(offset..)).unwrap_or(&[]);
        let count = rest.len().min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change(Change::Write { offset, bytes: bytes.to_vec() })
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let stepped = state.step_sync();
        let stopped = state.stopped;
        if let Some(inode) = state.inodes.get_mut(self.inode) {
            match &stepped {
                Ok(()) => inode.synced(),
                Err(_) if !stopped => inode.sync_failed(),
                Err(_) => {}
            }
        }
        stepped
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().inodes.get(self.inode).map_or(0, |inode| inode.cached.len() as u64))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len))
    }
}
