// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The verifying writer: proof from inside and outside the guest that no sector was lost.
//!
//! One program, four faces:
//! - `writer base`  (host)  makes the base image that both daemons read;
//! - `writer guest` (guest) does random I/O on the disk and remembers, for each sector, what it must hold;
//! - `writer dump`  (guest) copies the whole disk to a second one, so that the host can look at it;
//! - `writer check` (host)  holds such a copy against the record that the guest handed out.
//!
//! Every sector says what it is: magic, its own number, a stamp (the number of the write that made it), the
//! seed of the run, and a fill derived from all of these. So a wrong sector can be named: *stale* (an older
//! stamp), *misplaced* (another sector's number), *base reappeared* (stamp 0), *torn* (the header of one write
//! over the fill of another), *zeros* or *garbage*. A checksum alone could only say "wrong".
//!
//! The hazard in such a program is that two overlapping requests in flight have no defined order, so the
//! record could not say which one must be found. Workers therefore lock the sector range of each operation,
//! and only that: writes to neighbouring sectors of one block or chunk do run at the same time, which is what
//! the daemon must get right.
//!
//! Built by plain `rustc`, with no crate but std: it must build on the bare machine before anything else.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The largest single operation: 1 MiB.
const MAX_SECTORS: u64 = 2048;
const O_DIRECT: i32 = 0o40000;
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const BLKSSZGET: u64 = 0x1268;

mod sector;
use sector::{BASE, BASE_SEED, Plan, Rng, SECTOR, UNKNOWN, ZERO, fill, verify};

type Res<T> = Result<T, String>;

// ---------------------------------------------------------------- the disk

// SAFETY: the declaration is that of ioctl(2) in libc, which the target links.
unsafe extern "C" {
    fn ioctl(fd: c_int, request: u64, ...) -> c_int;
}

fn range_ioctl(disk: &File, request: u64, first: u64, count: u64) -> std::io::Result<()> {
    let range = [first * SECTOR as u64, count * SECTOR as u64];
    // SAFETY: BLKDISCARD and BLKZEROOUT read two u64 at the pointer, which `range` provides for the whole call;
    // the descriptor is open as long as `disk` is borrowed.
    let rc = unsafe { ioctl(disk.as_raw_fd(), request, range.as_ptr()) };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Logical block size of a block device; 512 for a plain file.
fn logical_block(disk: &File) -> u64 {
    let mut size: c_int = 0;
    // SAFETY: BLKSSZGET writes one int at the pointer, which `size` provides for the whole call.
    let rc = unsafe { ioctl(disk.as_raw_fd(), BLKSSZGET, std::ptr::from_mut(&mut size)) };
    if rc == 0 { u64::try_from(size).unwrap_or(512).max(512) } else { 512 }
}

fn open(path: &str, write: bool, flags: i32) -> Res<File> {
    let made = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    made.map_err(|e| format!("open {path}: {e}"))
}

fn sectors_of(disk: &mut File) -> Res<u64> {
    use std::io::{Seek, SeekFrom};
    disk.seek(SeekFrom::End(0)).map(|n| n / SECTOR as u64).map_err(|e| format!("size: {e}"))
}

/// A buffer whose start is aligned for O_DIRECT.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new(len: usize) -> Self {
        let store = vec![0; len + 4096];
        let offset = store.as_ptr().align_offset(4096);
        Self(store, offset)
    }
    fn get(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[self.1..self.1 + len]
    }
}

// ---------------------------------------------------------------- the run in the guest

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sector ranges with an operation in flight.
#[derive(Default)]
struct Ranges {
    busy: Mutex<Vec<(u64, u64)>>,
    freed: Condvar,
}

impl Ranges {
    fn take(&self, first: u64, count: u64) {
        let end = first + count;
        let mut busy = lock(&self.busy);
        while busy.iter().any(|(a, b)| *a < end && first < *b) {
            busy = self.freed.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        busy.push((first, end));
    }
    fn give(&self, first: u64, count: u64) {
        lock(&self.busy).retain(|r| *r != (first, first + count));
        self.freed.notify_all();
    }
}

struct Shared {
    plan: Plan,
    /// Expected stamp of each sector. A worker changes only sectors whose range it holds.
    record: Vec<AtomicU32>,
    ranges: Ranges,
    port: Mutex<File>,
    stamp: AtomicU32,
    stop: AtomicBool,
    start: Instant,
    ios: AtomicU64,
    written: AtomicU64,
    verified: AtomicU64,
    wrong: AtomicU64,
    /// Guest time (ns) of the last completion, and the longest gap seen (us) since it was last reported.
    last_ns: AtomicU64,
    gap_us: AtomicU64,
    no_discard: AtomicBool,
}

impl Shared {
    fn say(&self, line: &str) {
        // The port is the only way out: if it fails, nobody could be told.
        let _ = lock(&self.port).write_all(format!("{line}\n").as_bytes());
    }
    fn wrong(&self, lines: &[String]) {
        let before = self.wrong.fetch_add(lines.len() as u64, Ordering::Relaxed);
        for line in lines.iter().take(40u64.saturating_sub(before) as usize) {
            self.say(line);
        }
    }
    fn done_io(&self) {
        let now = self.start.elapsed().as_nanos() as u64;
        let before = self.last_ns.swap(now, Ordering::Relaxed);
        self.gap_us.fetch_max(now.saturating_sub(before) / 1000, Ordering::Relaxed);
        self.ios.fetch_add(1, Ordering::Relaxed);
    }
    fn set(&self, first: u64, count: u64, stamp: u32) {
        for slot in &self.record[first as usize..(first + count) as usize] {
            slot.store(stamp, Ordering::Relaxed);
        }
    }
    fn stamps(&self, first: u64, count: u64) -> Vec<u32> {
        let slots = &self.record[first as usize..(first + count) as usize];
        slots.iter().map(|s| s.load(Ordering::Relaxed)).collect()
    }
}

struct Worker {
    shared: Arc<Shared>,
    disk: File,
    rng: Rng,
    buffer: Aligned,
    unit: u64,
    pace: Duration,
}

impl Worker {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            match self.rng.below(100) {
                0..=54 => self.write(),
                55..=86 => self.read(),
                87..=90 => self.zero(BLKDISCARD),
                91..=94 => self.zero(BLKZEROOUT),
                _ => self.flush(),
            }
            if !self.pace.is_zero() {
                std::thread::sleep(self.pace);
            }
        }
    }

    /// Sectors of one operation, in units of the logical block: mostly small, seldom up to 1 MiB.
    fn length(&mut self) -> u64 {
        let n = match self.rng.below(100) {
            0..=29 => 1 + self.rng.below(8),
            30..=69 => 8 * (1 + self.rng.below(8)),
            70..=94 => 1 + self.rng.below(512),
            _ => 512 + self.rng.below(MAX_SECTORS - 511),
        };
        n.div_ceil(self.unit) * self.unit
    }

    fn place(&mut self, from: u64, to: u64) -> (u64, u64) {
        let count = self.length().min(to - from);
        let first = from + self.rng.below(to - from - count + 1) / self.unit * self.unit;
        (first, count)
    }

    /// Where to write: half of the writes hit a hot 1/64 of the disk, so that its chunks pass any threshold;
    /// the last quarter is never written, so that base content is still there at the end.
    fn write_place(&mut self) -> (u64, u64) {
        let n = self.shared.plan.sectors / 512 * 512;
        if self.rng.below(2) == 0 { self.place(n / 4, n / 4 + n / 64) } else { self.place(0, n / 4 * 3) }
    }

    fn write(&mut self) {
        let (first, count) = self.write_place();
        let shared = Arc::clone(&self.shared);
        let stamp = shared.stamp.fetch_add(1, Ordering::Relaxed);
        let data = self.buffer.get(count as usize * SECTOR);
        for (out, sector) in data.chunks_exact_mut(SECTOR).zip(first..) {
            fill(out, sector, stamp, shared.plan.seed);
        }
        shared.ranges.take(first, count);
        let result = self.disk.write_all_at(data, first * SECTOR as u64);
        self.settle("write", result, first, count, stamp);
        shared.written.fetch_add(count, Ordering::Relaxed);
    }

    fn zero(&mut self, request: u64) {
        let discard = request == BLKDISCARD;
        if discard && self.shared.no_discard.load(Ordering::Relaxed) {
            return self.read();
        }
        let (first, count) = self.write_place();
        self.shared.ranges.take(first, count);
        let result = range_ioctl(&self.disk, request, first, count);
        if discard && result.as_ref().is_err_and(|e| e.raw_os_error() == Some(95)) {
            self.shared.ranges.give(first, count);
            if !self.shared.no_discard.swap(true, Ordering::Relaxed) {
                self.shared.say("note discard is not offered by the device");
            }
            return;
        }
        self.settle(if discard { "discard" } else { "zeroout" }, result, first, count, ZERO);
    }

    /// Records what the range now holds and lets it go.
    fn settle(&self, what: &str, result: std::io::Result<()>, first: u64, count: u64, stamp: u32) {
        let failed = result.is_err();
        self.shared.set(first, count, if failed { UNKNOWN } else { stamp });
        self.shared.ranges.give(first, count);
        if let Err(e) = result {
            self.shared.wrong(&[format!("WRONG {what} sector={first} count={count} error={e}")]);
        }
        self.shared.done_io();
    }

    fn read(&mut self) {
        let (n, hot) = (self.shared.plan.sectors / self.unit * self.unit, self.rng.below(3) == 0);
        let (first, count) = if hot { self.write_place() } else { self.place(0, n) };
        let shared = Arc::clone(&self.shared);
        let data = self.buffer.get(count as usize * SECTOR);
        shared.ranges.take(first, count);
        let result = self.disk.read_exact_at(data, first * SECTOR as u64);
        let stamps = shared.stamps(first, count);
        shared.ranges.give(first, count);
        shared.done_io();
        match result {
            Ok(()) => shared.wrong(&verify(data, first, &stamps, &shared.plan)),
            Err(e) => shared.wrong(&[format!("WRONG read sector={first} count={count} error={e}")]),
        }
        shared.verified.fetch_add(count, Ordering::Relaxed);
    }

    fn flush(&self) {
        if let Err(e) = self.disk.sync_data() {
            self.shared.wrong(&[format!("WRONG flush error={e}")]);
        }
        self.shared.done_io();
    }
}

/// Every 10 ms one line, so that the host can see a pause on its own clock. A paused guest cannot: the
/// clock of a stopped virtual machine stands still.
fn report(shared: &Shared) {
    while !shared.stop.load(Ordering::Relaxed) {
        let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
        shared.say(&format!(
            "beat ios={} written={} verified={} wrong={} gap_us={}",
            get(&shared.ios),
            get(&shared.written),
            get(&shared.verified),
            get(&shared.wrong),
            shared.gap_us.swap(0, Ordering::Relaxed),
        ));
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Blocks until the host says `stop`. The port reads as ended while no host is connected: ask again.
fn wait_for_stop(port: File) {
    let mut lines = BufReader::new(port);
    let mut line = String::new();
    loop {
        match lines.read_line(&mut line) {
            Ok(n) if n > 0 && line.ends_with('\n') => {
                if line.trim() == "stop" {
                    return;
                }
                line.clear();
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn guest(args: &Args) -> Res<()> {
    let path = args.text("disk")?;
    let mut disk = open(&path, true, O_DIRECT)?;
    let unit = logical_block(&disk) / SECTOR as u64;
    let sectors = sectors_of(&mut disk)?;
    let plan =
        Plan { sectors, base_sectors: args.number("base-sectors")?.min(sectors), seed: args.number("seed")? };
    let port_path = args.text("port")?;
    let shared = Arc::new(Shared {
        plan,
        record: (0..sectors).map(|s| AtomicU32::new(plan.initial(s))).collect(),
        ranges: Ranges::default(),
        port: Mutex::new(open(&port_path, true, 0)?),
        stamp: AtomicU32::new(1),
        stop: AtomicBool::new(false),
        start: Instant::now(),
        ios: AtomicU64::new(0),
        written: AtomicU64::new(0),
        verified: AtomicU64::new(0),
        wrong: AtomicU64::new(0),
        last_ns: AtomicU64::new(0),
        gap_us: AtomicU64::new(0),
        no_discard: AtomicBool::new(false),
    });
    let control = lock(&shared.port).try_clone().map_err(|e| format!("port: {e}"))?;
    shared.say(&format!("ready sectors={sectors} unit={} seed={}", unit * SECTOR as u64, plan.seed));
    let mut threads = Vec::new();
    for id in 0..args.number("workers")?.max(1) {
        let worker = Worker {
            shared: Arc::clone(&shared),
            disk: open(&path, true, O_DIRECT)?,
            rng: Rng::new(plan.seed ^ (id << 32)),
            buffer: Aligned::new(MAX_SECTORS as usize * SECTOR),
            unit,
            pace: Duration::from_micros(args.number("pace-us")?),
        };
        threads.push(std::thread::spawn(move || worker.run()));
    }
    let reporter = Arc::clone(&shared);
    threads.push(std::thread::spawn(move || report(&reporter)));
    wait_for_stop(control);
    shared.stop.store(true, Ordering::Relaxed);
    for thread in threads {
        if thread.join().is_err() {
            shared.wrong(&["WRONG a worker died: see the console".into()]);
        }
    }
    if let Err(e) = disk.sync_all() {
        shared.wrong(&[format!("WRONG final flush error={e}")]);
    }
    hand_out_record(&shared);
    Ok(())
}

/// The record as runs of equal stamps, in hex, closed by a count of the runs: a lost line is noticed.
fn hand_out_record(shared: &Shared) {
    let plan = &shared.plan;
    let mut text =
        format!("record sectors={} base-sectors={} seed={}\n", plan.sectors, plan.base_sectors, plan.seed);
    let stamps = shared.stamps(0, plan.sectors);
    let mut runs = 0;
    let mut first = 0;
    for run in stamps.chunk_by(|a, b| a == b) {
        text.push_str(&format!("r {first:x} {:x} {:x}\n", run.len(), run[0]));
        first += run.len();
        runs += 1;
    }
    let wrong = shared.wrong.load(Ordering::Relaxed);
    text.push_str(&format!("end runs={runs}\n"));
    text.push_str(&format!("done blocks={} wrong={wrong}", shared.verified.load(Ordering::Relaxed)));
    shared.say(&text);
}

/// Copies all of one disk to another, front to back, past the page cache.
fn dump(args: &Args) -> Res<()> {
    let mut from = open(&args.text("from")?, false, O_DIRECT)?;
    let to = open(&args.text("to")?, true, O_DIRECT)?;
    let mut port = open(&args.text("port")?, true, 0)?;
    let sectors = sectors_of(&mut from)?;
    let mut buffer = Aligned::new(MAX_SECTORS as usize * SECTOR);
    let mut at = 0;
    while at < sectors {
        let count = MAX_SECTORS.min(sectors - at);
        let data = buffer.get(count as usize * SECTOR);
        from.read_exact_at(data, at * SECTOR as u64).map_err(|e| format!("read sector {at}: {e}"))?;
        to.write_all_at(data, at * SECTOR as u64).map_err(|e| format!("copy sector {at}: {e}"))?;
        at += count;
    }
    to.sync_all().map_err(|e| format!("sync of the copy: {e}"))?;
    port.write_all(format!("dumped sectors={sectors}\n").as_bytes()).map_err(|e| format!("port: {e}"))
}

// ---------------------------------------------------------------- the host's side

fn base(args: &Args) -> Res<()> {
    let path = args.text("out")?;
    let sectors = args.number("size")? / SECTOR as u64;
    let plan = Plan { sectors, base_sectors: sectors, seed: BASE_SEED };
    let file = File::create(&path).map_err(|e| format!("create {path}: {e}"))?;
    file.set_len(sectors * SECTOR as u64).map_err(|e| format!("{path}: {e}"))?;
    let mut data = vec![0; MAX_SECTORS as usize * SECTOR];
    for first in (0..sectors).step_by(MAX_SECTORS as usize) {
        let count = MAX_SECTORS.min(sectors - first) as usize;
        for (out, sector) in data.chunks_exact_mut(SECTOR).zip(first..).take(count) {
            fill(out, sector, plan.initial(sector), BASE_SEED);
        }
        let data = &data[..count * SECTOR];
        if data.iter().any(|b| *b != 0) {
            file.write_all_at(data, first * SECTOR as u64).map_err(|e| format!("{path}: {e}"))?;
        }
    }
    println!("base {sectors} sectors");
    Ok(())
}

/// Reads a record back: the plan, and one stamp a sector.
fn read_record(path: &str) -> Res<(Plan, Vec<u32>)> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let mut lines = text.lines();
    let head = Args::parse(lines.next().unwrap_or_default().split(' ').skip(1).map(|w| format!("--{w}")))?;
    let plan = Plan {
        sectors: head.number("sectors")?,
        base_sectors: head.number("base-sectors")?,
        seed: head.number("seed")?,
    };
    let (mut stamps, mut runs) = (Vec::new(), 0u64);
    for line in lines {
        if let Some(end) = line.strip_prefix("end runs=") {
            let whole = end.parse() == Ok(runs) && stamps.len() as u64 == plan.sectors;
            return if whole { Ok((plan, stamps)) } else { Err(format!("{path}: lines are missing")) };
        }
        let fields: Vec<_> = line.split(' ').skip(1).map(|w| u64::from_str_radix(w, 16)).collect();
        match fields.as_slice() {
            [Ok(first), Ok(count), Ok(stamp)]
                if *first == stamps.len() as u64 && first + count <= plan.sectors =>
            {
                let stamp = u32::try_from(*stamp).map_err(|e| format!("{path}: {e}"))?;
                stamps.resize((first + count) as usize, stamp);
            }
            _ => return Err(format!("{path}: not a line of a record: {line}")),
        }
        runs += 1;
    }
    Err(format!("{path}: the record has no end"))
}

fn check(args: &Args) -> Res<()> {
    let (plan, stamps) = read_record(&args.text("record")?)?;
    let path = args.text("image")?;
    let mut image = open(&path, false, 0)?;
    let sectors = sectors_of(&mut image)?;
    if sectors != plan.sectors {
        return Err(format!("{path} has {sectors} sectors, the guest's disk had {}", plan.sectors));
    }
    let (mut data, mut wrong) = (vec![0; MAX_SECTORS as usize * SECTOR], 0);
    let out = std::io::stdout();
    let mut out = BufWriter::new(out.lock());
    for (piece, first) in stamps.chunks(MAX_SECTORS as usize).zip((0..).step_by(MAX_SECTORS as usize)) {
        let data = &mut data[..piece.len() * SECTOR];
        image.read_exact_at(data, first * SECTOR as u64).map_err(|e| format!("{path}: {e}"))?;
        for line in verify(data, first, piece, &plan) {
            wrong += 1;
            if wrong <= 40 {
                let _ = writeln!(out, "{line}");
            }
        }
    }
    let kinds = |f: fn(u32) -> bool| stamps.iter().filter(|s| f(**s)).count();
    let (base, zero) = (kinds(|s| s == BASE), kinds(|s| s == ZERO));
    let _ = writeln!(out, "content base={base} zeros={zero} written={}", stamps.len() - base - zero);
    let _ = writeln!(out, "checked {sectors} sectors, {wrong} wrong");
    let _ = out.flush();
    if wrong == 0 { Ok(()) } else { Err(format!("{wrong} wrong sectors in {path}")) }
}

// ---------------------------------------------------------------- arguments

/// `--name value` or `--name=value`.
struct Args(BTreeMap<String, String>);

impl Args {
    fn parse(mut words: impl Iterator<Item = String>) -> Res<Self> {
        let mut map = BTreeMap::new();
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").ok_or_else(|| format!("not an option: {word}"))?;
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None => (name.to_owned(), words.next().ok_or_else(|| format!("--{name} needs a value"))?),
            };
            map.insert(name, value);
        }
        Ok(Self(map))
    }
    fn text(&self, name: &str) -> Res<String> {
        self.0.get(name).cloned().ok_or_else(|| format!("--{name} is missing"))
    }
    fn number(&self, name: &str) -> Res<u64> {
        let text = self.text(name)?;
        text.parse().map_err(|e| format!("--{name} {text}: {e}"))
    }
}

fn main() {
    let mut words = std::env::args().skip(1);
    let mode = words.next().unwrap_or_default();
    let args = Args::parse(words);
    let result = args.as_ref().map_err(Clone::clone).and_then(|args| match mode.as_str() {
        "guest" => guest(args),
        "dump" => dump(args),
        "base" => base(args),
        "check" => check(args),
        _ => Err("usage: writer guest|dump|base|check --name value ..".into()),
    });
    if let Err(e) = result {
        eprintln!("writer {mode}: {e}");
        // In the guest the host listens on the port, not on the console.
        if let Some(mut port) =
            args.ok().and_then(|a| a.text("port").ok()).and_then(|p| open(&p, true, 0).ok())
        {
            let _ = port.write_all(format!("FATAL {e}\n").as_bytes());
        }
        std::process::exit(1);
    }
}
