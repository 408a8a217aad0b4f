// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must be on the disk, and how it is told.
//!
//! Every sector that is written carries a stamp: the run's own number, its offset, the generation of its block, and a
//! checksum over those and a body that follows from them. The body makes a block differ from any other everywhere, so
//! that no mixture of old and new passes; the stamp is there to say what was found instead.
//!
//! A block has at most one write in flight. A read is judged only if no write of its block was under way at any time
//! between its start and its end: then exactly one generation is right.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use xxhash_rust::xxh3::xxh3_64;

const SECTOR: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"blkferry");
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What is known of one block.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// Generation of the last write or discard that was begun.
    begun: u32,
    /// Generation that the disk holds, if that is certain.
    holds: Option<u32>,
    writing: bool,
}

/// All that one queue has written.
#[derive(Debug)]
pub(crate) struct Book {
    run: u64,
    blocks: HashMap<u64, Known>,
}

/// What a read should find: the generation that the block holds, to be asked again at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expected {
    generation: u32,
}

impl Book {
    /// `run` is a number that no earlier run had: what an earlier run wrote must not pass for this one's.
    pub(crate) fn new(run: u64) -> Self {
        Self { run, blocks: HashMap::new() }
    }

    /// Begins a write or a discard; `None` while another one of the block is in flight.
    pub(crate) fn begin_write(&mut self, block: u64) -> Option<u32> {
        let known = self.blocks.entry(block).or_default();
        if known.writing {
            return None;
        }
        known.writing = true;
        known.begun += 1;
        known.holds = None;
        Some(known.begun)
    }

    pub(crate) fn is_writing(&self, block: u64) -> bool {
        self.blocks.get(&block).is_some_and(|known| known.writing)
    }

    /// Ends it. Only a write that came back good leaves something certain.
    pub(crate) fn end_write(&mut self, block: u64, certain: bool) {
        if let Entry::Occupied(mut entry) = self.blocks.entry(block) {
            let known = entry.get_mut();
            known.writing = false;
            known.holds = certain.then_some(known.begun);
        }
    }

    /// What a read of the block that begins now should find, if that is certain.
    pub(crate) fn begin_read(&self, block: u64) -> Option<Expected> {
        self.blocks.get(&block)?.holds.map(|generation| Expected { generation })
    }

    /// Whether what was expected is still what must have been read.
    pub(crate) fn still(&self, block: u64, expected: Expected) -> bool {
        self.blocks.get(&block).is_some_and(|known| known.holds == Some(expected.generation))
    }

    /// All blocks whose content is certain, in order.
    pub(crate) fn certain(&self) -> Vec<u64> {
        let mut blocks: Vec<_> =
            self.blocks.iter().filter(|(_, known)| known.holds.is_some()).map(|(block, _)| *block).collect();
        blocks.sort_unstable();
        blocks
    }

    /// Makes the content of a block, `offset` bytes into the disk.
    pub(crate) fn stamp(&self, offset: u64, generation: u32, bytes: &mut [u8]) {
        for (sector, at) in bytes.chunks_mut(SECTOR).zip((offset..).step_by(SECTOR)) {
            stamp(self.run, at, generation, sector);
        }
    }

    /// Compares a block with what it should be; `scratch` is as long as the block.
    pub(crate) fn check(
        &self,
        offset: u64,
        expected: Expected,
        found: &[u8],
        scratch: &mut [u8],
    ) -> Result<(), Wrong> {
        self.stamp(offset, expected.generation, scratch);
        if found == &*scratch {
            return Ok(());
        }
        let sectors = found.chunks(SECTOR).zip(scratch.chunks(SECTOR));
        let bad = sectors.zip((offset..).step_by(SECTOR)).find(|((found, right), _)| found != right);
        let (sector, at) = bad.map_or((found, offset), |((found, _), at)| (found, at));
        Err(Wrong { at, expected: expected.generation, found: Found::of(self.run, sector) })
    }
}

/// Writes the stamp and the body of one sector.
fn stamp(run: u64, offset: u64, generation: u32, sector: &mut [u8]) {
    let key = run ^ offset.wrapping_mul(GOLDEN) ^ u64::from(generation).rotate_left(32);
    let mut word = key;
    for (n, place) in sector.chunks_exact_mut(8).enumerate() {
        let value = match n {
            0 => MAGIC,
            1 => run,
            2 => offset,
            3 => u64::from(generation),
            // The checksum's place.
            4 => continue,
            _ => {
                word = word.wrapping_add(GOLDEN);
                (word ^ word >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
            }
        };
        place.copy_from_slice(&value.to_le_bytes());
    }
    let sum = checksum(sector);
    if let Some(place) = sector.get_mut(32..40) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
}

/// Over everything but its own place.
fn checksum(sector: &[u8]) -> u64 {
    let (stamp, body) = (sector.get(..32).unwrap_or_default(), sector.get(40..).unwrap_or_default());
    xxh3_64(body) ^ xxh3_64(stamp).rotate_left(1)
}

/// What stood where something else should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    Zeros,
    /// A whole sector of this run: of another place, or of another time.
    Stamp {
        offset: u64,
        generation: u64,
    },
    OtherRun,
    /// A stamp of this run whose sector is damaged.
    Damaged,
    Foreign,
}

impl Found {
    fn of(run: u64, sector: &[u8]) -> Self {
        let word = |n: usize| {
            let bytes = sector.get(8 * n..8 * n + 8).and_then(|bytes| bytes.try_into().ok());
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        if sector.iter().all(|byte| *byte == 0) {
            Self::Zeros
        } else if word(0) != MAGIC {
            Self::Foreign
        } else if word(4) != checksum(sector) {
            Self::Damaged
        } else if word(1) != run {
            Self::OtherRun
        } else {
            Self::Stamp { offset: word(2), generation: word(3) }
        }
    }
}

/// A block that is not what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wrong {
    at: u64,
    expected: u32,
    found: Found,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wrong data at byte {}: generation {} was expected, found ", self.at, self.expected)?;
        match self.found {
            Found::Zeros => write!(f, "zeros"),
            Found::Stamp { offset, generation } if offset == self.at => write!(f, "generation {generation}"),
            Found::Stamp { offset, generation } => {
                write!(f, "what belongs to byte {offset}, generation {generation}")
            }
            Found::OtherRun => write!(f, "what another run wrote"),
            Found::Damaged => write!(f, "a damaged sector"),
            Found::Foreign => write!(f, "data that this program never wrote"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const BLOCK: usize = 4096;

    fn written(book: &mut Book, block: u64) -> (Expected, Vec<u8>) {
        let generation = book.begin_write(block).unwrap();
        let mut bytes = vec![0; BLOCK];
        book.stamp(block * BLOCK as u64, generation, &mut bytes);
        book.end_write(block, true);
        (book.begin_read(block).unwrap(), bytes)
    }

    fn verdict(book: &Book, block: u64, expected: Expected, found: &[u8]) -> Option<Found> {
        book.check(block * BLOCK as u64, expected, found, &mut vec![0; found.len()])
            .err()
            .map(|wrong| wrong.found)
    }

    #[test]
    fn right_data_passes_and_everything_else_is_named() {
        let mut book = Book::new(77);
        let (_, old) = written(&mut book, 5);
        let (expected, new) = written(&mut book, 5);
        let (_, elsewhere) = written(&mut book, 6);
        assert_eq!(verdict(&book, 5, expected, &new), None);
        assert_eq!(verdict(&book, 5, expected, &old), Some(Found::Stamp { offset: 5 * 4096, generation: 1 }));
        assert_eq!(
            verdict(&book, 5, expected, &elsewhere),
            Some(Found::Stamp { offset: 6 * 4096, generation: 1 })
        );
        assert_eq!(verdict(&book, 5, expected, &vec![0; BLOCK]), Some(Found::Zeros));
        assert_eq!(verdict(&book, 5, expected, &vec![9; BLOCK]), Some(Found::Foreign));
        let mut other = Book::new(78);
        written(&mut other, 5);
        let (_, foreign) = written(&mut other, 5);
        assert_eq!(verdict(&book, 5, expected, &foreign), Some(Found::OtherRun));
    }

    #[test]
    fn one_wrong_bit_or_one_old_sector_is_found_wherever_it_is() {
        let mut book = Book::new(77);
        let (_, old) = written(&mut book, 9);
        let (expected, new) = written(&mut book, 9);
        for at in (0..BLOCK).step_by(61) {
            let mut bad = new.clone();
            bad[at] ^= 0x10;
            assert!(verdict(&book, 9, expected, &bad).is_some(), "byte {at}");
        }
        let mut torn = new.clone();
        torn[7 * SECTOR..].copy_from_slice(&old[7 * SECTOR..]);
        let wrong = book.check(9 * 4096, expected, &torn, &mut [0; BLOCK]).unwrap_err();
        assert_eq!(wrong.at, 9 * 4096 + 7 * 512);
        assert!(wrong.to_string().ends_with("generation 2 was expected, found generation 1"), "{wrong}");
    }

    #[test]
    fn a_read_beside_a_write_is_not_judged() {
        let mut book = Book::new(1);
        let (expected, _) = written(&mut book, 3);
        assert!(book.still(3, expected));
        book.begin_write(3).unwrap();
        assert!(!book.still(3, expected));
        assert_eq!(book.begin_read(3), None);
        assert_eq!(book.begin_write(3), None, "one write at a time");
        book.end_write(3, true);
        assert!(!book.still(3, expected), "another generation by now");
        assert_eq!(book.begin_read(4), None, "never written");
    }

    #[test]
    fn what_failed_or_was_discarded_is_uncertain_until_written_again() {
        let mut book = Book::new(1);
        written(&mut book, 3);
        book.begin_write(3).unwrap();
        book.end_write(3, false);
        assert_eq!((book.begin_read(3), book.certain()), (None, vec![]));
        written(&mut book, 8);
        written(&mut book, 3);
        assert_eq!(book.certain(), [3, 8]);
    }
}
