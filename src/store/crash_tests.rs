// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything that a crash may leave of the chunk map, opened again and compared with what was promised.
//!
//! Short histories are played on a disk in memory that is stopped before each sync, and after the last operation.
//! Every image that a loss of power may leave then ([`super::fault::Disk::images`]) is opened under another boot id:
//! it must be the state of the last acknowledged commit, or of one that was being made, as a whole and with the
//! handoff of that commit. Under the same boot id, which no loss of power leaves, it must be such a prefix or be refused by name.
//! For a kill the history is stopped before every operation, in the middle of each write too: all notes are there.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "crash_record_tests.rs"]
mod record;
#[path = "crash_volume_tests.rs"]
mod volume;

use super::fault::{Disk, Fault, Wear};
use super::map::Owner;
use super::medium::Folder;
use super::*;
use crate::core::chunk::ALL_STATES;
use crate::core::geometry::{BlockMask, ChunkId};
use crate::core::message::Version;
use std::cell::RefCell;

const CHUNKS: u32 = 6;
const HERE: BootId = BootId([1; 16]);
const LATER: BootId = BootId([2; 16]);
const LAST: BootId = BootId([3; 16]);

type Table = Vec<Transition>;

/// One step of a history.
#[derive(Debug, Clone, Copy)]
enum Op {
    /// Notes so many transitions, one after the other.
    Note(u64),
    /// Notes so many transitions at once.
    Batch(u64),
    /// Commits the position of so many notes ago.
    Commit(usize),
    /// A rotation; one note comes in while the layer is synced.
    Rotate,
    /// A rotation during whose copy chunks change that have been copied, and others that have not.
    Fuzzy,
    /// An offer of this epoch has been prepared.
    Handoff(u64),
    /// Forgets all content.
    Reset,
}

/// What a commit that was tried promised: the history up to here, under this handoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    at: usize,
    handoff: u64,
}

/// What has been said to whom.
#[derive(Debug)]
struct Model {
    /// The table after each change; the last one may only have been tried.
    history: Vec<Table>,
    /// Position of the journal after each change.
    positions: Vec<u64>,
    /// Changes that were acknowledged.
    noted: usize,
    count: u64,
    marks: Vec<Mark>,
    /// The newest mark that was acknowledged.
    acked: usize,
    handoff: u64,
    /// Position of the journal when the handoff was set.
    handoff_from: u64,
    /// Failures are told, and the history goes on.
    go_on: bool,
}

fn lasting() -> impl Iterator<Item = ChunkState> {
    ALL_STATES.into_iter().filter(|state| *state != ChunkState::Installing)
}

/// The n-th transition: all states that last, masks where they matter.
fn nth(n: u64) -> Transition {
    let chunk = ChunkId(u32::try_from(n * 5 % u64::from(CHUNKS)).unwrap());
    let states = lasting().count() as u64;
    let state = lasting().nth(usize::try_from(n % states).unwrap()).unwrap();
    let mask = if matches!(state, ChunkState::Base | ChunkState::Remote) { n } else { 0 };
    Transition { chunk, state, mask: BlockMask(mask), version: Version(n) }
}

fn untouched(chunks: u32) -> Table {
    Run::whole(chunks, ChunkState::Base).transitions().collect()
}

/// How a chunk that stood so before the host went down stands after it.
fn after_host_crash(state: ChunkState) -> ChunkState {
    match state {
        ChunkState::Local => ChunkState::Base,
        ChunkState::Received => ChunkState::Modified,
        state => state,
    }
}

/// What must be found of a table: checkpoints leave versions out.
fn seen(table: &[Transition], host_crashed: bool) -> Table {
    let one = |one: &Transition| Transition {
        version: Version(0),
        state: if host_crashed { after_host_crash(one.state) } else { one.state },
        ..*one
    };
    table.iter().map(one).collect()
}

impl Model {
    fn new(go_on: bool) -> Self {
        Self {
            history: vec![untouched(CHUNKS)],
            positions: vec![0],
            noted: 0,
            count: 0,
            marks: vec![Mark { at: 0, handoff: 0 }],
            acked: 0,
            handoff: 0,
            handoff_from: 0,
            go_on,
        }
    }

    fn change(&mut self, change: impl FnOnce(&mut Table)) {
        self.history.truncate(self.noted + 1);
        let mut table = self.history[self.noted].clone();
        change(&mut table);
        self.history.push(table);
    }

    fn note(&mut self, map: &ChunkMap, transitions: &[Transition]) -> io::Result<()> {
        self.change(|table| transitions.iter().for_each(|one| table[one.chunk.index()] = *one));
        map.note(transitions).inspect_err(|_| {
            if self.go_on {
                self.history.pop();
            }
        })?;
        self.noted += 1;
        self.positions.truncate(self.noted);
        self.positions.push(map.position());
        Ok(())
    }

    fn next(&mut self) -> Transition {
        self.count += 1;
        nth(self.count)
    }

    fn mark(&mut self, at: usize, handoff: u64) {
        let last = self.marks[self.marks.len() - 1].at;
        self.marks.push(Mark { at: at.max(last), handoff });
    }

    fn step(&mut self, map: &ChunkMap, op: Op) -> io::Result<()> {
        match op {
            Op::Note(times) => {
                for _ in 0..times {
                    let one = self.next();
                    self.note(map, &[one])?;
                }
            }
            Op::Batch(count) => {
                let all: Vec<_> = (0..count).map(|_| self.next()).collect();
                self.note(map, &all)?;
            }
            Op::Commit(back) => {
                let at = self.noted - back;
                let covers = self.positions[at] >= self.handoff_from;
                let handoff = if covers { self.handoff } else { self.marks[self.acked].handoff };
                self.mark(at, handoff);
                map.commit(self.positions[at])?;
                self.acked = self.marks.len() - 1;
            }
            Op::Rotate => {
                let (table, one) = (self.history[self.noted].clone(), self.next());
                self.mark(self.noted, self.handoff);
                let mine = self.marks.len() - 1;
                let noted = RefCell::new(&mut *self);
                map.rotate(|chunk| table[chunk.index()], || noted.borrow_mut().note(map, &[one]))?;
                self.acked = mine;
            }
            Op::Fuzzy => self.rotate_fuzzily(map)?,
            Op::Handoff(epoch) => {
                map.set_handoff(Epoch(epoch));
                (self.handoff, self.handoff_from) = (epoch, map.position());
            }
            Op::Reset => {
                self.change(|table| *table = untouched(CHUNKS));
                (self.handoff, self.handoff_from) = (0, map.position());
                self.mark(self.noted + 1, 0);
                // Who is told that it failed calls it again.
                map.reset().or_else(|error| if self.go_on { map.reset() } else { Err(error) })?;
                self.noted += 1;
                self.positions.push(map.position());
                self.acked = self.marks.len() - 1;
            }
        }
        Ok(())
    }

    fn rotate_fuzzily(&mut self, map: &ChunkMap) -> io::Result<()> {
        let changes: Vec<_> = (0..CHUNKS).map(|_| self.next()).collect();
        // As if everything that will be noted is covered: nobody knows which of it is, until it is over.
        self.mark(self.noted + changes.len(), self.handoff);
        let mine = self.marks.len() - 1;
        let this = RefCell::new(&mut *self);
        let rotated = map.rotate(
            |chunk| {
                let mut this = this.borrow_mut();
                // With each copied chunk another one changes.
                this.note(map, &[changes[chunk.index()]]).unwrap_or_default();
                let noted = this.noted;
                this.history[noted][chunk.index()]
            },
            || Ok(()),
        );
        rotated?;
        self.acked = mine;
        Ok(())
    }

    fn play(&mut self, map: &ChunkMap, script: &[Op]) {
        for op in script {
            if self.step(map, *op).is_err() && !self.go_on {
                return;
            }
        }
    }

    /// Whether a table that may hold more than what was promised is a later one, as a whole or chunk by chunk.
    fn is_later(&self, found: &[Transition], each: bool) -> bool {
        let states: Vec<_> =
            self.history[self.marks[self.acked].at..].iter().map(|then| seen(then, false)).collect();
        let mut chunks = found.iter().enumerate();
        states.iter().any(|then| then == found)
            || (each && chunks.all(|(n, one)| states.iter().any(|then| then[n] == *one)))
    }

    /// Whether this is what was promised before the host went down: the state of one commit as a whole.
    fn allows(&self, found: &Recovered) -> bool {
        let table = table(found);
        let handoff = found.committed_handoff.map_or(0, |epoch| epoch.0);
        let allowed = |mark: &Mark| {
            mark.handoff == handoff && self.history.get(mark.at).is_some_and(|then| seen(then, true) == table)
        };
        self.marks[self.acked..].iter().any(allowed)
    }

    /// As [`allows`](Self::allows), chunk by chunk: of changes that were not flushed any may be there.
    fn allows_each(&self, found: &Recovered) -> bool {
        let (from, to) = (self.marks[self.acked].at, self.marks.last().unwrap().at);
        let states = &self.history[from..=to.min(self.history.len() - 1)];
        let mut chunks = table(found).into_iter().enumerate();
        chunks.all(|(n, one)| states.iter().any(|table| seen(table, true)[n] == one))
    }
}

fn table(found: &Recovered) -> Table {
    seen(&found.iter().collect::<Vec<_>>(), false)
}

fn folder(disk: &Disk) -> Arc<dyn Folder> {
    Arc::new(disk.clone())
}

fn copy(disk: &Disk) -> Disk {
    let files = disk.files();
    Disk::holding(files.iter().map(|(name, content)| (name.as_str(), content.as_slice())))
}

fn open_map(disk: &Disk, boot: BootId) -> Result<(ChunkMap, Recovered), StoreError> {
    let owner = Owner { store: StoreId([9; 16]), boot, chunks: CHUNKS };
    ChunkMap::open(&folder(disk), owner, |_| Ok(()))
}

/// A map after its first opening, all durable.
fn fresh() -> (Disk, ChunkMap) {
    let disk = Disk::new();
    let owner = Owner { store: StoreId([9; 16]), boot: HERE, chunks: CHUNKS };
    ChunkMap::create(&folder(&disk), owner, ChunkState::Base).unwrap();
    let map = open_map(&disk, HERE).unwrap().0;
    (disk, map)
}

/// An error must say which file it is about.
fn names_a_file(error: &StoreError) -> bool {
    let text = error.to_string();
    ["journal.", "checkpoint", "record", "remaining", "superblock", "layer"].iter().any(|n| text.contains(n))
}

/// Stops a run before each of its syncs, and at its end. `run` begins anew each time, and says whether it was to go on.
fn before_each_sync(mut run: impl FnMut(u64) -> Disk) {
    for at in 1.. {
        if !run(at).is_stopped() {
            return;
        }
    }
}

/// Opens everything that a loss of power may leave of a history; returns how many images that were. `each`: of what
/// was not flushed, each chunk may be there or not.
fn lose_power(script: &[Op], wear: Wear, each: bool) -> usize {
    let mut images = 0;
    before_each_sync(|at| {
        let (disk, map) = fresh();
        disk.fail_at_sync(at, Fault::Stop);
        let mut model = Model::new(false);
        model.play(&map, script);
        images += disk.images(wear, |image| check(&model, &image, at, each));
        disk
    });
    images
}

/// One image that a loss of power left.
fn check(model: &Model, image: &Disk, at: u64, each: bool) {
    match open_map(&copy(image), HERE) {
        Ok((_, found)) => {
            assert!(!found.host_crashed);
            assert!(model.is_later(&table(&found), each), "before sync {at}: {found:?}\n{model:?}");
        }
        Err(error) => assert!(names_a_file(&error), "{error}"),
    }
    let first = open_map(image, LATER).unwrap_or_else(|error| panic!("before sync {at}: {error}")).1;
    assert!(first.host_crashed);
    let allowed = if each { model.allows_each(&first) } else { model.allows(&first) };
    assert!(allowed, "before sync {at}: {first:?}\n{:?} of {model:?}", model.marks);
    // What was found stands.
    let again = open_map(image, LAST).unwrap().1;
    assert_eq!((table(&again), again.committed_handoff), (table(&first), first.committed_handoff));
}

const FINE: Wear = Wear { torn: 1, bytes: 300 };
const TWICE: Wear = Wear { torn: 2, bytes: 64 };
const COARSE: Wear = Wear { torn: 1, bytes: 0 };

/// Notes, commits of older positions, and a journal that is longer than what was written with zeros ahead.
const COMMITS: &[Op] = &[
    Op::Note(5),
    Op::Commit(2),
    Op::Batch(3),
    Op::Note(3),
    Op::Handoff(7),
    Op::Note(1),
    Op::Commit(1),
    Op::Commit(0),
    Op::Note(3),
];

const ROTATIONS: &[Op] = &[
    Op::Note(2),
    Op::Rotate,
    Op::Note(2),
    Op::Handoff(3),
    Op::Commit(0),
    Op::Note(1),
    Op::Rotate,
    Op::Handoff(4),
    Op::Rotate,
    Op::Note(1),
    Op::Reset,
    Op::Note(2),
    Op::Commit(1),
];

#[test]
fn t15_every_crash_image_of_notes_and_commits_is_a_committed_state() {
    let images = lose_power(COMMITS, FINE, false);
    println!("notes and commits: {images} images");
    assert!(images > 1000);
}

#[test]
fn every_crash_image_with_two_torn_frames_is_a_committed_state() {
    let script = [Op::Note(2), Op::Commit(1), Op::Note(1), Op::Commit(0), Op::Note(2)];
    let images = lose_power(&script, TWICE, false);
    println!("two torn frames: {images} images");
    assert!(images > 1000);
}

#[test]
fn t15_every_crash_image_of_rotations_is_a_committed_state() {
    let images = lose_power(ROTATIONS, FINE, false);
    println!("rotations: {images} images");
    assert!(images > 1000);
}

#[test]
fn every_crash_image_of_every_history_of_four_steps_is_a_committed_state() {
    let steps = [Op::Note(1), Op::Commit(0), Op::Commit(1), Op::Rotate, Op::Handoff(5)];
    let (mut images, mut histories) = (0, 0);
    for number in 0..steps.len().pow(4) {
        let script: Vec<_> =
            (0..4).map(|digit| steps[number / steps.len().pow(digit) % steps.len()]).collect();
        // The first note is there to be committed, or not.
        let script = [&[Op::Note(1)], script.as_slice()].concat();
        images += lose_power(&script, COARSE, false);
        histories += 1;
    }
    println!("{histories} histories: {images} images");
    assert!(images > 10_000);
}

#[test]
fn every_crash_image_of_a_rotation_under_load_has_each_chunk_as_it_was_or_became() {
    let script = [Op::Note(1), Op::Fuzzy, Op::Note(1), Op::Fuzzy, Op::Commit(0)];
    let images = lose_power(&script, COARSE, true);
    println!("rotations under load: {images} images");
    assert!(images > 1000);
}

#[test]
fn every_kill_in_a_history_keeps_every_note() {
    let mut images = 0;
    for script in [COMMITS, ROTATIONS] {
        for at in 1.. {
            let (disk, map) = fresh();
            disk.fail_at(at, Fault::Stop);
            let mut model = Model::new(false);
            model.play(&map, script);
            images += disk.killed(|image| {
                let (_, found) =
                    open_map(&copy(&image), HERE).unwrap_or_else(|error| panic!("at {at}: {error}"));
                let found = table(&found);
                let mut kept = model.history[model.noted..].iter().map(|then| seen(then, false));
                assert!(kept.any(|then| then == found), "at {at}: {found:?}\n{model:?}");
                // The host may still go down when all of that has reached the disk.
                let (_, found) = open_map(&image, LATER).unwrap();
                assert!(model.allows(&found), "at {at}: {found:?}\n{model:?}");
            });
            if !disk.is_stopped() {
                break;
            }
        }
    }
    println!("kills: {images} images");
    assert!(images > 1000);
}

#[test]
fn every_crash_image_after_a_failed_sync_is_a_committed_state() {
    let mut images = 0;
    for script in [COMMITS, ROTATIONS] {
        for at in 1..40 {
            let (disk, map) = fresh();
            disk.fail_at_sync(at, Fault::Errno(libc::EIO));
            let mut model = Model::new(true);
            model.play(&map, script);
            // A daemon rotates when a sync has failed; here it comes last, and then nothing is lost any more.
            for ends in [false, true] {
                if ends {
                    disk.heal();
                    model.step(&map, Op::Rotate).unwrap();
                }
                images += disk.images(COARSE, |image| {
                    let (_, found) =
                        open_map(&image, LATER).unwrap_or_else(|error| panic!("sync {at}: {error}"));
                    assert!(model.allows(&found), "sync {at}: {found:?}\n{model:?}");
                });
            }
            let (_, found) = open_map(&disk, HERE).unwrap();
            assert_eq!(
                table(&found),
                seen(&model.history[model.noted], false),
                "sync {at}: a kill loses nothing"
            );
        }
    }
    println!("failed syncs: {images} images");
    assert!(images > 1000);
}

#[test]
fn a_recovery_that_is_cut_off_anywhere_is_made_anew() {
    let mut images = 0;
    let script = [Op::Note(2), Op::Commit(1), Op::Note(1), Op::Rotate, Op::Note(1)];
    let whole = Wear { torn: 0, bytes: 0 };
    before_each_sync(|at| {
        let (disk, map) = fresh();
        disk.fail_at_sync(at, Fault::Stop);
        let mut model = Model::new(false);
        model.play(&map, &script);
        disk.images(whole, |image| {
            let mut first = None;
            before_each_sync(|cut| {
                let image = copy(&image);
                image.fail_at_sync(cut, Fault::Stop);
                let opened = open_map(&image, LATER).map(|(_, found)| table(&found)).ok();
                first = opened.clone().or(first.take());
                images += image.images(COARSE, |again| {
                    let (_, found) =
                        open_map(&again, LAST).unwrap_or_else(|error| panic!("at {at}, {cut}: {error}"));
                    assert!(model.allows(&found), "at {at}, {cut}: {found:?}\n{model:?}");
                    assert!(opened.as_ref().is_none_or(|first| *first == table(&found)), "what stood stands");
                });
                image
            });
        });
        disk
    });
    println!("recoveries: {images} images");
    assert!(images > 1000);
}
