// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything that can happen to a node, as values of one queue.
//!
//! The companion thread takes one input after the other and never waits inside one: what takes time runs as a task
//! and comes back as [`Done`]. So there is no lock in this room, and the order of the queue is the order of events.
//! The queue is unbounded in type and bounded in fact: a hypervisor has one message under way, a chunk raises one
//! demand, a peer has a window of unacknowledged chunks, and clients wait for their answers.

use super::status::Command;
use crate::core::destination::Installed;
use crate::core::geometry::ChunkId;
use crate::core::message::{Hello, Version};
use crate::core::source::Capture;
use crate::frontend::signal::Envelope;
use crate::peer::{LinkEvent, PeerLink};
use crate::store::GrowError;
use crate::volume::VolumeEvent;

/// One thing that happened.
pub(super) enum Input {
    /// The hypervisor said something.
    Signal(Envelope),
    /// The I/O path needs or tells something.
    Volume(VolumeEvent),
    /// A client asks.
    Command(Command),
    /// A migration source has connected.
    Accepted(PeerLink),
    /// The same, at a daemon that learned its size from the source's greeting.
    Greeted(PeerLink, Box<Hello>),
    /// The peer connection of this number said something, or ended.
    Link(u64, LinkEvent),
    /// Guest writes were tracked, for the first time since they were drained.
    Wrote,
    /// They have been left to gather for long enough.
    DrainDue,
    /// Upkeep was put off, and its time has come.
    Upkeep,
    /// A task has ended; the number names the run of the migration that started it.
    Done(u64, Done),
    /// SIGTERM or SIGINT.
    Shutdown,
}

/// The end of a task.
pub(super) enum Done {
    /// A record is durable.
    Persisted { seq: u64 },
    /// A record could not be written; it is tried again.
    PersistFailed(String),
    /// A chunk was read.
    Captured { chunk: ChunkId, capture: Capture },
    /// A chunk was written.
    Installed { chunk: ChunkId, version: Version, installed: Installed },
    /// Chunks were marked remote, or could not be, which is tried again.
    Marked(Result<(), String>),
    /// A chunk of the base image was fetched ahead of need.
    BaseFetched { chunk: ChunkId },
    /// The layer was synced (source, after the handoff).
    LayerSynced(bool),
    /// Data and map were synced (destination).
    VolumeSynced(bool),
    /// Everything that had come was dropped.
    Wiped(Result<(), String>),
    /// Everything but these chunks was dropped, or could not be.
    Pruned(Result<Vec<(ChunkId, Version)>, String>),
    /// A connection was made, or not.
    Connected(Result<PeerLink, String>),
    /// The volume has grown, or not.
    Resized(Result<(), GrowError>),
}
