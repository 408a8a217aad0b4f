// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A volume that is made larger: every step cut off, on a disk that loses what was not synced; and on a real one.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::fault::{Disk, Fault};
use super::map::Owner;
use super::medium::Folder;
use super::*;
use crate::core::geometry::{BlockMask, ChunkId};
use crate::core::message::Version;
use std::fs::File;
use std::os::unix::fs::FileExt;

const CHUNK: u64 = 64 << 10;
const SMALL: u32 = 5;
const LARGE: u32 = 9;

fn superblock() -> Superblock {
    Superblock {
        store: StoreId([3; 16]),
        volume: VolumeId([4; 16]),
        size: u64::from(SMALL) * CHUNK - 512,
        chunk_size: 64 << 10,
        read_only: false,
        write_through: false,
        came_in: None,
        base: BaseIdentity::default(),
        base_url: None,
        serial: String::new(),
        layer_path: None,
    }
}

fn at(chunk: u32, state: ChunkState) -> Transition {
    Transition { chunk: ChunkId(chunk), state, mask: BlockMask::EMPTY, version: Version(0) }
}

/// What is noted, in order; the last four are of chunks that the growth brings, or come after it.
const NOTES: [(u32, ChunkState); 8] = [
    (0, ChunkState::Modified),
    (4, ChunkState::Zero),
    (2, ChunkState::Modified),
    (4, ChunkState::Modified),
    (8, ChunkState::Modified),
    (4, ChunkState::Zero),
    (5, ChunkState::Zero),
    (8, ChunkState::Zero),
];

fn after(count: usize, chunks: u32) -> Vec<Transition> {
    let mut flat: Vec<_> = (0..chunks).map(|n| at(n, ChunkState::Base)).collect();
    NOTES[..count].iter().for_each(|(chunk, state)| flat[*chunk as usize] = at(*chunk, *state));
    flat
}

/// A volume on the disk: superblock, map, and a file in place of the layer.
struct Rig {
    disk: Disk,
    superblock: Mutex<Superblock>,
    map: ChunkMap,
}

fn folder(disk: &Disk) -> Arc<dyn Folder> {
    Arc::new(disk.clone())
}

fn owner(superblock: &Superblock, boot: u8) -> Owner {
    let chunks = superblock.geometry().unwrap().chunk_count();
    Owner { store: superblock.store, boot: BootId([boot; 16]), chunks }
}

impl Rig {
    fn make() -> Self {
        let (disk, superblock) = (Disk::new(), superblock());
        let layer = disk.create(layer::NAME).unwrap();
        layer.set_len(superblock.size).unwrap();
        layer.sync().unwrap();
        ChunkMap::create(&folder(&disk), owner(&superblock, 1), ChunkState::Base).unwrap();
        superblock.save(&disk).unwrap();
        Self::open(disk, 1).unwrap().0
    }

    fn open(disk: Disk, boot: u8) -> Result<(Self, Recovered), StoreError> {
        let superblock = Superblock::load(&disk)?.unwrap();
        let len = disk.open(layer::NAME).unwrap().unwrap().len().unwrap();
        assert!(len >= superblock.size, "the layer has {len} bytes, the volume {}", superblock.size);
        let (map, recovered) = ChunkMap::open(&folder(&disk), owner(&superblock, boot), |_| Ok(()))?;
        Ok((Self { disk, superblock: Mutex::new(superblock), map }, recovered))
    }

    fn grow(&self) -> Result<(), StoreError> {
        let layer = self.disk.open(layer::NAME).unwrap().unwrap();
        let path = Path::new(layer::NAME);
        let size = u64::from(LARGE) * CHUNK;
        Superblock::grow(&self.superblock, &self.disk, size, |size| {
            layer.set_len(size).and_then(|()| layer.sync()).map_err(StoreError::io("grow", path))
        })?;
        self.map.grow(LARGE);
        Ok(())
    }

    /// Notes, commits, a growth, rotations; returns how many notes were acknowledged, committed, and tried to be
    /// committed, and whether the growth came to its end.
    fn live(&self) -> (usize, usize, usize, bool) {
        let (mut noted, mut committed, mut tried, mut grown) = (0, 0, 0, false);
        for (step, (chunk, state)) in NOTES.into_iter().enumerate() {
            if step == 4 {
                if self.grow().is_err() {
                    break;
                }
                grown = true;
            }
            if self.map.note(&[at(chunk, state)]).is_err() {
                break;
            }
            noted = step + 1;
            if step % 3 == 1 {
                tried = noted;
                if self.map.commit(self.map.position()).is_err() {
                    break;
                }
                committed = noted;
            }
            if step == 2 || step == 5 {
                let table = after(noted, if grown { LARGE } else { SMALL });
                tried = noted;
                if self.map.rotate(|chunk| table[chunk.index()], || Ok(())).is_err() {
                    break;
                }
                committed = noted;
            }
        }
        (noted, committed, tried, grown)
    }
}

fn count(disk: &Disk) -> u32 {
    Superblock::load(disk).unwrap().unwrap().geometry().unwrap().chunk_count()
}

#[test]
fn a_kill_at_every_step_of_a_growth_leaves_one_size_or_the_other_and_every_note() {
    let mut sizes = [0, 0];
    for stop in 1..80 {
        let rig = Rig::make();
        rig.disk.fail_at(stop, Fault::Stop);
        let (noted, _, _, grown) = rig.live();
        rig.disk.heal();
        let chunks = count(&rig.disk);
        sizes[usize::from(chunks == LARGE)] += 1;
        assert!(chunks == LARGE || (chunks == SMALL && !grown), "at {stop}");
        let (_, recovered) = Rig::open(rig.disk, 1).unwrap_or_else(|error| panic!("at {stop}: {error}"));
        let found: Vec<_> = recovered.iter().collect();
        let allowed = noted..=(noted + 1).min(NOTES.len());
        let fits = |count: usize| NOTES[..count].iter().all(|(chunk, _)| *chunk < chunks);
        assert!(allowed.into_iter().any(|count| fits(count) && found == after(count, chunks)), "at {stop}");
    }
    assert!(sizes.iter().all(|times| *times > 5), "{sizes:?}");
}

#[test]
fn t15_a_crash_of_the_host_at_every_step_of_a_growth_keeps_what_was_committed() {
    for stop in 1..80 {
        for seed in 0..16 {
            let rig = Rig::make();
            rig.disk.fail_at(stop, Fault::Stop);
            let (_, committed, tried, grown) = rig.live();
            rig.disk.crash(seed);
            let chunks = count(&rig.disk);
            assert!(chunks == LARGE || (chunks == SMALL && !grown), "at {stop}, seed {seed}");
            let opened = Rig::open(rig.disk.clone(), 2);
            let (rig, recovered) = opened.unwrap_or_else(|error| panic!("at {stop}, seed {seed}: {error}"));
            let found: Vec<_> = recovered.iter().collect();
            let allowed = committed..=tried.max(committed);
            assert!(
                allowed.into_iter().any(|count| found == after(count, chunks)),
                "at {stop}, seed {seed}: {committed} to {tried}, {found:?}"
            );
            // And again from here: the growth of what did not grow.
            rig.grow().unwrap();
            rig.map.note(&[at(8, ChunkState::Modified)]).unwrap();
            rig.map.commit(rig.map.position()).unwrap();
            rig.disk.crash(seed);
            let (_, recovered) = Rig::open(rig.disk, 3).unwrap();
            assert_eq!(recovered.iter().last(), Some(at(8, ChunkState::Modified)));
        }
    }
}

#[test]
fn an_error_at_every_step_of_a_growth_leaves_the_volume_as_it_was_and_it_may_be_tried_again() {
    for errno in [libc::EIO, libc::ENOSPC] {
        for fail in 1..12 {
            let rig = Rig::make();
            rig.disk.fail_at(fail, Fault::Errno(errno));
            let failed = rig.grow().is_err();
            rig.disk.heal();
            let size = rig.superblock.lock().size;
            assert_eq!(size == superblock().size, failed, "{errno} at {fail}");
            rig.grow().unwrap();
            rig.map.note(&[at(8, ChunkState::Modified)]).unwrap();
            let (_, recovered) = Rig::open(rig.disk, 1).unwrap();
            assert_eq!(recovered.iter().last(), Some(at(8, ChunkState::Modified)));
        }
    }
}

/// A checkpoint that was written before the growth covers fewer chunks; one that covers more is damage.
#[test]
fn a_checkpoint_of_the_smaller_volume_is_read_and_one_of_a_larger_is_not() {
    let rig = Rig::make();
    rig.map.note(&[at(4, ChunkState::Modified)]).unwrap();
    rig.grow().unwrap();
    let (_, recovered) = Rig::open(rig.disk.clone(), 1).unwrap();
    assert_eq!(recovered.iter().count(), LARGE as usize);
    assert_eq!(recovered.runs.last(), Some(&Run { first: ChunkId(5), ..Run::whole(4, ChunkState::Base) }));
    superblock().save(&rig.disk).unwrap();
    assert!(matches!(Rig::open(rig.disk, 1), Err(StoreError::Corrupt { .. })));
}

fn sized(size: u64) -> StoreParams {
    StoreParams { size: Some(size), ..StoreParams::default() }
}

#[test]
fn a_store_grows_and_is_opened_with_the_old_arguments_and_the_new_size() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), &sized(4 * CHUNK)).unwrap();
    store.map.note(&[at(0, ChunkState::Modified)]).unwrap();
    assert!(matches!(store.grow(CHUNK, || (), |_| ()), Err(GrowError::Shrink { .. })));
    assert!(matches!(store.grow(4 * CHUNK + 1, || (), |_| ()), Err(GrowError::Geometry(_))));
    assert_eq!(store.grow(4 * CHUNK, || (), |_| ()).unwrap().size(), 4 * CHUNK);
    assert_eq!(store.grow(40 * CHUNK, || (), |_| ()).unwrap().size(), 40 * CHUNK);
    assert_eq!((store.geometry().size(), store.superblock().size), (40 * CHUNK, 40 * CHUNK));
    assert_eq!(store.layer.file().kernel().metadata().unwrap().len(), 40 * CHUNK);
    drop(store);
    let larger = Store::open(dir.path(), &sized(41 * CHUNK)).unwrap_err().to_string();
    assert!(larger.contains("blkferry resize"), "{larger}");
    let store = Store::open(dir.path(), &sized(4 * CHUNK)).unwrap();
    assert_eq!((store.geometry().size(), store.recovered.iter().count()), (40 * CHUNK, 10));
    assert_eq!(store.recovered.runs[0], Run::from(at(0, ChunkState::Modified)));
}

#[test]
fn a_layer_that_is_longer_is_cut_back_only_if_nothing_is_in_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, vec![7; 4 * 4096 + 512]).unwrap();
    let adopted = StoreParams { blk_file: Some(image.clone()), ..StoreParams::default() };
    for (state, params, size) in
        [("own", sized(4 * CHUNK + 512), 4 * CHUNK + 512), ("adopted", adopted, 4 * 4096 + 512)]
    {
        let state = dir.path().join(state);
        let layer = if params.blk_file.is_some() { image.clone() } else { state.join("layer") };
        let store = Store::open(&state, &params).unwrap();
        store.layer.file().kernel().write_all_at(&[7; 512], size - 512).unwrap();
        drop(store);
        let file = File::options().read(true).write(true).open(&layer).unwrap();
        for (grown, data) in [
            (size + 512, None),
            (size + 900 * CHUNK, None),
            (size + 512, Some(size)),
            (size + 9 * CHUNK, Some(size + 8 * CHUNK)),
        ] {
            file.set_len(grown).unwrap();
            if let Some(data) = data {
                file.write_all_at(&[1], data).unwrap();
                let refused = Store::open(&state, &params).unwrap_err().to_string();
                assert!(refused.contains(&format!("it has {grown} bytes")), "{refused}");
                assert_eq!(file.metadata().unwrap().len(), grown, "it is left alone");
            } else {
                drop(Store::open(&state, &params).unwrap());
                assert_eq!(file.metadata().unwrap().len(), size);
            }
            file.set_len(size).unwrap();
        }
        let store = Store::open(&state, &params).unwrap();
        store.grow(size + CHUNK, || (), |_| ()).unwrap();
        drop(store);
        assert_eq!(Store::open(&state, &StoreParams::default()).unwrap().geometry().size(), size + CHUNK);
        let mut bytes = vec![1; usize::try_from(CHUNK).unwrap() + 512];
        file.read_exact_at(&mut bytes, size - 512).unwrap();
        assert!(bytes[..512].iter().all(|byte| *byte == 7) && bytes[512..].iter().all(|byte| *byte == 0));
        file.set_len(size).unwrap();
        let refused = Store::open(&state, &StoreParams::default()).unwrap_err().to_string();
        assert!(refused.contains(&format!("it has {size} bytes")), "a shorter one is damage: {refused}");
    }
}
