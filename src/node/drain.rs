// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How often the tracker is drained into the session while a migration is armed.
//!
//! A drain costs by the chunks that were written since the last one. Draining at once after each write, which is what
//! the tracker's call alone would make of it, doubled the CPU of a guest's random writes. Nothing needs that: a
//! capture and a stop of the rings drain for themselves before they rely on it, and write counts are no worse for
//! being told in sums. So writes gather for a while, and longer when a drain is much work.

use std::time::Duration;

const SHORTEST: Duration = Duration::from_millis(20);
/// Write counts must not be blind for longer.
const LONGEST: Duration = Duration::from_secs(1);
/// Of the companion thread's time, drains take one part in so many at most.
const SHARE: u32 = 400;

/// How long writes gather before the next drain.
#[derive(Debug)]
pub(super) struct DrainPace {
    pub(super) wait: Duration,
}

impl Default for DrainPace {
    fn default() -> Self {
        Self { wait: SHORTEST }
    }
}

impl DrainPace {
    /// A drain took so long.
    pub(super) fn took(&mut self, time: Duration) {
        self.wait = (time * SHARE).clamp(SHORTEST, LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drains_take_a_bounded_share_and_come_within_a_second() {
        let mut pace = DrainPace::default();
        assert_eq!(pace.wait, SHORTEST);
        pace.took(Duration::from_millis(1));
        assert_eq!(pace.wait, Duration::from_millis(400));
        pace.took(Duration::from_secs(60));
        assert_eq!(pace.wait, LONGEST);
        pace.took(Duration::ZERO);
        assert_eq!(pace.wait, SHORTEST);
    }
}
