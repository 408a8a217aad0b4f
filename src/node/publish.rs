// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Publishes what the node knows, as one [`Snapshot`] on a watch channel: when its role or a migration's state changes,
//! and when somebody asks ([`Command::Refresh`](super::status::Command::Refresh)). Counters change with every request
//! of the guest, and are read only then.

use super::admission::Standing;
use super::node::{Node, RoleDriver};
use super::report::hex;
use super::status::{ChunkCounts, IoCounts, Snapshot, VolumeStatus};

/// A standing in the words of docs/ARCHITECTURE.md.
fn stage_name(standing: Standing) -> &'static str {
    match standing {
        Standing::Serving => "serving",
        Standing::Idle => "idle",
        Standing::Pushing => "pushing",
        Standing::Offered => "offered",
        Standing::Relinquished => "relinquished",
        Standing::Released => "released",
        Standing::Receiving => "receiving",
        Standing::Prepared => "prepared",
        Standing::Pulling => "active",
        Standing::Complete => "complete",
    }
}

impl Node {
    /// Publishes the snapshot of now, if it differs from the last one.
    pub(super) fn publish(&mut self) {
        let state = self.migration_state();
        self.shown = Some((self.standing(), state));
        let stage = stage_name(self.standing());
        let (progress, connected, prepared) = match &self.role {
            RoleDriver::Source(source) => {
                (Some(source.session.progress()), source.link.is_some(), source.session.prepared())
            }
            RoleDriver::Destination(destination) => {
                let connected = destination.link.is_some();
                let prepared = connected && self.standing() == Standing::Prepared;
                (Some(destination.session.progress()), connected, prepared)
            }
            RoleDriver::Serving | RoleDriver::Idle => (None, false, false),
        };
        if let Some(progress) = progress {
            self.report.update(state, stage, (connected, prepared), &progress);
        }
        self.report.wire(self.link_bytes());
        let times = self.frontend.hold_times();
        let holds = (times.stop(), times.start());
        let volume = self.volume_status();
        let snapshot = Snapshot {
            volume,
            migration: self.report.status(self.volume.geometry().size(), self.epoch.0, holds),
        };
        self.snapshots.send_if_modified(|last| {
            let differs = *last != snapshot;
            if differs {
                *last = snapshot;
            }
            differs
        });
    }

    fn chunk_counts(&self) -> ChunkCounts {
        let counts = self.volume.counts();
        ChunkCounts {
            base: counts.base,
            zero: counts.zero,
            local: counts.local,
            modified: counts.modified,
            remote: counts.remote,
            installing: counts.installing,
            received: counts.received,
        }
    }

    fn volume_status(&self) -> VolumeStatus {
        let totals = self.volume.io();
        let io = IoCounts {
            reads: totals.reads,
            writes: totals.writes,
            flushes: totals.flushes,
            zeroes: totals.zeroes,
            errors: totals.errors,
            read_bytes: totals.read_bytes,
            written_bytes: totals.written_bytes,
        };
        let geometry = self.volume.geometry();
        VolumeStatus {
            id: hex(&self.volume_id.0),
            size: geometry.size(),
            chunk_size: geometry.chunk_size(),
            base: self.config.base.clone().unwrap_or_default(),
            serving: self.owns() && self.volume.gate().is_open(),
            epoch: self.epoch.0,
            frontend_connected: self.frontend_connected,
            write_cache: self.volume.write_cache(),
            chunks: self.chunk_counts(),
            io,
            source: self.source_status(),
            lost_chunks: self.lost_chunks(),
            forced: self.forced_words(),
            fault: self.fault.clone(),
        }
    }
}
