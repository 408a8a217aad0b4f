// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What one queue's thread counts, and sums of that.

use crate::ring::Kind;
use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use std::time::Duration;

/// Latencies up to a minute, to three digits.
const LONGEST: u64 = 60_000_000_000;
/// Messages about failed requests of one queue; the rest is only counted.
const MESSAGES: u64 = 3;

/// Requests of one kind.
#[derive(Debug, Clone)]
pub(crate) struct Tally {
    pub(crate) count: u64,
    pub(crate) bytes: u64,
    /// Nanoseconds.
    pub(crate) latency: Histogram<u64>,
}

impl Tally {
    pub(crate) fn new() -> Result<Self> {
        let latency = Histogram::new_with_bounds(1, LONGEST, 3).context("histogram")?;
        Ok(Self { count: 0, bytes: 0, latency })
    }

    pub(crate) fn add(&mut self, other: &Self) -> Result<()> {
        self.count += other.count;
        self.bytes += other.bytes;
        self.latency.add(&other.latency).context("histogram")
    }
}

/// What a thread counted.
#[derive(Debug, Clone)]
pub(crate) struct Stats {
    pub(crate) read: Tally,
    pub(crate) write: Tally,
    pub(crate) flush: Tally,
    pub(crate) discard: Tally,
    /// Requests that came back with an error status, in the measured window or not.
    pub(crate) errors: u64,
    /// Blocks that were judged, and those found wrong.
    pub(crate) verified: u64,
    pub(crate) wrong: u64,
    /// The thread's own processor time in the measured window.
    pub(crate) cpu: Duration,
}

impl Stats {
    pub(crate) fn new() -> Result<Self> {
        let tally = Tally::new()?;
        Ok(Self {
            read: tally.clone(),
            write: tally.clone(),
            flush: tally.clone(),
            discard: tally,
            errors: 0,
            verified: 0,
            wrong: 0,
            cpu: Duration::ZERO,
        })
    }

    pub(crate) fn count(&mut self, kind: Kind, bytes: u64, nanoseconds: u64) {
        let tally = match kind {
            Kind::Read => &mut self.read,
            Kind::Write => &mut self.write,
            Kind::Flush => &mut self.flush,
            Kind::Discard => &mut self.discard,
        };
        tally.count += 1;
        tally.bytes += bytes;
        tally.latency.saturating_record(nanoseconds.max(1));
    }

    pub(crate) fn failed(&mut self, kind: Kind, offset: u64, status: u8) {
        self.errors += 1;
        if self.errors <= MESSAGES {
            eprintln!("blkferry-bench: {kind:?} at byte {offset} came back with status {status}");
        }
    }

    pub(crate) fn add(&mut self, other: &Self) -> Result<()> {
        self.read.add(&other.read)?;
        self.write.add(&other.write)?;
        self.flush.add(&other.flush)?;
        self.discard.add(&other.discard)?;
        self.errors += other.errors;
        self.verified += other.verified;
        self.wrong += other.wrong;
        self.cpu += other.cpu;
        Ok(())
    }

    /// Data requests of all kinds; flushes are told apart.
    pub(crate) fn data(&self) -> Result<Tally> {
        let mut all = self.read.clone();
        all.add(&self.write)?;
        all.add(&self.discard)?;
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sums_are_sums_and_flushes_are_no_data() {
        let mut one = Stats::new().unwrap();
        one.count(Kind::Read, 4096, 1000);
        one.count(Kind::Flush, 0, 9_000_000);
        let mut two = Stats::new().unwrap();
        two.count(Kind::Write, 8192, 3000);
        two.failed(Kind::Write, 0, 1);
        one.add(&two).unwrap();
        let data = one.data().unwrap();
        assert_eq!((data.count, data.bytes, one.flush.count, one.errors), (2, 12288, 1, 1));
        assert!((2990..=3010).contains(&data.latency.max()), "{}", data.latency.max());
    }

    #[test]
    fn absurd_latencies_are_kept_at_the_end_of_the_scale() {
        let mut stats = Stats::new().unwrap();
        stats.count(Kind::Read, 1, 0);
        stats.count(Kind::Read, 1, u64::MAX);
        assert_eq!(stats.read.latency.len(), 2);
    }
}
