// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Puts together what the node publishes: the migration's times and counters, as one [`MigrationStatus`].

use super::status::{MigrationState, MigrationStatus, Side, StrategyName};
use crate::core::geometry::{ChunkId, Geometry};
use crate::core::message::{MigrationId, Refusal};
use crate::core::progress::Progress;
use crate::core::strategy::Strategy;
use std::time::{Duration, Instant};

/// How a migration ended, as far as this side can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Everything is at the destination.
    Completed,
    /// The operator cancelled.
    Cancelled,
    /// It failed.
    Failed {
        /// The reason by name.
        reason: Refusal,
        /// The reason in words.
        text: String,
    },
}

impl From<crate::core::progress::Outcome> for Outcome {
    fn from(outcome: crate::core::progress::Outcome) -> Self {
        match outcome {
            crate::core::progress::Outcome::Released => Self::Completed,
            crate::core::progress::Outcome::Cancelled => Self::Cancelled,
            crate::core::progress::Outcome::Failed { reason, text } => Self::Failed { reason, text },
        }
    }
}

impl From<Strategy> for StrategyName {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Hybrid => Self::Hybrid,
            Strategy::Precopy => Self::Precopy,
            Strategy::Postcopy => Self::Postcopy,
            Strategy::Mirror => Self::Mirror,
            Strategy::Shared => Self::Shared,
        }
    }
}

/// Bytes as lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The current or last migration.
#[derive(Default)]
pub(super) struct Report {
    status: MigrationStatus,
    armed: Option<Instant>,
    stopped: Option<Instant>,
    granted: Option<Instant>,
    ended: Option<Instant>,
    /// Connections made, the first one included.
    connections: u64,
}

impl Report {
    /// A migration was armed here.
    pub(super) fn begin_source(
        &mut self,
        id: MigrationId,
        peer: &str,
        strategy: StrategyName,
        threshold: u32,
    ) {
        self.begin(id, Side::Source);
        self.status.peer = peer.to_owned();
        self.status.strategy = strategy;
        self.status.threshold = threshold;
    }

    /// A migration has come in.
    pub(super) fn begin_destination(&mut self, id: MigrationId) {
        self.begin(id, Side::Destination);
    }

    fn begin(&mut self, id: MigrationId, side: Side) {
        *self = Self { armed: Some(Instant::now()), ..Self::default() };
        self.status.state = MigrationState::Setup;
        self.status.id = hex(&id.0);
        self.status.side = Some(side);
    }

    /// The size of the modified set when armed.
    pub(super) fn modified(&mut self, geometry: &Geometry, chunks: &[ChunkId]) {
        self.status.modified_bytes = chunks.iter().map(|c| u64::from(geometry.chunk_len(*c))).sum();
    }

    /// Who the peer is, as its connection shows.
    pub(super) fn peer(&mut self, address: &str) {
        address.clone_into(&mut self.status.peer);
    }

    /// The rings have stopped for the handoff, or run again.
    pub(super) fn stopped(&mut self, stopped: bool) {
        self.stopped = stopped.then(Instant::now);
    }

    /// The disk changed hands.
    pub(super) fn granted(&mut self) {
        self.granted.get_or_insert_with(Instant::now);
    }

    /// What the operator should know about now; empty for nothing.
    pub(super) fn message(&mut self, text: &str) {
        if self.ended.is_none() {
            text.clone_into(&mut self.status.message);
        }
    }

    /// One more connection; the first one is none that was made again.
    pub(super) fn connected(&mut self) {
        self.status.reconnects = self.connections;
        self.connections += 1;
    }

    /// The migration has ended.
    pub(super) fn ended(&mut self, outcome: &Outcome) {
        self.ended.get_or_insert_with(Instant::now);
        match outcome {
            Outcome::Completed => self.status.state = MigrationState::Completed,
            Outcome::Cancelled => self.status.state = MigrationState::Cancelled,
            Outcome::Failed { reason, text } => {
                self.status.state = MigrationState::Failed;
                self.status.message = format!("{reason:?}: {text}");
            }
        }
    }

    /// Whether there is a migration that has not ended.
    pub(super) fn running(&self) -> bool {
        self.armed.is_some() && self.ended.is_none()
    }

    /// State, stage and counters of a running migration.
    pub(super) fn update(
        &mut self,
        state: MigrationState,
        stage: &str,
        (connected, prepared): (bool, bool),
        progress: &Progress,
    ) {
        if !self.running() {
            return;
        }
        let status = &mut self.status;
        status.prepared = prepared;
        status.state = state;
        stage.clone_into(&mut status.stage);
        status.connected = connected;
        status.remaining_chunks = progress.remaining_chunks;
        status.remaining_bytes = progress.remaining_bytes;
        status.push_bytes = progress.push_bytes;
        status.prefetch_bytes = progress.prefetch_bytes;
        status.demand_bytes = progress.demand_bytes;
        status.chunks_pushed = progress.chunks_pushed;
        status.chunks_repushed = progress.chunks_repushed;
        status.chunks_pulled = progress.chunks_pulled;
        status.chunks_cancelled = progress.chunks_cancelled;
        status.zero_chunks = progress.zero_chunks;
        status.kept_chunks = progress.kept_chunks;
        status.kept_bytes = progress.kept_bytes;
    }

    /// Bytes on the wire.
    pub(super) fn wire(&mut self, bytes: u64) {
        self.status.wire_bytes = self.status.wire_bytes.max(bytes);
    }

    /// The status as of now.
    pub(super) fn status(&self, volume_bytes: u64, epoch: u64, holds: (u64, u64)) -> MigrationStatus {
        let mut status = self.status.clone();
        status.volume_bytes = volume_bytes;
        status.epoch = epoch;
        (status.stop_hold_us, status.start_hold_us) = holds;
        let Some(armed) = self.armed else { return status };
        let now = self.ended.unwrap_or_else(Instant::now);
        let span = |from: Option<Instant>, to: Option<Instant>| {
            from.map_or(0, |from| millis(to.unwrap_or(now).saturating_duration_since(from)))
        };
        status.total_ms = span(Some(armed), None);
        status.push_ms = span(Some(armed), self.stopped.or(self.granted));
        status.handoff_ms = span(self.stopped, self.granted);
        status.pull_ms = span(self.granted, None);
        status
    }
}
