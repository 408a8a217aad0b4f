// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! As many faults as are asked for, drawn from all kinds: `tests/torture/run` starts this.

use crate::cases::{At, Blow, Case, Ground, MOMENTS, POINTS, Phase, Role, VICTIMS};
use crate::ground::{Spoil, alone};
use crate::proxy::{Moment, Point};
use crate::report::{self, Row};
use crate::stranger::TALKS;
use blkferry::node::status::StrategyName;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Faults at the same time, each on daemons of its own.
const WORKERS: usize = 3;

fn any<T: Copy>(rng: &mut ChaCha8Rng, of: &[T]) -> T {
    *of.choose(rng).unwrap()
}

/// Messages in the handoff, where most can go wrong, and around it.
const MIDDLE: [Point; 10] = [
    Point::Push,
    Point::Ack,
    Point::Offer,
    Point::Prepared,
    Point::Activate,
    Point::Granted,
    Point::Synced,
    Point::Pull,
    Point::Pulled,
    Point::Complete,
];

fn message(rng: &mut ChaCha8Rng, points: &[Point]) -> At {
    let point = any(rng, points);
    // Messages that come often are also met later.
    let often = matches!(point, Point::Push | Point::Ack | Point::Pull | Point::Pulled);
    let skip = if often { rng.random_range(0..20) } else { 0 };
    At::Message(point, any(rng, &MOMENTS), skip)
}

/// A random time, or a message that passes.
fn when(rng: &mut ChaCha8Rng) -> At {
    if rng.random_bool(0.3) {
        return At::Time(any(rng, &[Phase::Push, Phase::Pull]));
    }
    match message(rng, &MIDDLE) {
        At::Message(point, _, skip) => At::Message(point, Moment::Before, skip),
        at @ At::Time(_) => at,
    }
}

/// Case `n` of a run. The first ones go through all points, victims and moments; the others are drawn.
fn case(n: usize, seed: u64) -> Case {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let victims = any(rng, &VICTIMS);
    let phases = [Phase::Push, Phase::Handoff, Phase::Pull];
    let brief = Duration::from_millis(any(rng, &[500, 1500, 8000]));
    let timed = At::Time(any(rng, &phases));
    let quiet = At::Time(any(rng, &[Phase::Push, Phase::Pull]));
    let case = match n % 20 {
        0..8 => {
            let at = n / 20 * 8 + n % 20;
            let (point, victims) = (POINTS[at % POINTS.len()], VICTIMS[at / POINTS.len() % 3]);
            let moment = MOMENTS[(at + at / (3 * POINTS.len())) % 3];
            Case::new(Blow::Kill, victims, At::Message(point, moment, 0))
        }
        8 | 9 => Case::new(Blow::Kill, victims, timed),
        10 => Case { twice: true, ..Case::new(Blow::Kill, victims, timed) },
        11 | 12 => {
            let at = if rng.random_bool(0.3) { timed } else { message(rng, &POINTS) };
            Case::new(Blow::Terminate, victims, at)
        }
        13 => Case::of(Blow::Reset, when(rng)),
        14 => {
            let blow = any(rng, &[Blow::Silent(brief), Blow::Slow(200_000), Blow::Slow(600_000)]);
            Case::of(blow, when(rng))
        }
        15 => {
            let at = message(rng, &POINTS[..14]);
            let At::Message(point, _, skip) = at else { return Case::of(Blow::Flip, at) };
            Case::of(Blow::Flip, At::Message(point, Moment::Before, skip))
        }
        16 => {
            let at = when(rng);
            Case::of(Blow::LinkDown(brief), at).on(Ground::Link { direct: matches!(at, At::Time(_)) })
        }
        17 => {
            let side = any(rng, &[Role::Source, Role::Destination]);
            Case::of(Blow::Full(Duration::from_secs(1)), quiet).on(Ground::SmallDisk(side))
        }
        18 => {
            let spoil = any(rng, &[Spoil::ReadOnly, Spoil::File, Spoil::NoSuperblock]);
            Case { spoil: Some(spoil), ..Case::new(Blow::Kill, victims, timed) }
        }
        _ => match rng.random_range(0..4) {
            0 => Case::of(Blow::FrontEnd, quiet),
            1 => Case::of(Blow::SecondGuest, At::Time(Phase::Pull)),
            _ => Case::of(Blow::Stranger(any(rng, &TALKS)), quiet),
        },
    };
    let postcopy = matches!(case.at, At::Time(Phase::Pull)) && rng.random_bool(0.5);
    if postcopy { Case { strategy: StrategyName::Postcopy, ..case } } else { case }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}: {text}")))
}

#[test]
#[ignore = "takes its time: tests/torture/run"]
fn at_length() {
    if let Some(status) = alone("long::at_length") {
        return assert!(status.success(), "{status}");
    }
    let (faults, seed) = (setting("TORTURE_FAULTS", 200) as usize, setting("TORTURE_SEED", 1));
    let (next, rows) = (AtomicUsize::new(0), Mutex::new(Vec::<Row>::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= faults {
                        return;
                    }
                    let seed = seed * 1_000_000 + n as u64;
                    let row = crate::play::play(&case(n, seed), seed);
                    rows.lock().unwrap().push(row);
                }
            });
        }
    });
    let mut rows = rows.into_inner().unwrap();
    rows.sort_by_key(|row| row.seed);
    if let Some(path) = std::env::var_os("TORTURE_CSV") {
        std::fs::write(path, report::csv(&rows)).unwrap();
    }
    report::judge(&rows);
}
