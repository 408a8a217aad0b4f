// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a disk stands, for the operator who has to go on from there: who owns it, and what can be done.

use crate::node::status::{MigrationState, MigrationStatus};
use serde::{Deserialize, Serialize};

/// Who owns a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// The daemon here.
    Source,
    /// The daemon here, which serves nobody: it waits which VM starts.
    Offered,
    /// The daemon at the other side.
    Destination,
}

impl Owner {
    /// The word, as in JSON.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Offered => "offered",
            Self::Destination => "destination",
        }
    }
}

/// Who owns the disk of a migration that the source tells of. The stage is the finer word: a migration can fail at a
/// source that has given the disk away.
#[must_use]
pub fn owner(status: &MigrationStatus) -> Owner {
    match (status.stage.as_str(), status.state) {
        ("relinquished" | "released", _)
        | (_, MigrationState::PostcopyActive | MigrationState::Completed) => Owner::Destination,
        (_, MigrationState::PreSwitchover) => Owner::Offered,
        _ => Owner::Source,
    }
}

/// What the operator can do next. `lost`: its daemon here does not answer, and `status` is the last that it said. `away`:
/// some disk of the VM is owned by the destination, so that the VM can only go there.
#[must_use]
pub fn next(status: &MigrationStatus, lost: bool, away: bool) -> &'static str {
    use MigrationState::{Cancelled, Completed, Failed, None};
    if lost && status.state != Completed {
        return "start its daemon again with the same arguments: it continues from its record";
    }
    match (owner(status), status.state) {
        (_, Completed) => "nothing to do: its daemon here may be stopped",
        (Owner::Destination, _) => {
            "it cannot come back by itself: keep its daemon here running until it has completed"
        }
        (Owner::Offered, _) if away => {
            "do not cancel it, the VM needs it at the destination: see that both of its daemons run and reach each \
             other, and it follows when the VM starts"
        }
        (Owner::Offered, _) => {
            "start the VM at the destination to let it go, or cancel it and start the VM here"
        }
        (Owner::Source, None | Failed | Cancelled) if away => {
            "the VM needs it at the destination: migrate it again, alone, and it follows when the VM starts"
        }
        (Owner::Source, _) if away => {
            "do not cancel it, the VM needs it at the destination: if the VM runs here, migrate it again"
        }
        (Owner::Source, None | Failed | Cancelled) => "it serves here: migrate again when the reason is gone",
        (Owner::Source, _) => "it serves here: let it go on, or cancel it",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: MigrationState, stage: &str) -> MigrationStatus {
        MigrationStatus { state, stage: stage.to_owned(), ..MigrationStatus::default() }
    }

    #[test]
    fn the_owner_is_what_the_source_has_recorded() {
        for (state, stage, wanted) in [
            (MigrationState::Setup, "pushing", Owner::Source),
            (MigrationState::Active, "pushing", Owner::Source),
            (MigrationState::PreSwitchover, "offered", Owner::Offered),
            (MigrationState::PostcopyActive, "relinquished", Owner::Destination),
            (MigrationState::Completed, "released", Owner::Destination),
            (MigrationState::Failed, "serving", Owner::Source),
            (MigrationState::Failed, "relinquished", Owner::Destination),
            (MigrationState::Cancelled, "serving", Owner::Source),
        ] {
            assert_eq!(owner(&status(state, stage)), wanted, "{state:?} {stage}");
            assert_eq!(serde_json::to_value(wanted).ok(), Some(wanted.word().into()));
        }
    }

    #[test]
    fn what_can_be_done_follows_from_who_owns_it() {
        let of = |state, stage, lost, away| next(&status(state, stage), lost, away);
        for (state, stage, lost, away, words) in [
            (MigrationState::Active, "pushing", true, false, "start its daemon again"),
            (MigrationState::Active, "pushing", false, false, "or cancel it"),
            (MigrationState::Active, "pushing", false, true, "do not cancel it"),
            (MigrationState::PreSwitchover, "offered", false, false, "start the VM at the destination"),
            (MigrationState::PreSwitchover, "offered", false, true, "do not cancel it"),
            (MigrationState::PostcopyActive, "relinquished", false, true, "cannot come back"),
            (MigrationState::Cancelled, "serving", false, false, "serves here"),
            (MigrationState::Failed, "serving", false, true, "migrate it again"),
            (MigrationState::Completed, "released", true, true, "may be stopped"),
        ] {
            assert!(of(state, stage, lost, away).contains(words), "{state:?} {stage} {lost} {away}");
        }
    }
}
