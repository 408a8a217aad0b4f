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
mod jobs;
mod life;
mod model;
mod net;
mod rules;
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

/// Everything that must happen in the seeds together, or they prove nothing.
fn counts(s: &Stats) -> [(&'static str, u64); 20] {
    [
        ("handoffs", s.handoffs),
        ("completions", s.completions),
        ("reclaims", s.reclaims),
        ("cancels", s.cancels),
        ("denials", s.denials),
        ("returns", s.returns),
        ("kept chunks", s.kept),
        ("cuts", s.cuts),
        ("kills", s.kills),
        ("host crashes", s.host_crashes),
        ("losses of unsynced data", s.lost),
        ("pushes", s.pushes),
        ("torn captures", s.torn),
        ("pulls", s.pulls),
        ("demands", s.demands),
        ("overwritten chunks", s.overwritten),
        ("held flushes", s.held_flushes),
        ("errors for a source that is away", s.absences),
        ("checked reads", s.reads),
        ("events", s.events),
    ]
}

#[test]
fn two_peers_survive_everything() {
    if let Some(seed) = number("BLKFERRY_SIM_SEED") {
        let stats = replay(seed, 4000);
        return println!("{stats:?}");
    }
    let seeds = number("BLKFERRY_SIM_SEEDS").unwrap_or(2000);
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
                        Some(stats) => sum.lock().unwrap().add(&stats),
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
    let stats = sum.into_inner().unwrap();
    let counts = counts(&stats);
    let words: Vec<String> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
    println!("sim: {seeds} seeds, {}", words.join(", "));
    let missing: Vec<&str> = counts.iter().filter(|(_, count)| *count == 0).map(|(name, _)| *name).collect();
    assert!(seeds < 1000 || missing.is_empty(), "never happened: {missing:?}");
}
