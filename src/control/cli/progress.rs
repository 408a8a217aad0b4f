// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Progress of a migration on standard error: a live bar on a terminal, plain lines elsewhere.
//!
//! The bar measures what the destination lacks, not what was sent: a guest that writes faster than the link makes it go
//! back, and that is what the operator must see. The estimate divides by the rate of the last few seconds.
//! Several disks have a bar for all and one for each below it.

use super::total::total;
use crate::control::follow::Observer;
use crate::control::qmp::VmStatus;
use crate::control::size::{human, human_time};
use crate::control::words::state_word;
use crate::node::status::{MigrationState, MigrationStatus};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// How the bar looks.
const TEMPLATE: &str = "{prefix:<15} [{bar:30}] {percent:>3}%  {wide_msg}";
/// Over how long the rate is measured.
const WINDOW: Duration = Duration::from_secs(4);
/// Least time between two samples of the rate.
const SAMPLE: Duration = Duration::from_millis(200);
/// Least time between two plain lines of one state.
const PLAIN: Duration = Duration::from_secs(2);

/// Shows a migration's progress.
#[derive(Debug)]
pub struct Progress {
    /// What the disks are called, if there are several.
    names: Vec<String>,
    /// The bar of all, and with several disks one of each.
    bars: Option<(ProgressBar, Vec<ProgressBar>)>,
    rate: Rate,
    told: Option<(Vec<MigrationState>, Instant)>,
}

impl Progress {
    /// Bars if standard error is a terminal, else plain lines. `names` are what several disks are called; none for the
    /// only one.
    #[must_use]
    pub fn new(names: Vec<String>) -> Self {
        let bars = io::stderr().is_terminal().then(|| {
            let draw = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10));
            let bar = || {
                let bar = draw.add(ProgressBar::new(1));
                // The template is constant; if indicatif did not take it, its own default shows.
                if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                    bar.set_style(style.progress_chars("=> "));
                }
                bar
            };
            (bar(), names.iter().map(|_| bar()).collect())
        });
        Self { names, bars, rate: Rate::default(), told: None }
    }

    /// Removes the bars, so that what follows stands on a clean line.
    pub fn finish(&self) {
        if let Some((all, each)) = &self.bars {
            for bar in each {
                bar.finish_and_clear();
            }
            all.finish_and_clear();
        }
    }

    /// Writes a plain line when a state has changed or some time has passed.
    fn plain(&mut self, disks: &[&MigrationStatus], all: &MigrationStatus, text: &str) {
        let now = Instant::now();
        let states: Vec<MigrationState> = disks.iter().map(|disk| disk.state).collect();
        let due = self.told.as_ref().is_none_or(|(told, at)| *told != states || now - *at >= PLAIN);
        if due {
            self.told = Some((states, now));
            let each: String = self.names.iter().zip(disks).map(|(name, disk)| brief(name, disk)).collect();
            line(&format!("{}: {text}{each}", state_word(all.state)));
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl Observer for Progress {
    fn progress(&mut self, disks: &[&MigrationStatus], vm: Option<&VmStatus>) {
        let all = total(disks);
        self.rate.sample(Instant::now(), all.push_bytes + all.prefetch_bytes + all.demand_bytes);
        let text = describe(&all, vm, self.rate.per_second());
        match &self.bars {
            Some((bar, each)) => {
                show(bar, &all, text);
                for ((bar, name), disk) in each.iter().zip(&self.names).zip(disks) {
                    let left = human(disk.remaining_bytes);
                    let why = if disk.message.is_empty() { "" } else { ", " };
                    show(bar, disk, format!("{name}: {left} left{why}{}", disk.message));
                }
            }
            None => self.plain(disks, &all, &text),
        }
    }

    fn note(&mut self, text: &str) {
        match &self.bars {
            Some((bar, _)) => bar.println(text),
            None => line(text),
        }
    }
}

fn show(bar: &ProgressBar, disk: &MigrationStatus, text: String) {
    let (done, total) = measure(disk);
    bar.set_length(total);
    bar.set_position(done);
    bar.set_prefix(state_word(disk.state));
    bar.set_message(text);
}

/// One of several disks in the plain line of all.
fn brief(name: &str, disk: &MigrationStatus) -> String {
    format!("; {name} {}, {} left", state_word(disk.state), human(disk.remaining_bytes))
}

/// A line on standard error; a reader that has left is no reason to stop a migration.
fn line(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// How much of how much the destination has. The guest can modify more than was modified at the start.
fn measure(disk: &MigrationStatus) -> (u64, u64) {
    let total = disk.modified_bytes.max(disk.remaining_bytes);
    match disk.state {
        MigrationState::Completed => (total.max(1), total.max(1)),
        MigrationState::None | MigrationState::Setup => (0, total.max(1)),
        _ => (total - disk.remaining_bytes, total.max(1)),
    }
}

/// What stands beside the bar.
fn describe(disk: &MigrationStatus, vm: Option<&VmStatus>, rate: u64) -> String {
    let moved = disk.push_bytes + disk.prefetch_bytes + disk.demand_bytes;
    let mut parts = vec![
        format!("{} moved", human(moved)),
        format!("{}/s", human(rate)),
        format!("{} left", human(disk.remaining_bytes)),
    ];
    if disk.chunks_repushed > 0 {
        parts.push(format!("{} pushed again", disk.chunks_repushed));
    }
    if let Some(left) = estimate(disk.remaining_bytes, rate) {
        parts.push(format!("about {} to go", human_time(left)));
    }
    if let Some(vm) = vm {
        parts.push(format!("VM {} ({} left)", vm.word, human(vm.ram_remaining)));
    }
    if !disk.message.is_empty() {
        parts.push(disk.message.clone());
    }
    parts.join(", ")
}

/// The time that `remaining` bytes take at `rate` a second, in whole seconds; none while nothing moves.
fn estimate(remaining: u64, rate: u64) -> Option<Duration> {
    (rate > 0 && remaining > 0).then(|| Duration::from_secs(remaining.div_ceil(rate)))
}

/// Bytes a second over the last [`WINDOW`].
#[derive(Debug, Default)]
struct Rate {
    samples: VecDeque<(Instant, u64)>,
}

impl Rate {
    fn sample(&mut self, now: Instant, moved: u64) {
        let newest = self.samples.back().copied();
        if newest.is_some_and(|(_, before)| moved < before) {
            self.samples.clear();
        } else if newest.is_some_and(|(at, _)| now - at < SAMPLE) {
            return;
        }
        self.samples.push_back((now, moved));
        while self.samples.len() > 2 && self.samples.front().is_some_and(|(at, _)| now - *at > WINDOW) {
            self.samples.pop_front();
        }
    }

    fn per_second(&self) -> u64 {
        let (Some((from, before)), Some((to, after))) = (self.samples.front(), self.samples.back()) else {
            return 0;
        };
        let millis = (*to - *from).as_millis().max(1);
        u64::try_from(u128::from(after - before) * 1000 / millis).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_that_of_the_last_seconds_and_survives_a_counter_that_starts_again() {
        let start = Instant::now();
        let mut rate = Rate::default();
        for second in 0..10 {
            rate.sample(start + Duration::from_secs(second), second * second * 1000);
        }
        // From second 5 to second 9: (81 - 25) thousand bytes in four seconds.
        assert_eq!(rate.per_second(), 14_000);
        rate.sample(start + Duration::from_secs(10), 0);
        assert_eq!(rate.per_second(), 0);
        rate.sample(start + Duration::from_secs(11), 500);
        assert_eq!(rate.per_second(), 500);
    }

    #[test]
    fn template_is_one_that_indicatif_takes() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }

    #[test]
    fn bar_never_leaves_its_range() {
        let of = |state, modified_bytes, remaining_bytes| {
            measure(&MigrationStatus { state, modified_bytes, remaining_bytes, ..MigrationStatus::default() })
        };
        assert_eq!(of(MigrationState::Active, 100, 40), (60, 100));
        assert_eq!(of(MigrationState::Active, 100, 140), (0, 140));
        assert_eq!(of(MigrationState::Active, 0, 0), (0, 1));
        assert_eq!(of(MigrationState::Setup, 100, 0), (0, 100));
        assert_eq!(of(MigrationState::Completed, 0, 0), (1, 1));
    }

    #[test]
    fn text_names_what_the_operator_needs() {
        let disk = MigrationStatus {
            push_bytes: 3 << 20,
            remaining_bytes: 10 << 20,
            chunks_repushed: 7,
            ..MigrationStatus::default()
        };
        let text = describe(&disk, None, 1 << 20);
        assert_eq!(text, "3.0 MiB moved, 1.0 MiB/s, 10.0 MiB left, 7 pushed again, about 10.0 s to go");
        assert!(!describe(&disk, None, 0).contains("to go"));
    }
}
