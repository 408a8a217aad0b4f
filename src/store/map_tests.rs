// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The chunk map against a naive model, with a failure, a kill or a crash of the host at every operation.
//!
//! The model keeps all notes in order, the position that a commit acknowledged, and nothing else. After a kill the
//! map must be all notes that were acknowledged (and perhaps the one that was being written). After a crash of the
//! host it must be a prefix of the notes that has everything committed and stops somewhere between the acknowledged
//! commit and the last commit that was tried, `Local` and `Received` dropped.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::super::fault::{Disk, Fault};
use super::*;
use crate::core::geometry::BlockMask;
use proptest::prelude::*;

const CHUNKS: u32 = 40;
const HERE: BootId = BootId([1; 16]);
const LATER: BootId = BootId([2; 16]);

fn owner(boot: BootId) -> Owner {
    Owner { store: StoreId([9; 16]), boot, chunks: CHUNKS }
}

fn folder(disk: &Disk) -> Arc<dyn Folder> {
    Arc::new(disk.clone())
}

fn open(disk: &Disk, boot: BootId) -> Result<(ChunkMap, Recovered), StoreError> {
    ChunkMap::open(&folder(disk), owner(boot), |_| Ok(()))
}

fn fresh(disk: &Disk) -> ChunkMap {
    ChunkMap::create(&folder(disk), owner(HERE), ChunkState::Base).unwrap();
    open(disk, HERE).unwrap().0
}

fn one(chunk: u32, state: ChunkState, mask: u64, version: u64) -> Transition {
    Transition { chunk: ChunkId(chunk), state, mask: BlockMask(mask), version: Version(version) }
}

/// The n-th transition of the tests: all states, masks where they matter.
fn nth(n: u64) -> Transition {
    let chunk = u32::try_from(n * 7 % u64::from(CHUNKS)).unwrap();
    match n % 6 {
        0 => one(chunk, ChunkState::Base, n + 1, n),
        1 => one(chunk, ChunkState::Zero, 0, n),
        2 => one(chunk, ChunkState::Local, 0, n),
        3 => one(chunk, ChunkState::Modified, 0, n),
        4 => one(chunk, ChunkState::Received, 0, n),
        _ => one(chunk, ChunkState::Remote, n, n),
    }
}

/// The table after the first `count` notes.
fn after(count: u64) -> Vec<Transition> {
    let mut flat: Vec<_> = (0..CHUNKS).map(|n| one(n, ChunkState::Base, 0, 0)).collect();
    (1..=count).map(nth).for_each(|one| flat[one.chunk.index()] = one);
    flat
}

/// Without versions, and as recovery shows it after a crash of the host.
fn seen(table: Vec<Transition>, crashed: bool) -> Vec<Transition> {
    let seen = table.into_iter().map(|mut one| {
        one.version = Version(0);
        one.state = match one.state {
            ChunkState::Local if crashed => ChunkState::Base,
            ChunkState::Received if crashed => ChunkState::Modified,
            other => other,
        };
        one
    });
    seen.collect()
}

#[derive(Debug, Default, Clone, Copy)]
struct Model {
    noted: u64,
    tried: u64,
    committed: u64,
    commit_tried: u64,
}

/// A run of the daemon: notes, commits and rotations until something fails (or to the end).
fn live(map: &ChunkMap, model: &mut Model, steps: u64, go_on: bool) {
    let mut positions = vec![(0, 0)];
    for step in 1..=steps {
        model.tried = model.noted + 1;
        let noted = map.note(&[nth(model.tried)]);
        match &noted {
            Ok(()) => model.noted = model.tried,
            Err(_) if go_on => model.tried = model.noted,
            Err(_) => return,
        }
        positions.push((map.position(), model.noted));
        if step % 4 == 0 {
            // A commit of an older position: what a flush that took a while does.
            let (position, count) = positions[positions.len().saturating_sub(2)];
            model.commit_tried = model.commit_tried.max(count);
            match map.commit(position) {
                Ok(()) => model.committed = model.committed.max(count),
                Err(_) if go_on => {}
                Err(_) => return,
            }
        }
        if step % 11 == 0 {
            let table = after(model.noted);
            // A rotation makes all durable that was noted when it synced the layer.
            model.commit_tried = model.noted;
            match map.rotate(|chunk| table[chunk.index()], || Ok(())) {
                Ok(()) => model.committed = model.noted,
                Err(_) if go_on => {}
                Err(_) => return,
            }
        }
    }
}

fn table(recovered: &Recovered) -> Vec<Transition> {
    recovered.iter().collect()
}

fn is_prefix(recovered: &Recovered, mut range: std::ops::RangeInclusive<u64>) -> bool {
    let found = seen(table(recovered), false);
    range.any(|count| found == seen(after(count), recovered.host_crashed))
}

#[test]
fn a_kill_at_every_operation_loses_nothing_that_was_noted() {
    for at in 1..200 {
        let disk = Disk::new();
        let map = fresh(&disk);
        disk.fail_at(at, Fault::Stop);
        let mut model = Model::default();
        live(&map, &mut model, 40, false);
        disk.heal();
        let (_, recovered) = open(&disk, HERE).unwrap();
        assert!(!recovered.host_crashed);
        assert!(is_prefix(&recovered, model.noted..=model.tried), "at {at}: {model:?}");
    }
}

#[test]
fn t15_a_crash_of_the_host_at_every_operation_keeps_the_committed_and_only_that() {
    for at in 1..130 {
        for seed in 0..16 {
            let disk = Disk::new();
            let map = fresh(&disk);
            disk.fail_at(at, Fault::Stop);
            let mut model = Model::default();
            live(&map, &mut model, 40, false);
            disk.crash(seed);
            let (_, recovered) =
                open(&disk, LATER).unwrap_or_else(|error| panic!("at {at}, seed {seed}: {error}"));
            assert!(recovered.host_crashed);
            let allowed = model.committed..=model.commit_tried.max(model.committed);
            assert!(is_prefix(&recovered, allowed), "at {at}, seed {seed}: {model:?}");
        }
    }
}

#[test]
fn an_error_at_every_operation_is_told_and_loses_nothing() {
    for errno in [libc::EIO, libc::ENOSPC] {
        for at in 1..150 {
            for crash in [None, Some(0), Some(1), Some(2)] {
                let disk = Disk::new();
                let map = fresh(&disk);
                disk.fail_at(at, Fault::Errno(errno));
                let mut model = Model::default();
                live(&map, &mut model, 40, true);
                disk.heal();
                let recovered = match crash {
                    None => open(&disk, HERE).unwrap().1,
                    Some(seed) => {
                        disk.crash(seed);
                        open(&disk, LATER).unwrap().1
                    }
                };
                let allowed = match crash {
                    None => model.noted..=model.noted,
                    Some(_) => model.committed..=model.commit_tried.max(model.committed),
                };
                assert!(is_prefix(&recovered, allowed), "{errno} at {at}, {crash:?}: {model:?}");
            }
        }
    }
}

#[test]
fn recovery_itself_may_crash_at_every_operation() {
    for at in 1..20 {
        for seed in 0..12 {
            let disk = Disk::new();
            let map = fresh(&disk);
            let mut model = Model::default();
            live(&map, &mut model, 30, false);
            disk.crash(seed + 100);
            disk.fail_at(at, Fault::Stop);
            let first = open(&disk, LATER).map(|(_, recovered)| table(&recovered));
            disk.crash(seed);
            let (_, recovered) = open(&disk, BootId([3; 16])).unwrap();
            let allowed = model.committed..=model.commit_tried.max(model.committed);
            assert!(is_prefix(&recovered, allowed), "at {at}, seed {seed}");
            if let Ok(first) = first {
                assert_eq!(
                    seen(first, false),
                    seen(table(&recovered), false),
                    "what was recovered once stands"
                );
            }
        }
    }
}

#[test]
fn a_journal_cut_off_in_its_making_is_no_gap_when_the_recovery_is_cut_off_too() {
    let disk = Disk::new();
    let map = fresh(&disk);
    map.note(&[nth(1)]).unwrap();
    map.commit(map.position()).unwrap();
    drop(map);
    // A rotation had just made the name of journal 3 when the host went down.
    disk.create(&journal::name(3)).unwrap();
    disk.sync_dir().unwrap();
    disk.crash(0);
    // The next opening makes its journal, and has no space for its checkpoint.
    disk.fail_at(5, Fault::Errno(libc::ENOSPC));
    assert!(open(&disk, LATER).is_err());
    disk.heal();
    assert!(is_prefix(&open(&disk, LATER).unwrap().1, 1..=1));
}

proptest! {
    #[test]
    fn runs_of_the_daemon_after_one_another(lives in prop::collection::vec((1u64..40, any::<bool>(), any::<u64>()), 1..6)) {
        let disk = Disk::new();
        drop(fresh(&disk));
        let mut boot = 1;
        let mut expected = seen(after(0), false);
        for (steps, crash, seed) in lives {
            let (map, recovered) = open(&disk, BootId([boot; 16])).unwrap();
            prop_assert_eq!(seen(table(&recovered), false), expected.clone());
            for n in 1..=steps {
                map.note(&[nth(n)]).unwrap();
                expected[nth(n).chunk.index()] = seen(vec![nth(n)], false)[0];
            }
            if crash {
                map.commit(map.position()).unwrap();
                disk.crash(seed);
                boot += 1;
                expected = seen(expected, true);
            }
        }
    }
}

#[test]
fn pending_follows_notes_commits_and_handoffs() {
    let disk = Disk::new();
    let map = fresh(&disk);
    assert!(!map.pending());
    map.note(&[nth(1)]).unwrap();
    let first = map.position();
    map.note(&[nth(2)]).unwrap();
    map.commit(first).unwrap();
    assert!(map.pending());
    map.commit(map.position()).unwrap();
    assert!(!map.pending());
    disk.fail_at(1, Fault::Errno(libc::EIO));
    map.commit(map.position()).unwrap();
    assert_eq!(disk.operations(), 0, "nothing pending: no operation");
    disk.heal();
    map.set_handoff(Epoch(5));
    assert!(map.pending(), "a flush after the handoff must leave a trace even if no chunk changed");
    map.commit(map.position()).unwrap();
    assert!(!map.pending());
    disk.crash(0);
    assert_eq!(open(&disk, LATER).unwrap().1.committed_handoff, Some(Epoch(5)));
}

#[test]
fn a_handoff_without_a_commit_is_not_committed() {
    let disk = Disk::new();
    let map = fresh(&disk);
    map.note(&[nth(1)]).unwrap();
    map.set_handoff(Epoch(3));
    map.commit(map.position()).unwrap();
    map.set_handoff(Epoch(4));
    map.note(&[nth(2)]).unwrap();
    drop(map);
    // A kill and a restart in between make no difference: nobody flushed under epoch 4.
    assert_eq!(open(&disk, HERE).unwrap().1.committed_handoff, Some(Epoch(3)));
    disk.crash(0);
    assert_eq!(open(&disk, LATER).unwrap().1.committed_handoff, Some(Epoch(3)));
}

#[test]
fn t15_a_commit_that_began_before_a_handoff_does_not_count_for_it() {
    let disk = Disk::new();
    let map = fresh(&disk);
    map.note(&[nth(1)]).unwrap();
    // The layer is being synced up to here when more is noted and the offer is prepared.
    let begun = map.position();
    map.note(&[nth(2)]).unwrap();
    map.set_handoff(Epoch(6));
    map.commit(begun).unwrap();
    assert!(map.pending());
    drop(map);
    disk.crash(0);
    let recovered = open(&disk, LATER).unwrap().1;
    assert_eq!(
        recovered.committed_handoff, None,
        "what was noted second is gone: nothing was committed since"
    );
}

#[test]
fn that_a_rotation_is_due_is_told_once_for_each_journal() {
    let disk = Disk::new();
    let map = fresh(&disk);
    let told = Arc::new(AtomicU32::new(0));
    let teller = Arc::clone(&told);
    map.when_due(move || {
        teller.fetch_add(1, Ordering::SeqCst);
    });
    let told = || told.load(Ordering::SeqCst);
    let notes: Vec<_> = (1..=1000).map(nth).collect();
    for round in 1..=2 {
        while !map.wants_rotation() {
            assert_eq!(told(), round - 1);
            map.note(&notes).unwrap();
        }
        assert_eq!(told(), round);
        map.note(&notes).unwrap();
        assert_eq!(told(), round, "the same journal");
        map.rotate(|chunk| after(1000)[chunk.index()], || Ok(())).unwrap();
    }
    // A broken journal is due whatever its length; one that breaks while a rotation fails too.
    map.note(&[nth(1)]).unwrap();
    disk.fail_at(2, Fault::Errno(libc::EIO));
    assert!(map.commit(map.position()).is_err());
    disk.heal();
    assert_eq!(told(), 3);
    assert!(map.rotate(|chunk| after(1)[chunk.index()], || Err(io::Error::other("no"))).is_err());
    assert!(map.wants_rotation());
    map.note(&[nth(2)]).unwrap();
    assert_eq!(told(), 4, "another journal, and still due");
}

#[test]
fn a_journal_whose_sync_failed_is_trusted_again_only_after_a_rotation() {
    let disk = Disk::new();
    let map = fresh(&disk);
    map.note(&[nth(1)]).unwrap();
    disk.fail_at(2, Fault::Errno(libc::EIO));
    assert!(map.commit(map.position()).is_err());
    disk.heal();
    assert!(map.commit(map.position()).is_err(), "a second sync proves nothing");
    assert!(map.wants_rotation());
    map.rotate(|chunk| after(1)[chunk.index()], || Ok(())).unwrap();
    assert!(!map.wants_rotation() && !map.pending());
    map.note(&[nth(2)]).unwrap();
    map.commit(map.position()).unwrap();
    disk.crash(0);
    assert!(is_prefix(&open(&disk, LATER).unwrap().1, 2..=2));
}

#[test]
fn a_failed_layer_sync_keeps_the_old_generations() {
    let disk = Disk::new();
    let map = fresh(&disk);
    (1..=20).for_each(|n| map.note(&[nth(n)]).unwrap());
    for _ in 0..3 {
        assert!(map.rotate(|chunk| after(20)[chunk.index()], || Err(io::Error::other("no"))).is_err());
        assert!(map.rotate(|_| one(0, ChunkState::Installing, 0, 0), || Ok(())).is_err());
    }
    map.note(&[nth(21)]).unwrap();
    assert!(is_prefix(&open(&disk, HERE).unwrap().1, 21..=21));
}

#[test]
fn damage_is_told_from_a_torn_tail() {
    let newest = |disk: &Disk| {
        let newest = *Generations::find(disk).unwrap().journals.last().unwrap();
        (journal::name(newest), checkpoint::name(newest))
    };
    let notes = |commit: bool| {
        let disk = Disk::new();
        let map = fresh(&disk);
        (1..=10).for_each(|n| map.note(&[nth(n)]).unwrap());
        if commit {
            map.commit(map.position()).unwrap();
        }
        (11..=20).for_each(|n| map.note(&[nth(n)]).unwrap());
        disk
    };
    let frame = |n: usize| journal::HEADER + 64 * (n - 1) + 40;
    // The last frame may be torn.
    let disk = notes(false);
    disk.flip(&newest(&disk).0, frame(20));
    assert!(is_prefix(&open(&disk, HERE).unwrap().1, 19..=19));
    // One in the middle may not, as long as the host was up.
    let disk = notes(false);
    disk.flip(&newest(&disk).0, frame(5));
    assert!(matches!(open(&disk, HERE), Err(StoreError::Corrupt { .. })));
    // After a crash of the host it may, if it had not been committed.
    assert!(is_prefix(&open(&disk, LATER).unwrap().1, 0..=0));
    let disk = notes(true);
    disk.flip(&newest(&disk).0, frame(5));
    let error = open(&disk, LATER).unwrap_err().to_string();
    assert!(error.contains("frame 5") && error.contains("journal.2"), "{error}");
    let disk = notes(true);
    disk.flip(&newest(&disk).1, 70);
    assert!(matches!(open(&disk, HERE), Err(StoreError::Corrupt { .. })));
    let disk = notes(true);
    disk.remove(&newest(&disk).0).unwrap();
    assert!(matches!(open(&disk, HERE), Err(StoreError::Corrupt { .. })));
    let disk = notes(true);
    let other = Owner { store: StoreId([8; 16]), ..owner(HERE) };
    assert!(matches!(ChunkMap::open(&folder(&disk), other, |_| Ok(())), Err(StoreError::Foreign { .. })));
}

#[test]
fn versions_are_kept_when_they_matter() {
    for keep in [false, true] {
        let disk = Disk::new();
        let map = fresh(&disk);
        map.keep_versions(keep);
        map.rotate(|chunk| one(chunk.0, ChunkState::Modified, 0, u64::from(chunk.0)), || Ok(())).unwrap();
        map.note(&[one(3, ChunkState::Modified, 0, 77)]).unwrap();
        drop(map);
        let (map, recovered) = open(&disk, HERE).unwrap();
        assert_eq!(table(&recovered)[3].version, Version(77));
        assert_eq!(table(&recovered)[4].version, Version(if keep { 4 } else { 0 }));
        assert_eq!(recovered.runs.len(), if keep { 40 } else { 3 });
        drop(map);
        assert_eq!(open(&disk, HERE).unwrap().1, recovered, "a restart keeps what it found");
    }
}

#[test]
fn notes_go_on_while_another_thread_commits_and_rotates() {
    let disk = Disk::new();
    let map = fresh(&disk);
    let last = Mutex::new(after(0));
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            let (map, last) = (&map, &last);
            scope.spawn(move || {
                for n in 0..500u64 {
                    let now = one(thread * 10 + u32::try_from(n % 10).unwrap(), ChunkState::Base, n + 1, 0);
                    let mut table = last.lock();
                    map.note(&[now]).unwrap();
                    table[now.chunk.index()] = now;
                }
            });
        }
        for _ in 0..50 {
            map.commit(map.position()).unwrap();
            map.rotate(|chunk| last.lock()[chunk.index()], || Ok(())).unwrap();
        }
    });
    assert_eq!(table(&open(&disk, HERE).unwrap().1), last.into_inner());
}
