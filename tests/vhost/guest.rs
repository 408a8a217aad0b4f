// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A front-end and a driver in one: the messages that QEMU sends, and split rings in a memory file.
//!
//! Guest memory is reached by `pread` and `pwrite` on the file, which is coherent with the back-end's mapping.

use rustix::fs::{MemfdFlags, memfd_create};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend as Link, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Usual size of a ring.
pub const RING: u16 = 128;
pub const EVENT_IDX: u64 = 1 << 29;
pub const LOG_ALL: u64 = 1 << 26;
const HALF: u64 = 8 << 20;
/// The second region's guest-physical address.
pub const HIGH: u64 = 1 << 32;
const USER: u64 = 0x7f00_0000_0000;
const QUEUE_AREA: u64 = 0x1_0000;
const DATA: u64 = 0x20_0000;
/// Bytes of a slot's data buffer.
pub const SLOT: u64 = 16 << 10;
/// Usual number of requests that a queue may have in flight.
pub const SLOTS: u16 = 40;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// The guest's memory: two regions of 8 MiB in one file.
pub struct Memory(pub File);

impl Memory {
    pub fn new() -> Arc<Self> {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(2 * HALF).unwrap();
        Arc::new(Self(file))
    }

    fn at(address: u64) -> u64 {
        if address >= HIGH { address - HIGH + HALF } else { address }
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, Self::at(address)).unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, Self::at(address)).unwrap();
        bytes
    }

    pub fn read16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address, 2).try_into().unwrap())
    }

    pub fn regions(&self) -> [VhostUserMemoryRegionInfo; 2] {
        [(0, 0), (HIGH, HALF)].map(|(guest, offset)| VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: HALF,
            userspace_addr: USER + guest,
            mmap_offset: offset,
            mmap_handle: self.0.as_raw_fd(),
        })
    }
}

/// A request that the driver has made available.
#[derive(Debug, Clone)]
struct Sent {
    slot: u16,
    status: u64,
    /// Where the guest will find data, and how much.
    data: Option<(u64, usize)>,
}

/// A request that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    pub head: u16,
    pub status: u8,
    pub data: Vec<u8>,
}

/// The driver's side of one ring.
pub struct Queue {
    pub index: usize,
    /// Entries of the ring.
    pub ring: u16,
    pub slots: u16,
    pub base: u64,
    pub kick: EventFd,
    pub call: EventFd,
    pub error: EventFd,
    pub available: u16,
    pub used: u16,
    sent: HashMap<u16, Sent>,
    free: VecDeque<u16>,
}

impl Queue {
    pub fn new(index: usize) -> Self {
        Self::with(index, RING, SLOTS)
    }

    pub fn with(index: usize, ring: u16, slots: u16) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            index,
            ring,
            slots,
            base: index as u64 * QUEUE_AREA,
            kick: event(),
            call: event(),
            error: event(),
            available: 0,
            used: 0,
            sent: HashMap::new(),
            free: (0..slots).collect(),
        }
    }

    pub fn available_ring(&self) -> u64 {
        self.base + if self.ring > 256 { 0x4000 } else { 0x1000 }
    }

    pub fn used_ring(&self) -> u64 {
        self.base + if self.ring > 256 { 0x5000 } else { 0x2000 }
    }

    pub fn header(&self, slot: u16) -> u64 {
        self.base + 0x8000 + 64 * u64::from(slot)
    }

    pub fn status(&self, slot: u16) -> u64 {
        self.base + 0xb000 + u64::from(slot)
    }

    fn table(&self, slot: u16) -> u64 {
        self.base + 0xc000 + 256 * u64::from(slot)
    }

    pub fn data(&self, slot: u16) -> u64 {
        DATA + (self.index as u64 * u64::from(self.slots) + u64::from(slot)) * SLOT
    }
}

/// What the driver asks for.
pub enum Ask<'a> {
    In(u64, usize),
    Out(u64, &'a [u8]),
    Flush,
    Id,
    Zero(u32, &'a [(u64, u32, u32)]),
    Other(u32),
}

/// The front-end and the driver.
pub struct Guest {
    pub link: Link,
    pub memory: Arc<Memory>,
    pub queues: Vec<Queue>,
    pub features: u64,
    pub indirect: bool,
    /// A request is two descriptors: the header and what is written lie side by side, and what is read and the status.
    pub compact: bool,
    /// Data buffers in the second region.
    pub high: bool,
    pub inflight: Option<(VhostUserInflight, File)>,
    /// Rings have VRING_F_LOG set.
    pub ring_log: bool,
    /// Where writes to used rings are logged, if not where they are.
    pub log_at: Option<u64>,
}

impl Guest {
    /// Connects and does what QEMU does at realize.
    pub fn connect(path: &Path, queues: usize) -> Self {
        Self::connect_with(path, queues, Memory::new())
    }

    pub fn connect_with(path: &Path, queues: usize, memory: Arc<Memory>) -> Self {
        let mut link = Link::connect(path, queues as u64).unwrap();
        let features = link.get_features().unwrap();
        let protocol = link.get_protocol_features().unwrap();
        for needed in [VhostUserProtocolFeatures::CONFIG, VhostUserProtocolFeatures::LOG_SHMFD] {
            assert!(protocol.contains(needed));
        }
        link.set_features(features & !LOG_ALL).unwrap();
        link.set_protocol_features(protocol).unwrap();
        assert!(link.get_queue_num().unwrap() >= queues as u64);
        assert!(link.get_max_mem_slots().unwrap() > 8);
        link.set_owner().unwrap();
        link.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let queues: Vec<Queue> = (0..queues).map(Queue::new).collect();
        for queue in &queues {
            link.set_vring_call(queue.index, &queue.call).unwrap();
            link.set_vring_err(queue.index, &queue.error).unwrap();
        }
        let features = features & !LOG_ALL;
        Self {
            link,
            memory,
            queues,
            features,
            indirect: false,
            compact: false,
            high: false,
            inflight: None,
            ring_log: false,
            log_at: None,
        }
    }

    pub fn config(&mut self, offset: u32, len: usize) -> Vec<u8> {
        let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
        self.link.get_config(offset, len as u32, flags, &vec![0; len]).unwrap().1
    }

    pub fn set_features(&mut self, features: u64) {
        self.features = features;
        self.link.set_features(features).unwrap();
    }

    /// What SET_VRING_ADDR says.
    pub fn ring_config(&self, index: usize, logged: bool) -> VringConfigData {
        let queue = &self.queues[index];
        VringConfigData {
            queue_max_size: queue.ring,
            queue_size: queue.ring,
            flags: u32::from(logged),
            desc_table_addr: USER + queue.base,
            used_ring_addr: USER + queue.used_ring(),
            avail_ring_addr: USER + queue.available_ring(),
            log_addr: logged.then(|| self.log_at.unwrap_or(queue.used_ring())),
        }
    }

    pub fn set_addresses(&self, index: usize) {
        self.link.set_vring_addr(index, &self.ring_config(index, self.ring_log)).unwrap();
    }

    /// The messages of a start up to the last KICK, for these rings.
    pub fn set_up(&mut self, bases: &[u32]) {
        self.link.set_features(self.features).unwrap();
        if self.inflight.is_none() {
            let wanted = VhostUserInflight::new(0, 0, self.queues.len() as u16, self.queues[0].ring);
            self.inflight = Some(self.link.get_inflight_fd(&wanted).unwrap());
        }
        let (region, file) = self.inflight.as_ref().unwrap();
        self.link.set_inflight_fd(region, file.as_raw_fd()).unwrap();
        self.link.set_mem_table(&self.memory.regions()).unwrap();
        self.set_up_rings(bases);
    }

    pub fn set_up_rings(&mut self, bases: &[u32]) {
        for (index, base) in bases.iter().enumerate() {
            self.link.set_vring_num(index, self.queues[index].ring).unwrap();
            self.link.set_vring_base(index, *base as u16).unwrap();
            self.set_addresses(index);
            let queue = &self.queues[index];
            queue.kick.write(1).unwrap();
            self.link.set_vring_kick(index, &queue.kick).unwrap();
        }
    }

    /// A whole START.
    pub fn start(&mut self, bases: &[u32]) {
        self.set_up(bases);
        self.enable(true).unwrap();
    }

    pub fn start_fresh(&mut self) {
        let bases = vec![0; self.queues.len()];
        self.start(&bases);
    }

    /// ENABLE for all rings, configured or not, as QEMU does.
    pub fn enable(&mut self, on: bool) -> vhost::Result<()> {
        (0..self.queues.len()).try_for_each(|index| self.link.set_vring_enable(index, on))
    }

    /// A whole STOP; returns the bases.
    pub fn stop(&mut self) -> Vec<u32> {
        self.enable(false).unwrap();
        (0..self.queues.len()).map(|index| self.link.get_vring_base(index).unwrap()).collect()
    }

    pub fn log_base(&self, file: &File, size: u64) {
        let region =
            VhostUserDirtyLogRegion { mmap_size: size, mmap_offset: 0, mmap_handle: file.as_raw_fd() };
        self.link.set_log_base(0, Some(region)).unwrap();
    }

    pub fn descriptor(&self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        let bytes =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                .concat();
        self.memory.write(at, &bytes);
    }

    /// Puts a head into the available ring and moves the index.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let queue = &mut self.queues[queue];
        let ring = queue.available_ring();
        self.memory.write(ring + 4 + 2 * u64::from(queue.available % queue.ring), &head.to_le_bytes());
        queue.available = queue.available.wrapping_add(1);
        self.memory.write(ring + 2, &queue.available.to_le_bytes());
    }

    /// Lays out a request and makes it available, without a kick; returns its head.
    pub fn send(&mut self, index: usize, ask: &Ask<'_>) -> u16 {
        let queue = &mut self.queues[index];
        let slot = queue.free.pop_front().expect("a free slot");
        let at = queue.data(slot) + if self.high { HIGH - DATA } else { 0 };
        let zeroes: Vec<u8>;
        let (kind, sector, out, into): (u32, u64, &[u8], usize) = match ask {
            Ask::In(sector, len) => (T_IN, *sector, &[], *len),
            Ask::Out(sector, data) => (T_OUT, *sector, data, 0),
            Ask::Flush => (T_FLUSH, 0, &[], 0),
            Ask::Id => (T_GET_ID, 0, &[], 20),
            Ask::Zero(kind, segments) => {
                let bytes = |(sector, count, flags): &(u64, u32, u32)| {
                    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
                };
                zeroes = segments.iter().flat_map(bytes).collect();
                (*kind, 0, &zeroes, 0)
            }
            Ask::Other(kind) => (*kind, 0, &[], 0),
        };
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let (mut header_at, mut at, mut status_at) = (queue.header(slot), at, queue.status(slot));
        let mut pieces = Vec::new();
        if self.compact {
            header_at = at;
            at += 16;
            status_at = at + out.len().max(into) as u64;
            pieces.push((header_at, 16 + out.len() as u32, 0));
            pieces.push((status_at - into as u64, into as u32 + 1, WRITE));
        } else {
            pieces.push((header_at, 16, 0));
            let len = out.len().max(into);
            if len > 0 {
                pieces.push((at, len as u32, if into > 0 { WRITE } else { 0 }));
            }
            pieces.push((status_at, 1, WRITE));
        }
        self.memory.write(header_at, &header);
        self.memory.write(status_at, &[0xee]);
        self.memory.write(at, out);
        let head = if self.indirect { slot } else { slot * if self.compact { 2 } else { 3 } };
        let (table, first) =
            if self.indirect { (queue.table(slot), 0) } else { (queue.base + 16 * u64::from(head), head) };
        queue.sent.insert(head, Sent { slot, status: status_at, data: (into > 0).then_some((at, into)) });
        let base = queue.base;
        for (n, (address, len, flags)) in (0u16..).zip(&pieces) {
            let more = if usize::from(n) + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(table + 16 * u64::from(n), (*address, *len, flags | more, first + n + 1));
        }
        if self.indirect {
            let len = 16 * pieces.len() as u32;
            self.descriptor(base + 16 * u64::from(head), (table, len, INDIRECT, 0));
        }
        self.offer(index, head);
        head
    }

    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    /// Takes what is in the used ring.
    pub fn reap(&mut self, index: usize) -> Vec<Done> {
        let queue = &mut self.queues[index];
        let mut done = Vec::new();
        let ring = queue.used_ring();
        let now = self.memory.read16(ring + 2);
        while queue.used != now {
            let element = self.memory.read(ring + 4 + 8 * u64::from(queue.used % queue.ring), 8);
            let head = u16::from_le_bytes([element[0], element[1]]);
            let len = u32::from_le_bytes(element[4..].try_into().unwrap());
            queue.used = queue.used.wrapping_add(1);
            // With EVENT_IDX: call me for the next one.
            self.memory
                .write(queue.available_ring() + 4 + 2 * u64::from(queue.ring), &queue.used.to_le_bytes());
            let sent = queue.sent.remove(&head).unwrap_or_else(|| panic!("head {head} was not in flight"));
            let status = self.memory.read(sent.status, 1)[0];
            let data = sent.data.map(|(at, len)| self.memory.read(at, len)).unwrap_or_default();
            if status == OK {
                assert_eq!(len as usize, data.len() + 1, "used length");
            }
            queue.free.push_back(sent.slot);
            done.push(Done { head, status, data });
        }
        done
    }

    /// Whether the device asks for a kick, now that the available index has moved on from `old`.
    pub fn wants_kick(&self, index: usize, old: u16) -> bool {
        let queue = &self.queues[index];
        if self.features & EVENT_IDX == 0 {
            return self.memory.read16(queue.used_ring()) & 1 == 0;
        }
        let event = self.memory.read16(queue.used_ring() + 4 + 8 * u64::from(queue.ring));
        queue.available.wrapping_sub(event).wrapping_sub(1) < queue.available.wrapping_sub(old)
    }

    /// Waits for `count` completions.
    pub fn wait(&mut self, index: usize, count: usize) -> Vec<Done> {
        let since = Instant::now();
        let mut done = Vec::new();
        while done.len() < count {
            done.append(&mut self.reap(index));
            assert!(
                since.elapsed() < Duration::from_secs(20),
                "queue {index}: {} of {count} completions came",
                done.len()
            );
            if done.len() < count {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        done
    }

    /// One request from beginning to end.
    pub fn ask(&mut self, index: usize, ask: &Ask<'_>) -> Done {
        self.send(index, ask);
        self.kick(index);
        self.wait(index, 1).remove(0)
    }

    pub fn in_flight(&self, index: usize) -> usize {
        self.queues[index].sent.len()
    }

    /// A new connection of the same guest, whose rings go on.
    pub fn reconnect(self, path: &Path) -> Self {
        let Self { link, memory, queues, features, indirect, compact, high, inflight, ring_log, log_at } =
            self;
        drop(link);
        let mut next = Self::connect_with(path, queues.len(), memory);
        next.queues = queues;
        for queue in &next.queues {
            next.link.set_vring_call(queue.index, &queue.call).unwrap();
            next.link.set_vring_err(queue.index, &queue.error).unwrap();
        }
        (next.features, next.indirect, next.compact, next.high) = (features, indirect, compact, high);
        (next.inflight, next.ring_log, next.log_at) = (inflight, ring_log, log_at);
        next
    }
}

/// Bytes that tell where they come from.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64)
        .map(|n| ((n / 8).wrapping_mul(31).wrapping_add(n).wrapping_add(seed) % 251) as u8)
        .collect()
}
