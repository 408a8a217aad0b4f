// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Facts that go up to the companion thread.
//!
//! The channel has no limit of its own, because a queue thread can neither wait for the companion nor lose a
//! demand; it is bounded by what can be sent. `Demand`: once for a chunk while pieces wait for its content, so
//! never more than there are parked pieces. `Overwritten`: once for a chunk that was `Remote`, so over a migration
//! never more than the remaining set. `Fault`: once for a volume. `RotationDue`: once for a journal. What comes for every write goes through the
//! tracker's bitmap instead.

use crate::core::geometry::ChunkId;
use tokio::sync::mpsc;

/// Where the missing content of a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// In the base image: answer with `Transfer::fetch_base`.
    Base,
    /// At the migration source: answer with a pull and `Transfer::install`.
    Source,
}

/// One fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeEvent {
    /// A guest waits for content that is not here. It is not said again when filling fails: whoever fills tries
    /// again, or lets the waiters fail (`Transfer::fail_waiters`).
    Demand {
        /// The chunk.
        chunk: ChunkId,
        /// Where its content is.
        origin: Origin,
    },
    /// The guest has written all of a chunk that was remote: pulling it is needless.
    Overwritten(ChunkId),
    /// The volume cannot keep its promises any more (its layer cannot be synced); in words.
    Fault(String),
    /// The chunk map's journal has grown long, or is broken: call `Transfer::maybe_rotate`, until it succeeds.
    RotationDue,
}

/// The companion's end of the channel.
pub type VolumeEvents = mpsc::UnboundedReceiver<VolumeEvent>;
