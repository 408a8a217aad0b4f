// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything random of one run comes from one seeded stream, so that a seed replays it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

#[derive(Debug)]
pub(crate) struct Dice(ChaCha8Rng);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// In `0..end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.number() % end.max(1)
    }

    /// In `from..=to`.
    pub(crate) fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True in so many of a thousand cases.
    pub(crate) fn permille(&mut self, of: u64) -> bool {
        self.below(1000) < of
    }

    pub(crate) fn coin(&mut self) -> bool {
        self.permille(500)
    }

    /// Mostly short, sometimes twenty times as long: microseconds.
    pub(crate) fn delay(&mut self, typical: u64) -> u64 {
        let long = if self.permille(30) { 20 } else { 1 };
        1 + self.below(typical * 2 * long)
    }
}
