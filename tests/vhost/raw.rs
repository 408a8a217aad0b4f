// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A queue of any size without a driver's good manners: chains of any shape, in one page table of its own.

use crate::guest::{Guest, INDIRECT, Memory, NEXT, WRITE};
use std::os::fd::AsRawFd;
use std::process::{Command, ExitStatus, Stdio};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where front-end addresses begin, as `guest` has it.
pub const USER: u64 = 0x7f00_0000_0000;

/// A queue that lies at any address, with up to 1024 descriptors, and room for its requests behind it.
pub struct Raw {
    pub index: usize,
    pub size: u16,
    pub base: u64,
    pub kick: EventFd,
    pub error: EventFd,
    pub available: u16,
    pub used: u16,
}

impl Raw {
    pub fn new(index: usize, size: u16, base: u64) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self { index, size, base, kick: event(), error: event(), available: 0, used: 0 }
    }

    pub fn available_ring(&self) -> u64 {
        self.base + 0x8000
    }

    pub fn used_ring(&self) -> u64 {
        self.base + 0xc000
    }

    /// A request's header.
    pub fn header(&self, slot: u16) -> u64 {
        self.base + 0x1_0000 + 16 * u64::from(slot)
    }

    /// A request's status byte.
    pub fn status(&self, slot: u16) -> u64 {
        self.base + 0x1_4000 + u64::from(slot)
    }

    /// A request's indirect table of up to 8 descriptors; the last one may be as long as one likes.
    pub fn table(&self, slot: u16) -> u64 {
        self.base + 0x1_8000 + 128 * u64::from(slot)
    }

    /// What SET_VRING_ADDR says.
    pub fn config(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: USER + self.base,
            used_ring_addr: USER + self.used_ring(),
            avail_ring_addr: USER + self.available_ring(),
            log_addr: None,
        }
    }

    /// Starts it at index 0, on memory that is set; it forgets what was.
    pub fn start(&mut self, guest: &mut Guest) {
        self.set_up(guest);
        guest.link.set_vring_enable(self.index, true).unwrap();
    }

    fn set_up(&mut self, guest: &Guest) {
        (self.available, self.used) = (0, 0);
        guest.memory.write(self.available_ring(), &[0; 4]);
        guest.memory.write(self.used_ring(), &[0; 4]);
        guest.link.set_vring_num(self.index, self.size).unwrap();
        guest.link.set_vring_base(self.index, 0).unwrap();
        guest.link.set_vring_addr(self.index, &self.config()).unwrap();
        guest.link.set_vring_err(self.index, &self.error).unwrap();
        guest.link.set_vring_kick(self.index, &self.kick).unwrap();
    }

    /// Writes the header of a request.
    pub fn ask(&self, memory: &Memory, slot: u16, kind: u32, sector: u64) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        memory.write(self.header(slot), &header);
        memory.write(self.status(slot), &[0xee]);
    }

    /// Writes a table of these descriptors (address, length, flags without NEXT), chained in order.
    pub fn fill_table(memory: &Memory, at: u64, pieces: &[(u64, u32, u16)]) {
        let mut bytes = Vec::with_capacity(16 * pieces.len());
        for (n, (address, len, flags)) in (1u16..).zip(pieces) {
            let more = if usize::from(n) < pieces.len() { NEXT } else { 0 };
            bytes.extend(address.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend((flags | more).to_le_bytes());
            bytes.extend(n.to_le_bytes());
        }
        memory.write(at, &bytes);
    }

    /// Makes a head stand for the table at an address.
    pub fn point(&self, memory: &Memory, head: u16, table: u64, descriptors: usize) {
        let bytes = [
            &table.to_le_bytes()[..],
            &(16 * descriptors as u32).to_le_bytes(),
            &INDIRECT.to_le_bytes(),
            &[0; 2],
        ]
        .concat();
        memory.write(self.base + 16 * u64::from(head), &bytes);
    }

    /// Lays out a whole request under a head, with `data` between header and status.
    pub fn request(&self, memory: &Memory, head: u16, (kind, sector): (u32, u64), data: &[(u64, u32, u16)]) {
        self.ask(memory, head, kind, sector);
        let pieces = [&[(self.header(head), 16, 0)][..], data, &[(self.status(head), 1, WRITE)]].concat();
        Self::fill_table(memory, self.table(head), &pieces);
        self.point(memory, head, self.table(head), pieces.len());
    }

    /// Makes heads available, all with one store of the index.
    pub fn offer(&mut self, memory: &Memory, heads: impl IntoIterator<Item = u16>) {
        for head in heads {
            let at = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
            memory.write(at, &head.to_le_bytes());
            self.available = self.available.wrapping_add(1);
        }
        memory.write(self.available_ring() + 2, &self.available.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    /// Takes what is in the used ring: heads and lengths.
    pub fn reap(&mut self, memory: &Memory) -> Vec<(u16, u32)> {
        let mut done = Vec::new();
        let now = memory.read16(self.used_ring() + 2);
        while self.used != now {
            let element = memory.read(self.used_ring() + 4 + 8 * u64::from(self.used % self.size), 8);
            let len = u32::from_le_bytes(element[4..].try_into().unwrap());
            done.push((u16::from_le_bytes([element[0], element[1]]), len));
            self.used = self.used.wrapping_add(1);
        }
        done
    }

    pub fn status_of(&self, memory: &Memory, slot: u16) -> u8 {
        memory.read(self.status(slot), 1)[0]
    }
}

/// Sets features, memory and an in-flight region for rings of up to 1024, without starting any.
pub fn prepare(guest: &mut Guest, queues: u16, ring: u16) {
    guest.link.set_features(guest.features).unwrap();
    new_region(guest, queues, ring);
    guest.link.set_mem_table(&guest.memory.regions()).unwrap();
}

/// As a front-end does it at each reset: what was in flight before is forgotten.
pub fn new_region(guest: &mut Guest, queues: u16, ring: u16) {
    let (region, file) = guest.link.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, ring)).unwrap();
    guest.link.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
}

const CHILD: &str = "BLKFERRY_TEST_ALONE";

/// For a test that must be alone in its process: in the process that it makes for that, this is `None`, and the test
/// goes on; in the first one it is how the other ended.
pub fn alone(name: &str) -> Option<ExitStatus> {
    child(Command::new(std::env::current_exe().unwrap()), name)
}

/// As [`alone`], in a mount namespace of its own where it may mount what it likes; whatever it mounts goes with it.
pub fn with_mounts(name: &str, options: &[&str]) -> Option<ExitStatus> {
    let mut command = Command::new("unshare");
    command.arg("--mount").args(options).arg(std::env::current_exe().unwrap());
    child(command, name)
}

fn child(mut command: Command, name: &str) -> Option<ExitStatus> {
    if std::env::var_os(CHILD).is_some() {
        return None;
    }
    command.args([name, "--exact", "--nocapture"]).env(CHILD, "1").stdin(Stdio::null());
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    println!("{}", String::from_utf8_lossy(&output.stdout));
    println!("{}", String::from_utf8_lossy(&output.stderr));
    Some(output.status)
}

/// Runs a program that must succeed; returns what it prints.
pub fn sh(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {} {error}", output.status);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Memory of this process, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct MemoryUse {
    /// Anonymous pages that it has (`RssAnon`).
    pub anonymous: u64,
    /// Address space for data (`VmData`).
    pub data: u64,
}

pub fn memory_use() -> MemoryUse {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    MemoryUse { anonymous: field("RssAnon:"), data: field("VmData:") }
}
