// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon's one validated configuration. Defaults live here and nowhere else.

use crate::core::destination::OnSourceLoss;
use crate::core::geometry::{DEFAULT_CHUNK_SIZE, SECTOR};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;

/// Request queues offered when nothing else is asked for.
pub const DEFAULT_QUEUES: u16 = 1;
/// Most request queues.
pub const MAX_QUEUES: u16 = 16;
/// Ring size when nothing else is asked for: QEMU's default.
pub const DEFAULT_QUEUE_SIZE: u16 = 128;
/// Largest ring size: QEMU's limit for vhost-user-blk.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Longest busy-poll: beyond this a sleep costs less than it saves.
pub const MAX_POLL_US: u32 = 10_000;
/// CPU numbers of `--queue-cpus` are below this: what an affinity mask of the C library holds.
pub const MAX_CPUS: u16 = 1024;
/// Longest serial in bytes (virtio 1.2, 5.2.6: VIRTIO_BLK_ID_BYTES).
pub const MAX_SERIAL: usize = 20;
/// Push threshold when nothing else is asked for.
pub const DEFAULT_THRESHOLD: u32 = 3;
/// How long a source may be away before what waits for it fails, where errors are wanted: most absences are a daemon
/// that is started again, or a network that comes back.
pub const DEFAULT_SOURCE_GRACE: Duration = Duration::from_secs(30);
/// Longest such time.
pub const MAX_SOURCE_GRACE: Duration = Duration::from_secs(24 * 3600);
/// Data streams of a migration when nothing else is asked for.
pub const DEFAULT_CONNECTIONS: u8 = 2;
/// Most data streams of a migration.
pub const MAX_CONNECTIONS: u8 = 16;

/// Why a configuration was refused; each says which flag and what to do.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Not exactly one of `--socket-path` and `--fd`.
    #[error("give exactly one of --socket-path and --fd")]
    Socket,
    /// A value is out of its range.
    #[error("{flag} {value} is not allowed: {rule}")]
    Value {
        /// The flag.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        rule: String,
    },
    /// Flags that exclude each other, or one that needs another.
    #[error("{0}")]
    Combination(String),
}

/// How the front-end's connection is had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrontendSocket {
    /// Listen on this path.
    Path(PathBuf),
    /// Serve this one inherited, connected or listening socket.
    Fd(RawFd),
}

/// Use of the host's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Direct where the file system says how, else buffered.
    #[default]
    Auto,
    /// Bypass the page cache.
    Direct,
    /// Use the page cache.
    Buffered,
}

/// Everything that the daemon was asked to be.
#[derive(Debug, Clone)]
pub struct Config {
    /// The vhost-user socket.
    pub socket: FrontendSocket,
    /// The volume's state directory.
    pub state_dir: PathBuf,
    /// Base image URL or path.
    pub base: Option<String>,
    /// Volume size in bytes; with a base it may only grow the disk.
    pub size: Option<u64>,
    /// Raw image that is adopted as a fully modified layer.
    pub blk_file: Option<PathBuf>,
    /// The guest may not write.
    pub read_only: bool,
    /// What GET_ID answers.
    pub serial: String,
    /// Where the API listens.
    pub api_socket: Option<PathBuf>,
    /// Where a migration source may connect.
    pub listen: Option<SocketAddr>,
    /// Folder with certificates in QEMU's layout.
    pub tls_dir: Option<PathBuf>,
    /// Cap on bytes a second that this daemon sends to a peer; 0 is no cap.
    pub bandwidth: u64,
    /// What a guest gets that wants a remote chunk while the source is away.
    pub on_source_loss: OnSourceLoss,
    /// Request queues.
    pub num_queues: u16,
    /// Largest ring size.
    pub queue_size: u16,
    /// Chunk size in bytes for a new volume.
    pub chunk_size: u32,
    /// Use of the page cache.
    pub cache: CacheMode,
    /// How the queue threads run.
    pub queues: QueueTuning,
}

/// How queue threads run; it changes what they cost, never what they do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QueueTuning {
    /// Pin all guest memory for io_uring (`IORING_REGISTER_BUFFERS`).
    pub register_memory: bool,
    /// Longest time, in microseconds, for which an idle queue thread spins before it sleeps; 0 never spins.
    pub poll_us: u32,
    /// Queue thread n runs on CPU `cpus[n % cpus.len()]`; anywhere when empty.
    pub cpus: Vec<u16>,
}

impl Config {
    /// A configuration with defaults for everything that is not a socket or a place.
    #[must_use]
    pub fn new(socket: FrontendSocket, state_dir: PathBuf) -> Self {
        Self {
            socket,
            state_dir,
            base: None,
            size: None,
            blk_file: None,
            read_only: false,
            serial: String::from("blkferry"),
            api_socket: None,
            listen: None,
            tls_dir: None,
            bandwidth: 0,
            on_source_loss: OnSourceLoss::Stall,
            num_queues: DEFAULT_QUEUES,
            queue_size: DEFAULT_QUEUE_SIZE,
            chunk_size: DEFAULT_CHUNK_SIZE,
            cache: CacheMode::Auto,
            queues: QueueTuning::default(),
        }
    }

    /// Checks everything that can be checked without touching a file.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the flag and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let value =
            |flag, value: String, rule: &str| Err(ConfigError::Value { flag, value, rule: rule.to_owned() });
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return value("--num-queues", self.num_queues.to_string(), "1 to 16");
        }
        if !self.queue_size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(&self.queue_size) {
            return value("--queue-size", self.queue_size.to_string(), "a power of two from 4 to 1024");
        }
        if self.serial.len() > MAX_SERIAL || !self.serial.is_ascii() {
            return value("--serial", self.serial.clone(), "at most 20 ASCII characters");
        }
        if let Some(size) = self.size
            && (size == 0 || !size.is_multiple_of(SECTOR))
        {
            return value("--size", size.to_string(), "a positive multiple of 512 bytes");
        }
        if let Err(error) = crate::core::geometry::Geometry::new(SECTOR, self.chunk_size) {
            return value("--chunk-size", self.chunk_size.to_string(), &error.to_string());
        }
        if let OnSourceLoss::Error { grace } = self.on_source_loss
            && grace > MAX_SOURCE_GRACE
        {
            return value("--source-grace", grace.as_secs().to_string(), "0 to 86400 seconds");
        }
        if self.blk_file.is_some() && self.base.is_some() {
            return Err(ConfigError::Combination(
                "--blk-file adopts a whole image: it cannot be combined with --base".to_owned(),
            ));
        }
        if self.queues.poll_us > MAX_POLL_US {
            return value("--poll-us", self.queues.poll_us.to_string(), "0 to 10000 microseconds");
        }
        if let Some(cpu) = self.queues.cpus.iter().find(|cpu| **cpu >= MAX_CPUS) {
            return value("--queue-cpus", cpu.to_string(), "CPU numbers below 1024");
        }
        Ok(())
    }
}
