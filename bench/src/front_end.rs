// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The front-end: connects, negotiates as QEMU does, gives memory and rings to the back-end, and takes them back.

use crate::memory::GuestMemory;
use crate::ring::{Layout, Ring, Shape};
use anyhow::{Context, Result, bail};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend as Link, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_INDIRECT: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_PROTOCOL: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;
/// What this driver can use of what a back-end offers.
const KNOWN: u64 = F_SEG_MAX
    | F_RO
    | F_BLK_SIZE
    | F_FLUSH
    | F_MQ
    | F_DISCARD
    | F_INDIRECT
    | F_EVENT_IDX
    | F_PROTOCOL
    | F_VERSION_1;
/// Bytes of the configuration space up to and with the discard fields; every back-end has these.
const CONFIG_LEN: u32 = 60;

/// What the back-end says of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) size: u64,
    pub(crate) block_size: u32,
    pub(crate) seg_max: u32,
    pub(crate) read_only: bool,
    pub(crate) flush: bool,
    pub(crate) discard: bool,
    pub(crate) queues: u16,
    pub(crate) indirect: bool,
    pub(crate) event_idx: bool,
}

/// A connection whose rings do not run yet.
pub(crate) struct Negotiated {
    link: Link,
    socket: UnixStream,
    features: u64,
    pub(crate) disk: Disk,
    /// The process at the other end.
    pub(crate) peer: Option<u32>,
}

/// A device whose rings run.
pub(crate) struct Device {
    link: Link,
    /// The connection's socket, to see it end.
    pub(crate) socket: UnixStream,
    queues: usize,
}

fn connect(path: &Path, patience: Duration) -> Result<UnixStream> {
    let since = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                let starting =
                    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
                if !starting || since.elapsed() >= patience {
                    return Err(error).with_context(|| format!("connecting to {}", path.display()));
                }
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The peer as the kernel knows it: whoever called listen.
fn peer_of(stream: &UnixStream) -> Option<u32> {
    let pid = rustix::net::sockopt::socket_peercred(stream).ok()?.pid;
    u32::try_from(pid.as_raw_nonzero().get()).ok()
}

impl Negotiated {
    /// Connects, waiting for a back-end that is only just starting; refuses features in `without`.
    pub(crate) fn new(path: &Path, patience: Duration, options: &Refused) -> Result<Self> {
        let stream = connect(path, patience)?;
        let peer = peer_of(&stream);
        let socket = stream.try_clone().context("the connection")?;
        let mut link = Link::from_stream(stream, 1);
        let offered = link.get_features().context("GET_FEATURES")?;
        for (bit, name) in
            [(F_PROTOCOL, "VHOST_USER_F_PROTOCOL_FEATURES"), (F_VERSION_1, "VIRTIO_F_VERSION_1")]
        {
            if offered & bit == 0 {
                bail!("the back-end does not offer {name}");
            }
        }
        let mut features = offered & KNOWN;
        if options.event_idx {
            features &= !F_EVENT_IDX;
        }
        if options.indirect {
            features &= !F_INDIRECT;
        }
        let protocol = link.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        link.set_features(features).context("SET_FEATURES")?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG;
        link.set_protocol_features(protocol & wanted).context("SET_PROTOCOL_FEATURES")?;
        let queues = if protocol.contains(VhostUserProtocolFeatures::MQ) {
            link.get_queue_num().context("GET_QUEUE_NUM")?
        } else {
            1
        };
        link.set_owner().context("SET_OWNER")?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            link.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let config = read_config(&mut link)?;
        let disk = Disk::new(&config, features, u16::try_from(queues).unwrap_or(u16::MAX))?;
        Ok(Self { link, socket, features, disk, peer })
    }

    /// Gives memory and rings to the back-end and starts them. `shape` has been checked against `disk`.
    pub(crate) fn start(self, shape: Shape, queues: u16, huge: bool) -> Result<(Device, Vec<Ring>)> {
        let mut layouts = Vec::new();
        let mut end = 0;
        for _ in 0..queues {
            let layout = Layout::new(end, &shape);
            end = layout.end;
            layouts.push(layout);
        }
        let memory = Arc::new(GuestMemory::new(end, huge)?);
        let mut link = self.link;
        link.set_features(self.features).context("SET_FEATURES")?;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory.len() as u64,
            userspace_addr: memory.address() as u64,
            mmap_offset: 0,
            mmap_handle: memory.fd(),
        };
        link.set_mem_table(&[region]).context("SET_MEM_TABLE")?;
        let mut rings = Vec::new();
        for (index, layout) in layouts.into_iter().enumerate() {
            let ring = Ring::new(Arc::clone(&memory), layout, shape).context("eventfd")?;
            set_up(&link, index, &ring, &layout, shape.size, memory.address() as u64)
                .with_context(|| format!("setting up ring {index}"))?;
            rings.push(ring);
        }
        for index in 0..rings.len() {
            link.set_vring_enable(index, true).with_context(|| format!("SET_VRING_ENABLE {index}"))?;
        }
        Ok((Device { link, socket: self.socket, queues: rings.len() }, rings))
    }
}

/// Features not to use though they are offered.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Refused {
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
}

fn read_config(link: &mut Link) -> Result<Vec<u8>> {
    let blank = vec![0; CONFIG_LEN as usize];
    let (_, config) =
        link.get_config(0, CONFIG_LEN, VhostUserConfigFlags::WRITABLE, &blank).context("GET_CONFIG")?;
    Ok(config)
}

fn set_up(
    link: &Link,
    index: usize,
    ring: &Ring,
    layout: &Layout,
    size: u16,
    base: u64,
) -> vhost::Result<()> {
    link.set_vring_num(index, size)?;
    link.set_vring_base(index, 0)?;
    let addresses = VringConfigData {
        queue_max_size: size,
        queue_size: size,
        flags: 0,
        desc_table_addr: base + layout.descriptors as u64,
        used_ring_addr: base + layout.used as u64,
        avail_ring_addr: base + layout.available as u64,
        log_addr: None,
    };
    link.set_vring_addr(index, &addresses)?;
    link.set_vring_call(index, &ring.call)?;
    link.set_vring_kick(index, &ring.kick)
}

impl Disk {
    fn new(config: &[u8], features: u64, queues: u16) -> Result<Self> {
        let has = |bit: u64| features & bit != 0;
        let word = |at: usize| match config.get(at..at + 4) {
            Some(&[a, b, c, d]) => Ok(u32::from_le_bytes([a, b, c, d])),
            _ => bail!("the configuration space ends before byte {}", at + 4),
        };
        let sectors = u64::from(word(0)?) | u64::from(word(4)?) << 32;
        let size = sectors.checked_mul(512).context("the capacity is no number of bytes")?;
        Ok(Self {
            size,
            block_size: if has(F_BLK_SIZE) { word(20)?.max(512) } else { 512 },
            // Without the feature any number is allowed that the ring can hold.
            seg_max: if has(F_SEG_MAX) { word(12)? } else { u32::MAX },
            read_only: has(F_RO),
            flush: has(F_FLUSH),
            discard: has(F_DISCARD),
            queues,
            indirect: has(F_INDIRECT),
            event_idx: has(F_EVENT_IDX),
        })
    }
}

impl Device {
    /// Takes the rings back; the back-end finishes what is in flight first.
    pub(crate) fn stop(mut self) -> Result<()> {
        for index in 0..self.queues {
            self.link.set_vring_enable(index, false).with_context(|| format!("SET_VRING_ENABLE {index}"))?;
        }
        for index in 0..self.queues {
            self.link.get_vring_base(index).with_context(|| format!("GET_VRING_BASE {index}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_configuration_space_is_read_by_feature() {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&0x1_0000_0001u64.to_le_bytes());
        config[12..16].copy_from_slice(&126u32.to_le_bytes());
        config[20..24].copy_from_slice(&4096u32.to_le_bytes());
        let bare = Disk::new(&config, F_VERSION_1, 3).unwrap();
        assert_eq!((bare.size, bare.block_size, bare.seg_max), (0x1_0000_0001 * 512, 512, u32::MAX));
        assert!(!bare.read_only && !bare.flush && !bare.discard && !bare.indirect && !bare.event_idx);
        let full = Disk::new(&config, KNOWN, 3).unwrap();
        assert_eq!((full.block_size, full.seg_max, full.queues), (4096, 126, 3));
        assert!(full.read_only && full.flush && full.discard && full.indirect && full.event_idx);
    }

    #[test]
    fn a_short_or_absurd_configuration_space_is_an_error() {
        assert!(Disk::new(&[0; 7], F_VERSION_1, 1).is_err());
        assert!(Disk::new(&[255; 60], F_VERSION_1, 1).is_err());
    }
}
