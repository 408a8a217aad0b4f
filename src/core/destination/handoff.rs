// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The taking half of TRANSFER_IO_CONTROL (paper, Algorithm 3): the offer is checked and made durable, the disk is
//! asked for when the guest starts here, and owned when the grant is durable.

use super::*;

impl DestinationSession {
    pub(super) fn on_offer(&mut self, offer: Offer) {
        match self.step {
            DestinationStep::Receiving => self.offer = Some(offer),
            // Said again after a reconnection.
            DestinationStep::Prepared if offer.epoch == self.epoch => {
                let reply = if offer.digest == self.pull.told_digest() {
                    self.digest = offer.digest;
                    Message::Prepared { epoch: self.epoch }
                } else {
                    Message::Mismatch { epoch: self.epoch }
                };
                self.send(reply);
                self.ask_for_disk();
            }
            // An offer under a newer epoch: the older one was reclaimed, and the message that said so was lost.
            DestinationStep::Prepared if offer.epoch > self.epoch => {
                self.void(self.epoch);
                self.offer = Some(offer);
            }
            // Taken up when the record of the older one, or of its end, is durable.
            DestinationStep::Preparing | DestinationStep::Voiding => self.offer = Some(offer),
            DestinationStep::Idle
            | DestinationStep::Clearing
            | DestinationStep::Keeping
            | DestinationStep::Pruning
            | DestinationStep::Adopting
            | DestinationStep::Prepared
            | DestinationStep::Activating
            | DestinationStep::Active
            | DestinationStep::Completing
            | DestinationStep::Complete
            | DestinationStep::Settling
            | DestinationStep::Dropping
            | DestinationStep::Left => {}
        }
    }

    /// Takes an offer up when no install is under way: what arrives later is of an older epoch and is dropped.
    pub(super) fn consider_offer(&mut self) {
        if self.step != DestinationStep::Receiving || self.pull.installing() {
            return;
        }
        let Some(offer) = self.offer.take() else { return };
        let agrees = offer.digest == self.pull.told_digest() && offer.remaining == self.pull.told_remaining();
        if !agrees || offer.epoch < self.epoch {
            return self.send(Message::Mismatch { epoch: offer.epoch });
        }
        for (first, run) in self.pull.void_stale() {
            self.actions.push_back(DestinationAction::MarkRemote { first, run });
        }
        self.epoch = offer.epoch;
        self.digest = offer.digest;
        self.write_cache = offer.write_cache;
        self.actions.push_back(DestinationAction::SetWriteCache(offer.write_cache));
        if self.go(DestinationStep::Preparing) {
            let list = self.pull.modified_set();
            self.persist(DestinationStage::Prepared, Some(list));
        }
    }

    pub(super) fn prepared(&mut self) {
        self.go(DestinationStep::Prepared);
        let newer = self.offer.map(|_| self.epoch);
        if let Some(epoch) = self.voided.take().filter(|epoch| *epoch > self.epoch).or(newer) {
            return self.void(epoch);
        }
        self.pull.begin();
        self.send(Message::Prepared { epoch: self.epoch });
        self.ask_for_disk();
    }

    /// The front-end starts its rings: it wants the disk. With `hold`, its acknowledgement waits, at most
    /// [`START_HOLD`]; without, the rings wait for the gate by themselves.
    pub fn handle_start_requested(&mut self, now: Duration, hold: bool) {
        if crate::core::ownership::destination_serves(self.step) {
            return self.answer_start(true, None);
        }
        // An acknowledgement that is held already stays bounded when the rings ask on their own as well.
        let held = self.start.and_then(|start| start.deadline);
        let deadline = hold.then(|| Aside(now + START_HOLD)).or(held);
        let asked = self.start.is_some_and(|start| start.asked);
        self.start = Some(Start { asked, deadline });
        self.ask_for_disk();
    }

    /// The rings have stopped again, or the front-end is gone.
    pub fn handle_start_withdrawn(&mut self, _now: Duration) {
        if self.step != DestinationStep::Activating {
            self.start = None;
        }
    }

    /// Asks once for each offer and connection.
    pub(super) fn ask_for_disk(&mut self) {
        let epoch = match self.step {
            DestinationStep::Prepared => Some(self.epoch),
            DestinationStep::Receiving => None,
            DestinationStep::Idle
            | DestinationStep::Clearing
            | DestinationStep::Keeping
            | DestinationStep::Pruning
            | DestinationStep::Adopting
            | DestinationStep::Preparing
            | DestinationStep::Voiding
            | DestinationStep::Activating
            | DestinationStep::Active
            | DestinationStep::Completing
            | DestinationStep::Complete
            | DestinationStep::Settling
            | DestinationStep::Dropping
            | DestinationStep::Left => return,
        };
        if !self.welcomed {
            return;
        }
        let Some(start) = &mut self.start else { return };
        if epoch.is_none() && start.asked {
            return;
        }
        start.asked = true;
        self.send(Message::Activate { epoch });
    }

    pub(super) fn on_granted(&mut self, epoch: Epoch) {
        if epoch == self.epoch
            && self.step == DestinationStep::Prepared
            && self.go(DestinationStep::Activating)
        {
            self.synced_recorded = self.source_synced;
            self.persist(DestinationStage::Active { source_synced: self.source_synced }, None);
        }
    }

    pub(super) fn activated(&mut self) {
        self.go(DestinationStep::Active);
        self.actions.push_back(DestinationAction::OpenGate);
        if self.synced_recorded {
            self.actions.push_back(DestinationAction::OpenFlush);
        } else if self.source_synced {
            self.persist_synced();
        }
        self.answer_start(true, None);
    }

    pub(super) fn answer_start(&mut self, allowed: bool, reason: Option<Refusal>) {
        self.start = None;
        self.actions.push_back(DestinationAction::StartAnswered { allowed, reason });
    }

    /// The source keeps the disk. If that is only because it has not stopped yet, the start goes on waiting.
    pub(super) fn on_denied(&mut self, reason: Refusal) {
        let undecided = matches!(
            self.step,
            DestinationStep::Receiving
                | DestinationStep::Preparing
                | DestinationStep::Prepared
                | DestinationStep::Voiding
        );
        if undecided && self.start.is_some() {
            self.answer_start(false, Some(reason));
        }
    }

    pub(super) fn on_reclaimed(&mut self, epoch: Epoch) {
        if epoch > self.epoch {
            match self.step {
                DestinationStep::Receiving | DestinationStep::Prepared => {
                    self.offer = None;
                    self.void(epoch);
                }
                // The offer is being written; it is void, and the source will not grant it.
                DestinationStep::Preparing => self.voided = self.voided.max(Some(epoch)),
                DestinationStep::Idle
                | DestinationStep::Clearing
                | DestinationStep::Keeping
                | DestinationStep::Pruning
                | DestinationStep::Adopting
                | DestinationStep::Voiding
                | DestinationStep::Activating
                | DestinationStep::Active
                | DestinationStep::Completing
                | DestinationStep::Complete
                | DestinationStep::Settling
                | DestinationStep::Dropping
                | DestinationStep::Left => {}
            }
        }
    }

    /// A push under a newer epoch proves, ahead of the control stream, that an offer was reclaimed.
    pub(super) fn learn_epoch(&mut self, epoch: Epoch) {
        if self.offer.is_some_and(|offer| offer.epoch < epoch) {
            self.offer = None;
        }
        match self.step {
            DestinationStep::Receiving => self.epoch = Epoch(self.epoch.0.max(epoch.0)),
            DestinationStep::Prepared | DestinationStep::Preparing => self.on_reclaimed(epoch),
            DestinationStep::Idle
            | DestinationStep::Clearing
            | DestinationStep::Keeping
            | DestinationStep::Pruning
            | DestinationStep::Adopting
            | DestinationStep::Voiding
            | DestinationStep::Activating
            | DestinationStep::Active
            | DestinationStep::Completing
            | DestinationStep::Complete
            | DestinationStep::Settling
            | DestinationStep::Dropping
            | DestinationStep::Left => {}
        }
    }

    /// The prepared offer is void: takes chunks again.
    pub(super) fn void(&mut self, epoch: Epoch) {
        if self.foreign
            && let Some(hello) = self.hello.take()
        {
            return self.adopt(Hello { epoch, ..hello });
        }
        if self.go(DestinationStep::Voiding) {
            self.epoch = epoch;
            self.source_synced = false;
            self.synced_recorded = false;
            self.pull.end();
            self.persist(DestinationStage::Receiving, None);
        }
    }

    pub(super) fn on_synced(&mut self, epoch: Epoch) {
        if epoch != self.epoch || self.source_synced {
            return;
        }
        self.source_synced = true;
        if self.step == DestinationStep::Active {
            self.persist_synced();
        }
    }
}
