// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Chains of every shape: well-formed ones cut at random places mean what they say, garbage stays inside memory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

use super::*;
use crate::frontend::memory::tests::memory_file;
use crate::frontend::memory::{GuestMemory, RegionInfo};
use crate::frontend::ring_mem::RingAddresses;
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const SIZE: u16 = 16;
/// Two adjacent regions that lie in the file the other way round, then a hole, then a third.
const REGIONS: [(u64, u64, u64); 3] =
    [(0x1000, 0x2000, 0x3000), (0x3000, 0x3000, 0), (0x8000, 0x1000, 0x5000)];
const USER: u64 = 0x7000_0000_0000;
const TABLE: u64 = 0x8000;

/// Address, length, flags, next.
type Words = (u64, u32, u16, u16);

struct Guest {
    file: File,
    ring: RingMemory,
    view: View,
}

impl Guest {
    fn new() -> Self {
        let file = memory_file(0x6000);
        let regions = REGIONS.map(|(guest, size, offset)| {
            (RegionInfo { guest, size, user: USER + guest, offset }, file.try_clone().unwrap())
        });
        let memory = Arc::new(GuestMemory::new(regions).unwrap());
        let at = |guest| USER + guest;
        let addresses = RingAddresses {
            descriptors: at(TABLE),
            available: at(TABLE + 0x200),
            used: at(TABLE + 0x300),
            used_log: None,
        };
        let ring = RingMemory::new(&memory, &addresses, SIZE).unwrap();
        Self { file, ring, view: View::new(memory) }
    }

    fn file_offset(guest: u64) -> Option<u64> {
        let (start, _, offset) =
            REGIONS.into_iter().find(|(start, size, _)| (*start..start + size).contains(&guest))?;
        Some(guest - start + offset)
    }

    fn write(&self, guest: u64, bytes: &[u8]) {
        for (at, byte) in (guest..).zip(bytes) {
            self.file.write_all_at(&[*byte], Self::file_offset(at).unwrap()).unwrap();
        }
    }

    fn content(&self) -> Vec<u8> {
        let mut all = vec![0; 0x6000];
        self.file.read_exact_at(&mut all, 0).unwrap();
        all
    }

    fn descriptor(&self, table: u64, index: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    fn parse(&self, head: u16) -> (Result<(Action, IoBuf), ChainError>, Chain) {
        let mut chain = Chain::default();
        (chain.parse(&self.ring, &self.view, head), chain)
    }

    /// Lays out the pieces as one chain from descriptor 0 on; `indirect` puts them into a table at 0x5000.
    fn chain(&self, pieces: &[(u64, u32, bool)], indirect: bool) {
        let table = if indirect { 0x5000 } else { TABLE };
        for (index, (address, len, write)) in (0u16..).zip(pieces) {
            let last = usize::from(index) + 1 == pieces.len();
            let flags = if *write { DESC_WRITE } else { 0 } | if last { 0 } else { DESC_NEXT };
            self.descriptor(table, index, (*address, *len, flags, index + 1));
        }
        if indirect {
            self.descriptor(TABLE, 0, (table, 16 * pieces.len() as u32, DESC_INDIRECT, 0));
        }
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Cuts `len` bytes at `address` into pieces.
fn cut(address: u64, len: u32, cuts: &[u32], write: bool) -> Vec<(u64, u32, bool)> {
    let mut marks: Vec<u32> = cuts.iter().map(|cut| cut % (len + 1)).chain([0, len]).collect();
    marks.sort_unstable();
    marks.windows(2).map(|w| (address + u64::from(w[0]), w[1] - w[0], write)).collect()
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => 0x0f00u64..0x9100,
        1 => any::<u64>(),
        1 => Just(u64::MAX - 7),
    ];
    let len = prop_oneof![6 => 0u32..0x900, 1 => any::<u32>(), 2 => (0u32..20).prop_map(|n| n * 16)];
    (address, len, 0u16..9, 0u16..SIZE + 2)
}

proptest! {
    #[test]
    fn a_request_means_the_same_however_it_is_cut(
        write: bool,
        indirect: bool,
        sector: u64,
        sectors in 1u32..8,
        cuts in prop::collection::vec(any::<u32>(), 6),
    ) {
        let guest = Guest::new();
        let sector = sector >> 10;
        guest.write(0x1100, &header(u32::from(write), sector));
        let len = sectors * 512;
        // The data lies across the border of two regions.
        let mut pieces = cut(0x1100, 16, &cuts[..2], false);
        let mut data = cut(0x2f00, len, &cuts[2..4], !write);
        pieces.append(&mut data);
        pieces.extend(cut(0x8800, 1, &cuts[4..], true));
        guest.chain(&pieces, indirect);
        let (parsed, chain) = guest.parse(0);
        let (action, status) = parsed.unwrap();
        let offset = sector * 512;
        match action {
            Action::Read(at, buf) if !write => prop_assert_eq!((at, buf.len()), (offset, len as usize)),
            Action::Write(at, buf) if write => prop_assert_eq!((at, buf.len()), (offset, len as usize)),
            other => prop_assert!(false, "{:?}", other),
        }
        status.copy_from(&[0x5a]);
        prop_assert_eq!(guest.content()[Guest::file_offset(0x8800).unwrap() as usize], 0x5a);
        let logged: u64 = chain.writable.iter().map(|range| u64::from(range.len)).sum();
        prop_assert_eq!(logged, 1 + if write { 0 } else { u64::from(len) });
    }

    #[test]
    fn garbage_never_panics_and_never_leaves_the_writable_ranges(
        table in prop::collection::vec(descriptor(), usize::from(SIZE)),
        second in prop::collection::vec(descriptor(), 40),
        kind in prop_oneof![Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
        head in 0u16..SIZE + 3,
    ) {
        let guest = Guest::new();
        for at in (0x1000..0x5000).step_by(16) {
            guest.write(at, &header(kind, at));
        }
        for (index, entry) in (0u16..).zip(&table) {
            guest.descriptor(TABLE, index, *entry);
        }
        for (index, entry) in (0u16..).zip(&second) {
            guest.descriptor(0x5000, index, *entry);
        }
        let before = guest.content();
        let (parsed, chain) = guest.parse(head);
        let Ok((action, status)) = parsed else { return Ok(()) };
        prop_assert_eq!(status.len(), 1);
        status.copy_from(&[0xa5]);
        if let Action::Read(_, buf) | Action::GetId(buf) = &action {
            buf.copy_from(&vec![0xa5; buf.len().min(1 << 20)]);
        }
        if let Action::Zero(ranges) = &action {
            prop_assert!(ranges.len() <= MAX_ZERO_SEGMENTS as usize);
            prop_assert!(ranges.iter().all(|r| r.len <= u64::from(MAX_ZERO_SECTORS) * 512 && r.len > 0));
        }
        let mut allowed = vec![false; before.len()];
        for range in &chain.writable {
            let end = range.address.saturating_add(u64::from(range.len)).min(0x9000);
            for at in range.address..end {
                if let Some(at) = Guest::file_offset(at) {
                    allowed[at as usize] = true;
                }
            }
        }
        let after = guest.content();
        for (at, (old, new)) in before.iter().zip(&after).enumerate() {
            prop_assert!(old == new || allowed[at], "byte {:#x} of the file changed", at);
        }
    }
}

/// Each case: descriptors, and whether the ring can go on with an error status.
#[test]
fn broken_chains_stop_the_ring_and_bad_requests_get_a_status() {
    const N: u16 = DESC_NEXT;
    const W: u16 = DESC_WRITE;
    const I: u16 = DESC_INDIRECT;
    let header_at = (0x1100, 16, N, 1);
    let status = (0x8800, 1, W, 0);
    let broken: &[(&str, &[Words])] = &[
        ("loop", &[(0x1100, 16, N, 1), (0x1200, 512, N, 0)]),
        ("self loop", &[(0x1100, 16, N, 0)]),
        ("next past the table", &[(0x1100, 16, N, SIZE)]),
        ("no writable byte", &[(0x1100, 16, 0, 0)]),
        ("only empty writable", &[header_at, (0x8800, 0, W, 0)]),
        ("status outside", &[header_at, (0x7000, 1, W, 0)]),
        ("status wraps", &[header_at, (u64::MAX, 3, W, 0)]),
        ("indirect of no descriptor", &[(0x5000, 0, I, 0)]),
        ("indirect of half a descriptor", &[(0x5000, 24, I, 0)]),
        ("indirect outside", &[(0x7000, 32, I, 0)]),
        ("indirect with next", &[(0x5000, 32, I | N, 1)]),
        ("indirect of absurd length", &[(0x5000, 0xffff_fff0, I, 0)]),
    ];
    for (name, table) in broken {
        let guest = Guest::new();
        guest.write(0x1100, &header(T_OUT, 0));
        // What the indirect tables hold: a loop, and a nested table.
        guest.descriptor(0x5000, 0, (0x1100, 16, N, 1));
        guest.descriptor(0x5000, 1, (0x1200, 16, N, 0));
        for (index, entry) in (0u16..).zip(*table) {
            guest.descriptor(TABLE, index, *entry);
        }
        assert!(guest.parse(0).0.is_err(), "{name}");
    }
    let refused: &[(&str, &[Words])] = &[
        ("wrong order", &[header_at, (0x8900, 512, W | N, 2), (0x1200, 512, N, 3), status]),
        ("short header", &[(0x1100, 15, N, 1), status]),
        ("no header", &[status]),
        ("header outside", &[(0x7000, 16, N, 1), status]),
        ("data outside", &[header_at, (0x7000, 512, N, 2), status]),
        ("data of absurd length", &[header_at, (0x1200, u32::MAX, N, 2), status]),
        ("a write with room for data", &[header_at, (0x8900, 512, W | N, 2), status]),
    ];
    for (name, table) in refused {
        let guest = Guest::new();
        guest.write(0x1100, &header(T_OUT, 0));
        for (index, entry) in (0u16..).zip(*table) {
            guest.descriptor(TABLE, index, *entry);
        }
        assert!(matches!(guest.parse(0).0, Ok((Action::Invalid(_), _))), "{name}");
    }
    let guest = Guest::new();
    guest.descriptor(TABLE, 0, (0x5000, 32, I, 0));
    guest.descriptor(0x5000, 0, (0x1100, 16, N, 1));
    guest.descriptor(0x5000, 1, (0x5000, 32, I, 0));
    assert!(matches!(guest.parse(0).0, Err(ChainError::Indirect { .. })), "nested table");
    assert!(matches!(guest.parse(SIZE).0, Err(ChainError::Index(SIZE))), "head past the table");
}

#[test]
fn discard_and_write_zeroes_keep_to_their_limits() {
    let segment = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let ask = |kind: u32, segments: &[Vec<u8>]| {
        let guest = Guest::new();
        let data = segments.concat();
        guest.write(0x1100, &header(kind, 0));
        guest.write(0x1200, &data);
        guest.chain(&[(0x1100, 16, false), (0x1200, data.len() as u32, false), (0x8800, 1, true)], false);
        guest.parse(0).0.unwrap().0
    };
    let Action::Zero(ranges) = ask(T_DISCARD, &[segment(8, 16, 0), segment(0, 0, 0), segment(1, 1, 0)])
    else {
        panic!("refused");
    };
    let expected = [
        ZeroRange { offset: 4096, len: 8192, unmap: true },
        ZeroRange { offset: 512, len: 512, unmap: true },
    ];
    assert_eq!(ranges.as_slice(), expected);
    let unmap = |action| matches!(action, Action::Zero(ranges) if ranges[0].unmap);
    assert!(unmap(ask(T_WRITE_ZEROES, &[segment(0, 1, 1)])));
    assert!(!unmap(ask(T_WRITE_ZEROES, &[segment(0, 1, 0)])));
    for (kind, flags) in [(T_DISCARD, 1), (T_DISCARD, 2), (T_WRITE_ZEROES, 2)] {
        assert!(matches!(ask(kind, &[segment(0, 1, flags)]), Action::Unsupported));
    }
    let many = vec![segment(0, 1, 0); MAX_ZERO_SEGMENTS as usize + 1];
    let invalid = [
        ask(T_DISCARD, &many),
        ask(T_DISCARD, &[vec![0; 8]]),
        ask(T_DISCARD, &[]),
        ask(T_WRITE_ZEROES, &[segment(0, MAX_ZERO_SECTORS + 1, 0)]),
        ask(T_WRITE_ZEROES, &[segment(u64::MAX, 1, 0)]),
    ];
    assert!(invalid.iter().all(|action| matches!(action, Action::Invalid(_))), "{invalid:?}");
}
