// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The words of the protocol's enums, for metric labels and for people, and what a state means to a follower.
//!
//! The words stand a second time beside serde's renames because a label wants a `&'static str` without going through
//! JSON; a test holds the two together.

use crate::node::status::{MigrationState, StrategyName};

/// Every migration state, in the order in which a good migration passes them, then the two bad ends.
pub const STATES: [MigrationState; 8] = [
    MigrationState::None,
    MigrationState::Setup,
    MigrationState::Active,
    MigrationState::PreSwitchover,
    MigrationState::PostcopyActive,
    MigrationState::Completed,
    MigrationState::Failed,
    MigrationState::Cancelled,
];

/// The state's word, as in the API.
#[must_use]
pub const fn state_word(state: MigrationState) -> &'static str {
    match state {
        MigrationState::None => "none",
        MigrationState::Setup => "setup",
        MigrationState::Active => "active",
        MigrationState::PreSwitchover => "pre-switchover",
        MigrationState::PostcopyActive => "postcopy-active",
        MigrationState::Completed => "completed",
        MigrationState::Failed => "failed",
        MigrationState::Cancelled => "cancelled",
    }
}

/// The strategy's word, as in the API.
#[must_use]
pub const fn strategy_word(strategy: StrategyName) -> &'static str {
    match strategy {
        StrategyName::Hybrid => "hybrid",
        StrategyName::Precopy => "precopy",
        StrategyName::Postcopy => "postcopy",
        StrategyName::Mirror => "mirror",
        StrategyName::Shared => "shared",
    }
}

/// Whether a migration in this state has ended.
#[must_use]
pub const fn is_final(state: MigrationState) -> bool {
    matches!(state, MigrationState::Completed | MigrationState::Failed | MigrationState::Cancelled)
}

/// Whether a migration in this state is under way.
#[must_use]
pub const fn is_running(state: MigrationState) -> bool {
    !is_final(state) && !matches!(state, MigrationState::None)
}

/// Whether the disk may already belong to the destination.
#[must_use]
pub const fn is_handed_over(state: MigrationState) -> bool {
    matches!(state, MigrationState::PostcopyActive | MigrationState::Completed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn words_are_those_of_the_api() {
        for state in STATES {
            assert_eq!(serde_json::to_value(state).unwrap(), state_word(state));
        }
        for strategy in [
            StrategyName::Hybrid,
            StrategyName::Precopy,
            StrategyName::Postcopy,
            StrategyName::Mirror,
            StrategyName::Shared,
        ] {
            assert_eq!(serde_json::to_value(strategy).unwrap(), strategy_word(strategy));
        }
    }

    #[test]
    fn each_state_is_none_running_or_final() {
        let of = |wanted: fn(MigrationState) -> bool| STATES.into_iter().filter(|s| wanted(*s)).count();
        assert_eq!((of(is_running), of(is_final)), (4, 3));
    }
}
