// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a sector holds, and what a wrong one seems to be. Pure: no disk, no thread, no clock.

pub(crate) const SECTOR: usize = 512;
const MAGIC: u64 = 0x7972_7265_666b_6c62; // "blkferry"
/// Stamp of a sector that was never written: it holds the base image's pattern.
pub(crate) const BASE: u32 = 0;
/// Stamp of a sector that must read as zeros: discarded, zeroed, a hole of the base or beyond its end.
pub(crate) const ZERO: u32 = u32::MAX;
/// Stamp of a sector after a failed write: nothing can be expected of it. The failure itself counts as wrong.
pub(crate) const UNKNOWN: u32 = u32::MAX - 1;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// xorshift64: good enough to be unlike any other sector, and cheap under an emulated CPU.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// A number in `0..n`; 0 for an empty range.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n.max(1)
    }
}

/// Writes the content of `sector` with `stamp` into `out` (512 bytes).
pub(crate) fn fill(out: &mut [u8], sector: u64, stamp: u32, seed: u64) {
    if stamp == ZERO {
        out.fill(0);
        return;
    }
    let mut rng = Rng::new(mix(sector) ^ mix(seed) ^ (u64::from(stamp) << 17));
    let head = [MAGIC, sector, u64::from(stamp), seed];
    for (i, word) in out.chunks_exact_mut(8).enumerate() {
        let value = head.get(i).copied().unwrap_or_else(|| rng.next());
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Says what a sector that is not as expected seems to be.
fn describe(found: &[u8], sector: u64, want: u32, seed: u64) -> String {
    let word =
        |i: usize| found.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    if found.iter().all(|b| *b == 0) {
        return "zeros".into();
    }
    if word(0) != MAGIC {
        return format!("garbage {:016x} {:016x}", word(0), word(1));
    }
    let (at, stamp, of) = (word(1), word(2), word(3));
    let mut whole = vec![0; SECTOR];
    fill(&mut whole, at, u32::try_from(stamp).unwrap_or(UNKNOWN), of);
    let kind = match () {
        () if whole != found => "torn",
        () if at != sector => "misplaced",
        () if stamp == u64::from(BASE) => "base-reappeared",
        () if of != seed => "other-run",
        () if want != ZERO && stamp > u64::from(want) => "newer",
        () => "stale",
    };
    format!("{kind} sector={at} stamp={stamp}")
}

pub(crate) fn show(stamp: u32) -> String {
    match stamp {
        BASE => "base".into(),
        ZERO => "zeros".into(),
        other => other.to_string(),
    }
}

/// Size and seeds of a run: what both sides must agree on.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) sectors: u64,
    pub(crate) base_sectors: u64,
    pub(crate) seed: u64,
}

impl Plan {
    /// What the untouched disk holds: the pattern, with a hole in every eighth MiB, zeros past the base's end.
    pub(crate) fn initial(&self, sector: u64) -> u32 {
        let hole = (sector / 2048) % 8 == 5;
        if hole || sector >= self.base_sectors { ZERO } else { BASE }
    }
    pub(crate) fn seed_of(&self, stamp: u32) -> u64 {
        if stamp == BASE { BASE_SEED } else { self.seed }
    }
}

/// The base image is the same in every run, so that it can be kept in the cache.
pub(crate) const BASE_SEED: u64 = 0xba5e;

/// Compares `data` (from sector `first`) with `stamps`; returns the complaints.
pub(crate) fn verify(data: &[u8], first: u64, stamps: &[u32], plan: &Plan) -> Vec<String> {
    let mut want = vec![0; SECTOR];
    let mut bad = Vec::new();
    for ((found, stamp), sector) in data.chunks_exact(SECTOR).zip(stamps).zip(first..) {
        if *stamp == UNKNOWN {
            continue;
        }
        let seed = plan.seed_of(*stamp);
        fill(&mut want, sector, *stamp, seed);
        if found != want {
            let found = describe(found, sector, *stamp, plan.seed);
            bad.push(format!("WRONG sector={sector} expected={} found={found}", show(*stamp)));
        }
    }
    bad
}
