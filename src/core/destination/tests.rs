// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Traps of the destination, driven by hand. The simulation in `tests/sim` finds what nobody thought of; these pin
//! what is known.

#![allow(clippy::unwrap_used, clippy::panic, clippy::wildcard_enum_match_arm)]

use super::*;
use crate::core::message::{Announcement, Body, Purpose, Standing};
use crate::core::standing::{Standings, Told};

const NOW: Duration = Duration::from_secs(10);
const OFFERED: Epoch = Epoch(8);

fn facts() -> LocalFacts {
    LocalFacts {
        geometry: Geometry::new(8 << 16, 1 << 16).unwrap(),
        base: BaseIdentity { length: 1 << 16, digest: [3; 32] },
        virtio_features: 0b11,
        queues: 1,
        read_only: false,
        volume: VolumeId([9; 16]),
        epoch: Epoch(0),
        virgin: true,
        released: false,
        replica: None,
    }
}

fn hello(epoch: u64, incarnation: u64) -> Hello {
    Hello {
        migration: MigrationId([1; 16]),
        volume: VolumeId([2; 16]),
        incarnation: Incarnation(incarnation),
        epoch: Epoch(epoch),
        size: 8 << 16,
        chunk_size: 1 << 16,
        base: facts().base,
        virtio_features: 0b01,
        queues: 1,
        read_only: false,
        serial: String::new(),
    }
}

fn data(chunk: u32, version: u64, epoch: Epoch, purpose: Purpose) -> Message {
    let (migration, chunk, version) = (MigrationId([1; 16]), ChunkId(chunk), Version(version));
    Message::Chunk(ChunkData { migration, epoch, chunk, version, purpose, body: Body::Zero })
}

struct Rig {
    session: DestinationSession,
    records: Vec<u64>,
    slow: bool,
    /// What the source has told, for its digest.
    told: Standings,
}

impl Rig {
    /// A session that has said welcome.
    fn receiving() -> Self {
        let session = DestinationSession::idle(facts());
        let mut rig = Self { session, records: Vec::new(), slow: false, told: Standings::new(8) };
        rig.greet(7, 5);
        assert_eq!(rig.session.step(), DestinationStep::Receiving);
        rig
    }

    /// A session that holds the offer of these chunks.
    fn prepared(remaining: &[(u32, u8)]) -> Self {
        let mut rig = Self::receiving();
        for (chunk, count) in remaining {
            rig.remains(*chunk, *count);
        }
        let actions = rig.offer(OFFERED);
        assert_eq!(said(&actions).first(), Some(&Message::Prepared { epoch: OFFERED }));
        rig
    }

    fn greet(&mut self, epoch: u64, incarnation: u64) -> Vec<DestinationAction> {
        self.session.handle_connected(NOW);
        self.hear(Message::Hello(hello(epoch, incarnation)))
    }

    /// Everything that the session wants; records and wipes are done at once unless `slow`.
    fn run(&mut self) -> Vec<DestinationAction> {
        let mut all = Vec::new();
        while let Some(action) = self.session.poll_action() {
            match action {
                DestinationAction::Persist { seq, .. } => {
                    self.records.push(seq);
                    if !self.slow {
                        self.durable();
                    }
                }
                DestinationAction::Wipe => self.session.handle_wiped(NOW),
                DestinationAction::Prune(ref kept) if !self.slow => {
                    self.session.handle_pruned(NOW, kept.clone());
                }
                _ => {}
            }
            all.push(action);
        }
        all
    }

    fn durable(&mut self) {
        for seq in std::mem::take(&mut self.records) {
            self.session.handle_persisted(NOW, seq);
        }
    }

    fn hear(&mut self, message: Message) -> Vec<DestinationAction> {
        self.session.handle_message(NOW, message);
        self.run()
    }

    fn announce(&mut self, chunk: u32, standing: Standing) -> Vec<DestinationAction> {
        let told = match standing {
            Standing::Remaining { count } => Told::Remaining(count),
            Standing::Settled { .. } => Told::Settled,
        };
        self.told.set(ChunkId(chunk), told);
        self.hear(Message::Announce {
            entries: vec![Announcement { first: ChunkId(chunk), run: 1, standing }],
        })
    }

    fn remains(&mut self, chunk: u32, count: u8) -> Vec<DestinationAction> {
        self.announce(chunk, Standing::Remaining { count })
    }

    fn settled(&mut self, chunk: u32, version: u64) -> Vec<DestinationAction> {
        self.announce(chunk, Standing::Settled { version: Version(version) })
    }

    fn offer(&mut self, epoch: Epoch) -> Vec<DestinationAction> {
        let (digest, remaining) = (self.told.digest(), self.told.remaining());
        self.hear(Message::Offer(Offer { epoch, digest, remaining, write_cache: true }))
    }

    fn installed(&mut self, chunk: u32, version: u64, result: Installed) -> Vec<DestinationAction> {
        self.session.handle_installed(NOW, ChunkId(chunk), Version(version), result);
        self.run()
    }

    /// A chunk that is pushed and installed.
    fn pushed(&mut self, chunk: u32, version: u64) {
        self.hear(data(chunk, version, Epoch(7), Purpose::Push));
        self.installed(chunk, version, Installed::Done);
    }

    fn start(&mut self) -> Vec<DestinationAction> {
        self.session.handle_start_requested(NOW, true);
        self.run()
    }

    fn activate(&mut self) -> Vec<DestinationAction> {
        self.start();
        self.hear(Message::Granted { epoch: OFFERED })
    }

    fn reconnect(&mut self, epoch: u64, incarnation: u64) -> Vec<DestinationAction> {
        self.session.handle_disconnected(NOW);
        self.run();
        self.greet(epoch, incarnation)
    }
}

fn said(actions: &[DestinationAction]) -> Vec<Message> {
    let message = |action: &DestinationAction| match action {
        DestinationAction::Send(message) => Some(message.clone()),
        _ => None,
    };
    actions.iter().filter_map(message).collect()
}

fn pulls(actions: &[DestinationAction]) -> Vec<(u32, bool)> {
    let pull = |message| match message {
        Message::Pull { chunk, demand, .. } => Some((chunk.0, demand)),
        _ => None,
    };
    said(actions).into_iter().filter_map(pull).collect()
}

fn installs(actions: &[DestinationAction]) -> usize {
    actions.iter().filter(|action| matches!(action, DestinationAction::Install(_))).count()
}

#[test]
fn t03_what_came_is_the_modified_set_of_the_next_migration() {
    let mut rig = Rig::receiving();
    rig.remains(4, 1);
    rig.pushed(2, 9);
    rig.settled(2, 9);
    rig.slow = true;
    let actions = rig.offer(OFFERED);
    let list = actions.into_iter().find_map(|action| match action {
        DestinationAction::Persist { remaining, .. } => remaining,
        _ => None,
    });
    // What was pushed before is in the list too: a crash of this host must not make it base content.
    assert_eq!(list.unwrap(), [(ChunkId(2), 0, false), (ChunkId(4), 1, true)]);
}

#[test]
fn t07_demands_go_before_the_background_without_suspending_it() {
    let remaining: Vec<(u32, u8)> = (0..8u8).map(|chunk| (u32::from(chunk), chunk)).collect();
    let mut rig = Rig::receiving();
    for (chunk, count) in &remaining {
        rig.remains(*chunk, *count);
    }
    let order: Vec<u32> = pulls(&rig.offer(OFFERED)).iter().map(|(chunk, _)| *chunk).collect();
    assert_eq!(order, [7, 6, 5, 4, 3, 2, 1, 0], "hottest first");
    rig.activate();
    // Two readers of one chunk, then one of another: asked with priority once each, although under way already.
    for chunk in [1, 1, 3] {
        rig.session.handle_demand(NOW, ChunkId(chunk));
    }
    assert_eq!(pulls(&rig.run()), [(1, true), (3, true)]);
    // A chunk stays in the set until it is installed: a lost pull is asked for again, demands first.
    let again = pulls(&rig.reconnect(8, 5));
    assert_eq!(again.len(), 8);
    assert!(again[..2].iter().all(|(_, demand)| *demand) && again[2..].iter().all(|(_, demand)| !*demand));
}

#[test]
fn t07_a_failed_pull_is_tried_again_and_never_lost() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    rig.activate();
    let reason = Refusal::Io;
    assert!(pulls(&rig.hear(Message::PullFailed { chunk: ChunkId(1), reason })).is_empty());
    assert_eq!(rig.session.progress().remaining_chunks, 1);
    rig.session.handle_timeout(rig.session.next_timeout().unwrap());
    assert_eq!(pulls(&rig.run()), [(1, true)]);
    rig.hear(data(1, 4, OFFERED, Purpose::Demand));
    rig.installed(1, 4, Installed::Failed);
    assert_eq!(rig.session.progress().remaining_chunks, 1);
}

#[test]
fn t09_a_pull_that_was_cancelled_is_dropped_on_arrival() {
    let mut rig = Rig::prepared(&[(1, 1), (2, 1)]);
    rig.activate();
    rig.session.handle_overwritten(NOW, ChunkId(1));
    assert_eq!(installs(&rig.hear(data(1, 4, OFFERED, Purpose::Prefetch))), 0);
    assert_eq!(installs(&rig.hear(data(2, 4, OFFERED, Purpose::Prefetch))), 1);
    // Overwritten while it is installed: the install finds that out, and the set is empty only after it.
    rig.session.handle_overwritten(NOW, ChunkId(2));
    assert!(!rig.run().contains(&DestinationAction::SyncVolume));
    assert!(rig.installed(2, 4, Installed::Superseded).contains(&DestinationAction::SyncVolume));
}

#[test]
fn t10_an_older_push_never_replaces_a_newer_one() {
    let mut rig = Rig::receiving();
    rig.pushed(1, 9);
    assert_eq!(installs(&rig.hear(data(1, 6, Epoch(7), Purpose::Push))), 0);
    assert_eq!(installs(&rig.hear(data(1, 11, Epoch(7), Purpose::Push))), 1);
    rig.installed(1, 11, Installed::Done);
    // Both under way at once: the one that ends later is not what counts.
    rig.hear(data(2, 5, Epoch(7), Purpose::Push));
    rig.hear(data(2, 4, Epoch(7), Purpose::Push));
    rig.installed(2, 5, Installed::Done);
    rig.installed(2, 4, Installed::Superseded);
    let have = said(&rig.reconnect(7, 5)).into_iter().find_map(|message| match message {
        Message::Have { entries, .. } => Some(entries),
        _ => None,
    });
    assert_eq!(have.unwrap(), [(ChunkId(1), Version(11)), (ChunkId(2), Version(5))]);
}

#[test]
fn t10_a_superseded_install_is_acknowledged_only_for_something_newer() {
    let mut rig = Rig::receiving();
    rig.pushed(1, 4);
    rig.hear(data(1, 6, Epoch(7), Purpose::Push));
    assert!(said(&rig.installed(1, 6, Installed::Superseded)).is_empty());
    rig.hear(data(1, 8, Epoch(7), Purpose::Push));
    rig.hear(data(1, 7, Epoch(7), Purpose::Push));
    rig.installed(1, 8, Installed::Done);
    let entries = vec![(ChunkId(1), Version(7))];
    assert_eq!(said(&rig.installed(1, 7, Installed::Superseded)), [Message::Ack { entries }]);
}

#[test]
fn t10_settled_by_another_version_is_not_settled() {
    let mut rig = Rig::receiving();
    rig.pushed(1, 9);
    rig.settled(1, 10);
    assert_eq!(said(&rig.offer(OFFERED)), [Message::Mismatch { epoch: OFFERED }]);
}

#[test]
fn t11_late_pushes_are_refused_after_the_offer() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    assert_eq!(installs(&rig.hear(data(1, 4, Epoch(7), Purpose::Push))), 0);
    assert_eq!(installs(&rig.hear(data(1, 4, OFFERED, Purpose::Push))), 0);
    assert_eq!(installs(&rig.hear(data(1, 4, Epoch(7), Purpose::Prefetch))), 0);
    assert_eq!(installs(&rig.hear(data(3, 4, OFFERED, Purpose::Prefetch))), 0, "not in the remaining set");
    assert_eq!(installs(&rig.hear(data(1, 4, OFFERED, Purpose::Prefetch))), 1);
}

#[test]
fn t11_an_offer_waits_for_installs_and_takes_no_pushes_meanwhile() {
    let mut rig = Rig::receiving();
    rig.hear(data(1, 4, Epoch(7), Purpose::Push));
    rig.remains(1, 1);
    assert!(said(&rig.offer(OFFERED)).is_empty());
    assert_eq!(installs(&rig.hear(data(2, 4, Epoch(7), Purpose::Push))), 0);
    let actions = rig.installed(1, 4, Installed::Done);
    assert!(actions.contains(&DestinationAction::MarkRemote { first: ChunkId(1), run: 1 }));
    assert_eq!(pulls(&actions), [(1, false)]);
}

#[test]
fn t11_a_push_that_overtakes_the_reclaim_is_taken() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    rig.slow = true;
    let actions = rig.hear(data(1, 6, Epoch(9), Purpose::Push));
    assert_eq!((rig.session.step(), installs(&actions)), (DestinationStep::Voiding, 1));
    let acks = rig.installed(1, 6, Installed::Done);
    assert_eq!(said(&acks), [Message::Ack { entries: vec![(ChunkId(1), Version(6))] }]);
    assert_eq!(installs(&rig.hear(data(1, 5, OFFERED, Purpose::Prefetch))), 0);
    rig.durable();
    rig.run();
    assert_eq!((rig.session.step(), rig.session.epoch()), (DestinationStep::Receiving, Epoch(9)));
}

#[test]
fn t14_equal_geometry_does_not_make_an_equal_base_image() {
    let refused = |change: fn(&mut Hello)| {
        let mut session = DestinationSession::idle(facts());
        session.handle_connected(NOW);
        let mut hello = hello(7, 5);
        change(&mut hello);
        session.handle_message(NOW, Message::Hello(hello));
        let mut rig = Rig { session, records: Vec::new(), slow: false, told: Standings::new(8) };
        match said(&rig.run())[..] {
            [Message::Refuse { reason, .. }] => Some(reason),
            _ => None,
        }
    };
    assert_eq!(refused(|_| {}), None);
    assert_eq!(refused(|hello| hello.base.digest[31] = 0), Some(Refusal::BaseIdentity));
    assert_eq!(refused(|hello| hello.base.length += 1), Some(Refusal::BaseIdentity));
    assert_eq!(refused(|hello| hello.size -= 512), Some(Refusal::Geometry));
    assert_eq!(refused(|hello| hello.chunk_size = 1 << 17), Some(Refusal::Geometry));
    assert_eq!(refused(|hello| hello.virtio_features = 0b100), Some(Refusal::Features));
    assert_eq!(refused(|hello| hello.queues = 2), Some(Refusal::Features));
}

#[test]
fn t16_flushes_wait_for_synced_and_its_record() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    let actions = rig.activate();
    assert!(actions.contains(&DestinationAction::OpenGate));
    assert!(!actions.contains(&DestinationAction::OpenFlush));
    rig.slow = true;
    assert!(!rig.hear(Message::Synced { epoch: OFFERED }).contains(&DestinationAction::OpenFlush));
    rig.durable();
    assert_eq!(rig.run(), [DestinationAction::OpenFlush]);
}

#[test]
fn t16_lost_chunks_fail_and_everything_here_opens_flushes() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    rig.activate();
    let reason = Refusal::Lost;
    let actions = rig.hear(Message::PullFailed { chunk: ChunkId(1), reason });
    assert!(actions.contains(&DestinationAction::FailChunk { chunk: ChunkId(1), reason }));
    // Nothing at the source is needed any more: without Synced, but data and map are synced here first.
    rig.session.handle_overwritten(NOW, ChunkId(1));
    assert_eq!(rig.run(), [DestinationAction::SyncVolume]);
    rig.session.handle_synced(NOW, true);
    let actions = rig.run();
    assert!(actions.contains(&DestinationAction::OpenFlush));
    assert_eq!(said(&actions), [Message::Complete { epoch: OFFERED }]);
}

#[test]
fn t17_a_reclaimed_offer_is_forgotten_durably() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    rig.slow = true;
    rig.hear(Message::Reclaimed { epoch: Epoch(9) });
    assert_eq!(rig.session.step(), DestinationStep::Voiding);
    assert!(rig.start().is_empty(), "asks when the end of the offer is durable");
    rig.durable();
    assert_eq!(said(&rig.run()), [Message::Activate { epoch: None }]);
    rig.hear(Message::Granted { epoch: OFFERED });
    assert_eq!(rig.session.step(), DestinationStep::Receiving);
}

#[test]
fn t17_what_comes_while_the_offer_is_written_is_not_lost() {
    let mut rig = Rig::receiving();
    rig.remains(1, 1);
    rig.slow = true;
    rig.offer(OFFERED);
    assert_eq!(rig.session.step(), DestinationStep::Preparing);
    rig.hear(Message::Reclaimed { epoch: Epoch(9) });
    rig.remains(2, 1);
    rig.offer(Epoch(10));
    rig.slow = false;
    rig.durable();
    let actions = rig.run();
    assert!(said(&actions).contains(&Message::Prepared { epoch: Epoch(10) }), "{actions:?}");
    assert_eq!(rig.session.progress().remaining_chunks, 2);
}

#[test]
fn t21_the_gate_opens_only_after_the_record_of_the_grant() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    assert_eq!(said(&rig.start()), [Message::Activate { epoch: Some(OFFERED) }]);
    rig.slow = true;
    let actions = rig.hear(Message::Granted { epoch: OFFERED });
    assert!(matches!(actions[..], [DestinationAction::Persist { .. }]), "{actions:?}");
    assert!(rig.hear(Message::Granted { epoch: OFFERED }).is_empty(), "said twice");
    // The time to answer is over, but the grant is not to be refused any more.
    assert_eq!(rig.session.next_timeout(), None);
    rig.session.handle_timeout(NOW + START_HOLD);
    rig.session.handle_start_withdrawn(NOW);
    assert!(rig.run().is_empty());
    rig.durable();
    let actions = rig.run();
    assert_eq!(actions.first(), Some(&DestinationAction::OpenGate));
    assert!(actions.contains(&DestinationAction::StartAnswered { allowed: true, reason: None }));
}

#[test]
fn a_held_start_stays_bounded_when_the_rings_ask_as_well() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    rig.start();
    rig.session.handle_start_requested(NOW, false);
    rig.session.handle_timeout(NOW + START_HOLD);
    assert!(rig.run().contains(&DestinationAction::StartAnswered { allowed: false, reason: None }));
}

#[test]
fn t21_a_lost_grant_is_asked_for_again() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    rig.start();
    let actions = rig.reconnect(8, 5);
    assert!(said(&actions).contains(&Message::Activate { epoch: Some(OFFERED) }));
    // A grant of another epoch than the one prepared here gives nothing.
    rig.hear(Message::Granted { epoch: Epoch(10) });
    assert_eq!(rig.session.step(), DestinationStep::Prepared);
    let denied = Message::Denied { epoch: Some(OFFERED), reason: Refusal::Reclaimed };
    let refused = DestinationAction::StartAnswered { allowed: false, reason: Some(Refusal::Reclaimed) };
    assert_eq!(rig.hear(denied), [refused]);
}

#[test]
fn t21_a_source_that_was_restarted_after_its_grant_finds_the_offer_again() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    rig.start();
    let actions = rig.reconnect(8, 6);
    assert!(!actions.contains(&DestinationAction::Wipe));
    let welcome = said(&actions).into_iter().find_map(|message| match message {
        Message::Welcome(welcome) => Some(welcome),
        _ => None,
    });
    let welcome = welcome.unwrap();
    assert_eq!((welcome.prepared, welcome.have_follows), (Some(OFFERED), false));
    // What it tells now counts, and not what the first run told.
    rig.told = Standings::new(8);
    rig.remains(2, 0);
    assert!(said(&rig.offer(OFFERED)).contains(&Message::Prepared { epoch: OFFERED }));
    assert!(rig.hear(Message::Granted { epoch: OFFERED }).contains(&DestinationAction::OpenGate));
}

#[test]
fn t22_an_offer_that_another_run_of_the_source_takes_back_is_dropped_whole() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    rig.reconnect(8, 6);
    // Versions of the first run mean nothing to the second.
    assert!(rig.hear(Message::Reclaimed { epoch: Epoch(9) }).contains(&DestinationAction::Wipe));
    assert_eq!((rig.session.step(), rig.session.epoch()), (DestinationStep::Receiving, Epoch(9)));
}

#[test]
fn t23_versions_of_another_run_are_dropped() {
    let mut rig = Rig::receiving();
    rig.pushed(1, 9);
    let actions = rig.reconnect(7, 6);
    assert!(actions.contains(&DestinationAction::Wipe));
    assert!(!said(&actions).iter().any(|message| matches!(message, Message::Have { .. })));
}

#[test]
fn a_second_connection_takes_the_place_of_one_whose_end_was_not_noticed() {
    let mut rig = Rig::prepared(&[(1, 1)]);
    rig.activate();
    assert_eq!(pulls(&rig.greet(8, 5)), [(1, false)]);
}

#[test]
fn an_offer_under_the_epoch_of_the_greeting_is_taken() {
    let mut rig = Rig::receiving();
    rig.remains(1, 1);
    rig.reconnect(8, 5);
    assert!(said(&rig.offer(OFFERED)).contains(&Message::Prepared { epoch: OFFERED }));
}

/// A side that has given volume 2 away and still has all of it.
fn replica() -> Rig {
    let volume = hello(7, 5).volume;
    let facts = LocalFacts { volume, virgin: false, released: true, replica: Some(GIVEN), ..facts() };
    let session = DestinationSession::idle(facts);
    Rig { session, records: Vec::new(), slow: false, told: Standings::new(8) }
}

const GIVEN: MigrationId = MigrationId([8; 16]);

fn keep(chunks: &[(u32, u64)], last: bool) -> Message {
    let entries = chunks.iter().map(|(chunk, version)| (ChunkId(*chunk), Version(*version))).collect();
    Message::Keep { entries, last }
}

#[test]
fn t23_what_is_kept_of_an_older_state_is_what_the_owner_names() {
    let mut rig = replica();
    let actions = rig.greet(7, 5);
    assert_eq!(said(&actions), [Message::Replica { migration: GIVEN }]);
    let durable = |actions: &[DestinationAction], wanted: &Role| {
        let is = |a: &DestinationAction| matches!(a, DestinationAction::Persist { record: MigrationRecord::V1 { role, .. }, .. } if role == wanted);
        actions.iter().any(is)
    };
    assert!(durable(&actions, &Role::Idle), "a restart from here on drops everything");
    assert!(rig.hear(keep(&[(1, 4)], false)).is_empty());
    // A chunk that the volume does not have is nobody's.
    let actions = rig.hear(keep(&[(3, 0), (99, 1)], true));
    let kept = vec![(ChunkId(1), Version(4)), (ChunkId(3), Version(0))];
    assert_eq!(actions[0], DestinationAction::Prune(kept.clone()));
    assert_eq!(said(&actions).last(), Some(&Message::Have { entries: kept, last: true }));
    assert_eq!(rig.session.step(), DestinationStep::Receiving);
    // An older push of a kept chunk changes nothing, a newer one is taken.
    assert!(
        rig.hear(data(1, 4, Epoch(7), Purpose::Push))
            .iter()
            .all(|a| !matches!(a, DestinationAction::Install(_)))
    );
    assert!(matches!(rig.hear(data(1, 6, Epoch(7), Purpose::Push))[0], DestinationAction::Install(_)));
}

#[test]
fn a_list_that_was_cut_off_keeps_nothing() {
    let mut rig = replica();
    rig.greet(7, 5);
    rig.hear(keep(&[(1, 4)], false));
    rig.session.handle_disconnected(NOW);
    // Nobody asked on this connection yet.
    rig.session.handle_connected(NOW);
    assert!(rig.hear(keep(&[(2, 4)], true)).is_empty());
    assert_eq!(rig.session.step(), DestinationStep::Keeping);
    // Another run of the source, of which another list comes.
    let actions = rig.hear(Message::Hello(hello(7, 6)));
    assert_eq!(said(&actions), [Message::Replica { migration: GIVEN }]);
    let actions = rig.hear(keep(&[], true));
    assert_eq!(actions[0], DestinationAction::Prune(Vec::new()));
    assert!(said(&actions).iter().any(|message| matches!(message, Message::Welcome(w) if !w.have_follows)));
}

#[test]
fn a_side_that_gave_its_disk_away_and_lost_some_of_it_keeps_nothing() {
    let mut rig = replica();
    rig.session = DestinationSession::idle(LocalFacts { replica: None, ..rig.session.facts });
    assert!(rig.greet(7, 5).contains(&DestinationAction::Wipe));
    assert_eq!(rig.session.step(), DestinationStep::Receiving);
    let mut rig = replica();
    rig.greet(7, 5);
    let far: Vec<_> = (0..9).map(|_| (1, 1)).collect();
    assert!(said(&rig.hear(keep(&far, false))).iter().any(|m| matches!(m, Message::Refuse { .. })));
    assert!(rig.session.handle_cancel(NOW).is_ok(), "an operator gets out of it");
    assert!(rig.run().contains(&DestinationAction::Wipe));
}

#[test]
fn a_start_that_comes_while_everything_is_dropped_is_answered() {
    let mut rig = Rig::receiving();
    rig.slow = true;
    rig.session.handle_cancel(NOW).unwrap();
    rig.run();
    rig.session.handle_start_requested(NOW, true);
    assert!(rig.run().is_empty());
    rig.durable();
    let answered = DestinationAction::StartAnswered { allowed: false, reason: Some(Refusal::Cancelled) };
    assert!(rig.run().contains(&answered));
}

fn failed(actions: &[DestinationAction]) -> Vec<u32> {
    let chunk = |action: &DestinationAction| match action {
        DestinationAction::FailWaiting(chunk) => Some(chunk.0),
        _ => None,
    };
    actions.iter().filter_map(chunk).collect()
}

const GRACE: Duration = Duration::from_secs(5);

/// Owns the disk; chunks 1 and 2 are at the source, which is away since `NOW`.
fn away(policy: OnSourceLoss) -> Rig {
    let mut rig = Rig::prepared(&[(1, 1), (2, 1), (3, 1)]);
    rig.activate();
    rig.hear(Message::Synced { epoch: OFFERED });
    rig.hear(data(3, 1, OFFERED, Purpose::Prefetch));
    rig.installed(3, 1, Installed::Done);
    rig.session.set_on_source_loss(NOW, policy);
    assert_eq!(rig.session.source_loss(), SourceLoss::Here);
    rig.session.handle_demand(NOW, ChunkId(1));
    rig.run();
    rig.session.handle_disconnected(NOW);
    assert!(failed(&rig.run()).is_empty());
    assert_eq!(rig.session.source_loss(), SourceLoss::Away { since: NOW, failing: false });
    rig
}

#[test]
fn t27_a_guest_that_stalls_waits_for_its_source_for_as_long_as_it_takes() {
    let mut rig = away(OnSourceLoss::Stall);
    assert_eq!(rig.session.next_timeout(), None);
    let later = NOW + Duration::from_secs(1_000_000);
    rig.session.handle_timeout(later);
    rig.session.handle_demand(later, ChunkId(2));
    assert!(rig.run().is_empty());
    let actions = rig.greet(8, 5);
    assert_eq!(rig.session.source_loss(), SourceLoss::Here);
    assert!(pulls(&actions).contains(&(1, true)) && pulls(&actions).contains(&(2, true)), "{actions:?}");
}

#[test]
fn t27_what_waits_for_a_source_that_is_away_fails_after_the_grace_time_and_works_when_it_is_back() {
    let mut rig = away(OnSourceLoss::Error { grace: GRACE });
    assert_eq!(rig.session.next_timeout(), Some(NOW + GRACE));
    rig.session.handle_timeout(NOW + GRACE - Duration::from_millis(1));
    rig.session.handle_demand(NOW, ChunkId(1));
    assert!(rig.run().is_empty(), "within the grace time it waits");
    rig.session.handle_timeout(NOW + GRACE);
    assert_eq!(failed(&rig.run()), [1, 1], "once for each time that it was asked for");
    assert_eq!(rig.session.source_loss(), SourceLoss::Away { since: NOW, failing: true });
    // At once from now on; what is here, or was never the source's, does not fail.
    for chunk in [2, 1, 3, 5] {
        rig.session.handle_demand(NOW, ChunkId(chunk));
    }
    assert_eq!(failed(&rig.run()), [2, 1]);
    // A connection alone is no source: it must say that it is this one.
    rig.session.handle_connected(NOW);
    rig.session.handle_demand(NOW, ChunkId(2));
    assert_eq!(failed(&rig.run()), [2]);
    let actions = rig.hear(Message::Hello(hello(8, 5)));
    assert_eq!(rig.session.source_loss(), SourceLoss::Here);
    assert_eq!(
        (pulls(&actions).len(), rig.session.progress().remaining_chunks),
        (2, 2),
        "nothing is forgotten"
    );
    rig.session.handle_demand(NOW, ChunkId(1));
    assert_eq!(pulls(&rig.run()), [(1, true)]);
    for chunk in [1, 2] {
        rig.hear(data(chunk, 1, OFFERED, Purpose::Demand));
        rig.installed(chunk, 1, Installed::Done);
    }
    assert_eq!(rig.session.step(), DestinationStep::Completing);
}

#[test]
fn t27_the_grace_time_begins_anew_with_each_absence() {
    let mut rig = away(OnSourceLoss::Error { grace: GRACE });
    rig.greet(8, 5);
    let again = NOW + Duration::from_secs(60);
    rig.session.handle_disconnected(again);
    rig.session.handle_timeout(again);
    rig.session.handle_demand(again, ChunkId(1));
    assert!(failed(&rig.run()).is_empty());
    assert_eq!(rig.session.next_timeout(), Some(again + GRACE));
}

#[test]
fn t27_a_pull_that_failed_fails_the_guest_too_once_the_source_is_gone() {
    let mut rig = away(OnSourceLoss::Error { grace: GRACE });
    rig.greet(8, 5);
    rig.session.handle_demand(NOW, ChunkId(1));
    rig.run();
    rig.hear(Message::PullFailed { chunk: ChunkId(1), reason: Refusal::Io });
    rig.session.handle_disconnected(NOW);
    rig.run();
    rig.session.handle_timeout(NOW + GRACE);
    assert!(failed(&rig.run()).contains(&1));
    assert_eq!(pulls(&rig.greet(8, 5)).len(), 2);
}

#[test]
fn t27_a_restarted_owner_counts_its_source_as_away_until_it_has_come() {
    let record = DestinationRecord {
        migration: MigrationId([1; 16]),
        incarnation: Incarnation(5),
        base: facts().base,
        stage: DestinationStage::Active { source_synced: true },
        write_cache: true,
        digest: RemainingDigest::default(),
    };
    let mut session = DestinationSession::resume(facts(), &record, OFFERED, [], [(ChunkId(1), 0)]);
    session.set_on_source_loss(NOW, OnSourceLoss::Error { grace: GRACE });
    assert_eq!(session.source_loss(), SourceLoss::Away { since: NOW, failing: false });
    assert_eq!(session.next_timeout(), Some(NOW + GRACE));
}
