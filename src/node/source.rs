// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The node as a migration source: carries out what the [`SourceSession`] decides.

use super::input::Input;
use super::node::Node;
use super::report::Outcome;
use super::status::{Denied, MigrationRequest, StartMode, StrategyName};
use crate::config::{DEFAULT_CONNECTIONS, DEFAULT_THRESHOLD, MAX_CONNECTIONS};
use crate::core::heat::Counting;
use crate::core::message::{Hello, Incarnation, MigrationId};
use crate::core::record::{SourceRecord, SourceStage};
use crate::core::source::{ArmParams, SourceAction, SourceSession, Unchanged};
use crate::core::strategy::Strategy;
use crate::frontend::signal::Verdict;
use crate::peer::connect::parse_destination;
use crate::peer::{ConnectParams, LinkOptions, LinkSender};
use crate::volume::Closed;
use std::time::{Duration, Instant};
use tokio::task::spawn_local;

/// Chunks that may be captured or unacknowledged at a time: 16 MiB at the default chunk size.
const PUSH_WINDOW: u32 = 64;
/// Write counts halve in this time.
const HALF_LIFE: Duration = Duration::from_secs(10);
/// Most hot chunks of the base image that are named to the destination.
const MAX_HOT_BASE: usize = 64 << 10;

/// A source's session and connection.
pub(super) struct SourceDriver {
    pub(super) session: SourceSession,
    pub(super) link: Option<LinkSender>,
    pub(super) destination: String,
    pub(super) dial: ConnectParams,
}

/// The strategy of a request, or why it cannot be had.
fn strategy_of(name: StrategyName) -> Result<Strategy, Denied> {
    match name {
        StrategyName::Hybrid => Ok(Strategy::Hybrid),
        StrategyName::Precopy => Ok(Strategy::Precopy),
        StrategyName::Postcopy => Ok(Strategy::Postcopy),
        StrategyName::Mirror | StrategyName::Shared => Err(Denied::new(
            "not-supported",
            "strategies mirror and shared are not available in this version: use hybrid, precopy or postcopy",
        )),
    }
}

/// `HOST:PORT` of a destination URL.
fn address_of(url: &str) -> Result<String, Denied> {
    let address = url.strip_prefix("tcp:").unwrap_or(url);
    match parse_destination(address) {
        Ok(_) => Ok(address.to_owned()),
        Err(error) => Err(Denied::new("invalid", format!("destination_url: {error}"))),
    }
}

impl Node {
    /// MIGRATION_REQUEST (paper, Algorithm 1): arms the migration.
    pub(super) fn arm(&mut self, request: &MigrationRequest) -> Result<(), Denied> {
        let strategy = strategy_of(request.strategy)?;
        let destination = address_of(&request.destination_url)?;
        let threshold = request.threshold.unwrap_or(DEFAULT_THRESHOLD);
        let connections = request.connections.unwrap_or(DEFAULT_CONNECTIONS);
        if !(1..=MAX_CONNECTIONS).contains(&connections) {
            return Err(Denied::new(
                "invalid",
                format!("connections {connections} is not 1 to {MAX_CONNECTIONS}"),
            ));
        }
        if threshold == 0 || threshold > 255 {
            return Err(Denied::new("invalid", format!("threshold {threshold} is not 1 to 255")));
        }
        let migration = MigrationId(*uuid::Uuid::new_v4().as_bytes());
        self.jobs.begin_run();
        // Tracking first, then the copy of the modified set: a write in between is then seen twice, never missed.
        self.volume.tracker().arm(self.volume.geometry().chunk_count());
        let mut params =
            self.arm_params(migration, destination, strategy, threshold, request.start == StartMode::Now);
        params.unchanged = self.unchanged();
        let modified: Vec<_> = self.transfer.modified_chunks().iter().collect();
        let hot: Vec<_> = self.transfer.local_chunks().iter().take(MAX_HOT_BASE).collect();
        self.report.begin_source(migration, &params.destination, request.strategy, threshold);
        self.report.modified(&self.volume.geometry(), &modified);
        log::info!(
            "migration to {} armed: {} modified chunks, {} hot chunks of the base image",
            params.destination,
            modified.len(),
            hot.len()
        );
        let bandwidth = request.bandwidth.unwrap_or(self.config.bandwidth);
        let dial = self.dial(connections, bandwidth);
        let destination = params.destination.clone();
        let session = SourceSession::arm(self.now(), params, modified, hot);
        self.become_source(SourceDriver { session, link: None, destination, dial });
        Ok(())
    }

    /// Goes on with a migration that a record tells of.
    pub(super) fn resume_source(&mut self, record: &SourceRecord, same_boot: bool) {
        self.jobs.begin_run();
        self.volume.tracker().arm(self.volume.geometry().chunk_count());
        let strategy = Strategy::from_number(record.strategy).unwrap_or(Strategy::Hybrid);
        let params =
            self.arm_params(record.migration, record.destination.clone(), strategy, record.threshold, true);
        let modified: Vec<_> = self.transfer.modified_chunks().iter().collect();
        let data_lost = !same_boot
            && matches!(record.stage, SourceStage::Offered | SourceStage::Relinquished { synced: false });
        let name = StrategyName::from(strategy);
        self.report.begin_source(record.migration, &record.destination, name, record.threshold);
        self.report.modified(&self.volume.geometry(), &modified);
        let dial = self.dial(DEFAULT_CONNECTIONS, self.config.bandwidth);
        let session = SourceSession::resume(self.now(), params, record, self.epoch, modified, data_lost);
        log::info!("migration to {} goes on: {:?}", record.destination, record.stage);
        self.become_source(SourceDriver {
            session,
            link: None,
            destination: record.destination.clone(),
            dial,
        });
    }

    fn arm_params(
        &self,
        migration: MigrationId,
        destination: String,
        strategy: Strategy,
        threshold: u32,
        start_now: bool,
    ) -> ArmParams {
        let geometry = self.volume.geometry();
        let hello = Hello {
            migration,
            volume: self.volume_id,
            incarnation: Incarnation(self.incarnation),
            epoch: self.epoch,
            size: geometry.size(),
            chunk_size: geometry.chunk_size(),
            base: self.base.clone(),
            virtio_features: self.guest_features.unwrap_or(self.device_features),
            queues: self.config.num_queues,
            read_only: self.config.read_only,
            serial: self.config.serial.clone(),
        };
        ArmParams {
            hello,
            destination,
            strategy,
            threshold,
            push_window: PUSH_WINDOW,
            counting: Counting::Passes,
            half_life: HALF_LIFE,
            start_now,
            rings_running: self.rings_running,
            write_cache: self.volume.write_cache(),
            unchanged: None,
        }
    }

    /// What the host that this disk came from still has as it is here.
    fn unchanged(&self) -> Option<Unchanged> {
        let migration = self.store.superblock().came_in?;
        Some(Unchanged { migration, chunks: self.transfer.unchanged_chunks() })
    }

    fn dial(&self, connections: u8, bandwidth: u64) -> ConnectParams {
        self.throttle.set_rate(bandwidth);
        let link = LinkOptions { throttle: self.throttle.clone(), ..LinkOptions::default() };
        ConnectParams { streams: connections, tls: self.tls.clone(), link, ..ConnectParams::default() }
    }

    /// Drains the tracker when enough has gathered.
    pub(super) fn drain_soon(&self) {
        let (inputs, wait) = (self.inputs.clone(), self.drain.wait);
        spawn_local(async move {
            tokio::time::sleep(wait).await;
            // Nobody listens any more: the node has ended.
            drop(inputs.send(Input::DrainDue));
        });
    }

    /// Drains the tracker, and takes as long a rest as that was work.
    pub(super) fn drain_due(&mut self) {
        let begin = Instant::now();
        self.drain_tracker();
        self.drain.took(begin.elapsed());
    }

    /// Hands what the tracker has seen to the session.
    pub(super) fn drain_tracker(&mut self) {
        let now = self.now();
        let volume = std::sync::Arc::clone(&self.volume);
        if let Some(source) = self.source_mut() {
            volume
                .tracker()
                .drain(|chunk, passes, plain| source.session.handle_wrote(now, chunk, passes, plain));
        }
    }

    /// Carries out one decision of the session.
    pub(super) fn apply_source(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(message) => self.send(message),
            SourceAction::SendData(data) => self.send_data(data),
            SourceAction::Capture { chunk, purpose: _ } => self.jobs.capture(chunk),
            SourceAction::Persist { seq, record } => self.jobs.persist(seq, record, None),
            SourceAction::SyncLayer => self.jobs.sync(super::input::Done::LayerSynced),
            SourceAction::OpenGate => self.open_gate(),
            SourceAction::CloseGate => self.close_gate(Closed::Offered),
            SourceAction::RingsStopAnswered => self.holds.answer_stop(),
            SourceAction::RingsStartAnswered { allowed, reason } => {
                let verdict = if allowed {
                    Verdict::Proceed
                } else {
                    Verdict::Refuse(format!("the disk has been handed over to the destination ({reason:?})"))
                };
                self.holds.answer_start(verdict);
            }
            SourceAction::Connect { not_before } => {
                let delay = not_before.saturating_sub(self.now());
                if let Some(source) = self.source_mut() {
                    let (destination, dial) = (source.destination.clone(), source.dial.clone());
                    self.jobs.connect(delay, destination, dial);
                }
            }
            SourceAction::Disconnect => self.drop_link(),
            SourceAction::Finished(outcome) => self.finish(Outcome::from(outcome)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destination_urls() {
        assert_eq!(address_of("tcp:host:10"), Ok("host:10".to_owned()));
        assert_eq!(address_of("[::1]:10"), Ok("[::1]:10".to_owned()));
        for bad in ["", "host", "host:", ":10", "host:0", "host:70000"] {
            assert!(address_of(bad).is_err(), "{bad:?} was taken for an address");
        }
    }
}
