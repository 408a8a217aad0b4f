// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every state that a crash may leave of a folder in memory, one after the other and always in the same order.
//!
//! What may be left between two syncs, for a loss of power:
//! - of the changes of names every prefix, as a journaling file system orders them;
//! - of the changes of a file every subset: a disk with a cache writes in any order;
//! - of a write that crosses borders of sectors every subset of its sectors (prefixes and suffixes if it has very
//!   many), and of a small one every prefix;
//! - a write that makes the file longer may leave the length without the bytes: zeros.
//!
//! The number is kept in bounds by three things. Equal contents of a file are counted once. A file that no name leads
//! to is left out. Of the changes that are neither whole nor absent one image has at most [`Wear::torn`]: every
//! structure at rest is covered by a checksum of its own, so that one torn write more looks to a reader like one
//! absent write more, and all subsets of those are there.
//!
//! It is enough to look right before every sync, and at the end ([`Disk::fail_at_sync`]): between two syncs changes
//! are only added, so whatever may be left earlier may be left then too.

use super::{Change, Disk, Hold, Inode, State, apply};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a disk writes as a whole.
const SECTOR: usize = 512;
/// Of a write with at most this many sectors every subset may survive.
const ALL_SUBSETS: usize = 8;

/// How finely writes are torn.
#[derive(Debug, Clone, Copy)]
pub struct Wear {
    /// Most writes of one image of which only a part survives.
    pub torn: usize,
    /// A write of at most this many bytes is torn at every byte; a longer one at borders of sectors.
    pub bytes: usize,
}

/// A content that a file may be left with, and how many writes had to be torn for it.
type Variant = (Vec<u8>, usize);

/// What may be left of a change: the parts that survive, and whether that is a torn write.
fn fates(change: &Change, wear: Wear) -> Vec<(Vec<Change>, bool)> {
    let mut fates = vec![(Vec::new(), false), (vec![change.clone()], false)];
    let Change::Write { offset, bytes } = change else { return fates };
    let part = |from: usize, to: usize| Change::Write {
        offset: offset + from as u64,
        bytes: bytes[from..to].to_vec(),
    };
    let mut borders = vec![0];
    let first = SECTOR - usize::try_from(offset % SECTOR as u64).unwrap_or(0);
    borders.extend((first..bytes.len()).step_by(SECTOR));
    borders.push(bytes.len());
    let sectors = borders.len() - 1;
    let piece = |n: usize| part(borders[n], borders[n + 1]);
    if sectors <= ALL_SUBSETS {
        let some = 1..(1usize << sectors) - 1;
        fates.extend(some.map(|set| {
            let kept = (0..sectors).filter(|n| set & (1 << n) != 0);
            (kept.map(piece).collect(), true)
        }));
    } else {
        fates.extend((1..sectors).map(|n| (vec![part(0, borders[n])], true)));
        fates.extend((1..sectors).map(|n| (vec![part(borders[n], bytes.len())], true)));
    }
    if bytes.len() <= wear.bytes {
        fates.extend((1..bytes.len()).map(|cut| (vec![part(0, cut)], true)));
    }
    fates
}

impl Inode {
    /// All contents that a loss of power may leave, each once.
    fn variants(&self, wear: Wear) -> Vec<Variant> {
        let mut now: Vec<Variant> = vec![(self.durable.clone(), 0)];
        for (change, hold) in &self.unsynced {
            let mut fates = fates(change, wear);
            if *hold == Hold::Kept {
                fates = vec![(vec![change.clone()], false)];
            }
            // In the order of their bytes, so that it is always the same.
            let mut next: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
            let mut add = |content: Vec<u8>, torn: usize| {
                let known = next.entry(content).or_insert(torn);
                *known = torn.min(*known);
            };
            for (content, torn) in &now {
                for (parts, tears) in &fates {
                    let torn = torn + usize::from(*tears);
                    if torn > wear.torn {
                        continue;
                    }
                    let mut content = content.clone();
                    parts.iter().for_each(|part| apply(&mut content, part));
                    add(content, torn);
                }
                if let (Change::Write { offset, bytes }, Hold::Open | Hold::Lost) = (change, hold) {
                    // The length without the bytes.
                    let mut content = content.clone();
                    let end = usize::try_from(*offset).unwrap_or(0) + bytes.len();
                    content.resize(content.len().max(end), 0);
                    add(content, *torn);
                }
            }
            now = next.into_iter().collect();
        }
        now
    }
}

impl State {
    /// The names that a loss of power may leave, each set once.
    fn name_sets(&self) -> Vec<BTreeMap<String, usize>> {
        let mut sets = Vec::new();
        for names in std::iter::once(&self.durable_names).chain(&self.unsynced_names) {
            if !sets.contains(names) {
                sets.push(names.clone());
            }
        }
        sets
    }
}

/// Files with what each may hold, to be chosen from one by one.
struct Choice<'a, L> {
    files: Vec<(&'a str, &'a [Variant])>,
    chosen: Vec<&'a [u8]>,
    look: &'a mut L,
    given: usize,
}

impl<L: FnMut(Disk)> Choice<'_, L> {
    fn go(&mut self, torn_left: usize) {
        let Some((_, variants)) = self.files.get(self.chosen.len()) else {
            let files = self.files.iter().map(|(name, _)| *name).zip(self.chosen.iter().copied());
            (self.look)(Disk::holding(files));
            self.given += 1;
            return;
        };
        for (content, torn) in variants.iter().filter(|(_, torn)| *torn <= torn_left) {
            self.chosen.push(content);
            self.go(torn_left - torn);
            self.chosen.pop();
        }
    }
}

impl Disk {
    /// A folder with these files, all durable.
    pub fn holding<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut state = State::default();
        for (name, content) in files {
            state.names.insert(name.to_owned(), state.inodes.len());
            let content = content.to_vec();
            state.inodes.push(Inode { cached: content.clone(), durable: content, unsynced: Vec::new() });
        }
        state.durable_names = state.names.clone();
        Self(Arc::new(Mutex::new(state)))
    }

    /// All files as this process sees them, by name.
    #[must_use]
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.0.lock();
        let content = |inode: &usize| state.inodes.get(*inode).map(|inode| inode.cached.clone());
        state.names.iter().filter_map(|(name, inode)| Some((name.clone(), content(inode)?))).collect()
    }

    /// Gives `look` a folder for each state in which a loss of power now may leave this one (see the module); returns how
    /// many there were.
    pub fn images(&self, wear: Wear, mut look: impl FnMut(Self)) -> usize {
        let state = self.0.lock();
        let sets = state.name_sets();
        let used = |n: usize| sets.iter().any(|names| names.values().any(|inode| *inode == n));
        let variants: Vec<Vec<Variant>> = (0..)
            .zip(&state.inodes)
            .map(|(n, inode)| if used(n) { inode.variants(wear) } else { Vec::new() })
            .collect();
        drop(state);
        let mut given = 0;
        for names in &sets {
            let files =
                names.iter().map(|(name, inode)| (name.as_str(), variants[*inode].as_slice())).collect();
            let mut choice = Choice { files, chosen: Vec::new(), look: &mut look, given: 0 };
            choice.go(wear.torn);
            given += choice.given;
        }
        given
    }

    /// Gives `look` a folder for each state in which a kill of the process at the fault that stopped it may leave this one:
    /// all that was done, and of the write that was about to be made every prefix. Returns how many there were.
    pub fn killed(&self, mut look: impl FnMut(Self)) -> usize {
        let (names, mut contents, cut) = {
            let state = self.0.lock();
            let contents: Vec<Vec<u8>> = state.inodes.iter().map(|inode| inode.cached.clone()).collect();
            (state.names.clone(), contents, state.cut.clone())
        };
        let mut show = |contents: &[Vec<u8>]| {
            look(Self::holding(
                names.iter().map(|(name, inode)| (name.as_str(), contents[*inode].as_slice())),
            ));
        };
        show(&contents);
        let Some((inode, Change::Write { offset, bytes })) = cut else { return 1 };
        for end in 1..=bytes.len() {
            apply(&mut contents[inode], &Change::Write { offset, bytes: bytes[..end].to_vec() });
            show(&contents);
        }
        1 + bytes.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::super::medium::Folder;
    use super::super::Fault;
    use super::*;
    use std::collections::BTreeSet;

    const COARSE: Wear = Wear { torn: 1, bytes: 0 };

    fn seen(disk: &Disk, wear: Wear) -> BTreeSet<BTreeMap<String, Vec<u8>>> {
        let mut seen = BTreeSet::new();
        let given = disk.images(wear, |image| {
            seen.insert(image.files());
        });
        assert_eq!(given, seen.len(), "each once");
        seen
    }

    fn is_left(disk: &Disk, wear: Wear, files: &[(&str, &[u8])]) -> bool {
        seen(disk, wear).contains(&Disk::holding(files.iter().copied()).files())
    }

    #[test]
    fn what_was_synced_stays_and_of_the_rest_every_subset_may() {
        let disk = Disk::new();
        let file = disk.create("a").unwrap();
        file.write_at(b"old.", 0).unwrap();
        file.sync().unwrap();
        disk.sync_dir().unwrap();
        assert_eq!(seen(&disk, COARSE).len(), 1);
        file.write_at(b"N", 0).unwrap();
        file.write_at(b"W", 2).unwrap();
        let all: [&[u8]; 4] = [b"old.", b"Nld.", b"olW.", b"NlW."];
        assert_eq!(seen(&disk, COARSE).len(), 4);
        assert!(all.iter().all(|content| is_left(&disk, COARSE, &[("a", content)])));
        // Names in their order, each with all contents.
        disk.create("b").unwrap();
        disk.rename("a", "c").unwrap();
        assert_eq!(seen(&disk, COARSE).len(), 12);
        assert!(!is_left(&disk, COARSE, &[("c", b"old.")]), "the rename without what came before");
        assert!(is_left(&disk, COARSE, &[("b", b""), ("c", b"NlW.")]));
    }

    #[test]
    fn a_write_is_torn_at_sectors_and_a_small_one_anywhere() {
        let disk = Disk::new();
        let file = disk.create("a").unwrap();
        file.sync().unwrap();
        disk.sync_dir().unwrap();
        file.write_at(&[1; 1000], 100).unwrap();
        let parts = |first: u8, second: u8| {
            let mut bytes = vec![0; 100];
            bytes.extend([vec![first; 412], vec![second; 588]].concat());
            bytes
        };
        assert!(is_left(&disk, COARSE, &[("a", &parts(0, 1))]), "the second sector alone");
        assert!(is_left(&disk, COARSE, &[("a", &parts(0, 0))]), "the length alone");
        assert!(!is_left(&disk, Wear { torn: 0, bytes: 0 }, &[("a", &parts(0, 1))]));
        assert!(!is_left(&disk, COARSE, &[("a", &parts(1, 1)[..700])]));
        assert!(is_left(&disk, Wear { torn: 1, bytes: 1000 }, &[("a", &parts(1, 1)[..700])]));
        // Two torn writes only where that is asked for.
        file.write_at(&[2; 3], 0).unwrap();
        let mut both = parts(1, 1)[..700].to_vec();
        both[0] = 2;
        assert!(!is_left(&disk, Wear { torn: 1, bytes: 1000 }, &[("a", &both)]));
        assert!(is_left(&disk, Wear { torn: 2, bytes: 1000 }, &[("a", &both)]));
    }

    #[test]
    fn what_a_failed_sync_lost_no_later_sync_brings_back() {
        let disk = Disk::new();
        let file = disk.create("a").unwrap();
        disk.sync_dir().unwrap();
        file.write_at(b"x", 0).unwrap();
        disk.fail_at_sync(1, Fault::Errno(libc::EIO));
        assert!(file.sync().is_err());
        disk.heal();
        file.write_at(b"y", 1).unwrap();
        file.sync().unwrap();
        file.write_at(b"z", 2).unwrap();
        for (content, left) in [(b"xy", true), (b"\0y", true), (b"x\0", false)] {
            assert_eq!(is_left(&disk, COARSE, &[("a", content)]), left, "{content:?}");
        }
        disk.crash(0);
        assert_eq!(disk.files()["a"], b"\0y");
    }

    #[test]
    fn a_kill_leaves_all_that_was_done_and_a_part_of_what_was_being_done() {
        let disk = Disk::new();
        let file = disk.create("a").unwrap();
        disk.fail_at(2, Fault::Stop);
        file.write_at(b"one", 0).unwrap();
        assert!(file.write_at(b"two", 3).is_err() && disk.is_stopped());
        assert!(file.write_at(b"late", 3).is_err());
        let mut left = Vec::new();
        disk.killed(|image| left.push(image.files().remove("a").unwrap()));
        assert_eq!(left, [&b"one"[..], b"onet", b"onetw", b"onetwo"]);
    }
}
