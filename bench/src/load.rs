// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What to do next, and when: directions, offsets, and the pace of an open loop.

use crate::ring::Kind;
use anyhow::{Result, bail};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use rand_distr::{Distribution, Zipf};
use std::ops::Range;

/// How offsets follow one another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Access {
    Sequential,
    Uniform,
    /// Rank r is taken with a probability proportional to r^-theta; ranks are scattered over the range.
    Zipf(f64),
}

/// The mix of one run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mix {
    pub(crate) access: Access,
    /// Percent of data requests that read.
    pub(crate) reads: u8,
    /// Percent of those that do not read that discard.
    pub(crate) discards: u8,
    /// A flush after so many writes; 0 for never.
    pub(crate) flush_every: u32,
}

/// A stream of requests over blocks of a range.
#[derive(Debug)]
pub(crate) struct Load {
    mix: Mix,
    /// The first block, the distance of two that are used, and how many are.
    start: u64,
    step: u64,
    count: u64,
    rng: SmallRng,
    zipf: Option<Zipf<f64>>,
    /// Coprime to the number of blocks: multiplication with it scatters ranks without two meeting.
    stride: u64,
    next: u64,
    writes: u32,
}

impl Load {
    /// `blocks` are numbers of blocks of the request size; every `step`th of them is used.
    pub(crate) fn new(mix: Mix, blocks: Range<u64>, step: u64, seed: u64) -> Result<Self> {
        let step = step.max(1);
        let count = blocks.end.saturating_sub(blocks.start).div_ceil(step);
        if count == 0 {
            bail!("the range is smaller than one request of each queue");
        }
        let zipf = match mix.access {
            #[allow(clippy::cast_precision_loss)] // Ranks beyond 2^53 are never drawn anyway.
            Access::Zipf(theta) => match Zipf::new(count as f64, theta) {
                Ok(zipf) => Some(zipf),
                Err(error) => bail!("--zipf {theta}: {error}"),
            },
            _ => None,
        };
        let rng = SmallRng::seed_from_u64(seed);
        Ok(Self {
            mix,
            start: blocks.start,
            step,
            count,
            rng,
            zipf,
            stride: scatter(count),
            next: 0,
            writes: 0,
        })
    }

    /// The next request: what, and which block.
    pub(crate) fn next(&mut self) -> (Kind, u64) {
        if self.mix.flush_every > 0 && self.writes >= self.mix.flush_every {
            self.writes = 0;
            return (Kind::Flush, 0);
        }
        let kind = self.kind();
        self.writes += u32::from(kind == Kind::Write);
        (kind, self.block())
    }

    fn kind(&mut self) -> Kind {
        let mut one_in = |percent: u8| match percent {
            0 => false,
            100.. => true,
            percent => self.rng.next_u32() % 100 < u32::from(percent),
        };
        if one_in(self.mix.reads) {
            Kind::Read
        } else if one_in(self.mix.discards) {
            Kind::Discard
        } else {
            Kind::Write
        }
    }

    fn block(&mut self) -> u64 {
        self.start + self.step * self.index()
    }

    fn index(&mut self) -> u64 {
        if self.mix.access == Access::Sequential {
            let index = self.next;
            self.next = if index + 1 == self.count { 0 } else { index + 1 };
            return index;
        }
        let Some(zipf) = &self.zipf else { return self.rng.random_range(0..self.count) };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // From 1 to the number of blocks.
        let rank = (zipf.sample(&mut self.rng) as u64).clamp(1, self.count) - 1;
        multiply(rank, self.stride, self.count)
    }
}

fn multiply(a: u64, b: u64, modulus: u64) -> u64 {
    let product = u128::from(a) * u128::from(b) % u128::from(modulus);
    // Smaller than the modulus.
    u64::try_from(product).unwrap_or(0)
}

/// A number near the golden section of `count` that has no factor in common with it.
fn scatter(count: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let start = multiply(count, 618_033_989, 1_000_000_000).max(count / 1000 * 618).max(1);
    (start..).find(|candidate| gcd(*candidate, count) == 1).unwrap_or(1)
}

/// When requests may start.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pace {
    /// Whenever there is a free slot.
    Closed,
    /// At fixed times, whether or not the earlier ones have come back.
    Open { interval: f64, started: u64, issued: u64 },
}

impl Pace {
    /// `rate` requests a second; the clock is in nanoseconds.
    pub(crate) fn open(rate: f64, started: u64) -> Self {
        Self::Open { interval: 1e9 / rate, started, issued: 0 }
    }

    /// When the next request is meant to start; `None`: at once.
    pub(crate) fn due(&self) -> Option<u64> {
        match self {
            Self::Closed => None,
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
            Self::Open { interval, started, issued } => Some(started + (*issued as f64 * interval) as u64),
        }
    }

    /// Counts a request that was started.
    pub(crate) fn took(&mut self) {
        if let Self::Open { issued, .. } = self {
            *issued += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::HashMap;

    fn mix(access: Access) -> Mix {
        Mix { access, reads: 100, discards: 0, flush_every: 0 }
    }

    #[test]
    fn sequential_goes_round() {
        let mut load = Load::new(mix(Access::Sequential), 3..6, 1, 1).unwrap();
        let blocks: Vec<_> = (0..5).map(|_| load.next().1).collect();
        assert_eq!(blocks, [3, 4, 5, 3, 4]);
        let mut load = Load::new(mix(Access::Sequential), 3..12, 4, 1).unwrap();
        let blocks: Vec<_> = (0..4).map(|_| load.next().1).collect();
        assert_eq!(blocks, [3, 7, 11, 3]);
    }

    #[test]
    fn the_same_seed_gives_the_same_stream_and_another_one_does_not() {
        let stream = |seed| {
            let mut load = Load::new(mix(Access::Uniform), 0..1 << 40, 1, seed).unwrap();
            (0..20).map(|_| load.next().1).collect::<Vec<_>>()
        };
        assert_eq!(stream(1), stream(1));
        assert_ne!(stream(1), stream(2));
    }

    #[test]
    fn offsets_stay_inside_and_reach_everything() {
        for access in [Access::Uniform, Access::Zipf(0.5)] {
            let mut load = Load::new(mix(access), 10..20, 1, 7).unwrap();
            let mut seen: HashMap<u64, u32> = HashMap::new();
            for _ in 0..5000 {
                *seen.entry(load.next().1).or_default() += 1;
            }
            assert!(seen.keys().all(|block| (10..20).contains(block)));
            assert_eq!(seen.len(), 10, "{access:?}");
        }
    }

    #[test]
    fn zipf_is_skewed_as_it_says() {
        let mut load = Load::new(mix(Access::Zipf(1.0)), 0..1000, 1, 7).unwrap();
        let mut seen: HashMap<u64, u32> = HashMap::new();
        for _ in 0..100_000 {
            *seen.entry(load.next().1).or_default() += 1;
        }
        let mut counts: Vec<_> = seen.into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        // The harmonic number of 1000 is 7.49: the first rank takes 13.4 %, half as often the second.
        assert!((12_400..14_400).contains(&counts[0]), "{}", counts[0]);
        assert!((6_000..7_400).contains(&counts[1]), "{}", counts[1]);
    }

    #[test]
    fn scattering_loses_no_block() {
        for count in [1u64, 2, 3, 10, 1000, 4096, 99_991] {
            let stride = scatter(count);
            let mut all: Vec<_> = (0..count).map(|rank| multiply(rank, stride, count)).collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..count), "{count}");
        }
        assert!(scatter(1 << 32) > 1 << 30, "hot blocks of a large disk would be neighbours");
    }

    #[test]
    fn directions_are_mixed_and_flushes_come_after_so_many_writes() {
        let mut load =
            Load::new(Mix { access: Access::Uniform, reads: 30, discards: 10, flush_every: 5 }, 0..100, 1, 3)
                .unwrap();
        let mut counts = HashMap::new();
        for _ in 0..10_000 {
            *counts.entry(format!("{:?}", load.next().0)).or_insert(0) += 1;
        }
        assert!((2_300..2_900).contains(&counts["Read"]), "{counts:?}");
        assert!((500..720).contains(&counts["Discard"]), "{counts:?}");
        assert_eq!(counts["Flush"], counts["Write"] / 5, "{counts:?}");
    }

    #[test]
    fn an_open_loop_does_not_wait() {
        let mut pace = Pace::open(1000.0, 5);
        assert_eq!(pace.due(), Some(5));
        pace.took();
        pace.took();
        assert_eq!(pace.due(), Some(2_000_005));
        assert_eq!(Pace::Closed.due(), None);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(Load::new(mix(Access::Uniform), 5..5, 1, 1).is_err());
        assert!(Load::new(mix(Access::Zipf(-1.0)), 0..5, 1, 1).is_err());
    }
}
