// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must hold, whatever is lost, late or dead.

use crate::volume::{at, bits};
use crate::world::{NodeRole, World};
use blkferry::core::chunk::ChunkState;
use blkferry::core::geometry::ChunkId;
use blkferry::core::ownership::SourceStep;
use blkferry::core::record::SourceStage;
use std::collections::BTreeSet;

impl World {
    /// The source has recorded that it has synced: whatever it has is synced.
    pub(crate) fn check_synced(&self, side: usize) {
        let volume = &self.sides[side].volume;
        for chunk in self.geometry.chunks() {
            for block in bits(self.geometry.full_mask(chunk)) {
                let (now, synced) = (volume.value(chunk, block), volume.synced_value(chunk, block));
                assert_eq!(now, synced, "{chunk} block {block} counts as synced but is not");
            }
        }
    }

    /// The destination makes an offer durable: everything that is not in the remaining set is equal at both sides.
    pub(crate) fn check_offer(&self, side: usize, list: &[(ChunkId, u8, bool)]) {
        let NodeRole::Destination(taker) = &self.sides[side].role else { return };
        let epoch = taker.epoch();
        // A dead or reclaiming source has not granted, and will not grant, this offer as it stands.
        let valid = match &self.sides[1 - side].role {
            NodeRole::Source(giver) => {
                giver.epoch() == epoch && matches!(giver.step(), SourceStep::Offered | SourceStep::Granting)
            }
            NodeRole::Serving | NodeRole::Idle | NodeRole::Destination(_) => false,
        };
        if !valid {
            return;
        }
        let remaining: BTreeSet<ChunkId> =
            list.iter().filter(|(_, _, remains)| *remains).map(|(chunk, ..)| *chunk).collect();
        let modified: BTreeSet<ChunkId> = list.iter().map(|(chunk, ..)| *chunk).collect();
        let truth: BTreeSet<ChunkId> = self.sides[1 - side].volume.modified().into_iter().collect();
        assert!(truth.is_subset(&modified), "the offer misses chunks: {truth:?} {modified:?}");
        for chunk in self.geometry.chunks() {
            if remaining.contains(&chunk) {
                let state = self.sides[side].volume.chunk(chunk).lasting();
                assert_eq!(state, ChunkState::Remote, "{chunk} remains but is not remote");
            } else {
                self.check_equal(side, chunk);
            }
        }
    }

    fn check_equal(&self, side: usize, chunk: ChunkId) {
        for block in bits(self.geometry.full_mask(chunk)) {
            let here = self.sides[side].volume.value(chunk, block);
            let there = self.sides[1 - side].volume.value(chunk, block);
            assert_eq!(
                here,
                there,
                "{chunk} block {block} counts as settled but differs: {}",
                self.describe()
            );
        }
    }

    /// The destination's gate is about to open: what is here is what the source had.
    pub(crate) fn check_handoff(&self, side: usize) {
        let (s, peer) = (&self.sides[side], &self.sides[1 - side]);
        assert!(peer.granted == s.epoch.0, "not granted: {}", self.describe());
        assert_eq!(s.write_cache, peer.write_cache, "the write-cache mode was not carried");
        // After a crash of its host the source may have less than the destination.
        if peer.boot != peer.record_boot {
            return;
        }
        for chunk in self.geometry.chunks() {
            // A chunk being installed is still what it was.
            if s.volume.chunk(chunk).lasting() != ChunkState::Remote {
                self.check_equal(side, chunk);
            }
        }
    }

    /// A guest flush is acknowledged: no block may rely on data that the source has not synced.
    pub(crate) fn check_flush(&self, side: usize) {
        let (s, peer) = (&self.sides[side], &self.sides[1 - side]);
        for chunk in s.volume.with_lasting(ChunkState::Remote) {
            for block in bits(self.geometry.full_mask(chunk)) {
                if s.volume.value(chunk, block).is_none() {
                    let (now, synced) =
                        (peer.volume.value(chunk, block), peer.volume.synced_value(chunk, block));
                    assert_eq!(
                        now, synced,
                        "a flush relies on {chunk} block {block}, not synced at the source"
                    );
                }
            }
        }
    }

    /// At the end: the guest's disk is whole at its side.
    pub(crate) fn check_end(&mut self) {
        let side = self.guest.at;
        let lost = self.sides[1 - side].data_lost;
        self.stats.lost += u64::from(lost);
        for chunk in self.geometry.chunks() {
            for block in bits(self.geometry.full_mask(chunk)) {
                let Some(value) = self.sides[side].volume.value(chunk, block) else {
                    assert!(lost, "{chunk} block {block} is not here at the end: {}", self.describe());
                    continue;
                };
                let number = at(chunk, block);
                let good = self.model.read(number, value);
                let expected = self.model.expected(number);
                assert!(good, "{chunk} block {block} at the end: {value:#x}, expected {expected}");
            }
        }
        if let NodeRole::Source(session) = &self.sides[1 - side].role {
            assert!(lost || matches!(session.stage(), SourceStage::Released { .. }));
        }
    }
}
