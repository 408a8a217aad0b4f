// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The typed messages of two peers, and their limits. No bytes here: `wire` turns them into frames.
//!
//! The source connects. One control stream carries everything but chunk contents and keeps its order; chunk
//! contents travel on any stream and may overtake each other, so each carries its version and the epoch under
//! which it was sent. The paper's primitives map as follows: MIGRATION_NOTIFICATION is [`Message::Hello`],
//! TRANSFER_IO_CONTROL is what [`Message::Announce`] sent ahead plus [`Message::Offer`], `pull(c)` is
//! [`Message::Pull`].

use super::geometry::{BlockMask, ChunkId};

/// Most entries in one list message; longer lists are cut into several messages.
pub const MAX_ENTRIES: usize = 4096;
/// Longest text in a message, in bytes of UTF-8.
pub const MAX_TEXT: usize = 1024;

/// Names one migration; drawn at random by the source when it is armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct MigrationId(pub [u8; 16]);

/// Names one volume through all its moves; drawn at random when the volume is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct VolumeId(pub [u8; 16]);

/// The fencing number of an ownership: it only grows, and each handoff and each reclaim takes a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The number after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// How often a chunk has been written, as its owner counts: 40 bits are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Version(pub u64);

/// Names one run of a source daemon: versions of different runs cannot be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Incarnation(pub u64);

/// The identity of a base image: equal geometry alone proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct BaseIdentity {
    /// Length in bytes; 0 when the volume has no base image.
    pub length: u64,
    /// blake3 digest (what it covers is the base image implementation's to say; see docs/protocol.md); zeros when there is no base.
    pub digest: [u8; 32],
}

/// What the source says first, on every connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Hello {
    /// The migration.
    pub migration: MigrationId,
    /// The volume.
    pub volume: VolumeId,
    /// The run of the source daemon.
    pub incarnation: Incarnation,
    /// The epoch of the source's newest durable record.
    pub epoch: Epoch,
    /// Volume size in bytes.
    pub size: u64,
    /// Chunk size in bytes.
    pub chunk_size: u32,
    /// The base image.
    pub base: BaseIdentity,
    /// virtio feature bits that the source's guest has acknowledged or may acknowledge.
    pub virtio_features: u64,
    /// Number of request queues that the source offers.
    pub queues: u16,
    /// The disk is read-only for the guest.
    pub read_only: bool,
    /// Serial that GET_ID answers (at most 20 bytes).
    pub serial: String,
}

/// The destination's side of the handshake.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Welcome {
    /// The epoch that the destination has durably prepared, if it has one of this migration.
    pub prepared: Option<Epoch>,
    /// The epoch that the destination owns, if it does.
    pub active: Option<Epoch>,
    /// All data is at the destination, durably.
    pub complete: bool,
    /// The destination still knows the announcements of this migration and incarnation, with this digest.
    pub standing: Option<RemainingDigest>,
    /// Whether [`Message::Have`] lists follow (the source's run is the one that the destination knows).
    pub have_follows: bool,
}

/// An order-independent digest of a remaining set with its write counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RemainingDigest(pub u128);

/// Why a peer refuses, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Refusal {
    /// Sizes or chunk sizes differ.
    Geometry = 1,
    /// The base images differ.
    BaseIdentity = 2,
    /// The destination lacks a virtio feature that the guest uses.
    Features = 3,
    /// The destination's volume holds a disk of its own, or another migration.
    Busy = 4,
    /// Not a volume or migration that this peer knows.
    Unknown = 5,
    /// The epoch is older than one that this peer knows.
    StaleEpoch = 6,
    /// The source took the disk back (its rings started again), or never let go.
    Reclaimed = 7,
    /// The operator cancelled.
    Cancelled = 8,
    /// The chunk could not be read or written.
    Io = 9,
    /// The source lost data that it had not yet synced (its host went down after the handoff).
    Lost = 10,
    /// A message came that the state does not allow.
    Protocol = 11,
    /// The disk of this peer has not been handed over whole yet (a chain of migrations).
    NotWhole = 12,
}

impl Refusal {
    /// The refusal with this number, if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        use Refusal::{
            BaseIdentity, Busy, Cancelled, Features, Geometry, Io, Lost, NotWhole, Protocol, Reclaimed,
            StaleEpoch, Unknown,
        };
        [
            Geometry,
            BaseIdentity,
            Features,
            Busy,
            Unknown,
            StaleEpoch,
            Reclaimed,
            Cancelled,
            Io,
            Lost,
            Protocol,
            NotWhole,
        ]
        .into_iter()
        .find(|refusal| *refusal as u8 == number)
    }
}

/// What the source says of one chunk ahead of the handoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing {
    /// The destination lacks the current content; written this often (capped at 255).
    Remaining {
        /// Write count, as the source counts.
        count: u8,
    },
    /// The destination has acknowledged the current content.
    Settled {
        /// The version that it acknowledged.
        version: Version,
    },
}

/// One announcement: `run` chunks from `first` on stand alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Announcement {
    /// First chunk of the run.
    pub first: ChunkId,
    /// Number of chunks, at least 1; always 1 for `Settled`.
    pub run: u32,
    /// How they stand.
    pub standing: Standing,
}

/// Why a chunk travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// Pushed by the source (paper: BACKGROUND_PUSH).
    Push = 1,
    /// Pulled in the background (paper: BACKGROUND_PULL).
    Prefetch = 2,
    /// Pulled because the guest waits for it (paper: READ).
    Demand = 3,
}

/// The content of a chunk.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Body {
    /// All zeros, as metadata.
    Zero,
    /// The blocks of `mask`, one after the other in rising order; the others are the base image's. The last block
    /// of a short last chunk is as short as it is on the disk.
    Blocks {
        /// Which blocks follow; never empty.
        mask: BlockMask,
        /// Their bytes.
        bytes: Vec<u8>,
    },
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Zero => f.write_str("Zero"),
            Self::Blocks { mask, bytes } => write!(f, "Blocks({:#x}, {} bytes)", mask.0, bytes.len()),
        }
    }
}

impl Body {
    /// Bytes of content that travel.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Zero => 0,
            Self::Blocks { bytes, .. } => bytes.len(),
        }
    }

    /// Whether no content travels.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A chunk on its way.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChunkData {
    /// The migration, so that a stray stream cannot mix disks.
    pub migration: MigrationId,
    /// The epoch under which it was sent; the destination drops older ones after the handoff.
    pub epoch: Epoch,
    /// The chunk.
    pub chunk: ChunkId,
    /// The version that was captured.
    pub version: Version,
    /// Why it travels.
    pub purpose: Purpose,
    /// The content.
    pub body: Body,
}

/// TRANSFER_IO_CONTROL: the last part of the remaining set has been announced; own the disk under `epoch` if granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Offer {
    /// The epoch that the destination may activate.
    pub epoch: Epoch,
    /// Digest of the whole remaining set with its counts.
    pub digest: RemainingDigest,
    /// Number of chunks in the remaining set.
    pub remaining: u32,
    /// The guest's write-cache mode (virtio CONFIG_WCE), which the hypervisor does not carry.
    pub write_cache: bool,
}

/// Everything that one peer tells the other.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Message {
    /// Source: who it is and what it moves. First on every connection.
    Hello(Hello),
    /// Destination: the session goes on from here.
    Welcome(Welcome),
    /// Either: the session ends; nothing has changed hands by this.
    Refuse {
        /// The reason by name.
        reason: Refusal,
        /// The reason in words.
        text: String,
    },
    /// Destination: chunks and versions that it has kept from earlier in this migration.
    Have {
        /// Chunk and version pairs.
        entries: Vec<(ChunkId, Version)>,
        /// No more lists follow.
        last: bool,
    },
    /// Destination: it gave this very disk away in that migration and still has all of it, as it was then. Asks which
    /// chunks are what they were; the welcome waits for the answer.
    Replica {
        /// The migration in which the disk went away from here.
        migration: MigrationId,
    },
    /// Source: chunks that are still what they were when they came in that migration, with their versions here; none if
    /// this disk has not come in it.
    Keep {
        /// Chunk and version pairs.
        entries: Vec<(ChunkId, Version)>,
        /// No more lists follow.
        last: bool,
    },
    /// Source: how chunks stand; applied in order.
    Announce {
        /// The announcements.
        entries: Vec<Announcement>,
    },
    /// Source: chunks of the base image that its guest uses, hottest first; fetch them from the repository.
    HotBase {
        /// The chunks.
        chunks: Vec<ChunkId>,
    },
    /// Source: the content of a chunk. The only message on data streams.
    Chunk(ChunkData),
    /// Destination: these versions are installed (in the page cache, not yet durable).
    Ack {
        /// Chunk and version pairs.
        entries: Vec<(ChunkId, Version)>,
    },
    /// Source: take over when the guest starts at your side.
    Offer(Offer),
    /// Destination: the offer is durable here.
    Prepared {
        /// The epoch of the offer.
        epoch: Epoch,
    },
    /// Destination: the digest does not match what was announced. The source connects again, so that both sides
    /// compare what is here.
    Mismatch {
        /// The epoch of the offer.
        epoch: Epoch,
    },
    /// Destination: send this chunk.
    Pull {
        /// The epoch of the offer.
        epoch: Epoch,
        /// The chunk.
        chunk: ChunkId,
        /// The guest waits for it.
        demand: bool,
    },
    /// Source: this chunk cannot be read; the destination stalls or reports an error, it never invents data.
    PullFailed {
        /// The chunk.
        chunk: ChunkId,
        /// The reason by name.
        reason: Refusal,
    },
    /// Destination: the guest starts here; may it have the disk? Without an epoch: whatever can be offered now.
    Activate {
        /// The prepared epoch.
        epoch: Option<Epoch>,
    },
    /// Source: the grant is durable; the disk is the destination's.
    Granted {
        /// The epoch granted.
        epoch: Epoch,
    },
    /// Source: the disk stays where it is.
    Denied {
        /// The epoch that was asked for.
        epoch: Option<Epoch>,
        /// The reason by name.
        reason: Refusal,
    },
    /// Source: an offer that was not granted is void; this is the epoch now.
    Reclaimed {
        /// The source's new epoch.
        epoch: Epoch,
    },
    /// Source: all that it holds for this epoch has been synced; a guest flush at the destination may be acknowledged.
    Synced {
        /// The epoch.
        epoch: Epoch,
    },
    /// Destination: everything is here, durably.
    Complete {
        /// The epoch.
        epoch: Epoch,
    },
    /// Source: it has durably let go of the volume.
    Released {
        /// The epoch.
        epoch: Epoch,
    },
    /// Source: the migration is off; drop what came.
    Cancel,
    /// Destination: it has dropped what came (or had nothing).
    Cancelled,
    /// Either: are you there? Answered by `Pong` with the same number.
    Ping(u64),
    /// Either: the answer to `Ping`.
    Pong(u64),
}
