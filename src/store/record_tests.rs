// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The record's codec as a property, and its slots under crashes.
#![allow(clippy::unwrap_used)]

use super::super::fault::{Disk, Fault};
use super::*;
use proptest::prelude::*;

const BOOT: BootId = BootId([1; 16]);

fn any_role() -> impl Strategy<Value = Role> {
    let source =
        (any::<[u8; 16]>(), ".{0,200}", 0u8..4, any::<bool>(), any::<u32>(), any::<u8>(), any::<bool>());
    let source = (source, any::<u128>()).prop_map(
        |((migration, destination, stage, synced, threshold, strategy, wce), digest)| {
            Role::Source(SourceRecord {
                migration: MigrationId(migration),
                destination,
                stage: match stage {
                    0 => SourceStage::Pushing,
                    1 => SourceStage::Offered,
                    2 => SourceStage::Relinquished { synced },
                    _ => SourceStage::Released { synced },
                },
                threshold,
                strategy,
                write_cache: wce,
                digest: RemainingDigest(digest),
            })
        },
    );
    let destination =
        (any::<[u8; 16]>(), any::<u64>(), any::<u64>(), any::<[u8; 32]>(), 0u8..4, any::<bool>());
    let destination = (destination, any::<bool>(), any::<u128>()).prop_map(
        |((migration, incarnation, length, digest, stage, source_synced), write_cache, remaining)| {
            Role::Destination(DestinationRecord {
                migration: MigrationId(migration),
                incarnation: Incarnation(incarnation),
                base: BaseIdentity { length, digest },
                stage: match stage {
                    0 => DestinationStage::Receiving,
                    1 => DestinationStage::Prepared,
                    2 => DestinationStage::Active { source_synced },
                    _ => DestinationStage::Complete,
                },
                write_cache,
                digest: RemainingDigest(remaining),
            })
        },
    );
    prop_oneof![Just(Role::Serving), Just(Role::Idle), source, destination]
}

fn any_record() -> impl Strategy<Value = MigrationRecord> {
    (any::<[u8; 16]>(), any::<u64>(), any_role()).prop_map(|(volume, epoch, role)| MigrationRecord::V1 {
        volume: VolumeId(volume),
        epoch: Epoch(epoch),
        role,
    })
}

fn numbered(epoch: u64) -> MigrationRecord {
    MigrationRecord::V1 { volume: VolumeId([7; 16]), epoch: Epoch(epoch), role: Role::Serving }
}

fn loaded(disk: &Disk) -> Option<u64> {
    let file = RecordFile::open(disk, BOOT).unwrap();
    file.load().map(|(MigrationRecord::V1 { epoch, .. }, _)| epoch.0)
}

proptest! {
    #[test]
    fn every_record_survives_its_slot_and_every_flipped_byte_is_seen(record in any_record(), flip: prop::sample::Index) {
        let body = encode_record(&record).unwrap();
        prop_assert_eq!(decode_record(&body), Some(record.clone()));
        for len in 0..body.len() {
            prop_assert_eq!(decode_record(&body[..len]), None);
        }
        let disk = Disk::new();
        RecordFile::open(&disk, BOOT).unwrap().store(&record).unwrap();
        let file = RecordFile::open(&disk, BootId([2; 16])).unwrap();
        prop_assert_eq!(file.load(), Some((record.clone(), false)));
        let used = HEADER + body.len();
        // Both slots hold it; one damaged slot does no harm, two are damage and not "no record".
        disk.flip(NAME, SLOT + flip.index(used));
        prop_assert_eq!(RecordFile::open(&disk, BootId([2; 16])).unwrap().load(), Some((record, false)));
        disk.flip(NAME, flip.index(used));
        prop_assert!(RecordFile::open(&disk, BOOT).is_err());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode_record(&bytes);
        let _ = decode_slot(&bytes);
    }
}

#[test]
fn a_text_that_is_too_long_is_refused_and_the_old_record_stands() {
    let disk = Disk::new();
    let file = RecordFile::open(&disk, BOOT).unwrap();
    file.store(&numbered(1)).unwrap();
    let role = Role::Source(SourceRecord {
        migration: MigrationId([0; 16]),
        destination: "x".repeat(MAX_TEXT + 1),
        stage: SourceStage::Pushing,
        threshold: 3,
        strategy: 0,
        write_cache: true,
        digest: RemainingDigest(0),
    });
    let long = MigrationRecord::V1 { volume: VolumeId([7; 16]), epoch: Epoch(2), role };
    assert_eq!(file.store(&long).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    file.store(&numbered(3)).unwrap();
    assert_eq!(loaded(&disk), Some(3));
}

#[test]
fn a_crash_at_every_operation_leaves_the_last_durable_record_or_the_one_being_written() {
    for at in 1..30 {
        for seed in 0..12 {
            let disk = Disk::new();
            disk.fail_at(at, Fault::Stop);
            let mut durable = None;
            if let Ok(file) = RecordFile::open(&disk, BOOT) {
                while file.store(&numbered(durable.unwrap_or(0) + 1)).is_ok() && durable < Some(8) {
                    durable = Some(durable.unwrap_or(0) + 1);
                }
            }
            disk.crash(seed);
            let found = loaded(&disk);
            let next = Some(durable.unwrap_or(0) + 1);
            assert!(
                found == durable || found == next,
                "at {at}, seed {seed}: {found:?}, durable {durable:?}"
            );
        }
    }
}

#[test]
fn an_error_at_every_operation_never_costs_the_record_before() {
    for at in 1..20 {
        for seed in 0..8 {
            let disk = Disk::new();
            let file = RecordFile::open(&disk, BOOT).unwrap();
            file.store(&numbered(1)).unwrap();
            disk.fail_at(at, Fault::Errno(libc::EIO));
            let (mut durable, mut tried) = (1, 1);
            for epoch in 2..8 {
                tried = epoch;
                match file.store(&numbered(epoch)) {
                    Ok(()) => durable = epoch,
                    Err(_) => break,
                }
            }
            disk.crash(seed);
            let found = loaded(&disk).unwrap();
            assert!(
                found == durable || found == tried,
                "at {at}, seed {seed}: {found} of {durable}, {tried}"
            );
        }
    }
}

#[test]
fn a_record_that_was_found_is_durable_even_if_its_daemon_died_before_it_was_synced() {
    for at in 1..4 {
        for fault in [Fault::Stop, Fault::Errno(libc::EIO)] {
            let disk = Disk::new();
            let file = RecordFile::open(&disk, BOOT).unwrap();
            file.store(&numbered(1)).unwrap();
            disk.fail_at(at, fault);
            drop(file.store(&numbered(2)));
            // Killed, and started again while the host is up: this is what the daemon acts on.
            disk.heal();
            let found = loaded(&disk);
            disk.crash(0);
            assert_eq!(loaded(&disk), found, "at {at}, {fault:?}");
        }
    }
}
