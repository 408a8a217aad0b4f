// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Little-endian fields to and from bytes. Reading is total: what is too short or too long is an error, never a panic.
//!
//! serde with a binary format was rejected: docs/on-disk.md promises every byte, and a change of a type must not
//! silently change a file.

use std::io;

/// Appends fields to a vector.
#[derive(Debug, Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A length of 16 bits, then the bytes.
    ///
    /// # Errors
    /// `InvalidInput` when the text is longer than `most`.
    pub(super) fn text(&mut self, text: &[u8], most: usize) -> io::Result<&mut Self> {
        let len = u16::try_from(text.len()).ok().filter(|len| usize::from(*len) <= most);
        let Some(len) = len else {
            let why = format!("a text of {} bytes where {most} are allowed", text.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        };
        Ok(self.bytes(&len.to_le_bytes()).bytes(text))
    }
}

/// Takes fields off the front of a slice.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (now, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(now)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn flag(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn text(&mut self, most: usize) -> Option<&'a [u8]> {
        let len = usize::from(u16::from_le_bytes(self.array()?));
        if len > most { None } else { self.bytes(len) }
    }

    pub(super) fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}
