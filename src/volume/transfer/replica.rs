// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk that comes back to where it went away: what its last source kept is an old state of it, of which every chunk
//! that was not written since is current. Both sides know which: here they are `Received`, there they stand in the list
//! that the owner sends.

use super::{Transfer, TransferError};
use crate::core::chunk::ChunkState;
use crate::core::geometry::{BlockMask, ChunkId};
use crate::core::message::Version;
use crate::store::Transition;
use std::collections::HashMap;

impl Transfer {
    /// Chunks that came in the last migration and have not been written since, with their versions. Arm the tracker
    /// first.
    #[must_use]
    pub fn unchanged_chunks(&self) -> Vec<(ChunkId, Version)> {
        let looks = self.volume.geometry().chunks().map(|chunk| (chunk, self.volume.table().look(chunk)));
        let unchanged = looks.filter(|(_, look)| look.lasting == ChunkState::Received);
        unchanged.map(|(chunk, look)| (chunk, look.version)).collect()
    }

    /// What is here is the disk as it once was, and the chunks of `current` are as they are now, under these versions:
    /// they become `Received`. Everything else is dropped. Returns what was kept: a chunk that is not whole here is not.
    ///
    /// Durable when it returns: a map that a crash takes back to what it was would have versions of another run. Until
    /// then a restart must wipe the volume. The gate must be closed, and no other call may be under way.
    ///
    /// # Errors
    /// `InUse` while the gate is open; `Table`; `Store` when the layer cannot be punched or synced, and for an adopted
    /// image.
    pub async fn prune(
        &self,
        current: &[(ChunkId, Version)],
    ) -> Result<Vec<(ChunkId, Version)>, TransferError> {
        if self.volume.gate().is_open() {
            return Err(TransferError::InUse);
        }
        self.volume.map().keep_versions(true);
        let wanted: HashMap<ChunkId, Version> = current.iter().copied().collect();
        let table = self.volume.table();
        self.change(ChunkId(0), self.volume.geometry().chunk_count(), |now| {
            // With holes around them, and no base image under them, some blocks are as good as all.
            let part = now.state == ChunkState::Base && !now.mask.is_empty() && !table.has_base(now.chunk);
            let whole = part || matches!(now.state, ChunkState::Modified | ChunkState::Received);
            let kept = wanted.get(&now.chunk).copied().filter(|_| whole);
            let state = if kept.is_some() { ChunkState::Received } else { ChunkState::Base };
            let (mask, version) = (BlockMask::EMPTY, kept.unwrap_or_default());
            let next = Transition { chunk: now.chunk, state, mask, version };
            (next != now).then_some(next)
        })
        .await?;
        let dropped = self.select(|state, _| state != ChunkState::Received);
        self.blocking(move |store| store.drop_chunks(&dropped).map_err(std::io::Error::other)).await?;
        self.sync().await?;
        let kept = |chunk: &ChunkId| table.look(*chunk).state == ChunkState::Received;
        Ok(current.iter().copied().filter(|(chunk, _)| kept(chunk)).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;
    use crate::core::message::Body;
    use crate::volume::testing::{CHUNK, Daemon, Disk};
    use crate::volume::{Closed, InstallPhase};

    const SIZE: u64 = 8 * CHUNK as u64 + 1536;
    const BLOCK: usize = 1024;

    fn install(daemon: &Daemon, chunk: u32, version: u64, body: &Body) {
        let install =
            daemon.transfer.install(ChunkId(chunk), Version(version), body, InstallPhase::Receiving);
        daemon.runtime.block_on(install).unwrap();
    }

    fn whole(byte: u8) -> Body {
        Body::Blocks { mask: BlockMask(u64::MAX), bytes: vec![byte; CHUNK as usize] }
    }

    fn at(chunk: u32) -> u64 {
        u64::from(chunk) * u64::from(CHUNK)
    }

    fn unchanged(daemon: &Daemon) -> Vec<u32> {
        daemon.transfer.unchanged_chunks().iter().map(|(chunk, _)| chunk.0).collect()
    }

    #[test]
    fn what_came_is_unchanged_until_it_is_written_and_no_longer_after_a_host_crash() {
        let mut disk = Disk::new(SIZE, None);
        let mut daemon = disk.open();
        (0..4).for_each(|chunk| install(&daemon, chunk, 5, &whole(7)));
        install(&daemon, 4, 5, &Body::Zero);
        let part = Body::Blocks { mask: BlockMask(0b110), bytes: vec![8; 2 * BLOCK] };
        install(&daemon, 5, 5, &part);
        assert_eq!(unchanged(&daemon), [0, 1, 2, 3, 5], "zeros travel for nothing");
        daemon.write_now(at(1) + 512, &[1; 512]);
        daemon.zero(at(2) + 512, 512, false);
        daemon.zero(at(3), u64::from(CHUNK), true);
        daemon.settle();
        assert_eq!(unchanged(&daemon), [0, 5]);
        drop(daemon);
        let mut daemon = disk.open();
        assert_eq!(unchanged(&daemon), [0, 5], "a killed daemon has noted each write before");
        assert_eq!(daemon.read_now(at(5), 4 * BLOCK)[BLOCK - 1..=BLOCK], [0, 8]);
        daemon.runtime.block_on(daemon.transfer.sync()).unwrap();
        drop(daemon);
        disk.crash();
        let mut daemon = disk.open();
        assert_eq!(unchanged(&daemon), [0; 0], "an unflushed write may be in any of them");
        assert_eq!(daemon.read_now(at(0), BLOCK), [7; BLOCK]);
    }

    #[test]
    fn pruning_keeps_what_is_current_and_whole_and_nothing_else() {
        let base = vec![0xba; 2 * CHUNK as usize];
        for base in [None, Some(base)] {
            let based = base.is_some();
            let disk = Disk::new(SIZE, base);
            let mut daemon = disk.open();
            for chunk in [0, 2, 3, 5] {
                daemon.write_now(at(chunk), &vec![chunk as u8 + 1; CHUNK as usize]);
            }
            daemon.write_now(at(1), &[9; BLOCK]);
            daemon.write_now(at(4), &[9; BLOCK]);
            daemon.zero(at(5), u64::from(CHUNK), true);
            daemon.settle();
            let current = [0, 1, 4, 5, 6].map(|chunk| (ChunkId(chunk), Version(40 + u64::from(chunk))));
            let refused = daemon.runtime.block_on(daemon.transfer.prune(&current));
            assert!(matches!(refused, Err(TransferError::InUse)));
            daemon.volume.gate().close(Closed::Idle);
            let kept = daemon.runtime.block_on(daemon.transfer.prune(&current)).unwrap();
            let kept: Vec<u32> = kept.iter().map(|(chunk, _)| chunk.0).collect();
            // Zeros, and what nobody has written, are not listed by an owner; if they are, they come again.
            assert_eq!(kept, if based { vec![0, 4] } else { vec![0, 1, 4] });
            assert_eq!(daemon.transfer.received_versions()[0], (ChunkId(0), Version(40)));
            assert_eq!(unchanged(&daemon), kept);
            daemon.volume.gate().open();
            assert_eq!(daemon.read_now(at(0), BLOCK), [1; BLOCK]);
            assert_eq!(daemon.read_now(at(4), 2 * BLOCK), [[9; BLOCK], [0; BLOCK]].concat());
            let dropped = if based { [0xba; BLOCK] } else { [9; BLOCK] };
            assert_eq!(daemon.read_now(at(1), BLOCK), dropped);
            for gone in [2, 3, 5] {
                daemon.write_now(at(gone) + BLOCK as u64, &[6; 512]);
                assert_eq!(daemon.read_now(at(gone), BLOCK), [0; BLOCK], "old content comes back");
            }
        }
    }

    #[test]
    fn zeros_inside_a_chunk_do_not_travel_where_there_is_no_base_image() {
        for (base, blocks) in [(None, 2), (Some(vec![0xba; 3 * CHUNK as usize]), 64)] {
            let disk = Disk::new(SIZE, base);
            let mut daemon = disk.open();
            let mut content = vec![0; CHUNK as usize];
            content[BLOCK..3 * BLOCK].fill(5);
            daemon.write_now(at(2), &content);
            let captured = daemon.runtime.block_on(daemon.transfer.capture(ChunkId(2))).unwrap();
            let Body::Blocks { mask, bytes } = &captured.body else { unreachable!("not zeros") };
            assert_eq!((mask.count() as usize, bytes.len()), (blocks, blocks * BLOCK));
            daemon.volume.gate().close(Closed::Idle);
            daemon.runtime.block_on(daemon.transfer.mark_remote(ChunkId(2), 1)).unwrap();
            install(&daemon, 2, captured.version.0, &captured.body);
            daemon.volume.gate().open();
            assert_eq!(daemon.read_now(at(2), CHUNK as usize), content);
        }
    }
}
