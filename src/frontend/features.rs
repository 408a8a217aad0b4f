// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this device offers: virtio and vhost-user feature bits, and the configuration space.
//!
//! The guest keeps what it negotiated through a migration, so the two sides must offer the same: peers compare
//! [`virtio_features`] when a migration is armed, before anything stops. Bits are left out on purpose:
//! ACCESS_PLATFORM would need an IOTLB; RING_RESET has no vhost-user message; the in-flight migration bits 20 and 23
//! are still moving in QEMU; PAGEFAULT is memory post-copy, which this version does not do; STATUS is not in the
//! `vhost` crate, and QEMU sends SET_STATUS 0 on every stop, so it would tell nothing.
//!
//! Offering SIZE_MAX was rejected: it would only make the guest split what io_uring takes whole.

use crate::core::geometry::SECTOR;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

const F_INDIRECT_DESC: u64 = 28;
const F_EVENT_IDX: u64 = 29;
const F_VERSION_1: u64 = 32;
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
/// Sectors in a 4 KiB page: the preferred granule.
const PAGE_SECTORS: u32 = 8;
/// log2 of logical blocks in a physical one.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// What the device offers to the driver, and the vhost bits, for GET_FEATURES.
#[must_use]
pub fn virtio_features(read_only: bool) -> u64 {
    let always = [
        F_VERSION_1,
        F_INDIRECT_DESC,
        F_EVENT_IDX,
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
}

impl BlkConfig {
    /// `struct virtio_blk_config` (virtio 1.2, 5.2.4), little-endian.
    #[must_use]
    pub fn bytes(&self) -> [u8; CONFIG_SIZE] {
        let mut out = [0u8; CONFIG_SIZE];
        let mut put = |at: usize, value: &[u8]| out[at..at + value.len()].copy_from_slice(value);
        put(0, &(self.capacity / SECTOR).to_le_bytes());
        put(12, &u32::from(self.queue_size.saturating_sub(2).max(1)).to_le_bytes()); // seg_max
        put(20, &512u32.to_le_bytes()); // blk_size
        put(24, &[PHYSICAL_BLOCK_EXP, 0]); // physical_block_exp, alignment_offset
        put(26, &8u16.to_le_bytes()); // min_io_size; opt_io_size stays 0: none
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

    const CONFIG: BlkConfig = BlkConfig { capacity: 5 << 30, queues: 4, queue_size: 128, write_back: true };

    #[test]
    fn the_configuration_has_the_layout_of_the_specification() {
        let bytes = CONFIG.bytes();
        assert_eq!(bytes[0..8], (10u64 << 20).to_le_bytes());
        assert_eq!(bytes[12..16], 126u32.to_le_bytes());
        assert_eq!(bytes[20..24], 512u32.to_le_bytes());
        assert_eq!((bytes[32], bytes[34], bytes[56]), (1, 4, 1));
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
