// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one object with which a finished `migrate --json` ends.
//!
//! Scripts read it: fields may be added at the end, none may go.

use crate::control::follow::Outcome;
use crate::node::status::{MigrationState, StrategyName};
use serde::{Deserialize, Serialize};

/// How a migration went. Sizes in bytes, times in milliseconds unless the name says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // The names are those of MigrationStatus, where they are explained.
pub struct Summary {
    pub state: MigrationState,
    pub strategy: StrategyName,
    pub threshold: u32,
    pub volume_bytes: u64,
    pub modified_bytes: u64,
    pub total_ms: u64,
    pub push_ms: u64,
    pub handoff_ms: u64,
    pub pull_ms: u64,
    pub push_bytes: u64,
    pub prefetch_bytes: u64,
    pub demand_bytes: u64,
    pub wire_bytes: u64,
    pub chunks_pushed: u64,
    pub chunks_repushed: u64,
    pub chunks_pulled: u64,
    pub chunks_cancelled: u64,
    pub zero_chunks: u64,
    #[serde(default)]
    pub kept_chunks: u64,
    #[serde(default)]
    pub kept_bytes: u64,
    pub reconnects: u64,
    pub stop_hold_us: u64,
    pub start_hold_us: u64,
    /// Why it is no success; empty if it is one.
    pub message: String,
    /// QEMU's word for the end of its own migration, if it was part of this.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vm_state: Option<String>,
    /// How long the guest stood still, as QEMU says.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vm_downtime_ms: Option<u64>,
    /// How long QEMU's migration took, as QEMU says.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vm_total_ms: Option<u64>,
}

impl Summary {
    /// The summary of an outcome.
    #[must_use]
    pub fn new(outcome: &Outcome) -> Self {
        let (disk, vm) = (&outcome.disk, outcome.vm.as_ref());
        Self {
            state: disk.state,
            strategy: disk.strategy,
            threshold: disk.threshold,
            volume_bytes: disk.volume_bytes,
            modified_bytes: disk.modified_bytes,
            total_ms: disk.total_ms,
            push_ms: disk.push_ms,
            handoff_ms: disk.handoff_ms,
            pull_ms: disk.pull_ms,
            push_bytes: disk.push_bytes,
            prefetch_bytes: disk.prefetch_bytes,
            demand_bytes: disk.demand_bytes,
            wire_bytes: disk.wire_bytes,
            chunks_pushed: disk.chunks_pushed,
            chunks_repushed: disk.chunks_repushed,
            chunks_pulled: disk.chunks_pulled,
            chunks_cancelled: disk.chunks_cancelled,
            zero_chunks: disk.zero_chunks,
            kept_chunks: disk.kept_chunks,
            kept_bytes: disk.kept_bytes,
            reconnects: disk.reconnects,
            stop_hold_us: disk.stop_hold_us,
            start_hold_us: disk.start_hold_us,
            message: outcome.failure.clone().unwrap_or_default(),
            vm_state: vm.map(|vm| vm.word.clone()),
            vm_downtime_ms: vm.and_then(|vm| vm.downtime_ms),
            vm_total_ms: vm.and_then(|vm| vm.total_ms),
        }
    }
}
