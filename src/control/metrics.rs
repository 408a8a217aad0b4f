// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Metrics in the OpenMetrics text format.
//!
//! Values are read from a snapshot that is made when somebody scrapes: the guest's I/O path pays nothing for a scrape
//! that does not come. Counters that belong to a migration start again at zero with the next one, as a counter may.

use super::words;
use crate::node::status::{MigrationStatus, Snapshot, VolumeStatus};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use std::fmt;
use tokio::sync::watch;

/// Content type of the text (OpenMetrics 1.0).
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Adds everything that a snapshot knows to `registry`.
pub fn register(registry: &mut Registry, snapshots: watch::Receiver<Snapshot>) {
    registry.register_collector(Box::new(SnapshotCollector { snapshots }));
}

/// The registry's metrics as text.
///
/// # Errors
/// When a collector cannot write its values.
pub fn text(registry: &Registry) -> Result<String, fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
}

#[derive(Debug)]
struct SnapshotCollector {
    snapshots: watch::Receiver<Snapshot>,
}

impl Collector for SnapshotCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let snapshot = self.snapshots.borrow().clone();
        volume(&mut encoder, &snapshot.volume)?;
        migration(&mut encoder, &snapshot.migration)
    }
}

fn volume(out: &mut DescriptorEncoder<'_>, volume: &VolumeStatus) -> fmt::Result {
    let (io, chunks) = (&volume.io, &volume.chunks);
    counters(
        out,
        "blkferry_requests",
        "Guest requests since the daemon started",
        "op",
        &[("read", io.reads), ("write", io.writes), ("flush", io.flushes), ("zero", io.zeroes)],
    )?;
    counter(out, "blkferry_request_errors", "Guest requests answered with an error", io.errors)?;
    counters(
        out,
        "blkferry_io_bytes",
        "Bytes that the guest moved since the daemon started",
        "op",
        &[("read", io.read_bytes), ("write", io.written_bytes)],
    )?;
    gauges(
        out,
        "blkferry_chunks",
        "Chunks of the volume by state",
        "state",
        &[
            ("base", chunks.base),
            ("zero", chunks.zero),
            ("local", chunks.local),
            ("modified", chunks.modified),
            ("remote", chunks.remote),
            ("installing", chunks.installing),
            ("received", chunks.received),
        ],
    )?;
    gauge(out, "blkferry_volume_size_bytes", "Size of the volume", volume.size)?;
    gauge(
        out,
        "blkferry_volume_serving",
        "1 if this daemon may serve guest I/O now",
        u64::from(volume.serving),
    )?;
    gauge(out, "blkferry_volume_epoch", "Fencing number of the volume's ownership", volume.epoch)?;
    gauge(out, "blkferry_volume_fault", "1 if the volume has a fault", u64::from(!volume.fault.is_empty()))?;
    gauge(out, "blkferry_lost_chunks", "Chunks of which a part is lost for good", volume.lost_chunks)?;
    gauge(
        out,
        "blkferry_source_away",
        "1 if the guest depends on a migration source that is not connected",
        u64::from(volume.source.away),
    )?;
    gauge(
        out,
        "blkferry_source_waiting_requests",
        "Parts of guest requests that wait for content from the source or the base image",
        volume.source.waiting,
    )?;
    counter(
        out,
        "blkferry_source_failed_requests",
        "Parts of guest requests that failed because their content could not be had",
        volume.source.failed,
    )?;
    let connected = u64::from(volume.frontend_connected);
    gauge(out, "blkferry_frontend_connected", "1 if a front-end is connected", connected)
}

fn migration(out: &mut DescriptorEncoder<'_>, migration: &MigrationStatus) -> fmt::Result {
    let states = words::STATES.map(|state| (words::state_word(state), u64::from(state == migration.state)));
    gauges(out, "blkferry_migration_state", "1 at the migration's state, 0 at the others", "state", &states)?;
    gauge(out, "blkferry_migration_connected", "1 if the peer is connected", u64::from(migration.connected))?;
    gauge(
        out,
        "blkferry_migration_chunks_remaining",
        "Chunks that the destination still lacks",
        migration.remaining_chunks,
    )?;
    gauge(
        out,
        "blkferry_migration_remaining_bytes",
        "Bytes of chunks that the destination still lacks",
        migration.remaining_bytes,
    )?;
    gauge(
        out,
        "blkferry_migration_modified_bytes",
        "Bytes of chunks in the modified set when armed",
        migration.modified_bytes,
    )?;
    counters(
        out,
        "blkferry_migration_transferred_bytes",
        "Content bytes moved by this migration",
        "path",
        &[
            ("push", migration.push_bytes),
            ("prefetch", migration.prefetch_bytes),
            ("demand", migration.demand_bytes),
        ],
    )?;
    counter(
        out,
        "blkferry_migration_wire_bytes",
        "All bytes on the wire, both directions",
        migration.wire_bytes,
    )?;
    counter(
        out,
        "blkferry_migration_chunks_pushed",
        "Chunks pushed, repeats included",
        migration.chunks_pushed,
    )?;
    counter(out, "blkferry_migration_chunk_resends", "Chunks pushed again", migration.chunks_repushed)?;
    counter(out, "blkferry_migration_chunks_pulled", "Chunks pulled", migration.chunks_pulled)?;
    counter(
        out,
        "blkferry_migration_chunks_cancelled",
        "Pulls that a guest write made needless",
        migration.chunks_cancelled,
    )?;
    counter(out, "blkferry_migration_zero_chunks", "Chunks that travelled as zeros", migration.zero_chunks)?;
    let help = "Chunks that did not travel because the destination still had them";
    counter(out, "blkferry_migration_kept_chunks", help, migration.kept_chunks)?;
    counter(out, "blkferry_migration_reconnects", "Times the connection was made again", migration.reconnects)
}

/// A counter without labels; the encoder appends `_total`.
fn counter(out: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    out.encode_descriptor(name, help, None, MetricType::Counter)?
        .encode_counter::<NoLabelSet, u64, u64>(&value, None)
}

/// A counter with one label.
fn counters(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: &[(&str, u64)],
) -> fmt::Result {
    let mut metric = out.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (word, value) in values {
        metric.encode_family(&[(label, *word)])?.encode_counter::<NoLabelSet, u64, u64>(value, None)?;
    }
    Ok(())
}

/// A gauge without labels.
fn gauge(out: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    ConstGauge::new(value).encode(out.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

/// A gauge with one label.
fn gauges(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: &[(&str, u64)],
) -> fmt::Result {
    let mut metric = out.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (word, value) in values {
        let labels = [(label, *word)];
        ConstGauge::new(*value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}
