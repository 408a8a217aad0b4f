// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the node tells about itself, and what it may be asked: the whole surface between `node` and `control`.

use serde::{Deserialize, Serialize};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use utoipa::ToSchema;

/// State of a migration, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationState {
    /// No migration.
    #[default]
    None,
    /// Armed; the peers have not agreed yet.
    Setup,
    /// Chunks are pushed (destination: received).
    Active,
    /// The rings have stopped; the disk is offered (destination: prepared).
    PreSwitchover,
    /// The destination owns the disk and pulls what is left.
    PostcopyActive,
    /// Everything is at the destination.
    Completed,
    /// The migration failed; the reason stands beside it.
    Failed,
    /// The operator cancelled.
    Cancelled,
}

/// Which side of a migration this daemon is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Gives the disk.
    Source,
    /// Gets the disk.
    Destination,
}

/// Strategy of a migration (paper, table 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(rename_all = "lowercase")]
pub enum StrategyName {
    /// Push below the threshold, then prefetch hottest first.
    #[default]
    Hybrid,
    /// Push everything, however often it is written.
    Precopy,
    /// Push nothing.
    Postcopy,
    /// Write to both sides.
    Mirror,
    /// Shared storage; nothing moves.
    Shared,
}

/// When pushing begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(rename_all = "kebab-case")]
pub enum StartMode {
    /// At once, as in the paper.
    #[default]
    Now,
    /// When the hypervisor starts to log dirty pages.
    WithHypervisor,
}

/// MIGRATION_REQUEST (paper, Algorithm 1) as the API takes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// `HOST:PORT` or `tcp:HOST:PORT` of the destination daemon's `--listen`.
    pub destination_url: String,
    /// Strategy.
    #[serde(default)]
    pub strategy: StrategyName,
    /// Push a chunk only while it was written fewer times; default 3.
    #[serde(default)]
    pub threshold: Option<u32>,
    /// Data streams; default 2.
    #[serde(default)]
    pub connections: Option<u8>,
    /// Cap in bytes a second for this migration, instead of the daemon's; 0 is none.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// When pushing begins.
    #[serde(default)]
    pub start: StartMode,
}

/// The new size of a volume as the API takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// Size in bytes: a multiple of 512, and not less than the volume has.
    pub size: u64,
}

/// The migration as GET `/api/v1/migration` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema, Default)]
pub struct MigrationStatus {
    /// State.
    pub state: MigrationState,
    /// Migration id in hexadecimal; empty without a migration.
    pub id: String,
    /// Which side this is.
    pub side: Option<Side>,
    /// The other side's address.
    pub peer: String,
    /// Whether the peer is connected now.
    pub connected: bool,
    /// Whether the disk is offered and the destination, which is connected, holds the offer durably: only the start of
    /// the VM there is missing. Absent from daemons of before.
    #[serde(default)]
    pub prepared: bool,
    /// Ownership stage, in the words of docs/ARCHITECTURE.md (`pushing`, `offered`, ..).
    pub stage: String,
    /// Epoch.
    pub epoch: u64,
    /// Strategy.
    pub strategy: StrategyName,
    /// Threshold.
    pub threshold: u32,
    /// Why it failed, or what it waits for; empty if there is nothing to say.
    pub message: String,
    /// Size of the volume in bytes.
    pub volume_bytes: u64,
    /// Bytes of chunks in the modified set when armed.
    pub modified_bytes: u64,
    /// Bytes of chunks that the destination still lacks.
    pub remaining_bytes: u64,
    /// The same in chunks.
    pub remaining_chunks: u64,
    /// Milliseconds since the request.
    pub total_ms: u64,
    /// Milliseconds from the request to the stop of the rings (until now if they have not).
    pub push_ms: u64,
    /// Milliseconds from the stop of the rings to the grant.
    pub handoff_ms: u64,
    /// Milliseconds from the grant to complete (until now).
    pub pull_ms: u64,
    /// Content bytes pushed.
    pub push_bytes: u64,
    /// Content bytes pulled in the background.
    pub prefetch_bytes: u64,
    /// Content bytes pulled because the guest waited.
    pub demand_bytes: u64,
    /// All bytes on the wire, both directions, this side's view.
    pub wire_bytes: u64,
    /// Chunks pushed, repeats included.
    pub chunks_pushed: u64,
    /// Chunks pushed again.
    pub chunks_repushed: u64,
    /// Chunks pulled.
    pub chunks_pulled: u64,
    /// Pulls that a guest write made needless.
    pub chunks_cancelled: u64,
    /// Chunks that travelled as zeros.
    pub zero_chunks: u64,
    /// Chunks that did not travel: the destination still had them from before the disk went away from there.
    #[serde(default)]
    pub kept_chunks: u64,
    /// Their bytes.
    #[serde(default)]
    pub kept_bytes: u64,
    /// Times that the connection was made again.
    pub reconnects: u64,
    /// Microseconds for which the acknowledgement of the rings' stop was held here, drain included.
    pub stop_hold_us: u64,
    /// Microseconds for which the acknowledgement of the rings' start was held here.
    pub start_hold_us: u64,
}

/// The volume as GET `/api/v1/volume` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema, Default)]
pub struct VolumeStatus {
    /// Volume id in hexadecimal.
    pub id: String,
    /// Size in bytes.
    pub size: u64,
    /// Chunk size in bytes.
    pub chunk_size: u32,
    /// Base image, empty if none.
    pub base: String,
    /// Whether this daemon may serve guest I/O now.
    pub serving: bool,
    /// Epoch.
    pub epoch: u64,
    /// Whether a front-end is connected.
    pub frontend_connected: bool,
    /// Write-back (true) or write-through.
    pub write_cache: bool,
    /// Chunks by state.
    pub chunks: ChunkCounts,
    /// Requests and bytes since start.
    pub io: IoCounts,
    /// What becomes of requests that need a migration source that is away.
    pub source: SourceStatus,
    /// Chunks of which a part is lost for good (`blkferry recover`): reads of it give I/O errors.
    pub lost_chunks: u64,
    /// That this side was made the owner by force, and when; empty if it was not.
    pub forced: String,
    /// What is wrong with the volume, empty if nothing.
    pub fault: String,
}

/// What a guest gets that wants a chunk of a migration source that is away (`--on-source-loss`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(rename_all = "lowercase")]
pub enum SourceLossPolicy {
    /// No answer until the source is back.
    #[default]
    Stall,
    /// An I/O error, after the grace time.
    Error,
}

/// How the migration source is, as far as the guest here depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
pub struct SourceStatus {
    /// What a guest gets that wants a chunk of a source that is away.
    pub on_source_loss: SourceLossPolicy,
    /// How long requests wait first, in seconds, where they get an error.
    pub grace_s: u64,
    /// The guest runs here and depends on a source that is not connected.
    pub away: bool,
    /// Since when, in milliseconds of Unix time; 0 when it is not away.
    pub away_since_ms: u64,
    /// What needs the source fails now: the grace time is over.
    pub failing: bool,
    /// Parts of guest requests, one in each chunk, that wait for content from the source or the base image.
    pub waiting: u64,
    /// Parts of guest requests that failed since the daemon started because their content could not be had.
    pub failed: u64,
}

/// Number of chunks in each state; `partial` ones are also counted in their state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
pub struct ChunkCounts {
    /// Untouched.
    pub base: u64,
    /// Zeroed.
    pub zero: u64,
    /// Copies of the base.
    pub local: u64,
    /// Differing from the base.
    pub modified: u64,
    /// At the migration source.
    pub remote: u64,
    /// Being filled.
    pub installing: u64,
    /// As the source of the last migration gave them.
    #[serde(default)]
    pub received: u64,
}

/// Guest requests and bytes since the daemon started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
pub struct IoCounts {
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards and write-zeroes.
    pub zeroes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
}

/// Everything at one moment; published on a watch channel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema, Default)]
pub struct Snapshot {
    /// The volume.
    pub volume: VolumeStatus,
    /// The migration.
    pub migration: MigrationStatus,
}

/// A named refusal of a command.
#[derive(Debug, Error, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[error("{code}: {message}")]
pub struct Denied {
    /// A stable word, for programs: `busy`, `not-owner`, `not-supported`, `invalid`, `handed-over`, `none`,
    /// `shrink`, `limit`, `no-space`, `faulty`, `not-whole`, `internal`.
    pub code: String,
    /// A sentence, for people.
    pub message: String,
}

impl Denied {
    /// A refusal with this code and sentence.
    #[must_use]
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into() }
    }
}

/// What the node may be asked.
#[derive(Debug)]
pub enum Command {
    /// Arm a migration.
    Migrate(MigrationRequest, oneshot::Sender<Result<(), Denied>>),
    /// Cancel it.
    Cancel(oneshot::Sender<Result<(), Denied>>),
    /// Make the volume larger: the new size in bytes.
    Resize(u64, oneshot::Sender<Result<(), Denied>>),
    /// Publish a snapshot of now, and then answer.
    Refresh(oneshot::Sender<Result<(), Denied>>),
}

impl Command {
    /// Answers any command with a refusal.
    pub fn deny(self, code: &str, message: &str) {
        let denied = Err(Denied::new(code, message));
        // A client that went away does not want the answer.
        match self {
            Self::Migrate(_, answer)
            | Self::Cancel(answer)
            | Self::Resize(_, answer)
            | Self::Refresh(answer) => drop(answer.send(denied)),
        }
    }
}

/// How long a reader waits for a node that has no snapshot of now; then the last one must do.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(1);

/// A handle on the running node; cheap to clone.
#[derive(Debug, Clone)]
pub struct NodeHandle {
    /// Commands, in order.
    pub commands: mpsc::Sender<Command>,
    /// The newest snapshot. The node publishes one when its state changes; [`refresh`](Self::refresh) before counters
    /// are read.
    pub snapshots: watch::Receiver<Snapshot>,
}

impl NodeHandle {
    /// Makes the newest snapshot one of now. A node that is not ready to tell, or has ended, leaves it as it is.
    pub async fn refresh(&self) {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            if self.commands.send(Command::Refresh(reply)).await.is_ok() {
                // A refusal comes from a daemon that has no volume yet, and so no snapshot.
                drop(answer.await);
            }
        };
        // Nothing better can be told then than what was known last.
        let _ = timeout(REFRESH_TIMEOUT, asked).await;
    }
}
