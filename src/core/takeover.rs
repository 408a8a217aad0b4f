// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! May an operator make a side the owner of the disk although its record does not say so?
//!
//! The protocol never guesses: a side that cannot reach the other one waits. When the other one is gone for good
//! somebody has to decide, and only a person can know that it is. This is the whole table of what may be decided; the
//! price of each row is told before and kept after (`node::recover`, docs/adr/0013).
//!
//! ```text
//!   record                   the disk is                    taken by force?
//!   none, Idle               not here                       no: there is nothing
//!   Serving, Pushing         this side's                    needless
//!   Receiving                the source's                   no: chunks of different moments, no disk of any
//!   Offered                  this side's until it grants    yes, and nothing is lost: nobody else can own it
//!   Relinquished, Released   the destination's              yes: all that was written there is lost
//!   Prepared                 the source's, or nobody's yet  yes: what is remote is lost, and the source may go on
//!   Active                   this side's, in part remote    yes: what is remote is lost
//!   Complete                 this side's                    yes, and nothing is lost
//! ```
//!
//! A forced owner takes an epoch far ahead, so that whatever the other side counts on its own stays behind it.

use super::chunk::ChunkState;
use super::geometry::BlockMask;
use super::message::Epoch;
use super::record::{DestinationStage, Role, SourceStage};

/// How far the epoch jumps: more reclaims and cancels than any side makes while nobody looks.
const JUMP: u64 = 1 << 20;

/// What a side was when it was made the owner by force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Was {
    /// A source that had offered the disk and not granted it.
    Offered = 0,
    /// A source that had granted it.
    Relinquished = 1,
    /// A source whose destination had everything.
    Released = 2,
    /// A destination that held an offer.
    Prepared = 3,
    /// A destination that owned the disk, a part of which was still at the source.
    Active = 4,
    /// A destination that had everything.
    Complete = 5,
}

impl Was {
    /// The one with this number (as in the discriminants), if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Offered, Self::Relinquished, Self::Released, Self::Prepared, Self::Active, Self::Complete]
            .get(usize::from(number))
            .copied()
    }

    /// Whether it was the giving side.
    #[must_use]
    pub fn is_source(self) -> bool {
        matches!(self, Self::Offered | Self::Relinquished | Self::Released)
    }
}

impl std::fmt::Display for Was {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Offered => "a source that had offered the disk",
            Self::Relinquished => "a source that had handed the disk over",
            Self::Released => "a source that had been released",
            Self::Prepared => "a destination that held an offer",
            Self::Active => "a destination that owned the disk and still pulled",
            Self::Complete => "a destination that had everything",
        })
    }
}

/// The answer to an operator who wants a side to own the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takeover {
    /// It does.
    Owner,
    /// It has no disk.
    Nothing,
    /// What it has was never the content of the disk at any moment.
    Torn,
    /// It can, at a price.
    Possible(Was),
}

/// Looks a record up in the table of the module's header.
#[must_use]
pub fn takeover(role: Option<&Role>) -> Takeover {
    match role {
        None | Some(Role::Idle) => Takeover::Nothing,
        Some(Role::Serving) => Takeover::Owner,
        Some(Role::Source(source)) => match source.stage {
            SourceStage::Pushing => Takeover::Owner,
            SourceStage::Offered => Takeover::Possible(Was::Offered),
            SourceStage::Relinquished { .. } => Takeover::Possible(Was::Relinquished),
            SourceStage::Released { .. } => Takeover::Possible(Was::Released),
        },
        Some(Role::Destination(destination)) => match destination.stage {
            DestinationStage::Receiving => Takeover::Torn,
            DestinationStage::Prepared => Takeover::Possible(Was::Prepared),
            DestinationStage::Active { .. } => Takeover::Possible(Was::Active),
            DestinationStage::Complete => Takeover::Possible(Was::Complete),
        },
    }
}

/// The epoch of a forced owner.
#[must_use]
pub fn forced_epoch(before: Epoch) -> Epoch {
    Epoch(before.0.saturating_add(JUMP))
}

/// What becomes of blocks that only the lost side had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum LostChunks {
    /// They stay remote: a guest that reads them gets an I/O error, a guest that writes them heals them.
    #[default]
    Error = 0,
    /// They become zeros.
    Zero = 1,
    /// They become the base image's.
    Base = 2,
}

impl LostChunks {
    /// The one with this number (as in the discriminants), if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Error, Self::Zero, Self::Base].get(usize::from(number)).copied()
    }

    /// The state and mask of a remote chunk of which the blocks in `mask` are here; `None`: it stays as it is. For
    /// `Zero`, the blocks outside the mask must be holes in the layer first.
    #[must_use]
    pub fn settle(self, mask: BlockMask) -> Option<(ChunkState, BlockMask)> {
        match self {
            Self::Error => None,
            Self::Zero if mask.is_empty() => Some((ChunkState::Zero, BlockMask::EMPTY)),
            Self::Zero => Some((ChunkState::Modified, BlockMask::EMPTY)),
            Self::Base => Some((ChunkState::Base, mask)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::core::message::{BaseIdentity, Incarnation, MigrationId, RemainingDigest};
    use crate::core::record::{DestinationRecord, SourceRecord};

    fn source(stage: SourceStage) -> Role {
        Role::Source(SourceRecord {
            migration: MigrationId::default(),
            destination: String::new(),
            stage,
            threshold: 3,
            strategy: 0,
            write_cache: true,
            digest: RemainingDigest::default(),
        })
    }

    fn destination(stage: DestinationStage) -> Role {
        Role::Destination(DestinationRecord {
            migration: MigrationId::default(),
            incarnation: Incarnation::default(),
            base: BaseIdentity::default(),
            stage,
            write_cache: true,
            digest: RemainingDigest::default(),
        })
    }

    #[test]
    fn the_whole_table() {
        let possible = Takeover::Possible;
        for (role, answer) in [
            (Role::Idle, Takeover::Nothing),
            (Role::Serving, Takeover::Owner),
            (source(SourceStage::Pushing), Takeover::Owner),
            (source(SourceStage::Offered), possible(Was::Offered)),
            (source(SourceStage::Relinquished { synced: false }), possible(Was::Relinquished)),
            (source(SourceStage::Relinquished { synced: true }), possible(Was::Relinquished)),
            (source(SourceStage::Released { synced: true }), possible(Was::Released)),
            (destination(DestinationStage::Receiving), Takeover::Torn),
            (destination(DestinationStage::Prepared), possible(Was::Prepared)),
            (destination(DestinationStage::Active { source_synced: false }), possible(Was::Active)),
            (destination(DestinationStage::Active { source_synced: true }), possible(Was::Active)),
            (destination(DestinationStage::Complete), possible(Was::Complete)),
        ] {
            assert_eq!(takeover(Some(&role)), answer, "{role:?}");
        }
        assert_eq!(takeover(None), Takeover::Nothing);
    }

    #[test]
    fn t21_a_forced_owner_is_ahead_of_all_that_the_other_side_counts_alone() {
        let before = Epoch(7);
        let other = (0..100_000).fold(before, |epoch, _| epoch.next());
        assert!(forced_epoch(before) > other);
        assert_eq!(forced_epoch(Epoch(u64::MAX)), Epoch(u64::MAX));
    }

    #[test]
    fn numbers_come_back() {
        for number in 0..=9 {
            assert!(Was::from_number(number).is_none_or(|was| was as u8 == number));
            assert!(LostChunks::from_number(number).is_none_or(|lost| lost as u8 == number));
        }
        assert!(Was::from_number(5).is_some() && Was::from_number(6).is_none());
        assert!(LostChunks::from_number(2).is_some() && LostChunks::from_number(3).is_none());
    }

    #[test]
    fn t27_what_is_lost_stays_remote_unless_the_operator_says_what_it_shall_be() {
        let (none, some) = (BlockMask::EMPTY, BlockMask(6));
        assert_eq!((LostChunks::Error.settle(none), LostChunks::Error.settle(some)), (None, None));
        assert_eq!(LostChunks::Zero.settle(none), Some((ChunkState::Zero, none)));
        assert_eq!(LostChunks::Zero.settle(some), Some((ChunkState::Modified, none)));
        assert_eq!(LostChunks::Base.settle(none), Some((ChunkState::Base, none)));
        assert_eq!(LostChunks::Base.settle(some), Some((ChunkState::Base, some)));
    }
}
