// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a session can say about how far it is, and how it ended.

use super::message::Refusal;

/// Counters of one migration, as one side sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Progress {
    /// Chunks that the destination still lacks.
    pub remaining_chunks: u64,
    /// Their bytes (whole chunks).
    pub remaining_bytes: u64,
    /// Content bytes pushed.
    pub push_bytes: u64,
    /// Content bytes pulled in the background.
    pub prefetch_bytes: u64,
    /// Content bytes pulled because the guest waited.
    pub demand_bytes: u64,
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
    /// Chunks that did not travel because the destination still had them from before the disk went away from there.
    pub kept_chunks: u64,
    /// Their bytes (whole chunks).
    pub kept_bytes: u64,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Everything is at the destination, and both sides know.
    Released,
    /// The operator cancelled.
    Cancelled,
    /// It failed; the disk is where it was.
    Failed {
        /// The reason by name.
        reason: Refusal,
        /// The reason in words.
        text: String,
    },
}
