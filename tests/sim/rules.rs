// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who may serve and what may be said: rules of the sessions alone, whatever their volumes are made of.

use crate::world::{NodeRole, World};
use blkferry::core::message::Message;
use blkferry::core::ownership::{DestinationStep, SourceStep};
use blkferry::core::record::{DestinationStage, MigrationRecord, Role, SourceStage};

impl World {
    /// After every event.
    pub(crate) fn check(&self) {
        assert!(!(self.sides[0].gate && self.sides[1].gate), "two gates are open: {}", self.describe());
        assert!(self.stats.mismatches < 50, "the peers never agree on an offer: {}", self.describe());
        for side in 0..2 {
            let s = &self.sides[side];
            assert!(
                !s.gate || !s.alive || self.may_serve(side),
                "side {side} serves without right: {}",
                self.describe()
            );
        }
    }

    /// A message leaves: the state that it depends on is durable.
    pub(crate) fn check_said(&self, side: usize, message: &Message) {
        let MigrationRecord::V1 { epoch: durable, role, .. } = &self.sides[side].record;
        let gives = |wanted: fn(SourceStage) -> bool| matches!(role, Role::Source(r) if wanted(r.stage));
        let takes =
            |wanted: fn(DestinationStage) -> bool| matches!(role, Role::Destination(r) if wanted(r.stage));
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
            Message::Cancel => *role == Role::Serving,
            Message::Prepared { epoch } => {
                epoch == durable && takes(|stage| stage == DestinationStage::Prepared)
            }
            Message::Complete { epoch } => {
                epoch == durable && takes(|stage| stage == DestinationStage::Complete)
            }
            Message::Cancelled => *role == Role::Idle,
            _ => true,
        };
        assert!(good, "side {side} says {message:?} but has durably {:?}", self.sides[side].record);
    }

    /// A gate opens.
    pub(crate) fn check_owner(&mut self, side: usize) {
        let epoch = self.sides[side].epoch.0;
        let owner = *self.owners.entry(epoch).or_insert(side);
        assert_eq!(owner, side, "epoch {epoch} has two owners: {}", self.describe());
        let granted = self.sides[side].granted;
        let offered = self.sides[side].offered;
        assert!(epoch > offered, "epoch {offered} was offered by side {side} and is served by it");
        assert!(epoch > granted, "epoch {granted} was given away by side {side}: {}", self.describe());
    }

    /// Whether a side's session lets it serve.
    pub(crate) fn may_serve(&self, side: usize) -> bool {
        match &self.sides[side].role {
            NodeRole::Serving => true,
            NodeRole::Idle => false,
            // Until the record of the offer is asked for.
            NodeRole::Source(session) => {
                blkferry::core::ownership::source_serves(session.step())
                    || session.step() == SourceStep::Leaving
            }
            NodeRole::Destination(session) => {
                blkferry::core::ownership::destination_serves(session.step())
                    || (session.step() == DestinationStep::Left)
            }
        }
    }
}
