// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a message begins and ends, and that it is whole: the preamble of a stream and the header of a frame.
//!
//! TCP's 16-bit checksum lets about one broken segment in 65,000 through, and what travels here is somebody's
//! disk. So every byte is covered: a CRC-32 over the header (the length must be true *before* anything is allocated or
//! waited for), and in it an xxh3-64 over the payload. For a chunk the payload begins with its number, version and epoch,
//! so content that was put under another chunk's header is caught as well. One checksum over the whole frame was
//! rejected: a flipped length bit would let the receiver wait for megabytes that never come.

use super::WireError;
use super::negotiate::{Features, Terms, VersionRange};
use crate::core::geometry::MAX_CHUNK_SIZE;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// First bytes of every stream, in both directions.
pub const MAGIC: [u8; 8] = *b"BLKFERRY";
/// Bytes of a preamble; the same in all versions of the protocol.
pub const PREAMBLE_LEN: usize = 64;
/// Bytes of a frame header.
pub const HEADER_LEN: usize = 20;
/// Bytes of a chunk message before its content.
pub const CHUNK_HEAD_LEN: usize = 48;
/// Longest payload of a message without content: the longest list, with room.
pub const MAX_CONTROL_PAYLOAD: u32 = 96 << 10;
/// Longest payload of a chunk message.
pub const MAX_CHUNK_PAYLOAD: u32 = MAX_CHUNK_SIZE + 48;
const _: () = assert!(MAX_CHUNK_PAYLOAD as usize == MAX_CHUNK_SIZE as usize + CHUNK_HEAD_LEN);
/// Most data streams of one connection.
pub const MAX_STREAMS: u8 = crate::config::MAX_CONNECTIONS;

/// The type of a message, with its number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // Each is the variant of `core::message::Message` of the same name.
pub enum Kind {
    Hello = 1,
    Welcome = 2,
    Refuse = 3,
    Have = 4,
    Announce = 5,
    HotBase = 6,
    Chunk = 7,
    Ack = 8,
    Offer = 9,
    Prepared = 10,
    Mismatch = 11,
    Pull = 12,
    PullFailed = 13,
    Activate = 14,
    Granted = 15,
    Denied = 16,
    Reclaimed = 17,
    Synced = 18,
    Complete = 19,
    Released = 20,
    Cancel = 21,
    Cancelled = 22,
    Ping = 23,
    Pong = 24,
    Replica = 25,
    Keep = 26,
}

/// All types with their names, in the order of their numbers, which start at 1.
const KINDS: [(Kind, &str); 26] = [
    (Kind::Hello, "Hello"),
    (Kind::Welcome, "Welcome"),
    (Kind::Refuse, "Refuse"),
    (Kind::Have, "Have"),
    (Kind::Announce, "Announce"),
    (Kind::HotBase, "HotBase"),
    (Kind::Chunk, "Chunk"),
    (Kind::Ack, "Ack"),
    (Kind::Offer, "Offer"),
    (Kind::Prepared, "Prepared"),
    (Kind::Mismatch, "Mismatch"),
    (Kind::Pull, "Pull"),
    (Kind::PullFailed, "PullFailed"),
    (Kind::Activate, "Activate"),
    (Kind::Granted, "Granted"),
    (Kind::Denied, "Denied"),
    (Kind::Reclaimed, "Reclaimed"),
    (Kind::Synced, "Synced"),
    (Kind::Complete, "Complete"),
    (Kind::Released, "Released"),
    (Kind::Cancel, "Cancel"),
    (Kind::Cancelled, "Cancelled"),
    (Kind::Ping, "Ping"),
    (Kind::Pong, "Pong"),
    (Kind::Replica, "Replica"),
    (Kind::Keep, "Keep"),
];

impl Kind {
    /// The type with this number, if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        KINDS.get(usize::from(number.checked_sub(1)?)).map(|(kind, _)| *kind)
    }

    /// Its name, as in `core::message::Message`.
    #[must_use]
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(kind, _)| *kind == self).map_or("unknown", |(_, name)| name)
    }

    /// Longest payload in bytes.
    #[must_use]
    pub fn limit(self) -> u32 {
        if self == Self::Chunk { MAX_CHUNK_PAYLOAD } else { MAX_CONTROL_PAYLOAD }
    }
}

/// What stands before every payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The type of the message.
    pub kind: Kind,
    /// Length of the payload in bytes.
    pub len: u32,
    /// Its xxh3-64.
    pub checksum: u64,
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&self.len.to_le_bytes());
        bytes[4] = self.kind as u8;
        bytes[8..16].copy_from_slice(&self.checksum.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..16]);
        bytes[16..20].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header; what it says has been checked against the limits.
    ///
    /// # Errors
    /// A [`WireError`] that names what is wrong with it.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        if crc32fast::hash(&bytes[..16]) != u32::from_le_bytes(field(bytes, 16)) {
            return Err(WireError::Checksum { what: "frame header" });
        }
        if bytes[5..8] != [0; 3] {
            return Err(WireError::Value { what: "the reserved part of a frame header" });
        }
        let kind = Kind::from_number(bytes[4])
            .ok_or(WireError::Unknown { what: "message type", number: bytes[4].into() })?;
        let len = u32::from_le_bytes(field(bytes, 0));
        if len > kind.limit() {
            return Err(WireError::TooLong {
                what: kind.name(),
                len: len.into(),
                limit: kind.limit().into(),
            });
        }
        Ok(Self { kind, len, checksum: u64::from_le_bytes(field(bytes, 8)) })
    }

    /// Checks a payload that came in two parts (the second may be empty).
    ///
    /// # Errors
    /// [`WireError::Checksum`] when it is not the payload that was sent.
    pub fn check(&self, head: &[u8], body: &[u8]) -> Result<(), WireError> {
        if payload_checksum(head, body) == self.checksum {
            Ok(())
        } else {
            Err(WireError::Checksum { what: self.kind.name() })
        }
    }
}

/// The xxh3-64 of a payload in two parts, as if they lay one after the other.
#[must_use]
pub fn payload_checksum(head: &[u8], body: &[u8]) -> u64 {
    if body.is_empty() {
        return xxh3_64(head);
    }
    let mut hash = Xxh3::new();
    hash.update(head);
    hash.update(body);
    hash.digest()
}

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// All messages, in order.
    Control,
    /// Chunk contents; the number counts from 0.
    Data(u8),
}

/// The listener's word on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Verdict {
    /// All streams have joined: speak.
    Accepted = 0,
    /// No common version or a feature is missing; the preamble says what would do.
    Terms = 1,
    /// Too many connections are being made, or the daemon takes none now.
    Crowded = 2,
    /// The stream contradicts the others of its connection (its number is taken, their counts differ).
    Streams = 3,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Accepted => "accepted",
            Self::Terms => "no common protocol version, or a feature is missing",
            Self::Crowded => "too many connections are being made, or none is taken now",
            Self::Streams => "a stream contradicts the others of its connection",
        })
    }
}

/// The name that one connection's streams share; drawn at random for each attempt, so that late streams of an earlier
/// attempt cannot join this one.
pub type Token = [u8; 16];

/// What either side says first on every stream. The connecting side says it at once; the listening side answers
/// on each stream when all of them have joined, or at once to refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// Versions and features.
    pub terms: Terms,
    /// What this stream is for.
    pub stream: StreamKind,
    /// Number of data streams that the connection has, 1 to [`MAX_STREAMS`].
    pub streams: u8,
    /// `None` from the connecting side; the listening side's word.
    pub answer: Option<Verdict>,
    /// The connection.
    pub token: Token,
}

const ANSWER: u8 = 0x80;

impl Preamble {
    /// The preamble's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_LEN] {
        let mut bytes = [0; PREAMBLE_LEN];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.terms.versions.min.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.terms.versions.max.to_le_bytes());
        let (kind, index) = match self.stream {
            StreamKind::Control => (0, 0),
            StreamKind::Data(index) => (1, index),
        };
        bytes[12] = kind | if self.answer.is_some() { ANSWER } else { 0 };
        bytes[13] = index;
        bytes[14] = self.streams;
        bytes[15] = self.answer.map_or(0, |verdict| verdict as u8);
        bytes[16..24].copy_from_slice(&self.terms.offered.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.terms.required.0.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.token);
        let checksum = xxh3_64(&bytes[..56]);
        bytes[56..64].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a preamble. Versions and features are for [`super::negotiate::negotiate`] to judge; a preamble keeps its
    /// layout in all versions.
    ///
    /// # Errors
    /// A [`WireError`] that names what is wrong with it.
    pub fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Result<Self, WireError> {
        if bytes[0..8] != MAGIC {
            return Err(WireError::Magic);
        }
        if xxh3_64(&bytes[..56]) != u64::from_le_bytes(field(bytes, 56)) {
            return Err(WireError::Checksum { what: "preamble" });
        }
        if bytes[48..56] != [0; 8] {
            return Err(WireError::Value { what: "the reserved part of a preamble" });
        }
        let streams = bytes[14];
        if !(1..=MAX_STREAMS).contains(&streams) {
            return Err(WireError::Value { what: "the number of data streams" });
        }
        let stream = match (bytes[12] & !ANSWER, bytes[13]) {
            (0, 0) => StreamKind::Control,
            (1, index) if index < streams => StreamKind::Data(index),
            (0 | 1, _) => return Err(WireError::Value { what: "the number of a data stream" }),
            (kind, _) => return Err(WireError::Unknown { what: "kind of stream", number: kind.into() }),
        };
        let answer = match (bytes[12] & ANSWER != 0, bytes[15]) {
            (false, 0) => None,
            (true, 0) => Some(Verdict::Accepted),
            (true, 1) => Some(Verdict::Terms),
            (true, 2) => Some(Verdict::Crowded),
            (true, 3) => Some(Verdict::Streams),
            (_, number) => return Err(WireError::Unknown { what: "verdict", number: number.into() }),
        };
        let number = |at| u16::from_le_bytes(field(bytes, at));
        let bits = |at| Features(u64::from_le_bytes(field(bytes, at)));
        Ok(Self {
            terms: Terms {
                versions: VersionRange { min: number(8), max: number(10) },
                offered: bits(16),
                required: bits(24),
            },
            stream,
            streams,
            answer,
            token: field(bytes, 32),
        })
    }
}

/// The `N` bytes at `at`; zeros where there are none (every caller names a place inside).
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn any_preamble() -> impl Strategy<Value = Preamble> {
        let verdict = prop_oneof![
            Just(None),
            Just(Some(Verdict::Accepted)),
            Just(Some(Verdict::Terms)),
            Just(Some(Verdict::Crowded)),
            Just(Some(Verdict::Streams)),
        ];
        (
            any::<[u16; 2]>(),
            any::<[u64; 2]>(),
            1u8..=MAX_STREAMS,
            any::<Option<u8>>(),
            verdict,
            any::<Token>(),
        )
            .prop_map(|(versions, bits, streams, index, answer, token)| Preamble {
                terms: Terms {
                    versions: VersionRange { min: versions[0], max: versions[1] },
                    offered: Features(bits[0]),
                    required: Features(bits[1]),
                },
                stream: index.map_or(StreamKind::Control, |index| StreamKind::Data(index % streams)),
                streams,
                answer,
                token,
            })
    }

    #[test]
    fn every_kind_is_found_by_its_number() {
        for (at, (kind, name)) in KINDS.iter().enumerate() {
            assert_eq!(usize::from(*kind as u8), at + 1);
            assert_eq!(Kind::from_number(*kind as u8), Some(*kind));
            assert_eq!(format!("{kind:?}"), *name);
        }
        assert_eq!(Kind::from_number(0), None);
        assert_eq!(Kind::from_number(27), None);
    }

    /// The table of docs/protocol.md has these numbers and names, and no others.
    #[test]
    fn the_documented_numbers_are_these() {
        let page = include_str!("../../docs/protocol.md");
        let table = page.split("## Messages").nth(1).unwrap().split("### Hello").next().unwrap();
        let rows = table.lines().filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split(" | ");
            Some((cells.next()?.parse::<u8>().ok()?, cells.next()?))
        });
        let expected: Vec<_> = KINDS.iter().map(|(kind, name)| (*kind as u8, *name)).collect();
        assert_eq!(rows.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_header_above_its_limit_is_refused_before_anything_is_allocated() {
        let header = Header { kind: Kind::Chunk, len: MAX_CHUNK_PAYLOAD + 1, checksum: 0 };
        assert!(matches!(Header::decode(&header.encode()), Err(WireError::TooLong { what: "Chunk", .. })));
        let header = Header { kind: Kind::Ack, len: MAX_CHUNK_PAYLOAD, checksum: 0 };
        assert!(matches!(Header::decode(&header.encode()), Err(WireError::TooLong { what: "Ack", .. })));
    }

    proptest! {
        #[test]
        fn a_preamble_comes_back(preamble in any_preamble()) {
            prop_assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }

        #[test]
        fn a_flipped_bit_of_a_preamble_is_noticed(preamble in any_preamble(), bit in 0usize..PREAMBLE_LEN * 8) {
            let mut bytes = preamble.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Preamble::decode(&bytes).is_err());
        }

        #[test]
        fn garbage_is_neither_preamble_nor_header(bytes: [u8; 32]) {
            let twice = [bytes, bytes].concat();
            prop_assert_eq!(Preamble::decode(twice[..].try_into().unwrap()), Err(WireError::Magic));
            let _ = Header::decode(twice[..HEADER_LEN].try_into().unwrap());
        }
    }
}
