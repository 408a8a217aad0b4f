// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The node as a migration destination: carries out what the [`DestinationSession`] decides.

use super::input::Done;
use super::node::{Node, RoleDriver};
use super::report::Outcome;
use crate::core::destination::{DestinationAction, DestinationSession, LocalFacts};
use crate::core::geometry::ChunkId;
use crate::core::message::{Epoch, Hello, MigrationId, Purpose, Version};
use crate::core::record::{DestinationRecord, DestinationStage, SourceStage};
use crate::frontend::signal::Verdict;
use crate::peer::LinkSender;
use crate::volume::{Closed, InstallPhase};

/// Chunks that are installed between two commits of data and map while a migration comes in: what a crash of this
/// host can cost is then bounded, and so is what a flush at the end has to write.
const COMMIT_EVERY: u32 = 256;

/// A destination's session and connection.
pub(super) struct DestinationDriver {
    pub(super) session: DestinationSession,
    pub(super) link: Option<LinkSender>,
    pub(super) installed: u32,
    /// A source has greeted on the connection.
    pub(super) greeted: bool,
    /// This side has given the volume away and only takes it back.
    pub(super) released: bool,
}

impl Node {
    /// The migration in which this side gave its disk away, if all of it is durably here.
    pub(super) fn replica(&self) -> Option<MigrationId> {
        match &self.role {
            RoleDriver::Source(source) => match source.session.stage() {
                SourceStage::Released { synced: true } => Some(source.session.migration()),
                _ => None,
            },
            RoleDriver::Serving | RoleDriver::Idle | RoleDriver::Destination(_) => None,
        }
    }

    fn facts(&self, virgin: bool, released: bool, replica: Option<MigrationId>) -> LocalFacts {
        LocalFacts {
            geometry: self.volume.geometry(),
            base: self.base.clone(),
            virtio_features: self.device_features,
            queues: self.config.num_queues,
            read_only: self.config.read_only,
            volume: self.volume_id,
            epoch: self.epoch,
            virgin,
            released,
            replica,
        }
    }

    /// Stands ready for a source: `released` when this side has given this very volume away before, in the migration
    /// `replica` if it still has what it had then.
    pub(super) fn stand_ready(&mut self, released: bool, replica: Option<MigrationId>) {
        let mut session = DestinationSession::idle(self.facts(self.virgin, released, replica));
        session.set_on_source_loss(self.now(), self.config.on_source_loss);
        self.become_destination(DestinationDriver {
            session,
            link: None,
            installed: 0,
            greeted: false,
            released,
        });
    }

    /// Goes on with a migration that a record tells of.
    pub(super) fn resume_destination(&mut self, record: &DestinationRecord, remaining: Vec<(ChunkId, u8)>) {
        self.jobs.begin_run();
        let have: Vec<(ChunkId, Version)> = self.transfer.received_versions();
        log::info!(
            "destination goes on: {:?}, {} chunks are here, {} are at the source",
            record.stage,
            have.len(),
            remaining.len()
        );
        self.report.begin_destination(record.migration);
        let owner = matches!(record.stage, DestinationStage::Active { .. } | DestinationStage::Complete);
        if let DestinationStage::Active { source_synced: false } = record.stage {
            self.volume.flush_gate().close();
        }
        if owner {
            self.report.granted();
        }
        let facts = self.facts(false, false, None);
        let mut session = DestinationSession::resume(facts, record, self.epoch, have, remaining);
        session.set_on_source_loss(self.now(), self.config.on_source_loss);
        self.become_destination(DestinationDriver {
            session,
            link: None,
            installed: 0,
            greeted: false,
            released: false,
        });
        if owner {
            self.open_gate();
        } else {
            self.close_gate(Closed::Receiving);
        }
    }

    /// Carries out one decision of the session.
    pub(super) fn apply_destination(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Send(message) => self.send(message),
            DestinationAction::Adopt(hello) => self.adopt(&hello),
            DestinationAction::Install(data) => {
                let pushed = data.purpose == Purpose::Push;
                let phase = if pushed { InstallPhase::Receiving } else { InstallPhase::Pulling };
                self.jobs.install(data, phase);
            }
            DestinationAction::MarkRemote { first, run } => self.jobs.mark_remote(first, run),
            DestinationAction::FetchBase(chunk) => self.jobs.fetch_ahead(chunk),
            DestinationAction::Persist { seq, record, remaining } => {
                self.jobs.persist(seq, record, remaining)
            }
            DestinationAction::SyncVolume => self.jobs.sync(Done::VolumeSynced),
            DestinationAction::OpenGate => {
                self.report.granted();
                self.volume.flush_gate().close();
                self.open_gate();
                // From here on a crash of this host keeps what the guest writes and flushes.
                self.jobs.upkeep(true);
            }
            DestinationAction::OpenFlush => self.volume.flush_gate().open(),
            DestinationAction::SetWriteCache(on) => self.volume.set_write_cache(on),
            DestinationAction::StartAnswered { allowed, reason } => {
                let verdict = if allowed {
                    Verdict::Proceed
                } else {
                    Verdict::Refuse(format!("the migration source has not granted the disk ({reason:?})"))
                };
                self.holds.answer_start(verdict);
            }
            DestinationAction::FailChunk { chunk, reason } => {
                log::error!("{chunk} cannot be had from the migration source: {reason:?}");
                self.fail_waiting(chunk);
            }
            DestinationAction::FailWaiting(chunk) => self.fail_waiting(chunk),
            DestinationAction::Wipe => self.jobs.wipe(),
            DestinationAction::Prune(current) => {
                log::info!(
                    "the disk comes back: {} chunks of what is here are current, the rest is dropped",
                    current.len()
                );
                self.jobs.prune(current);
            }
            DestinationAction::Finished(outcome) => self.finish(Outcome::from(outcome)),
        }
    }

    /// Takes over what belongs to the disk and not to this daemon.
    fn adopt(&mut self, hello: &Hello) {
        self.virgin = false;
        self.jobs.begin_run();
        self.report.begin_destination(hello.migration);
        self.volume_id = hello.volume;
        self.epoch = Epoch(self.epoch.0.max(hello.epoch.0));
        if let Err(error) =
            self.store.adopt(hello.volume, &hello.serial, hello.read_only, Some(hello.migration))
        {
            self.fault(&format!("the superblock cannot take over the volume's identity: {error}"));
        }
        self.store.map.keep_versions(true);
        self.frontend.set_serial(&hello.serial);
        log::info!("volume {} comes in", super::report::hex(&hello.volume.0));
    }

    /// A chunk was installed: commit now and then, so that a crash of this host costs little.
    pub(super) fn count_installed(&mut self) {
        let due = self.destination_mut().is_some_and(|destination| {
            destination.installed += 1;
            destination.installed.is_multiple_of(COMMIT_EVERY)
        });
        if due {
            self.jobs.upkeep(true);
        }
    }
}
