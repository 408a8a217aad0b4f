// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest: reads, writes, zeroes whole chunks and flushes wherever it runs. It never has two writes of one block
//! under way, but reads may overlap writes. Requests survive the death of a daemon and are submitted again.

use crate::dice::Dice;
use crate::volume::{at, bits};
use crate::world::{Event, Job, NodeRole, SyncFor, World};
use blkferry::core::chunk::{Access, ChunkState, ChunkView, Route, route};
use blkferry::core::geometry::{BlockMask, ChunkId, Geometry, Span};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zero,
    Flush,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not under way: to be routed again at the next occasion.
    Parked,
    Running,
}

#[derive(Debug, Clone, Copy)]
struct Op {
    kind: Kind,
    phase: Phase,
    chunk: ChunkId,
    blocks: BlockMask,
    value: u64,
    mark: u64,
    claim: BlockMask,
}

#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) at: usize,
    pub(crate) issues: bool,
    ops: BTreeMap<u64, Op>,
    hot: Vec<ChunkId>,
    count: u64,
}

fn block_run(mask: BlockMask) -> (u32, u32) {
    (mask.0.trailing_zeros(), 64 - mask.0.leading_zeros())
}

fn span(geometry: &Geometry, chunk: ChunkId, blocks: BlockMask) -> Span {
    let (first, end) = block_run(blocks);
    let bytes = geometry.block_bytes(chunk, &(first..end));
    Span { chunk, start: bytes.start, len: bytes.end - bytes.start }
}

impl Guest {
    pub(crate) fn new(dice: &mut Dice, geometry: Geometry) -> Self {
        let count = u64::from(geometry.chunk_count());
        let hot = (0..3).map(|_| ChunkId(dice.below(count) as u32)).collect();
        Self { at: 0, issues: true, ops: BTreeMap::new(), hot, count: 0 }
    }

    pub(crate) fn idle(&self) -> bool {
        self.ops.is_empty()
    }

    pub(crate) fn describe(&self) -> String {
        format!("at {} issues {} ops {:?}", self.at, self.issues, self.ops)
    }
}

impl World {
    pub(crate) fn guest_tick(&mut self) {
        let every = self.plan.guest_every;
        let delay = self.dice.delay(every);
        self.after(delay, Event::Guest);
        if self.guest.issues && self.sides[self.guest.at].alive && self.guest.ops.len() < 8 {
            self.issue();
        }
    }

    fn issue(&mut self) {
        let chunk = if self.dice.permille(self.plan.hot_permille) {
            self.guest.hot[self.dice.index(3)]
        } else {
            ChunkId(self.dice.below(u64::from(self.geometry.chunk_count())) as u32)
        };
        let kind = match self.dice.below(100) {
            roll if roll < self.plan.flush_percent => Kind::Flush,
            0..60 => Kind::Write,
            60..95 => Kind::Read,
            _ => Kind::Zero,
        };
        let full = self.geometry.full_mask(chunk);
        let count = u64::from(full.count());
        let first = self.dice.below(count);
        let whole = kind == Kind::Zero || self.dice.permille(250);
        let blocks = if whole {
            full
        } else {
            let len = self.dice.between(1, 16).min(count - first);
            BlockMask::range(first as u32, (first + len) as u32)
        };
        let writes = matches!(kind, Kind::Write | Kind::Zero);
        let busy = bits(blocks).any(|block| self.model.writing(at(chunk, block)));
        let flushing = self.guest.ops.values().any(|op| op.kind == Kind::Flush);
        if writes && busy || kind == Kind::Flush && flushing {
            return;
        }
        self.guest.count += 1;
        let id = self.guest.count;
        let value = if kind == Kind::Zero { 0 } else { id };
        if writes {
            bits(blocks).for_each(|block| self.model.begin(at(chunk, block), value));
        }
        let op = Op { kind, phase: Phase::Parked, chunk, blocks, value, mark: 0, claim: BlockMask::EMPTY };
        self.tell(|| format!("guest issues {id:#x} {kind:?} {chunk} {:x}", blocks.0));
        self.guest.ops.insert(id, op);
        self.begin_op(id);
    }

    fn begin_op(&mut self, id: u64) {
        let side = self.guest.at;
        let Some(op) = self.guest.ops.get(&id).copied() else { return };
        if !self.sides[side].alive {
            return;
        }
        assert!(self.sides[side].gate, "the guest runs where no gate is open: {}", self.describe());
        match op.kind {
            Kind::Flush => self.begin_flush(side, id),
            Kind::Read => self.begin_access(side, id, op, Access::Read),
            Kind::Write => self.begin_access(side, id, op, Access::Write),
            Kind::Zero => self.begin_access(side, id, op, Access::Zero),
        }
    }

    fn set(&mut self, id: u64, phase: Phase) {
        if let Some(op) = self.guest.ops.get_mut(&id) {
            op.phase = phase;
        }
    }

    fn begin_access(&mut self, side: usize, id: u64, op: Op, access: Access) {
        let chunk = op.chunk;
        let c = *self.sides[side].volume.chunk(chunk);
        let mask = if c.hold.is_some_and(|hold| hold.punch) { BlockMask::EMPTY } else { c.mask };
        let view = ChunkView { state: c.state, mask };
        match route(&self.geometry, view, access, span(&self.geometry, chunk, op.blocks)) {
            Route::Layer | Route::Zeros => self.end_read(side, id, op),
            Route::Done => self.end_write_op(side, id, op),
            Route::Modify { .. } if c.claimants > 0 => self.set(id, Phase::Parked),
            Route::Modify { before, claim } => {
                self.sides[side].volume.begin_write(chunk, before);
                self.set(id, Phase::Running);
                if let Some(op) = self.guest.ops.get_mut(&id) {
                    op.claim = claim;
                }
                let delay = self.disk();
                self.job(side, delay, Job::WriteMid(id));
            }
            Route::Punch => {
                self.set(id, Phase::Running);
                self.sides[side].volume.chunk_mut(chunk).claimants += 1;
                self.job(side, 1, Job::PunchStart(id));
            }
            Route::Fill | Route::Base => self.wait_for_fill(side, id, chunk, c.state),
            Route::Wait => self.set(id, Phase::Parked),
        }
    }

    fn wait_for_fill(&mut self, side: usize, id: u64, chunk: ChunkId, state: ChunkState) {
        self.set(id, Phase::Parked);
        if state == ChunkState::Base && !self.sides[side].volume.has_base(chunk) {
            let Some(op) = self.guest.ops.get(&id).copied() else { return };
            assert_eq!(op.kind, Kind::Read);
            return self.end_read(side, id, op);
        }
        if std::mem::replace(&mut self.sides[side].volume.chunk_mut(chunk).demanded, true) {
            return;
        }
        if state == ChunkState::Base {
            let delay = self.disk();
            return self.job(side, delay, Job::Fetch(chunk, false));
        }
        let now = self.clock();
        match &mut self.sides[side].role {
            NodeRole::Destination(session) => session.handle_demand(now, chunk),
            NodeRole::Serving | NodeRole::Idle | NodeRole::Source(_) => {
                panic!("{chunk} is said to be at a source, but there is none: {}", self.describe())
            }
        }
    }

    fn end_read(&mut self, side: usize, id: u64, op: Op) {
        for block in bits(op.blocks) {
            let value = self.sides[side].volume.value(op.chunk, block);
            let number = at(op.chunk, block);
            let Some(value) = value else { panic!("{} block {block} is read but not here", op.chunk) };
            let good = self.model.read(number, value);
            assert!(
                good,
                "stale read of {} block {block} at side {side}: {value:#x}, expected {}",
                op.chunk,
                self.model.expected(number)
            );
        }
        self.stats.reads += 1;
        self.tell(|| format!("guest has read {id:#x}"));
        self.end_op(id);
    }

    fn end_op(&mut self, id: u64) {
        self.guest.ops.remove(&id);
        self.drained();
    }

    pub(crate) fn write_mid(&mut self, side: usize, id: u64) {
        let Some(op) = self.guest.ops.get(&id).copied() else { return };
        let half = op.blocks.count() as usize / 2;
        for block in bits(op.blocks).take(half) {
            self.sides[side].volume.put(op.chunk, block, op.value);
        }
        let delay = self.disk();
        self.job(side, delay, Job::WriteEnd(id));
    }

    pub(crate) fn write_end(&mut self, side: usize, id: u64) {
        let Some(op) = self.guest.ops.get(&id).copied() else { return };
        for block in bits(op.blocks) {
            self.sides[side].volume.put(op.chunk, block, op.value);
        }
        let overwritten = self.sides[side].volume.end_write(op.chunk, op.claim);
        self.track(side, op.chunk, op.blocks);
        if overwritten {
            self.overwritten(side, op.chunk);
        }
        self.end_write_op(side, id, op);
    }

    fn end_write_op(&mut self, side: usize, id: u64, op: Op) {
        bits(op.blocks).for_each(|block| self.model.acknowledge(at(op.chunk, block)));
        self.tell(|| format!("guest has written {id:#x}"));
        self.end_op(id);
        self.kick(side);
    }

    fn overwritten(&mut self, side: usize, chunk: ChunkId) {
        self.stats.overwritten += 1;
        let now = self.clock();
        if let NodeRole::Destination(session) = &mut self.sides[side].role {
            session.handle_overwritten(now, chunk);
        }
    }

    pub(crate) fn punch_start(&mut self, side: usize, id: u64) {
        let Some(op) = self.guest.ops.get(&id).copied() else { return };
        let volume = &mut self.sides[side].volume;
        if !volume.free(op.chunk) {
            return self.job(side, 150, Job::PunchStart(id));
        }
        volume.chunk_mut(op.chunk).claimants -= 1;
        volume.hold(op.chunk, true);
        let delay = self.disk();
        self.job(side, delay, Job::PunchEnd(id));
    }

    pub(crate) fn punch_end(&mut self, side: usize, id: u64) {
        let Some(op) = self.guest.ops.get(&id).copied() else { return };
        let remote = self.sides[side].volume.end_punch(op.chunk);
        self.track(side, op.chunk, op.blocks);
        if remote {
            self.overwritten(side, op.chunk);
        }
        self.end_write_op(side, id, op);
    }

    // ---- flush --------------------------------------------------------------------------------------------------

    fn begin_flush(&mut self, side: usize, id: u64) {
        if !self.sides[side].flush_gate {
            self.stats.held_flushes += 1;
            return self.set(id, Phase::Parked);
        }
        let mark = self.model.flush_mark();
        if let Some(op) = self.guest.ops.get_mut(&id) {
            op.mark = mark;
        }
        self.set(id, Phase::Running);
        self.start_sync(side, SyncFor::Flush(id));
    }

    pub(crate) fn flush_synced(&mut self, side: usize, id: u64, ok: bool) {
        let Some(op) = self.guest.ops.get(&id).copied() else { return };
        if ok {
            self.check_flush(side);
            self.model.flushed(op.mark);
            self.tell(|| format!("guest has flushed {id:#x}"));
        }
        self.end_op(id);
    }

    // ---- parking ------------------------------------------------------------------------------------------------

    /// Something has changed at a side: what is parked there tries again.
    pub(crate) fn kick(&mut self, side: usize) {
        if self.guest.at != side || !self.sides[side].gate {
            return;
        }
        let parked: Vec<u64> =
            self.guest.ops.iter().filter(|(_, op)| op.phase == Phase::Parked).map(|(id, _)| *id).collect();
        parked.into_iter().for_each(|id| self.begin_op(id));
    }

    pub(crate) fn fail_waiters(&mut self, side: usize, chunk: ChunkId) {
        if self.guest.at != side {
            return;
        }
        self.sides[side].volume.chunk_mut(chunk).demanded = false;
        let wants = |op: &Op| op.phase == Phase::Parked && op.kind == Kind::Read && op.chunk == chunk;
        let failed: Vec<u64> = self.guest.ops.iter().filter(|(_, op)| wants(op)).map(|(id, _)| *id).collect();
        failed.into_iter().for_each(|id| self.end_op(id));
    }

    /// The daemon that serves the guest has died.
    pub(crate) fn guest_lost(&mut self, side: usize, host: bool) {
        if self.guest.at != side {
            return;
        }
        if host {
            self.guest.ops.clear();
            return self.drained();
        }
        self.guest.ops.values_mut().for_each(|op| op.phase = Phase::Parked);
    }

    pub(crate) fn guest_back(&mut self, side: usize) {
        if !self.guest.ops.is_empty() && self.guest.at == side {
            self.kick(side);
        }
    }
}
