// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a chunk can be, the only table of its legal moves, and where an access to it must go.
//!
//! ```text
//!            fill (fetch)                  discard, write zeroes (whole chunk)
//!   Base ---> Installing ---> Local ------------------------------> Zero
//!    |  \                       | write                              | write
//!    |   \ writes fill the mask v                                    v
//!    |    +----------------> Modified <------------------------------+
//!    | announced by source      ^   | announced again (newer version at the source)
//!    v                          |   v
//!   Remote ---> Installing -----+  Remote
//!                    |          | write
//!                    +----> Received (all of it came from the source)
//! ```
//!
//! `Base` and `Remote` carry a [`BlockMask`]: the blocks in it are valid in the local layer (the guest wrote them),
//! the others are still where the state says. So a partial write neither waits for the rest of its chunk nor drops
//! it. `Zero` reads as zeros *and* its range of the layer is a hole, so that a write can turn it into `Modified`
//! at once. `Received` is `Modified` that nobody has written since the source gave it: should the disk go back there, the
//! chunk need not travel. In `Installing` one actor holds the chunk alone: it fills the blocks outside the mask, or punches the
//! chunk. Testing a set of remaining chunks instead of this state, as the published pseudo-code does, lets a read
//! during the pull fall through to the base image.
//!
//! What is published here must always be true of the file's page cache: a mask bit is set when the write that makes
//! the block valid has completed, `Modified` is entered before the first write that makes it true that the
//! content differs from the base. That order is what makes the chunk map recoverable after a crash.

use super::geometry::{BlockMask, Geometry, Span};
use thiserror::Error;

/// The state of one chunk of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ChunkState {
    /// Blocks outside the mask have the base image's content, which has not been copied (zeros without a base).
    Base = 0,
    /// Discarded or zeroed as a whole: reads as zeros, differs from the base, a hole in the layer.
    Zero = 1,
    /// A copy of the base image's chunk, whole in the layer; never travels.
    Local = 2,
    /// Whole in the layer and differs from the base: part of the paper's ModifiedSet.
    Modified = 3,
    /// Blocks outside the mask are at the migration source: part of the paper's RemainingSet.
    Remote = 4,
    /// Held by one actor that fills or punches it.
    Installing = 5,
    /// Whole in the layer, as the source of the last migration gave it: part of the paper's ModifiedSet.
    Received = 6,
}

/// All states, in the order of their numbers on disk.
pub const ALL_STATES: [ChunkState; 7] = [
    ChunkState::Base,
    ChunkState::Zero,
    ChunkState::Local,
    ChunkState::Modified,
    ChunkState::Remote,
    ChunkState::Installing,
    ChunkState::Received,
];

impl ChunkState {
    /// The state with this number (as in [`ChunkState`]'s discriminants), if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        ALL_STATES.get(usize::from(number)).copied()
    }
}

/// A move that the table of legal moves does not have.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[error("a chunk cannot go from {from:?} to {to:?}")]
pub struct IllegalMove {
    /// The state it is in.
    pub from: ChunkState,
    /// The state it was asked to enter.
    pub to: ChunkState,
}

/// The only table of legal moves.
///
/// # Errors
/// [`IllegalMove`] for every pair that is not in it. A state may always be entered again (a mask grew, a newer
/// version was installed).
pub fn check_move(from: ChunkState, to: ChunkState) -> Result<(), IllegalMove> {
    use ChunkState::{Base, Installing, Local, Modified, Received, Remote, Zero};
    let legal = from == to
        || match from {
            // Whole by guest writes; held; announced by a source.
            Base => matches!(to, Modified | Installing | Remote),
            Zero => matches!(to, Modified | Installing | Remote),
            Local | Received => matches!(to, Modified | Installing | Remote),
            Modified => matches!(to, Installing | Remote),
            // Whole by guest writes; held. `Base` when a migration is cancelled and all that came is dropped.
            Remote => matches!(to, Modified | Installing),
            // Filled, punched, or given back as it was when the fill failed.
            Installing => matches!(to, Base | Zero | Local | Modified | Remote | Received),
        };
    if legal { Ok(()) } else { Err(IllegalMove { from, to }) }
}

/// What the guest wants to do to a part of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Write data to it.
    Write,
    /// Make it zeros (discard or write-zeroes).
    Zero,
}

/// A chunk as one look at the table shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkView {
    /// Its state.
    pub state: ChunkState,
    /// Blocks valid in the layer; matters in `Base` and `Remote` (and what `Installing` will keep).
    pub mask: BlockMask,
}

/// Where an access goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Read the layer.
    Layer,
    /// Read the base image: nothing of the range has been written here. Where it cannot be read in place, fill.
    Base,
    /// The answer is zeros; no I/O.
    Zeros,
    /// Nothing to do: the chunk already is what the access asks for.
    Done,
    /// Write the layer (or zero the range in it). First enter `before` when it is given, and make that survive a
    /// crash of the process; when the write has completed, add `claim` to the mask.
    Modify {
        /// The state to enter before the write is submitted.
        before: Option<ChunkState>,
        /// Blocks that the completed write makes valid; empty when the chunk already is whole.
        claim: BlockMask,
    },
    /// Hold the chunk alone, punch it, and enter `Zero`.
    Punch,
    /// The blocks outside the mask are needed first: fetch them from the base or pull them from the source.
    Fill,
    /// Another actor holds the chunk: try again when it lets go.
    Wait,
}

/// Decides where an access to a part of a chunk goes (virtio request semantics over the states above).
#[must_use]
pub fn route(geometry: &Geometry, view: ChunkView, access: Access, span: Span) -> Route {
    // The common ones first, which need no look at the blocks.
    if access == Access::Read
        && matches!(view.state, ChunkState::Local | ChunkState::Modified | ChunkState::Received)
    {
        return Route::Layer;
    }
    if access == Access::Write && view.state == ChunkState::Modified {
        return Route::Modify { before: None, claim: BlockMask::EMPTY };
    }
    let outer = geometry.outer(span);
    let whole = geometry.inner(span) == geometry.full_mask(span.chunk);
    match (access, view.state) {
        (Access::Read, ChunkState::Local | ChunkState::Modified | ChunkState::Received) => Route::Layer,
        (Access::Read, ChunkState::Zero) => Route::Zeros,
        (Access::Read, ChunkState::Base | ChunkState::Remote) if view.mask.contains(outer) => Route::Layer,
        (Access::Read, ChunkState::Base) if !view.mask.intersects(outer) => Route::Base,
        (Access::Read, ChunkState::Base | ChunkState::Remote) => Route::Fill,
        (Access::Read, ChunkState::Installing) => {
            // Blocks that are valid stay valid while the rest is filled, but a punch drops them all: the
            // table knows which it is, and passes an empty mask for a punch.
            if view.mask.contains(outer) { Route::Layer } else { Route::Wait }
        }
        (Access::Write | Access::Zero, ChunkState::Installing) => Route::Wait,
        (Access::Zero, ChunkState::Zero) => Route::Done,
        (
            Access::Zero,
            ChunkState::Base
            | ChunkState::Local
            | ChunkState::Modified
            | ChunkState::Remote
            | ChunkState::Received,
        ) if whole => Route::Punch,
        (Access::Write, ChunkState::Zero)
        | (Access::Write | Access::Zero, ChunkState::Local | ChunkState::Received) => {
            Route::Modify { before: Some(ChunkState::Modified), claim: BlockMask::EMPTY }
        }
        (Access::Write | Access::Zero, ChunkState::Modified) => {
            Route::Modify { before: None, claim: BlockMask::EMPTY }
        }
        (Access::Write | Access::Zero, ChunkState::Base | ChunkState::Remote) => {
            // Blocks at the edges that the span covers only in part must be valid already.
            let edges = outer.minus(geometry.inner(span));
            if view.mask.contains(edges) { Route::Modify { before: None, claim: outer } } else { Route::Fill }
        }
    }
}

/// As [`route`], for a chunk that has nothing of a base image under it: its blocks outside the mask are holes in the
/// layer. They read as zeros, an edge of a block needs no fill before it is written, and zeroing an untouched chunk
/// changes nothing. So a disk without a base image never waits.
#[must_use]
pub fn route_without_base(geometry: &Geometry, view: ChunkView, access: Access, span: Span) -> Route {
    let outer = geometry.outer(span);
    match (access, view.state) {
        (Access::Read, ChunkState::Base) if view.mask.intersects(outer) => Route::Layer,
        (Access::Read, ChunkState::Base) => Route::Zeros,
        (Access::Write, ChunkState::Base) => Route::Modify { before: None, claim: outer },
        (Access::Zero, ChunkState::Base) if !view.mask.intersects(outer) => Route::Done,
        (Access::Zero, ChunkState::Base) if geometry.inner(span) != geometry.full_mask(span.chunk) => {
            Route::Modify { before: None, claim: outer }
        }
        (
            Access::Read | Access::Write | Access::Zero,
            ChunkState::Base
            | ChunkState::Zero
            | ChunkState::Local
            | ChunkState::Modified
            | ChunkState::Remote
            | ChunkState::Installing
            | ChunkState::Received,
        ) => route(geometry, view, access, span),
    }
}

/// The state of a chunk in `Base` or `Remote` whose mask has grown to `mask`.
#[must_use]
pub fn after_claim(state: ChunkState, mask: BlockMask, full: BlockMask) -> ChunkState {
    match state {
        ChunkState::Base | ChunkState::Remote if mask.contains(full) => ChunkState::Modified,
        ChunkState::Base
        | ChunkState::Zero
        | ChunkState::Local
        | ChunkState::Modified
        | ChunkState::Remote
        | ChunkState::Installing
        | ChunkState::Received => state,
    }
}

/// The state of a chunk whose base content has just been filled in around `mask`.
#[must_use]
pub fn after_fetch(mask: BlockMask) -> ChunkState {
    if mask.is_empty() { ChunkState::Local } else { ChunkState::Modified }
}

/// State and mask of a chunk into which the blocks `arrived` of the source's content were installed around the
/// blocks `kept` that the guest wrote here: blocks that neither has are the base image's.
#[must_use]
pub fn after_install(arrived: BlockMask, kept: BlockMask, full: BlockMask) -> (ChunkState, BlockMask) {
    let mask = arrived.union(kept);
    if !mask.contains(full) {
        return (ChunkState::Base, mask);
    }
    let state = if kept.is_empty() { ChunkState::Received } else { ChunkState::Modified };
    (state, BlockMask::EMPTY)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::core::geometry::ChunkId;

    fn geometry() -> Geometry {
        Geometry::new(1 << 20, 64 << 10).unwrap()
    }

    fn span(start: u32, len: u32) -> Span {
        Span { chunk: ChunkId(0), start, len }
    }

    #[test]
    fn t01_a_read_during_an_install_waits_and_never_falls_through() {
        for mask in [BlockMask::EMPTY, BlockMask(1)] {
            let view = ChunkView { state: ChunkState::Installing, mask };
            assert_eq!(route(&geometry(), view, Access::Read, span(1024, 1024)), Route::Wait);
        }
    }

    #[test]
    fn t03_what_is_received_differs_from_the_base_and_travels_on() {
        let full = BlockMask(0xff);
        assert_eq!(after_install(full, BlockMask::EMPTY, full), (ChunkState::Received, BlockMask::EMPTY));
        assert_eq!(after_install(full, BlockMask(1), full), (ChunkState::Modified, BlockMask::EMPTY));
        let (arrived, kept) = (BlockMask(0x0f), BlockMask(0x30));
        assert_eq!(after_install(arrived, kept, full), (ChunkState::Base, BlockMask(0x3f)));
    }

    #[test]
    fn t08_a_partial_write_to_a_remote_chunk_keeps_the_rest_remote() {
        let view = ChunkView { state: ChunkState::Remote, mask: BlockMask::EMPTY };
        let whole_block = route(&geometry(), view, Access::Write, span(1024, 1024));
        assert_eq!(whole_block, Route::Modify { before: None, claim: BlockMask(2) });
        assert_eq!(route(&geometry(), view, Access::Write, span(1024, 512)), Route::Fill);
        assert_eq!(after_claim(ChunkState::Remote, BlockMask(2), BlockMask(u64::MAX)), ChunkState::Remote);
    }

    #[test]
    fn t13_zero_is_a_state_and_base_data_does_not_come_back() {
        let view = ChunkView { state: ChunkState::Zero, mask: BlockMask::EMPTY };
        assert_eq!(route(&geometry(), view, Access::Read, span(0, 512)), Route::Zeros);
        let remote = ChunkView { state: ChunkState::Remote, mask: BlockMask(7) };
        assert_eq!(route(&geometry(), remote, Access::Zero, span(0, 64 << 10)), Route::Punch);
        assert!(check_move(ChunkState::Zero, ChunkState::Base).is_err());
        assert!(check_move(ChunkState::Zero, ChunkState::Local).is_err());
    }

    #[test]
    fn a_write_ends_what_was_received_before_it_begins() {
        let view = ChunkView { state: ChunkState::Received, mask: BlockMask::EMPTY };
        assert_eq!(route(&geometry(), view, Access::Read, span(0, 512)), Route::Layer);
        let modify = Route::Modify { before: Some(ChunkState::Modified), claim: BlockMask::EMPTY };
        for access in [Access::Write, Access::Zero] {
            assert_eq!(route(&geometry(), view, access, span(512, 512)), modify);
        }
        assert_eq!(route(&geometry(), view, Access::Zero, span(0, 64 << 10)), Route::Punch);
        assert!(check_move(ChunkState::Modified, ChunkState::Received).is_err());
    }

    #[test]
    fn modified_never_becomes_base_or_local_but_by_an_install() {
        for to in [ChunkState::Base, ChunkState::Local, ChunkState::Zero] {
            assert!(check_move(ChunkState::Modified, to).is_err());
        }
    }

    #[test]
    fn without_a_base_nothing_is_filled() {
        let empty = ChunkView { state: ChunkState::Base, mask: BlockMask::EMPTY };
        let part = ChunkView { state: ChunkState::Base, mask: BlockMask(2) };
        let at = |view, access, span| route_without_base(&geometry(), view, access, span);
        assert_eq!(at(empty, Access::Read, span(0, 2048)), Route::Zeros);
        assert_eq!(at(part, Access::Read, span(0, 2048)), Route::Layer);
        assert_eq!(at(part, Access::Read, span(2048, 512)), Route::Zeros);
        let claim = |mask| Route::Modify { before: None, claim: BlockMask(mask) };
        assert_eq!(at(empty, Access::Write, span(512, 1024)), claim(0b11));
        assert_eq!(at(empty, Access::Zero, span(0, 64 << 10)), Route::Done);
        assert_eq!(at(part, Access::Zero, span(2048, 512)), Route::Done);
        assert_eq!(at(part, Access::Zero, span(1024, 512)), claim(0b10));
        assert_eq!(at(part, Access::Zero, span(0, 64 << 10)), Route::Punch);
        let remote = ChunkView { state: ChunkState::Remote, mask: BlockMask::EMPTY };
        assert_eq!(at(remote, Access::Read, span(0, 512)), Route::Fill);
    }

    #[test]
    fn a_read_of_valid_blocks_does_not_wait_for_the_rest() {
        let view = ChunkView { state: ChunkState::Remote, mask: BlockMask(2) };
        assert_eq!(route(&geometry(), view, Access::Read, span(1024, 512)), Route::Layer);
        assert_eq!(route(&geometry(), view, Access::Read, span(512, 1024)), Route::Fill);
    }
}
