// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What to push before the stop, and what the handoff waits for (paper, section 5.2 and table 1).
//!
//! The hybrid pushes a chunk while its write count is below the threshold. Since counts decay by half in each
//! half-life, a chunk is pushed at most about `threshold` times in one half-life, and may be pulled once after the
//! handoff: threshold + 1 transfers, which is what the published algorithm does too, although its text says
//! "no more than Threshold times".

use thiserror::Error;

/// A strategy of the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Strategy {
    /// Push below the threshold, then prefetch hottest first and pull on demand.
    Hybrid = 1,
    /// Push everything however often it is written; the handoff waits (bounded) until nothing is left.
    Precopy = 2,
    /// Push nothing; prefetch and pull after the handoff.
    Postcopy = 3,
    /// Complete guest writes at both sides.
    Mirror = 4,
    /// Shared storage: nothing moves.
    Shared = 5,
}

/// A strategy that this version cannot run.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[error("strategy {0:?} is not available in this version: use hybrid, precopy or postcopy")]
pub struct NotAvailable(pub Strategy);

impl Strategy {
    /// The strategy with this number (its discriminant), if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Hybrid, Self::Precopy, Self::Postcopy, Self::Mirror, Self::Shared]
            .into_iter()
            .find(|strategy| *strategy as u8 == number)
    }

    /// The strategy itself, if this version can run it.
    ///
    /// # Errors
    /// [`NotAvailable`] for mirror and shared.
    pub fn available(self) -> Result<Self, NotAvailable> {
        match self {
            Self::Hybrid | Self::Precopy | Self::Postcopy => Ok(self),
            Self::Mirror | Self::Shared => Err(NotAvailable(self)),
        }
    }

    /// The write count from which on a chunk is not pushed.
    #[must_use]
    pub fn push_below(self, threshold: u32) -> u32 {
        match self {
            Self::Hybrid => threshold.min(255),
            Self::Precopy => u32::MAX,
            Self::Postcopy | Self::Mirror | Self::Shared => 0,
        }
    }

    /// Whether the offer waits until nothing is left to push.
    #[must_use]
    pub fn drains_before_offer(self) -> bool {
        matches!(self, Self::Precopy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t05_threshold_is_an_exclusive_bound() {
        assert_eq!(Strategy::Hybrid.push_below(3), 3);
        assert_eq!(Strategy::Postcopy.push_below(3), 0);
        assert_eq!(Strategy::Precopy.push_below(3), u32::MAX);
    }

    #[test]
    fn numbers_and_availability() {
        for number in 0..=255 {
            assert!(Strategy::from_number(number).is_none_or(|s| s as u8 == number));
        }
        assert_eq!(Strategy::Mirror.available(), Err(NotAvailable(Strategy::Mirror)));
        assert_eq!(Strategy::Hybrid.available(), Ok(Strategy::Hybrid));
    }
}
