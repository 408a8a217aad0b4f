// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an operator is told of a state directory: how things stand, what can be done, and what each would lose.

use super::report::Choice;
use super::{Facts, utc};
use crate::core::record::{Role, SourceStage};
use crate::core::takeover::{LostChunks, Takeover, Was, forced_epoch};
use std::path::Path;

/// Why an empty side is not forced.
pub(super) const NOTHING: &str = "this directory has no disk that could be served: start the daemon on it as on a \
                                  new one, or look at the other side's directory";

const TWO_OWNERS: &str = "If the other side still lives, there are two owners from then on, and two disks that go \
                          their own ways: make sure that its daemon and its VM are stopped and will not start again.";

/// The word of the command line.
pub(super) fn lost_word(lost: LostChunks) -> &'static str {
    match lost {
        LostChunks::Error => "error",
        LostChunks::Zero => "zero",
        LostChunks::Base => "base",
    }
}

fn amount(facts: &Facts) -> String {
    format!("{} chunks ({} bytes)", facts.missing.chunks, facts.missing.bytes)
}

/// The guest, or a guest before it, was told that data is safe which is not here.
pub(super) fn flushes_at_risk(facts: &Facts) -> bool {
    match facts.takeover() {
        Takeover::Possible(Was::Relinquished | Was::Released) => true,
        Takeover::Possible(Was::Offered | Was::Prepared | Was::Active | Was::Complete)
        | Takeover::Owner
        | Takeover::Nothing
        | Takeover::Torn => facts.missing.chunks > 0,
    }
}

/// Why an owner is not forced.
pub(super) fn owner(facts: &Facts) -> String {
    if facts.missing.chunks > 0 {
        return format!(
            "this side owns the disk already, and {} of it are lost, which answer with I/O errors: start the daemon, or \
             say with --lost-chunks zero or base what they shall become",
            amount(facts)
        );
    }
    match &facts.role {
        Some(Role::Source(_)) => {
            "this side owns the disk: start its daemon, and cancel the migration if the \
                                  destination is gone (blkferry cancel)"
                .to_owned()
        }
        Some(Role::Serving | Role::Idle | Role::Destination(_)) | None => {
            "this side owns the disk, and has all of it: start its daemon".to_owned()
        }
    }
}

/// Why a half-received disk is not forced.
pub(super) fn torn(facts: &Facts) -> String {
    let (counts, mut here) = (&facts.look.runs, 0);
    for run in counts {
        here += if run.state == crate::core::chunk::ChunkState::Modified { u64::from(run.count) } else { 0 };
    }
    format!(
        "the disk is the source's. The {here} chunks that have come were copied at different moments: together they are \
         the content of no disk at any time. Look at the source's directory; if that is gone, restore a backup"
    )
}

/// How things stand.
pub(super) fn summary(facts: &Facts) -> Vec<String> {
    let mut lines = vec![stands(facts)];
    if let Some(forced) = &facts.look.forced {
        lines.push(format!(
            "It was made the owner by force at {}: before that it was {} (epoch {}), and {} chunks ({} bytes) were \
             lost; recover.log has all of it.",
            utc(forced.at),
            forced.was,
            forced.before.0,
            forced.chunks,
            forced.bytes
        ));
    }
    if facts.rebooted {
        lines.push("The host has booted since this directory was last used.".to_owned());
    }
    if facts.look.reverts {
        lines.push(
            "It went down before anything that had come was committed: all of the source's modified set counts as not \
             come, and what the guest wrote here without a flush is gone."
                .to_owned(),
        );
    }
    if facts.look.layer.len > facts.look.superblock.size {
        lines.push(
            "The layer is longer than the volume: a growth was cut off, and a start cuts it back.".to_owned(),
        );
    }
    match (facts.takeover(), facts.source_synced()) {
        (Takeover::Possible(Was::Active), Some(true)) if facts.missing.chunks > 0 => lines.push(
            "Flushes that were acknowledged to the guest may cover data that only the source has, synced there."
                .to_owned(),
        ),
        (Takeover::Possible(Was::Active), Some(false)) => lines.push(
            "The source has not said that it has synced: no flush of the guest has been acknowledged here since the \
             handoff."
                .to_owned(),
        ),
        (Takeover::Possible(Was::Relinquished), Some(synced)) => lines.push(
            if synced {
                "The layer was synced after the handoff."
            } else {
                "The layer was not recorded as synced after the handoff."
            }
            .to_owned(),
        ),
        _ => {}
    }
    lines
}

fn stands(facts: &Facts) -> String {
    let (epoch, peer) = (facts.epoch.0, peer(facts));
    match facts.takeover() {
        Takeover::Nothing if facts.role.is_none() => {
            "Nothing was ever served from this directory, and no migration has come in.".to_owned()
        }
        Takeover::Nothing => {
            "This directory owns no disk: no migration has come in, or one was cancelled.".to_owned()
        }
        Takeover::Owner if facts.missing.chunks > 0 => format!(
            "This side owns the disk (epoch {epoch}). {} of it are lost: reads of them give I/O errors until the guest has \
             written them.",
            amount(facts)
        ),
        Takeover::Owner if matches!(&facts.role, Some(Role::Source(s)) if s.stage == SourceStage::Pushing) => {
            format!(
                "This side owns the disk (epoch {epoch}). A migration to {peer} has begun, and nothing was offered."
            )
        }
        Takeover::Owner => format!("This side owns the disk (epoch {epoch}), and has all of it."),
        Takeover::Torn => "A migration was coming in (no offer yet): the disk is the source's.".to_owned(),
        Takeover::Possible(Was::Offered) => format!(
            "This side has offered the disk to {peer} (epoch {epoch}) and has not granted it: nobody else owns it."
        ),
        Takeover::Possible(Was::Relinquished) => format!(
            "This side has handed the disk over to {peer} (epoch {epoch}): the destination owns it, and pulls from here what \
             it lacks."
        ),
        Takeover::Possible(Was::Released) => format!(
            "This side has handed the disk over to {peer} (epoch {epoch}), which has all of it, durably. What is here is \
             old."
        ),
        Takeover::Possible(Was::Prepared) => format!(
            "This side holds the source's offer (epoch {epoch}), but for {} that are at the source. Whether the source has \
             granted the disk or taken it back is not known here.",
            amount(facts)
        ),
        Takeover::Possible(Was::Active) => format!(
            "This side owns the disk (epoch {epoch}). {} of it are still at the source.",
            amount(facts)
        ),
        Takeover::Possible(Was::Complete) => format!(
            "This side owns the disk (epoch {epoch}) and has all of it, durably. The source may not know yet."
        ),
    }
}

fn peer(facts: &Facts) -> &str {
    match &facts.role {
        Some(Role::Source(source)) => &source.destination,
        Some(Role::Serving | Role::Idle | Role::Destination(_)) | None => "its peer",
    }
}

/// What can be done next, the harmless first.
pub(super) fn choices(dir: &Path, facts: &Facts, lost: LostChunks) -> Vec<Choice> {
    let command = |lost: &str| {
        format!("blkferry recover --state-dir {} --force serve{lost} --accept-loss", dir.display())
    };
    let force = |was: Option<Was>| {
        let at_source = was.is_some_and(Was::is_source);
        let lost_chunks =
            if at_source { String::new() } else { format!(" --lost-chunks {}", lost_word(lost)) };
        Choice {
            action: format!("give the other side up: {}", command(&lost_chunks)),
            loses: losses(facts, was, lost),
        }
    };
    let start = |what: &str| Choice::free(format!("start the daemon on this directory: {what}"));
    match facts.takeover() {
        Takeover::Nothing => vec![start("it waits for a migration, or for a guest that starts afresh")],
        Takeover::Owner if facts.missing.chunks > 0 => {
            let lost = if lost == LostChunks::Error { LostChunks::Zero } else { lost };
            let lost_chunks = format!(" --lost-chunks {}", lost_word(lost));
            let action = format!("make of the lost chunks what they shall be: {}", command(&lost_chunks));
            vec![
                start("the guest gets I/O errors where chunks are lost, and heals what it writes"),
                Choice { action, loses: losses(facts, None, lost) },
            ]
        }
        Takeover::Owner if facts.migration().is_some() => vec![
            start("the migration goes on"),
            Choice::free("then, if the destination is gone, cancel it: blkferry cancel"),
        ],
        Takeover::Owner => vec![start("it serves")],
        Takeover::Torn => vec![
            start("the migration goes on when the source is back"),
            Choice {
                action: "if the source's directory is gone for good, restore a backup".to_owned(),
                loses: vec!["The disk, but for what the backup has.".to_owned()],
            },
        ],
        Takeover::Possible(Was::Offered) => vec![
            start("cancel the migration (blkferry cancel), or resume the VM here: both take the disk back"),
            force(Some(Was::Offered)),
        ],
        Takeover::Possible(Was::Relinquished) => vec![
            start("it serves no guest; it answers the destination until that has everything"),
            Choice::free("wait for the destination, and serve the disk there"),
            force(Some(Was::Relinquished)),
        ],
        Takeover::Possible(Was::Released) => vec![
            Choice::free("serve the disk at the destination, and remove this directory"),
            force(Some(Was::Released)),
        ],
        Takeover::Possible(was @ (Was::Prepared | Was::Active)) => {
            let wait = match was {
                Was::Active => "it serves what is here; the rest waits for the source (--on-source-loss)",
                _ => "it waits for the source, which decides",
            };
            let back = "bring the source's state directory back, on any host that reaches this one, and start its \
                        daemon";
            vec![start(wait), Choice::free(back), force(Some(was))]
        }
        Takeover::Possible(Was::Complete) => {
            vec![start("it serves, and tells the source when that comes"), force(Some(Was::Complete))]
        }
    }
}

/// What making this side the owner loses and risks. `was` is none at a side that owns the disk and only settles what is
/// lost.
pub(super) fn losses(facts: &Facts, was: Option<Was>, lost: LostChunks) -> Vec<String> {
    let mut lines = Vec::new();
    match was {
        None | Some(Was::Complete) => {}
        Some(Was::Offered) => {
            if facts.rebooted {
                lines.push(UNFLUSHED.to_owned());
            }
        }
        Some(Was::Relinquished | Was::Released) => {
            lines.push(
                "Every write that the guest made at the destination since the handoff is lost, flushed or not: the \
                 disk is what it was when the guest stopped here."
                    .to_owned(),
            );
            if facts.rebooted && facts.source_synced() == Some(false) {
                lines.push(UNFLUSHED.to_owned());
            }
            lines.push(TWO_OWNERS.to_owned());
        }
        Some(Was::Prepared) => {
            lines.push(
                "If the source has taken the disk back, its guest has gone on since, and every write since the offer \
                 is lost."
                    .to_owned(),
            );
            lines.push(TWO_OWNERS.to_owned());
        }
        Some(Was::Active) => {}
    }
    if facts.missing.chunks > 0 && was.is_none_or(|was| !was.is_source()) {
        lines.push(gone(facts, lost));
        if was.is_some() {
            lines.push(
                "Among that is data whose flush was acknowledged to the guest, here or at the source before the \
                 handoff."
                    .to_owned(),
            );
        }
    }
    if facts.missing.chunks > 0 && was.is_some_and(|was| !was.is_source()) {
        lines.push(format!(
            "What only the source has cannot be had any more, even if it comes back: this side is an owner of its own \
             from then on (epoch {}), and turns it away.",
            forced_epoch(facts.epoch).0
        ));
    }
    lines
}

const UNFLUSHED: &str = "The host went down after the guest had stopped here and before the layer was synced: writes \
                         that the guest had not flushed may be lost, as after any power cut.";

fn gone(facts: &Facts, lost: LostChunks) -> String {
    let amount = amount(facts);
    match lost {
        LostChunks::Error => format!(
            "{amount} are lost: reads of them give I/O errors, until the guest has written whole blocks over them."
        ),
        LostChunks::Zero => format!(
            "{amount} are lost and become zeros: the guest cannot tell them from data, and nothing warns it."
        ),
        LostChunks::Base => format!(
            "{amount} are lost and become what the base image has there, older content: the guest cannot tell it from \
             its data, and nothing warns it."
        ),
    }
}
