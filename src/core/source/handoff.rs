// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The giving half of TRANSFER_IO_CONTROL (paper, Algorithm 2): offer, grant, reclaim, release, and cancelling.
//!
//! Everything here hangs on one record at a time: granting and reclaiming both begin in `Offered` and exclude each
//! other, and neither is said before it is durable.

use super::*;

impl SourceSession {
    /// Whether the destination holds the present offer durably and is connected: nothing but its rings' start is
    /// missing. Who moves several disks of one VM waits for this at each before any of them can be granted (T20).
    #[must_use]
    pub fn prepared(&self) -> bool {
        self.step == SourceStep::Offered && self.prepared == Some(self.epoch)
    }

    pub(super) fn reclaim(&mut self, _now: Duration) {
        if self.go(SourceStep::Reclaiming) {
            self.epoch = self.epoch.next();
            self.persist(SourceStage::Pushing);
        }
    }

    pub(super) fn reclaimed(&mut self, now: Duration) {
        self.go(SourceStep::Pushing);
        self.synced = false;
        self.synced_recorded = false;
        self.sync_stale = self.sync_running;
        self.retry_sync = None;
        self.data_lost = false;
        self.push.reclaimed();
        self.send(Message::Reclaimed { epoch: self.epoch });
        if self.cancel_asked {
            return self.leave(Outcome::Cancelled);
        }
        if std::mem::take(&mut self.stop_seen) {
            return self.stop(now);
        }
        self.serve_again();
        if self.start_waits {
            self.answer_start(None);
        }
    }

    pub(super) fn on_activate(&mut self, now: Duration, asked: Option<Epoch>) {
        let deny = |reason| Message::Denied { epoch: asked, reason };
        match self.step {
            SourceStep::Offered if asked.is_none_or(|epoch| epoch == self.epoch) => {
                if self.data_lost {
                    self.send(deny(Refusal::Lost));
                } else if asked.is_some() && self.go(SourceStep::Granting) {
                    self.synced_recorded = self.synced;
                    self.persist(SourceStage::Relinquished { synced: self.synced });
                }
                // Without an epoch the destination has not prepared the offer yet: it asks again when it has.
            }
            SourceStep::Relinquished if asked.is_none_or(|epoch| epoch == self.epoch) => {
                self.send(Message::Granted { epoch: self.epoch });
            }
            SourceStep::Released => self.send(Message::Released { epoch: self.epoch }),
            // The rings stopped before the migration was armed: no stop will be seen, so the offer is made now.
            SourceStep::Pushing if !self.rings_running && asked.is_none() => {
                self.actions.push_back(SourceAction::CloseGate);
                self.stop(now);
            }
            // Decided by a record that is being written, or by what is still to be pushed.
            SourceStep::Arming
            | SourceStep::Draining
            | SourceStep::Offering
            | SourceStep::Granting
            | SourceStep::Releasing => {}
            SourceStep::Pushing | SourceStep::Reclaiming => self.send(deny(Refusal::Reclaimed)),
            SourceStep::Leaving | SourceStep::Left => self.send(deny(Refusal::Cancelled)),
            SourceStep::Offered | SourceStep::Relinquished => self.send(deny(Refusal::StaleEpoch)),
        }
    }

    pub(super) fn granted(&mut self) {
        self.go(SourceStep::Relinquished);
        self.answer_stop();
        self.send(Message::Granted { epoch: self.epoch });
        if self.synced_recorded {
            self.send(Message::Synced { epoch: self.epoch });
        } else if self.synced {
            self.persist(SourceStage::Relinquished { synced: true });
        }
        if self.start_waits {
            self.answer_start(Some(Refusal::StaleEpoch));
        }
    }

    pub(super) fn on_complete(&mut self, epoch: Epoch) {
        match self.step {
            SourceStep::Relinquished if epoch == self.epoch => {
                self.go(SourceStep::Releasing);
                self.persist(SourceStage::Released { synced: self.synced_recorded });
            }
            SourceStep::Released => self.send(Message::Released { epoch: self.epoch }),
            SourceStep::Arming
            | SourceStep::Pushing
            | SourceStep::Draining
            | SourceStep::Offering
            | SourceStep::Offered
            | SourceStep::Reclaiming
            | SourceStep::Granting
            | SourceStep::Relinquished
            | SourceStep::Releasing
            | SourceStep::Leaving
            | SourceStep::Left => {}
        }
    }

    pub(super) fn sync_layer(&mut self) {
        if !self.synced && !self.sync_running && !self.data_lost {
            self.sync_running = true;
            self.actions.push_back(SourceAction::SyncLayer);
        }
    }

    /// The layer was synced, or could not be.
    pub fn handle_layer_synced(&mut self, now: Duration, ok: bool) {
        self.sync_running = false;
        let wanted = matches!(
            self.step,
            SourceStep::Offered
                | SourceStep::Granting
                | SourceStep::Relinquished
                | SourceStep::Releasing
                | SourceStep::Released
        );
        if std::mem::take(&mut self.sync_stale) {
            if wanted {
                self.sync_layer();
            }
            return;
        }
        if !wanted {
            return;
        }
        let released = matches!(self.step, SourceStep::Releasing | SourceStep::Released);
        if !ok {
            self.retry_sync = Some(Aside(now + RETRY)).filter(|_| !released);
            return;
        }
        self.synced = true;
        if self.step == SourceStep::Relinquished {
            self.persist(SourceStage::Relinquished { synced: true });
        } else if self.step == SourceStep::Released {
            // Nobody waits for it any more, but the disk may come back to what is here.
            self.persist(SourceStage::Released { synced: true });
        }
    }

    // ---- cancel and failure -----------------------------------------------------------------------------------

    /// The operator cancels. Needs nobody's consent: the disk is still here.
    ///
    /// # Errors
    /// [`Refusal::StaleEpoch`] when the disk has been handed over.
    pub fn handle_cancel(&mut self, _now: Duration) -> Result<(), Refusal> {
        match self.step {
            SourceStep::Pushing | SourceStep::Draining | SourceStep::Offered => {
                self.leave(Outcome::Cancelled);
                Ok(())
            }
            SourceStep::Arming | SourceStep::Offering | SourceStep::Reclaiming => {
                self.cancel_asked = true;
                Ok(())
            }
            SourceStep::Leaving | SourceStep::Left => Ok(()),
            SourceStep::Granting
            | SourceStep::Relinquished
            | SourceStep::Releasing
            | SourceStep::Released => Err(Refusal::StaleEpoch),
        }
    }

    pub(super) fn leave(&mut self, outcome: Outcome) {
        if self.go(SourceStep::Leaving) {
            self.epoch = self.epoch.next();
            self.outcome = Some(outcome);
            self.persist_role(Role::Serving);
        }
    }

    pub(super) fn left(&mut self, now: Duration) {
        self.go(SourceStep::Left);
        self.answer_stop();
        self.actions.push_back(SourceAction::OpenGate);
        if self.start_waits {
            self.answer_start(None);
        }
        if self.link == Link::Down || matches!(self.outcome, Some(Outcome::Failed { .. })) {
            return self.finish();
        }
        self.send(Message::Cancel);
        self.farewell = Some(Aside(now + FAREWELL));
    }

    pub(super) fn finish(&mut self) {
        self.farewell = None;
        if let Some(outcome) = self.outcome.take() {
            if self.link != Link::Down {
                self.link = Link::Down;
                self.actions.push_back(SourceAction::Disconnect);
            }
            self.actions.push_back(SourceAction::Finished(outcome));
        }
    }
}
