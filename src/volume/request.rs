// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest request, checked once, that must be completed.
//!
//! What a guest writes into a descriptor chain is checked here and nowhere again: sector alignment, the end of the
//! disk, read-only disks. Every request carries a [`Token`], which can only be spent: a chain whose token is dropped
//! unspent would leave the guest waiting for ever, so that is a bug, which the log names and debug builds assert.
//! The token comes back in `PortEvent::Completed`, whatever became of the request.

use super::volume::Volume;
use crate::core::geometry::SECTOR;
use crate::engine::IoBuf;

/// What a request asks for (virtio 1.2, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestOp {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_DISCARD (`unmap`) or VIRTIO_BLK_T_WRITE_ZEROES (`unmap` as its flag says): the range reads as
    /// zeros afterwards.
    Zero {
        /// The space may be given back.
        unmap: bool,
    },
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
}

/// What became of a request; the virtio status byte follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

/// The caller's name for a request. It must be spent.
#[derive(Debug)]
pub struct Token {
    id: u64,
    spent: bool,
}

impl Token {
    /// A token that carries `id` for the caller.
    #[must_use]
    pub fn new(id: u64) -> Self {
        Self { id, spent: false }
    }

    /// The caller's id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Ends the obligation; call it when the answer has gone to the guest.
    pub fn spend(mut self) -> u64 {
        self.spent = true;
        self.id
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if !self.spent {
            log::error!("request {} was dropped without an answer", self.id);
            debug_assert!(std::thread::panicking(), "request {} was dropped without an answer", self.id);
        }
    }
}

/// A request that was refused before anything was done, with the status to answer.
#[derive(Debug)]
pub struct Rejected {
    /// The token, back.
    pub token: Token,
    /// What to tell the guest.
    pub status: Status,
}

/// A checked request; see the module's header.
#[derive(Debug)]
pub struct Request {
    pub(super) op: RequestOp,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) buf: Option<IoBuf>,
    pub(super) token: Token,
}

impl Request {
    /// Read `buf.len()` bytes at byte `offset` into `buf`.
    ///
    /// # Errors
    /// [`Rejected`] with `IoError`: not whole sectors, empty, or past the end of the disk.
    pub fn read(volume: &Volume, offset: u64, buf: IoBuf, token: Token) -> Result<Self, Rejected> {
        let len = buf.len() as u64;
        Self::checked(volume, RequestOp::Read, offset, len, Some(buf), token)
    }

    /// Write all of `buf` at byte `offset`.
    ///
    /// # Errors
    /// As [`Request::read`]; also when the disk is read-only.
    pub fn write(volume: &Volume, offset: u64, buf: IoBuf, token: Token) -> Result<Self, Rejected> {
        let len = buf.len() as u64;
        Self::checked(volume, RequestOp::Write, offset, len, Some(buf), token)
    }

    /// Make `len` bytes at byte `offset` zeros; one segment of a discard or write-zeroes request.
    ///
    /// # Errors
    /// As [`Request::write`].
    pub fn zero(volume: &Volume, offset: u64, len: u64, unmap: bool, token: Token) -> Result<Self, Rejected> {
        Self::checked(volume, RequestOp::Zero { unmap }, offset, len, None, token)
    }

    /// Make everything that has been completed so far survive a loss of power.
    #[must_use]
    pub fn flush(token: Token) -> Self {
        Self { op: RequestOp::Flush, offset: 0, len: 0, buf: None, token }
    }

    fn checked(
        volume: &Volume,
        op: RequestOp,
        offset: u64,
        len: u64,
        buf: Option<IoBuf>,
        token: Token,
    ) -> Result<Self, Rejected> {
        let aligned = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) && len > 0;
        let allowed = op == RequestOp::Read || !volume.read_only();
        if aligned && allowed && volume.geometry().contains(offset, len) {
            Ok(Self { op, offset, len, buf, token })
        } else {
            Err(Rejected { token, status: Status::IoError })
        }
    }
}
