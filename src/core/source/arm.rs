// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a source is armed with.

use crate::core::geometry::ChunkId;
use crate::core::heat::Counting;
use crate::core::message::{Hello, MigrationId, Version};
use crate::core::strategy::Strategy;
use std::time::Duration;

/// What a session is made with.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ArmParams {
    /// What the source says of itself; its epoch is the current one.
    pub hello: Hello,
    /// `HOST:PORT` of the destination.
    pub destination: String,
    /// Strategy; an unavailable one pushes nothing.
    pub strategy: Strategy,
    /// Push threshold.
    pub threshold: u32,
    /// What a write counts.
    pub counting: Counting,
    /// Most chunks that are being captured or are unacknowledged.
    pub push_window: u32,
    /// Time in which write counts halve.
    pub half_life: Duration,
    /// Push at once, not only when the hypervisor starts to log dirty pages.
    pub start_now: bool,
    /// Whether the guest's rings run now.
    pub rings_running: bool,
    /// The guest's write-cache mode now.
    pub write_cache: bool,
    /// What came in an earlier migration and was not written since; `None` where nothing did.
    pub unchanged: Option<Unchanged>,
}

/// Chunks that the source of an earlier migration has as they are here.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Unchanged {
    /// The migration in which they came.
    pub migration: MigrationId,
    /// The chunks, all of them in the modified set, with their versions now.
    pub chunks: Vec<(ChunkId, Version)>,
}
