// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every kind of fault once, in the time that a test suite has.

use crate::cases::{At, Blow, Case, Ground, MOMENTS, POINTS, Phase, Role, VICTIMS};
use crate::ground::{Spoil, alone};
use crate::proxy::{Moment, Point};
use crate::report;
use crate::stranger::TALKS;
use std::time::Duration;

const BOTH: &[Role] = &[Role::Source, Role::Destination];
const SOURCE: &[Role] = &[Role::Source];
const DESTINATION: &[Role] = &[Role::Destination];

/// Plays them all; fails if one has failed.
fn play(seed: u64, cases: impl IntoIterator<Item = Case>) {
    let rows: Vec<_> = (seed..).zip(cases).map(|(seed, case)| crate::play::play(&case, seed)).collect();
    report::judge(&rows);
}

fn message(point: Point, moment: Moment) -> At {
    At::Message(point, moment, 0)
}

/// Each point once, with each victim and each moment in turn.
fn kills(points: impl Iterator<Item = usize>) {
    let case = |n: usize| Case::new(Blow::Kill, VICTIMS[n % 3], message(POINTS[n], MOMENTS[(n / 3) % 3]));
    play(1000, points.map(case));
}

#[test]
fn t27_kills_at_every_other_point() {
    kills((0..POINTS.len()).step_by(2));
}

#[test]
fn t27_kills_at_the_points_between() {
    kills((1..POINTS.len()).step_by(2));
}

#[test]
fn kills_at_random_times() {
    let phases = [Phase::Push, Phase::Handoff, Phase::Pull];
    let cases = phases.into_iter().zip([SOURCE, DESTINATION, BOTH]);
    let mut cases: Vec<_> =
        cases.map(|(phase, victims)| Case::new(Blow::Kill, victims, At::Time(phase))).collect();
    for (phase, victims) in [(Phase::Push, BOTH), (Phase::Pull, DESTINATION)] {
        cases.push(Case { twice: true, ..Case::new(Blow::Kill, victims, At::Time(phase)) });
    }
    play(1100, cases);
}

#[test]
fn daemons_that_are_asked_to_end() {
    let points = [Point::Welcome, Point::Ack, Point::Offer, Point::Activate, Point::Pull, Point::Complete];
    let at = points.map(|point| message(point, Moment::Before));
    let cases = at.into_iter().zip([SOURCE, DESTINATION].into_iter().cycle());
    play(1200, cases.map(|(at, victims)| Case::new(Blow::Terminate, victims, at)));
}

#[test]
fn connections_that_are_reset_slow_or_damaged() {
    let slow = Blow::Slow(300_000);
    play(
        1300,
        [
            Case::of(Blow::Reset, message(Point::Push, Moment::Before)),
            Case::of(Blow::Reset, message(Point::Offer, Moment::Before)),
            Case::of(Blow::Reset, message(Point::Granted, Moment::Before)),
            Case::of(Blow::Reset, message(Point::Pulled, Moment::Before)),
            Case::of(slow, At::Time(Phase::Push)),
            Case::of(slow, At::Time(Phase::Pull)),
            Case::of(Blow::Flip, message(Point::Push, Moment::Before)),
            Case::of(Blow::Flip, message(Point::Announce, Moment::Before)),
            Case::of(Blow::Flip, message(Point::Granted, Moment::Before)),
            Case::of(Blow::Flip, message(Point::Pulled, Moment::Before)),
        ],
    );
}

#[test]
fn connections_that_are_half_open() {
    let (short, long) = (Blow::Silent(Duration::from_secs(1)), Blow::Silent(Duration::from_secs(8)));
    play(
        1400,
        [
            Case::of(short, message(Point::Offer, Moment::Before)),
            Case::of(short, message(Point::Pulled, Moment::Before)),
            Case::of(long, message(Point::Push, Moment::Before)),
        ],
    );
}

#[test]
fn links_that_go_down() {
    if let Some(status) = alone("bounded::links_that_go_down") {
        return assert!(status.success(), "{status} (network namespaces need root and iproute2)");
    }
    let down = Blow::LinkDown(Duration::from_millis(1500));
    let (direct, proxied) = (Ground::Link { direct: true }, Ground::Link { direct: false });
    play(
        1500,
        [
            Case::of(down, At::Time(Phase::Push)).on(direct),
            Case::of(down, message(Point::Offer, Moment::Before)).on(proxied),
            Case::of(down, message(Point::Granted, Moment::Before)).on(proxied),
            Case::of(Blow::LinkDown(Duration::from_secs(8)), At::Time(Phase::Pull)).on(direct),
        ],
    );
}

#[test]
fn disks_that_are_full() {
    if let Some(status) = alone("bounded::disks_that_are_full") {
        return assert!(status.success(), "{status} (mounts need root)");
    }
    let full = Blow::Full(Duration::from_secs(1));
    let sides = [Role::Source, Role::Destination].map(Ground::SmallDisk);
    let phases = [Phase::Push, Phase::Pull].map(At::Time);
    play(1600, sides.iter().flat_map(|side| phases.map(|at| Case::of(full, at).on(*side))));
}

#[test]
fn state_directories_that_cannot_be_used() {
    if let Some(status) = alone("bounded::state_directories_that_cannot_be_used") {
        return assert!(status.success(), "{status} (mounts need root)");
    }
    let spoils = [Spoil::ReadOnly, Spoil::File, Spoil::NoSuperblock];
    let kinds = [(Phase::Push, DESTINATION), (Phase::Pull, SOURCE), (Phase::Pull, DESTINATION)];
    let cases = kinds.into_iter().zip(spoils);
    play(
        1700,
        cases.map(|((phase, victims), spoil)| Case {
            spoil: Some(spoil),
            ..Case::new(Blow::Kill, victims, At::Time(phase))
        }),
    );
}

#[test]
fn strangers_at_the_destination() {
    let phases = [Phase::Push, Phase::Pull];
    let cases = TALKS.into_iter().zip(phases.into_iter().cycle());
    play(1800, cases.map(|(talk, phase)| Case::of(Blow::Stranger(talk), At::Time(phase))));
}

#[test]
fn hypervisors_that_crash_and_guests_that_are_started_twice() {
    play(
        1900,
        [
            Case::of(Blow::FrontEnd, At::Time(Phase::Push)),
            Case::of(Blow::FrontEnd, At::Time(Phase::Pull)),
            Case::of(Blow::SecondGuest, At::Time(Phase::Pull)),
        ],
    );
}
