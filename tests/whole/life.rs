// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life of a daemon, as `node::daemon` has it: it opens its state directory, takes up the role of its record, becomes a
//! source or a destination, and dies.

use crate::dice::Dice;
use crate::guest::{BASE, SECTOR, content};
use crate::node::{Daemon, Done, Side};
use crate::tasks::Tasks;
use crate::world::{Event, MS, NodeRole, World};
use blkferry::core::destination::{DestinationSession, LocalFacts};
use blkferry::core::geometry::{ChunkId, Geometry};
use blkferry::core::heat::Counting;
use blkferry::core::message::{BaseIdentity, Epoch, Hello, Incarnation, MigrationId, VolumeId};
use blkferry::core::record::{
    DestinationRecord, DestinationStage, MigrationRecord, Role, SourceRecord, SourceStage,
};
use blkferry::core::set::ChunkSet;
use blkferry::core::source::{ArmParams, SourceSession, Unchanged};
use blkferry::core::strategy::Strategy;
use blkferry::engine::SimDisk;
use blkferry::store::{BaseImage, BootId, SimBase, StateDir, Store, StoreParams};
use blkferry::volume::{Closed, Port, Transfer, TransferError, Volume, VolumeOptions};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

impl Side {
    pub(crate) fn new(dice: &mut Dice, geometry: Geometry, based: u64, in_place: bool) -> Self {
        let (disk, seed) = (SimDisk::new(dice.number()), dice.number());
        let base_disk = (based > 0).then(|| {
            let disk = SimDisk::new(seed);
            let file = disk.create_file("base").expect("no fault yet");
            file.write_now(&content((0..based).map(|sector| BASE | sector)), 0).expect("no fault yet");
            disk.settle();
            disk
        });
        debug_assert!(based * SECTOR <= geometry.size());
        let volume = VolumeId([0; 16]);
        Self {
            disk,
            base_disk,
            in_place,
            base: BaseIdentity::default(),
            daemon: None,
            alive: false,
            life: 0,
            run: 0,
            boot: 1,
            role: NodeRole::Idle,
            gate: false,
            write_cache: true,
            conn: None,
            volume_id: volume,
            epoch: Epoch(1),
            virgin: false,
            unwiped: false,
            stop_hold: false,
            start_hold: false,
            writes: VecDeque::new(),
            writing: false,
            marking: false,
            moving: 0,
            tidying: false,
            owed: None,
            installed: 0,
            data_lost: false,
            precopy: false,
            poisoned: false,
            record: MigrationRecord::V1 { volume, epoch: Epoch(0), role: Role::Idle },
            granted: 0,
            offered: 0,
        }
    }

    fn open(&mut self, geometry: Geometry, queues: usize) -> Result<Daemon, String> {
        let base = self.base_disk.as_ref().map(|disk| {
            let file = disk.file("base").expect("a base image");
            Arc::new(SimBase::new(file, self.in_place).expect("a base image")) as Arc<dyn BaseImage>
        });
        let params = StoreParams {
            base: base.as_ref().map(|_| "base".to_owned()),
            size: Some(geometry.size()),
            chunk_size: Some(geometry.chunk_size()),
            serial: "sim".to_owned(),
            ..StoreParams::default()
        };
        let state = StateDir::simulated(&self.disk, base);
        let store =
            Store::open_at_boot(state, &params, BootId([self.boot; 16])).map_err(|e| e.to_string())?;
        let options = VolumeOptions { read_only: false, write_cache: !store.superblock().write_through };
        self.base = store.base_identity();
        let dirty = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&dirty);
        let tell = Box::new(move || flag.store(true, Ordering::SeqCst));
        let (volume, events) = Volume::open(store, options, tell).map_err(|e| e.to_string())?;
        let transfer = Rc::new(Transfer::open(&volume).map_err(|e| e.to_string())?);
        let port = |number| Port::new(Arc::clone(&volume), number).map_err(|e| e.to_string());
        let ports = (0..queues).map(port).collect::<Result<Vec<_>, _>>()?;
        Ok(Daemon { tasks: Tasks::default(), ports, transfer, events, volume, dirty, starting: None })
    }
}

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
            base: s.base.clone(),
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
            push_window: self.dice.between(1, 8) as u32,
            half_life: Duration::from_millis(self.dice.between(200, 10_000)),
            start_now: self.dice.permille(800),
            rings_running: running,
            write_cache: self.volume(side).write_cache(),
            unchanged: None,
        }
    }

    pub(crate) fn arm(&mut self, side: usize) {
        self.hang_up(side, true);
        self.sides[side].run += 1;
        let (volume, transfer) = (self.volume(side), self.transfer(side));
        volume.tracker().arm(self.geometry.chunk_count());
        let strategy = [Strategy::Hybrid, Strategy::Hybrid, Strategy::Precopy, Strategy::Postcopy];
        let strategy = strategy[self.dice.index(4)];
        let threshold = self.dice.between(1, 6) as u32;
        self.incarnations += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.incarnations.to_le_bytes());
        let mut params = self.arm_params(side, MigrationId(id), strategy, threshold);
        let came_in = volume.store().superblock().came_in;
        params.unchanged =
            came_in.map(|migration| Unchanged { migration, chunks: transfer.unchanged_chunks() });
        let modified: Vec<_> = transfer.modified_chunks().iter().collect();
        let hot: Vec<_> = transfer.local_chunks().iter().collect();
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

    fn facts(&self, side: usize, released: bool, replica: Option<MigrationId>) -> LocalFacts {
        let s = &self.sides[side];
        LocalFacts {
            geometry: self.geometry,
            base: s.base.clone(),
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
        self.sides[side].installed = 0;
        let session = DestinationSession::idle(self.facts(side, released, replica));
        self.stats.returns += u64::from(released);
        self.sides[side].role = NodeRole::Destination(Box::new(session));
    }

    // ---- dying --------------------------------------------------------------------------------------------------

    pub(crate) fn kill_tick(&mut self) {
        if self.calm || self.plan.kill_every == 0 {
            return;
        }
        let delay = self.dice.below(2 * self.plan.kill_every);
        self.after(delay, Event::Kill);
        let side = self.dice.index(2);
        let host = self.dice.permille(self.plan.host_crash_permille);
        if self.sides[side].alive {
            self.kill(side, host);
        }
    }

    pub(crate) fn kill(&mut self, side: usize, host: bool) {
        self.tell(|| format!("side {side} {}", if host { "host crash" } else { "is killed" }));
        let in_order = self.dice.coin() && !host;
        self.hang_up(side, in_order);
        let lied = self.sides[side].disk.reopened().file("layer").is_some_and(|file| file.has_lost());
        let s = &mut self.sides[side];
        if host {
            s.disk.crash()
        } else {
            s.disk.kill()
        }
        s.base_disk.iter().for_each(SimDisk::kill);
        s.daemon = None;
        s.disk = s.disk.reopened();
        s.base_disk = s.base_disk.as_ref().map(SimDisk::reopened);
        (s.alive, s.gate, s.writing, s.marking, s.tidying, s.unwiped) =
            (false, false, false, false, false, false);
        s.life += 1;
        s.role = NodeRole::Idle;
        s.writes.clear();
        (s.owed, s.conn, s.moving) = (None, None, 0);
        if host {
            self.stats.host_crashes += 1;
            self.excused |= self.sides[side].poisoned;
            self.sides[side].poisoned = false;
            self.sides[side].boot += 1;
        } else {
            self.stats.kills += 1;
            self.sides[side].poisoned |= lied;
        }
        self.guest_lost(side, host);
        if host && (self.owned(side) || self.guest.at == side) {
            self.oracle.host_crash();
        }
        self.hv_died(side);
        let delay = self.dice.delay(200 * MS);
        self.after(delay, Event::Restart(side));
    }

    /// Whether a side owned the disk, by its last durable record.
    fn owned(&self, side: usize) -> bool {
        let MigrationRecord::V1 { role, .. } = &self.sides[side].record;
        match role {
            Role::Serving => true,
            Role::Source(r) => matches!(r.stage, SourceStage::Pushing | SourceStage::Offered),
            Role::Destination(r) => {
                matches!(r.stage, DestinationStage::Active { .. } | DestinationStage::Complete)
            }
            Role::Idle => false,
        }
    }

    // ---- starting -----------------------------------------------------------------------------------------------

    pub(crate) fn restart(&mut self, side: usize) {
        if self.sides[side].alive || self.sides[side].daemon.is_some() {
            return;
        }
        if self.now > 0 {
            self.maybe_strike(side, 40);
        }
        let before = self.sides[side].disk.failures();
        let (geometry, queues) = (self.geometry, self.plan.queues);
        let opened = self.sides[side].open(geometry, queues).map(|daemon| {
            self.sides[side].daemon = Some(daemon);
        });
        if let Err(why) = opened.and_then(|()| self.take_up(side)) {
            self.start_failed(side, before, &why);
        }
    }

    /// A daemon that cannot start says why and is started again; it has no reason but its disk.
    fn start_failed(&mut self, side: usize, failures_before: u64, why: &str) {
        self.tell(|| format!("side {side} does not start: {why}"));
        let failed = self.sides[side].disk.failures() > failures_before;
        assert!(failed, "side {side} does not start, and its disk has not failed: {why}");
        self.kill(side, false);
    }

    /// Takes up the role that the record tells of.
    fn take_up(&mut self, side: usize) -> Result<(), String> {
        let volume = self.volume(side);
        let store = volume.store();
        let recorded = store.record.load();
        if self.now == 0 {
            // Chosen by chance in a daemon; here a run must be the same twice.
            let id = VolumeId([side as u8 + 1; 16]);
            store.adopt(id, "sim", false, None).map_err(|e| e.to_string())?;
        }
        let superblock = store.superblock();
        let s = &mut self.sides[side];
        s.run += 1;
        s.data_lost = false;
        s.write_cache = volume.write_cache();
        s.virgin = recorded.is_none();
        s.volume_id = superblock.volume;
        s.epoch = Epoch(1);
        let Some((record, same_boot)) = recorded else {
            // The first side serves a disk of its own, the other one waits for one.
            if side == 0 {
                let record =
                    MigrationRecord::V1 { volume: superblock.volume, epoch: Epoch(1), role: Role::Serving };
                store.record.store(&record).map_err(|e| e.to_string())?;
                self.is_durable(side, &record);
                self.sides[side].role = NodeRole::Serving;
                self.open_gate(side);
            }
            self.started(side);
            return Ok(());
        };
        self.is_durable(side, &record);
        let MigrationRecord::V1 { volume, epoch, role } = record;
        self.tell(|| format!("side {side} starts as {role:?} {epoch:?}, same boot {same_boot}"));
        self.sides[side].epoch = epoch;
        self.sides[side].volume_id = volume;
        match role {
            Role::Serving => {
                self.sides[side].role = NodeRole::Serving;
                self.open_gate(side);
            }
            Role::Idle => {
                self.close_gate(side, Closed::Idle);
                // The future has nothing to wait for.
                let transfer = self.transfer(side);
                let mut wipe = std::pin::pin!(transfer.wipe());
                let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                match wipe.as_mut().poll(&mut context) {
                    std::task::Poll::Ready(result) => result.map_err(|e| e.to_string())?,
                    std::task::Poll::Pending => panic!("a wipe waits for the clock"),
                }
            }
            Role::Source(record) => self.resume_source(side, &record, same_boot),
            Role::Destination(record) => return self.take_up_destination(side, record, same_boot),
        }
        self.started(side);
        Ok(())
    }

    /// The daemon is there: the hypervisor finds it, and the guest asks again.
    fn started(&mut self, side: usize) {
        self.sides[side].alive = true;
        self.upkeep(side, false);
        self.guest_back(side);
    }

    fn resume_source(&mut self, side: usize, record: &SourceRecord, same_boot: bool) {
        self.sides[side].run += 1;
        let (volume, transfer) = (self.volume(side), self.transfer(side));
        volume.tracker().arm(self.geometry.chunk_count());
        let strategy = Strategy::from_number(record.strategy).expect("strategy");
        let params = self.arm_params(side, record.migration, strategy, record.threshold);
        let modified: Vec<_> = transfer.modified_chunks().iter().collect();
        let exposed =
            matches!(record.stage, SourceStage::Offered | SourceStage::Relinquished { synced: false });
        let lost = !same_boot && exposed;
        let epoch = self.sides[side].epoch;
        let session = SourceSession::resume(self.clock(), params, record, epoch, modified, lost);
        self.sides[side].data_lost = lost;
        self.sides[side].role = NodeRole::Source(Box::new(session));
        if record.stage == SourceStage::Pushing {
            self.open_gate(side);
        } else {
            self.close_gate(side, Closed::Offered);
        }
    }

    fn modified_at_source(&self, side: usize) -> Result<Vec<(ChunkId, u8)>, String> {
        let stored = self.volume(side).store().load_remaining().map_err(|e| e.to_string())?;
        let runs = stored.filter(|(epoch, _)| *epoch == self.sides[side].epoch).map(|(_, runs)| runs);
        let chunks = runs.unwrap_or_default().into_iter().flat_map(|run| {
            (run.first.0..run.first.0 + run.run).map(move |chunk| (ChunkId(chunk), run.count))
        });
        Ok(chunks.collect())
    }

    fn take_up_destination(
        &mut self,
        side: usize,
        record: DestinationRecord,
        same_boot: bool,
    ) -> Result<(), String> {
        let volume = self.volume(side);
        let store = volume.store();
        let handed = matches!(record.stage, DestinationStage::Prepared | DestinationStage::Active { .. });
        store.map.keep_versions(true);
        let epoch = self.sides[side].epoch;
        if handed {
            store.map.set_handoff(epoch);
        }
        let committed = store.recovered.committed_handoff.is_some_and(|committed| committed >= epoch);
        if same_boot || record.stage == DestinationStage::Complete || committed {
            self.resume_destination(side, &record)?;
            self.started(side);
            return Ok(());
        }
        self.stats.reverts += 1;
        let entries = if handed { self.modified_at_source(side)? } else { Vec::new() };
        let modified: ChunkSet = entries.iter().map(|entry| entry.0).collect();
        self.tell(|| format!("side {side} takes back what had come: {entries:?}"));
        let transfer = self.transfer(side);
        let run = self.sides[side].run;
        if let Some(daemon) = &mut self.sides[side].daemon {
            daemon.starting = Some(record);
            daemon
                .tasks
                .spawn(async move { (run, Done::Reverted(transfer.revert_to_remote(&modified).await)) });
        }
        Ok(())
    }

    pub(crate) fn reverted(&mut self, side: usize, result: Result<(), TransferError>) {
        let record = self.sides[side].daemon.as_mut().and_then(|daemon| daemon.starting.take());
        let resumed = match (result, record) {
            (Ok(()), Some(record)) => self.resume_destination(side, &record),
            (Ok(()), None) => Ok(()),
            (Err(error), _) => Err(error.to_string()),
        };
        match resumed {
            Ok(()) => self.started(side),
            Err(why) => self.start_failed(side, 0, &why),
        }
    }

    fn resume_destination(&mut self, side: usize, record: &DestinationRecord) -> Result<(), String> {
        self.sides[side].run += 1;
        self.sides[side].installed = 0;
        let (volume, transfer) = (self.volume(side), self.transfer(side));
        let handed = matches!(record.stage, DestinationStage::Prepared | DestinationStage::Active { .. });
        let entries = if handed { self.modified_at_source(side)? } else { Vec::new() };
        let counts: BTreeMap<ChunkId, u8> = entries.into_iter().collect();
        let remote = transfer.remote_chunks();
        let remaining: Vec<_> =
            remote.iter().map(|chunk| (chunk, counts.get(&chunk).copied().unwrap_or(0))).collect();
        let have = transfer.received_versions();
        self.tell(|| format!("  has {have:?}, remaining {remaining:?}"));
        let owner = matches!(record.stage, DestinationStage::Active { .. } | DestinationStage::Complete);
        if record.stage == (DestinationStage::Active { source_synced: false }) {
            volume.flush_gate().close();
        }
        let (facts, epoch) = (self.facts(side, false, None), self.sides[side].epoch);
        let session = DestinationSession::resume(facts, record, epoch, have, remaining);
        self.sides[side].virgin = false;
        self.sides[side].role = NodeRole::Destination(Box::new(session));
        if owner {
            self.open_gate(side);
        } else {
            self.close_gate(side, Closed::Receiving);
        }
        Ok(())
    }
}
