// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A migration source that is away while the guest here needs it: carries out what the session decides, and lets
//! everybody see it. See `core::destination` for the decision.

use super::node::{Node, RoleDriver};
use super::status::{SourceLossPolicy, SourceStatus};
use crate::core::destination::{OnSourceLoss, SourceLoss};
use crate::core::geometry::ChunkId;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What was seen of the source last.
#[derive(Debug, Default)]
pub(super) struct SourceWatch {
    seen: SourceLoss,
    /// Unix time.
    away_since: Option<Duration>,
    failed: u64,
}

impl Node {
    /// Looks whether the source has gone, has been away for too long, or is back.
    pub(super) fn follow_source(&mut self) {
        let now = match &self.role {
            RoleDriver::Destination(destination) => destination.session.source_loss(),
            RoleDriver::Serving | RoleDriver::Idle | RoleDriver::Source(_) => SourceLoss::Here,
        };
        if now == self.source_watch.seen {
            return;
        }
        let remote = self.volume.counts().remote;
        match now {
            SourceLoss::Here => {
                self.source_watch.away_since = None;
                self.volume.flush_gate().hold_again();
                log::info!("the migration source is not missed any more: {remote} chunks are left to pull");
            }
            SourceLoss::Away { since, failing: false } => {
                let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                self.source_watch.away_since = Some(unix.saturating_sub(self.now().saturating_sub(since)));
                self.volume.flush_gate().hold_again();
                let then = match self.config.on_source_loss {
                    OnSourceLoss::Stall => "until it is back (--on-source-loss stall)".to_owned(),
                    OnSourceLoss::Error { grace } => format!("and fail in {} s", grace.as_secs()),
                };
                log::warn!("the migration source is away: requests for {remote} chunks wait {then}");
            }
            SourceLoss::Away { failing: true, .. } => {
                self.volume.flush_gate().fail();
                log::error!(
                    "the migration source is still away: requests for {remote} chunks fail until it is back \
                     (--on-source-loss error)"
                );
            }
        }
        self.source_watch.seen = now;
        self.publish();
    }

    /// Lets what waits for the content of a chunk fail.
    pub(super) fn fail_waiting(&mut self, chunk: ChunkId) {
        self.source_watch.failed += self.transfer.fail_waiters(chunk) as u64;
    }

    pub(super) fn source_status(&self) -> SourceStatus {
        let (on_source_loss, grace) = match self.config.on_source_loss {
            OnSourceLoss::Stall => (SourceLossPolicy::Stall, Duration::ZERO),
            OnSourceLoss::Error { grace } => (SourceLossPolicy::Error, grace),
        };
        let since = self.source_watch.away_since.map_or(0, |at| at.as_millis());
        SourceStatus {
            on_source_loss,
            grace_s: grace.as_secs(),
            away: self.source_watch.away_since.is_some(),
            away_since_ms: u64::try_from(since).unwrap_or(u64::MAX),
            failing: matches!(self.source_watch.seen, SourceLoss::Away { failing: true, .. }),
            waiting: self.volume.waiting(),
            failed: self.source_watch.failed,
        }
    }
}
