// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long an idle queue thread looks around before it sleeps.
//!
//! A wake-up costs some microseconds on either side; on media that answer faster than that, looking around instead is
//! worth a CPU. On others it is not, so the time adapts, as KVM's halt polling does: it grows when a sleep turns out to
//! have been short enough to be spun through, and is halved when it was longer than would ever be spun.

use std::time::{Duration, Instant};

/// The first step when the time grows from nothing.
const STEP: Duration = Duration::from_micros(4);

/// Adaptive busy-poll of one thread; off when its longest time is zero.
#[derive(Debug)]
pub(super) struct BusyPoll {
    longest: Duration,
    now: Duration,
}

impl BusyPoll {
    /// Spins for `longest` at most.
    pub(super) fn new(longest: Duration) -> Self {
        Self { longest, now: Duration::ZERO }
    }

    /// Whether there is anything to adapt.
    pub(super) fn is_on(&self) -> bool {
        !self.longest.is_zero()
    }

    /// Spins until `news`, for as long as it is worth now; returns whether there are any.
    pub(super) fn spin(&self, mut news: impl FnMut() -> bool) -> bool {
        if self.now.is_zero() {
            return news();
        }
        let begin = Instant::now();
        loop {
            // The clock costs more than the look.
            for _ in 0..16 {
                if news() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if begin.elapsed() >= self.now {
                return false;
            }
        }
    }

    /// A sleep has taken `slept`, after spinning in vain.
    pub(super) fn slept(&mut self, slept: Duration) {
        if slept > self.longest {
            self.now /= 2;
            if self.now < STEP {
                self.now = Duration::ZERO;
            }
        } else {
            self.now = (self.now * 2).max(STEP).min(self.longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_grows_with_short_sleeps_and_shrinks_with_long_ones() {
        let longest = Duration::from_micros(50);
        let mut poll = BusyPoll::new(longest);
        let mut looks = 0;
        assert!(!poll.spin(|| {
            looks += 1;
            false
        }));
        assert_eq!(looks, 1, "it begins without spinning");
        for expected in [4, 8, 16, 32, 50, 50] {
            poll.slept(Duration::from_micros(20));
            assert_eq!(poll.now, Duration::from_micros(expected));
        }
        for expected in [25_000, 12_500, 6_250, 0, 0] {
            poll.slept(Duration::from_millis(1));
            assert_eq!(poll.now, Duration::from_nanos(expected));
        }
        assert!(BusyPoll::new(longest).is_on() && !BusyPoll::new(Duration::ZERO).is_on());
    }
}
