// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which chunks the guest writes while a migration looks on, and how often.
//!
//! Order matters twice. A write is noted *after* it has changed the chunk table (its claim, its version) and before
//! its completion is delivered; the tracker is armed *before* the modified set is copied. With sequentially
//! consistent operations on both sides, either the write sees that the tracker is armed, or the copy sees what the
//! write did to the table. Copying first loses the writes in between (the start race of the published algorithm).
//!
//! The write count is the paper's heat, with one change: 64 sequential 4 KiB writes fill a chunk once, and should
//! count 1. So a *pass* begins with the first write after a capture, and with each write that hits a block already
//! written in this pass. The paper's plain count is kept beside it, for comparison.
//!
//! Dirty chunks are a two-level bitmap and not a queue: it cannot overflow, and a chunk that is written a thousand
//! times between two looks is one bit. Its leaf is set before its summary; the reader clears the summary before the
//! leaf. So a bit that a reader misses has its summary bit set after the reader's look, and the next look finds it.

use crate::core::geometry::{BlockMask, ChunkId};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Called, from any thread, when there is something to drain and the last call has been answered by a drain.
pub type DirtyCallback = Box<dyn Fn() + Send + Sync>;

/// Write tracking of a volume; see the module's header.
pub struct Tracker {
    armed: AtomicBool,
    /// The n-th is for up to 2^n chunks. Allocated by the first arming of a volume of that size (16 bytes a chunk, where
    /// it is used) and kept: a queue thread may still be looking at it.
    tables: [OnceLock<Tables>; SIZES],
    /// Which one the last arming took.
    current: AtomicUsize,
    told: AtomicBool,
    callback: DirtyCallback,
}

/// A volume has less than 2^32 chunks.
const SIZES: usize = 33;

/// What is known of one chunk, side by side: the companion's drains take the cache lines away from the queue threads, so a
/// write should touch as few as can be. First the blocks written in this pass; then the counts since the last drain,
/// passes in the high half and plain writes in the low one. Drains are a second apart at the most: neither gets full.
type Seen = [AtomicU64; 2];

/// One pass more in the counts.
const PASS: u64 = 1 << 32;

struct Tables {
    seen: Box<[Seen]>,
    leaves: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
}

impl Tables {
    fn new(chunks: usize) -> Self {
        let leaves = chunks.div_ceil(64);
        Self { seen: zeroed(chunks), leaves: zeroed(leaves), summary: zeroed(leaves.div_ceil(64)) }
    }

    fn clear(&self) {
        // Only what is not zero: pages that were never touched stay without memory. The summary before the leaves: a
        // write that still comes in sets its leaf first, so a leaf that survives has its summary bit too.
        let seen = self.seen.iter().flatten();
        let words = seen.chain(&self.summary).chain(&self.leaves);
        for word in words.filter(|word| word.load(Ordering::Relaxed) != 0) {
            word.store(0, Ordering::Relaxed);
        }
    }
}

/// Zeroed words, from `calloc`: pages that are never touched are never given memory. A vector of plain integers that is
/// collected into atomics would be written through, whatever the optimizer is hoped to do.
pub(super) fn zeroed<T: bytemuck::Zeroable>(count: usize) -> Box<[T]> {
    bytemuck::zeroed_slice_box(count)
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker").field("armed", &self.armed).finish_non_exhaustive()
    }
}

impl Tracker {
    /// A tracker that is not armed.
    #[must_use]
    pub fn new(callback: DirtyCallback) -> Self {
        Self {
            armed: AtomicBool::new(false),
            tables: [const { OnceLock::new() }; SIZES],
            current: AtomicUsize::new(0),
            told: AtomicBool::new(false),
            callback,
        }
    }

    /// Forgets what it knew and notes writes to a volume of `chunks` chunks from now on. Copy the modified set *after*
    /// this. The volume must not grow while it is armed.
    pub fn arm(&self, chunks: u32) {
        self.disarm();
        let chunks = (chunks as usize).next_power_of_two();
        let size = chunks.trailing_zeros() as usize;
        let mut fresh = false;
        let tables = self.tables[size].get_or_init(|| {
            fresh = true;
            Tables::new(chunks)
        });
        if !fresh {
            tables.clear();
        }
        self.current.store(size, Ordering::SeqCst);
        self.told.store(false, Ordering::SeqCst);
        self.armed.store(true, Ordering::SeqCst);
    }

    /// Notes nothing any more.
    pub fn disarm(&self) {
        self.armed.store(false, Ordering::SeqCst);
    }

    /// Whether writes are noted.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        // Sequentially consistent, which costs nothing more than relaxed for a load on x86: see the header.
        self.armed.load(Ordering::SeqCst)
    }

    fn tables(&self) -> Option<&Tables> {
        self.tables[self.current.load(Ordering::SeqCst)].get()
    }

    /// Notes that the guest changed these blocks of the chunk.
    pub(super) fn note(&self, chunk: ChunkId, blocks: BlockMask) {
        if self.is_armed()
            && let Some(tables) = self.tables()
        {
            self.note_armed(tables, chunk.index(), blocks);
        }
    }

    fn note_armed(&self, tables: &Tables, index: usize, blocks: BlockMask) {
        let (Some([written, counts]), Some(leaf)) = (tables.seen.get(index), tables.leaves.get(index / 64))
        else {
            return;
        };
        let mut before = written.load(Ordering::Relaxed);
        let new_pass = loop {
            let again = before == 0 || before & blocks.0 != 0;
            let next = if again { blocks.0 } else { before | blocks.0 };
            match written.compare_exchange_weak(before, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break again,
                Err(now) => before = now,
            }
        };
        counts.fetch_add(1 + if new_pass { PASS } else { 0 }, Ordering::Relaxed);
        // AcqRel on leaf and summary: the counts above are visible to the drain that takes the bit. Whoever makes a
        // leaf word non-zero sets its summary bit; others may rely on that, for the drain takes whole words.
        if leaf.fetch_or(1 << (index % 64), Ordering::AcqRel) == 0 {
            let leaf = index / 64;
            tables.summary[leaf / 64].fetch_or(1 << (leaf % 64), Ordering::AcqRel);
            if !self.told.swap(true, Ordering::AcqRel) {
                (self.callback)();
            }
        }
    }

    /// A capture of the chunk begins: the next write counts as a pass of its own. Call it before reading.
    pub(super) fn captured(&self, chunk: ChunkId) {
        if let Some([written, _]) = self.tables().and_then(|tables| tables.seen.get(chunk.index())) {
            written.store(0, Ordering::Relaxed);
        }
    }

    /// Tells each chunk that was written since the last drain: passes and plain writes since then. A chunk may be
    /// told with zeros when its counts went with the drain before. After the queues have been drained, everything
    /// that they wrote has been told or is told now.
    pub fn drain(&self, mut tell: impl FnMut(ChunkId, u32, u32)) {
        self.told.swap(false, Ordering::AcqRel);
        let Some(tables) = self.tables() else { return };
        for (top, summary) in tables.summary.iter().enumerate() {
            for leaf in bits(summary) {
                let leaf = top * 64 + leaf;
                for bit in bits(&tables.leaves[leaf]) {
                    let index = leaf * 64 + bit;
                    let counts = tables.seen[index][1].swap(0, Ordering::Relaxed);
                    let (passes, plain) = (counts / PASS, counts % PASS);
                    let [passes, plain] = [passes, plain].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
                    if let Ok(chunk) = u32::try_from(index) {
                        tell(ChunkId(chunk), passes, plain);
                    }
                }
            }
        }
    }
}

/// Empties a word and gives the numbers of the bits that were set.
fn bits(word: &AtomicU64) -> impl Iterator<Item = usize> + use<> {
    // A plain look first: most words are empty, and a swap would dirty their cache lines.
    let mut rest = if word.load(Ordering::Acquire) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) };
    std::iter::from_fn(move || {
        let bit = rest.trailing_zeros() as usize;
        (rest != 0).then(|| {
            rest &= rest - 1;
            bit
        })
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    const CHUNKS: u32 = 5000;

    fn tracker() -> (Arc<AtomicU32>, Tracker) {
        let calls = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&calls);
        let count = move || {
            counter.fetch_add(1, Ordering::SeqCst);
        };
        (calls, Tracker::new(Box::new(count)))
    }

    fn drained(tracker: &Tracker) -> Vec<(u32, u32, u32)> {
        let mut all = Vec::new();
        tracker.drain(|chunk, passes, plain| all.push((chunk.0, passes, plain)));
        all
    }

    #[test]
    fn t25_sequential_writes_fill_a_chunk_once_and_count_one_pass() {
        let (_, tracker) = tracker();
        tracker.note(ChunkId(1), BlockMask(1));
        assert!(drained(&tracker).is_empty(), "nothing is noted before it is armed");
        tracker.arm(CHUNKS);
        for block in 0..64 {
            tracker.note(ChunkId(1), BlockMask(1 << block));
        }
        assert_eq!(drained(&tracker), [(1, 1, 64)]);
        // Overwrites: each pass ends where a block comes again.
        for block in [0, 1, 2, 1, 2, 2] {
            tracker.note(ChunkId(1), BlockMask(1 << block));
        }
        // The first write here hits the full mask of the pass before.
        assert_eq!(drained(&tracker), [(1, 3, 6)]);
        tracker.captured(ChunkId(1));
        tracker.note(ChunkId(1), BlockMask(1 << 40));
        assert_eq!(drained(&tracker), [(1, 1, 1)]);
        tracker.note(ChunkId(2), BlockMask(1));
        tracker.arm(CHUNKS);
        assert!(drained(&tracker).is_empty(), "arming forgets");
        tracker.disarm();
        tracker.note(ChunkId(2), BlockMask(1));
        assert!(drained(&tracker).is_empty());
    }

    #[test]
    fn wake_ups_are_coalesced_until_the_next_drain() {
        let (calls, tracker) = tracker();
        tracker.arm(CHUNKS);
        for chunk in [3, 4, 4000] {
            tracker.note(ChunkId(chunk), BlockMask(1));
        }
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        assert_eq!(drained(&tracker), [(3, 1, 1), (4, 1, 1), (4000, 1, 1)]);
        tracker.note(ChunkId(4), BlockMask(1));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn no_write_is_lost_between_threads_and_drains() {
        const WRITES: u32 = 40_000;
        let (calls, tracker) = tracker();
        tracker.arm(CHUNKS);
        let mut seen = BTreeMap::<u32, u32>::new();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3u32)
                .map(|n| {
                    let tracker = &tracker;
                    scope.spawn(move || {
                        for i in 0..WRITES {
                            tracker.note(ChunkId((i * 7 + n * 13) % CHUNKS), BlockMask(1 << (i % 64)));
                        }
                    })
                })
                .collect();
            let mut answered = 0;
            while threads.iter().any(|thread| !thread.is_finished()) {
                // Only when called, as the companion does.
                let now = calls.load(Ordering::SeqCst);
                if now != answered {
                    answered = now;
                    tracker.drain(|chunk, _, plain| *seen.entry(chunk.0).or_default() += plain);
                }
            }
        });
        tracker.drain(|chunk, _, plain| *seen.entry(chunk.0).or_default() += plain);
        let mut expected = BTreeMap::<u32, u32>::new();
        for n in 0..3u32 {
            for i in 0..WRITES {
                *expected.entry((i * 7 + n * 13) % CHUNKS).or_default() += 1;
            }
        }
        assert_eq!(seen, expected);
    }
}
