// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several migrations of one VM taken together: counts are added up, times are the longest.

use crate::control::words::STATES;
use crate::node::status::{MigrationState, MigrationStatus};

/// The state of all: a bad end of one is one of all, else none is further than the one that lags behind.
#[must_use]
pub fn state<'a>(disks: impl IntoIterator<Item = &'a MigrationStatus>) -> MigrationState {
    let place = |state: MigrationState| match state {
        MigrationState::Failed => (0, 0),
        MigrationState::Cancelled => (1, 0),
        _ => (2, STATES.iter().position(|known| *known == state).unwrap_or(0)),
    };
    disks.into_iter().map(|disk| disk.state).min_by_key(|state| place(*state)).unwrap_or_default()
}

/// All of them as one; of the only one, that one.
#[must_use]
pub fn total(disks: &[&MigrationStatus]) -> MigrationStatus {
    let Some((first, rest)) = disks.split_first() else { return MigrationStatus::default() };
    let mut all = (*first).clone();
    if rest.is_empty() {
        return all;
    }
    all.state = state(disks.iter().copied());
    all.message = String::new();
    for disk in rest {
        all.connected &= disk.connected;
        all.prepared &= disk.prepared;
        for (sum, more) in [
            (&mut all.volume_bytes, disk.volume_bytes),
            (&mut all.modified_bytes, disk.modified_bytes),
            (&mut all.remaining_bytes, disk.remaining_bytes),
            (&mut all.remaining_chunks, disk.remaining_chunks),
            (&mut all.push_bytes, disk.push_bytes),
            (&mut all.prefetch_bytes, disk.prefetch_bytes),
            (&mut all.demand_bytes, disk.demand_bytes),
            (&mut all.wire_bytes, disk.wire_bytes),
            (&mut all.chunks_pushed, disk.chunks_pushed),
            (&mut all.chunks_repushed, disk.chunks_repushed),
            (&mut all.chunks_pulled, disk.chunks_pulled),
            (&mut all.chunks_cancelled, disk.chunks_cancelled),
            (&mut all.zero_chunks, disk.zero_chunks),
            (&mut all.reconnects, disk.reconnects),
            // The hypervisor stops its devices one after the other.
            (&mut all.stop_hold_us, disk.stop_hold_us),
            (&mut all.start_hold_us, disk.start_hold_us),
        ] {
            *sum += more;
        }
        for (longest, time) in [
            (&mut all.total_ms, disk.total_ms),
            (&mut all.push_ms, disk.push_ms),
            (&mut all.handoff_ms, disk.handoff_ms),
            (&mut all.pull_ms, disk.pull_ms),
        ] {
            *longest = (*longest).max(time);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_only_one_is_itself() {
        let disk = MigrationStatus {
            state: MigrationState::Active,
            message: "waits".to_owned(),
            push_bytes: 7,
            ..MigrationStatus::default()
        };
        assert_eq!(total(&[&disk]), disk);
        assert_eq!(total(&[]), MigrationStatus::default());
    }

    #[test]
    fn counts_add_up_and_times_are_the_longest() {
        let of =
            |push_bytes, total_ms| MigrationStatus { push_bytes, total_ms, ..MigrationStatus::default() };
        let all = total(&[&of(3, 100), &of(4, 90)]);
        assert_eq!((all.push_bytes, all.total_ms), (7, 100));
    }

    #[test]
    fn the_state_is_that_of_the_one_behind_or_of_a_bad_end() {
        use MigrationState::{Active, Cancelled, Completed, Failed, PostcopyActive, Setup};
        for (states, wanted) in [
            ([Active, Setup], Setup),
            ([PostcopyActive, Completed], PostcopyActive),
            ([Completed, Completed], Completed),
            ([Completed, Failed], Failed),
            ([Cancelled, Failed], Failed),
            ([Cancelled, Active], Cancelled),
        ] {
            let disks = states.map(|state| MigrationStatus { state, ..MigrationStatus::default() });
            assert_eq!(state(&disks), wanted, "{states:?}");
        }
    }
}
