// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One state of everything: two daemons with their disks, the connection, the guest, and what may still go wrong.

use crate::bounds::Bounds;
use crate::shared::Shared;
use crate::volume::{CELLS, Reading, Touch, Volume, geometry};
use blkferry::core::destination::{DestinationSession, LocalFacts};
use blkferry::core::geometry::ChunkId;
use blkferry::core::heat::Counting;
use blkferry::core::message::{
    BaseIdentity, ChunkData, Epoch, Hello, Incarnation, Message, MigrationId, VolumeId,
};
use blkferry::core::record::{MigrationRecord, Role as RecordRole};
use blkferry::core::source::{ArmParams, SourceSession};
use std::collections::VecDeque;
use std::time::Duration;

/// The clock stands still but for timers that fire: then it is what the timer wanted.
pub(crate) const NOW: Duration = Duration::from_secs(10);
/// Half-life of write counts: longer than every other timer.
pub(crate) const HALF_LIFE: Duration = Duration::from_secs(1000);

pub(crate) const SOURCE: usize = 0;
pub(crate) const DESTINATION: usize = 1;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    Serving,
    Idle,
    Source(Box<SourceSession>),
    Destination(Box<DestinationSession>),
}

/// A record on its way to the disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Write {
    /// Whether the session that asked for it is still there to be told.
    pub(crate) told: bool,
    pub(crate) seq: Beside<u64>,
    pub(crate) record: MigrationRecord,
    pub(crate) remaining: Option<Vec<(ChunkId, u8, bool)>>,
}

/// What takes time in a daemon.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Job {
    /// Without a reading it waits for whoever holds the chunk.
    Capture(ChunkId, Option<Reading>),
    /// Claimed, not yet holding the chunk.
    Claim(ChunkData),
    Install(ChunkData),
    /// Syncs, with what they will have made safe (only where hosts crash).
    SyncLayer(Option<Volume>),
    SyncVolume(Option<Volume>),
    Upkeep(Option<Volume>),
    Wipe,
}

/// What a crash of the host leaves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Safe {
    pub(crate) volume: Volume,
    /// Something was committed since the offer was prepared here.
    pub(crate) since_prepared: bool,
    /// The record was written since the host came up.
    pub(crate) same_boot: bool,
}

/// One daemon and its host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Side {
    pub(crate) role: Role,
    /// Number of the process.
    pub(crate) life: u64,
    pub(crate) gate: bool,
    pub(crate) flush_gate: bool,
    /// The hypervisor runs its guest here, as far as this daemon lets it.
    pub(crate) rings: bool,
    pub(crate) stop_wait: bool,
    pub(crate) start_wait: bool,
    pub(crate) dial: bool,
    pub(crate) volume: Volume,
    /// Chunks written that the session has not been told of; `None` while not armed.
    pub(crate) tracked: Option<Vec<ChunkId>>,
    pub(crate) jobs: Vec<Job>,
    pub(crate) writes: VecDeque<Write>,
    pub(crate) volume_id: VolumeId,
    pub(crate) epoch: Epoch,
    pub(crate) virgin: bool,
    pub(crate) write_cache: bool,
    pub(crate) data_lost: bool,
    // Durable:
    pub(crate) record: MigrationRecord,
    pub(crate) remaining: Option<Vec<(ChunkId, u8, bool)>>,
    pub(crate) safe: Option<Safe>,
    /// Highest epochs that this side has durably given away, and offered.
    pub(crate) granted: u64,
    pub(crate) offered: u64,
}

/// One connection: an ordered control stream each way, and data in any order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Conn {
    /// By the side that said it.
    pub(crate) control: [VecDeque<Message>; 2],
    pub(crate) data: Vec<ChunkData>,
    /// Ends that have not noticed the end of it.
    pub(crate) up: [bool; 2],
    /// Nothing more goes in; what is in it arrives or not.
    pub(crate) cut: bool,
}

impl Conn {
    pub(crate) fn new() -> Self {
        Self { control: [VecDeque::new(), VecDeque::new()], data: Vec::new(), up: [true; 2], cut: false }
    }
}

/// A cell as the guest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Cell {
    pub(crate) acked: u8,
    /// Where hosts crash: what was flushed last, and what was acknowledged since.
    pub(crate) flushed: u8,
    pub(crate) since: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Op {
    pub(crate) side: usize,
    pub(crate) chunk: ChunkId,
    pub(crate) touch: Touch,
    pub(crate) value: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Guest {
    pub(crate) op: Option<Op>,
    pub(crate) cells: Vec<[Cell; CELLS]>,
    /// The next value that is written.
    pub(crate) next: u8,
}

/// What may still happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Left {
    pub(crate) writes: u8,
    pub(crate) reads: u8,
    pub(crate) flushes: u8,
    pub(crate) cuts: u8,
    pub(crate) crashes: [u8; 2],
    pub(crate) host_crashes: [u8; 2],
    pub(crate) faults: u8,
    pub(crate) stops: u8,
    pub(crate) starts: u8,
    pub(crate) asks: u8,
    pub(crate) withdrawals: u8,
    pub(crate) cancels: u8,
    pub(crate) arms: u8,
    pub(crate) halvings: u8,
}

/// What must hold, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Rule {
    OneOwner,
    NothingLost,
    SettledIsCurrent,
    EndsWell,
    DurableBeforeSaid,
    SyncedIsSafe,
    NoPanic,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) sides: [Shared<Side>; 2],
    pub(crate) conn: Option<Shared<Conn>>,
    pub(crate) guest: Guest,
    pub(crate) left: Left,
    pub(crate) broken: Option<(Rule, String)>,
    /// Things worth reaching that the last step has reached: bits of [`Seen`](crate::seen::Seen).
    pub(crate) seen: Beside<u32>,
}

/// No part of the identity of a state: names of writes, and what the last step has reached.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Beside<T>(pub(crate) T);

impl<T> PartialEq for Beside<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Eq for Beside<T> {}

impl<T> std::hash::Hash for Beside<T> {
    fn hash<H: std::hash::Hasher>(&self, _: &mut H) {}
}

impl World {
    pub(crate) fn new(bounds: &Bounds, rings: bool) -> Self {
        let mut source = Side::new(bounds, VolumeId([1; 16]));
        for (chunk, touch) in bounds.preset {
            source.volume.preset(ChunkId(*chunk), *touch);
        }
        source.role = Role::Serving;
        source.gate = true;
        source.rings = rings;
        source.epoch = Epoch(1);
        source.record =
            MigrationRecord::V1 { volume: source.volume_id, epoch: Epoch(1), role: RecordRole::Serving };
        let cells = source
            .volume
            .ids()
            .map(|chunk| [0, 1].map(|cell| Cell::new(source.volume.value(chunk, cell).expect("a value"))))
            .collect();
        let mut destination = Side::new(bounds, VolumeId([9; 16]));
        destination.virgin = bounds.virgin;
        if !bounds.virgin {
            destination.volume.preset(ChunkId(0), Touch::Whole);
        }
        for side in [&mut source, &mut destination] {
            side.safe = bounds.safe().then(|| Safe {
                volume: side.volume.clone(),
                since_prepared: false,
                same_boot: true,
            });
        }
        let mut world = Self {
            sides: [Shared::new(source), Shared::new(destination)],
            conn: None,
            guest: Guest { op: None, cells, next: crate::volume::FIRST + 1 },
            left: bounds.left,
            broken: None,
            seen: Beside(0),
        };
        world.arm(bounds);
        while bounds.agreed && !world.source().is_some_and(|session| session.agreed()) {
            let act = world.next_inside().expect("a handshake");
            world.act(bounds, act);
        }
        world.seal();
        world
    }

    pub(crate) fn seal(&mut self) {
        self.sides.iter_mut().for_each(Shared::seal);
        if let Some(conn) = &mut self.conn {
            conn.seal();
        }
    }

    pub(crate) fn side(&self, side: usize) -> &Side {
        self.sides[side].get()
    }

    pub(crate) fn side_mut(&mut self, side: usize) -> &mut Side {
        self.sides[side].edit()
    }

    pub(crate) fn fail(&mut self, rule: Rule, text: impl Into<String>) {
        if self.broken.is_none() {
            self.broken = Some((rule, text.into()));
        }
    }

    pub(crate) fn require(&mut self, good: bool, rule: Rule, text: impl FnOnce() -> String) {
        if !good {
            self.fail(rule, text());
        }
    }

    pub(crate) fn source(&self) -> Option<&SourceSession> {
        match &self.side(SOURCE).role {
            Role::Source(session) => Some(session),
            Role::Serving | Role::Idle | Role::Destination(_) => None,
        }
    }

    pub(crate) fn source_mut(&mut self) -> Option<&mut SourceSession> {
        match &mut self.side_mut(SOURCE).role {
            Role::Source(session) => Some(session),
            Role::Serving | Role::Idle | Role::Destination(_) => None,
        }
    }

    pub(crate) fn destination(&self) -> Option<&DestinationSession> {
        match &self.side(DESTINATION).role {
            Role::Destination(session) => Some(session),
            Role::Serving | Role::Idle | Role::Source(_) => None,
        }
    }

    pub(crate) fn destination_mut(&mut self) -> Option<&mut DestinationSession> {
        match &mut self.side_mut(DESTINATION).role {
            Role::Destination(session) => Some(session),
            Role::Serving | Role::Idle | Role::Source(_) => None,
        }
    }

    // ---- migrations ---------------------------------------------------------------------------------------------

    pub(crate) fn arm_params(&self, bounds: &Bounds, migration: MigrationId) -> ArmParams {
        let s = self.side(SOURCE);
        ArmParams {
            hello: Hello {
                migration,
                volume: s.volume_id,
                incarnation: Incarnation(s.life),
                epoch: s.epoch,
                size: geometry(bounds.chunks).size(),
                chunk_size: geometry(bounds.chunks).chunk_size(),
                base: BaseIdentity::default(),
                virtio_features: 0,
                queues: 1,
                read_only: false,
                serial: String::new(),
            },
            destination: String::new(),
            strategy: bounds.strategy,
            threshold: bounds.threshold,
            counting: Counting::Passes,
            push_window: bounds.window,
            half_life: HALF_LIFE,
            start_now: true,
            rings_running: s.rings,
            write_cache: s.write_cache,
            unchanged: None,
        }
    }

    /// MIGRATION_REQUEST.
    pub(crate) fn arm(&mut self, bounds: &Bounds) {
        let migration = MigrationId([bounds.left.arms - self.left.arms + 1; 16]);
        let params = self.arm_params(bounds, migration);
        let s = self.side_mut(SOURCE);
        s.tracked = Some(Vec::new());
        let session = SourceSession::arm(NOW, params, s.volume.modified(), Vec::new());
        s.role = Role::Source(Box::new(session));
        self.pump(SOURCE);
    }

    pub(crate) fn facts(&self, bounds: &Bounds) -> LocalFacts {
        let s = self.side(DESTINATION);
        LocalFacts {
            geometry: geometry(bounds.chunks),
            base: BaseIdentity::default(),
            virtio_features: 0,
            queues: 1,
            read_only: false,
            volume: s.volume_id,
            epoch: s.epoch,
            virgin: s.virgin,
            released: false,
            replica: None,
        }
    }
}

impl Cell {
    pub(crate) fn new(value: u8) -> Self {
        Self { acked: value, flushed: value, since: Vec::new() }
    }
}

impl Side {
    fn new(bounds: &Bounds, volume: VolumeId) -> Self {
        Self {
            role: Role::Idle,
            life: 1,
            gate: false,
            flush_gate: true,
            rings: false,
            stop_wait: false,
            start_wait: false,
            dial: false,
            volume: Volume::new(bounds.chunks),
            tracked: None,
            jobs: Vec::new(),
            writes: VecDeque::new(),
            volume_id: volume,
            epoch: Epoch(0),
            virgin: false,
            write_cache: true,
            data_lost: false,
            record: MigrationRecord::V1 { volume, epoch: Epoch(0), role: RecordRole::Idle },
            remaining: None,
            safe: None,
            granted: 0,
            offered: 0,
        }
    }
}
