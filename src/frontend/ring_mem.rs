// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The three parts of a split virtqueue in guest memory (virtio 1.2, 2.7).
//!
//! The addresses are translated once, when the ring starts or moves; after that each access is one load or store.
//! The driver writes the descriptors and the available ring while we read them, so every access is atomic, and
//! every value is a number that the guest chose: nothing here trusts an index, it is reduced modulo the ring size.
//!
//! Orders that matter: the available index is loaded with acquire, before the entries under it; the used index is
//! stored with release, after them; a full fence stands between "arm the notification" and "look again", on either
//! side, or both sides sleep ([`fence`]).

use super::memory::GuestMemory;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use thiserror::Error;

/// Largest ring of virtio 1.2.
pub(super) const MAX_RING: u16 = 1 << 15;
/// Descriptor flag: another follows.
pub(super) const DESC_NEXT: u16 = 1;
/// Descriptor flag: the device writes it.
pub(super) const DESC_WRITE: u16 = 2;
/// Descriptor flag: it names a table of descriptors.
pub(super) const DESC_INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub(super) const DESC_SIZE: u32 = 16;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Where the front-end says that a ring is: its own virtual addresses (SET_VRING_ADDR).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// Guest-physical address under which writes to the used ring are logged, if they are.
    pub used_log: Option<u64>,
}

/// Why a ring cannot be where the front-end says.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RingError {
    /// The size is no power of two, zero or too large.
    #[error("ring size {0} is not a power of two up to {MAX_RING}")]
    Size(u16),
    /// A part is not inside one memory region, or not aligned.
    #[error(
        "the {part} at front-end address {address:#x} ({len} bytes) is not in guest memory, or not aligned"
    )]
    Address {
        /// Which part.
        part: &'static str,
        /// The front-end's address.
        address: u64,
        /// Bytes.
        len: u64,
    },
}

/// A descriptor, as read once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// `DESC_*`.
    pub flags: u16,
    /// The following descriptor, if [`DESC_NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// From its two little-endian words.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // the word is cut into its fields
    pub fn from_words(address: u64, rest: u64) -> Self {
        Self { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// A translated split ring.
#[derive(Debug)]
pub struct RingMemory {
    size: u16,
    descriptors: usize,
    available: usize,
    used: usize,
    /// Keeps the addresses mapped.
    _table: Arc<GuestMemory>,
}

/// The full fence between arming a notification and looking again.
pub(super) fn fence() {
    std::sync::atomic::fence(Ordering::SeqCst);
}

impl RingMemory {
    /// Translates and checks the three parts.
    ///
    /// # Errors
    /// A [`RingError`] that names the part.
    pub fn new(table: &Arc<GuestMemory>, at: &RingAddresses, size: u16) -> Result<Self, RingError> {
        if !size.is_power_of_two() || size > MAX_RING {
            return Err(RingError::Size(size));
        }
        let n = u64::from(size);
        let part = |part, address, len, align: usize| {
            let host = table.user_range(address, len).filter(|host| host.is_multiple_of(align));
            host.ok_or(RingError::Address { part, address, len })
        };
        Ok(Self {
            size,
            descriptors: part("descriptor table", at.descriptors, 16 * n, 16)?,
            available: part("available ring", at.available, 6 + 2 * n, 2)?,
            used: part("used ring", at.used, 6 + 8 * n, 4)?,
            _table: Arc::clone(table),
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    fn half(&self, address: usize) -> &AtomicU16 {
        // SAFETY: callers give an aligned address inside a part that `new` found in a mapping that `_table` keeps;
        // all access from this process is atomic.
        unsafe { AtomicU16::from_ptr(std::ptr::with_exposed_provenance_mut(address)) }
    }

    fn word(&self, address: usize) -> &AtomicU32 {
        // SAFETY: as for `half`.
        unsafe { AtomicU32::from_ptr(std::ptr::with_exposed_provenance_mut(address)) }
    }

    fn double(&self, address: usize) -> &AtomicU64 {
        // SAFETY: as for `half`.
        unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(address)) }
    }

    /// The driver's available index; what it wrote before is visible after this.
    #[must_use]
    pub fn available_index(&self) -> u16 {
        u16::from_le(self.half(self.available + 2).load(Ordering::Acquire))
    }

    /// Whether the driver asks for no interrupts (only meaningful without EVENT_IDX).
    #[must_use]
    pub fn no_interrupt(&self) -> bool {
        u16::from_le(self.half(self.available).load(Ordering::Relaxed)) & NO_INTERRUPT != 0
    }

    /// The head at position `index` of the available ring. May be any number.
    #[must_use]
    pub fn head(&self, index: u16) -> u16 {
        u16::from_le(self.half(self.available + 4 + 2 * self.slot(index)).load(Ordering::Relaxed))
    }

    /// The used index at which the driver wants an interrupt (EVENT_IDX).
    #[must_use]
    pub fn used_event(&self) -> u16 {
        let at = self.available + 4 + 2 * usize::from(self.size);
        u16::from_le(self.half(at).load(Ordering::Relaxed))
    }

    /// A descriptor; `None` if the ring has none of that number.
    #[must_use]
    pub fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        let at = self.descriptors + 16 * usize::from(index);
        let address = u64::from_le(self.double(at).load(Ordering::Relaxed));
        Some(Descriptor::from_words(address, u64::from_le(self.double(at + 8).load(Ordering::Relaxed))))
    }

    /// The used index as it stands in memory: where we go on after a start.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.half(self.used + 2).load(Ordering::Relaxed))
    }

    /// Fills the used element at position `index`; invisible until [`Self::publish`].
    pub fn put_used(&self, index: u16, head: u16, len: u32) {
        let at = self.used + 4 + 8 * self.slot(index);
        self.word(at).store(u32::from(head).to_le(), Ordering::Relaxed);
        self.word(at + 4).store(len.to_le(), Ordering::Relaxed);
    }

    /// Makes everything before `index` visible to the driver.
    pub fn publish(&self, index: u16) {
        self.half(self.used + 2).store(index.to_le(), Ordering::Release);
    }

    /// Asks the driver for notifications, or for none (without EVENT_IDX).
    pub fn set_notify(&self, wanted: bool) {
        let flags = if wanted { 0 } else { NO_NOTIFY };
        self.half(self.used).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Asks for a notification when the available index passes `index` (EVENT_IDX).
    pub fn set_available_event(&self, index: u16) {
        self.half(self.used + 4 + 8 * usize::from(self.size)).store(index.to_le(), Ordering::Relaxed);
    }

    /// Offset in the used ring of the element at position `index`.
    #[must_use]
    pub fn used_offset(&self, index: u16) -> u64 {
        4 + 8 * self.slot(index) as u64
    }

    /// Offset in the used ring of the notification index.
    #[must_use]
    pub fn event_offset(&self) -> u64 {
        4 + 8 * u64::from(self.size)
    }
}
