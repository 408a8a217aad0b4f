// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configurations: how much of what may happen, and what each must reach.

use crate::seen::Seen;
use crate::volume::Touch;
use crate::world::Left;
use blkferry::core::strategy::Strategy;

#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    pub(crate) name: &'static str,
    pub(crate) chunks: u32,
    /// What the guest wrote before the migration is armed.
    pub(crate) preset: &'static [(u32, Touch)],
    /// Requests that the guest makes.
    pub(crate) touches: &'static [(u32, Touch)],
    pub(crate) strategy: Strategy,
    pub(crate) threshold: u32,
    pub(crate) window: u32,
    /// Nothing was ever written at the destination.
    pub(crate) virgin: bool,
    /// Begins when the peers have agreed, not when the migration is armed.
    pub(crate) agreed: bool,
    /// Whether the rings may also be stopped already when the migration is armed.
    pub(crate) paused: bool,
    /// The hypervisor starts rings at the destination before those at the source have stopped.
    pub(crate) hasty: bool,
    /// Also rings that start without a hold.
    pub(crate) unheld: bool,
    /// Also timers that end a hold while shorter ones still run.
    pub(crate) holds: bool,
    /// Writes are told to the session some time after they have ended.
    pub(crate) lazy: bool,
    /// Only on demand.
    pub(crate) long: bool,
    pub(crate) left: Left,
    pub(crate) reaches: &'static [Seen],
}

impl Bounds {
    /// Whether hosts crash, so that what is safe matters.
    pub(crate) fn safe(&self) -> bool {
        self.left.host_crashes != [0, 0]
    }
}

const NONE: Left = Left {
    writes: 0,
    reads: 0,
    flushes: 0,
    cuts: 0,
    crashes: [0, 0],
    host_crashes: [0, 0],
    faults: 0,
    stops: 0,
    starts: 0,
    asks: 0,
    withdrawals: 0,
    cancels: 0,
    arms: 0,
    halvings: 0,
};

const PLAIN: Bounds = Bounds {
    name: "writes",
    chunks: 1,
    preset: &[(0, Touch::Whole)],
    touches: &[(0, Touch::Whole)],
    strategy: Strategy::Hybrid,
    threshold: 3,
    window: 4,
    virgin: true,
    agreed: true,
    paused: false,
    hasty: false,
    unheld: false,
    holds: false,
    lazy: false,
    long: false,
    left: MOVE,
    reaches: &[Seen::Handoff, Seen::Released, Seen::Settled],
};

/// The guest writes once, the hypervisor moves it.
const MOVE: Left = Left { writes: 1, stops: 1, asks: 1, ..NONE };
/// As `MOVE`, and the hypervisor may start the rings at the source again; nothing is written.
const BACK: Left = Left { writes: 0, starts: 1, ..MOVE };
const LOW: &[(u32, Touch)] = &[(0, Touch::Low)];
const ALL: &[(u32, Touch)] = &[(0, Touch::Whole), (0, Touch::Low), (0, Touch::Zero)];

/// All configurations.
pub(crate) fn all() -> Vec<Bounds> {
    [writes(), plans(), deaths(), hosts(), long()].concat()
}

/// What the guest does while its disk moves.
fn writes() -> Vec<Bounds> {
    use Seen::{Demanded, LatePush, Overwritten, Pulled, Pushed, Superseded, TornCapture};
    vec![
        Bounds {
            left: Left { writes: 2, ..MOVE },
            reaches: &[Seen::Settled, Pushed, Pulled, TornCapture, LatePush, Overwritten],
            ..PLAIN
        },
        Bounds {
            name: "zeros",
            touches: &[(0, Touch::Zero), (0, Touch::Low)],
            left: Left { writes: 2, ..MOVE },
            reaches: &[Seen::Settled, Pushed, Pulled, Overwritten],
            ..PLAIN
        },
        // The chunk is not in the modified set when the migration is armed.
        Bounds {
            name: "lazy",
            preset: &[],
            agreed: false,
            lazy: true,
            left: Left { writes: 2, ..MOVE },
            reaches: &[Seen::Settled, Pushed, Pulled, TornCapture],
            ..PLAIN
        },
        Bounds {
            name: "pull",
            strategy: Strategy::Postcopy,
            touches: ALL,
            chunks: 2,
            preset: &[(0, Touch::Whole), (1, Touch::Low)],
            left: Left { reads: 1, writes: 2, ..MOVE },
            reaches: &[Seen::Settled, Pulled, Demanded, Superseded, Overwritten],
            ..PLAIN
        },
        Bounds {
            name: "two chunks",
            chunks: 2,
            preset: &[(0, Touch::Whole), (1, Touch::Zero)],
            touches: LOW,
            reaches: &[Seen::Settled, Pushed, Pulled, TornCapture],
            ..PLAIN
        },
        Bounds { name: "heat", threshold: 1, left: Left { halvings: 1, ..MOVE }, ..PLAIN },
    ]
}

/// What the hypervisor and the operator do in another order than one would like.
fn plans() -> Vec<Bounds> {
    use Seen::{Cancelled, Denied, LatePush, LateStartRefused, Mismatch, Reclaimed, StartDenied};
    vec![
        Bounds {
            name: "handshake",
            agreed: false,
            paused: true,
            virgin: false,
            hasty: true,
            left: BACK,
            reaches: &[Seen::Settled, Denied, StartDenied, LateStartRefused, Reclaimed],
            ..PLAIN
        },
        // The guest goes on at the source, and stops again.
        Bounds {
            name: "minds",
            left: Left { stops: 2, starts: 1, asks: 0, ..MOVE },
            reaches: &[Reclaimed, Mismatch, LatePush],
            ..PLAIN
        },
        Bounds {
            name: "late failure",
            left: BACK,
            reaches: &[Seen::Settled, Denied, LateStartRefused, Reclaimed],
            ..PLAIN
        },
        Bounds {
            name: "withdrawn",
            hasty: true,
            left: Left { asks: 2, withdrawals: 1, ..BACK },
            reaches: &[Seen::Settled, Denied, StartDenied, Reclaimed],
            ..PLAIN
        },
        Bounds {
            name: "retry",
            left: Left { cancels: 1, arms: 1, writes: 0, ..MOVE },
            reaches: &[Seen::Settled, Cancelled],
            ..PLAIN
        },
        Bounds {
            name: "precopy",
            strategy: Strategy::Precopy,
            holds: true,
            left: Left { starts: 1, writes: 0, ..MOVE },
            reaches: &[Seen::Settled, Reclaimed],
            ..PLAIN
        },
    ]
}

/// Connections, daemons and disks fail.
fn deaths() -> Vec<Bounds> {
    use Seen::{ForeignRun, NewRun, Reclaimed};
    vec![
        Bounds {
            name: "cuts",
            left: Left { cuts: 1, ..BACK },
            reaches: &[Seen::Settled, Reclaimed],
            ..PLAIN
        },
        Bounds { name: "cut and write", left: Left { cuts: 1, ..MOVE }, ..PLAIN },
        Bounds {
            name: "source dies",
            left: Left { crashes: [1, 0], ..BACK },
            reaches: &[Seen::Settled, Reclaimed, ForeignRun, NewRun],
            ..PLAIN
        },
        Bounds {
            name: "source dies, write",
            left: Left { crashes: [1, 0], ..MOVE },
            reaches: &[Seen::Settled, ForeignRun, NewRun],
            ..PLAIN
        },
        Bounds {
            name: "destination dies",
            left: Left { crashes: [0, 1], ..BACK },
            reaches: &[Seen::Settled, Reclaimed],
            ..PLAIN
        },
        Bounds { name: "destination dies, write", left: Left { crashes: [0, 1], ..MOVE }, ..PLAIN },
        Bounds {
            name: "both die",
            left: Left { crashes: [1, 1], writes: 0, ..MOVE },
            reaches: &[Seen::Settled, ForeignRun, NewRun],
            ..PLAIN
        },
        Bounds {
            name: "faults",
            left: Left { faults: 1, ..MOVE },
            reaches: &[Seen::Settled, Seen::Failed, Seen::Superseded],
            ..PLAIN
        },
    ]
}

/// Hosts go down and take with them what was not synced.
fn hosts() -> Vec<Bounds> {
    use Seen::{Flushed, HeldFlush, LostByName};
    vec![
        Bounds {
            name: "source's host",
            strategy: Strategy::Postcopy,
            left: Left { host_crashes: [1, 0], flushes: 1, ..MOVE },
            reaches: &[Seen::Settled, Flushed, HeldFlush, LostByName],
            ..PLAIN
        },
        Bounds {
            name: "destination's host",
            strategy: Strategy::Postcopy,
            touches: LOW,
            left: Left { host_crashes: [0, 1], flushes: 1, ..MOVE },
            reaches: &[Seen::Settled, Flushed, HeldFlush],
            ..PLAIN
        },
    ]
}

/// The same and more, for a night.
fn long() -> Vec<Bounds> {
    let long = Bounds { long: true, ..PLAIN };
    let name = |name: &'static str, left: Left| Bounds { name, left, ..long.clone() };
    vec![
        name("long writes", Left { writes: 3, ..MOVE }),
        Bounds { touches: ALL, ..name("long touches", Left { writes: 2, ..MOVE }) },
        Bounds {
            hasty: true,
            unheld: true,
            ..name("long minds", Left { stops: 2, starts: 2, withdrawals: 1, ..MOVE })
        },
        name("long late failure", Left { starts: 1, ..MOVE }),
        name("long cuts", Left { cuts: 2, ..BACK }),
        name("long cuts and write", Left { cuts: 2, starts: 1, ..MOVE }),
        name("long source dies", Left { crashes: [2, 0], ..BACK }),
        name("long destination dies", Left { crashes: [0, 2], ..BACK }),
        name("long both die", Left { crashes: [1, 1], cuts: 1, ..BACK }),
        name("long both hosts", Left { host_crashes: [1, 1], flushes: 1, ..MOVE }),
        name("long faults", Left { faults: 2, cuts: 1, ..MOVE }),
        name("long retry", Left { cancels: 1, arms: 1, cuts: 1, ..MOVE }),
    ]
}
