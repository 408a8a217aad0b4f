// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life of a daemon: how it becomes a source or a destination, dies, and takes up its role again from its record.

use crate::world::{Event, Job, MS, NodeRole, World};
use blkferry::core::chunk::ChunkState;
use blkferry::core::destination::{DestinationSession, LocalFacts, OnSourceLoss};
use blkferry::core::geometry::ChunkId;
use blkferry::core::heat::Counting;
use blkferry::core::message::{Epoch, Hello, Incarnation, MigrationId, Version};
use blkferry::core::record::{DestinationStage, MigrationRecord, Role, SourceStage};
use blkferry::core::source::{ArmParams, SourceSession, Unchanged};
use blkferry::core::strategy::Strategy;
use std::collections::BTreeMap;
use std::time::Duration;

impl World {
    // ---- becoming -----------------------------------------------------------------------------------------------

    fn arm_params(
        &mut self,
        side: usize,
        migration: MigrationId,
        strategy: Strategy,
        threshold: u32,
    ) -> ArmParams {
        self.incarnations += 1;
        let running = self.hv.runs();
        self.sides[side].precopy = strategy == Strategy::Precopy;
        let s = &self.sides[side];
        let hello = Hello {
            migration,
            volume: s.volume_id,
            incarnation: Incarnation(s.life << 32 | side as u64),
            epoch: s.epoch,
            size: self.geometry.size(),
            chunk_size: self.geometry.chunk_size(),
            base: self.base.clone(),
            virtio_features: 3,
            queues: 1,
            read_only: false,
            serial: "sim".to_owned(),
        };
        ArmParams {
            hello,
            destination: "peer:1".to_owned(),
            strategy,
            threshold,
            counting: if self.dice.coin() { Counting::Passes } else { Counting::Paper },
            push_window: self.dice.between(1, 16) as u32,
            half_life: Duration::from_millis(self.dice.between(200, 10_000)),
            start_now: self.dice.permille(800),
            rings_running: running,
            write_cache: s.write_cache,
            unchanged: None,
        }
    }

    pub(crate) fn arm(&mut self, side: usize) {
        self.hang_up(side, true);
        self.sides[side].run += 1;
        self.sides[side].tracked = Some(BTreeMap::new());
        let strategy = [Strategy::Hybrid, Strategy::Hybrid, Strategy::Precopy, Strategy::Postcopy];
        let strategy = strategy[self.dice.index(4)];
        let threshold = self.dice.between(1, 6) as u32;
        self.incarnations += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.incarnations.to_le_bytes());
        let mut params = self.arm_params(side, MigrationId(id), strategy, threshold);
        let volume = &self.sides[side].volume;
        let received = volume.with_lasting(ChunkState::Received);
        let chunks = received.into_iter().map(|c| (c, Version(volume.chunk(c).version))).collect();
        params.unchanged = self.sides[side].came_in.map(|migration| Unchanged { migration, chunks });
        let modified = self.sides[side].volume.modified();
        let hot = self.sides[side].volume.with_lasting(ChunkState::Local);
        self.tell(|| format!("side {side} is armed: {strategy:?} {threshold} {modified:?}"));
        let session = SourceSession::arm(self.clock(), params, modified, hot);
        self.sides[side].role = NodeRole::Source(Box::new(session));
        if self.dice.coin() {
            let now = self.clock();
            if let NodeRole::Source(session) = &mut self.sides[side].role {
                session.handle_log_started(now);
            }
        }
    }

    pub(crate) fn facts(&self, side: usize, released: bool, replica: Option<MigrationId>) -> LocalFacts {
        let s = &self.sides[side];
        LocalFacts {
            geometry: self.geometry,
            base: self.base.clone(),
            virtio_features: 7,
            queues: 1,
            read_only: false,
            volume: s.volume_id,
            epoch: s.epoch,
            virgin: s.virgin,
            released,
            replica,
        }
    }

    pub(crate) fn become_destination(&mut self, side: usize, released: bool, replica: Option<MigrationId>) {
        self.sides[side].run += 1;
        let mut session = DestinationSession::idle(self.facts(side, released, replica));
        session.set_on_source_loss(self.clock(), self.on_source_loss(side));
        self.stats.returns += u64::from(released);
        self.sides[side].role = NodeRole::Destination(Box::new(session));
    }

    /// Now a guest that waits, now one that gets errors.
    fn on_source_loss(&self, side: usize) -> OnSourceLoss {
        match self.sides[side].run % 3 {
            0 => OnSourceLoss::Stall,
            1 => OnSourceLoss::Error { grace: Duration::ZERO },
            _ => OnSourceLoss::Error { grace: Duration::from_millis(50) },
        }
    }

    // ---- crash and restart --------------------------------------------------------------------------------------

    pub(crate) fn kill_tick(&mut self) {
        if self.calm || self.plan.kill_every == 0 {
            return;
        }
        let delay = self.dice.below(2 * self.plan.kill_every);
        self.after(delay, Event::Kill(None));
        let side = self.dice.index(2);
        self.strike_down(side);
    }

    pub(crate) fn strike_down(&mut self, side: usize) {
        if self.sides[side].alive && !self.calm {
            let host = self.dice.permille(self.plan.host_crash_permille);
            self.kill(side, host);
        }
    }

    fn kill(&mut self, side: usize, host: bool) {
        self.tell(|| format!("side {side} {}", if host { "host crash" } else { "is killed" }));
        if self.dice.coin()
            && self.sides[side].writing
            && let Some(write) = self.sides[side].writes.pop_front()
        {
            self.make_durable(side, &write);
        }
        let in_order = self.dice.coin() && !host;
        self.hang_up(side, in_order);
        let s = &mut self.sides[side];
        s.alive = false;
        s.life += 1;
        s.gate = false;
        s.role = NodeRole::Idle;
        s.tracked = None;
        s.drain_due = false;
        s.writes.clear();
        s.writing = false;
        s.moving = 0;
        s.conn = None;
        s.volume.kill();
        if host {
            self.stats.host_crashes += 1;
            self.host_crash(side);
        } else {
            self.stats.kills += 1;
        }
        self.guest_lost(side, host);
        self.hv_died(side);
        let delay = self.dice.delay(500 * MS);
        self.after(delay, Event::Restart(side));
    }

    fn host_crash(&mut self, side: usize) {
        let MigrationRecord::V1 { role, .. } = &self.sides[side].record;
        let owner = match role {
            Role::Serving => true,
            Role::Source(r) => matches!(r.stage, SourceStage::Pushing | SourceStage::Offered),
            Role::Destination(r) => {
                matches!(r.stage, DestinationStage::Active { .. } | DestinationStage::Complete)
            }
            Role::Idle => false,
        };
        let revert = matches!(role, Role::Destination(r) if matches!(r.stage, DestinationStage::Prepared | DestinationStage::Active { .. }));
        if owner {
            self.model.host_crash();
        }
        let dice = &mut self.dice;
        let s = &mut self.sides[side];
        s.boot += 1;
        s.volume.host_crash(|| dice.coin());
        if revert && s.volume.synced.order < s.prepared_at {
            let list = s.remaining.clone().unwrap_or_default();
            s.volume.revert(list.into_iter().map(|(chunk, ..)| chunk));
        }
    }

    /// As the daemon takes up its role.
    pub(crate) fn restart(&mut self, side: usize) {
        if self.sides[side].alive {
            return;
        }
        let s = &mut self.sides[side];
        s.alive = true;
        s.run += 1;
        let MigrationRecord::V1 { volume, epoch, role } = s.record.clone();
        s.epoch = epoch;
        s.volume_id = volume;
        s.flush_gate = true;
        s.data_lost = false;
        self.tell(|| format!("side {side} restarts as {role:?} {epoch:?}"));
        match role {
            Role::Serving => {
                self.sides[side].role = NodeRole::Serving;
                self.open_gate(side);
            }
            Role::Idle => self.sides[side].role = NodeRole::Idle,
            Role::Source(record) => {
                self.sides[side].tracked = Some(BTreeMap::new());
                self.sides[side].write_cache = record.write_cache;
                let strategy = Strategy::from_number(record.strategy).expect("strategy");
                let params = self.arm_params(side, record.migration, strategy, record.threshold);
                let modified = self.sides[side].volume.modified();
                let same_boot = self.sides[side].boot == self.sides[side].record_boot;
                let exposed = matches!(
                    record.stage,
                    SourceStage::Offered | SourceStage::Relinquished { synced: false }
                );
                let lost = !same_boot && exposed;
                let session = SourceSession::resume(self.clock(), params, &record, epoch, modified, lost);
                self.sides[side].data_lost = lost;
                self.sides[side].role = NodeRole::Source(Box::new(session));
                if record.stage == SourceStage::Pushing {
                    self.open_gate(side);
                }
            }
            Role::Destination(record) => self.resume_destination(side, &record, epoch),
        }
        self.guest_back(side);
        self.job(side, 50 * MS, Job::Upkeep);
    }

    fn resume_destination(
        &mut self,
        side: usize,
        record: &blkferry::core::record::DestinationRecord,
        epoch: Epoch,
    ) {
        let volume = &self.sides[side].volume;
        let have: Vec<_> =
            volume.modified().into_iter().map(|c| (c, Version(volume.chunk(c).version))).collect();
        let counts: BTreeMap<ChunkId, u8> =
            self.sides[side].remaining.iter().flatten().map(|(c, n, _)| (*c, *n)).collect();
        let remaining: Vec<_> = volume
            .with_lasting(ChunkState::Remote)
            .into_iter()
            .map(|c| (c, counts.get(&c).copied().unwrap_or(0)))
            .collect();
        self.tell(|| format!("  has {have:?}, remaining {remaining:?}"));
        let owner = matches!(record.stage, DestinationStage::Active { .. } | DestinationStage::Complete);
        let facts = self.facts(side, false, None);
        let mut session = DestinationSession::resume(facts, record, epoch, have, remaining);
        session.set_on_source_loss(self.clock(), self.on_source_loss(side));
        let s = &mut self.sides[side];
        s.flush_gate = record.stage != DestinationStage::Active { source_synced: false };
        s.virgin = false;
        s.write_cache = record.write_cache;
        s.role = NodeRole::Destination(Box::new(session));
        if owner {
            self.open_gate(side);
        }
    }
}
