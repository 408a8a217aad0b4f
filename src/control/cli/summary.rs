// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one object with which a finished `migrate --json` ends.
//!
//! Scripts read it: fields may be added at the end, none may go.

use super::total::total;
use crate::control::follow::Outcome;
use crate::control::follow::account::{Owner, next, owner};
use crate::control::qmp::VmStatus;
use crate::control::words::is_handed_over;
use crate::node::status::{MigrationState, MigrationStatus, StrategyName};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

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
    /// The summary of an outcome; of several disks, of all together.
    #[must_use]
    pub fn new(outcome: &Outcome) -> Self {
        let disks: Vec<&MigrationStatus> = outcome.disks.iter().map(|disk| &disk.status).collect();
        let message = outcome.failure.clone().unwrap_or_default();
        Self::of(&total(&disks), message, outcome.vm.as_ref())
    }

    fn of(disk: &MigrationStatus, message: String, vm: Option<&VmStatus>) -> Self {
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
            message,
            vm_state: vm.map(|vm| vm.word.clone()),
            vm_downtime_ms: vm.and_then(|vm| vm.downtime_ms),
            vm_total_ms: vm.and_then(|vm| vm.total_ms),
        }
    }
}

/// How the migration of several disks went: the object of one disk with the sums of all, and each disk's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetSummary {
    /// All together.
    #[serde(flatten)]
    pub all: Summary,
    /// The disks, in the order in which they were named.
    pub disks: Vec<DiskSummary>,
}

/// One of several disks: how its migration went, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSummary {
    /// The API socket of its daemon at the source.
    pub api_socket: PathBuf,
    /// Who owns it.
    pub owner: Owner,
    /// The source's stage of ownership.
    pub stage: String,
    /// The source's epoch.
    pub epoch: u64,
    /// Whether the daemon answers; if not, all this is the last that it said.
    pub answers: bool,
    /// What the operator can do next, in a sentence.
    pub next: String,
    /// How its migration went; `message` is the daemon's own.
    #[serde(flatten)]
    pub summary: Summary,
}

impl SetSummary {
    /// The summary of an outcome.
    #[must_use]
    pub fn new(outcome: &Outcome) -> Self {
        let away = outcome.disks.iter().any(|disk| is_handed_over(disk.status.state));
        let disks = outcome.disks.iter().map(|disk| DiskSummary {
            api_socket: disk.socket.clone(),
            owner: owner(&disk.status),
            stage: disk.status.stage.clone(),
            epoch: disk.status.epoch,
            answers: !disk.lost,
            next: next(&disk.status, disk.lost, away).to_owned(),
            summary: Summary::of(&disk.status, disk.status.message.clone(), None),
        });
        Self { all: Summary::new(outcome), disks: disks.collect() }
    }
}
