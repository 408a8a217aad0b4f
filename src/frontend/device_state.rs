// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The handoff ticket: what this device puts into the hypervisor's migration stream.
//!
//! A front-end that negotiates DEVICE_STATE (Cloud Hypervisor does for block devices; QEMU acknowledges the bit and
//! never uses it) moves a few opaque bytes of ours with the VM's own state, through a pipe. They name the handoff
//! that this VM belongs to, so that the destination can refuse a VM state that was paired with another disk, or
//! with an older epoch of this one. The disk's content never goes this way: the stream has no room for it, and the
//! VM stands still meanwhile.
//!
//! Layout, 80 bytes, little-endian:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `BLKFTKT1`: the last character is the version |
//! | 8 | 16 | volume id |
//! | 24 | 16 | migration id, zeros without a migration |
//! | 40 | 8 | epoch |
//! | 48 | 16 | digest of the remaining set |
//! | 64 | 12 | zeros |
//! | 76 | 4 | CRC-32 (IEEE) of bytes 0..76 |

use crate::core::message::{Epoch, MigrationId, RemainingDigest, VolumeId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io::{Read, Write};
use thiserror::Error;

/// Bytes of an encoded ticket.
pub const TICKET_LEN: usize = 80;
/// Longest silence of a stream that is read.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
const MAGIC: &[u8; 8] = b"BLKFTKT1";
const CRC_AT: usize = 76;

/// Why a ticket was refused.
#[derive(Debug, Error)]
pub enum TicketError {
    /// The stream could not be read or written.
    #[error("device state stream: {0}")]
    Io(#[from] std::io::Error),
    /// Not 80 bytes.
    #[error("device state of {0} bytes; a handoff ticket has 80")]
    Length(usize),
    /// Not a ticket, or of another version.
    #[error("device state is no handoff ticket of version 1")]
    Magic,
    /// Damaged.
    #[error("handoff ticket is damaged (CRC)")]
    Crc,
}

/// Names the handoff that a VM's state belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ticket {
    /// The volume.
    pub volume: VolumeId,
    /// The migration; zeros without one (a snapshot, say).
    pub migration: MigrationId,
    /// The epoch that was offered, or the current one without a migration.
    pub epoch: Epoch,
    /// Digest of the remaining set of the offer.
    pub digest: RemainingDigest,
}

impl Ticket {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; TICKET_LEN] {
        let mut out = [0u8; TICKET_LEN];
        out[0..8].copy_from_slice(MAGIC);
        out[8..24].copy_from_slice(&self.volume.0);
        out[24..40].copy_from_slice(&self.migration.0);
        out[40..48].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[48..64].copy_from_slice(&self.digest.0.to_le_bytes());
        let crc = crc32fast::hash(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads the bytes.
    ///
    /// # Errors
    /// Another length, magic or CRC.
    pub fn decode(bytes: &[u8]) -> Result<Self, TicketError> {
        let bytes: &[u8; TICKET_LEN] = bytes.try_into().map_err(|_| TicketError::Length(bytes.len()))?;
        if &bytes[0..8] != MAGIC {
            return Err(TicketError::Magic);
        }
        if crc32fast::hash(&bytes[..CRC_AT]).to_le_bytes() != bytes[CRC_AT..] {
            return Err(TicketError::Crc);
        }
        let mut ticket = Self::default();
        let (mut epoch, mut digest) = ([0; 8], [0; 16]);
        ticket.volume.0.copy_from_slice(&bytes[8..24]);
        ticket.migration.0.copy_from_slice(&bytes[24..40]);
        epoch.copy_from_slice(&bytes[40..48]);
        digest.copy_from_slice(&bytes[48..64]);
        ticket.epoch = Epoch(u64::from_le_bytes(epoch));
        ticket.digest = RemainingDigest(u128::from_le_bytes(digest));
        Ok(ticket)
    }
}

/// Writes a ticket and closes the stream. The bytes fit any pipe, so this does not block on the reader.
///
/// # Errors
/// The stream's.
pub fn save(mut stream: File, ticket: &Ticket) -> Result<(), TicketError> {
    stream.write_all(&ticket.encode())?;
    Ok(())
}

/// Reads a ticket, and not past it: not every front-end closes the stream before it asks for the outcome. A stream
/// that ends early is refused; one that stays silent is given up after five seconds.
///
/// # Errors
/// The stream's, and what [`Ticket::decode`] refuses.
pub fn load(mut stream: File) -> Result<Ticket, TicketError> {
    let mut bytes = [0; TICKET_LEN];
    let mut len = 0;
    while len < bytes.len() {
        let mut wait = [PollFd::new(&stream, PollFlags::IN)];
        if poll(&mut wait, Some(&PATIENCE)).map_err(std::io::Error::from)? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
        }
        match stream.read(&mut bytes[len..])? {
            0 => break,
            n => len += n,
        }
    }
    Ticket::decode(&bytes[..len])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(volume: [u8; 16], migration: [u8; 16], epoch: u64, digest: u128) {
            let ticket = Ticket {
                volume: VolumeId(volume),
                migration: MigrationId(migration),
                epoch: Epoch(epoch),
                digest: RemainingDigest(digest),
            };
            prop_assert_eq!(Ticket::decode(&ticket.encode()).unwrap(), ticket);
        }

        #[test]
        fn any_flipped_bit_is_noticed(bit in 0usize..TICKET_LEN * 8) {
            let mut bytes = Ticket::default().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Ticket::decode(&bytes).is_err());
        }
    }

    #[test]
    fn other_lengths_are_refused() {
        assert!(matches!(Ticket::decode(&[]), Err(TicketError::Length(0))));
        assert!(matches!(Ticket::decode(&[0; 81]), Err(TicketError::Length(81))));
    }
}
