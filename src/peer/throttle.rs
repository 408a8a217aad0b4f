// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A cap on the bytes a second that all data streams of a daemon send together.
//!
//! A token bucket that may go into debt: whoever sends takes its bytes as soon as the balance is positive. So a slice
//! need not fit the bucket, and what a waiting guest demands is sent at once and paid by what comes after
//! it. The bucket is small (50 ms of the rate, at least one slice): a large one would let a link that was idle
//! swamp the guest's own traffic. [`Bucket`] is told the time, [`Throttle`] brings the clock.

use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Bytes that are sent between two looks at the bucket.
pub const SLICE: usize = 64 << 10;

const NANOS: i128 = 1_000_000_000;

/// The token bucket on any clock.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// Bytes a second; 0 is no cap.
    rate: u64,
    /// Balance in byte-nanoseconds (bytes times 10^9), so that no fraction is lost; negative is debt.
    balance: i128,
    /// When the balance was last brought up to date.
    at: Duration,
}

impl Bucket {
    /// A full bucket at time `now` (on a clock of the caller's) for `rate` bytes a second; 0 is no cap.
    #[must_use]
    pub fn new(rate: u64, now: Duration) -> Self {
        let mut bucket = Self { rate, balance: 0, at: now };
        bucket.balance = bucket.capacity();
        bucket
    }

    /// Most bytes that an idle time saves up.
    #[must_use]
    pub fn burst(rate: u64) -> u64 {
        (rate / 20).max(SLICE as u64)
    }

    fn capacity(&self) -> i128 {
        i128::from(Self::burst(self.rate)) * NANOS
    }

    /// Bytes a second; 0 is no cap.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Changes the rate; debt stays, and is paid at the new rate.
    pub fn set_rate(&mut self, rate: u64, now: Duration) {
        self.advance(now);
        let was_off = self.rate == 0;
        self.rate = rate;
        self.balance = if was_off { self.capacity() } else { self.balance.min(self.capacity()) };
    }

    fn advance(&mut self, now: Duration) {
        let passed = i128::try_from(now.saturating_sub(self.at).as_nanos()).unwrap_or(i128::MAX);
        self.balance =
            passed.saturating_mul(self.rate.into()).saturating_add(self.balance).min(self.capacity());
        self.at = self.at.max(now);
    }

    /// How long to wait until the balance is positive; zero if it is.
    pub fn wait(&mut self, now: Duration) -> Duration {
        self.advance(now);
        if self.rate == 0 || self.balance > 0 {
            return Duration::ZERO;
        }
        let nanos = -self.balance / i128::from(self.rate) + 1;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `bytes`, whatever the balance.
    pub fn take(&mut self, bytes: usize, now: Duration) {
        if self.rate == 0 {
            return;
        }
        self.advance(now);
        let bytes = i128::try_from(bytes).unwrap_or(i128::MAX);
        self.balance = self.balance.saturating_sub(bytes.saturating_mul(NANOS));
    }
}

/// The bucket of a daemon, shared by all its data streams; cheap to clone.
#[derive(Debug, Clone)]
pub struct Throttle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bucket: Mutex<Bucket>,
    start: Instant,
    changed: Notify,
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Throttle {
    /// A throttle of `rate` bytes a second; 0 is no cap.
    #[must_use]
    pub fn new(rate: u64) -> Self {
        let bucket = Mutex::new(Bucket::new(rate, Duration::ZERO));
        Self { shared: Arc::new(Shared { bucket, start: Instant::now(), changed: Notify::new() }) }
    }

    fn now(&self) -> Duration {
        self.shared.start.elapsed()
    }

    /// Bytes a second; 0 is no cap.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.shared.bucket.lock().rate()
    }

    /// Changes the rate; who waits now waits by the new rate.
    pub fn set_rate(&self, rate: u64) {
        let now = self.now();
        self.shared.bucket.lock().set_rate(rate, now);
        self.shared.changed.notify_waiters();
    }

    /// Returns when something may be sent. Does not take it: several streams may return at once, and overdraw the
    /// bucket by a slice each.
    pub async fn ready(&self) {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let now = self.now();
            let wait = self.shared.bucket.lock().wait(now);
            if wait.is_zero() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = &mut changed => {}
            }
        }
    }

    /// Takes `bytes`, whatever the balance.
    pub fn take(&self, bytes: usize) {
        let now = self.now();
        self.shared.bucket.lock().take(bytes, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Pass(u64),
        Send(usize),
        Demand(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..200_000_000).prop_map(Step::Pass),
            (1usize..=SLICE).prop_map(Step::Send),
            (1usize..=4 << 20).prop_map(Step::Demand),
        ]
    }

    proptest! {
        /// In any stretch of time, what was sent with leave is at most rate x time + burst + one slice.
        #[test]
        fn no_stretch_of_time_exceeds_the_rate(rate in 1u64..10_000_000_000, steps in prop::collection::vec(step(), 1..120)) {
            let mut now = Duration::from_secs(1);
            let mut bucket = Bucket::new(rate, now);
            let mut sent: Vec<(Duration, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Pass(nanos) => now += Duration::from_nanos(nanos),
                    Step::Demand(bytes) => bucket.take(bytes, now),
                    Step::Send(bytes) => {
                        let wait = bucket.wait(now);
                        if let Some(early) = wait.checked_sub(Duration::from_nanos(2)) {
                            prop_assert!(bucket.clone().wait(now + early) > Duration::ZERO, "no longer than needed");
                        }
                        now += wait;
                        prop_assert_eq!(bucket.wait(now), Duration::ZERO, "long enough");
                        bucket.take(bytes, now);
                        sent.push((now, bytes as u64));
                    }
                }
            }
            for first in 0..sent.len() {
                let mut bytes = 0u128;
                for (at, len) in &sent[first..] {
                    bytes += u128::from(*len);
                    let passed = (*at - sent[first].0).as_nanos();
                    let most = passed * u128::from(rate) / 1_000_000_000
                        + u128::from(Bucket::burst(rate)) + SLICE as u128 + 1;
                    prop_assert!(bytes <= most, "{bytes} > {most}");
                }
            }
        }

        /// Demanded bytes are not lost from the account: what follows waits for them.
        #[test]
        fn demanded_bytes_are_paid_for(rate in 1000u64..1_000_000_000, bytes in 1usize..64 << 20) {
            let mut bucket = Bucket::new(rate, Duration::ZERO);
            bucket.take(bytes, Duration::ZERO);
            let owed = (bytes as u128).saturating_sub(Bucket::burst(rate).into()) * 1_000_000_000 / u128::from(rate);
            prop_assert!(bucket.wait(Duration::ZERO).as_nanos() >= owed);
        }

        #[test]
        fn without_a_cap_nothing_waits_and_a_new_rate_counts_from_now(rate in 1u64..1_000_000_000, bytes: u32) {
            let mut bucket = Bucket::new(0, Duration::ZERO);
            bucket.take(bytes as usize, Duration::ZERO);
            prop_assert_eq!(bucket.wait(Duration::ZERO), Duration::ZERO);
            bucket.set_rate(rate, Duration::from_secs(5));
            prop_assert_eq!(bucket.wait(Duration::from_secs(5)), Duration::ZERO);
            bucket.take(1 << 30, Duration::from_secs(5));
            prop_assert!(bucket.wait(Duration::from_secs(5)) > Duration::ZERO);
            bucket.set_rate(0, Duration::from_secs(5));
            prop_assert_eq!(bucket.wait(Duration::from_secs(5)), Duration::ZERO);
        }
    }

    #[tokio::test]
    async fn a_changed_rate_wakes_who_waits() {
        let throttle = Throttle::new(1);
        throttle.take(1 << 30);
        let waiting = throttle.clone();
        let waiter = tokio::spawn(async move { waiting.ready().await });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        throttle.set_rate(0);
        assert!(waiter.await.is_ok());
        assert_eq!(throttle.rate(), 0);
    }
}
