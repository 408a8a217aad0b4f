// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Answers for people.

use super::summary::{SetSummary, Summary};
use crate::control::size::{human, human_time};
use crate::control::words::{is_running, state_word, strategy_word};
use crate::node::status::{
    ChunkCounts, MigrationState, MigrationStatus, Side, Snapshot, SourceLossPolicy, SourceStatus,
    VolumeStatus,
};
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A block of text under a head: labels in one column, values in another.
struct Block {
    text: String,
}

impl Block {
    fn new(head: String) -> Self {
        Self { text: head + "\n" }
    }

    fn row(&mut self, label: &str, value: impl AsRef<str>) {
        let value = value.as_ref();
        if !value.is_empty() {
            // Writing to a String cannot fail.
            let _ = writeln!(self.text, "  {label:<11}{value}");
        }
    }
}

fn millis(ms: u64) -> String {
    human_time(Duration::from_millis(ms))
}

/// Volume and migration.
#[must_use]
pub fn snapshot(snapshot: &Snapshot) -> String {
    volume(&snapshot.volume) + &migration(&snapshot.migration)
}

fn volume(volume: &VolumeStatus) -> String {
    let mut block = Block::new(format!(
        "volume {}: {} in chunks of {}",
        volume.id,
        human(volume.size),
        human(u64::from(volume.chunk_size))
    ));
    block.row("base", if volume.base.is_empty() { "none" } else { &volume.base });
    block.row("serving", format!("{}, epoch {}", if volume.serving { "yes" } else { "no" }, volume.epoch));
    block.row("front-end", if volume.frontend_connected { "connected" } else { "not connected" });
    block.row("cache", if volume.write_cache { "write-back" } else { "write-through" });
    block.row("chunks", chunks(&volume.chunks));
    let io = &volume.io;
    block.row(
        "guest",
        format!(
            "{} reads ({}), {} writes ({}), {} flushes, {} discards, {} errors",
            io.reads,
            human(io.read_bytes),
            io.writes,
            human(io.written_bytes),
            io.flushes,
            io.zeroes,
            io.errors
        ),
    );
    block.row("source", source(&volume.source));
    if volume.lost_chunks > 0 {
        block.row("LOST", format!("{} chunks: reads of what is lost fail", volume.lost_chunks));
    }
    block.row("forced", &volume.forced);
    block.row("FAULT", &volume.fault);
    block.text
}

/// What the guest gets of a source that is away; empty when it depends on none.
fn source(source: &SourceStatus) -> String {
    if !source.away {
        return String::new();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let since = human_time(now.saturating_sub(Duration::from_millis(source.away_since_ms)));
    let what = match (source.on_source_loss, source.failing) {
        (SourceLossPolicy::Stall, _) => "requests that need it wait".to_owned(),
        (SourceLossPolicy::Error, false) => {
            format!("requests that need it fail when it has been away for {} s", source.grace_s)
        }
        (SourceLossPolicy::Error, true) => "requests that need it fail".to_owned(),
    };
    format!("AWAY for {since}: {what} ({} wait, {} have failed)", source.waiting, source.failed)
}

/// The states that some chunk is in.
#[must_use]
pub fn chunks(counts: &ChunkCounts) -> String {
    let all = [
        ("base", counts.base),
        ("zero", counts.zero),
        ("local", counts.local),
        ("modified", counts.modified),
        ("remote", counts.remote),
        ("installing", counts.installing),
        ("received", counts.received),
    ];
    let some: Vec<_> = all.iter().filter(|(_, n)| *n > 0).map(|(word, n)| format!("{n} {word}")).collect();
    some.join(", ")
}

fn direction(migration: &MigrationStatus) -> String {
    let word = match migration.side {
        Some(Side::Source) => "to",
        Some(Side::Destination) => "from",
        None => return String::new(),
    };
    format!(" {word} {}", migration.peer)
}

/// A migration.
#[must_use]
pub fn migration(migration: &MigrationStatus) -> String {
    if migration.state == MigrationState::None {
        return "migration: none\n".to_owned();
    }
    let mut block = Block::new(format!(
        "migration {}: {}{}",
        migration.id,
        state_word(migration.state),
        direction(migration)
    ));
    block.row("stage", format!("{}, epoch {}", migration.stage, migration.epoch));
    if is_running(migration.state) {
        block.row("peer", if migration.connected { "connected" } else { "not connected" });
    }
    block.row("strategy", strategy(migration.strategy, migration.threshold));
    block.row("message", &migration.message);
    block.row(
        "remaining",
        format!(
            "{} in {} chunks; {} were modified when armed",
            human(migration.remaining_bytes),
            migration.remaining_chunks,
            human(migration.modified_bytes)
        ),
    );
    block.row(
        "moved",
        moved(migration.push_bytes, migration.prefetch_bytes, migration.demand_bytes, migration.wire_bytes),
    );
    block.row(
        "chunks",
        travelled(
            migration.chunks_pushed,
            migration.chunks_repushed,
            migration.chunks_pulled,
            migration.chunks_cancelled,
            migration.zero_chunks,
        ),
    );
    block.row("kept", kept(migration.kept_chunks, migration.kept_bytes));
    block.row("time", times(migration.total_ms, migration.push_ms, migration.handoff_ms, migration.pull_ms));
    if migration.reconnects > 0 {
        block.row("reconnects", migration.reconnects.to_string());
    }
    block.text
}

fn strategy(strategy: crate::node::status::StrategyName, threshold: u32) -> String {
    format!("{}, threshold {threshold}", strategy_word(strategy))
}

fn moved(push: u64, prefetch: u64, demand: u64, wire: u64) -> String {
    format!(
        "push {}, prefetch {}, demand {}; {} on the wire",
        human(push),
        human(prefetch),
        human(demand),
        human(wire)
    )
}

fn travelled(pushed: u64, again: u64, pulled: u64, cancelled: u64, zero: u64) -> String {
    format!(
        "{pushed} pushed ({again} again), {pulled} pulled, {cancelled} pulls made needless, {zero} as zeros"
    )
}

/// What a disk that comes back finds there; nothing, if it does not come back.
fn kept(chunks: u64, bytes: u64) -> String {
    if chunks == 0 {
        return String::new();
    }
    format!("{chunks} chunks ({}) were there already", human(bytes))
}

fn times(total: u64, push: u64, handoff: u64, pull: u64) -> String {
    format!("{} (push {}, handoff {}, pull {})", millis(total), millis(push), millis(handoff), millis(pull))
}

/// How a migration went.
#[must_use]
pub fn summary(summary: &Summary) -> String {
    let mut block = Block::new(format!("{} after {}", state_word(summary.state), millis(summary.total_ms)));
    block.row("strategy", strategy(summary.strategy, summary.threshold));
    block.row(
        "disk",
        format!("{}, {} modified when armed", human(summary.volume_bytes), human(summary.modified_bytes)),
    );
    block.row(
        "moved",
        moved(summary.push_bytes, summary.prefetch_bytes, summary.demand_bytes, summary.wire_bytes),
    );
    block.row(
        "chunks",
        travelled(
            summary.chunks_pushed,
            summary.chunks_repushed,
            summary.chunks_pulled,
            summary.chunks_cancelled,
            summary.zero_chunks,
        ),
    );
    block.row("kept", kept(summary.kept_chunks, summary.kept_bytes));
    block.row("time", times(summary.total_ms, summary.push_ms, summary.handoff_ms, summary.pull_ms));
    if let Some(state) = &summary.vm_state {
        let downtime =
            summary.vm_downtime_ms.map(|ms| format!(", guest paused for {ms} ms")).unwrap_or_default();
        block.row("VM", format!("{state}{downtime}"));
    }
    block.text
}

/// How the migration of several disks went: all together, then each.
#[must_use]
pub fn set_summary(set: &SetSummary) -> String {
    let mut text = summary(&set.all);
    for disk in &set.disks {
        let of = &disk.summary;
        let stage = if disk.stage.is_empty() { String::new() } else { format!(" ({})", disk.stage) };
        let mut block = Block::new(format!(
            "{}: {}{stage}, owner {}, epoch {}",
            disk.api_socket.display(),
            state_word(of.state),
            disk.owner.word(),
            disk.epoch
        ));
        block.row(
            "disk",
            format!("{}, {} modified when armed", human(of.volume_bytes), human(of.modified_bytes)),
        );
        block.row("moved", moved(of.push_bytes, of.prefetch_bytes, of.demand_bytes, of.wire_bytes));
        block.row("time", times(of.total_ms, of.push_ms, of.handoff_ms, of.pull_ms));
        block.row("message", &of.message);
        block.row("next", if of.state == MigrationState::Completed { "" } else { &disk.next });
        text += &block.text;
    }
    text
}

/// A change of the volume in one line.
#[must_use]
pub fn volume_line(volume: &VolumeStatus) -> String {
    let io = &volume.io;
    let mut line = format!(
        "volume: {}, front-end {}, {} read, {} written, {}",
        if volume.serving { "serving" } else { "not serving" },
        if volume.frontend_connected { "connected" } else { "not connected" },
        human(io.read_bytes),
        human(io.written_bytes),
        chunks(&volume.chunks)
    );
    let source = source(&volume.source);
    if !source.is_empty() {
        line = line + ", source " + &source;
    }
    if !volume.fault.is_empty() {
        line = line + ", FAULT: " + &volume.fault;
    }
    line
}

/// A change of the migration in one line.
#[must_use]
pub fn migration_line(migration: &MigrationStatus) -> String {
    if migration.state == MigrationState::None {
        return "migration: none".to_owned();
    }
    let mut line = format!(
        "migration: {} ({}){}, {} left, {}",
        state_word(migration.state),
        migration.stage,
        direction(migration),
        human(migration.remaining_bytes),
        moved(migration.push_bytes, migration.prefetch_bytes, migration.demand_bytes, migration.wire_bytes)
    );
    if !migration.message.is_empty() {
        line = line + ", " + &migration.message;
    }
    line
}

/// The samples of a metrics text as objects `{"name", "labels", "value"}`. Lines that are none are skipped. Label values
/// are this daemon's own words: they hold no quotes, commas or braces.
#[must_use]
pub fn samples(text: &str) -> Vec<Value> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Value> {
    let (series, value) = line.rsplit_once(' ')?;
    let value = number(value)?;
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}')?),
        None => (series, ""),
    };
    let mut object = Map::new();
    for label in labels.split(',').filter(|label| !label.is_empty()) {
        let (key, value) = label.split_once('=')?;
        object.insert(key.to_owned(), value.trim_matches('"').into());
    }
    Some(json!({ "name": name, "labels": object, "value": value }))
}

/// A whole number stays one: beyond 2^53 a float would not be exact.
fn number(text: &str) -> Option<Value> {
    text.parse::<u64>().map(Value::from).ok().or_else(|| text.parse::<f64>().map(Value::from).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_become_objects() {
        let text = "# HELP a b.\n# TYPE a counter\na_total{op=\"read\",q=\"1\"} 18446744073709551615\nb 0.5\n# EOF\nnonsense\n";
        assert_eq!(
            samples(text),
            [
                json!({ "name": "a_total", "labels": { "op": "read", "q": "1" }, "value": u64::MAX }),
                json!({ "name": "b", "labels": {}, "value": 0.5 }),
            ]
        );
    }

    #[test]
    fn status_block_is_for_people() {
        let status = Snapshot {
            volume: VolumeStatus {
                id: "abc".to_owned(),
                size: 64 << 30,
                chunk_size: 256 << 10,
                serving: true,
                epoch: 3,
                frontend_connected: true,
                chunks: ChunkCounts { base: 10, modified: 2, ..ChunkCounts::default() },
                ..VolumeStatus::default()
            },
            migration: MigrationStatus::default(),
        };
        let text = snapshot(&status);
        let expected = "volume abc: 64.0 GiB in chunks of 256.0 KiB\n  base       none\n  serving    yes, epoch 3\n  \
                        front-end  connected\n  cache      write-through\n  chunks     10 base, 2 modified\n";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.ends_with("migration: none\n"), "{text}");
        assert!(!text.contains("FAULT"), "{text}");
    }
}
