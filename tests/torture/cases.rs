// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The faults: what falls, on whom, and when.

use crate::ground::Spoil;
use crate::proxy::{Moment, Point};
use crate::stranger::Talk;
use blkferry::node::status::StrategyName;
use std::time::Duration;

/// Whom it befalls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Source,
    Destination,
}

/// What falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    Kill,
    Terminate,
    /// All connections are reset.
    Reset,
    /// Nothing passes for this time, and nobody is told.
    Silent(Duration),
    /// From now on so many bytes a second pass.
    Slow(u64),
    /// A bit of the message flips.
    Flip,
    /// The link goes down for this time.
    LinkDown(Duration),
    /// The file system under a state directory is full for this time.
    Full(Duration),
    /// Somebody talks to the destination.
    Stranger(Talk),
    /// The front-end disconnects without a word, and another one goes on.
    FrontEnd,
    /// A second guest wants the disk of the side that has given it away.
    SecondGuest,
}

/// What the daemons stand on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    Loopback,
    /// Two network namespaces with a link; the proxy stands at the destination's end, or there is none.
    Link {
        direct: bool,
    },
    /// This side has a small disk.
    SmallDisk(Role),
}

/// A part of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Armed,
    Connect,
    Push,
    Reclaim,
    Handoff,
    Pull,
    Cancel,
    End,
}

impl Phase {
    /// The part at whose end the message has been seen.
    pub fn of(point: Point) -> Self {
        match point {
            Point::Hello | Point::Welcome | Point::Announce => Self::Connect,
            Point::Replica | Point::Keep | Point::Have => Self::Connect,
            Point::Push | Point::Ack => Self::Push,
            Point::Offer | Point::Prepared | Point::Activate | Point::Granted => Self::Handoff,
            Point::Synced | Point::Pull | Point::Pulled => Self::Pull,
            Point::Complete | Point::Released => Self::End,
            Point::Reclaimed => Self::Reclaim,
            Point::Cancel | Point::Cancelled => Self::Cancel,
        }
    }
}

/// When it falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// With a message, after so many others of its kind.
    Message(Point, Moment, u64),
    /// At a random time in a phase.
    Time(Phase),
}

/// What the hypervisor does with the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    Plain,
    /// The guest is stopped, goes on at the source, and is stopped again.
    Reclaim,
    /// It is cancelled in the push.
    Cancel,
    /// The disk has come from the destination just before.
    Return,
}

/// One fault.
#[derive(Clone)]
pub struct Case {
    pub blow: Blow,
    pub victims: Vec<Role>,
    pub at: At,
    pub route: Route,
    pub strategy: StrategyName,
    pub ground: Ground,
    /// What the victims find when they are started again, until it is repaired.
    pub spoil: Option<Spoil>,
    /// The victims fall once more, soon after they were started again.
    pub twice: bool,
}

impl Case {
    pub fn new(blow: Blow, victims: &[Role], at: At) -> Self {
        let (route, strategy) = match at {
            At::Message(point, ..) => way_to(point),
            At::Time(_) => (Route::Plain, StrategyName::Hybrid),
        };
        let (ground, spoil, twice) = (Ground::Loopback, None, false);
        Self { blow, victims: victims.to_vec(), at, route, strategy, ground, spoil, twice }
    }

    /// The blow is to nobody.
    pub fn of(blow: Blow, at: At) -> Self {
        Self::new(blow, &[], at)
    }

    pub fn on(mut self, ground: Ground) -> Self {
        self.ground = ground;
        self
    }

    /// Its kind, for the table.
    pub fn fault(&self) -> String {
        let blow = match &self.blow {
            Blow::Kill => "kill -9",
            Blow::Terminate => "SIGTERM",
            Blow::Reset => "connections reset",
            Blow::Silent(time) => return format!("half-open for {time:?}"),
            Blow::Slow(speed) => return format!("link at {} KB/s", speed / 1000),
            Blow::Flip => "a bit flips",
            Blow::LinkDown(time) => return format!("link down for {time:?}"),
            Blow::Full(_) => match self.ground {
                Ground::SmallDisk(Role::Source) => "disk full at source",
                _ => "disk full at destination",
            },
            Blow::Stranger(talk) => return format!("stranger: {talk:?}"),
            Blow::FrontEnd => "front-end crashes",
            Blow::SecondGuest => "second guest at source",
        };
        let whom = match self.victims[..] {
            [] => "",
            [Role::Source] => " source",
            [Role::Destination] => " destination",
            _ => " both",
        };
        let spoil = self.spoil.map(|spoil| format!(", then {spoil:?}")).unwrap_or_default();
        format!("{blow}{whom}{}{spoil}", if self.twice { ", twice" } else { "" })
    }

    pub fn point(&self) -> String {
        match self.at {
            At::Message(point, _, _) if matches!(self.blow, Blow::Flip) => format!("{point:?}"),
            At::Message(point, Moment::Lost, _) => format!("{point:?}, lost"),
            At::Message(point, Moment::Before, _) => format!("{point:?}, before"),
            At::Message(point, Moment::After, _) => format!("{point:?}, after"),
            At::Time(phase) => format!("random time in {phase:?}"),
        }
    }
}

/// How a migration goes in which a message is seen.
fn way_to(point: Point) -> (Route, StrategyName) {
    match point {
        Point::Reclaimed => (Route::Reclaim, StrategyName::Hybrid),
        Point::Cancel | Point::Cancelled => (Route::Cancel, StrategyName::Hybrid),
        Point::Replica | Point::Keep | Point::Have => (Route::Return, StrategyName::Hybrid),
        Point::Pull | Point::Pulled => (Route::Plain, StrategyName::Postcopy),
        _ => (Route::Plain, StrategyName::Hybrid),
    }
}

/// All messages at which daemons die.
pub const POINTS: [Point; 20] = [
    Point::Hello,
    Point::Welcome,
    Point::Announce,
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
    Point::Released,
    Point::Reclaimed,
    Point::Cancel,
    Point::Cancelled,
    Point::Replica,
    Point::Keep,
    Point::Have,
];

pub const VICTIMS: [&[Role]; 3] = [&[Role::Source], &[Role::Destination], &[Role::Source, Role::Destination]];

pub const MOMENTS: [Moment; 3] = [Moment::Lost, Moment::Before, Moment::After];
