// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptor chains: the bytes are a guest's memory, with a ring at its beginning.

use blkferry::engine::IoBuf;
use blkferry::frontend::fuzzing::{Action, Chain, GuestMemory, RegionInfo, RingAddresses, RingMemory, View};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Descriptors in the ring.
const RING: u16 = 16;
/// Guest-physical address of the memory; neither it nor the place in the file is at the border of a page.
const GUEST: u64 = 0x1800;
const BEFORE: usize = 0x800;
const SIZE: usize = 0x3400;
const AFTER: usize = 0x400;
const USER: u64 = 0x7000_0000_0000;
const MARK: u8 = 0xc5;
/// Most bytes of a request, and most segments of a discard.
const MAX_DATA: usize = 256 << 20;
const MAX_ZERO_SEGMENTS: usize = 16;

/// A guest whose memory is these bytes, between marks that are mapped too.
struct Guest {
    file: File,
    ring: RingMemory,
    view: View,
}

impl Guest {
    fn new(data: &[u8]) -> io::Result<Self> {
        let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC)?);
        let mut bytes = vec![MARK; BEFORE + SIZE + AFTER];
        let len = data.len().min(SIZE);
        bytes[BEFORE..BEFORE + SIZE].fill(0);
        bytes[BEFORE..BEFORE + len].copy_from_slice(&data[..len]);
        file.write_all_at(&bytes, 0)?;
        let info = RegionInfo { guest: GUEST, size: SIZE as u64, user: USER, offset: BEFORE as u64 };
        let memory = Arc::new(GuestMemory::new([(info, file.try_clone()?)]).map_err(io::Error::other)?);
        let at =
            RingAddresses { descriptors: USER, available: USER + 0x100, used: USER + 0x200, used_log: None };
        let ring = RingMemory::new(&memory, &at, RING).map_err(io::Error::other)?;
        Ok(Self { file, ring, view: View::new(memory) })
    }

    fn content(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; BEFORE + SIZE + AFTER];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// How many bytes a store into the first bytes of a buffer changes; panics if it reaches out of the memory.
    fn changed_by(&self, buf: &IoBuf, bytes: &[u8]) -> io::Result<usize> {
        let before = self.content()?;
        buf.copy_from(bytes);
        let after = self.content()?;
        assert!(after[..BEFORE].iter().all(|byte| *byte == MARK), "a store before guest memory");
        assert!(after[BEFORE + SIZE..].iter().all(|byte| *byte == MARK), "a store behind guest memory");
        Ok(before.iter().zip(&after).filter(|(before, after)| before != after).count())
    }
}

/// Each head of a ring in a guest's memory, which these bytes are.
///
/// # Panics
/// When the parser is wrong, or the system has no memory to share.
pub fn chain(data: &[u8]) {
    if let Err(error) = parse_all(data) {
        unreachable!("memory to share: {error}");
    }
}

fn parse_all(data: &[u8]) -> io::Result<()> {
    let guest = Guest::new(data)?;
    let mut chain = Chain::default();
    for head in 0..RING + 1 {
        let Ok((action, status)) = chain.parse(&guest.ring, &guest.view, head) else { continue };
        assert!(head < RING, "a head that does not exist");
        assert_eq!(status.len(), 1);
        let mut written = Vec::new();
        chain.swap_written(&mut written);
        let room: u64 = written.iter().map(|range| u64::from(range.len)).sum();
        match &action {
            Action::Read(_, buf) | Action::GetId(buf) => {
                assert!(buf.len() <= MAX_DATA && buf.len() as u64 == room - 1, "data and status");
                assert!(guest.changed_by(buf, &[0x5a; 600])? <= buf.len().min(600));
            }
            Action::Write(_, buf) => assert!(buf.len() <= MAX_DATA && room == 1),
            Action::Zero(ranges) => {
                assert!(ranges.len() <= MAX_ZERO_SEGMENTS && ranges.iter().all(|range| range.len > 0));
            }
            Action::Flush | Action::Invalid(_) | Action::Unsupported => {}
        }
        assert!(guest.changed_by(&status, &[0xa5])? <= 1, "a status is one byte");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;
    use rand::{Rng, RngExt, SeedableRng};

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const HEADER: u64 = 0x400;
    const DATA: u64 = 0x1000;
    const STATUS: u64 = 0x500;
    const TABLE: u64 = 0x600;

    struct Bytes(Vec<u8>);

    impl Bytes {
        fn put(&mut self, at: u64, bytes: &[u8]) {
            self.0[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        }

        fn descriptor(&mut self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
            self.put(at, &(GUEST + address).to_le_bytes());
            self.put(at + 8, &len.to_le_bytes());
            self.put(at + 12, &[flags.to_le_bytes(), next.to_le_bytes()].concat());
        }
    }

    /// A memory with one good request of every type, half of them indirect.
    fn seeds() -> Vec<Vec<u8>> {
        let requests =
            [(0u32, 4096u32, WRITE), (1, 4096, 0), (4, 0, 0), (8, 20, WRITE), (11, 32, 0), (13, 16, 0)];
        let make = |(n, (kind, len, flags)): (usize, &(u32, u32, u16))| {
            let mut bytes = Bytes(vec![0; SIZE]);
            bytes.put(HEADER, &[kind.to_le_bytes(), [0; 4], 8u32.to_le_bytes(), [0; 4]].concat());
            bytes.put(DATA + 8, &[64, 0, 0, 0]);
            let table = if n % 2 == 0 { 0 } else { TABLE };
            bytes.descriptor(table, (HEADER, 16, NEXT, 1));
            bytes.descriptor(table + 16, (DATA, *len, flags | NEXT, 2));
            bytes.descriptor(table + 32, (STATUS, 1, WRITE, 0));
            if table != 0 {
                bytes.descriptor(0, (TABLE, 48, INDIRECT, 0));
            }
            bytes.0
        };
        requests.iter().enumerate().map(make).collect()
    }

    #[test]
    fn good_requests_are_understood() {
        for (n, seed) in seeds().iter().enumerate() {
            let guest = Guest::new(seed).unwrap();
            let (action, _) = Chain::default().parse(&guest.ring, &guest.view, 0).unwrap();
            let wrong = matches!(action, Action::Invalid(_) | Action::Unsupported);
            assert!(!wrong, "seed {n}: {action:?}");
        }
    }

    #[test]
    fn the_target_holds_on_a_seeded_corpus() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(0x6368_6169);
        for seed in seeds() {
            chain(&seed);
            for _ in 0..1500 {
                let mut bytes = seed.clone();
                for _ in 0..random.random_range(1..6) {
                    // Descriptors, header and table; now and then anything.
                    let ranges = [0..0x100, 0..0x30, 0x400..0x410, 0x600..0x630, 0..SIZE];
                    let range = ranges[random.random_range(0..5)].clone();
                    let at = random.random_range(range);
                    bytes[at] =
                        if random.random_bool(0.5) { random.random() } else { random.random_range(0..8) };
                }
                chain(&bytes);
            }
        }
        for _ in 0..3000 {
            let mut bytes = vec![0; random.random_range(0..SIZE)];
            random.fill_bytes(&mut bytes);
            chain(&bytes);
        }
    }
}
