// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything that a crash may leave of a volume that is made, grows, takes over an identity, or changes its cache mode:
//! with the files in memory, and with all of [`Store`] in a real directory that was filled with the image.

use super::*;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

const CHUNK: u64 = 64 << 10;
const SMALL: u64 = 512;
/// Two chunks, of which the first one was short.
const LARGE: u64 = CHUNK + 512;

fn plain(size: u64) -> Superblock {
    Superblock::plain([3; 16], VolumeId([4; 16]), &Geometry::new(size, 64 << 10).unwrap())
}

fn modified(chunk: u32) -> Transition {
    Transition {
        chunk: ChunkId(chunk),
        state: ChunkState::Modified,
        mask: BlockMask::EMPTY,
        version: Version(0),
    }
}

/// As `Store` makes a volume: the layer, the map, the record, and the superblock last.
fn make(disk: &Disk) -> Option<()> {
    let layer = disk.create(layer::NAME).ok()?;
    layer.set_len(SMALL).and_then(|()| layer.sync()).ok()?;
    Files::create(&folder(disk), &plain(SMALL), HERE, ChunkState::Base).ok()
}

/// How far the life of a volume is: every number is an acknowledgement.
#[derive(Debug, Default, Clone, Copy)]
struct Life {
    made: bool,
    first_flushed: bool,
    grown: bool,
    second_flushed: bool,
    adopted: bool,
    write_through: bool,
}

/// A volume is made, written and flushed, grows, is written past its old end and flushed, takes over an identity and a cache
/// mode, one after the other until the disk is stopped.
fn live(disk: &Disk, life: &mut Life) -> Option<()> {
    make(disk)?;
    life.made = true;
    let folder = folder(disk);
    let superblock = plain(SMALL);
    let files = Files::open(&folder, &superblock, HERE, |_| Ok(())).ok()?;
    let layer = disk.open(layer::NAME).ok()??;
    let flush = || {
        let upto = files.map.position();
        layer.sync().and_then(|()| files.map.commit(upto)).ok()
    };
    files.map.note(&[modified(0)]).ok()?;
    layer.write_at(&[1; 512], 0).ok()?;
    flush()?;
    life.first_flushed = true;
    let grown = Mutex::new(superblock);
    Superblock::grow(&grown, folder.as_ref(), LARGE, |size| {
        layer.set_len(size).and_then(|()| layer.sync()).map_err(StoreError::io("grow", Path::new("layer")))
    })
    .ok()?;
    files.map.grow(2);
    life.grown = true;
    files.map.note(&[modified(1)]).ok()?;
    layer.write_at(&[2; 512], CHUNK).ok()?;
    flush()?;
    life.second_flushed = true;
    let superblock = grown.into_inner();
    let adopted =
        Superblock { volume: VolumeId([8; 16]), serial: "theirs".into(), read_only: true, ..superblock };
    adopted.save(folder.as_ref()).ok()?;
    life.adopted = true;
    Superblock { write_through: true, ..adopted }.save(folder.as_ref()).ok()?;
    life.write_through = true;
    Some(())
}

/// The superblock is one that was durable or was being written, never a mixture, and never older.
fn check_superblock(life: Life, found: &Superblock) {
    let grown = plain(LARGE);
    let adopted =
        Superblock { volume: VolumeId([8; 16]), serial: "theirs".into(), read_only: true, ..grown.clone() };
    let through = Superblock { write_through: true, ..adopted.clone() };
    let all = [plain(SMALL), grown, adopted, through];
    let done = [life.made, life.grown, life.adopted, life.write_through];
    let durable = done.iter().filter(|done| **done).count().saturating_sub(1);
    let next = durable + usize::from(life.made);
    assert!(all[durable..=next.min(3)].contains(found), "{life:?}: {found:?}");
}

/// What was flushed is in the map and in the layer.
fn check_content(life: Life, found: &Recovered, layer: &[u8], chunks: u32) {
    let table = table(found);
    assert_eq!(table.len(), chunks as usize);
    for (chunk, flushed, byte) in [(0, life.first_flushed, 1), (1, life.second_flushed, 2)] {
        let state = table.get(chunk).map(|one| one.state);
        let start = chunk * usize::try_from(CHUNK).unwrap();
        let content = layer.get(start..start + 512);
        if flushed {
            assert_eq!(state, Some(ChunkState::Modified), "{life:?}");
            assert!(content.is_some_and(|bytes| bytes == [byte; 512]), "{life:?}");
        }
        if state == Some(ChunkState::Modified) {
            assert!(content.is_some(), "{life:?}: the map knows a chunk that the layer has not");
        }
    }
}

fn each_image(wear: Wear, mut look: impl FnMut(Life, Disk)) -> usize {
    let mut images = 0;
    before_each_sync(|at| {
        let disk = Disk::new();
        disk.fail_at_sync(at, Fault::Stop);
        let mut life = Life::default();
        live(&disk, &mut life);
        images += disk.images(wear, |image| look(life, image));
        disk
    });
    images
}

#[test]
fn every_crash_image_of_a_life_of_a_volume_is_one_that_can_be_gone_on_with() {
    let mut unmade = 0;
    let images = each_image(FINE, |life, image| {
        for boot in [HERE, LATER] {
            let image = copy(&image);
            let superblock = Superblock::load(&image).unwrap_or_else(|error| panic!("{life:?}: {error}"));
            let Some(superblock) = superblock else {
                // The making was cut off: it is made anew over what is left.
                assert!(!life.made, "{life:?}");
                unmade += 1;
                for name in image.list().unwrap() {
                    image.remove(&name).unwrap();
                }
                make(&image).unwrap();
                assert_eq!(Superblock::load(&image).unwrap(), Some(plain(SMALL)));
                continue;
            };
            check_superblock(life, &superblock);
            let layer = image.files().remove(layer::NAME).unwrap_or_default();
            assert!(layer.len() as u64 >= superblock.size, "{life:?}: the layer has {} bytes", layer.len());
            let opened = Files::open(&folder(&image), &superblock, boot, |_| Ok(()));
            let chunks = superblock.geometry().unwrap().chunk_count();
            match opened {
                Ok(files) => {
                    check_content(life, &files.recovered, &layer, chunks);
                    assert_eq!(files.record.load(), None);
                    assert_eq!(files.load_remaining(chunks).unwrap(), None);
                }
                // After a mere kill a hole in the journal is damage.
                Err(error) => assert!(boot == HERE && names_a_file(&error), "{life:?}: {error}"),
            }
        }
    });
    println!("volumes: {images} images, {unmade} of them not made");
    assert!(images > 1000 && unmade > 100);
}

/// Puts an image into a real directory; what is zeros is a hole in the layer.
fn fill(dir: &Path, image: &Disk) {
    for (name, content) in image.files() {
        let file = File::create(dir.join(&name)).unwrap();
        if name != layer::NAME {
            file.write_all_at(&content, 0).unwrap();
            continue;
        }
        file.set_len(content.len() as u64).unwrap();
        for (at, sector) in (0..).zip(content.chunks(512)).filter(|(_, sector)| **sector != [0; 512]) {
            file.write_all_at(sector, at * 512).unwrap();
        }
    }
}

#[test]
fn every_crash_image_of_a_life_of_a_volume_is_opened_by_the_whole_store() {
    // In memory where that is possible: a sync of a disk for each file of each image takes minutes.
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let params = StoreParams { size: Some(SMALL), cache: CacheMode::Buffered, ..StoreParams::default() };
    let params = StoreParams { chunk_size: Some(64 << 10), ..params };
    let mut opened = BTreeSet::new();
    let images = each_image(FINE, |life, image| {
        let dir = tempfile::tempdir_in(&place).unwrap();
        fill(dir.path(), &image);
        let store = Store::open_at_boot(StateDir::claim(dir.path()).unwrap(), &params, LATER)
            .unwrap_or_else(|error| panic!("{life:?}: {error}"));
        let superblock = store.superblock();
        if life.made {
            check_superblock(life, &superblock);
        }
        assert_eq!(store.layer.file().kernel().metadata().unwrap().len(), superblock.size);
        let mut layer = vec![0; usize::try_from(superblock.size).unwrap()];
        store.layer.file().kernel().read_exact_at(&mut layer, 0).unwrap();
        check_content(life, &store.recovered, &layer, store.geometry().chunk_count());
        opened.insert((superblock.size, superblock.read_only, superblock.write_through));
        // It takes writes, and grows again.
        store.grow(LARGE, || (), |_| ()).unwrap();
        store.map.note(&[modified(1)]).unwrap();
        store.map.commit(store.map.position()).unwrap();
        drop(store);
        let store = Store::open_at_boot(StateDir::claim(dir.path()).unwrap(), &params, LAST).unwrap();
        assert_eq!(store.recovered.iter().last(), Some(modified(1)));
    });
    println!("stores: {images} images, superblocks {opened:?}");
    assert!(images > 100 && opened.len() == 4, "{opened:?}");
}
