// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a daemon must still know about ownership after a crash.
//!
//! The rule of the project: every state is durable before a message that depends on it leaves. `store` writes
//! these values (docs/on-disk.md has the bytes) together with the boot id of the host, because a record alone does
//! not tell whether the page cache survived.

use super::message::{BaseIdentity, Epoch, Incarnation, MigrationId, RemainingDigest, VolumeId};

/// The record of one volume. A new version is a new variant; old ones stay readable.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum MigrationRecord {
    /// First version.
    V1 {
        /// The volume.
        volume: VolumeId,
        /// The newest epoch that this side knows.
        epoch: Epoch,
        /// What this side is.
        role: Role,
    },
}

/// What a side is in the life of the volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    /// Owns the disk; no migration.
    Serving,
    /// Owns nothing: an empty destination, or one whose migration was cancelled.
    Idle,
    /// Gives the disk away.
    Source(SourceRecord),
    /// Gets the disk.
    Destination(DestinationRecord),
}

/// How far a source is. Order matters: later states never go back but by a reclaim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceStage {
    /// Armed or pushing: the disk is served here.
    Pushing,
    /// The disk is offered under the epoch of the record; rings that start here take it back.
    Offered,
    /// The disk is the destination's; this side only answers pulls.
    Relinquished {
        /// The layer has been synced since the rings stopped.
        synced: bool,
    },
    /// The destination has everything.
    Released {
        /// The layer has been synced since the rings stopped: what is here is what it was, even after a crash of the
        /// host, and can be built upon should the disk come back.
        synced: bool,
    },
}

/// A source's part of the record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceRecord {
    /// The migration.
    pub migration: MigrationId,
    /// `HOST:PORT` of the destination.
    pub destination: String,
    /// How far it is.
    pub stage: SourceStage,
    /// Push threshold (paper, section 4.1).
    pub threshold: u32,
    /// Number of the strategy (`core::strategy`).
    pub strategy: u8,
    /// The guest's write-cache mode at the stop of the rings.
    pub write_cache: bool,
    /// Digest of the remaining set of the offer.
    pub digest: RemainingDigest,
}

/// How far a destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationStage {
    /// Takes chunks; owns nothing.
    Receiving,
    /// Holds an offer; owns nothing yet.
    Prepared,
    /// Owns the disk; chunks may still be at the source.
    Active {
        /// The source has synced its layer: a guest flush may be acknowledged here.
        source_synced: bool,
    },
    /// Owns the disk and has all of it; the source may not know yet.
    Complete,
}

/// A destination's part of the record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DestinationRecord {
    /// The migration.
    pub migration: MigrationId,
    /// The run of the source that the installed versions belong to.
    pub incarnation: Incarnation,
    /// The base image, as the source named it.
    pub base: BaseIdentity,
    /// How far it is.
    pub stage: DestinationStage,
    /// The guest's write-cache mode, from the offer.
    pub write_cache: bool,
    /// Digest of the remaining set of the offer.
    pub digest: RemainingDigest,
}
