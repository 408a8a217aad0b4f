// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A look changes nothing and finds what an opening finds; a takeover does what it says, also when it is cut off.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

use super::*;
use crate::config::CacheMode;
use crate::core::message::{BaseIdentity, Incarnation, MigrationId, RemainingDigest, VolumeId};
use crate::core::record::DestinationRecord;
use crate::core::takeover::{LostChunks, Was, forced_epoch};
use crate::store::{RemainingRun, Store, StoreParams, TakeOver, Transition};
use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};

const CHUNK: u64 = 64 << 10;
const EPOCH: Epoch = Epoch(5);
const OTHER_BOOT: BootId = BootId([0xee; 16]);

fn params() -> StoreParams {
    StoreParams {
        size: Some(8 * CHUNK),
        chunk_size: Some(64 << 10),
        cache: CacheMode::Buffered,
        ..StoreParams::default()
    }
}

fn at(chunk: u32, state: ChunkState, mask: u64) -> Transition {
    Transition { chunk: ChunkId(chunk), state, mask: BlockMask(mask), version: Version(3) }
}

fn record(stage: DestinationStage) -> MigrationRecord {
    let role = Role::Destination(DestinationRecord {
        migration: MigrationId([7; 16]),
        incarnation: Incarnation(1),
        base: BaseIdentity::default(),
        stage,
        write_cache: true,
        digest: RemainingDigest::default(),
    });
    MigrationRecord::V1 { volume: VolumeId([8; 16]), epoch: EPOCH, role }
}

/// Every file with its bytes, times and place on the disk. Reading changes nothing but the time of access.
fn bytes(dir: &Path) -> BTreeMap<String, (Vec<u8>, u64, i64, i64, u64)> {
    let entry = |entry: io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        let known = (meta.ino(), meta.mtime_nsec(), meta.ctime_nsec(), meta.blocks());
        let content = std::fs::read(entry.path()).unwrap();
        (entry.file_name().into_string().unwrap(), (content, known.0, known.1, known.2, known.3))
    };
    std::fs::read_dir(dir).unwrap().map(entry).collect()
}

/// An owner that still pulls: chunk 0 is whole, 1 and 2 are remote, 3 is remote but for its first two blocks.
fn active(dir: &Path, boot: BootId) {
    let store = Store::open_at_boot(StateDir::claim(dir).unwrap(), &params(), boot).unwrap();
    store.layer.file().kernel().write_all_at(&[9; 4 * CHUNK as usize], 0).unwrap();
    let set = [(0, 4, 2, true), (6, 1, 0, false)].map(|(first, run, count, still_remaining)| RemainingRun {
        first: ChunkId(first),
        run,
        count,
        still_remaining,
    });
    store.store_remaining(EPOCH, set.into_iter()).unwrap();
    store.record.store(&record(DestinationStage::Active { source_synced: true })).unwrap();
    let remote = |chunk, mask| at(chunk, ChunkState::Remote, mask);
    store.map.note(&[at(0, ChunkState::Modified, 0), remote(1, 0), remote(2, 0), remote(3, 3)]).unwrap();
}

fn missing(look: &Look) -> Missing {
    Missing::of(&look.superblock.geometry().unwrap(), &look.runs)
}

#[test]
fn a_look_changes_not_a_byte_and_finds_what_an_opening_finds() {
    let dir = tempfile::tempdir().unwrap();
    active(dir.path(), BootId::current().unwrap());
    // What an opening would change: a checkpoint that was cut off, a layer that a growth has left too long, old files.
    std::fs::write(dir.path().join("checkpoint.9.tmp"), b"cut off").unwrap();
    let layer = File::options().write(true).open(dir.path().join("layer")).unwrap();
    layer.set_len(9 * CHUNK).unwrap();
    let before = bytes(dir.path());
    let found = look(dir.path()).unwrap();
    assert_eq!(bytes(dir.path()), before);
    assert_eq!((found.layer.len, found.reverts, found.recovered.host_crashed), (9 * CHUNK, false, false));
    assert_eq!(found.record, Some((record(DestinationStage::Active { source_synced: true }), true)));
    let lost = Missing {
        chunks: 3,
        bytes: 3 * CHUNK - 2048,
        ranges: vec![CHUNK..3 * CHUNK, 3 * CHUNK + 2048..4 * CHUNK],
    };
    assert_eq!(missing(&found), lost);
    // It keeps a daemon out for as long as it looks, and is kept out by one.
    assert!(matches!(StateDir::claim(dir.path()), Err(StoreError::InUse { .. })));
    drop(found);
    let store = Store::open(dir.path(), &params()).unwrap();
    let error = look(dir.path()).unwrap_err();
    assert!(
        matches!(&error, StoreError::InUse { pid, .. } if *pid == std::process::id().to_string()),
        "{error}"
    );
    let opened = (store.recovered.clone(), store.superblock());
    drop(store);
    let found = look(dir.path()).unwrap();
    assert_eq!((found.recovered, found.superblock), opened);
}

#[test]
fn a_look_at_what_is_no_volume_says_so_by_name_and_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere");
    assert!(matches!(look(&nowhere), Err(StoreError::Io { .. })));
    assert!(!nowhere.exists());
    assert!(matches!(look(dir.path()), Err(StoreError::NoVolume { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    std::fs::write(dir.path().join("holiday.jpg"), b"x").unwrap();
    assert!(matches!(look(dir.path()), Err(StoreError::Foreign { .. })));
}

#[test]
fn torn_files_have_the_names_that_an_opening_gives_them() {
    type Damage = (&'static str, fn(&Path));
    let torn: [Damage; 5] = [
        ("superblock", |path| std::fs::write(path, b"BLKFSUPR\x01\0\0\0").unwrap()),
        ("record", |path| std::fs::write(path, vec![1; 8192]).unwrap()),
        ("layer", |path| File::options().write(true).open(path).unwrap().set_len(100).unwrap()),
        ("checkpoint.2", |path| std::fs::write(path, b"BLKFCKPT").unwrap()),
        ("forced", |path| std::fs::write(path, b"BLKFFORC\x01\0\0\0").unwrap()),
    ];
    for (name, damage) in torn {
        let dir = tempfile::tempdir().unwrap();
        active(dir.path(), BootId::current().unwrap());
        drop(Store::open(dir.path(), &params()).unwrap());
        let path = dir.path().join(name);
        let path = if name == "checkpoint.2" { newest_checkpoint(dir.path()) } else { path };
        damage(&path);
        let before = bytes(dir.path());
        let text = look(dir.path()).unwrap_err().to_string();
        assert!(text.contains(&path.display().to_string()), "{name}: {text}");
        assert_eq!(bytes(dir.path()), before);
        if name != "forced" {
            assert_eq!(Store::open(dir.path(), &params()).unwrap_err().to_string(), text);
        }
    }
}

fn newest_checkpoint(dir: &Path) -> PathBuf {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|path| path.to_string_lossy().contains("checkpoint.")).max().unwrap()
}

#[test]
fn after_a_host_crash_without_a_commit_all_that_came_counts_as_not_come() {
    let dir = tempfile::tempdir().unwrap();
    active(dir.path(), OTHER_BOOT);
    let before = bytes(dir.path());
    let found = look(dir.path()).unwrap();
    assert!(found.reverts && found.recovered.host_crashed);
    let lost = missing(&found);
    assert_eq!((lost.chunks, lost.ranges), (5, vec![0..4 * CHUNK, 6 * CHUNK..7 * CHUNK]));
    assert_eq!(found.runs.iter().map(|run| run.count).sum::<u32>(), 8);
    drop(found);
    assert_eq!(bytes(dir.path()), before);
    std::fs::remove_file(dir.path().join("remaining")).unwrap();
    let text = look(dir.path()).unwrap_err().to_string();
    assert!(text.contains("remaining is damaged"), "what all is must not be guessed: {text}");
}

fn take_over(dir: &Path, lost: LostChunks) -> Result<(), StoreError> {
    let state = StateDir::claim(dir).unwrap();
    let found = look_in(&state).unwrap();
    let (chunks, bytes) = (missing(&found).chunks, missing(&found).bytes);
    let (MigrationRecord::V1 { role, .. }, _) = found.record.as_ref().unwrap();
    let forced = matches!(role, Role::Destination(_)).then_some((
        VolumeId([8; 16]),
        Forced {
            migration: MigrationId([7; 16]),
            was: Was::Active,
            before: EPOCH,
            after: forced_epoch(EPOCH),
            at: 1,
            lost,
            chunks,
            bytes,
        },
    ));
    let store = Store::open_in(state, &params())?;
    let plan = TakeOver {
        runs: &found.runs,
        reverts: found.reverts,
        forced,
        lost,
        begins: "begins\n",
        ends: "ends\n",
    };
    store.take_over(&plan)
}

fn states(look: &Look) -> Vec<(ChunkState, u64)> {
    look.recovered.iter().map(|one| (one.state, one.mask.0)).collect()
}

#[test]
fn t27_a_takeover_makes_of_lost_chunks_what_was_asked_and_nothing_else() {
    use ChunkState::{Base, Modified, Remote, Zero};
    for (lost, expected) in [
        (LostChunks::Error, [(Modified, 0), (Remote, 0), (Remote, 0), (Remote, 3)]),
        (LostChunks::Zero, [(Modified, 0), (Zero, 0), (Zero, 0), (Modified, 0)]),
        (LostChunks::Base, [(Modified, 0), (Base, 0), (Base, 0), (Base, 3)]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        active(dir.path(), BootId::current().unwrap());
        take_over(dir.path(), lost).unwrap();
        let found = look(dir.path()).unwrap();
        assert_eq!(states(&found)[..4], expected, "{lost:?}");
        let (MigrationRecord::V1 { volume, epoch, role }, _) = found.record.clone().unwrap();
        assert_eq!((volume, epoch, role), (VolumeId([8; 16]), forced_epoch(EPOCH), Role::Serving));
        let forced = found.forced.unwrap();
        assert_eq!((forced.was, forced.lost, forced.chunks), (Was::Active, lost, 3));
        assert_eq!(std::fs::read(dir.path().join("recover.log")).unwrap(), b"begins\nends\n");
        let mut layer = vec![0; 4 * CHUNK as usize];
        File::open(dir.path().join("layer")).unwrap().read_exact_at(&mut layer, 0).unwrap();
        let (one, kept) = (CHUNK as usize, 3 * CHUNK as usize + 2048);
        assert!(
            layer[..one].iter().all(|byte| *byte == 9) && layer[3 * one..kept].iter().all(|byte| *byte == 9)
        );
        if lost != LostChunks::Error {
            assert!(layer[one..3 * one].iter().chain(&layer[kept..]).all(|byte| *byte == 0), "{lost:?}");
        }
    }
}

#[test]
fn t27_what_was_left_as_errors_can_be_settled_later() {
    let dir = tempfile::tempdir().unwrap();
    active(dir.path(), BootId::current().unwrap());
    take_over(dir.path(), LostChunks::Error).unwrap();
    take_over(dir.path(), LostChunks::Zero).unwrap();
    let found = look(dir.path()).unwrap();
    assert_eq!(missing(&found).chunks, 0);
    assert_eq!(states(&found)[3], (ChunkState::Modified, 0));
    assert_eq!(found.forced.unwrap().lost, LostChunks::Error, "that was how it was taken");
}

#[test]
fn after_a_host_crash_a_takeover_loses_what_was_not_committed_durably() {
    let dir = tempfile::tempdir().unwrap();
    active(dir.path(), OTHER_BOOT);
    take_over(dir.path(), LostChunks::Error).unwrap();
    let found = look(dir.path()).unwrap();
    assert!(!found.reverts);
    assert_eq!(missing(&found).ranges, [0..4 * CHUNK, 6 * CHUNK..7 * CHUNK]);
    drop(found);
    // And once more: the host goes down right after.
    let state = StateDir::claim(dir.path()).unwrap();
    let store = Store::open_at_boot(state, &params(), OTHER_BOOT).unwrap();
    assert!(store.recovered.host_crashed);
    let runs = &store.recovered.runs;
    assert_eq!(Missing::of(&store.geometry(), runs).chunks, 5);
}

#[test]
fn the_file_counts_for_nothing_before_the_record_does() {
    let dir = tempfile::tempdir().unwrap();
    active(dir.path(), BootId::current().unwrap());
    let folder = crate::store::medium::Directory::open(dir.path()).unwrap();
    let forced = Forced {
        migration: MigrationId([7; 16]),
        was: Was::Active,
        before: EPOCH,
        after: forced_epoch(EPOCH),
        at: 1,
        lost: LostChunks::Error,
        chunks: 0,
        bytes: 0,
    };
    forced::store(&folder, &forced).unwrap();
    assert_eq!(look(dir.path()).unwrap().forced, None);
    assert_eq!(Store::open(dir.path(), &params()).unwrap().forced().unwrap(), None);
}

#[test]
fn a_directory_that_is_emptied_for_another_migration_forgets_what_was_forced_but_not_its_log() {
    let dir = tempfile::tempdir().unwrap();
    active(dir.path(), BootId::current().unwrap());
    take_over(dir.path(), LostChunks::Error).unwrap();
    let store = Store::open(dir.path(), &params()).unwrap();
    assert_eq!(store.forced().unwrap().map(|forced| forced.was), Some(Was::Active));
    store.wipe().unwrap();
    assert_eq!(store.forced().unwrap(), None);
    drop(store);
    assert!(!dir.path().join("forced").exists() && dir.path().join("recover.log").exists());
    assert_eq!(missing(&look(dir.path()).unwrap()), Missing::default());
}

#[test]
fn missing_ranges_are_joined_and_end_with_the_volume() {
    let geometry = Geometry::new(5 * CHUNK + 512, 64 << 10).unwrap();
    let run = |first, count, mask| {
        let (first, mask) = (ChunkId(first), BlockMask(mask));
        Run { first, count, state: ChunkState::Remote, mask, version: Version(0) }
    };
    let all = Missing::of(&geometry, &[run(0, 2, 0), run(2, 1, 1), run(4, 2, 0)]);
    assert_eq!(all.ranges, [0..2 * CHUNK, 2 * CHUNK + 1024..3 * CHUNK, 4 * CHUNK..5 * CHUNK + 512]);
    assert_eq!((all.chunks, all.bytes), (5, 4 * CHUNK - 1024 + 512));
}
