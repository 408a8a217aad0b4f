// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must hold in every state, and whenever something is said, recorded or opened.

use crate::seen::Seen;
use crate::volume::CELLS;
use crate::world::{DESTINATION, Op, Role, Rule, SOURCE, World};
use blkferry::core::chunk::ChunkState;
use blkferry::core::geometry::ChunkId;
use blkferry::core::message::{Epoch, Message};
use blkferry::core::ownership::{DestinationStep, SourceStep, destination_serves, source_serves};
use blkferry::core::record::{DestinationStage, MigrationRecord, Role as RecordRole, SourceStage};

impl World {
    /// The side whose disk it is: the source's until it has durably given it away.
    pub(crate) fn owner(&self) -> usize {
        let MigrationRecord::V1 { role, .. } = &self.side(SOURCE).record;
        let gone = matches!(role, RecordRole::Source(r)
            if matches!(r.stage, SourceStage::Relinquished { .. } | SourceStage::Released { .. }));
        usize::from(gone)
    }

    /// What the owner would read, or pull; `None` where the source says by name that it is lost.
    pub(crate) fn truth(&self, chunk: ChunkId, cell: usize) -> Option<u8> {
        let source = self.side(SOURCE);
        if self.owner() == SOURCE {
            return source.volume.value(chunk, cell);
        }
        let here = self.side(DESTINATION).volume.value(chunk, cell);
        let MigrationRecord::V1 { role, .. } = &source.record;
        let gives = matches!(role, RecordRole::Source(r) if !matches!(r.stage, SourceStage::Released { .. }))
            && !source.data_lost;
        here.or_else(|| source.volume.value(chunk, cell).filter(|_| gives))
    }

    fn cells(&self) -> impl Iterator<Item = (ChunkId, usize)> + use<> {
        let chunks = self.side(SOURCE).volume.ids();
        chunks.flat_map(|chunk| (0..CELLS).map(move |cell| (chunk, cell)))
    }

    /// After every step.
    pub(crate) fn check(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let gates = [SOURCE, DESTINATION].map(|side| self.side(side).gate);
        self.require(gates != [true, true], Rule::OneOwner, || "two gates are open".to_owned());
        for side in [SOURCE, DESTINATION] {
            let may = match &self.side(side).role {
                Role::Serving => true,
                Role::Idle => false,
                Role::Source(session) => {
                    source_serves(session.step()) || session.step() == SourceStep::Leaving
                }
                Role::Destination(session) => {
                    destination_serves(session.step()) || session.step() == DestinationStep::Left
                }
            };
            let gate = gates[side];
            self.require(may || !gate, Rule::OneOwner, || format!("side {side} serves without right"));
        }
        for (chunk, cell) in self.cells() {
            let known = &self.guest.cells[chunk.index()][cell];
            let writing = self.guest.op.filter(|op| op.chunk == chunk && op.touch.cells().contains(&cell));
            let truth = self.truth(chunk, cell);
            let lost = truth.is_none() && self.owner() == DESTINATION && self.side(SOURCE).data_lost;
            let good = truth == Some(known.acked) || truth.is_some() && truth == writing.map(|op| op.value);
            if !good && !lost {
                let owner = self.owner();
                let text = format!("{chunk} cell {cell}: side {owner} reads {truth:?}, {known:?}");
                return self.fail(Rule::NothingLost, text);
            }
        }
        let held = self.left.flushes > 0 && self.guest_runs(DESTINATION);
        if held && !self.side(DESTINATION).flush_gate {
            self.see(Seen::HeldFlush);
        }
    }

    /// A message leaves: the state that it depends on is durable.
    pub(crate) fn check_said(&mut self, side: usize, message: &Message) {
        let MigrationRecord::V1 { epoch: durable, role, .. } = &self.side(side).record;
        let gives =
            |wanted: fn(SourceStage) -> bool| matches!(role, RecordRole::Source(r) if wanted(r.stage));
        let takes =
            |wanted: DestinationStage| matches!(role, RecordRole::Destination(r) if r.stage == wanted);
        let good = match message {
            Message::Hello(hello) => hello.epoch <= *durable,
            Message::Offer(offer) => offer.epoch == *durable && gives(|stage| stage == SourceStage::Offered),
            Message::Reclaimed { epoch } => epoch == durable && gives(|stage| stage == SourceStage::Pushing),
            Message::Granted { epoch } => {
                epoch == durable && gives(|stage| matches!(stage, SourceStage::Relinquished { .. }))
            }
            Message::Synced { epoch } => {
                epoch == durable && gives(|stage| stage == SourceStage::Relinquished { synced: true })
            }
            Message::Released { epoch } => {
                epoch == durable && gives(|stage| matches!(stage, SourceStage::Released { .. }))
            }
            Message::Cancel => *role == RecordRole::Serving,
            Message::Prepared { epoch } => epoch == durable && takes(DestinationStage::Prepared),
            Message::Complete { epoch } => epoch == durable && takes(DestinationStage::Complete),
            Message::Cancelled => *role == RecordRole::Idle,
            _ => true,
        };
        if !good {
            self.fail(Rule::DurableBeforeSaid, format!("side {side} says {message:?} too early"));
        }
    }

    /// A gate opens.
    pub(crate) fn check_owner(&mut self, side: usize) {
        let s = self.side(side);
        let (epoch, granted, offered) = (s.epoch.0, s.granted, s.offered);
        let text = format!(
            "side {side} opens its gate under epoch {epoch}: offered {offered}, given away {granted}"
        );
        let MigrationRecord::V1 { role, epoch: durable, .. } = &s.record;
        let good = match role {
            RecordRole::Serving => true,
            RecordRole::Idle => false,
            RecordRole::Source(r) => r.stage == SourceStage::Pushing,
            RecordRole::Destination(r) => {
                let owns = matches!(r.stage, DestinationStage::Active { .. } | DestinationStage::Complete);
                owns && durable.0 == self.side(SOURCE).granted
            }
        };
        self.require(good, Rule::OneOwner, || format!("side {side} opens its gate without a record of it"));
        self.require(epoch > granted && epoch > offered, Rule::OneOwner, || text);
    }

    fn equal(&mut self, chunk: ChunkId, rule: Rule, what: &str) {
        for cell in 0..CELLS {
            let there = self.side(SOURCE).volume.value(chunk, cell);
            let here = self.side(DESTINATION).volume.value(chunk, cell);
            self.require(here == there, rule, || {
                format!("{chunk} cell {cell} {what}: {here:?} here, {there:?} at the source")
            });
        }
    }

    /// The destination records an offer: whatever is not in the remaining set is equal at both sides.
    pub(crate) fn check_offer(&mut self, list: &[(ChunkId, u8, bool)]) {
        let Some(epoch) = self.destination().map(|session| session.epoch()) else { return };
        // A source that has died or takes its disk back will not grant this offer as it stands.
        let valid = self.source().is_some_and(|session| {
            session.epoch() == epoch && matches!(session.step(), SourceStep::Offered | SourceStep::Granting)
        });
        if !valid {
            return;
        }
        let modified = self.side(SOURCE).volume.modified();
        let missing: Vec<ChunkId> =
            modified.into_iter().filter(|chunk| !list.iter().any(|(at, ..)| at == chunk)).collect();
        self.require(missing.is_empty(), Rule::SettledIsCurrent, || format!("the offer misses {missing:?}"));
        for chunk in self.side(SOURCE).volume.ids() {
            if list.iter().any(|(at, _, remains)| *at == chunk && *remains) {
                let state = self.side(DESTINATION).volume.chunk(chunk).lasting();
                self.require(state == ChunkState::Remote, Rule::SettledIsCurrent, || {
                    format!("{chunk} remains but is {state:?}")
                });
            } else {
                self.equal(chunk, Rule::SettledIsCurrent, "counts as settled");
            }
        }
    }

    /// The destination's gate is about to open: what is here is what the source had.
    pub(crate) fn check_handoff(&mut self) {
        let epoch = self.side(DESTINATION).epoch;
        let granted = Epoch(self.side(SOURCE).granted);
        self.require(granted == epoch, Rule::OneOwner, || format!("{epoch:?} was not granted"));
        // After a crash of its host the source may have less than the destination.
        if self.side(SOURCE).safe.as_ref().is_some_and(|safe| !safe.same_boot) || self.side(SOURCE).data_lost
        {
            return;
        }
        for chunk in self.side(SOURCE).volume.ids() {
            if self.side(DESTINATION).volume.chunk(chunk).lasting() != ChunkState::Remote {
                self.equal(chunk, Rule::SettledIsCurrent, "is here at the handoff");
            }
        }
    }

    /// The source has recorded that it has synced: whatever it has is safe.
    pub(crate) fn check_synced(&mut self) {
        let Some(safe) = self.side(SOURCE).safe.clone() else { return };
        for (chunk, cell) in self.cells() {
            let (now, synced) = (self.side(SOURCE).volume.value(chunk, cell), safe.volume.value(chunk, cell));
            self.require(now == synced, Rule::SyncedIsSafe, || format!("{chunk} cell {cell} is not synced"));
        }
    }

    /// A guest flush is acknowledged: nothing may rely on what the source has not synced.
    pub(crate) fn check_flush(&mut self, side: usize) {
        let Some(safe) = self.side(SOURCE).safe.clone() else { return };
        if side == SOURCE {
            return;
        }
        for (chunk, cell) in self.cells() {
            if self.side(DESTINATION).volume.value(chunk, cell).is_some() {
                continue;
            }
            let (now, synced) = (self.side(SOURCE).volume.value(chunk, cell), safe.volume.value(chunk, cell));
            let good = now == synced && !self.side(SOURCE).data_lost;
            self.require(good, Rule::SyncedIsSafe, || {
                format!("a flush relies on {chunk} cell {cell}, which the source has not synced")
            });
        }
    }

    /// The host of a side went down. If it is the owner's, the guest went with it: each cell has what was flushed or
    /// anything newer, and that is what the guest knows from now on.
    pub(crate) fn guest_after_host_crash(&mut self, side: usize, op: Option<Op>) {
        if let Some(op) = op {
            for cell in op.touch.cells() {
                self.guest.cells[op.chunk.index()][cell].since.push(op.value);
            }
        }
        if self.owner() != side {
            return;
        }
        for (chunk, cell) in self.cells() {
            let Some(truth) = self.truth(chunk, cell) else { continue };
            let known = &mut self.guest.cells[chunk.index()][cell];
            let good = truth == known.flushed || known.since.contains(&truth);
            let text = format!("{chunk} cell {cell} after a crash of the host: {truth}, {known:?}");
            *known = crate::world::Cell::new(truth);
            self.require(good, Rule::NothingLost, || text);
        }
    }
}
