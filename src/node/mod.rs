// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The companion thread: the one owner of the volume's role (layer L5).
//!
//! [`daemon::run`] opens everything and runs the [`node`](self) on a current-thread runtime until a signal ends it. The
//! sessions of `core` decide; this room carries out. See docs/ARCHITECTURE.md, "Migration".

mod admission;
mod away;
pub mod daemon;
mod destination;
mod drain;
mod forced;
mod holds;
mod input;
mod jobs;
mod links;
#[allow(clippy::module_inception)]
mod node;
mod publish;
pub mod recover;
mod report;
mod resize;
mod signals;
mod source;
pub mod status;

use thiserror::Error;

/// Why a daemon could not start or go on.
#[derive(Debug, Error)]
pub enum NodeError {
    /// The configuration is unusable.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The state directory cannot be used.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// The volume cannot be opened.
    #[error("the volume cannot be opened: {0}")]
    Volume(std::io::Error),
    /// What a crash of the host has left cannot be put right.
    #[error("the volume cannot be recovered: {0}")]
    Transfer(crate::volume::TransferError),
    /// The front-end's socket cannot be served.
    #[error(transparent)]
    Frontend(#[from] crate::frontend::server::FrontendError),
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] crate::peer::TlsError),
    /// The peer socket cannot be had.
    #[error("--listen {address}: {error}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// The API cannot be served.
    #[error("the API cannot be served: {0}")]
    Surface(String),
    /// No runtime.
    #[error("the runtime cannot be started: {0}")]
    Runtime(std::io::Error),
    /// Ownership cannot be recorded.
    #[error("ownership of the volume cannot be made durable: {0}")]
    Claim(String),
    /// A new volume of unknown size.
    #[error(
        "a new volume needs --size, --base or --blk-file (or --listen, to learn its size from a migration source)"
    )]
    NoSize,
}
