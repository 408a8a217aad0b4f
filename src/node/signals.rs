// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the hypervisor's signals mean to the role of this node.
//!
//! The messages alone prove little: rings stop for a pause, a reboot, a snapshot or a migration, and start on a
//! reconnect although the guest is paused. A migration is therefore armed by the API; signals only advance it,
//! and every step that they cause can be taken back until the destination has the grant.

use super::admission::Standing;
use super::node::{Node, RoleDriver};
use crate::frontend::device_state::Ticket;
use crate::frontend::signal::{Envelope, HypervisorSignal, Verdict};
use crate::volume::{Closed, Origin, VolumeEvent};

/// Answers an envelope that waits for a verdict.
pub(super) fn answer(envelope: Envelope, verdict: Verdict) {
    if let Some(reply) = envelope.reply {
        // The front-end thread may have given up waiting.
        let _ = reply.try_send(verdict);
    }
}

impl Node {
    /// Takes one signal; an acknowledgement that must wait is held.
    pub(super) fn on_signal(&mut self, envelope: Envelope) {
        match &envelope.signal {
            HypervisorSignal::Connected => self.frontend_connected = true,
            HypervisorSignal::Disconnected => self.on_frontend_gone(),
            HypervisorSignal::LogStarted => {
                let now = self.now();
                if let Some(source) = self.source_mut() {
                    source.session.handle_log_started(now);
                }
            }
            HypervisorSignal::LogStopped => {}
            HypervisorSignal::FeaturesAcked(bits) => self.guest_features = Some(*bits),
            HypervisorSignal::WriteCache(on) => self.volume.set_write_cache(*on),
            HypervisorSignal::RingsStopped => return self.on_rings_stopped(envelope),
            HypervisorSignal::RingsStarting { reconnect, fresh, resumes } => {
                // The first start on a connection that is not the first proves nothing.
                let (proof, resumes) = (!reconnect || !fresh, *resumes);
                return self.on_rings_starting(envelope, proof, resumes);
            }
            HypervisorSignal::RingWork => self.on_ring_work(),
            HypervisorSignal::SaveTicket => {
                let verdict = self.save_ticket();
                return answer(envelope, verdict);
            }
            HypervisorSignal::LoadTicket(ticket) => {
                let verdict = self.check_ticket(ticket);
                return answer(envelope, verdict);
            }
        }
        answer(envelope, Verdict::Proceed);
    }

    fn on_frontend_gone(&mut self) {
        self.frontend_connected = false;
        self.rings_running = false;
        let now = self.now();
        if let Some(destination) = self.destination_mut() {
            destination.session.handle_start_withdrawn(now);
        }
    }

    fn on_rings_stopped(&mut self, envelope: Envelope) {
        let now = self.now();
        self.rings_running = false;
        match self.standing() {
            // Also in the middle of a reclaim; the session answers in every step.
            Standing::Pushing | Standing::Offered => {
                self.holds.hold_stop(envelope);
                self.close_gate(Closed::Offered);
                self.drain_tracker();
                self.report.stopped(true);
                let write_cache = self.volume.write_cache();
                if let Some(source) = self.source_mut() {
                    source.session.handle_rings_stopped(now, write_cache);
                }
            }
            Standing::Receiving | Standing::Prepared => {
                if let Some(destination) = self.destination_mut() {
                    destination.session.handle_start_withdrawn(now);
                }
                answer(envelope, Verdict::Proceed);
            }
            Standing::Serving
            | Standing::Idle
            | Standing::Relinquished
            | Standing::Released
            | Standing::Pulling
            | Standing::Complete => answer(envelope, Verdict::Proceed),
        }
    }

    fn on_rings_starting(&mut self, envelope: Envelope, proof: bool, resumes: bool) {
        let now = self.now();
        self.rings_running = true;
        match self.standing() {
            Standing::Serving | Standing::Pulling | Standing::Complete => answer(envelope, Verdict::Proceed),
            Standing::Idle if resumes => {
                let text = "a guest that ran elsewhere starts here, but no migration has brought its disk: \
                            arm the storage migration at the source first (blkferry migrate)";
                log::error!("{text}");
                answer(envelope, Verdict::Refuse(text.to_owned()));
            }
            Standing::Idle => match self.claim() {
                Ok(()) => answer(envelope, Verdict::Proceed),
                Err(error) => {
                    self.fault(&format!("ownership cannot be made durable: {error}"));
                    answer(envelope, Verdict::Refuse(error));
                }
            },
            // The session must know that the guest runs, also when its gate never closed (a reconnect, or rings that
            // were stopped before the migration was armed): it would offer the disk of a guest that it takes for
            // stopped.
            Standing::Pushing => {
                self.holds.hold_start(envelope);
                self.rings_started(now);
            }
            // A front-end that connects anew starts its rings even for a paused guest: that proves nothing. The
            // queue reports when the guest really asks for something.
            Standing::Offered | Standing::Relinquished | Standing::Receiving | Standing::Prepared
                if !proof =>
            {
                answer(envelope, Verdict::Proceed);
            }
            Standing::Offered | Standing::Relinquished => {
                self.holds.hold_start(envelope);
                self.rings_started(now);
            }
            Standing::Released => {
                let text = "the disk has been handed over: this daemon serves nothing";
                log::error!("{text}");
                answer(envelope, Verdict::Refuse(text.to_owned()));
            }
            Standing::Receiving | Standing::Prepared => {
                self.holds.hold_start(envelope);
                if let Some(destination) = self.destination_mut() {
                    destination.session.handle_start_requested(now, true);
                }
            }
        }
    }

    fn rings_started(&mut self, now: std::time::Duration) {
        self.report.stopped(false);
        if let Some(source) = self.source_mut() {
            source.session.handle_rings_started(now);
        }
    }

    fn on_ring_work(&mut self) {
        let now = self.now();
        match self.standing() {
            Standing::Offered => {
                log::warn!("the guest runs here again after the disk was offered: taking it back");
                self.rings_started(now);
            }
            Standing::Receiving | Standing::Prepared => {
                if let Some(destination) = self.destination_mut() {
                    destination.session.handle_start_requested(now, false);
                }
            }
            Standing::Relinquished | Standing::Released => {
                log::error!("the guest asks for a disk that was handed over: its requests stay unanswered");
            }
            Standing::Serving
            | Standing::Idle
            | Standing::Pushing
            | Standing::Pulling
            | Standing::Complete => {}
        }
    }

    fn save_ticket(&mut self) -> Verdict {
        match &self.role {
            RoleDriver::Source(source) if self.standing() == Standing::Offered => {
                match source.session.ticket() {
                    Some((migration, epoch, digest)) => {
                        Verdict::Ticket(Ticket { volume: self.volume_id, migration, epoch, digest })
                    }
                    None => Verdict::Refuse("the disk has not been offered yet".to_owned()),
                }
            }
            // A snapshot without a migration: a ticket that no destination accepts.
            RoleDriver::Serving | RoleDriver::Idle | RoleDriver::Source(_) | RoleDriver::Destination(_) => {
                Verdict::Refuse(
                    "no disk is being handed over: arm the storage migration first (blkferry migrate)"
                        .to_owned(),
                )
            }
        }
    }

    fn check_ticket(&mut self, ticket: &Ticket) -> Verdict {
        let mine = match &self.role {
            RoleDriver::Destination(destination) => destination.session.ticket(),
            RoleDriver::Serving | RoleDriver::Idle | RoleDriver::Source(_) => None,
        };
        let Some((migration, epoch, digest)) = mine else {
            return Verdict::Refuse("no offer of a disk has been prepared here".to_owned());
        };
        if ticket.volume != self.volume_id {
            return Verdict::Refuse("the device state belongs to another volume".to_owned());
        }
        if (ticket.migration, ticket.epoch, ticket.digest) != (migration, epoch, digest) {
            return Verdict::Refuse("the device state belongs to another handoff of this volume".to_owned());
        }
        Verdict::Proceed
    }

    /// Takes one fact from the I/O path.
    pub(super) fn on_volume(&mut self, event: VolumeEvent) {
        let now = self.now();
        match event {
            VolumeEvent::Demand { chunk, origin: Origin::Base } => self.jobs.fetch_for_guest(chunk),
            VolumeEvent::Demand { chunk, origin: Origin::Source } => match self.destination_mut() {
                Some(destination) => destination.session.handle_demand(now, chunk),
                None => self.lost_demand(chunk),
            },
            VolumeEvent::Overwritten(chunk) => {
                if let Some(destination) = self.destination_mut() {
                    destination.session.handle_overwritten(now, chunk);
                }
            }
            VolumeEvent::Fault(text) => self.fault(&text),
            VolumeEvent::RotationDue => self.jobs.upkeep(false),
        }
    }
}
