// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A ring of 1024 full of the largest requests. Descriptors may name the same memory over and over, so that costs a
//! guest nothing; the daemon's memory must not grow with it, and every request is answered.

use crate::guest::{Guest, HIGH, IOERR, OK, T_DISCARD, T_IN, T_OUT, WRITE};
use crate::raw::{Raw, alone, memory_use, prepare};
use crate::rig::{Rig, Setup};
use blkferry::core::geometry::ChunkId;
use blkferry::volume::Transfer;
use std::time::{Duration, Instant};

const RING: u16 = 1024;
const AREA: u64 = 0x10_0000;
/// One table for all heads, in the second region.
const TABLE: u64 = HIGH;
/// Data that all requests share.
const DATA: u64 = 0x20_0000;
const PART: u64 = 4 << 20;
/// Largest request that the device takes.
const MOST: u64 = 256 << 20;
const GROWTH: u64 = 128 << 20;

struct Full {
    rig: Rig,
    guest: Guest,
    raw: Raw,
}

impl Full {
    fn new(setup: Setup) -> Self {
        let rig = Rig::new(setup);
        let mut guest = Guest::connect(&rig.socket(), 1);
        prepare(&mut guest, 1, RING);
        let mut raw = Raw::new(0, RING, AREA);
        raw.start(&mut guest);
        Self { rig, guest, raw }
    }

    /// The same request under every head of the ring, `len` bytes long, all in one batch.
    fn fill(&mut self, request: (u32, u64), len: u64) {
        self.fill_with(request, len, RING, 0);
    }

    /// As [`Self::fill`], under the first `count` heads, with data that begin `skew` bytes off.
    fn fill_with(&mut self, (kind, sector): (u32, u64), len: u64, count: u16, skew: u64) {
        let memory = &self.guest.memory;
        self.raw.ask(memory, 0, kind, sector);
        let flags = if kind == T_IN { WRITE } else { 0 };
        let parts = len.div_ceil(PART);
        let part = |n: u64| (DATA + skew, u32::try_from(PART.min(len - n * PART)).unwrap(), flags);
        let mut pieces = vec![(self.raw.header(0), 16, 0)];
        pieces.extend((0..parts).map(part));
        pieces.push((self.raw.status(0), 1, WRITE));
        Raw::fill_table(memory, TABLE, &pieces);
        (0..count).for_each(|head| self.raw.point(memory, head, TABLE, pieces.len()));
        self.raw.offer(memory, 0..count);
    }

    /// Waits for all answers; returns the most anonymous memory that was seen meanwhile.
    fn drain(&mut self, count: u16) -> u64 {
        let since = Instant::now();
        let (mut left, mut most) = (usize::from(count), 0);
        while left > 0 {
            most = most.max(memory_use().anonymous);
            left -= self.raw.reap(&self.guest.memory).len();
            assert!(since.elapsed() < Duration::from_secs(300), "{left} requests are not answered");
            std::thread::sleep(Duration::from_millis(5));
        }
        most
    }
}

fn grew(what: &str, before: u64, most: u64) {
    let growth = most.saturating_sub(before);
    println!("{what}: {} KiB more", growth >> 10);
    assert!(growth < GROWTH, "{what}: {} MiB more", growth >> 20);
}

#[test]
fn a_thousand_of_the_largest_requests_that_wait_take_little_memory() {
    if let Some(status) = alone("limits::a_thousand_of_the_largest_requests_that_wait_take_little_memory") {
        return assert!(status.success(), "{status}");
    }
    let setup = Setup { size: MOST, drain_limit: Duration::from_secs(1), ..Setup::default() };
    let mut full = Full::new(Setup { chunk_size: Some(64 << 10), ..setup });
    // Chunks of another host that nobody asks.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let marked = async {
        let transfer = Transfer::open(&full.rig.volume).unwrap();
        transfer.mark_remote(ChunkId(0), full.rig.volume.geometry().chunk_count()).await
    };
    runtime.block_on(marked).unwrap();
    let before = memory_use().anonymous;
    full.fill((T_IN, 0), MOST);
    // The reply comes when all are popped, and after the drain's limit all have failed.
    let bases = full.guest.stop();
    assert_eq!(bases, [u32::from(RING)]);
    let most = memory_use().anonymous.max(full.drain(RING));
    assert_eq!(full.raw.status_of(&full.guest.memory, 0), IOERR);
    grew("waiting", before, most);
}

#[test]
fn a_thousand_large_reads_and_writes_take_little_memory() {
    if let Some(status) = alone("limits::a_thousand_large_reads_and_writes_take_little_memory") {
        return assert!(status.success(), "{status}");
    }
    let mut full = Full::new(Setup { size: MOST, chunk_size: Some(64 << 10), ..Setup::default() });
    // A thousand of 256 MiB would take minutes; a few of them, and many that are longer than what is begun of one at
    // a time, are no other case.
    let before = memory_use().anonymous;
    let rounds =
        [(T_OUT, RING, 2 << 20, 0), (T_IN, RING, 2 << 20, 0), (T_OUT, 4, MOST, 0), (T_IN, 4, MOST, 0)];
    // Memory that is not aligned, for which the device needs memory of its own.
    let odd = [(T_OUT, RING, 2 << 20, 1), (T_IN, RING, 2 << 20, 3)];
    for (kind, count, len, skew) in rounds.into_iter().chain(odd) {
        full.fill_with((kind, 0), len, count, skew);
        let most = full.drain(count);
        assert_eq!(full.raw.status_of(&full.guest.memory, 0), OK);
        grew(&format!("{count} requests of type {kind}, {} MiB, at {skew}", len >> 20), before, most);
    }
    assert_eq!(full.rig.volume.io().errors, 0);
}

#[test]
fn a_thousand_discards_of_the_whole_disk_take_little_memory() {
    if let Some(status) = alone("limits::a_thousand_discards_of_the_whole_disk_take_little_memory") {
        return assert!(status.success(), "{status}");
    }
    const SEGMENTS: u64 = 16;
    let mut full = Full::new(Setup { size: MOST * SEGMENTS, ..Setup::default() });
    let sectors = MOST / 512;
    let segments = (0..SEGMENTS).flat_map(|n| [(n * sectors).to_le_bytes(), sectors.to_le_bytes()].concat());
    full.guest.memory.write(DATA, &segments.collect::<Vec<u8>>());
    let before = memory_use().anonymous;
    full.fill((T_DISCARD, 0), 16 * SEGMENTS);
    let most = full.drain(RING);
    assert_eq!(full.raw.status_of(&full.guest.memory, 0), OK);
    grew("discards", before, most);
    assert_eq!(full.rig.volume.io().zeroes, u64::from(RING) * SEGMENTS);
}
