// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every role and stage, also after a crash of the host, which no test of whole processes can have: what is told, what is
//! forced, and that what is told is what is lost.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use crate::core::chunk::ChunkState;
use crate::core::geometry::{BlockMask, ChunkId};
use crate::core::message::{BaseIdentity, Incarnation, RemainingDigest, Version};
use crate::core::record::{DestinationRecord, SourceRecord};
use crate::store::{BootId, RemainingRun, Transition};

const CHUNK: u64 = 64 << 10;
const EPOCH: Epoch = Epoch(9);
const OTHER_BOOT: BootId = BootId([1; 16]);

fn source(stage: SourceStage) -> Role {
    Role::Source(SourceRecord {
        migration: MigrationId([3; 16]),
        destination: "dest:7001".into(),
        stage,
        threshold: 3,
        strategy: 0,
        write_cache: true,
        digest: RemainingDigest::default(),
    })
}

fn destination(stage: DestinationStage) -> Role {
    Role::Destination(DestinationRecord {
        migration: MigrationId([3; 16]),
        incarnation: Incarnation(1),
        base: BaseIdentity::default(),
        stage,
        write_cache: true,
        digest: RemainingDigest::default(),
    })
}

/// A directory of 8 chunks in this role; `remote` of them are at the source, which has modified 5.
fn directory(role: Option<Role>, remote: u32, boot: BootId) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let params = StoreParams { size: Some(8 * CHUNK), chunk_size: Some(64 << 10), ..StoreParams::default() };
    let store = Store::open_at_boot(StateDir::claim(dir.path()).unwrap(), &params, boot).unwrap();
    let volume = store.superblock().volume;
    for chunk in 0..5 {
        let state = if chunk < remote { ChunkState::Remote } else { ChunkState::Modified };
        let (chunk, mask, version) = (ChunkId(chunk), BlockMask::EMPTY, Version(1));
        store.map.note(&[Transition { chunk, state, mask, version }]).unwrap();
    }
    let set = RemainingRun { first: ChunkId(0), run: 5, count: 1, still_remaining: true };
    store.store_remaining(EPOCH, std::iter::once(set)).unwrap();
    if let Some(role) = role {
        store.record.store(&MigrationRecord::V1 { volume, epoch: EPOCH, role }).unwrap();
    }
    dir
}

fn told(dir: &Path, lost: LostChunks) -> Explanation {
    explain(dir, None, lost).unwrap()
}

fn refusal(dir: &Path, lost: LostChunks) -> &'static str {
    match force(dir, None, lost) {
        Err(error @ RecoverError::Refused { .. }) => error.code(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_stage_is_told_and_forced_as_the_table_says() {
    let here = BootId::current().unwrap();
    let active = |source_synced| destination(DestinationStage::Active { source_synced });
    // The role; chunks at the source; who owns the disk; why it is not forced; sentences of what a force loses.
    let rows = [
        (None, 0, "nobody", "nothing", 0),
        (Some(Role::Idle), 0, "nobody", "nothing", 0),
        (Some(Role::Serving), 0, "here", "owner", 0),
        (Some(source(SourceStage::Pushing)), 0, "here", "owner", 0),
        (Some(source(SourceStage::Offered)), 0, "here", "", 0),
        (Some(source(SourceStage::Relinquished { synced: true })), 0, "peer", "", 2),
        (Some(source(SourceStage::Relinquished { synced: false })), 0, "peer", "", 2),
        (Some(source(SourceStage::Released { synced: true })), 0, "peer", "", 2),
        (Some(destination(DestinationStage::Receiving)), 3, "peer", "torn", 0),
        (Some(destination(DestinationStage::Prepared)), 3, "undecided", "", 5),
        (Some(active(false)), 3, "here", "", 3),
        (Some(active(true)), 3, "here", "", 3),
        (Some(active(true)), 0, "here", "", 0),
        (Some(destination(DestinationStage::Complete)), 0, "here", "", 0),
    ];
    for (role, remote, owner, refused, losses) in rows {
        let dir = directory(role.clone(), remote, here);
        let one = told(dir.path(), LostChunks::Error);
        let name = format!("{role:?}: {one:#?}");
        assert_eq!((one.owner, one.rebooted, one.reverts), (owner, false, false), "{name}");
        assert_eq!((one.force.possible, one.force.loses.len()), (refused.is_empty(), losses), "{name}");
        assert_eq!((one.missing.chunks, one.missing.bytes), (u64::from(remote), u64::from(remote) * CHUNK));
        assert!(!one.summary.is_empty() && !one.choices.is_empty(), "{name}");
        if !refused.is_empty() {
            assert_eq!(refusal(dir.path(), LostChunks::Error), refused, "{name}");
            assert_eq!(told(dir.path(), LostChunks::Error), one);
            continue;
        }
        assert_eq!(refusal(dir.path(), LostChunks::Base), "no-base");
        let after = force(dir.path(), None, LostChunks::Error).unwrap();
        assert_eq!(
            (after.role, after.owner, Some(after.epoch)),
            ("serving", "here", one.force.epoch),
            "{name}"
        );
        assert_eq!(after.missing, one.missing, "{name}");
        let forced = after.forced.unwrap();
        assert_eq!((forced.epoch_before, forced.lost_chunks), (EPOCH.0, one.missing.chunks), "{name}");
        let log = std::fs::read_to_string(dir.path().join("recover.log")).unwrap();
        for loss in one.force.loses {
            assert!(log.contains(&format!("accepted: {loss}\n")), "{log}");
        }
        assert_eq!(log.matches("lost: bytes").count(), one.missing.ranges.len(), "{log}");
    }
}

#[test]
fn a_host_that_went_down_costs_more_and_that_is_told() {
    let dir = directory(Some(destination(DestinationStage::Active { source_synced: true })), 2, OTHER_BOOT);
    let one = told(dir.path(), LostChunks::Zero);
    assert!(one.rebooted && one.reverts);
    // Nothing was committed: all five chunks of the source's modified set count as not come.
    assert_eq!((one.missing.chunks, one.chunks.remote), (5, 5));
    assert!(one.force.loses[0].contains("5 chunks") && one.force.loses[0].contains("zeros"), "{one:#?}");
    let after = force(dir.path(), None, LostChunks::Zero).unwrap();
    assert_eq!((after.missing.chunks, after.chunks.zero, after.chunks.modified), (0, 5, 0));

    for (stage, more) in [
        (SourceStage::Relinquished { synced: true }, 2),
        (SourceStage::Relinquished { synced: false }, 3),
        (SourceStage::Offered, 1),
    ] {
        let dir = directory(Some(source(stage)), 0, OTHER_BOOT);
        let one = told(dir.path(), LostChunks::Error);
        assert_eq!((one.rebooted, one.force.loses.len()), (true, more), "{one:#?}");
    }
}

#[test]
fn what_was_lost_is_settled_once_and_for_all() {
    let here = BootId::current().unwrap();
    let dir = directory(Some(destination(DestinationStage::Active { source_synced: true })), 3, here);
    force(dir.path(), None, LostChunks::Error).unwrap();
    let one = told(dir.path(), LostChunks::Error);
    assert!(!one.force.possible && one.force.reason.contains("3 chunks"), "{one:#?}");
    let one = told(dir.path(), LostChunks::Zero);
    assert_eq!((one.force.possible, one.force.epoch), (true, Some(one.epoch)), "the epoch stays");
    let after = force(dir.path(), None, LostChunks::Zero).unwrap();
    assert_eq!((after.missing.chunks, after.epoch), (0, one.epoch));
    assert_eq!(refusal(dir.path(), LostChunks::Zero), "owner");
    let log = std::fs::read_to_string(dir.path().join("recover.log")).unwrap();
    assert_eq!((log.matches(" done\n").count(), log.matches("lost: bytes 0 to 196607").count()), (2, 2));
}
