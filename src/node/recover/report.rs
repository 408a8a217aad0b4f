// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The explanation of a state directory as values, for programs; `words` has the sentences.

use super::{Facts, words};
use crate::config::CacheMode;
use crate::core::chunk::ChunkState;
use crate::core::record::{DestinationStage, Role, SourceStage};
use crate::core::takeover::{LostChunks, Takeover, Was, forced_epoch};
use crate::node::report::hex;
use crate::node::status::ChunkCounts;
use crate::store::{Forced, utc};
use serde::Serialize;
use std::path::Path;

/// What a state directory holds and what can be done with it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The directory.
    pub state_dir: String,
    /// Volume id in hexadecimal.
    pub volume: String,
    /// Size in bytes.
    pub size: u64,
    /// Chunk size in bytes.
    pub chunk_size: u32,
    /// The base image; none if the volume has none.
    pub base: Option<BaseReport>,
    /// The layer.
    pub layer: LayerReport,
    /// `none`, `serving`, `idle`, `source` or `destination`.
    pub role: &'static str,
    /// The stage, in the words of docs/operations.md.
    pub stage: &'static str,
    /// Who owns the disk as far as this directory knows: `here`, `peer`, `undecided` (the source decides), `nobody`.
    pub owner: &'static str,
    /// Epoch of the record; 0 without one.
    pub epoch: u64,
    /// The migration of the record, in hexadecimal.
    pub migration: Option<String>,
    /// Address of the destination; a destination does not know that of its source.
    pub peer: Option<String>,
    /// Another boot of the host has passed since the directory was used.
    pub rebooted: bool,
    /// Because of that, all that had come counts as not come.
    pub reverts: bool,
    /// Chunks by state, as a daemon that starts now would have them.
    pub chunks: ChunkCounts,
    /// Chunks in `base` or `remote` of which some blocks are in the layer.
    pub chunks_in_part: u64,
    /// What is not here.
    pub missing: MissingReport,
    /// Whether the source had synced its layer after the handoff; none where that does not matter.
    pub source_synced: Option<bool>,
    /// Flushes that the guest believes in cover data that is not here.
    pub flushes_at_risk: bool,
    /// An ownership that was forced before.
    pub forced: Option<ForcedReport>,
    /// How things stand, in sentences.
    pub summary: Vec<String>,
    /// What can be done next.
    pub choices: Vec<Choice>,
    /// What `--force serve` would do.
    pub force: ForceReport,
}

/// The base image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BaseReport {
    /// Length in bytes.
    pub length: u64,
    /// Its digest (docs/on-disk.md) in hexadecimal.
    pub digest: String,
    /// Where it is said to be.
    pub url: Option<String>,
    /// `found`, `differs`, `unreadable`, or `unknown` when nobody has said where it is.
    pub state: &'static str,
    /// More about that; empty if it was found.
    pub detail: String,
}

/// The layer's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerReport {
    /// Where it is.
    pub path: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// Bytes that its file system has allocated for it.
    pub allocated_bytes: u64,
    /// It is an image that was there before the volume.
    pub adopted: bool,
}

/// What is not here of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MissingReport {
    /// Chunks of which a part is not here.
    pub chunks: u64,
    /// Bytes that are not here.
    pub bytes: u64,
    /// Where, in bytes of the volume: the first, and the one after the last.
    pub ranges: Vec<[u64; 2]>,
}

/// An ownership that was forced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForcedReport {
    /// When, in UTC.
    pub at: String,
    /// What this side was.
    pub was: String,
    /// The epoch before.
    pub epoch_before: u64,
    /// The epoch since.
    pub epoch_after: u64,
    /// Chunks that were lost then.
    pub lost_chunks: u64,
    /// Bytes that were lost then.
    pub lost_bytes: u64,
    /// What became of them: `error`, `zero`, `base`.
    pub lost_became: &'static str,
}

/// One thing that can be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// What to do.
    pub action: String,
    /// What that loses; empty for nothing.
    pub loses: Vec<String>,
}

/// What `--force serve` would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForceReport {
    /// Whether it may be forced.
    pub possible: bool,
    /// Why not; empty if it may.
    pub reason: String,
    /// The epoch that the owner would have.
    pub epoch: Option<u64>,
    /// What is lost or risked; empty if nothing is.
    pub loses: Vec<String>,
}

impl Choice {
    pub(super) fn free(action: impl Into<String>) -> Self {
        Self { action: action.into(), loses: Vec::new() }
    }
}

fn role_and_stage(role: Option<&Role>) -> (&'static str, &'static str) {
    match role {
        None => ("none", "none"),
        Some(Role::Serving) => ("serving", "serving"),
        Some(Role::Idle) => ("idle", "idle"),
        Some(Role::Source(source)) => {
            let stage = match source.stage {
                SourceStage::Pushing => "pushing",
                SourceStage::Offered => "offered",
                SourceStage::Relinquished { .. } => "relinquished",
                SourceStage::Released { .. } => "released",
            };
            ("source", stage)
        }
        Some(Role::Destination(destination)) => {
            let stage = match destination.stage {
                DestinationStage::Receiving => "receiving",
                DestinationStage::Prepared => "prepared",
                DestinationStage::Active { .. } => "active",
                DestinationStage::Complete => "complete",
            };
            ("destination", stage)
        }
    }
}

fn owner(takeover: Takeover) -> &'static str {
    match takeover {
        Takeover::Owner | Takeover::Possible(Was::Offered | Was::Active | Was::Complete) => "here",
        Takeover::Torn | Takeover::Possible(Was::Relinquished | Was::Released) => "peer",
        Takeover::Possible(Was::Prepared) => "undecided",
        Takeover::Nothing => "nobody",
    }
}

fn counts(facts: &Facts) -> ChunkCounts {
    let mut counts = ChunkCounts::default();
    for run in &facts.look.runs {
        let count = match run.state {
            ChunkState::Base => &mut counts.base,
            ChunkState::Zero => &mut counts.zero,
            ChunkState::Local => &mut counts.local,
            ChunkState::Modified => &mut counts.modified,
            ChunkState::Remote => &mut counts.remote,
            ChunkState::Installing => &mut counts.installing,
            ChunkState::Received => &mut counts.received,
        };
        *count += u64::from(run.count);
    }
    counts
}

fn base_report(facts: &Facts, url: Option<&str>) -> Option<BaseReport> {
    let known = &facts.look.superblock.base;
    if known.length == 0 {
        return None;
    }
    let url = url.map(str::to_owned).or_else(|| facts.look.superblock.base_url.clone());
    let (state, detail) = match &url {
        None => ("unknown", "nobody has said where it is: give --base".to_owned()),
        Some(url) => match crate::store::base::open(url, CacheMode::Buffered) {
            Ok(base) if base.identity() == known => ("found", String::new()),
            Ok(_) => ("differs", format!("{url} is not the image that the volume was made on")),
            Err(error) => ("unreadable", error.to_string()),
        },
    };
    Some(BaseReport { length: known.length, digest: hex(&known.digest), url, state, detail })
}

fn forced_report(forced: &Forced) -> ForcedReport {
    ForcedReport {
        at: utc(forced.at),
        was: forced.was.to_string(),
        epoch_before: forced.before.0,
        epoch_after: forced.after.0,
        lost_chunks: forced.chunks,
        lost_bytes: forced.bytes,
        lost_became: words::lost_word(forced.lost),
    }
}

fn force_report(facts: &Facts, lost: LostChunks) -> ForceReport {
    match facts.decide(lost) {
        Ok(was) => ForceReport {
            possible: true,
            reason: String::new(),
            epoch: Some(was.map_or(facts.epoch, |_| forced_epoch(facts.epoch)).0),
            loses: words::losses(facts, was, lost),
        },
        Err(error) => {
            ForceReport { possible: false, reason: error.to_string(), epoch: None, loses: Vec::new() }
        }
    }
}

pub(super) fn explanation(dir: &Path, facts: &Facts, base: Option<&str>, lost: LostChunks) -> Explanation {
    let (superblock, layer) = (&facts.look.superblock, &facts.look.layer);
    let (role, stage) = role_and_stage(facts.role.as_ref());
    let peer = match &facts.role {
        Some(Role::Source(source)) => Some(source.destination.clone()),
        Some(Role::Serving | Role::Idle | Role::Destination(_)) | None => None,
    };
    let missing = &facts.missing;
    let partly = facts.look.runs.iter().filter(|run| !run.mask.is_empty());
    Explanation {
        state_dir: dir.display().to_string(),
        volume: hex(&facts.volume.0),
        size: superblock.size,
        chunk_size: superblock.chunk_size,
        base: base_report(facts, base),
        layer: LayerReport {
            path: layer.path.display().to_string(),
            bytes: layer.len,
            allocated_bytes: layer.allocated,
            adopted: superblock.layer_path.is_some(),
        },
        role,
        stage,
        owner: owner(facts.takeover()),
        epoch: facts.epoch.0,
        migration: facts.migration().map(|id| hex(&id.0)),
        peer,
        rebooted: facts.rebooted,
        reverts: facts.look.reverts,
        chunks: counts(facts),
        chunks_in_part: partly.map(|run| u64::from(run.count)).sum(),
        missing: MissingReport {
            chunks: missing.chunks,
            bytes: missing.bytes,
            ranges: missing.ranges.iter().map(|range| [range.start, range.end]).collect(),
        },
        source_synced: facts.source_synced(),
        flushes_at_risk: words::flushes_at_risk(facts),
        forced: facts.look.forced.as_ref().map(forced_report),
        summary: words::summary(facts),
        choices: words::choices(dir, facts, lost),
        force: force_report(facts, lost),
    }
}
