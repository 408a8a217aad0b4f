// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The whole room against a byte vector, through crashes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

use crate::core::chunk::ChunkState;
use crate::core::geometry::ChunkId;
use crate::engine::sim::SimFault;
use crate::engine::{IoBuf, SimDisk};
use crate::store::{BootId, StateDir, Store, StoreParams};
use crate::volume::testing::{CHUNK, Daemon, Disk};
use crate::volume::*;
use proptest::prelude::*;
use std::sync::Arc;

const SECTOR: usize = 512;
/// Five chunks and an odd rest.
const SIZE: usize = 5 * CHUNK as usize + 9 * SECTOR;
const SECTORS: usize = SIZE / SECTOR;

#[derive(Debug, Clone)]
enum Access {
    Read(usize, usize),
    Write(usize, usize),
    Zero(usize, usize, bool),
    Flush,
}

#[derive(Debug, Clone)]
enum Step {
    /// All at once, as far as they do not overlap.
    Batch(Vec<Access>),
    /// The companion fills a chunk that nobody asked for.
    Fetch(u32),
    /// kill -9.
    Kill,
    /// The host goes down.
    Crash,
}

/// Mostly small, sometimes several chunks, often at the borders of chunks and blocks.
fn range() -> impl Strategy<Value = (usize, usize)> {
    let chunk = CHUNK as usize / SECTOR;
    prop_oneof![
        4 => (0..SECTORS, 1usize..20),
        2 => (0usize..6, 0usize..3).prop_map(move |(n, d)| ((n * chunk).saturating_sub(d), 2 * d + 1)),
        2 => (0usize..6).prop_map(move |n| (n * chunk, chunk)),
        1 => (0..SECTORS, 1usize..3 * chunk),
    ]
    .prop_map(|(start, len)| {
        let start = start.min(SECTORS - 1);
        (start, len.clamp(1, SECTORS - start))
    })
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        3 => range().prop_map(|(start, len)| Access::Read(start, len)),
        5 => range().prop_map(|(start, len)| Access::Write(start, len)),
        2 => (range(), any::<bool>()).prop_map(|((start, len), unmap)| Access::Zero(start, len, unmap)),
        1 => Just(Access::Flush),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => prop::collection::vec(access(), 1..8).prop_map(Step::Batch),
        2 => (0u32..6).prop_map(Step::Fetch),
        1 => Just(Step::Kill),
        1 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..25)
}

/// A disk of sectors that are each filled with one number, beside the truth.
struct Oracle {
    now: Vec<u32>,
    /// What each sector has been since the last flush, the flushed value included.
    since: Vec<Vec<u32>>,
    next: u32,
}

fn fill(numbers: impl Iterator<Item = u32>) -> Vec<u8> {
    numbers.flat_map(|number| number.to_le_bytes().repeat(SECTOR / 4)).collect()
}

fn numbers(bytes: &[u8]) -> Vec<u32> {
    let number = |sector: &[u8]| {
        let first = u32::from_le_bytes(sector[..4].try_into().unwrap());
        assert!(sector.chunks(4).all(|word| word == first.to_le_bytes()), "a torn sector");
        first
    };
    bytes.chunks(SECTOR).map(number).collect()
}

/// The number of a base image's sector.
fn based(sector: usize) -> u32 {
    0x8000_0000 | sector as u32
}

impl Oracle {
    fn new(base_sectors: usize) -> Self {
        let now: Vec<u32> = (0..SECTORS).map(|n| if n < base_sectors { based(n) } else { 0 }).collect();
        Self { since: now.iter().map(|n| vec![*n]).collect(), now, next: 1 }
    }

    fn set(&mut self, start: usize, values: impl Iterator<Item = u32>) {
        for (sector, value) in (start..).zip(values) {
            self.now[sector] = value;
            self.since[sector].push(value);
        }
    }

    fn flushed(&mut self) {
        self.since = self.now.iter().map(|n| vec![*n]).collect();
    }

    fn batch(&mut self, daemon: &mut Daemon, accesses: &[Access]) {
        let mut taken = vec![false; SECTORS];
        let mut reads = Vec::new();
        for access in accesses {
            let (start, len) = match *access {
                Access::Read(start, len) | Access::Write(start, len) | Access::Zero(start, len, _) => {
                    (start, len)
                }
                Access::Flush => {
                    daemon.flush();
                    continue;
                }
            };
            if taken[start..start + len].iter().any(|taken| *taken) {
                continue;
            }
            taken[start..start + len].fill(true);
            let offset = (start * SECTOR) as u64;
            match access {
                Access::Write(..) => {
                    let first = self.next;
                    self.next += len as u32;
                    self.set(start, first..self.next);
                    daemon.write(offset, &fill(first..self.next));
                }
                Access::Zero(_, _, unmap) => {
                    self.set(start, std::iter::repeat_n(0, len));
                    daemon.zero(offset, (len * SECTOR) as u64, *unmap);
                }
                Access::Read(..) | Access::Flush => {
                    reads.push((start, len, daemon.read(offset, len * SECTOR).1))
                }
            }
        }
        daemon.settle();
        for (start, len, buf) in reads {
            assert_eq!(numbers(&buf.to_vec()), self.now[start..start + len], "sectors from {start}");
        }
        // A flush covers what had completed when it came: the batches before, at least.
        if matches!(accesses, [Access::Flush, ..]) && accesses.len() == 1 {
            self.flushed();
        }
    }

    fn after_crash(&mut self, daemon: &mut Daemon) {
        let found = numbers(&daemon.read_now(0, SIZE));
        for (sector, value) in found.iter().enumerate() {
            assert!(
                self.since[sector].contains(value),
                "sector {sector} is {value:#x}, and was {:#x?} since the last flush",
                self.since[sector]
            );
        }
        self.now = found;
        // Nothing has made this durable yet, and what was flushed still is.
    }

    fn check(&self, daemon: &mut Daemon) {
        assert_eq!(numbers(&daemon.read_now(0, SIZE)), self.now);
    }
}

fn run(base_sectors: Option<usize>, write_cache: bool, steps: &[Step]) {
    let base = base_sectors.map(|count| fill((0..count).map(based)));
    let mut disk = Disk::new(SIZE as u64, base);
    let options = VolumeOptions { read_only: false, write_cache };
    let mut daemon = disk.open_with(options);
    let mut oracle = Oracle::new(base_sectors.unwrap_or(0));
    for step in steps {
        match step {
            Step::Batch(accesses) => oracle.batch(&mut daemon, accesses),
            Step::Fetch(chunk) => daemon.fetch(ChunkId(*chunk)),
            Step::Kill => {
                drop(daemon);
                daemon = disk.open_with(options);
                oracle.check(&mut daemon);
            }
            Step::Crash => {
                drop(daemon);
                disk.crash();
                daemon = disk.open_with(options);
                if write_cache {
                    oracle.after_crash(&mut daemon);
                } else {
                    oracle.check(&mut daemon);
                }
            }
        }
    }
    oracle.check(&mut daemon);
    assert_eq!(daemon.volume.fault(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn behaves_like_bytes_over_a_base(steps in steps(), sectors in 1usize..SECTORS) {
        run(Some(sectors), true, &steps);
    }

    #[test]
    fn behaves_like_bytes_without_a_base(steps in steps()) {
        run(None, true, &steps);
    }

    #[test]
    fn write_through_survives_every_crash(steps in steps(), base in prop::option::of(1usize..SECTORS)) {
        run(base, false, &steps);
    }
}

#[test]
fn t13_a_discard_does_not_bring_the_base_back() {
    let mut disk = Disk::new(SIZE as u64, Some(fill((0..SECTORS).map(based))));
    let mut daemon = disk.open();
    daemon.zero(0, u64::from(CHUNK), true);
    daemon.settle();
    assert_eq!(daemon.volume.state(ChunkId(0)), Some(ChunkState::Zero));
    daemon.write_now(0, &[7; SECTOR]);
    daemon.flush();
    daemon.settle();
    drop(daemon);
    disk.crash();
    let mut daemon = disk.open();
    let found = daemon.read_now(0, CHUNK as usize);
    assert_eq!(found[..SECTOR], [7; SECTOR]);
    assert!(found[SECTOR..].iter().all(|byte| *byte == 0));
}

#[test]
fn t15_a_flush_makes_data_and_map_survive_the_host() {
    let mut disk = Disk::new(SIZE as u64, Some(fill((0..SECTORS).map(based))));
    let mut daemon = disk.open();
    daemon.write_now(0, &fill(1..300));
    daemon.flush();
    daemon.settle();
    // Acknowledged but not flushed: a kill keeps it, a crash of the host may not.
    daemon.write_now(4 * u64::from(CHUNK), &fill(1000..1010));
    drop(daemon);
    let mut daemon = disk.open();
    assert_eq!(
        numbers(&daemon.read_now(4 * u64::from(CHUNK), 10 * SECTOR)),
        (1000..1010).collect::<Vec<_>>()
    );
    drop(daemon);
    disk.crash();
    let mut daemon = disk.open();
    assert_eq!(numbers(&daemon.read_now(0, 299 * SECTOR)), (1..300).collect::<Vec<_>>());
}

#[test]
fn a_closed_gate_holds_requests_and_a_closed_flush_gate_flushes() {
    let disk = Disk::new(SIZE as u64, None);
    let mut daemon = disk.open();
    daemon.volume.gate().close(Closed::Prepared);
    let write = daemon.write(0, &[1; SECTOR]);
    assert!(daemon.turn().is_empty());
    assert_eq!((daemon.port.outstanding(), daemon.port.in_flight()), (1, 0));
    assert_eq!(daemon.volume.gate().reason(), Some(Closed::Prepared));
    daemon.volume.flush_gate().close();
    daemon.volume.gate().open();
    let flush = daemon.flush();
    let mut done = Vec::new();
    while done.is_empty() {
        done = daemon.turn();
    }
    assert_eq!(done, [(write, Status::Ok)]);
    assert!(daemon.turn().is_empty());
    daemon.volume.flush_gate().open();
    let mut done = Vec::new();
    while done.is_empty() {
        done = daemon.turn();
    }
    assert_eq!(done, [(flush, Status::Ok)]);
    daemon.volume.flush_gate().close();
    let flush = daemon.flush();
    daemon.port.fail_parked(Status::IoError);
    assert_eq!(daemon.turn(), [(flush, Status::IoError)]);
}

#[test]
fn t27_a_flush_gate_that_fails_answers_what_it_held_and_holds_again() {
    let disk = Disk::new(SIZE as u64, None);
    let mut daemon = disk.open();
    let wait = |daemon: &mut Daemon| loop {
        let done = daemon.turn();
        if !done.is_empty() {
            return done;
        }
    };
    daemon.volume.flush_gate().fail();
    assert!(daemon.volume.flush_gate().is_open(), "what is open stays open");
    daemon.volume.flush_gate().close();
    let held = daemon.flush();
    assert!(daemon.turn().is_empty());
    daemon.volume.flush_gate().fail();
    assert_eq!(wait(&mut daemon), [(held, Status::IoError)]);
    let refused = daemon.flush();
    assert_eq!(wait(&mut daemon), [(refused, Status::IoError)]);
    daemon.volume.flush_gate().hold_again();
    let held = daemon.flush();
    assert!(daemon.turn().is_empty());
    daemon.volume.flush_gate().open();
    assert_eq!(wait(&mut daemon), [(held, Status::Ok)]);
    daemon.volume.flush_gate().hold_again();
    assert!(daemon.volume.flush_gate().is_open());
}

#[test]
fn what_a_guest_may_not_ask_is_refused() {
    let disk = Disk::new(SIZE as u64, None);
    let daemon = disk.open_with(VolumeOptions { read_only: true, write_cache: true });
    let buf = |len| crate::engine::IoBuf::zeroed(len);
    let refused = |result: Result<Request, Rejected>| {
        let rejected = result.expect_err("it is refused");
        assert_eq!(rejected.status, Status::IoError);
        rejected.token.spend();
    };
    let volume = &daemon.volume;
    refused(Request::read(volume, 1, buf(SECTOR), Token::new(0)));
    refused(Request::read(volume, 0, buf(SECTOR - 1), Token::new(0)));
    refused(Request::read(volume, 0, buf(0), Token::new(0)));
    refused(Request::read(volume, SIZE as u64, buf(SECTOR), Token::new(0)));
    refused(Request::read(volume, u64::MAX - 511, buf(SECTOR), Token::new(0)));
    refused(Request::write(volume, 0, buf(SECTOR), Token::new(0)));
    refused(Request::zero(volume, 0, SECTOR as u64, true, Token::new(0)));
}

fn finished(daemon: &mut Daemon, count: usize) -> Vec<(u64, Status)> {
    let mut done = Vec::new();
    while done.len() < count {
        done.extend(daemon.turn());
    }
    done
}

#[test]
fn the_first_error_of_a_piece_is_the_status_and_the_state_stays() {
    let disk = Disk::new(SIZE as u64, None);
    let mut daemon = disk.open();
    daemon.write_now(0, &fill(1..257));
    let layer = std::fs::File::options().write(true).open(disk.layer()).unwrap();
    layer.set_len(u64::from(CHUNK)).unwrap();
    // The first piece can be read, the second has lost its bytes, the third is zeros.
    let (read, buf) = daemon.read(0, 3 * CHUNK as usize);
    assert_eq!(finished(&mut daemon, 1), [(read, Status::IoError)]);
    assert_eq!(numbers(&buf.to_vec()[..CHUNK as usize]), (1..129).collect::<Vec<_>>());
    assert_eq!(daemon.volume.state(ChunkId(1)), Some(ChunkState::Modified));
    assert_eq!((daemon.volume.io().errors, daemon.volume.io().reads), (1, 1));
    layer.set_len(SIZE as u64).unwrap();
    daemon.write_now(u64::from(CHUNK), &fill(1..2));
    assert_eq!(numbers(&daemon.read_now(u64::from(CHUNK), SECTOR)), [1]);
}

#[test]
fn t27_whoever_waits_for_a_lost_source_can_be_failed_and_others_go_on() {
    let disk = Disk::new(SIZE as u64, None);
    let mut daemon = disk.open();
    daemon.runtime.block_on(daemon.transfer.mark_remote(ChunkId(0), 2)).unwrap();
    let (first, _) = daemon.read(0, SECTOR);
    let (second, _) = daemon.read(u64::from(CHUNK), SECTOR);
    let third = daemon.write(2 * u64::from(CHUNK), &fill(1..2));
    assert_eq!(finished(&mut daemon, 1), [(third, Status::Ok)]);
    assert_eq!(daemon.transfer.fail_waiters(ChunkId(0)), 1);
    assert_eq!(finished(&mut daemon, 1), [(first, Status::IoError)]);
    daemon.port.fail_parked(Status::IoError);
    assert_eq!(finished(&mut daemon, 1), [(second, Status::IoError)]);
    assert_eq!((daemon.port.outstanding(), daemon.port.in_flight()), (0, 0));
    // Asked again, it is demanded again.
    let (again, _) = daemon.read(0, SECTOR);
    daemon.seen.clear();
    daemon.turn();
    assert_eq!(daemon.seen, [VolumeEvent::Demand { chunk: ChunkId(0), origin: Origin::Source }]);
    daemon.port.fail_parked(Status::IoError);
    assert_eq!(finished(&mut daemon, 1), [(again, Status::IoError)]);
}

#[test]
fn a_bell_is_heard_by_a_sleeping_queue() {
    let disk = Disk::new(SIZE as u64, None);
    let mut daemon = disk.open();
    let waker = daemon.port.waker();
    let ringer = std::thread::spawn(move || waker.wake());
    let mut heard = false;
    while !heard {
        daemon.port.wait(1, None).unwrap();
        while let Some(event) = daemon.port.next() {
            heard |= matches!(event, PortEvent::Woken);
        }
    }
    ringer.join().unwrap();
}

#[test]
fn what_nobody_has_written_is_read_from_the_base_image_and_not_copied() {
    use std::os::unix::fs::MetadataExt;
    let base: Vec<u8> = fill((0..3 * CHUNK as usize / SECTOR).map(based));
    // The image ends inside the third chunk, not at a page.
    let end = 2 * CHUNK as usize + 7 * SECTOR;
    let disk = Disk::new(4 * u64::from(CHUNK), Some(base[..end].to_vec()));
    let mut daemon = disk.open();
    assert!(daemon.read_now(0, 2 * CHUNK as usize) == base[..2 * CHUNK as usize]);
    assert!(
        daemon.read_now(u64::from(CHUNK) - 512, 1024) == base[CHUNK as usize - 512..CHUNK as usize + 512]
    );
    for chunk in 0..2 {
        assert_eq!(daemon.volume.state(ChunkId(chunk)), Some(ChunkState::Base));
    }
    assert_eq!(std::fs::metadata(disk.layer()).unwrap().blocks(), 0, "nothing is copied");
    // A block that was written is read from the layer, its neighbours from the image, both together after a fill.
    daemon.write_now(4096, &[9; 4096]);
    assert!(daemon.read_now(4096, 4096) == [9; 4096]);
    assert!(daemon.read_now(8192, 4096) == base[8192..12288]);
    assert_eq!(daemon.volume.state(ChunkId(0)), Some(ChunkState::Base));
    let mut expected = base[..CHUNK as usize].to_vec();
    expected[4096..8192].fill(9);
    assert!(daemon.read_now(0, CHUNK as usize) == expected);
    // Across the end of the image, and past it.
    let mut tail = base[end - 1024..end].to_vec();
    tail.resize(4096, 0);
    assert!(daemon.read_now((end - 1024) as u64, 4096) == tail);
    assert!(daemon.read_now(3 * u64::from(CHUNK), 4096) == [0; 4096]);
}

#[test]
fn a_long_request_has_few_pieces_at_a_time() {
    const CHUNKS: u64 = 200;
    let disk = Disk::new(CHUNKS * u64::from(CHUNK), None);
    let mut daemon = disk.open();
    let len = (CHUNKS * u64::from(CHUNK)) as usize;
    let content = fill((0..len / SECTOR).map(|n| n as u32));
    daemon.write(0, &content);
    let mut most = daemon.port.pieces.len();
    while daemon.port.outstanding() > 0 {
        for (_, status) in daemon.turn() {
            assert_eq!(status, Status::Ok);
        }
        most = most.max(daemon.port.pieces.len());
    }
    assert_eq!(most, super::WINDOW as usize);
    assert!(daemon.read_now(0, len) == content);
    daemon.zero(0, len as u64, true);
    daemon.settle();
    // All pieces of this one end at once, without the disk.
    assert!(daemon.read_now(0, len).iter().all(|byte| *byte == 0));
}

#[test]
fn an_error_of_the_file_has_its_status() {
    let status = |errno| super::pieces::status_of(&Err(std::io::Error::from_raw_os_error(errno)));
    for errno in [libc::EIO, libc::ENOSPC, libc::EFAULT, libc::EDQUOT, libc::EINVAL] {
        assert_eq!(status(errno), Status::IoError);
    }
    assert_eq!(status(libc::EOPNOTSUPP), Status::Unsupported);
    assert_eq!(super::pieces::status_of(&Err(std::io::ErrorKind::UnexpectedEof.into())), Status::IoError);
    assert_eq!(super::pieces::status_of(&Ok(())), Status::Ok);
}

#[test]
fn a_port_that_is_dropped_spends_the_tokens_of_what_it_leaves_unanswered() {
    let disk = Disk::new(u64::from(CHUNK), None);
    let mut daemon = disk.open();
    // Nobody logs in this process: what a log line would have done is not done.
    daemon.write(0, &[1; 4096]);
    daemon.volume.gate().close(Closed::Offered);
    daemon.read(0, 4096);
    drop(daemon);
    // An unspent token would have failed this test.
    let mut daemon = disk.open();
    assert_eq!(daemon.read_now(0, 4096), [1; 4096]);
}

/// Lets a simulated disk carry out what a port has begun; statuses in their order.
fn drive(disk: &SimDisk, port: &mut Port) -> Vec<Status> {
    let mut statuses = Vec::new();
    loop {
        port.wait(0, None).unwrap();
        while let Some(event) = port.next() {
            if let PortEvent::Completed { token, status, .. } = event {
                token.spend();
                statuses.push(status);
            }
        }
        let Some(due) = disk.next_due() else { return statuses };
        disk.advance(due);
    }
}

#[test]
fn a_write_whose_claim_cannot_be_noted_does_not_come_back_when_its_neighbour_is_written() {
    let disk = SimDisk::new(1);
    let params =
        StoreParams { size: Some(u64::from(CHUNK)), chunk_size: Some(CHUNK), ..StoreParams::default() };
    let store = Store::open_at_boot(StateDir::simulated(&disk, None), &params, BootId([1; 16])).unwrap();
    let options = VolumeOptions { read_only: false, write_cache: true };
    let (volume, _events) = Volume::open(store, options, Box::new(|| {})).unwrap();
    volume.gate().open();
    let mut port = Port::new(Arc::clone(&volume), 0).unwrap();
    let write = |port: &mut Port, offset, len| {
        let buf = IoBuf::copy_of(&vec![7; len]);
        port.submit(Request::write(&volume, offset, buf, Token::new(1)).unwrap());
        drive(&disk, port)
    };
    // The first change is that of the layer, the second the note in the journal.
    disk.fail_at(2, SimFault::Errno(libc::EIO));
    assert_eq!(write(&mut port, 512, 2048), [Status::IoError]);
    assert_eq!(write(&mut port, 0, 512), [Status::Ok]);
    assert_eq!(write(&mut port, 2560, 512), [Status::Ok]);
    let buf = IoBuf::copy_of(&[0xee; 3072]);
    port.submit(Request::read(&volume, 0, buf.slice(0, 3072), Token::new(2)).unwrap());
    assert_eq!(drive(&disk, &mut port), [Status::Ok]);
    assert_eq!(buf.to_vec(), [vec![7; 512], vec![0; 2048], vec![7; 512]].concat());
}
