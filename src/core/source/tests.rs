// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Traps of the source, driven by hand: what is said, when, and what is never said. The simulation in `tests/sim`
//! finds what nobody thought of; these pin what is known.

#![allow(clippy::unwrap_used, clippy::panic, clippy::wildcard_enum_match_arm)]

use super::*;
use crate::core::heat::Counting;
use crate::core::message::{Announcement, BaseIdentity, Incarnation, Standing, VolumeId};
use crate::core::strategy::Strategy;

const NOW: Duration = Duration::from_secs(10);

fn params(strategy: Strategy) -> ArmParams {
    ArmParams {
        hello: Hello {
            migration: MigrationId([1; 16]),
            volume: VolumeId([2; 16]),
            incarnation: Incarnation(3),
            epoch: Epoch(7),
            size: 8 << 16,
            chunk_size: 1 << 16,
            base: BaseIdentity::default(),
            virtio_features: 0,
            queues: 1,
            read_only: false,
            serial: String::new(),
        },
        destination: "host:1".to_owned(),
        strategy,
        threshold: 3,
        counting: Counting::Passes,
        push_window: 4,
        half_life: Duration::from_secs(10),
        start_now: true,
        rings_running: true,
        write_cache: true,
        unchanged: None,
    }
}

fn welcome() -> Message {
    Message::Welcome(Welcome {
        prepared: None,
        active: None,
        complete: false,
        standing: Some(RemainingDigest::default()),
        have_follows: false,
    })
}

struct Rig {
    session: SourceSession,
    /// Records that were asked for and are not durable yet, when `slow`.
    records: Vec<u64>,
    slow: bool,
}

impl Rig {
    /// A session that the destination has agreed with.
    fn agreed(strategy: Strategy, modified: &[u32]) -> Self {
        let modified = modified.iter().copied().map(ChunkId);
        let session = SourceSession::arm(NOW, params(strategy), modified, Vec::new());
        let mut rig = Self { session, records: Vec::new(), slow: false };
        rig.run();
        rig.session.handle_connected(NOW);
        rig
    }

    /// Everything that the session wants; records become durable at once unless `slow`.
    fn run(&mut self) -> Vec<SourceAction> {
        let mut all = Vec::new();
        while let Some(action) = self.session.poll_action() {
            if let SourceAction::Persist { seq, .. } = action {
                self.records.push(seq);
                if !self.slow {
                    self.durable();
                }
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

    fn hear(&mut self, message: Message) -> Vec<SourceAction> {
        self.session.handle_message(NOW, message);
        self.run()
    }

    fn captured(&mut self, chunk: u32, version: u64, clean: bool) -> Vec<SourceAction> {
        let capture = Capture::Done { version: Version(version), clean, body: Body::Zero };
        self.session.handle_captured(NOW, ChunkId(chunk), capture);
        self.run()
    }

    fn ack(&mut self, chunk: u32, version: u64) -> Vec<SourceAction> {
        self.hear(Message::Ack { entries: vec![(ChunkId(chunk), Version(version))] })
    }

    fn stop(&mut self) -> Vec<SourceAction> {
        self.session.handle_rings_stopped(NOW, true);
        self.run()
    }

    fn start(&mut self) -> Vec<SourceAction> {
        self.session.handle_rings_started(NOW);
        self.run()
    }

    fn activate(&mut self, epoch: u64) -> Vec<SourceAction> {
        self.hear(Message::Activate { epoch: Some(Epoch(epoch)) })
    }
}

fn said(actions: &[SourceAction]) -> Vec<Message> {
    let message = |action: &SourceAction| match action {
        SourceAction::Send(message) => Some(message.clone()),
        _ => None,
    };
    actions.iter().filter_map(message).collect()
}

fn sent(actions: &[SourceAction]) -> Vec<(u32, u64)> {
    let data = |action: &SourceAction| match action {
        SourceAction::SendData(data) => Some((data.chunk.0, data.version.0)),
        _ => None,
    };
    actions.iter().filter_map(data).collect()
}

fn captures(actions: &[SourceAction]) -> Vec<u32> {
    let capture = |action: &SourceAction| match action {
        SourceAction::Capture { chunk, .. } => Some(chunk.0),
        _ => None,
    };
    actions.iter().filter_map(capture).collect()
}

fn offer_of(actions: &[SourceAction]) -> Option<Offer> {
    said(actions).into_iter().find_map(|message| match message {
        Message::Offer(offer) => Some(offer),
        _ => None,
    })
}

fn announced(actions: &[SourceAction]) -> Vec<Announcement> {
    let entries = |message| match message {
        Message::Announce { entries } => entries,
        _ => Vec::new(),
    };
    said(actions).into_iter().flat_map(entries).collect()
}

fn grants(actions: &[SourceAction]) -> usize {
    said(actions).iter().filter(|message| matches!(message, Message::Granted { .. })).count()
}

#[test]
fn t02_a_write_during_a_push_is_not_lost() {
    let mut rig = Rig::agreed(Strategy::Precopy, &[1]);
    assert_eq!(captures(&rig.hear(welcome())), [1]);
    assert_eq!(sent(&rig.captured(1, 5, true)), [(1, 5)]);
    rig.session.handle_wrote(NOW, ChunkId(1), 1, 1);
    // The destination has version 5, which is not current any more.
    assert_eq!(captures(&rig.ack(1, 5)), [1]);
    assert_eq!(rig.session.progress().remaining_chunks, 1);
    assert_eq!(sent(&rig.captured(1, 6, true)), [(1, 6)]);
    rig.ack(1, 6);
    assert_eq!(rig.session.progress().remaining_chunks, 0);
}

#[test]
fn t02_a_write_told_before_the_capture_ends_keeps_it_back() {
    let mut rig = Rig::agreed(Strategy::Precopy, &[1]);
    rig.hear(welcome());
    rig.session.handle_wrote(NOW, ChunkId(1), 1, 1);
    let actions = rig.captured(1, 5, true);
    assert_eq!((sent(&actions), captures(&actions)), (vec![], vec![1]));
}

#[test]
fn t04_a_write_after_the_copy_of_the_modified_set_joins_it() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    rig.session.handle_wrote(NOW, ChunkId(6), 1, 1);
    // Told twice, because it is in the copy and was tracked: counted once.
    rig.session.handle_wrote(NOW, ChunkId(1), 1, 1);
    assert_eq!(offer_of(&rig.stop()).unwrap().remaining, 2);
}

#[test]
fn t06_repeated_signals_change_nothing() {
    let mut rig = Rig::agreed(Strategy::Hybrid, &[]);
    rig.hear(welcome());
    rig.stop();
    let epoch = rig.session.epoch();
    let again = rig.stop();
    assert!(matches!(again[..], [SourceAction::RingsStopAnswered]), "{again:?}");
    assert_eq!((rig.session.step(), rig.session.epoch()), (SourceStep::Offered, epoch));
    rig.start();
    let epoch = rig.session.epoch();
    let again = rig.start();
    assert!(again.contains(&SourceAction::RingsStartAnswered { allowed: true, reason: None }));
    assert_eq!((rig.session.step(), rig.session.epoch()), (SourceStep::Pushing, epoch));
}

#[test]
fn t10_an_acknowledgement_of_an_older_version_settles_nothing() {
    let mut rig = Rig::agreed(Strategy::Precopy, &[1]);
    rig.hear(welcome());
    rig.captured(1, 5, true);
    rig.session.handle_wrote(NOW, ChunkId(1), 1, 1);
    rig.ack(1, 5);
    rig.captured(1, 8, true);
    // Late, from another stream.
    rig.ack(1, 5);
    rig.ack(1, 7);
    assert_eq!(rig.session.progress().remaining_chunks, 1);
    rig.ack(1, 8);
    assert_eq!(rig.session.progress().remaining_chunks, 0);
}

#[test]
fn t11_sent_but_unacknowledged_chunks_remain_and_late_acknowledgements_are_void() {
    let mut rig = Rig::agreed(Strategy::Hybrid, &[1, 2]);
    rig.hear(welcome());
    rig.captured(1, 5, true);
    rig.captured(2, 6, true);
    rig.ack(2, 6);
    let offer = offer_of(&rig.stop()).unwrap();
    assert_eq!(offer.remaining, 1);
    // The destination makes version 5 void when it takes the offer.
    rig.ack(1, 5);
    assert_eq!(rig.session.progress().remaining_chunks, 1);
}

#[test]
fn t11_a_mismatch_is_settled_by_the_lists_of_a_new_connection() {
    let mut rig = Rig::agreed(Strategy::Hybrid, &[1, 2]);
    rig.hear(welcome());
    for (chunk, version) in [(1, 5), (2, 6)] {
        rig.captured(chunk, version, true);
        rig.ack(chunk, version);
    }
    let offer = offer_of(&rig.stop()).unwrap();
    assert_eq!(offer.remaining, 0);
    let actions = rig.hear(Message::Mismatch { epoch: offer.epoch });
    assert!(matches!(actions[..], [SourceAction::Disconnect, SourceAction::Connect { .. }]), "{actions:?}");
    rig.session.handle_connected(NOW);
    let Message::Welcome(plain) = welcome() else { panic!() };
    rig.hear(Message::Welcome(Welcome { have_follows: true, ..plain }));
    let actions = rig.hear(Message::Have { entries: vec![(ChunkId(1), Version(5))], last: true });
    assert_eq!(offer_of(&actions).unwrap().remaining, 1);
}

#[test]
fn t12_a_torn_capture_never_becomes_clean() {
    let mut rig = Rig::agreed(Strategy::Precopy, &[1]);
    rig.hear(welcome());
    let actions = rig.captured(1, 5, false);
    assert_eq!((sent(&actions), captures(&actions)), (vec![], vec![1]));
    // Begun before the stop, torn by a write that has ended since: no answer to a pull either.
    let offer = offer_of(&{
        let mut actions = rig.stop();
        rig.session.handle_timeout(NOW + STOP_HOLD);
        actions.extend(rig.run());
        actions
    });
    let pull = Message::Pull { epoch: offer.unwrap().epoch, chunk: ChunkId(1), demand: true };
    assert!(captures(&rig.hear(pull)).is_empty());
    let actions = rig.captured(1, 5, false);
    assert_eq!((sent(&actions), captures(&actions)), (vec![], vec![1]));
    assert_eq!(sent(&rig.captured(1, 6, true)), [(1, 6)]);
}

#[test]
fn t12_a_capture_for_a_pull_is_void_after_a_reclaim() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    let epoch = offer_of(&rig.stop()).unwrap().epoch;
    rig.hear(Message::Pull { epoch, chunk: ChunkId(1), demand: false });
    rig.start();
    let again = offer_of(&rig.stop()).unwrap();
    assert!(again.epoch > epoch);
    // The guest may have written while it ran.
    assert!(sent(&rig.captured(1, 5, true)).is_empty());
}

#[test]
fn t16_synced_is_said_only_when_it_is_recorded() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    let actions = rig.stop();
    assert!(actions.contains(&SourceAction::SyncLayer));
    let epoch = offer_of(&actions).unwrap().epoch;
    rig.activate(epoch.0);
    rig.slow = true;
    rig.session.handle_layer_synced(NOW, true);
    assert!(said(&rig.run()).is_empty());
    rig.durable();
    assert_eq!(said(&rig.run()), [Message::Synced { epoch }]);
}

#[test]
fn t16_a_sync_from_before_a_reclaim_proves_nothing() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    rig.stop();
    rig.start();
    let epoch = offer_of(&rig.stop()).unwrap().epoch;
    // The first sync ends: another one is wanted.
    rig.session.handle_layer_synced(NOW, true);
    assert_eq!(rig.run(), [SourceAction::SyncLayer]);
    let granted = rig.activate(epoch.0);
    assert_eq!(said(&granted), [Message::Granted { epoch }]);
}

#[test]
fn t16_a_failed_sync_is_not_tried_again_while_the_guest_runs_here() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    rig.stop();
    rig.session.handle_layer_synced(NOW, false);
    rig.start();
    rig.session.handle_timeout(NOW + RETRY);
    assert!(!rig.run().contains(&SourceAction::SyncLayer));
    assert!(rig.stop().contains(&SourceAction::SyncLayer));
}

#[test]
fn t16_lost_data_is_denied_by_name() {
    let record = SourceRecord {
        migration: MigrationId([1; 16]),
        destination: "host:1".to_owned(),
        stage: SourceStage::Relinquished { synced: false },
        threshold: 3,
        strategy: 1,
        write_cache: true,
        digest: RemainingDigest::default(),
    };
    let modified = || [ChunkId(1)];
    let resume = |stage| {
        let record = SourceRecord { stage, ..record.clone() };
        let session =
            SourceSession::resume(NOW, params(Strategy::Hybrid), &record, Epoch(8), modified(), true);
        let mut rig = Rig { session, records: Vec::new(), slow: false };
        assert!(!rig.run().contains(&SourceAction::SyncLayer));
        rig.session.handle_connected(NOW);
        rig.hear(welcome());
        rig
    };
    let mut granted = resume(record.stage);
    let answer = granted.hear(Message::Pull { epoch: Epoch(8), chunk: ChunkId(1), demand: true });
    assert_eq!(said(&answer), [Message::PullFailed { chunk: ChunkId(1), reason: Refusal::Lost }]);
    let mut offered = resume(SourceStage::Offered);
    let answer = offered.activate(8);
    assert_eq!(said(&answer), [Message::Denied { epoch: Some(Epoch(8)), reason: Refusal::Lost }]);
}

#[test]
fn t17_pause_and_continue_are_reversible() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    let offer = offer_of(&rig.stop()).unwrap();
    assert_eq!(rig.hear(Message::Prepared { epoch: offer.epoch }), [SourceAction::RingsStopAnswered]);
    let actions = rig.start();
    let now = offer.epoch.next();
    assert_eq!(said(&actions), [Message::Reclaimed { epoch: now }]);
    let opens = actions.iter().position(|action| *action == SourceAction::OpenGate).unwrap();
    let record = actions.iter().position(|action| matches!(action, SourceAction::Persist { .. })).unwrap();
    assert!(record < opens, "the guest runs only under a durable epoch");
    assert!(actions.contains(&SourceAction::RingsStartAnswered { allowed: true, reason: None }));
    assert_eq!((rig.session.stage(), rig.session.epoch()), (SourceStage::Pushing, now));
    assert_eq!(offer_of(&rig.stop()).unwrap().epoch, now.next());
}

#[test]
fn t17_a_start_while_arming_or_draining_opens_the_gate_again() {
    let session = SourceSession::arm(NOW, params(Strategy::Precopy), [ChunkId(1)], Vec::new());
    let mut rig = Rig { session, records: Vec::new(), slow: true };
    rig.run();
    rig.stop();
    let expected = [
        SourceAction::RingsStopAnswered,
        SourceAction::OpenGate,
        SourceAction::RingsStartAnswered { allowed: true, reason: None },
    ];
    assert_eq!(rig.start(), expected);
    rig.durable();
    rig.slow = false;
    rig.session.handle_connected(NOW);
    rig.hear(welcome());
    rig.stop();
    assert_eq!(rig.session.step(), SourceStep::Draining);
    assert_eq!(rig.start(), expected);
}

#[test]
fn t17_a_disk_that_was_paused_when_armed_is_offered_behind_a_closed_gate() {
    let paused = ArmParams { rings_running: false, ..params(Strategy::Hybrid) };
    let session = SourceSession::arm(NOW, paused, [], Vec::new());
    let mut rig = Rig { session, records: Vec::new(), slow: false };
    rig.run();
    rig.session.handle_connected(NOW);
    rig.hear(welcome());
    let actions = rig.hear(Message::Activate { epoch: None });
    assert_eq!(actions.first(), Some(&SourceAction::CloseGate));
    assert_eq!(offer_of(&actions).unwrap().epoch, Epoch(8));
}

#[test]
fn t19_only_what_changed_is_announced_at_the_stop() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let mut ahead = rig.hear(welcome());
    rig.session.handle_timeout(NOW);
    ahead.extend(rig.run());
    assert_eq!(announced(&ahead).iter().map(|entry| entry.run).sum::<u32>(), 8);
    rig.session.handle_wrote(NOW, ChunkId(3), 1, 1);
    let entry = Announcement { first: ChunkId(3), run: 1, standing: Standing::Remaining { count: 1 } };
    let actions = rig.stop();
    assert_eq!(announced(&actions), [entry]);
    assert_eq!(offer_of(&actions).unwrap().remaining, 8);
}

#[test]
fn t21_a_grant_is_durable_before_it_is_said_and_repeated_at_will() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    let epoch = offer_of(&rig.stop()).unwrap().epoch;
    rig.slow = true;
    let actions = rig.activate(epoch.0);
    assert!(matches!(actions[..], [SourceAction::Persist { .. }]), "{actions:?}");
    assert!(rig.activate(epoch.0).is_empty(), "a second Activate waits for the same record");
    // The rings start here, too late.
    assert_eq!(
        rig.start(),
        [SourceAction::RingsStartAnswered { allowed: false, reason: Some(Refusal::StaleEpoch) }]
    );
    rig.durable();
    rig.slow = false;
    assert_eq!(grants(&rig.run()), 1);
    assert_eq!(grants(&rig.activate(epoch.0)), 1);
    // The grant was lost with the connection: the destination says that it only holds the offer.
    rig.session.handle_disconnected(NOW);
    rig.run();
    rig.session.handle_connected(NOW);
    let Message::Welcome(plain) = welcome() else { panic!() };
    let prepared = Message::Welcome(Welcome { prepared: Some(epoch), ..plain });
    assert_eq!(grants(&rig.hear(prepared)), 1);
    assert_eq!(rig.session.epoch(), epoch);
}

#[test]
fn t21_a_reclaimed_epoch_is_never_granted() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    let epoch = offer_of(&rig.stop()).unwrap().epoch.0;
    rig.slow = true;
    rig.start();
    let denied = Message::Denied { epoch: Some(Epoch(epoch)), reason: Refusal::Reclaimed };
    assert_eq!(said(&rig.activate(epoch)), std::slice::from_ref(&denied));
    rig.durable();
    rig.slow = false;
    rig.run();
    assert_eq!(said(&rig.activate(epoch)), [denied]);
    rig.stop();
    let stale = Message::Denied { epoch: Some(Epoch(epoch)), reason: Refusal::StaleEpoch };
    assert_eq!(said(&rig.activate(epoch)), [stale]);
}

#[test]
fn t21_a_greeting_names_only_durable_epochs() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    let epoch = offer_of(&rig.stop()).unwrap().epoch;
    rig.slow = true;
    rig.start();
    rig.session.handle_disconnected(NOW);
    rig.run();
    rig.session.handle_connected(NOW);
    // A crash now would go back to the offer: a destination that gave it up could not take it again.
    assert!(matches!(said(&rig.run())[..], [Message::Hello(Hello { epoch: named, .. })] if named == epoch));
    rig.hear(welcome());
    rig.durable();
    assert_eq!(said(&rig.run()), [Message::Reclaimed { epoch: epoch.next() }]);
}

#[test]
fn t21_a_destination_that_missed_the_reclaim_is_told_on_reconnection() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    let epoch = offer_of(&rig.stop()).unwrap().epoch;
    rig.session.handle_disconnected(NOW);
    rig.start();
    rig.session.handle_connected(NOW);
    let Message::Welcome(plain) = welcome() else { panic!() };
    let actions = rig.hear(Message::Welcome(Welcome { prepared: Some(epoch), ..plain }));
    assert!(said(&actions).contains(&Message::Reclaimed { epoch: epoch.next() }));
}

#[test]
fn t20_prepared_is_what_the_destination_said_of_this_offer_on_this_connection() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    let epoch = offer_of(&rig.stop()).unwrap().epoch;
    assert!(!rig.session.prepared());
    rig.hear(Message::Prepared { epoch: Epoch(epoch.0 - 1) });
    assert!(!rig.session.prepared(), "an answer to an older offer");
    rig.hear(Message::Prepared { epoch });
    assert!(rig.session.prepared());
    rig.session.handle_disconnected(NOW);
    assert!(!rig.session.prepared(), "nobody knows what became of it");
    rig.session.handle_connected(NOW);
    rig.hear(welcome());
    rig.hear(Message::Prepared { epoch });
    assert!(rig.session.prepared());
    rig.start();
    assert!(!rig.session.prepared(), "the disk was taken back");
}

#[test]
fn t22_a_late_failure_needs_nobody_to_take_the_disk_back() {
    let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
    rig.hear(welcome());
    let epoch = offer_of(&rig.stop()).unwrap().epoch;
    rig.hear(Message::Prepared { epoch });
    rig.session.handle_disconnected(NOW);
    rig.run();
    let actions = rig.start();
    assert!(actions.contains(&SourceAction::OpenGate));
    assert_eq!(rig.session.epoch(), epoch.next());
    // After a grant the same start is refused, with the connection down as well.
    rig.session.handle_connected(NOW);
    rig.hear(welcome());
    let epoch = offer_of(&rig.stop()).unwrap().epoch;
    rig.activate(epoch.0);
    rig.session.handle_disconnected(NOW);
    rig.run();
    let refused = SourceAction::RingsStartAnswered { allowed: false, reason: Some(Refusal::StaleEpoch) };
    assert_eq!(rig.start(), [refused]);
    assert_eq!(rig.session.handle_cancel(NOW), Err(Refusal::StaleEpoch));
}

#[test]
fn t23_chunks_are_reused_only_by_the_current_version() {
    let mut rig = Rig::agreed(Strategy::Precopy, &[1, 2]);
    rig.hear(welcome());
    for (chunk, version) in [(1, 5), (2, 6)] {
        rig.captured(chunk, version, true);
        rig.ack(chunk, version);
    }
    assert_eq!(rig.session.progress().remaining_chunks, 0);
    rig.session.handle_disconnected(NOW);
    rig.run();
    rig.session.handle_connected(NOW);
    let Message::Welcome(plain) = welcome() else { panic!() };
    rig.hear(Message::Welcome(Welcome { have_follows: true, ..plain }));
    let entries = vec![(ChunkId(1), Version(5)), (ChunkId(2), Version(4))];
    assert_eq!(captures(&rig.hear(Message::Have { entries, last: true })), [2]);
}

#[test]
fn a_stop_without_a_destination_is_answered_in_time() {
    let mut rig = Rig::agreed(Strategy::Precopy, &[1]);
    rig.hear(welcome());
    rig.stop();
    assert_eq!(rig.session.step(), SourceStep::Draining);
    // A second stop must not take the bound away.
    rig.stop();
    let at = rig.session.next_timeout().unwrap();
    assert!(at <= NOW + STOP_HOLD);
    rig.session.handle_timeout(NOW + STOP_HOLD);
    let actions = rig.run();
    assert!(actions.contains(&SourceAction::RingsStopAnswered));
    assert_eq!(offer_of(&actions).unwrap().remaining, 1);
}

/// A disk that came in migration 8, with chunks 0 to 3 as they came.
fn came(unchanged: &[(u32, u64)]) -> Rig {
    let chunks = unchanged.iter().map(|(chunk, version)| (ChunkId(*chunk), Version(*version))).collect();
    let unchanged = Some(Unchanged { migration: CAME, chunks });
    let params = ArmParams { unchanged, ..params(Strategy::Precopy) };
    let session = SourceSession::arm(NOW, params, (0..6).map(ChunkId), Vec::new());
    let mut rig = Rig { session, records: Vec::new(), slow: false };
    rig.run();
    rig.session.handle_connected(NOW);
    rig.run();
    rig
}

const CAME: MigrationId = MigrationId([8; 16]);

#[test]
fn t02_t23_what_was_written_since_it_came_is_not_kept() {
    let mut rig = came(&[(0, 4), (1, 0), (2, 6), (7, 1)]);
    rig.session.handle_wrote(NOW, ChunkId(2), 1, 1);
    let said = rig.hear(Message::Replica { migration: CAME });
    let entries = vec![(ChunkId(0), Version(4)), (ChunkId(1), Version(0))];
    assert_eq!(said, [SourceAction::Send(Message::Keep { entries: entries.clone(), last: true })]);
    assert_eq!(rig.session.progress().kept_chunks, 2);
    // Written after the list was made; and one that the destination could not keep after all.
    rig.session.handle_wrote(NOW, ChunkId(0), 1, 1);
    let Message::Welcome(welcome) = welcome() else { unreachable!() };
    rig.hear(Message::Welcome(Welcome { have_follows: true, ..welcome }));
    let actions = rig.hear(Message::Have { entries: vec![(ChunkId(0), Version(4))], last: true });
    let captured = |a: &SourceAction| match a {
        SourceAction::Capture { chunk, .. } => Some(chunk.0),
        _ => None,
    };
    let mut pushed: Vec<u32> = actions.iter().filter_map(captured).collect();
    while let Some(chunk) = pushed.last().copied().filter(|_| pushed.len() < 6) {
        let more = rig.captured(chunk, 9, true);
        pushed.extend(more.iter().filter_map(captured));
        let more = rig.ack(chunk, 9);
        pushed.extend(more.iter().filter_map(captured));
    }
    pushed.sort_unstable();
    assert_eq!(pushed, [0, 1, 2, 3, 4, 5], "all of them travel");
}

#[test]
fn another_migrations_replica_is_worth_nothing() {
    let mut rig = came(&[(0, 4)]);
    let nothing = SourceAction::Send(Message::Keep { entries: Vec::new(), last: true });
    assert_eq!(rig.hear(Message::Replica { migration: MigrationId([9; 16]) }), [nothing]);
    // Only instead of a welcome.
    rig.hear(welcome());
    assert!(rig.hear(Message::Replica { migration: CAME }).contains(&SourceAction::Disconnect));
}

#[test]
fn a_released_source_says_durably_whether_it_has_synced_what_it_has() {
    for early in [true, false] {
        let mut rig = Rig::agreed(Strategy::Postcopy, &[1]);
        rig.hear(welcome());
        rig.stop();
        let epoch = rig.session.epoch();
        if early {
            rig.session.handle_layer_synced(NOW, true);
        }
        rig.hear(Message::Activate { epoch: Some(epoch) });
        rig.hear(Message::Complete { epoch });
        assert_eq!(rig.session.stage(), SourceStage::Released { synced: early });
        rig.session.handle_layer_synced(NOW, true);
        rig.run();
        assert_eq!(rig.session.stage(), SourceStage::Released { synced: true });
    }
}
