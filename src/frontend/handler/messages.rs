// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The handler's answer to each message, in the order of the crate's trait; the parent has what they share.

use super::super::device_state;
use super::super::dirty_log::DirtyLog;
use super::super::features::{self, CAPACITY_SIZE, WRITEBACK_OFFSET};
use super::super::inflight::{self, InflightRegion};
use super::super::memory::{GuestMemory, MAX_REGIONS, RegionInfo};
use super::super::ring::Command;
use super::super::ring_mem::{RingAddresses, RingMemory};
use super::super::signal::{HypervisorSignal, Verdict};
use super::{Handler, Queue, Transfer};
use crate::config::MAX_QUEUES;
use std::fs::File;
use std::sync::Arc;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{GpuBackend, Result, VhostUserBackendReqHandlerMut};

fn region(region: &VhostUserMemoryRegion) -> RegionInfo {
    RegionInfo {
        guest: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated by the specification, which says to ignore it.
    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Drains and forgets the rings. The disk is not touched: QEMU resets an incoming device too.
    fn reset_device(&mut self) -> Result<()> {
        for index in 0..self.queues.len() {
            self.stop(index);
            let Queue { call, error, .. } = std::mem::take(&mut self.queues[index]);
            self.queues[index] = Queue { call, error, ..Queue::default() };
        }
        self.inflight = None;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(features::virtio_features(self.parts.volume.read_only()))
    }

    fn set_features(&mut self, wanted: u64) -> Result<()> {
        let offered = features::virtio_features(self.parts.volume.read_only());
        if wanted & !offered != 0 {
            log::warn!("feature bits {:#x} were not offered; ignored", wanted & !offered);
        }
        let old = std::mem::replace(&mut self.features, wanted & offered);
        if old == self.features {
            return Ok(());
        }
        let logs = (old & features::LOG_ALL != 0, self.features & features::LOG_ALL != 0);
        if logs == (true, false) {
            self.log = None;
        }
        self.update_rings();
        self.parts.signals.tell(HypervisorSignal::FeaturesAcked(self.features));
        match logs {
            (false, true) => self.parts.signals.tell(HypervisorSignal::LogStarted),
            (true, false) => self.parts.signals.tell(HypervisorSignal::LogStopped),
            _ => {}
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.setting_up();
        match GuestMemory::new(regions.iter().map(region).zip(files)) {
            Ok(table) => self.set_memory(table),
            Err(error) => return self.refuse(error.to_string()),
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.setting_up();
        let queue = self.checked(index)?;
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() => {
                if !self.queues[queue].started {
                    self.queues[queue].size = size;
                }
                Ok(())
            }
            _ => self.refuse(format!("queue {index}: ring size {num} is not a power of two up to 32768")),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        self.setting_up();
        let queue = self.checked(index)?;
        let used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let addresses = RingAddresses { descriptors, available, used, used_log };
        let size = self.queues[queue].size;
        if self.queues[queue].started
            && let Err(error) = RingMemory::new(&self.memory, &addresses, size)
        {
            return self.refuse(format!("queue {index}: {error}"));
        }
        self.queues[queue].addresses = Some(addresses);
        self.update_ring(queue);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.setting_up();
        let queue = self.checked(index)?;
        let Ok(base) = u16::try_from(base) else {
            return self.refuse(format!("queue {index}: base {base} is no index of a split ring"));
        };
        if self.queues[queue].started {
            log::warn!("queue {index}: SET_VRING_BASE on a running ring is ignored");
        } else {
            self.queues[queue].base = base;
        }
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = usize::try_from(index).ok().filter(|queue| *queue < self.queues.len());
        let Some(queue) = queue else {
            log::warn!("GET_VRING_BASE of queue {index}, which does not exist");
            return Ok(VhostUserVringState::new(index, 0));
        };
        self.stop(queue);
        Ok(VhostUserVringState::new(index, u32::from(self.queues[queue].base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.setting_up();
        let queue = self.checked(u32::from(index))?;
        self.queues[queue].kick = Some(fd.map(Arc::new));
        self.update_ring(queue);
        self.start_if_ready(queue)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let queue = self.checked(u32::from(index))?;
        self.queues[queue].call = fd.map(Arc::new);
        self.update_ring(queue);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let queue = self.checked(u32::from(index))?;
        self.queues[queue].error = fd.map(Arc::new);
        self.update_ring(queue);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(features::protocol_features())
    }

    fn set_protocol_features(&mut self, wanted: u64) -> Result<()> {
        self.protocol = wanted;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let queue = self.checked(index)?;
        self.queues[queue].enabled = enable;
        match (self.queues[queue].started, enable) {
            (false, true) => self.start_if_ready(queue),
            (false, false) => Ok(()),
            (true, true) => {
                self.stop_since = None;
                self.command(queue, Command::Resume).map(drop).or_else(|why| self.refuse(why))
            }
            (true, false) => {
                let since = self.stopping();
                self.command(queue, Command::Pause(since)).map(drop).or_else(|why| self.refuse(why))
            }
        }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let config = self.config();
        if offset == 0 && size >= CAPACITY_SIZE {
            self.parts.channel.read(config.capacity);
        }
        Ok(config.part(offset, size))
    }

    /// Only `writeback` can be written (virtio 1.2, 5.2.4); QEMU does not say it again at the destination.
    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let at = usize::try_from(offset).ok().and_then(|offset| WRITEBACK_OFFSET.checked_sub(offset));
        let Some(value) = at.and_then(|at| bytes.get(at)) else {
            log::debug!("SET_CONFIG of {} bytes at {offset} changes nothing", bytes.len());
            return Ok(());
        };
        let on = *value != 0;
        if self.features & features::CONFIG_WCE != 0 && on != self.parts.volume.write_cache() {
            log::info!("the guest sets its write cache to write-{}", if on { "back" } else { "through" });
            self.parts.volume.set_write_cache(on);
            self.parts.signals.tell(HypervisorSignal::WriteCache(on));
        }
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        self.refuse("this is no GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        self.refuse("there are no shared objects")
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if queues == 0 || queues > MAX_QUEUES || !size.is_power_of_two() {
            return self.refuse(format!("no in-flight region for {queues} queues of {size}"));
        }
        match inflight::create(queues, size) {
            Ok(file) => {
                self.own_region = true;
                Ok((VhostUserInflight::new(inflight::region_bytes(queues, size), 0, queues, size), file))
            }
            Err(error) => self.refuse(format!("in-flight region: {error}")),
        }
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *region;
        match InflightRegion::open(&file, mmap_offset, mmap_size, num_queues, queue_size) {
            Ok(region) => self.inflight = Some(Arc::new(region)),
            Err(error) => return self.refuse(format!("in-flight region: {error}")),
        }
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        added: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        self.setting_up();
        let base = if self.stale { Arc::default() } else { Arc::clone(&self.memory) };
        match base.with(region(added), &file) {
            Ok(table) => self.set_memory(table),
            Err(error) => return self.refuse(error.to_string()),
        }
        Ok(None)
    }

    fn remove_mem_region(&mut self, removed: &VhostUserSingleMemoryRegion) -> Result<()> {
        match self.memory.without(region(removed)) {
            Some(table) => self.set_memory(table),
            None => return self.refuse("REM_MEM_REG of a region that is not there"),
        }
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        stream: File,
    ) -> Result<Option<File>> {
        self.transfer = Transfer::Failed;
        match direction {
            VhostTransferStateDirection::SAVE => match self.save(stream) {
                Ok(()) => self.transfer = Transfer::Saved,
                Err(why) => return self.refuse(format!("device state is not saved: {why}")),
            },
            VhostTransferStateDirection::LOAD => self.transfer = Transfer::Loading(stream),
        }
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        match std::mem::take(&mut self.transfer) {
            Transfer::Saved => Ok(()),
            Transfer::None | Transfer::Failed => self.refuse("no device state was transferred"),
            Transfer::Loading(stream) => match device_state::load(stream) {
                Ok(ticket) => match self.parts.signals.ask(HypervisorSignal::LoadTicket(ticket)) {
                    Verdict::Refuse(why) => self.refuse(format!("device state is not for this disk: {why}")),
                    Verdict::Proceed | Verdict::Ticket(_) => Ok(()),
                },
                Err(error) => self.refuse(error.to_string()),
            },
        }
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        self.refuse("there are no shared memory regions")
    }

    /// Maps the log and has every ring use it before the reply. May repeat with a new log.
    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        match DirtyLog::new(&file, log.mmap_offset, log.mmap_size) {
            Ok(log) => self.log = Some(Arc::new(log)),
            Err(error) => return self.refuse(format!("dirty log: {error}")),
        }
        self.update_rings();
        Ok(())
    }
}
