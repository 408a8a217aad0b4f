// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The arbiter: who may own the disk, and the only table of legal steps of an ownership.
//!
//! ```text
//!  source                                                destination
//!
//!  Arming -> Pushing <-> Draining                        Idle -> Clearing [-> Keeping -> Pruning] -> Adopting -> Receiving
//!               |  \______/                                                    |  ^
//!               v   (rings stopped)                                            v  | reclaimed
//!            Offering -> Offered -> Granting -> Relinquished       Preparing -> Prepared -> Activating -> Active
//!               ^          |                        |                                                      |
//!  Pushing <- Reclaiming <-+                    Releasing -> Released                Completing -> Complete -> Settling
//!
//!  any step before Granting: Leaving -> Left             any step before Activating: Dropping -> Left
//! ```
//!
//! The steps that end in "ing" are those in which a record is being made durable: what depends on the record may be
//! said only when the step is over. The source grants at most one epoch, and never one that it has reclaimed:
//! Granting and Reclaiming both start in Offered and exclude each other. So there is at most one owner of each
//! epoch, whatever is lost, repeated or late.

use thiserror::Error;

/// How far a source is; see the module's picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceStep {
    /// The record of the armed migration is being written.
    Arming,
    /// Serves the guest and pushes.
    Pushing,
    /// Rings stopped; the strategy pushes what is left before it offers.
    Draining,
    /// The record of the offer is being written.
    Offering,
    /// Waits for the destination, or for its own rings to start again.
    Offered,
    /// The record of the reclaim (a new epoch) is being written.
    Reclaiming,
    /// The record of the grant is being written.
    Granting,
    /// Answers pulls.
    Relinquished,
    /// The record of the release is being written.
    Releasing,
    /// Holds nothing that anybody needs.
    Released,
    /// The record of the ordinary owner is being written: cancelled or failed.
    Leaving,
    /// Serves the guest; the migration is over.
    Left,
}

/// How far a destination is; see the module's picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationStep {
    /// Owns nothing and has nothing.
    Idle,
    /// What it had is being dropped before a migration comes in.
    Clearing,
    /// It has an older state of the disk that comes in: the source is asked what of it is current.
    Keeping,
    /// What is not is being dropped.
    Pruning,
    /// The record of the incoming migration is being written.
    Adopting,
    /// Takes chunks.
    Receiving,
    /// The record of the offer is being written.
    Preparing,
    /// Holds the offer.
    Prepared,
    /// The record that the offer is void is being written.
    Voiding,
    /// The record of the ownership is being written.
    Activating,
    /// Owns the disk.
    Active,
    /// Everything is here: it is being synced and recorded.
    Completing,
    /// Everything is here, durably; the source may not know.
    Complete,
    /// The record of the ordinary owner is being written.
    Settling,
    /// The record of the empty destination is being written, then what came is dropped.
    Dropping,
    /// The session is over.
    Left,
}

/// A step that the table does not have.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("{side} cannot go from {from} to {to}")]
pub struct IllegalStep {
    side: &'static str,
    from: String,
    to: String,
}

/// The only table of legal steps of a source.
///
/// # Errors
/// [`IllegalStep`] for every pair that is not in it.
pub fn check_source(from: SourceStep, to: SourceStep) -> Result<(), IllegalStep> {
    use SourceStep::{
        Arming, Draining, Granting, Leaving, Left, Offered, Offering, Pushing, Reclaiming, Released,
        Releasing, Relinquished,
    };
    let legal = match from {
        Arming => matches!(to, Pushing),
        Pushing => matches!(to, Draining | Offering | Leaving),
        Draining => matches!(to, Pushing | Offering | Leaving),
        Offering => matches!(to, Offered),
        Offered => matches!(to, Granting | Reclaiming | Leaving),
        Reclaiming => matches!(to, Pushing),
        Granting => matches!(to, Relinquished),
        Relinquished => matches!(to, Releasing),
        Releasing => matches!(to, Released),
        Leaving => matches!(to, Left),
        Released | Left => false,
    };
    if legal {
        return Ok(());
    }
    Err(IllegalStep { side: "a source", from: format!("{from:?}"), to: format!("{to:?}") })
}

/// The only table of legal steps of a destination.
///
/// # Errors
/// [`IllegalStep`] for every pair that is not in it.
pub fn check_destination(from: DestinationStep, to: DestinationStep) -> Result<(), IllegalStep> {
    use DestinationStep::{
        Activating, Active, Adopting, Clearing, Complete, Completing, Dropping, Idle, Keeping, Left,
        Prepared, Preparing, Pruning, Receiving, Settling, Voiding,
    };
    let legal = match from {
        Idle => matches!(to, Clearing | Adopting),
        Clearing => matches!(to, Adopting | Keeping),
        Keeping => matches!(to, Pruning | Clearing | Dropping),
        Pruning => matches!(to, Adopting),
        Adopting => matches!(to, Receiving),
        Receiving => matches!(to, Preparing | Voiding | Dropping | Clearing),
        Preparing => matches!(to, Prepared),
        Prepared => matches!(to, Voiding | Activating | Dropping | Clearing),
        Voiding => matches!(to, Receiving),
        Activating => matches!(to, Active),
        Active => matches!(to, Completing),
        // Back when the sync failed.
        Completing => matches!(to, Complete | Active),
        Complete => matches!(to, Settling),
        Settling | Dropping => matches!(to, Left),
        Left => false,
    };
    if legal {
        return Ok(());
    }
    Err(IllegalStep { side: "a destination", from: format!("{from:?}"), to: format!("{to:?}") })
}

/// Whether a source in this step may serve guest I/O.
#[must_use]
pub fn source_serves(step: SourceStep) -> bool {
    matches!(step, SourceStep::Arming | SourceStep::Pushing | SourceStep::Left)
}

/// Whether a destination in this step may serve guest I/O.
#[must_use]
pub fn destination_serves(step: DestinationStep) -> bool {
    matches!(
        step,
        DestinationStep::Active
            | DestinationStep::Completing
            | DestinationStep::Complete
            | DestinationStep::Settling
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t21_a_grant_and_a_reclaim_exclude_each_other() {
        use SourceStep::{Granting, Leaving, Offered, Pushing, Reclaiming, Relinquished};
        assert!(check_source(Offered, Granting).is_ok() && check_source(Offered, Reclaiming).is_ok());
        for after_grant in [Granting, Relinquished, SourceStep::Releasing, SourceStep::Released] {
            for back in [Pushing, Reclaiming, Leaving, SourceStep::Left, Offered] {
                assert!(check_source(after_grant, back).is_err(), "{after_grant:?} -> {back:?}");
            }
            assert!(!source_serves(after_grant));
        }
        assert!(check_source(Reclaiming, Granting).is_err());
        assert!(check_source(Leaving, Granting).is_err());
    }

    #[test]
    fn a_destination_serves_only_after_its_record_of_a_grant() {
        use DestinationStep::{Activating, Active, Idle, Prepared, Preparing, Receiving};
        for before in [Idle, Receiving, Preparing, Prepared, Activating] {
            assert!(!destination_serves(before));
            let direct = check_destination(before, Active).is_ok();
            assert_eq!(direct, before == Activating, "{before:?}");
        }
    }
}
