// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Both sessions of a migration in a simulated world: seeded, on a virtual clock, with everything going wrong that
//! can. The sessions are the real ones; what is around them behaves as `node` and `volume` do.
//!
//! `BLKFERRY_SIM_SEEDS=n` runs n seeds, `BLKFERRY_SIM_SEED=s` replays one and prints its trace. A failing seed is
//! replayed with a trace by itself.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

mod check;
mod dice;
mod driver;
mod guest;
mod hypervisor;
mod model;
mod net;
mod volume;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use world::{Stats, World};

fn run(seed: u64) -> Option<Stats> {
    catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, false);
        world.run();
        world.stats
    }))
    .ok()
}

/// Runs a seed again, prints what happened last, and fails as it does.
fn replay(seed: u64, lines: usize) -> Stats {
    let mut world = World::new(seed, true);
    let result = catch_unwind(AssertUnwindSafe(|| world.run()));
    let trace = world.trace.take().unwrap_or_default();
    for line in trace.iter().skip(trace.len().saturating_sub(lines)) {
        println!("{line}");
    }
    if let Err(cause) = result {
        println!("seed {seed} fails: BLKFERRY_SIM_SEED={seed} replays it");
        std::panic::resume_unwind(cause);
    }
    world.stats
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

fn add(sum: &mut Stats, one: &Stats) {
    sum.handoffs += one.handoffs;
    sum.completions += one.completions;
    sum.reclaims += one.reclaims;
    sum.cancels += one.cancels;
    sum.cuts += one.cuts;
    sum.kills += one.kills;
    sum.host_crashes += one.host_crashes;
    sum.pushes += one.pushes;
    sum.pulls += one.pulls;
    sum.demands += one.demands;
    sum.overwritten += one.overwritten;
    sum.torn += one.torn;
    sum.denials += one.denials;
    sum.mismatches += one.mismatches;
    sum.held_flushes += one.held_flushes;
    sum.lost += one.lost;
    sum.returns += one.returns;
    sum.reads += one.reads;
    sum.events += one.events;
}

#[test]
fn two_peers_survive_everything() {
    if let Some(seed) = number("BLKFERRY_SIM_SEED") {
        let stats = replay(seed, 4000);
        return println!("{stats:?}");
    }
    let seeds = number("BLKFERRY_SIM_SEEDS").unwrap_or(1500);
    let (next, sum, failed) = (AtomicU64::new(0), Mutex::new(Stats::default()), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds || failed.lock().unwrap().len() >= 20 {
                        break;
                    }
                    match run(seed) {
                        Some(stats) => add(&mut sum.lock().unwrap(), &stats),
                        None => failed.lock().unwrap().push(seed),
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap();
    failed.sort_unstable();
    if let Some(first) = failed.first() {
        println!("failing seeds of {}: {failed:?}", next.into_inner());
        replay(*first, 250);
    }
    let s = sum.into_inner().unwrap();
    println!("sim: {seeds} seeds, {s:?}");
    let counts = [
        s.handoffs,
        s.completions,
        s.reclaims,
        s.cancels,
        s.cuts,
        s.kills,
        s.host_crashes,
        s.pushes,
        s.pulls,
        s.demands,
        s.overwritten,
        s.torn,
        s.denials,
        s.held_flushes,
        s.returns,
        s.reads,
    ];
    assert!(seeds < 500 || counts.iter().all(|count| *count > 0), "something never happened: {s:?}");
}
