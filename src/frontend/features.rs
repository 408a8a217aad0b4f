// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this device offers: virtio and vhost-user feature bits, and the configuration space.
//!
//! The guest keeps what it negotiated through a migration, so the two sides must offer the same: peers compare
//! [`virtio_features`] when a migration is armed, before anything stops. Bits are left out on purpose:
//! ACCESS_PLATFORM would need an IOTLB; RING_RESET has no vhost-user message; the in-flight migration bits 20 and 23
//! are still moving in QEMU; PAGEFAULT is memory post-copy, which this version does not do; STATUS is not in the
//! `vhost` crate, and QEMU sends SET_STATUS 0 on every stop, so it would tell nothing.
//!
//! SIZE_MAX and SEG_MAX bound a request together: what a driver builds within both is never longer than
//! [`MAX_DATA`], the most that a request may carry here. SIZE_MAX is generous, since io_uring takes large segments whole.
//!
//! Logical blocks are 512 bytes whatever the medium has, because the guest keeps its block size through a migration.
//! The topology is a hint, and comes from the medium and the chunk size (docs/adr/0007-block-sizes.md).

use crate::core::geometry::SECTOR;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

const F_INDIRECT_DESC: u64 = 28;
const F_EVENT_IDX: u64 = 29;
const F_VERSION_1: u64 = 32;
const BLK_F_SIZE_MAX: u64 = 1;
const BLK_F_SEG_MAX: u64 = 2;
const BLK_F_RO: u64 = 5;
const BLK_F_BLK_SIZE: u64 = 6;
const BLK_F_FLUSH: u64 = 9;
const BLK_F_TOPOLOGY: u64 = 10;
const BLK_F_CONFIG_WCE: u64 = 11;
const BLK_F_MQ: u64 = 12;
const BLK_F_DISCARD: u64 = 13;
const BLK_F_WRITE_ZEROES: u64 = 14;

/// Bit mask of EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << F_EVENT_IDX;
/// Bit mask of VHOST_F_LOG_ALL.
pub const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// Bit mask of VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Bit mask of VIRTIO_BLK_F_FLUSH: without it the device must write through (virtio 1.2, 5.2.5.1).
pub const FLUSH: u64 = 1 << BLK_F_FLUSH;
/// Bit mask of VIRTIO_BLK_F_CONFIG_WCE.
pub const CONFIG_WCE: u64 = 1 << BLK_F_CONFIG_WCE;

/// Bytes of `capacity`, the first field of the configuration space.
pub const CAPACITY_SIZE: u32 = 8;
/// Offset of `writeback` in the configuration space.
pub const WRITEBACK_OFFSET: usize = 32;
/// Bytes of `struct virtio_blk_config` up to and with the write-zeroes fields.
pub const CONFIG_SIZE: usize = 60;
/// Most sectors in one segment of a discard or write-zeroes request: 256 MiB.
pub const MAX_ZERO_SECTORS: u32 = 512 << 10;
/// Most segments in one discard or write-zeroes request.
pub const MAX_ZERO_SEGMENTS: u32 = 16;
/// Most bytes that a read or write may carry. Descriptors may name the same memory over and over, so a request could ask
/// for terabytes, and keep a queue thread or the host's memory busy with its pieces; no driver sends more than a few MiB.
pub const MAX_DATA: u64 = 256 << 20;
/// Most bytes of a segment.
const MAX_SEGMENT: u64 = 4 << 20;
/// Sectors in a 4 KiB page: the preferred granule of discards.
const PAGE_SECTORS: u32 = 8;

/// What the device offers to the driver, and the vhost bits, for GET_FEATURES.
#[must_use]
pub fn virtio_features(read_only: bool) -> u64 {
    let always = [
        F_VERSION_1,
        F_INDIRECT_DESC,
        F_EVENT_IDX,
        BLK_F_SIZE_MAX,
        BLK_F_SEG_MAX,
        BLK_F_BLK_SIZE,
        BLK_F_FLUSH,
        BLK_F_TOPOLOGY,
        BLK_F_CONFIG_WCE,
        BLK_F_MQ,
    ];
    let more: &[u64] = if read_only { &[BLK_F_RO] } else { &[BLK_F_DISCARD, BLK_F_WRITE_ZEROES] };
    always.iter().chain(more).fold(LOG_ALL | PROTOCOL_FEATURES, |mask, bit| mask | 1 << bit)
}

/// The vhost-user protocol features, for GET_PROTOCOL_FEATURES.
#[must_use]
pub fn protocol_features() -> VhostUserProtocolFeatures {
    use VhostUserProtocolFeatures as F;
    F::MQ
        | F::LOG_SHMFD
        | F::REPLY_ACK
        | F::BACKEND_REQ
        | F::CONFIG
        | F::INFLIGHT_SHMFD
        | F::RESET_DEVICE
        | F::CONFIGURE_MEM_SLOTS
        | F::DEVICE_STATE
}

/// What the configuration space says.
#[derive(Debug, Clone, Copy)]
pub struct BlkConfig {
    /// Size of the disk in bytes.
    pub capacity: u64,
    /// Request queues.
    pub queues: u16,
    /// Largest ring size that is expected; bounds the segments of a request.
    pub queue_size: u16,
    /// Write-back (true) or write-through.
    pub write_back: bool,
    /// What the medium writes at once: a smaller write costs it a read. In bytes, a power of two.
    pub physical_block: u32,
    /// Smallest size in bytes that is worth while, a power of two.
    pub min_io: u32,
    /// Best size in bytes, a power of two: a chunk.
    pub opt_io: u32,
}

fn sectors(bytes: u32) -> u32 {
    bytes.next_power_of_two() / 512
}

impl BlkConfig {
    fn seg_max(&self) -> u32 {
        u32::from(self.queue_size.saturating_sub(2).max(1))
    }

    /// Longest segment: as many as there may be carry no more than a request may.
    fn size_max(&self) -> u32 {
        let most = (MAX_DATA / u64::from(self.seg_max())).min(MAX_SEGMENT);
        1 << most.max(1).ilog2()
    }

    /// `struct virtio_blk_config` (virtio 1.2, 5.2.4), little-endian.
    #[must_use]
    pub fn bytes(&self) -> [u8; CONFIG_SIZE] {
        let mut out = [0u8; CONFIG_SIZE];
        let mut put = |at: usize, value: &[u8]| out[at..at + value.len()].copy_from_slice(value);
        put(0, &(self.capacity / SECTOR).to_le_bytes());
        put(8, &self.size_max().to_le_bytes());
        put(12, &self.seg_max().to_le_bytes());
        put(20, &512u32.to_le_bytes()); // blk_size
        let exponent = u8::try_from(sectors(self.physical_block).max(1).ilog2()).unwrap_or(0);
        put(24, &[exponent, 0]); // physical_block_exp, alignment_offset
        put(26, &u16::try_from(sectors(self.min_io)).unwrap_or(0).to_le_bytes()); // min_io_size
        put(28, &sectors(self.opt_io).to_le_bytes()); // opt_io_size
        put(WRITEBACK_OFFSET, &[u8::from(self.write_back)]);
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_ZERO_SECTORS.to_le_bytes()); // max_discard_sectors
        put(40, &MAX_ZERO_SEGMENTS.to_le_bytes()); // max_discard_seg
        put(44, &PAGE_SECTORS.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_ZERO_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &MAX_ZERO_SEGMENTS.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        out
    }

    /// Any part of the configuration space; zeros past its end, for front-ends read different lengths
    /// (QEMU 57 bytes, Firecracker 60, crosvm at any offset).
    #[must_use]
    pub fn part(&self, offset: u32, len: u32) -> Vec<u8> {
        let all = self.bytes();
        (u64::from(offset)..u64::from(offset) + u64::from(len))
            .map(|at| usize::try_from(at).ok().and_then(|at| all.get(at)).copied().unwrap_or(0))
            .collect()
    }
}

/// What `--print-capabilities` prints (vhost-user, "Back-end program conventions").
#[must_use]
pub fn capabilities_json() -> String {
    serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: BlkConfig = BlkConfig {
        capacity: 5 << 30,
        queues: 4,
        queue_size: 128,
        write_back: true,
        physical_block: 4096,
        min_io: 16 << 10,
        opt_io: 256 << 10,
    };

    #[test]
    fn the_configuration_has_the_layout_of_the_specification() {
        let bytes = CONFIG.bytes();
        assert_eq!(bytes[0..8], (10u64 << 20).to_le_bytes());
        assert_eq!(bytes[12..16], 126u32.to_le_bytes());
        assert_eq!(bytes[20..24], 512u32.to_le_bytes());
        assert_eq!((bytes[32], bytes[34], bytes[56]), (1, 4, 1));
        assert_eq!((bytes[24], bytes[25]), (3, 0), "physical_block_exp, alignment_offset");
        assert_eq!(bytes[26..28], 32u16.to_le_bytes(), "min_io_size in logical blocks");
        assert_eq!(bytes[28..32], 512u32.to_le_bytes(), "opt_io_size in logical blocks");
    }

    #[test]
    fn as_many_segments_as_there_may_be_carry_no_more_than_a_request_may() {
        for (queue_size, size_max) in
            [(4, 4 << 20), (64, 4 << 20), (128, 2 << 20), (256, 1 << 20), (1024, 256 << 10)]
        {
            let config = BlkConfig { queue_size, ..CONFIG };
            assert_eq!((config.size_max(), config.seg_max()), (size_max, u32::from(queue_size) - 2));
            assert_eq!(config.bytes()[8..12], size_max.to_le_bytes());
            assert!(u64::from(config.size_max()) * u64::from(config.seg_max()) <= MAX_DATA);
        }
    }

    #[test]
    fn any_offset_and_length_is_answered() {
        assert_eq!(CONFIG.part(0, 57), CONFIG.bytes()[..57]);
        assert_eq!(CONFIG.part(32, 1), [1]);
        assert_eq!(CONFIG.part(58, 256), [0; 256]);
        assert_eq!(CONFIG.part(u32::MAX, 2), [0, 0]);
    }

    #[test]
    fn read_only_is_offered_only_where_it_is_true() {
        assert_eq!(virtio_features(false) & (1 << BLK_F_RO), 0);
        assert_eq!(virtio_features(true) & (1 << BLK_F_DISCARD | 1 << BLK_F_WRITE_ZEROES), 0);
        assert_ne!(virtio_features(true) & (1 << BLK_F_RO), 0);
        assert_eq!(virtio_features(false) & (1 << 33), 0, "no IOTLB here");
    }

    #[test]
    fn capabilities_are_json() {
        let value: serde_json::Value = serde_json::from_str(&capabilities_json()).unwrap_or_default();
        assert_eq!(value["type"], "block");
    }
}
