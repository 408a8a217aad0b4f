// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source is away while a part of the disk is still there: the risk of every post-copy.
//!
//! The guest runs here and wants a chunk that only the source has. Nobody can invent its content, so there are two
//! honest answers: none, until the source is back ([`OnSourceLoss::Stall`]), or an I/O error
//! ([`OnSourceLoss::Error`]). The error waits for a grace time, because most absences are a daemon that is started
//! again. It ends when the source is back: the chunk never left the remaining set, so nothing has to be repaired.
//!
//! ```text
//!   here --connection lost--> away --grace over--> failing
//!    ^                          |                     |
//!    +--------- welcomed -------+---------------------+
//! ```

use super::{DestinationAction, DestinationSession};
use crate::core::aside::Aside;
use crate::core::ownership::DestinationStep;
use std::time::Duration;

/// What a guest gets that wants a remote chunk while the source is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum OnSourceLoss {
    /// Nothing, for as long as it takes.
    #[default]
    Stall,
    /// An I/O error, once the source has been away for so long.
    Error {
        /// How long requests wait first.
        grace: Duration,
    },
}

/// How the source is, as far as the guest here depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourceLoss {
    /// Connected and agreed, or not needed.
    #[default]
    Here,
    /// Needed, and not there.
    Away {
        /// Since when, on the session's clock.
        since: Duration,
        /// Whether what needs it fails now.
        failing: bool,
    },
}

/// The policy, and since when it matters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct Away {
    policy: OnSourceLoss,
    since: Option<Aside<Duration>>,
    failing: bool,
}

impl DestinationSession {
    /// Sets what happens while the source is away. Not being connected counts from now on.
    pub fn set_on_source_loss(&mut self, now: Duration, policy: OnSourceLoss) {
        self.away.policy = policy;
        if !self.welcomed {
            self.source_gone(now);
        }
    }

    /// How the source is.
    #[must_use]
    pub fn source_loss(&self) -> SourceLoss {
        match self.away.since.filter(|_| self.needs_source()) {
            Some(since) => SourceLoss::Away { since: *since, failing: self.away.failing },
            None => SourceLoss::Here,
        }
    }

    /// The guest runs here, and chunks of its disk, or the promise that a flush makes, hang on the source.
    fn needs_source(&self) -> bool {
        self.step == DestinationStep::Active && (!self.synced_recorded || !self.pull.finished())
    }

    pub(super) fn source_gone(&mut self, now: Duration) {
        self.away.since.get_or_insert(Aside(now));
    }

    pub(super) fn source_back(&mut self) {
        self.away.since = None;
        self.away.failing = false;
    }

    /// When what waits begins to fail.
    pub(super) fn away_deadline(&self) -> Option<Duration> {
        let OnSourceLoss::Error { grace } = self.away.policy else { return None };
        let since = self.away.since.filter(|_| self.needs_source() && !self.away.failing);
        since.map(|since| *since + grace)
    }

    pub(super) fn away_timeout(&mut self, now: Duration) {
        if self.away_deadline().is_some_and(|at| at <= now) {
            self.away.failing = true;
        }
    }

    /// T27: what the guest waits for fails while the source is away. The chunks stay in the remaining set.
    pub(super) fn fail_what_waits(&mut self) {
        if !self.away.failing {
            return;
        }
        while let Some(chunk) = self.pull.give_up_next() {
            self.actions.push_back(DestinationAction::FailWaiting(chunk));
        }
    }
}
