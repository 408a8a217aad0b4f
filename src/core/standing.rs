// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the destination has been told of each chunk, kept alike on both sides.
//!
//! The remaining set with its write counts must be at the destination when the rings have stopped, and the
//! hypervisor waits meanwhile: so it is announced ahead, and only the last changes go out at the stop. Both sides
//! fold every announcement into this table, one byte a chunk, and into a digest that changes in constant time. If
//! the digests agree at the offer, so do the sets.

use super::geometry::ChunkId;
use super::heat::MAX_COUNT;
use super::message::{Announcement, RemainingDigest, Standing, Version};

const NOTHING: u8 = 0;
const SETTLED: u8 = 1;
const REMAINING: u8 = 2;

/// What was told of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Told {
    /// Nothing: it is not in the source's modified set.
    Nothing,
    /// The destination has its current content.
    Settled,
    /// The destination lacks its current content; the write count.
    Remaining(u8),
}

impl Told {
    fn byte(self) -> u8 {
        match self {
            Self::Nothing => NOTHING,
            Self::Settled => SETTLED,
            Self::Remaining(count) => REMAINING + count.min(MAX_COUNT),
        }
    }

    fn from_byte(byte: u8) -> Self {
        match byte {
            NOTHING => Self::Nothing,
            SETTLED => Self::Settled,
            more => Self::Remaining(more - REMAINING),
        }
    }
}

/// The table; see the module's header.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Standings {
    told: Vec<u8>,
    digest: u128,
    remaining: u32,
}

/// Mixes 64 bits well (the finaliser of `SplitMix64`).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The contribution of one chunk of which something was told. The sum over the set does not depend on the order. It guards
/// against errors, not against a malicious peer, who could send wrong data as well.
fn contribution(chunk: ChunkId, told: u8) -> u128 {
    let key = u64::from(chunk.0) << 8 | u64::from(told);
    let high = mix(key.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let low = mix(key.wrapping_mul(0xd6e8_feb8_6659_fd93).wrapping_add(0x2545_f491_4f6c_dd1d));
    u128::from(high) << 64 | u128::from(low)
}

impl Standings {
    /// Nothing has been told.
    #[must_use]
    pub fn new(chunks: u32) -> Self {
        Self { told: vec![NOTHING; chunks as usize], digest: 0, remaining: 0 }
    }

    /// What was told of a chunk.
    #[must_use]
    pub fn get(&self, chunk: ChunkId) -> Told {
        Told::from_byte(self.told.get(chunk.index()).copied().unwrap_or(NOTHING))
    }

    /// Tells something of a chunk; a chunk past the end is ignored.
    pub fn set(&mut self, chunk: ChunkId, told: Told) {
        let Some(slot) = self.told.get_mut(chunk.index()) else { return };
        let byte = told.byte();
        if *slot != NOTHING {
            self.digest = self.digest.wrapping_sub(contribution(chunk, *slot));
            self.remaining -= u32::from(*slot >= REMAINING);
        }
        if byte != NOTHING {
            self.digest = self.digest.wrapping_add(contribution(chunk, byte));
            self.remaining += u32::from(byte >= REMAINING);
        }
        *slot = byte;
    }

    /// Digest of the whole table: of the remaining set with its counts, and of the settled chunks. Those count too,
    /// because together they are the modified set that a destination falls back to when its host goes down.
    #[must_use]
    pub fn digest(&self) -> RemainingDigest {
        RemainingDigest(self.digest)
    }

    /// Number of chunks told to remain.
    #[must_use]
    pub fn remaining(&self) -> u32 {
        self.remaining
    }

    /// Every chunk of which something was told, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = (ChunkId, Told)> + '_ {
        let known = self.told.iter().enumerate().filter(|(_, byte)| **byte != NOTHING);
        known.filter_map(|(index, byte)| Some((ChunkId(u32::try_from(index).ok()?), Told::from_byte(*byte))))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.told.fill(NOTHING);
        self.digest = 0;
        self.remaining = 0;
    }
}

/// Appends an announcement, joined to the last one if it goes on where that ended.
pub fn push_announcement(list: &mut Vec<Announcement>, chunk: ChunkId, standing: Standing) {
    if let Some(last) = list.last_mut()
        && last.standing == standing
        && matches!(standing, Standing::Remaining { .. })
        && last.first.0.checked_add(last.run) == Some(chunk.0)
    {
        last.run += 1;
        return;
    }
    list.push(Announcement { first: chunk, run: 1, standing });
}

/// What an announcement tells, in the table's words.
#[must_use]
pub fn told_of(standing: Standing) -> (Told, Option<Version>) {
    match standing {
        Standing::Remaining { count } => (Told::Remaining(count.min(MAX_COUNT)), None),
        Standing::Settled { version } => (Told::Settled, Some(version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t19_the_digest_follows_each_change_and_forgets_the_order() {
        let mut one = Standings::new(8);
        let mut two = Standings::new(8);
        one.set(ChunkId(1), Told::Remaining(0));
        one.set(ChunkId(5), Told::Remaining(7));
        one.set(ChunkId(5), Told::Remaining(8));
        one.set(ChunkId(6), Told::Remaining(1));
        one.set(ChunkId(6), Told::Settled);
        two.set(ChunkId(5), Told::Remaining(8));
        two.set(ChunkId(1), Told::Remaining(0));
        assert_ne!(one.digest(), two.digest(), "a settled chunk that was never told is missed");
        two.set(ChunkId(6), Told::Settled);
        assert_eq!((one.digest(), one.remaining()), (two.digest(), 2));
        two.set(ChunkId(1), Told::Remaining(1));
        assert_ne!(one.digest(), two.digest());
        one.clear();
        assert_eq!(one.digest(), RemainingDigest(0));
    }

    #[test]
    fn runs_are_joined_but_settled_chunks_keep_their_versions() {
        let mut list = Vec::new();
        for chunk in [3, 4, 5, 9] {
            push_announcement(&mut list, ChunkId(chunk), Standing::Remaining { count: 1 });
        }
        for chunk in [10, 11] {
            push_announcement(&mut list, ChunkId(chunk), Standing::Settled { version: Version(4) });
        }
        let runs: Vec<_> = list.iter().map(|a| (a.first.0, a.run)).collect();
        assert_eq!(runs, [(3, 3), (9, 1), (10, 1), (11, 1)]);
    }
}
