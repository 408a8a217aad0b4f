// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One run from the connection to the result.

use crate::cli::{Iops, Mode};
use crate::cpu::Sample;
use crate::front_end::{Disk, Negotiated, Refused};
use crate::load::{Load, Mix};
use crate::report::{Outcome, Report};
use crate::ring::Shape;
use crate::stats::Stats;
use crate::verify::Book;
use crate::worker::{Plan, Times, Window, Worker, share};
use anyhow::{Context, Result, bail};
use std::ops::Range;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Time for the threads to start before the clock counts.
const HEAD_START: u64 = 20_000_000;
const NANOS: f64 = 1e9;

/// Does what the command line says.
pub(crate) fn iops(args: &Iops) -> Result<Report> {
    let refused = Refused { event_idx: args.no_event_idx, indirect: args.no_indirect };
    let patience = Duration::from_secs_f64(args.connect_timeout);
    let negotiated = Negotiated::new(&args.socket_path, patience, &refused)?;
    let disk = negotiated.disk;
    let shape = shape(args, &disk)?;
    let blocks = blocks(args, &disk)?;
    let pid = args.pid.or(negotiated.peer);
    let (device, rings) = negotiated.start(shape, args.queues, args.hugepages)?;
    let run = rand::random();
    let mut workers = Vec::new();
    for (index, ring) in (0..args.queues).zip(rings) {
        workers.push(Worker::new(
            ring,
            args.iodepth,
            load(args, index, &blocks)?,
            args.verify.then(|| Book::new(run)),
            plan(args, index)?,
            &device.socket,
        )?);
    }
    let times = times(args);
    let window = measure(&mut workers, &times, pid)?;
    let final_flush = match workers.first_mut().filter(|_| args.final_flush) {
        Some(worker) => Some(worker.flush(&times)?),
        None => None,
    };
    if args.verify {
        before_verify(args)?;
        let each = |worker: &mut Worker| worker.sweep(&times);
        together(&mut workers, &AtomicBool::new(false), &each, || {})?;
    }
    let mut stats = Stats::new()?;
    for worker in &workers {
        stats.add(&worker.stats)?;
    }
    device.stop().context("stopping the rings")?;
    Report::new(
        args,
        &disk,
        &shape,
        Outcome { stats, seconds: window.seconds, backend: window.backend, pid, final_flush },
    )
}

/// What was measured around the threads.
struct Measured {
    seconds: f64,
    backend: Option<Duration>,
}

fn shape(args: &Iops, disk: &Disk) -> Result<Shape> {
    let block = u32::try_from(args.bs).context("--bs is too large")?;
    if block == 0 || block % disk.block_size != 0 {
        bail!("--bs {block} is no multiple of the disk's block size, {}", disk.block_size);
    }
    if block % u32::from(args.segments) != 0 || !(block / u32::from(args.segments)).is_multiple_of(512) {
        bail!("--bs {block} cannot be split into {} pieces of whole sectors", args.segments);
    }
    if u32::from(args.segments) > disk.seg_max {
        bail!("--segments {}: the back-end takes {} at most", args.segments, disk.seg_max);
    }
    if args.queues > disk.queues {
        bail!("--queues {}: the back-end has {}", args.queues, disk.queues);
    }
    let needed = if disk.indirect { args.iodepth } else { args.iodepth.saturating_mul(args.segments + 2) };
    let size = args.queue_size.unwrap_or_else(|| needed.clamp(128, 1024).next_power_of_two());
    if !size.is_power_of_two() {
        bail!("--queue-size {size} is no power of two");
    }
    let shape = Shape {
        size,
        slots: args.iodepth,
        block,
        segments: args.segments,
        event_idx: disk.event_idx,
        indirect: disk.indirect,
    };
    shape.check()?;
    if disk.read_only && args.reads() < 100 {
        bail!("the disk is read-only");
    }
    if (args.flush_every > 0 || args.final_flush) && !disk.flush {
        bail!("--flush-every, --final-flush: the back-end offers no flush");
    }
    if args.discard_pct > 0 && !disk.discard {
        bail!("--discard-pct: the back-end offers no discard");
    }
    Ok(shape)
}

/// The blocks that are used, by number.
fn blocks(args: &Iops, disk: &Disk) -> Result<Range<u64>> {
    if !args.offset.is_multiple_of(args.bs) {
        bail!("--offset is no multiple of --bs");
    }
    if args.stride.is_some_and(|stride| stride == 0 || !stride.is_multiple_of(args.bs)) {
        bail!("--stride is no multiple of --bs");
    }
    let rest = disk.size.saturating_sub(args.offset);
    let size = args.size.unwrap_or(rest);
    if size > rest {
        bail!("the disk ends at byte {}", disk.size);
    }
    let start = args.offset / args.bs;
    Ok(start..start + size / args.bs)
}

fn load(args: &Iops, index: u16, blocks: &Range<u64>) -> Result<Load> {
    let mix = Mix {
        access: args.access(),
        reads: args.reads(),
        discards: args.discard_pct,
        flush_every: args.flush_every,
    };
    let step = args.stride.unwrap_or(args.bs) / args.bs;
    // Whoever judges must be the only one that writes; and sequential streams begin at different places.
    let own = args.verify || mix.access == crate::load::Access::Sequential;
    let blocks = if own { share(blocks, index, args.queues) } else { blocks.clone() };
    Load::new(mix, blocks, step, args.seed.wrapping_mul(1_000_003).wrapping_add(u64::from(index)))
}

fn plan(args: &Iops, index: u16) -> Result<Plan> {
    let turn = usize::from(index).checked_rem(args.cpu.len());
    Ok(Plan {
        block: u32::try_from(args.bs)?,
        poll: args.mode == Mode::Poll,
        rate: args.rate.map(|rate| rate / f64::from(args.queues)),
        cpu: turn.and_then(|turn| args.cpu.get(turn).copied()),
        budget: args.requests.map(|requests| (requests / u64::from(args.queues)).max(1)),
    })
}

fn times(args: &Iops) -> Times {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // The command line keeps them small.
    let nanos = |seconds: f64| (seconds * NANOS) as u64;
    let from = if args.requests.is_some() { 0 } else { HEAD_START + nanos(args.ramp) };
    Times { zero: Instant::now(), measured: Window { from, to: from + nanos(args.runtime) } }
}

/// Runs the load and takes the back-end's processor time at both ends of the window.
fn measure(workers: &mut [Worker], times: &Times, pid: Option<u32>) -> Result<Measured> {
    let abort = AtomicBool::new(false);
    let each = |worker: &mut Worker| worker.run(times, &abort);
    let mut sampled = Duration::ZERO;
    let mut window = Measured { seconds: 0.0, backend: None };
    let running = AtomicUsize::new(workers.len());
    let each = |worker: &mut Worker| {
        let result = each(worker);
        running.fetch_sub(1, Ordering::Relaxed);
        result
    };
    let over = || running.load(Ordering::Relaxed) == 0;
    together(workers, &abort, &each, || {
        wait_until(times, times.measured.from, &over);
        let (from, before) = (times.now(), pid.and_then(|pid| Sample::of(pid).ok()));
        wait_until(times, times.measured.to, &over);
        let (to, after) = (times.now(), pid.and_then(|pid| Sample::of(pid).ok()));
        sampled = Duration::from_nanos(to.saturating_sub(from).max(1));
        window.backend = before.zip(after).map(|(before, after)| after.since(&before));
    })?;
    let ended = workers.iter().map(|worker| worker.ended).max().unwrap_or(0);
    window.seconds = Duration::from_nanos(ended.saturating_sub(times.measured.from)).as_secs_f64();
    // A load that ends with the time is sampled a little too long: bring it to the window's length.
    let excess = (window.seconds / sampled.as_secs_f64()).min(1.0);
    let counted = if workers.iter().any(|worker| worker.spent()) { 1.0 } else { excess };
    window.backend = window.backend.map(|time| time.mul_f64(counted));
    Ok(window)
}

fn wait_until(times: &Times, at: u64, over: &dyn Fn() -> bool) {
    while !over() {
        let left = at.saturating_sub(times.now());
        if left == 0 {
            return;
        }
        std::thread::sleep(Duration::from_nanos(left.min(10_000_000)));
    }
}

/// Lets all workers do something at the same time, and this thread something beside them. If one fails, the others
/// are told, and its error is the result.
fn together(
    workers: &mut [Worker],
    abort: &AtomicBool,
    each: &(dyn Fn(&mut Worker) -> Result<()> + Sync),
    beside: impl FnOnce(),
) -> Result<()> {
    std::thread::scope(|scope| {
        let spawned: Vec<_> = workers
            .iter_mut()
            .map(|worker| {
                scope.spawn(move || {
                    let result = each(worker);
                    if result.is_err() {
                        abort.store(true, Ordering::Relaxed);
                    }
                    result
                })
            })
            .collect();
        beside();
        let results = spawned.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        results.collect::<Vec<_>>().into_iter().collect()
    })
}

fn before_verify(args: &Iops) -> Result<()> {
    let Some(command) = &args.before_verify else { return Ok(()) };
    let status = Command::new("sh").arg("-c").arg(command).status().context("--before-verify")?;
    if !status.success() {
        bail!("--before-verify: {status}");
    }
    Ok(())
}
