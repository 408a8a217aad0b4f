// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! May this daemon change its role now? Answered without locks and without I/O: accept, or deny with a
//! named reason. The whole matrix of standings and commands is tested below.

use super::status::Denied;

/// What a daemon is, as far as commands care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Owns the disk and has all of it.
    Serving,
    /// Owns nothing and waits for a source.
    Idle,
    /// Gives the disk away, guest still here.
    Pushing,
    /// Rings stopped, disk offered.
    Offered,
    /// The disk is the destination's.
    Relinquished,
    /// The destination has everything.
    Released,
    /// Takes chunks, owns nothing.
    Receiving,
    /// Holds an offer.
    Prepared,
    /// Owns a disk of which a part is still at the source.
    Pulling,
    /// Owns all of the disk; the source does not know yet.
    Complete,
}

/// Every standing.
#[cfg(test)]
const ALL_STANDINGS: [Standing; 10] = [
    Standing::Serving,
    Standing::Idle,
    Standing::Pushing,
    Standing::Offered,
    Standing::Relinquished,
    Standing::Released,
    Standing::Receiving,
    Standing::Prepared,
    Standing::Pulling,
    Standing::Complete,
];

/// The answer to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Admission {
    /// Do it.
    Accept,
    /// Not now, and why.
    Deny(Denied),
}

fn deny(code: &str, message: &str) -> Admission {
    Admission::Deny(Denied::new(code, message))
}

/// Why a disk of which chunks are lost neither moves nor grows: its loss would travel as content, or be spread.
pub(super) fn not_whole(lost: u64) -> Denied {
    Denied::new(
        "not-whole",
        format!(
            "{lost} chunks of this disk are lost (blkferry recover shows where): the guest must write them first, or \
             settle them with blkferry recover --force serve --lost-chunks"
        ),
    )
}

/// May a migration be armed?
#[must_use]
pub(super) fn migrate(standing: Standing) -> Admission {
    match standing {
        Standing::Serving => Admission::Accept,
        Standing::Idle => deny(
            "not-owner",
            "this daemon owns no disk yet: a guest must have started on it, or a migration arrived",
        ),
        Standing::Pushing | Standing::Offered => {
            deny("busy", "a migration is under way: watch it, or cancel it first")
        }
        Standing::Relinquished | Standing::Released => {
            deny("handed-over", "the disk was handed over: ask the daemon that owns it now")
        }
        Standing::Receiving | Standing::Prepared => {
            deny("not-owner", "this daemon is the destination of a migration that has not handed over yet")
        }
        Standing::Pulling => deny(
            "not-whole",
            "a part of the disk is still at the source of the migration that brought it here: wait until that has \
             completed",
        ),
        Standing::Complete => deny(
            "busy",
            "the source of the migration that brought the disk here does not know yet that it is over: wait until \
             it does",
        ),
    }
}

/// May the volume be made larger?
#[must_use]
pub(super) fn resize(standing: Standing) -> Admission {
    match standing {
        Standing::Serving => Admission::Accept,
        Standing::Idle => {
            deny("not-owner", "this daemon owns no disk yet: start it with the size that is wanted")
        }
        Standing::Pushing | Standing::Offered | Standing::Pulling | Standing::Complete => {
            deny("busy", "a migration is under way: resize when it has completed, or cancel it first")
        }
        Standing::Relinquished | Standing::Released => {
            deny("handed-over", "the disk was handed over: ask the daemon that owns it now")
        }
        Standing::Receiving | Standing::Prepared => {
            deny("not-owner", "this daemon is the destination of a migration that has not handed over yet")
        }
    }
}

/// May the migration be cancelled?
#[must_use]
pub(super) fn cancel(standing: Standing) -> Admission {
    match standing {
        Standing::Serving | Standing::Idle => deny("none", "there is no migration to cancel"),
        Standing::Pushing | Standing::Offered | Standing::Receiving | Standing::Prepared => Admission::Accept,
        Standing::Relinquished | Standing::Pulling => deny(
            "handed-over",
            "the guest owns the disk at the destination: the migration can only go on to its end",
        ),
        Standing::Released | Standing::Complete => deny("none", "the migration has completed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(admission: &Admission) -> &str {
        match admission {
            Admission::Accept => "accept",
            Admission::Deny(denied) => &denied.code,
        }
    }

    #[test]
    fn the_whole_matrix() {
        let want = [
            (Standing::Serving, "accept", "none"),
            (Standing::Idle, "not-owner", "none"),
            (Standing::Pushing, "busy", "accept"),
            (Standing::Offered, "busy", "accept"),
            (Standing::Relinquished, "handed-over", "handed-over"),
            (Standing::Released, "handed-over", "none"),
            (Standing::Receiving, "not-owner", "accept"),
            (Standing::Prepared, "not-owner", "accept"),
            (Standing::Pulling, "not-whole", "handed-over"),
            (Standing::Complete, "busy", "none"),
        ];
        assert_eq!(want.map(|row| row.0), ALL_STANDINGS);
        for (standing, on_migrate, on_cancel) in want {
            assert_eq!(code(&migrate(standing)), on_migrate, "migrate in {standing:?}");
            assert_eq!(code(&cancel(standing)), on_cancel, "cancel in {standing:?}");
            // A peer that knows the size is in the way of both.
            let on_resize = if on_migrate == "not-whole" { "busy" } else { on_migrate };
            assert_eq!(code(&resize(standing)), on_resize, "resize in {standing:?}");
        }
    }
}
