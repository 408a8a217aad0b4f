// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Captures and installs on real files: the traps of migration that this room answers for.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

use super::*;
use crate::core::chunk::ChunkState;
use crate::core::geometry::Geometry;
use crate::volume::testing::{CHUNK, Daemon, Disk};
use crate::volume::*;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const SIZE: u64 = 4 * CHUNK as u64 + 1536;
const BLOCK: usize = 1024;
const C0: ChunkId = ChunkId(0);

fn whole(byte: u8) -> Body {
    Body::Blocks { mask: BlockMask(u64::MAX), bytes: vec![byte; CHUNK as usize] }
}

fn with_base() -> Disk {
    Disk::new(SIZE, Some(vec![0xba; 3 * CHUNK as usize + 700]))
}

fn install(daemon: &Daemon, chunk: ChunkId, version: u64, body: &Body, phase: InstallPhase) -> Installed {
    let install = daemon.transfer.install(chunk, Version(version), body, phase);
    daemon.runtime.block_on(install).unwrap()
}

fn capture(daemon: &Daemon, chunk: ChunkId) -> Result<Captured, TransferError> {
    daemon.runtime.block_on(daemon.transfer.capture(chunk))
}

fn mark_remote(daemon: &Daemon, first: u32, run: u32) {
    daemon.runtime.block_on(daemon.transfer.mark_remote(ChunkId(first), run)).unwrap();
}

#[test]
fn t02_write_during_push_is_not_lost() {
    let disk = Disk::new(SIZE, None);
    let mut daemon = disk.open();
    daemon.write_now(0, &vec![1; CHUNK as usize]);
    // Submitted, and not yet ended as far as the table knows.
    daemon.write(0, &[2; BLOCK]);
    let torn = capture(&daemon, C0).unwrap();
    assert!(!torn.clean, "a write was in flight");
    daemon.settle();
    assert!(daemon.volume.version(C0).unwrap() > torn.version, "what was torn is also old");
    let clean = capture(&daemon, C0).unwrap();
    assert!(clean.clean);
    let Body::Blocks { bytes, .. } = &clean.body else { panic!("zeros") };
    assert_eq!((&bytes[..BLOCK], bytes[BLOCK]), (&[2; BLOCK][..], 1));
    daemon.write_now(0, &[3; 512]);
    assert!(daemon.volume.version(C0).unwrap() > clean.version, "its acknowledgement settles nothing");
}

#[test]
fn t03_what_was_received_travels_on() {
    let disk = with_base();
    let daemon = disk.open();
    daemon.volume.gate().close(Closed::Receiving);
    mark_remote(&daemon, 0, 3);
    assert!(matches!(capture(&daemon, C0), Err(TransferError::NotWhole(_))));
    install(&daemon, C0, 5, &whole(7), InstallPhase::Receiving);
    install(&daemon, ChunkId(1), 6, &Body::Zero, InstallPhase::Receiving);
    let part = Body::Blocks { mask: BlockMask(0b110), bytes: vec![8; 2 * BLOCK] };
    install(&daemon, ChunkId(2), 7, &part, InstallPhase::Receiving);
    let modified = daemon.transfer.modified_chunks();
    assert_eq!(modified.iter().collect::<Vec<_>>(), [C0, ChunkId(1), ChunkId(2)]);
    assert_eq!(capture(&daemon, C0).unwrap().body, whole(7));
    assert_eq!(capture(&daemon, ChunkId(1)).unwrap().body, Body::Zero);
    let again = capture(&daemon, ChunkId(2)).unwrap();
    assert_eq!((again.body, again.version, again.clean), (part, Version(7), true));
    let versions = [(C0, Version(5)), (ChunkId(1), Version(6)), (ChunkId(2), Version(7))];
    assert_eq!(daemon.transfer.received_versions(), versions);
    // A kill of the daemon forgets none of it.
    drop(daemon);
    let mut daemon = disk.open();
    assert_eq!(daemon.transfer.received_versions(), versions);
    let read = daemon.read_now(2 * u64::from(CHUNK), 4 * BLOCK);
    assert_eq!((read[0], read[BLOCK], read[3 * BLOCK - 1], read[3 * BLOCK]), (0xba, 8, 8, 0xba));
    daemon.volume.gate().close(Closed::Receiving);
    daemon.runtime.block_on(daemon.transfer.forget_versions()).unwrap();
    assert!(daemon.transfer.received_versions().iter().all(|(_, version)| *version == Version(0)));
}

#[test]
fn t08_t09_an_install_keeps_what_the_guest_wrote() {
    let disk = with_base();
    let mut daemon = disk.open();
    mark_remote(&daemon, 0, 2);
    daemon.write_now(BLOCK as u64, &[9; BLOCK]);
    // An edge of a block needs the rest first; so does a read.
    let edge = daemon.write(4 * BLOCK as u64 + 512, &[6; 512]);
    let (read, buf) = daemon.read(0, 4 * BLOCK);
    assert!(daemon.turn().is_empty());
    assert_eq!(daemon.seen, [VolumeEvent::Demand { chunk: C0, origin: Origin::Source }]);
    assert_eq!((daemon.port.outstanding(), daemon.port.in_flight()), (2, 0));
    assert_eq!(install(&daemon, C0, 3, &whole(7), InstallPhase::Pulling), Installed::Done);
    let mut done = Vec::new();
    while done.len() < 2 {
        done.extend(daemon.turn());
    }
    done.sort_unstable_by_key(|(token, _)| *token);
    assert_eq!(done, [(edge, Status::Ok), (read, Status::Ok)]);
    let read = buf.to_vec();
    assert_eq!((read[0], read[BLOCK], read[2 * BLOCK]), (7, 9, 7));
    let read = daemon.read_now(4 * BLOCK as u64, BLOCK);
    assert_eq!((read[0], read[512]), (7, 6));
    // The guest makes the other chunk whole: the pull is needless, and what arrives late changes nothing.
    daemon.seen.clear();
    daemon.write_now(u64::from(CHUNK), &vec![4; CHUNK as usize]);
    assert_eq!(daemon.seen, [VolumeEvent::Overwritten(ChunkId(1))]);
    let late = install(&daemon, ChunkId(1), 9, &whole(7), InstallPhase::Pulling);
    assert_eq!(late, Installed::Superseded);
    assert_eq!(daemon.read_now(u64::from(CHUNK), BLOCK), [4; BLOCK]);
}

#[test]
fn t23_what_is_pulled_replaces_a_void_copy_of_a_larger_version() {
    let disk = with_base();
    let mut daemon = disk.open();
    assert_eq!(install(&daemon, C0, 9, &whole(5), InstallPhase::Receiving), Installed::Done);
    // Rewritten at the source, which was killed then: its versions begin again with what its journal has.
    mark_remote(&daemon, 0, 1);
    let (read, buf) = daemon.read(0, BLOCK);
    assert!(daemon.turn().is_empty());
    assert_eq!(install(&daemon, C0, 1, &whole(7), InstallPhase::Pulling), Installed::Done);
    let mut done = Vec::new();
    while done.is_empty() {
        done.extend(daemon.turn());
    }
    assert_eq!(done, [(read, Status::Ok)]);
    assert_eq!(buf.to_vec(), [7; BLOCK]);
}

#[test]
fn t09_a_discard_cancels_a_pull() {
    let disk = with_base();
    let mut daemon = disk.open();
    mark_remote(&daemon, 0, 1);
    daemon.zero(0, u64::from(CHUNK), true);
    daemon.settle();
    assert_eq!(daemon.seen, [VolumeEvent::Overwritten(C0)]);
    assert_eq!(install(&daemon, C0, 9, &whole(7), InstallPhase::Pulling), Installed::Superseded);
    assert_eq!(daemon.read_now(0, BLOCK), [0; BLOCK]);
}

#[test]
fn t10_an_older_copy_never_replaces_a_newer_one() {
    let disk = with_base();
    let mut daemon = disk.open();
    let receiving = InstallPhase::Receiving;
    daemon.volume.gate().close(Closed::Receiving);
    assert_eq!(install(&daemon, C0, 5, &whole(5), receiving), Installed::Done);
    assert_eq!(install(&daemon, C0, 4, &whole(4), receiving), Installed::Superseded);
    mark_remote(&daemon, 0, 1);
    assert_eq!(install(&daemon, C0, 4, &whole(4), receiving), Installed::Superseded);
    assert_eq!(daemon.volume.state(C0), Some(ChunkState::Remote));
    assert_eq!(install(&daemon, C0, 6, &whole(6), receiving), Installed::Done);
    assert_eq!(install(&daemon, C0, 7, &Body::Zero, receiving), Installed::Done);
    assert_eq!(install(&daemon, C0, 8, &whole(8), receiving), Installed::Done);
    daemon.volume.gate().open();
    assert_eq!(daemon.read_now(0, BLOCK), [8; BLOCK]);
    let misfit = Body::Blocks { mask: BlockMask(3), bytes: vec![0; BLOCK] };
    let refused = daemon.runtime.block_on(daemon.transfer.install(C0, Version(9), &misfit, receiving));
    assert!(matches!(refused, Err(TransferError::Malformed(C0))));
    let beyond = daemon.runtime.block_on(daemon.transfer.capture(ChunkId(5)));
    assert!(matches!(beyond, Err(TransferError::NoChunk(_))));
    assert!(daemon.runtime.block_on(daemon.transfer.mark_remote(ChunkId(4), 2)).is_err());
}

#[test]
fn t13_zeros_travel_as_metadata_and_only_whole() {
    let disk = with_base();
    let mut daemon = disk.open();
    daemon.write_now(0, &vec![0; CHUNK as usize]);
    assert_eq!(capture(&daemon, C0).unwrap().body, Body::Zero);
    daemon.write_now(u64::from(CHUNK), &[0; BLOCK]);
    let part = Body::Blocks { mask: BlockMask(1), bytes: vec![0; BLOCK] };
    assert_eq!(capture(&daemon, ChunkId(1)).unwrap().body, part);
    daemon.zero(2 * u64::from(CHUNK), u64::from(CHUNK), false);
    daemon.settle();
    let zeroed = capture(&daemon, ChunkId(2)).unwrap();
    assert_eq!((zeroed.body, zeroed.clean), (Body::Zero, true));
    // Content of the base image never travels, fetched or not; nor is it modified.
    daemon.fetch(ChunkId(3));
    daemon.settle();
    assert_eq!(daemon.volume.state(ChunkId(3)), Some(ChunkState::Local));
    for chunk in [ChunkId(3), ChunkId(4)] {
        assert!(matches!(capture(&daemon, chunk), Err(TransferError::NotModified(_))));
    }
    assert_eq!(daemon.transfer.local_chunks().iter().collect::<Vec<_>>(), [ChunkId(3)]);
    // The odd last chunk, as short as it is.
    daemon.write_now(4 * u64::from(CHUNK), &[5; 1536]);
    let last = Body::Blocks { mask: BlockMask(3), bytes: vec![5; 1536] };
    assert_eq!(capture(&daemon, ChunkId(4)).unwrap().body, last);
}

#[test]
fn a_zero_body_fills_around_what_the_guest_wrote() {
    let disk = with_base();
    let mut daemon = disk.open();
    mark_remote(&daemon, 0, 1);
    daemon.write_now(BLOCK as u64, &[9; BLOCK]);
    assert_eq!(install(&daemon, C0, 3, &Body::Zero, InstallPhase::Pulling), Installed::Done);
    assert_eq!(daemon.volume.state(C0), Some(ChunkState::Modified));
    let read = daemon.read_now(0, 3 * BLOCK);
    assert_eq!((read[0], read[BLOCK], read[2 * BLOCK]), (0, 9, 0));
}

#[test]
fn a_wiped_volume_is_the_base_again() {
    let disk = with_base();
    let mut daemon = disk.open();
    daemon.write_now(0, &vec![1; CHUNK as usize + 3 * BLOCK]);
    assert!(matches!(daemon.runtime.block_on(daemon.transfer.wipe()), Err(TransferError::InUse)));
    daemon.volume.gate().close(Closed::Idle);
    mark_remote(&daemon, 2, 1);
    daemon.runtime.block_on(daemon.transfer.wipe()).unwrap();
    assert_eq!(daemon.volume.counts(), StateCounts { base: 5, ..StateCounts::default() });
    drop(daemon);
    let mut daemon = disk.open();
    assert_eq!(daemon.read_now(0, 512), [0xba; 512]);
}

#[test]
fn after_a_host_crash_a_prepared_destination_has_nothing_of_the_modified_set() {
    let mut disk = with_base();
    let daemon = disk.open();
    daemon.volume.gate().close(Closed::Receiving);
    mark_remote(&daemon, 0, 2);
    install(&daemon, C0, 5, &whole(7), InstallPhase::Receiving);
    daemon.runtime.block_on(daemon.transfer.sync()).unwrap();
    install(&daemon, ChunkId(2), 5, &whole(7), InstallPhase::Receiving);
    drop(daemon);
    disk.crash();
    let daemon = disk.open();
    assert!(daemon.volume.store().recovered.host_crashed);
    let modified: ChunkSet = [C0, ChunkId(1)].into_iter().collect();
    daemon.runtime.block_on(daemon.transfer.revert_to_remote(&modified)).unwrap();
    drop(daemon);
    disk.crash();
    let daemon = disk.open();
    assert_eq!(daemon.transfer.remote_chunks(), modified);
    assert!(daemon.transfer.received_versions().is_empty());
}

#[test]
fn a_rotation_under_way_loses_no_transition() {
    let disk = with_base();
    let mut daemon = disk.open();
    daemon.write_now(0, &vec![1; 2 * CHUNK as usize + BLOCK]);
    let (store, table) = (Arc::clone(daemon.volume.store()), Arc::clone(daemon.volume.table()));
    let rotate = || store.map.rotate(|chunk| table.record(chunk), || store.layer.sync()).unwrap();
    rotate();
    let third = 3 * u64::from(CHUNK);
    daemon.write_now(third + BLOCK as u64, &[2; BLOCK]);
    rotate();
    daemon.zero(0, u64::from(CHUNK), true);
    daemon.settle();
    let counts = daemon.volume.counts();
    drop((store, table));
    drop(daemon);
    let mut daemon = disk.open();
    assert_eq!(daemon.volume.counts(), counts);
    assert_eq!(daemon.read_now(third + BLOCK as u64, BLOCK), [2; BLOCK]);
    assert_eq!(daemon.read_now(third, 512), [0xba; 512]);
}

#[test]
fn a_journal_that_grows_long_asks_for_its_rotation_by_itself() {
    let disk = with_base();
    let mut daemon = disk.open();
    let long = vec![
        Transition { chunk: C0, state: ChunkState::Base, mask: BlockMask(1), version: Version(0) };
        1000
    ];
    while !daemon.volume.map().wants_rotation() {
        assert!(daemon.events.try_recv().is_err(), "it is not long yet");
        daemon.volume.map().note(&long).unwrap();
    }
    assert_eq!(daemon.events.try_recv(), Ok(VolumeEvent::RotationDue));
    assert!(daemon.runtime.block_on(daemon.transfer.maybe_rotate()).unwrap());
    assert!(!daemon.runtime.block_on(daemon.transfer.maybe_rotate()).unwrap());
    assert!(daemon.events.try_recv().is_err(), "a new journal is short");
}

/// Stamps every word of a sector with one number.
fn stamp(number: u32) -> Vec<u8> {
    number.to_le_bytes().repeat(128)
}

/// One queue that overwrites its own sectors with rising numbers, and reads them back.
fn guest(volume: &Arc<Volume>, lane: u32, rounds: u32, acknowledged: &[AtomicU32]) {
    let mut port = Port::new(Arc::clone(volume), lane as usize).unwrap();
    for round in 1..=rounds {
        for slot in 0..8u32 {
            let sector = (round * 8 + slot) * 37 % (4 * CHUNK / 512 / 2);
            let sector = sector * 2 + lane;
            let number = acknowledged[sector as usize].load(Ordering::SeqCst) + 1;
            let bytes = crate::engine::IoBuf::copy_of(&stamp(number));
            let token = Token::new(u64::from(sector) << 32 | u64::from(number));
            port.submit(Request::write(volume, u64::from(sector) * 512, bytes, token).unwrap());
        }
        while port.outstanding() > 0 {
            port.wait(1, Some(std::time::Duration::from_millis(50))).unwrap();
            while let Some(event) = port.next() {
                if let PortEvent::Completed { token, status, .. } = event {
                    assert_eq!(status, Status::Ok);
                    let id = token.spend();
                    acknowledged[(id >> 32) as usize].store(id as u32, Ordering::SeqCst);
                }
            }
        }
    }
}

/// Two queues write disjoint sectors of the same blocks; the companion captures until it has a clean copy of all.
/// What a clean capture holds must be at least what had been acknowledged when it began, and what the last clean
/// capture of each chunk holds must be the end.
#[test]
fn t12_a_torn_capture_is_never_clean_under_two_busy_queues() {
    let disk = Disk::new(SIZE, None);
    let mut daemon = disk.open();
    daemon.write_now(0, &vec![0; 4 * CHUNK as usize]);
    daemon.volume.tracker().arm(daemon.volume.geometry().chunk_count());
    let acknowledged: Vec<AtomicU32> = (0..4 * CHUNK / 512).map(|_| AtomicU32::new(0)).collect();
    let stop = AtomicBool::new(false);
    let mut last: Vec<Option<Captured>> = (0..4).map(|_| None).collect();
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..2)
            .map(|lane| {
                let (volume, acknowledged) = (&daemon.volume, &acknowledged[..]);
                scope.spawn(move || guest(volume, lane, 300, acknowledged))
            })
            .collect();
        while !stop.load(Ordering::SeqCst) {
            // One more round after the queues have ended.
            stop.store(lanes.iter().all(|lane| lane.is_finished()), Ordering::SeqCst);
            for chunk in 0..4u32 {
                let first = (chunk * CHUNK / 512) as usize;
                let before: Vec<u32> =
                    acknowledged[first..first + 128].iter().map(|n| n.load(Ordering::SeqCst)).collect();
                let captured = capture(&daemon, ChunkId(chunk)).unwrap();
                if captured.clean {
                    check(&captured, |sector, number| assert!(number >= before[sector]));
                    last[chunk as usize] = Some(captured);
                }
            }
        }
    });
    let mut dirty = Vec::new();
    daemon.volume.tracker().drain(|chunk, _, plain| dirty.push((chunk.0, plain)));
    assert_eq!(dirty.iter().map(|(chunk, _)| *chunk).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(dirty.iter().map(|(_, plain)| plain).sum::<u32>(), 2 * 300 * 8);
    for (chunk, captured) in (0u32..).zip(last) {
        let captured = captured.expect("nothing writes any more: the last capture is clean");
        assert_eq!(Some(captured.version), daemon.volume.version(ChunkId(chunk)));
        let first = (chunk * CHUNK / 512) as usize;
        check(&captured, |sector, number| {
            assert_eq!(number, acknowledged[first + sector].load(Ordering::SeqCst));
        });
    }
}

fn check(captured: &Captured, mut tell: impl FnMut(usize, u32)) {
    let Body::Blocks { bytes, .. } = &captured.body else { return };
    for (sector, bytes) in bytes.chunks(512).enumerate() {
        let number = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        assert!(bytes == stamp(number), "sector {sector} of a clean capture is torn");
        tell(sector, number);
    }
}

/// Two queues write disjoint sectors of remote chunks while the companion answers demands and installs the rest in
/// the background: every sector ends as the guest's last write, or the source's.
#[test]
fn t01_t08_installs_under_two_busy_queues_lose_nothing() {
    let disk = with_base();
    let mut daemon = disk.open();
    mark_remote(&daemon, 0, 4);
    let acknowledged: Vec<AtomicU32> = (0..4 * CHUNK / 512).map(|_| AtomicU32::new(0)).collect();
    let source = |chunk: u32| {
        let sectors = chunk * CHUNK / 512..(chunk + 1) * CHUNK / 512;
        let bytes = sectors.flat_map(|sector| stamp(0x7000_0000 + sector)).collect();
        Body::Blocks { mask: BlockMask(u64::MAX), bytes }
    };
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..2)
            .map(|lane| {
                let (volume, acknowledged) = (&daemon.volume, &acknowledged[..]);
                scope.spawn(move || guest(volume, lane, 60, acknowledged))
            })
            .collect();
        while !lanes.iter().all(|lane| lane.is_finished()) {
            while let Ok(event) = daemon.events.try_recv() {
                if let VolumeEvent::Demand { chunk, origin } = event {
                    assert_eq!(origin, Origin::Source);
                    install(&daemon, chunk, 1, &source(chunk.0), InstallPhase::Pulling);
                }
            }
            std::thread::yield_now();
        }
    });
    for chunk in 0..4 {
        install(&daemon, ChunkId(chunk), 1, &source(chunk), InstallPhase::Pulling);
    }
    let found = daemon.read_now(0, 4 * CHUNK as usize);
    for (sector, bytes) in found.chunks(512).enumerate() {
        let number = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let wrote = acknowledged[sector].load(Ordering::SeqCst);
        let expected = if wrote == 0 { 0x7000_0000 + sector as u32 } else { wrote };
        assert_eq!((number, bytes), (expected, &stamp(expected)[..]), "sector {sector}");
    }
    let geometry = Geometry::new(SIZE, CHUNK).unwrap();
    assert_eq!(daemon.volume.geometry(), geometry);
    assert_eq!(daemon.volume.counts().modified, 4);
}
