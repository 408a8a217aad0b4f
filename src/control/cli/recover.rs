// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `blkferry recover`: explains a state directory, or makes its side the owner by force. The only verb without a daemon.

use super::{CliError, print, print_json};
use crate::control::cli::args::Recover;
use crate::control::size::human;
use crate::core::takeover::LostChunks;
use crate::node::recover::{self, Explanation, MissingReport};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

/// Ranges that people are shown; `--json` has all.
const SHOWN: usize = 12;

/// Does what was asked.
///
/// # Errors
/// [`CliError`]: the directory cannot be used, or may not be forced.
pub fn run(args: &Recover, json: bool) -> Result<ExitCode, CliError> {
    let (dir, base) = (&args.state_dir, args.base.as_deref());
    let lost = LostChunks::from(args.lost_chunks);
    let before = recover::explain(dir, base, lost)?;
    if args.force.is_some() && args.accept_loss {
        let after = recover::force(dir, base, lost)?;
        if json {
            print_json(&after)?;
        } else {
            print(&deed(&before, &after))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if json {
        print_json(&before)?;
    } else {
        print(&text(&before))?;
    }
    if args.force.is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    let why = if before.force.possible {
        "nothing was changed: what `force` says is lost must be accepted with --accept-loss"
    } else {
        &before.force.reason
    };
    writeln!(io::stderr(), "error: {why}")?;
    Ok(ExitCode::FAILURE)
}

fn row(text: &mut String, label: &str, value: &str) {
    if !value.is_empty() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {label:<11}{value}");
    }
}

/// The explanation, for people.
#[must_use]
pub fn text(one: &Explanation) -> String {
    let mut text = format!(
        "volume {}: {} in chunks of {}, in {}\n",
        one.volume,
        human(one.size),
        human(u64::from(one.chunk_size)),
        one.state_dir
    );
    row(&mut text, "role", &format!("{}, {}, epoch {}", one.role, one.stage, one.epoch));
    row(&mut text, "owner", one.owner);
    row(&mut text, "migration", one.migration.as_deref().unwrap_or_default());
    row(&mut text, "peer", one.peer.as_deref().unwrap_or_default());
    row(&mut text, "base", &base(one));
    let layer = &one.layer;
    let adopted = if layer.adopted { ", adopted" } else { "" };
    row(&mut text, "layer", &format!("{} ({} allocated{adopted})", layer.path, human(layer.allocated_bytes)));
    let partly = match one.chunks_in_part {
        0 => String::new(),
        some => format!("; {some} of them in part in the layer"),
    };
    row(&mut text, "chunks", &format!("{}{partly}", super::render::chunks(&one.chunks)));
    row(&mut text, "missing", &missing(&one.missing));
    for line in &one.summary {
        let _ = writeln!(text, "{line}");
    }
    text.push_str("What can be done:\n");
    for choice in &one.choices {
        let _ = writeln!(text, "  - {}", choice.action);
        for loss in &choice.loses {
            let _ = writeln!(text, "      loses: {loss}");
        }
    }
    if !one.force.possible {
        let _ = writeln!(text, "Force: {}", one.force.reason);
    }
    text
}

fn base(one: &Explanation) -> String {
    let Some(base) = &one.base else { return "none".to_owned() };
    let digest: String = base.digest.chars().take(16).collect();
    let place = base.url.as_deref().unwrap_or("somewhere");
    let detail = if base.detail.is_empty() { String::new() } else { format!(": {}", base.detail) };
    format!("{} bytes, digest {digest}.., at {place}: {}{detail}", base.length, base.state)
}

fn missing(missing: &MissingReport) -> String {
    if missing.chunks == 0 {
        return "nothing".to_owned();
    }
    let mut text = format!("{} chunks, {} bytes:", missing.chunks, missing.bytes);
    for [start, end] in missing.ranges.iter().take(SHOWN) {
        let _ = write!(text, " {start}-{}", end - 1);
    }
    let more = missing.ranges.len().saturating_sub(SHOWN);
    if more > 0 {
        let _ = write!(text, " and {more} ranges more (--json has all)");
    }
    text
}

/// What was done, and how things stand now.
fn deed(before: &Explanation, after: &Explanation) -> String {
    let mut text = String::new();
    if before.role == after.role {
        text.push_str("The lost chunks were settled.\n");
    } else {
        let _ = writeln!(
            text,
            "This side was {} ({}, epoch {}); it is the owner of the disk now (epoch {}).",
            before.role, before.stage, before.epoch, after.epoch
        );
    }
    for loss in &before.force.loses {
        let _ = writeln!(text, "Accepted: {loss}");
    }
    if before.missing.chunks > 0 {
        let _ = writeln!(text, "Lost: {}", missing(&before.missing));
    }
    let _ = writeln!(text, "{}/recover.log keeps all of that.\n", after.state_dir);
    text + &self::text(after)
}
