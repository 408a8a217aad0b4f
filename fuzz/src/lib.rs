// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bodies of fuzz targets: what bytes of a stranger may do to the decoders, as functions that any fuzzer can call.
//!
//! Each takes arbitrary bytes and panics when a decoder is wrong: when it panics itself, when it takes bytes that the
//! encoder would write differently, when it asks for a length above the limits, or when it reaches out of the guest's
//! memory. They stand in a library so that
//! an ordinary test runs them on a seeded corpus everywhere, and a coverage-guided fuzzer needs one line for each.

use blkferry::wire::WireError;
use blkferry::wire::codec::{self, Frame};
use blkferry::wire::frame::{
    HEADER_LEN, Header, Kind, MAX_CHUNK_PAYLOAD, PREAMBLE_LEN, Preamble, payload_checksum,
};

/// Bytes as they come from a socket: a preamble or a frame.
///
/// # Panics
/// When a decoder is wrong.
pub fn frame(data: &[u8]) {
    if let Some(first) = data.first_chunk::<PREAMBLE_LEN>()
        && let Ok(preamble) = Preamble::decode(first)
    {
        assert_eq!(preamble.encode(), *first, "a preamble encodes to itself");
    }
    match codec::parse(data) {
        Ok((message, used)) => {
            let Ok(Frame { head, body }) = codec::encode(message) else {
                unreachable!("what was decoded can be encoded")
            };
            assert_eq!(Some([head, body].concat().as_slice()), data.get(..used), "a frame encodes to itself");
        }
        Err(WireError::Incomplete { needed }) => {
            assert!(needed > data.len() && needed <= HEADER_LEN + MAX_CHUNK_PAYLOAD as usize);
        }
        Err(_) => {}
    }
}

/// A payload behind a good checksum, as a peer with bad intentions sends it: the first byte names the message.
///
/// # Panics
/// When a decoder is wrong.
pub fn payload(data: &[u8]) {
    let Some((number, payload)) = data.split_first() else { return };
    let Some(kind) = Kind::from_number(number % 27) else { return };
    let Ok(len) = u32::try_from(payload.len()) else { return };
    let header = Header { kind, len, checksum: payload_checksum(payload, &[]) }.encode();
    let whole = [&header[..], payload].concat();
    let decoded = codec::decode(kind, payload);
    if len <= kind.limit() {
        assert_eq!(codec::parse(&whole).map(|(message, _)| message), decoded, "two ways, one result");
    }
    frame(&whole);
}

mod chain;

pub use chain::chain;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;
    use blkferry::core::geometry::{BlockMask, ChunkId};
    use blkferry::core::message::{
        Announcement, Body, ChunkData, Epoch, Hello, Message, MigrationId, Purpose, Refusal, Standing,
        Version, VolumeId, Welcome,
    };
    use rand::{Rng, RngExt, SeedableRng};

    fn seeds() -> Vec<Vec<u8>> {
        let hello = Hello {
            migration: MigrationId([1; 16]),
            volume: VolumeId([2; 16]),
            incarnation: Default::default(),
            epoch: Epoch(3),
            size: 1 << 30,
            chunk_size: 256 << 10,
            base: Default::default(),
            virtio_features: 0x1_3000_0000,
            queues: 1,
            read_only: false,
            serial: "disk".to_owned(),
        };
        let chunk = ChunkData {
            migration: MigrationId([1; 16]),
            epoch: Epoch(3),
            chunk: ChunkId(4),
            version: Version(5),
            purpose: Purpose::Push,
            body: Body::Blocks { mask: BlockMask(0b101), bytes: vec![7; 8192] },
        };
        let welcome = Welcome {
            prepared: Some(Epoch(4)),
            active: None,
            complete: false,
            standing: None,
            have_follows: true,
        };
        let entries =
            vec![Announcement { first: ChunkId(0), run: 9, standing: Standing::Remaining { count: 1 } }];
        let messages = [
            Message::Hello(hello),
            Message::Welcome(welcome),
            Message::Chunk(chunk.clone()),
            Message::Chunk(ChunkData { body: Body::Zero, ..chunk }),
            Message::Announce { entries },
            Message::Have { entries: vec![(ChunkId(1), Version(2))], last: true },
            Message::Refuse { reason: Refusal::Busy, text: "busy".to_owned() },
            Message::Activate { epoch: None },
            Message::Ping(1),
        ];
        messages
            .into_iter()
            .map(|message| {
                let Frame { head, body } = codec::encode(message).unwrap();
                [head, body].concat()
            })
            .collect()
    }

    #[test]
    fn the_targets_hold_on_a_seeded_corpus() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(0x626c_6b66);
        for seed in seeds() {
            frame(&seed);
            for _ in 0..2000 {
                let mut bytes = seed.clone();
                for _ in 0..random.random_range(1..4) {
                    let at = random.random_range(0..bytes.len());
                    bytes[at] = random.random();
                }
                bytes.truncate(random.random_range(0..=bytes.len()));
                frame(&bytes);
                // The same damage behind a good checksum.
                let inside = bytes.get(HEADER_LEN..).unwrap_or_default();
                payload(&[&seed[4..5], inside].concat());
            }
        }
        for _ in 0..20_000 {
            let mut bytes = vec![0; random.random_range(0..200)];
            random.fill_bytes(&mut bytes);
            frame(&bytes);
            payload(&bytes);
        }
    }
}
