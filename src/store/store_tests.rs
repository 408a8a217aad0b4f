// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! State directories on a real file system: made, opened again, refused.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use crate::core::geometry::{BlockMask, ChunkId};
use crate::core::message::Version;
use crate::core::record::{MigrationRecord, Role};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const CHUNK: u64 = DEFAULT_CHUNK_SIZE as u64;

fn sized(size: u64) -> StoreParams {
    StoreParams { size: Some(size), serial: "serial".into(), ..StoreParams::default() }
}

fn at(chunk: u32, state: ChunkState) -> Transition {
    Transition { chunk: ChunkId(chunk), state, mask: BlockMask::EMPTY, version: Version(0) }
}

fn refusal(dir: &Path, params: &StoreParams) -> String {
    Store::open(dir, params).unwrap_err().to_string()
}

fn image(dir: &Path, name: &str, len: usize, byte: u8) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, vec![byte; len]).unwrap();
    path
}

#[test]
fn a_volume_is_made_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("deep/state");
    let store = Store::open(&state, &sized(10 * CHUNK + 512)).unwrap();
    let superblock = store.superblock();
    assert_eq!((superblock.size, superblock.serial.as_str()), (10 * CHUNK + 512, "serial"));
    assert_eq!(store.recovered.runs, [Run::whole(11, ChunkState::Base)]);
    assert_eq!(store.layer.file().kernel().metadata().unwrap().len(), 10 * CHUNK + 512);
    assert!(store.record.load().is_none() && store.load_remaining().unwrap().is_none());
    store.map.note(&[at(3, ChunkState::Modified), at(10, ChunkState::Zero)]).unwrap();
    let record = MigrationRecord::V1 { volume: superblock.volume, epoch: Epoch(9), role: Role::Serving };
    store.record.store(&record).unwrap();
    store.store_remaining(Epoch(2), std::iter::empty()).unwrap();
    drop(store);

    let store = Store::open(&state, &StoreParams::default()).unwrap();
    assert_eq!(store.superblock(), superblock);
    assert!(!store.recovered.host_crashed);
    let states: Vec<_> = store.recovered.iter().map(|one| one.state).collect();
    assert_eq!(
        (states[3], states[10], states[4]),
        (ChunkState::Modified, ChunkState::Zero, ChunkState::Base)
    );
    assert_eq!(store.record.load(), Some((record, true)));
    assert_eq!(store.load_remaining().unwrap(), Some((Epoch(2), vec![])));
    store.adopt(VolumeId([5; 16]), "theirs", true, None).unwrap();
    drop(store);

    let store = Store::open(&state, &sized(10 * CHUNK + 512)).unwrap();
    let adopted = store.superblock();
    assert_eq!(
        (adopted.volume, adopted.serial.as_str(), adopted.read_only),
        (VolumeId([5; 16]), "theirs", true)
    );
    assert_eq!(adopted.size, superblock.size);
}

#[test]
fn the_guests_cache_mode_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Store::open(dir.path(), &sized(CHUNK)).unwrap();
    assert!(!open().superblock().write_through);
    for on in [true, false] {
        open().set_write_through(on).unwrap();
        assert_eq!(open().superblock().write_through, on);
    }
}

#[test]
fn a_directory_has_one_daemon_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), &sized(CHUNK)).unwrap();
    let error = Store::open(dir.path(), &sized(CHUNK)).unwrap_err();
    assert!(matches!(&error, StoreError::InUse { pid, .. } if *pid == std::process::id().to_string()));
    let text = error.to_string();
    assert!(text.contains(&dir.path().display().to_string()) && text.contains("in use by pid"), "{text}");
    drop(store);
    Store::open(dir.path(), &sized(CHUNK)).unwrap();
}

#[test]
fn an_empty_directory_waits_for_a_size_and_stays_usable() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Store::open(dir.path(), &StoreParams::default()), Err(StoreError::NoSize { .. })));
    let state = StateDir::claim(dir.path()).unwrap();
    assert!(state.superblock().unwrap().is_none());
    Store::open_in(state, &sized(CHUNK)).unwrap();
    assert!(StateDir::claim(dir.path()).unwrap().superblock().unwrap().is_some());
}

#[test]
fn foreign_and_damaged_directories_are_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "holiday.jpg", 10, 1);
    let text = refusal(dir.path(), &sized(CHUNK));
    assert!(text.contains("holiday.jpg") && text.contains("give an empty directory"), "{text}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path(), &sized(CHUNK)).unwrap());
    let superblock = dir.path().join("superblock");
    let whole = std::fs::read(&superblock).unwrap();
    std::fs::write(&superblock, &whole[..whole.len() - 1]).unwrap();
    let text = refusal(dir.path(), &sized(CHUNK));
    assert!(text.contains("superblock is damaged"), "{text}");
    std::fs::write(&superblock, b"something else entirely").unwrap();
    assert!(refusal(dir.path(), &sized(CHUNK)).contains("was not written by blkferryd"));
    std::fs::write(&superblock, &whole).unwrap();
    File::options().write(true).open(dir.path().join("layer")).unwrap().set_len(100).unwrap();
    let text = refusal(dir.path(), &sized(CHUNK));
    assert!(text.contains("layer") && text.contains("100 bytes"), "{text}");
}

#[test]
fn a_volume_whose_making_was_cut_off_is_made_anew_but_data_is_never_dropped() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path(), &sized(CHUNK)).unwrap());
    std::fs::remove_file(dir.path().join("superblock")).unwrap();
    drop(Store::open(dir.path(), &sized(2 * CHUNK)).unwrap());
    let layer = File::options().write(true).open(dir.path().join("layer")).unwrap();
    layer.write_all_at(&[1; 4096], 0).unwrap();
    layer.sync_all().unwrap();
    std::fs::remove_file(dir.path().join("superblock")).unwrap();
    let text = refusal(dir.path(), &sized(CHUNK));
    assert!(text.contains("superblock") && text.contains("holds data"), "{text}");
    assert!(dir.path().join("journal.2").exists());
}

#[test]
fn geometry_is_fixed_when_a_volume_is_made() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path(), &sized(4 * CHUNK)).unwrap());
    assert!(refusal(dir.path(), &sized(5 * CHUNK)).contains("leave out --size"));
    let chunk = StoreParams { chunk_size: Some(64 << 10), ..StoreParams::default() };
    assert!(refusal(dir.path(), &chunk).contains("leave out --chunk-size"));
    let other = tempfile::tempdir().unwrap();
    assert!(matches!(Store::open(other.path(), &sized(1000)), Err(StoreError::Geometry(_))));
    let small = StoreParams { chunk_size: Some(64 << 10), ..sized(4 * CHUNK) };
    assert_eq!(Store::open(other.path(), &small).unwrap().geometry().chunk_count(), 16);
    assert_eq!(Store::open(other.path(), &StoreParams::default()).unwrap().geometry().chunk_size(), 64 << 10);
}

#[test]
fn t14_a_base_image_is_told_by_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let on = |path: &Path, size| StoreParams {
        base: Some(path.to_str().unwrap().into()),
        size,
        ..StoreParams::default()
    };
    let base = image(dir.path(), "base.img", 700_001, 1);
    let text = refusal(&state, &on(&base, Some(512 * 1000)));
    assert!(text.contains("--size may only grow the disk"), "{text}");
    let store = Store::open(&state, &on(&base, None)).unwrap();
    assert_eq!(store.geometry().size(), 700_416, "rounded up to a sector");
    assert_eq!(store.base.as_ref().unwrap().len(), 700_001);
    drop(store);
    // Moved: fine. Another content of the same length: not.
    let moved = dir.path().join("moved.img");
    std::fs::rename(&base, &moved).unwrap();
    assert!(refusal(&state, &StoreParams::default()).contains("base.img"));
    drop(Store::open(&state, &on(&moved, None)).unwrap());
    assert_eq!(Store::open(&state, &StoreParams::default()).unwrap().base_identity().length, 700_001);
    let other = image(dir.path(), "other.img", 700_001, 2);
    let text = refusal(&state, &on(&other, None));
    assert!(text.contains("base image") && text.contains("unchanged"), "{text}");
    let plain = dir.path().join("plain");
    drop(Store::open(&plain, &sized(CHUNK)).unwrap());
    assert!(refusal(&plain, &on(&moved, None)).contains("leave out --base"));
    assert!(matches!(
        Store::open(&plain.join("x"), &on(Path::new("s3://b/k"), None)),
        Err(StoreError::Base(_))
    ));
}

#[test]
fn an_image_is_adopted_without_changing_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.raw", 3 * 4096, 7);
    let before = std::fs::metadata(&path).unwrap();
    let state = dir.path().join("state");
    let params = StoreParams { blk_file: Some(path.clone()), ..StoreParams::default() };
    let wrong = StoreParams { size: Some(4 * 4096), ..params.clone() };
    assert!(refusal(&state, &wrong).contains("--size says 16384"));
    let store = Store::open(&state, &params).unwrap();
    assert_eq!(store.recovered.runs, [Run::whole(1, ChunkState::Modified)]);
    assert!(matches!(store.wipe(), Err(StoreError::Layer { .. })));
    assert!(refusal(&dir.path().join("second"), &params).contains("another daemon uses it"));
    drop(store);
    drop(Store::open(&state, &StoreParams::default()).unwrap());
    drop(Store::open(&state, &params).unwrap());
    assert_eq!(std::fs::read(&path).unwrap(), vec![7; 3 * 4096]);
    let after = std::fs::metadata(&path).unwrap();
    assert_eq!((after.len(), after.blocks()), (before.len(), before.blocks()));
    let other = image(dir.path(), "other.raw", 3 * 4096, 7);
    let text = refusal(&state, &StoreParams { blk_file: Some(other), ..StoreParams::default() });
    assert!(text.contains("give an empty state directory"), "{text}");
}

#[test]
fn a_wiped_volume_is_empty_and_takes_data_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), &sized(8 * CHUNK)).unwrap();
    store.layer.file().kernel().write_all_at(&vec![1; 1 << 20], 0).unwrap();
    store.layer.sync().unwrap();
    store.map.set_handoff(Epoch(4));
    store.map.note(&[at(0, ChunkState::Modified), at(1, ChunkState::Remote)]).unwrap();
    store.store_remaining(Epoch(4), std::iter::empty()).unwrap();
    store.wipe().unwrap();
    let metadata = store.layer.file().kernel().metadata().unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (8 * CHUNK, 0));
    assert!(store.load_remaining().unwrap().is_none());
    store.map.note(&[at(5, ChunkState::Modified)]).unwrap();
    drop(store);
    let store = Store::open(dir.path(), &sized(8 * CHUNK)).unwrap();
    let states: Vec<_> = store.recovered.iter().filter(|one| one.state != ChunkState::Base).collect();
    assert_eq!(states, [at(5, ChunkState::Modified)]);
    assert_eq!(store.recovered.committed_handoff, None);
}

#[test]
fn t15_after_a_host_crash_copies_are_dropped_and_zeros_are_holes_again() {
    let dir = tempfile::tempdir().unwrap();
    let open = |boot| {
        Store::open_at_boot(StateDir::claim(dir.path()).unwrap(), &sized(8 * CHUNK), BootId([boot; 16]))
    };
    let store = open(1).unwrap();
    store.map.note(&[at(1, ChunkState::Zero), at(2, ChunkState::Local), at(7, ChunkState::Zero)]).unwrap();
    store.map.commit(store.map.position()).unwrap();
    // Not committed: gone after the crash, although the data reached the layer.
    store.map.note(&[at(1, ChunkState::Modified), at(3, ChunkState::Modified)]).unwrap();
    store.layer.file().kernel().write_all_at(&vec![9; 8 << 18], 0).unwrap();
    drop(store);
    let store = open(1).unwrap();
    let states: Vec<_> = store.recovered.iter().map(|one| one.state).collect();
    assert_eq!(
        (states[1], states[2], states[3]),
        (ChunkState::Modified, ChunkState::Local, ChunkState::Modified)
    );
    // That opening made all of it durable; note once more without a commit.
    store.map.note(&[at(1, ChunkState::Zero), at(4, ChunkState::Modified)]).unwrap();
    store.map.commit(store.map.position()).unwrap();
    store.map.note(&[at(1, ChunkState::Modified), at(5, ChunkState::Modified)]).unwrap();
    drop(store);
    let store = open(2).unwrap();
    assert!(store.recovered.host_crashed);
    let states: Vec<_> = store.recovered.iter().map(|one| one.state).collect();
    use ChunkState::{Base, Modified, Zero};
    assert_eq!(states, [Base, Zero, Base, Modified, Modified, Base, Base, Zero]);
    let mut bytes = vec![1; 1 << 18];
    for (chunk, zero) in [(0, false), (1, true), (3, false), (7, true)] {
        store.layer.file().kernel().read_exact_at(&mut bytes, chunk * CHUNK).unwrap();
        assert!(bytes.iter().all(|byte| *byte == if zero { 0 } else { 9 }), "chunk {chunk}");
    }
}

#[test]
fn a_large_sparse_volume_costs_next_to_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let store = Store::open(dir.path(), &sized(64 << 30)).unwrap();
        assert_eq!(store.recovered.runs, [Run::whole(262_144, ChunkState::Base)]);
    }
    let used: u64 =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().blocks() * 512).sum();
    assert!(used < 1 << 20, "{used} bytes on disk");
}

#[test]
fn a_range_becomes_a_hole_and_a_hole_stays_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("state"), &sized(4 * CHUNK)).unwrap();
    let used = || store.layer.file().kernel().metadata().unwrap().blocks();
    store.layer.file().kernel().write_all_at(&[7; 8192], CHUNK).unwrap();
    store.layer.sync().unwrap();
    let full = used();
    // Before it, after it, and past the end: nothing there.
    for (offset, len) in [(0, CHUNK), (CHUNK + 8192, 3 * CHUNK - 8192), (4 * CHUNK, 4096)] {
        store.layer.make_hole(offset, len).unwrap();
    }
    assert!(full > 0 && used() == full);
    store.layer.make_hole(CHUNK + 4096, 2 * CHUNK).unwrap();
    let mut bytes = [1; 8192];
    store.layer.file().kernel().read_exact_at(&mut bytes, CHUNK).unwrap();
    assert!(bytes[..4096] == [7; 4096] && bytes[4096..] == [0; 4096]);
    // Not written to the disk yet, and no hole all the same.
    store.layer.file().kernel().write_all_at(&[8; 4096], 2 * CHUNK).unwrap();
    store.layer.make_hole(0, 4 * CHUNK).unwrap();
    store.layer.file().kernel().read_exact_at(&mut bytes, 2 * CHUNK).unwrap();
    assert_eq!((bytes, used()), ([0; 8192], 0));
}

#[test]
fn a_new_daemon_waits_for_the_io_of_a_killed_one() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let store = Store::open(&state, &sized(1 << 20)).unwrap();
    // What the kernel still has of a dead process: the open file that its rings were given.
    let in_the_kernel = store.layer.file().kernel().try_clone().unwrap();
    drop(store);
    let ended = Arc::new(AtomicBool::new(false));
    let io = std::thread::spawn({
        let ended = Arc::clone(&ended);
        move || {
            std::thread::sleep(Duration::from_millis(200));
            ended.store(true, Ordering::SeqCst);
            drop(in_the_kernel);
        }
    });
    drop(Store::open(&state, &StoreParams::default()).unwrap());
    assert!(ended.load(Ordering::SeqCst), "it opened while old writes could still come");
    io.join().unwrap();
}
