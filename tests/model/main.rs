// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Both sessions of a migration against everything that can happen, exhaustively within small bounds: `stateright`
//! walks all states of the two real sessions, their disks, the connection, the hypervisor and the guest.
//!
//! Where `tests/sim` draws long random lives of large disks, this looks at every order of a few events on one or two
//! chunks. docs/evaluation/model.md says what is modelled and what is left out.
//!
//! `BLKFERRY_MODEL=long` runs the larger configurations as well; `BLKFERRY_MODEL=NAME` runs one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

mod bounds;
mod check;
mod daemon;
mod heal;
mod seen;
mod shared;
mod step;
mod volume;
mod world;

use bounds::Bounds;
use heal::Known;
use seen::Seen;
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;
use step::Act;
use world::{Rule, World};

#[derive(Debug)]
struct Handoff {
    bounds: Bounds,
    known: Arc<Known>,
    seen: Arc<AtomicU32>,
}

fn holds(state: &World, rule: Rule) -> bool {
    state.broken.as_ref().is_none_or(|(broken, _)| *broken != rule)
}

impl Handoff {
    /// Runs something on the real code, whose assertions are a property like others.
    fn guarded(&self, state: &mut World, run: impl FnOnce(&mut World)) {
        if let Err(cause) = catch_unwind(AssertUnwindSafe(|| run(state))) {
            let text = cause.downcast_ref::<String>().cloned();
            let text = text.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            state.broken = Some((Rule::NoPanic, text.unwrap_or_default()));
        }
        state.seal();
    }
}

impl Model for Handoff {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        let paused = self.bounds.paused.then(|| World::new(&self.bounds, false));
        std::iter::once(World::new(&self.bounds, true)).chain(paused).collect()
    }

    fn actions(&self, state: &World, acts: &mut Vec<Act>) {
        state.acts(&self.bounds, acts);
    }

    fn next_state(&self, state: &World, act: Act) -> Option<World> {
        let mut next = state.clone();
        next.seen = world::Beside(0);
        self.guarded(&mut next, |next| next.act(&self.bounds, act));
        if next.broken.is_none() {
            let mut healed = Ok(());
            self.guarded(&mut next, |next| healed = next.ends_well(&self.bounds, &self.known));
            if let Err(broken) = healed {
                next.broken = Some(broken);
            }
        }
        self.seen.fetch_or(next.seen.0, Ordering::Relaxed);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one owner", |_, state| holds(state, Rule::OneOwner)),
            Property::always("no acknowledged write is lost", |_, state| holds(state, Rule::NothingLost)),
            Property::always("what is settled is current", |_, state| holds(state, Rule::SettledIsCurrent)),
            Property::always("a healed world ends well", |_, state| holds(state, Rule::EndsWell)),
            Property::always("durable before it is said", |_, state| holds(state, Rule::DurableBeforeSaid)),
            Property::always("what counts as synced is safe", |_, state| holds(state, Rule::SyncedIsSafe)),
            Property::always("no illegal step", |_, state| holds(state, Rule::NoPanic)),
        ]
    }
}

/// Walks one configuration and prints what it found; false if something is broken.
fn run(bounds: &Bounds) -> bool {
    let (known, seen) = (Arc::new(Known::default()), Arc::new(AtomicU32::new(0)));
    let model = Handoff { bounds: bounds.clone(), known: Arc::clone(&known), seen: Arc::clone(&seen) };
    let begin = Instant::now();
    let cap = std::env::var("CAP").map_or(600, |c| c.parse().unwrap());
    let checker = model
        .checker()
        .threads(std::thread::available_parallelism().map_or(1, usize::from))
        .finish_when(HasDiscoveries::AnyFailures)
        .timeout(std::time::Duration::from_secs(cap))
        .spawn_bfs()
        .join();
    let found = checker.discoveries();
    let seen = seen.load(Ordering::Relaxed);
    let reached: Vec<Seen> = seen::ALL.into_iter().filter(|one| seen & one.bit() != 0).collect();
    println!(
        "model {}: {} states, {} transitions, depth {}, {} healed, {:.1} s; reached {reached:?}",
        bounds.name,
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        known.len(),
        begin.elapsed().as_secs_f64()
    );
    for (name, path) in &found {
        println!("  violated: {name}");
        for act in path.clone().into_actions() {
            println!("    {act:?}");
        }
        let last = path.last_state();
        println!("  {:?}\n  {}", last.broken, last.describe());
    }
    let missed: Vec<&Seen> = bounds.reaches.iter().filter(|one| !reached.contains(one)).collect();
    if found.is_empty() && !missed.is_empty() {
        println!("  never reached: {missed:?}");
    }
    found.is_empty() && missed.is_empty()
}

#[test]
fn every_order_of_a_few_events_keeps_the_disk_whole() {
    let wanted = std::env::var("BLKFERRY_MODEL").unwrap_or_default();
    let chosen: Vec<Bounds> = bounds::all()
        .into_iter()
        .filter(|bounds| {
            if wanted.is_empty() || wanted == "long" {
                !bounds.long || wanted == "long"
            } else {
                bounds.name == wanted
            }
        })
        .collect();
    assert!(!chosen.is_empty(), "no configuration {wanted:?}");
    let broken: Vec<&str> = chosen.iter().filter(|bounds| !run(bounds)).map(|bounds| bounds.name).collect();
    assert!(broken.is_empty(), "broken: {broken:?}");
}
