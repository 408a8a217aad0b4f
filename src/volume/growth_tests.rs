// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A volume that grows while it is used, against a byte vector: old bytes stay, new ones are zeros; at once, while
//! requests are under way, after a restart, after a crash of the host and after a growth that was cut off.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use crate::core::chunk::ChunkState;
use crate::core::geometry::ChunkId;
use crate::store::GrowError;
use crate::volume::testing::{CHUNK, Daemon, Disk};
use crate::volume::{Status, VolumeOptions};
use proptest::prelude::*;
use std::sync::Arc;

const SECTOR: usize = 512;
/// Two chunks and an odd rest, whose last block of 1 KiB is short.
const SECTORS: usize = 2 * CHUNK as usize / SECTOR + 9;

#[derive(Debug, Clone)]
enum Step {
    /// Start and length in parts of 1000 of the disk's sectors, and what to do: write, zero, discard, read.
    Access(usize, usize, u8),
    /// The last sectors of the disk are accessed: what a growth is about.
    AtEnd(usize, u8),
    /// By that many sectors. What was begun before is still under way.
    Grow(usize),
    Fetch(u32),
    Settle,
    /// kill -9.
    Kill,
    /// A flush, then the host goes down.
    Crash,
    /// The host goes down in a growth: the layer is longer already.
    Torn(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0usize..1000, 1usize..300, 0u8..4).prop_map(|(at, len, what)| Step::Access(at, len, what)),
        6 => (1usize..140, 0u8..4).prop_map(|(len, what)| Step::AtEnd(len, what)),
        3 => prop_oneof![1usize..4, Just(8usize), 1usize..400].prop_map(Step::Grow),
        1 => (0u32..12).prop_map(Step::Fetch),
        3 => Just(Step::Settle),
        1 => Just(Step::Kill),
        1 => Just(Step::Crash),
        1 => (1u64..200_000).prop_map(Step::Torn),
    ];
    prop::collection::vec(step, 1..40)
}

/// The disk as it should be.
struct Model {
    bytes: Vec<u8>,
    /// Sectors of requests under way: overlapping ones would have no order.
    busy: Vec<(usize, usize)>,
    seed: u8,
}

impl Model {
    fn sectors(&self) -> usize {
        self.bytes.len() / SECTOR
    }

    fn settle(&mut self, daemon: &mut Daemon) {
        daemon.settle();
        self.busy.clear();
    }

    fn access(&mut self, daemon: &mut Daemon, start: usize, len: usize, what: u8) {
        let len = len.min(self.sectors() - start);
        let overlaps = |(at, count): &(usize, usize)| *at < start + len && start < at + count;
        if self.busy.iter().any(overlaps) {
            self.settle(daemon);
        }
        self.busy.push((start, len));
        let (offset, range) = ((start * SECTOR) as u64, start * SECTOR..(start + len) * SECTOR);
        match what {
            0 => {
                self.seed = self.seed.wrapping_add(1).max(1);
                self.bytes[range.clone()].fill(self.seed);
                daemon.write(offset, &self.bytes[range]);
            }
            1 | 2 => {
                self.bytes[range].fill(0);
                daemon.zero(offset, (len * SECTOR) as u64, what == 2);
            }
            _ => {
                self.settle(daemon);
                assert!(daemon.read_now(offset, len * SECTOR) == self.bytes[range], "{len} from {start}");
            }
        }
    }

    fn check(&self, daemon: &mut Daemon) {
        assert_eq!(daemon.volume.geometry().size(), self.bytes.len() as u64);
        let found = daemon.read_now(0, self.bytes.len());
        let wrong = found.iter().zip(&self.bytes).position(|(found, wanted)| found != wanted);
        assert_eq!(wrong, None, "of {} bytes", self.bytes.len());
    }
}

/// Makes the disk larger while requests go on.
fn grow(daemon: &mut Daemon, size: u64) {
    let volume = Arc::clone(&daemon.volume);
    let grower = std::thread::spawn(move || volume.grow(size));
    while !grower.is_finished() {
        assert!(daemon.turn().iter().all(|(_, status)| *status == Status::Ok));
    }
    grower.join().unwrap().unwrap();
}

fn run(base: Option<Vec<u8>>, steps: &[Step]) {
    let mut bytes = base.clone().unwrap_or_default();
    bytes.resize(SECTORS * SECTOR, 0);
    let mut model = Model { bytes, busy: Vec::new(), seed: 0 };
    let mut disk = Disk::new((SECTORS * SECTOR) as u64, base);
    let mut daemon = disk.open();
    for step in steps {
        match *step {
            Step::Access(at, len, what) => {
                let start = at * model.sectors() / 1000;
                model.access(&mut daemon, start, len, what);
            }
            Step::AtEnd(len, what) => {
                let start = model.sectors().saturating_sub(len);
                model.access(&mut daemon, start, len, what);
            }
            Step::Grow(more) => {
                model.bytes.resize(model.bytes.len() + more * SECTOR, 0);
                grow(&mut daemon, model.bytes.len() as u64);
            }
            Step::Fetch(chunk) if daemon.volume.geometry().has(ChunkId(chunk)) => {
                daemon.fetch(ChunkId(chunk));
            }
            Step::Fetch(_) => {}
            Step::Settle => model.settle(&mut daemon),
            Step::Kill | Step::Crash | Step::Torn(_) => {
                model.settle(&mut daemon);
                if !matches!(step, Step::Kill) {
                    daemon.flush();
                    daemon.settle();
                }
                drop(daemon);
                if let Step::Torn(more) = step {
                    let layer = std::fs::File::options().write(true).open(disk.layer()).unwrap();
                    layer.set_len(model.bytes.len() as u64 + more).unwrap();
                }
                if !matches!(step, Step::Kill) {
                    disk.crash();
                }
                daemon = disk.open();
                model.check(&mut daemon);
            }
        }
    }
    model.settle(&mut daemon);
    model.check(&mut daemon);
    assert_eq!(daemon.volume.fault(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_growing_disk_keeps_its_bytes_and_gets_zeros(steps in steps()) {
        run(None, &steps);
    }

    /// The base image may end anywhere: in the middle of a sector, in the last block, in the last chunk, before it.
    #[test]
    fn a_growing_disk_over_a_base_image_keeps_its_bytes_and_gets_zeros(
        steps in steps(), len in 1usize..=SECTORS * SECTOR, at_end in any::<bool>()
    ) {
        let len = if at_end { SECTORS * SECTOR - len % 700 } else { len };
        run(Some((0..len).map(|n| (n / SECTOR % 250 + 1) as u8).collect()), &steps);
    }
}

/// What the last, short chunk is when the disk grows: in every state its rest reads as zeros and takes writes.
#[test]
fn the_short_last_chunk_grows_in_every_state() {
    let tail = 9 * SECTOR;
    let last = 2 * u64::from(CHUNK);
    for base in [None, Some(vec![3; SECTORS * SECTOR]), Some(vec![3; SECTORS * SECTOR - 700])] {
        for state in [ChunkState::Base, ChunkState::Zero, ChunkState::Local, ChunkState::Modified] {
            let mut disk = Disk::new((SECTORS * SECTOR) as u64, base.clone());
            let mut daemon = disk.open();
            let mut model = base.clone().unwrap_or_default();
            model.resize(SECTORS * SECTOR, 0);
            match state {
                ChunkState::Zero => {
                    daemon.write_now(last, &vec![1; tail]);
                    daemon.zero(last, tail as u64, true);
                    model[last as usize..].fill(0);
                }
                // A block in the mask: the last one, which is short.
                ChunkState::Base => {
                    daemon.write_now(last + 8 * SECTOR as u64, &[5; SECTOR]);
                    model[last as usize + 8 * SECTOR..].fill(5);
                }
                ChunkState::Modified => {
                    daemon.write_now(last, &vec![6; tail]);
                    model[last as usize..].fill(6);
                }
                _ if base.is_some() => daemon.fetch(ChunkId(2)),
                _ => continue,
            }
            daemon.settle();
            assert_eq!(daemon.volume.state(ChunkId(2)), Some(state));
            model.resize(model.len() + 3 * CHUNK as usize + SECTOR, 0);
            daemon.volume.grow(model.len() as u64).unwrap();
            assert!(daemon.read_now(0, model.len()) == model, "{state:?}");
            // The first new sector shares its block with the last old one.
            let end = last as usize + tail;
            daemon.write_now(end as u64, &[9; SECTOR]);
            model[end..end + SECTOR].fill(9);
            assert!(daemon.read_now(0, model.len()) == model, "{state:?}, written");
            daemon.flush();
            daemon.settle();
            drop(daemon);
            disk.crash();
            let mut daemon = disk.open();
            assert!(daemon.read_now(0, model.len()) == model, "{state:?}, after a crash");
        }
    }
}

/// One thread makes the disk larger while another writes, drops and reads what lies around its end.
#[test]
fn requests_at_the_end_go_on_while_the_disk_grows() {
    for base in [None, Some(vec![3; SECTORS * SECTOR])] {
        let disk = Disk::new((SECTORS * SECTOR) as u64, base.clone());
        let mut daemon = disk.open();
        let mut model = base.unwrap_or_default();
        model.resize(SECTORS * SECTOR, 0);
        let volume = Arc::clone(&daemon.volume);
        let grower = std::thread::spawn(move || {
            for n in 0..400u64 {
                let now = volume.geometry().size();
                volume.grow(now + 512 * (1 + n * n % 23)).unwrap();
            }
        });
        let mut round = 0usize;
        while !grower.is_finished() {
            round += 1;
            let size = daemon.volume.geometry().size() as usize;
            model.resize(size, 0);
            let chunk = size - size % CHUNK as usize;
            // The whole of a short chunk (so it is punched), or the last few sectors.
            let start = if round.is_multiple_of(3) && chunk < size {
                chunk
            } else {
                size - SECTOR * (1 + round % 12)
            };
            if round.is_multiple_of(2) {
                let byte = round as u8 | 1;
                model[start..].fill(byte);
                daemon.write(start as u64, &vec![byte; size - start]);
            } else {
                model[start..].fill(0);
                daemon.zero(start as u64, (size - start) as u64, true);
            }
            daemon.settle();
            assert!(daemon.read_now(start as u64, size - start) == model[start..], "round {round}");
        }
        grower.join().unwrap();
        model.resize(daemon.volume.geometry().size() as usize, 0);
        assert!(daemon.read_now(0, model.len()) == model);
        drop(daemon);
        assert!(disk.open().read_now(0, model.len()) == model);
    }
}

#[test]
fn a_disk_never_shrinks_and_has_a_limit() {
    let disk = Disk::new((SECTORS * SECTOR) as u64, None);
    let daemon = disk.open();
    let size = daemon.volume.geometry().size();
    assert!(matches!(daemon.volume.grow(size - 512), Err(GrowError::Shrink { .. })));
    for wrong in [size + 1, u64::MAX, u64::from(u32::MAX) * u64::from(CHUNK)] {
        assert!(matches!(daemon.volume.grow(wrong), Err(GrowError::Geometry(_))), "{wrong}");
    }
    daemon.volume.grow(size).unwrap();
    assert_eq!(daemon.volume.geometry().size(), size);
    // Far more than the layer's file system holds: a hole costs nothing, and the map of it neither.
    daemon.volume.grow(1 << 36).unwrap();
    let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(disk.layer()).unwrap());
    assert!(used < 100, "{used} blocks");
    drop(daemon);
    let daemon = disk.open_with(VolumeOptions { read_only: true, write_cache: true });
    assert_eq!(daemon.volume.geometry().size(), 1 << 36);
}

#[test]
fn the_tracker_covers_what_was_added_before_it_was_armed() {
    let disk = Disk::new((SECTORS * SECTOR) as u64, None);
    let mut daemon = disk.open();
    for round in 0..3u64 {
        let geometry = daemon.volume.geometry();
        daemon.volume.tracker().arm(geometry.chunk_count());
        daemon.write_now(0, &[1; SECTOR]);
        daemon.write_now(geometry.size() - 512, &[1; SECTOR]);
        let mut told = Vec::new();
        daemon.volume.tracker().drain(|chunk, passes, _| told.push((chunk.0, passes)));
        assert_eq!(told, [(0, 1), (geometry.chunk_count() - 1, 1)], "round {round}");
        daemon.volume.tracker().disarm();
        daemon.volume.grow(geometry.size() + (1 + round) * 1000 * u64::from(CHUNK)).unwrap();
    }
}
