// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything that a crash may leave of the migration record, and of the remaining set with it.

use super::*;
use crate::core::message::{Incarnation, MigrationId, RemainingDigest};
use crate::core::record::{
    DestinationRecord, DestinationStage, MigrationRecord, Role, SourceRecord, SourceStage,
};

/// Every byte of a slot is a place where it may be torn.
const SLOT: Wear = Wear { torn: 1, bytes: 4096 };

fn of(epoch: u64, role: Role) -> MigrationRecord {
    MigrationRecord::V1 { volume: VolumeId([7; 16]), epoch: Epoch(epoch), role }
}

fn source(stage: SourceStage) -> Role {
    Role::Source(SourceRecord {
        migration: MigrationId([6; 16]),
        destination: "host.example:7000".to_owned(),
        stage,
        threshold: 3,
        strategy: 0,
        write_cache: true,
        digest: RemainingDigest(u128::MAX / 3),
    })
}

fn destination(stage: DestinationStage) -> Role {
    Role::Destination(DestinationRecord {
        migration: MigrationId([6; 16]),
        incarnation: Incarnation(5),
        base: BaseIdentity { length: 1 << 20, digest: [4; 32] },
        stage,
        write_cache: false,
        digest: RemainingDigest(u128::MAX / 5),
    })
}

/// A life as a source, then as a destination: records grow and shrink, epochs never go back.
fn life() -> Vec<MigrationRecord> {
    vec![
        of(1, Role::Serving),
        of(1, source(SourceStage::Pushing)),
        of(2, source(SourceStage::Offered)),
        of(3, source(SourceStage::Pushing)),
        of(4, source(SourceStage::Offered)),
        of(4, source(SourceStage::Relinquished { synced: false })),
        of(4, source(SourceStage::Relinquished { synced: true })),
        of(4, source(SourceStage::Released { synced: true })),
        of(4, Role::Idle),
        of(5, destination(DestinationStage::Receiving)),
        of(6, destination(DestinationStage::Prepared)),
        of(6, destination(DestinationStage::Active { source_synced: false })),
        of(6, destination(DestinationStage::Complete)),
    ]
}

fn load(disk: &Disk, boot: BootId) -> Option<MigrationRecord> {
    let file = RecordFile::open(disk, boot).unwrap_or_else(|error| panic!("{error}"));
    let (record, same_boot) = file.load()?;
    assert_eq!(same_boot, boot == HERE);
    Some(record)
}

/// Stores the records of a life until the disk is stopped; returns how many are durable.
fn live(disk: &Disk, go_on: bool) -> usize {
    let Ok(file) = RecordFile::open(disk, HERE) else { return 0 };
    let mut durable = 0;
    for (n, record) in life().iter().enumerate() {
        match file.store(record) {
            Ok(()) => durable = n + 1,
            Err(_) if go_on => {}
            Err(_) => break,
        }
    }
    durable
}

/// The records that may be found when so many are durable and `tried` more were tried; none before the first.
fn allowed(durable: usize, tried: usize) -> Vec<Option<MigrationRecord>> {
    let all: Vec<_> = std::iter::once(None).chain(life().into_iter().map(Some)).collect();
    all[durable..=(durable + tried).min(all.len() - 1)].to_vec()
}

#[test]
fn every_crash_image_of_a_record_is_the_last_durable_one_or_the_one_being_written() {
    let mut images = 0;
    before_each_sync(|at| {
        let disk = Disk::new();
        disk.fail_at_sync(at, Fault::Stop);
        let allowed = allowed(live(&disk, false), 1);
        images += disk.images(SLOT, |image| {
            for boot in [HERE, LATER] {
                let found = load(&image, boot);
                assert!(allowed.contains(&found), "before sync {at}: {found:?}");
            }
        });
        disk
    });
    println!("records: {images} images");
    assert!(images > 400);
}

#[test]
fn every_kill_while_a_record_is_written_leaves_the_one_before_or_it() {
    let mut images = 0;
    for at in 1.. {
        let disk = Disk::new();
        disk.fail_at(at, Fault::Stop);
        let allowed = allowed(live(&disk, false), 1);
        images += disk.killed(|image| {
            let found = load(&image, HERE);
            assert!(allowed.contains(&found), "at {at}: {found:?}");
        });
        if !disk.is_stopped() {
            break;
        }
    }
    println!("kills in records: {images} images");
    assert!(images > 10_000);
}

#[test]
fn every_crash_image_after_a_failed_sync_of_a_record_is_durable_or_was_tried() {
    let mut images = 0;
    for at in 1..=life().len() as u64 + 3 {
        let disk = Disk::new();
        disk.fail_at_sync(at, Fault::Errno(libc::EIO));
        // The failed one is tried again as the next one: it must not come between.
        let durable = live(&disk, true);
        let last = life().pop();
        images += disk.images(Wear { torn: 1, bytes: 0 }, |image| {
            let found = load(&image, LATER);
            if durable == life().len() {
                assert_eq!(found, last, "sync {at}");
            } else {
                assert!(allowed(durable, life().len()).contains(&found), "sync {at}: {found:?}");
            }
        });
    }
    println!("failed syncs of records: {images} images");
}

/// The chunks of a remaining set, as it was stored: neighbours that are alike may be one run.
fn chunks(runs: &[RemainingRun]) -> Vec<(u32, u8, bool)> {
    let each = |run: &RemainingRun| {
        let (count, still) = (run.count, run.still_remaining);
        (run.first.0..run.first.0 + run.run).map(move |chunk| (chunk, count, still))
    };
    runs.iter().flat_map(each).collect()
}

/// The remaining set of an epoch: no two are alike.
fn set(epoch: u64) -> Vec<RemainingRun> {
    let count = u8::try_from(epoch).unwrap();
    let run =
        |first, run, still_remaining| RemainingRun { first: ChunkId(first), run, count, still_remaining };
    match epoch % 3 {
        0 => vec![run(0, 2, true), run(3, 1, false), run(5, 1, true)],
        1 => vec![run(1, 1, true)],
        _ => vec![run(0, 1, false), run(2, 3, true)],
    }
}

/// As the node prepares an offer: the remaining set, then the record.
fn prepare(disk: &Disk, epochs: std::ops::Range<u64>) -> Option<()> {
    let file = RecordFile::open(disk, HERE).ok()?;
    file.store(&of(0, destination(DestinationStage::Receiving))).ok()?;
    for epoch in epochs {
        remaining::store(disk, Epoch(epoch), set(epoch).into_iter()).ok()?;
        file.store(&of(epoch, destination(DestinationStage::Prepared))).ok()?;
        // The offer was reclaimed.
        file.store(&of(epoch, destination(DestinationStage::Receiving))).ok()?;
    }
    Some(())
}

/// Whatever is left: a record that says `Prepared` has the very set of its epoch.
fn is_prepared_or_not(image: &Disk) -> bool {
    let found = load(image, LATER);
    let stored = remaining::load(image, CHUNKS).unwrap_or_else(|error| panic!("{error}"));
    if let Some((epoch, runs)) = &stored {
        assert_eq!(chunks(runs), chunks(&set(epoch.0)), "old or new, never mixed");
    }
    let Some(MigrationRecord::V1 { epoch, role: Role::Destination(role), .. }) = found else { return false };
    let prepared = role.stage == DestinationStage::Prepared;
    if prepared {
        assert_eq!(stored.map(|(epoch, _)| epoch), Some(epoch), "the set of the offer");
    }
    prepared
}

#[test]
fn t16_in_every_crash_image_a_prepared_record_has_the_set_of_its_offer() {
    let (mut images, mut prepared) = (0, 0);
    before_each_sync(|at| {
        let disk = Disk::new();
        disk.fail_at_sync(at, Fault::Stop);
        prepare(&disk, 4..8);
        images += disk.images(FINE, |image| prepared += usize::from(is_prepared_or_not(&image)));
        disk
    });
    for at in 1.. {
        let disk = Disk::new();
        disk.fail_at(at, Fault::Stop);
        prepare(&disk, 4..8);
        images += disk.killed(|image| prepared += usize::from(is_prepared_or_not(&image)));
        if !disk.is_stopped() {
            break;
        }
    }
    println!("prepared offers: {images} images, {prepared} of them prepared");
    assert!(images > 1000 && prepared > 100);
}
