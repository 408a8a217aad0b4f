// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Properties of the codec over arbitrary messages, and the bytes of one of each as they must stay.

#![allow(clippy::unwrap_used)]
use super::*;
use crate::wire::frame::MAX_CHUNK_PAYLOAD;
use proptest::collection::vec;
use proptest::prelude::*;

fn chunk_id() -> impl Strategy<Value = ChunkId> {
    any::<u32>().prop_map(ChunkId)
}

fn epoch() -> impl Strategy<Value = Epoch> {
    any::<u64>().prop_map(Epoch)
}

fn version() -> impl Strategy<Value = Version> {
    (0..=MAX_VERSION).prop_map(Version)
}

fn refusal() -> impl Strategy<Value = Refusal> {
    (1u8..=12).prop_map(|number| Refusal::from_number(number).unwrap())
}

fn pairs() -> impl Strategy<Value = Vec<(ChunkId, Version)>> {
    vec((chunk_id(), version()), 0..40)
}

fn hello() -> impl Strategy<Value = Message> {
    let numbers = (any::<[u64; 5]>(), any::<u32>(), any::<u16>(), any::<bool>());
    (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<[u8; 32]>(), numbers, "[ -~]{0,20}").prop_map(
        |(migration, volume, digest, (n, chunk_size, queues, read_only), serial)| {
            Message::Hello(Hello {
                migration: MigrationId(migration),
                volume: VolumeId(volume),
                incarnation: Incarnation(n[0]),
                epoch: Epoch(n[1]),
                size: n[2],
                chunk_size,
                base: BaseIdentity { length: n[3], digest },
                virtio_features: n[4],
                queues,
                read_only,
                serial,
            })
        },
    )
}

fn welcome() -> impl Strategy<Value = Message> {
    let maybe = || prop::option::of(epoch());
    (maybe(), maybe(), any::<bool>(), any::<Option<u128>>(), any::<bool>()).prop_map(
        |(prepared, active, complete, standing, have_follows)| {
            let standing = standing.map(RemainingDigest);
            Message::Welcome(Welcome { prepared, active, complete, standing, have_follows })
        },
    )
}

fn announce() -> impl Strategy<Value = Message> {
    let remaining = (0u32..1 << 31, 1u32..1 << 31, any::<u8>()).prop_map(|(first, run, count)| {
        Announcement { first: ChunkId(first), run, standing: Standing::Remaining { count } }
    });
    let settled = (0u32..u32::MAX, version()).prop_map(|(first, version)| Announcement {
        first: ChunkId(first),
        run: 1,
        standing: Standing::Settled { version },
    });
    vec(prop_oneof![remaining, settled], 0..40).prop_map(|entries| Message::Announce { entries })
}

fn chunk() -> impl Strategy<Value = Message> {
    let blocks = (1u64.., vec(any::<u8>(), 1..2000))
        .prop_map(|(mask, bytes)| Body::Blocks { mask: BlockMask(mask), bytes });
    let purpose = prop_oneof![Just(Purpose::Push), Just(Purpose::Prefetch), Just(Purpose::Demand)];
    let body = prop_oneof![Just(Body::Zero), blocks];
    (any::<[u8; 16]>(), epoch(), chunk_id(), version(), purpose, body).prop_map(
        |(migration, epoch, chunk, version, purpose, body)| {
            let migration = MigrationId(migration);
            Message::Chunk(ChunkData { migration, epoch, chunk, version, purpose, body })
        },
    )
}

fn with_epoch() -> impl Strategy<Value = Message> {
    (0..7, epoch()).prop_map(|(which, epoch)| match which {
        0 => Message::Prepared { epoch },
        1 => Message::Mismatch { epoch },
        2 => Message::Granted { epoch },
        3 => Message::Reclaimed { epoch },
        4 => Message::Synced { epoch },
        5 => Message::Complete { epoch },
        _ => Message::Released { epoch },
    })
}

fn any_message() -> impl Strategy<Value = Message> {
    let offer = (epoch(), any::<u128>(), any::<u32>(), any::<bool>()).prop_map(
        |(epoch, digest, remaining, write_cache)| {
            Message::Offer(Offer { epoch, digest: RemainingDigest(digest), remaining, write_cache })
        },
    );
    let maybe = || prop::option::of(epoch());
    prop_oneof![
        hello(),
        welcome(),
        announce(),
        chunk(),
        offer,
        with_epoch(),
        (refusal(), ".{0,200}").prop_map(|(reason, text)| Message::Refuse { reason, text }),
        (pairs(), any::<bool>()).prop_map(|(entries, last)| Message::Have { entries, last }),
        (pairs(), any::<bool>()).prop_map(|(entries, last)| Message::Keep { entries, last }),
        any::<[u8; 16]>().prop_map(|id| Message::Replica { migration: MigrationId(id) }),
        vec(chunk_id(), 0..40).prop_map(|chunks| Message::HotBase { chunks }),
        pairs().prop_map(|entries| Message::Ack { entries }),
        (epoch(), chunk_id(), any::<bool>()).prop_map(|(epoch, chunk, demand)| Message::Pull {
            epoch,
            chunk,
            demand
        }),
        (chunk_id(), refusal()).prop_map(|(chunk, reason)| Message::PullFailed { chunk, reason }),
        maybe().prop_map(|epoch| Message::Activate { epoch }),
        (maybe(), refusal()).prop_map(|(epoch, reason)| Message::Denied { epoch, reason }),
        Just(Message::Cancel),
        Just(Message::Cancelled),
        any::<u64>().prop_map(Message::Ping),
        any::<u64>().prop_map(Message::Pong),
    ]
}

fn bytes_of(message: &Message) -> Vec<u8> {
    let Frame { head, body } = encode(message.clone()).unwrap();
    [head, body].concat()
}

proptest! {
    #[test]
    fn every_message_comes_back(message in any_message(), behind in vec(any::<u8>(), 0..9)) {
        let mut bytes = bytes_of(&message);
        let len = bytes.len();
        bytes.extend(behind);
        prop_assert_eq!(parse(&bytes), Ok((message, len)));
    }

    #[test]
    fn every_flipped_bit_is_noticed(message in any_message(), at: prop::sample::Index) {
        let mut bytes = bytes_of(&message);
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        let noticed = matches!(parse(&bytes), Err(WireError::Checksum { .. }));
        prop_assert!(noticed);
    }

    #[test]
    fn what_is_cut_short_is_incomplete(message in any_message(), at: prop::sample::Index) {
        let bytes = bytes_of(&message);
        let cut = at.index(bytes.len());
        match parse(&bytes[..cut]) {
            Err(WireError::Incomplete { needed }) => prop_assert!(needed > cut && needed <= bytes.len()),
            other => prop_assert!(false, "{other:?}"),
        }
    }

    /// Behind a good checksum stands whatever a peer with bad intentions likes.
    #[test]
    fn a_payload_is_refused_or_encodes_to_itself(number in 1u8..=24, payload in vec(any::<u8>(), 0..200)) {
        let kind = Kind::from_number(number).unwrap();
        if let Ok(message) = decode(kind, &payload) {
            prop_assert_eq!(&bytes_of(&message)[HEADER_LEN..], &payload[..]);
        }
    }

    #[test]
    fn a_changed_payload_is_refused_or_encodes_to_itself(message in any_message(), at: prop::sample::Index, to: u8) {
        let mut payload = bytes_of(&message).split_off(HEADER_LEN);
        if !payload.is_empty() {
            let at = at.index(payload.len());
            payload[at] = to;
        }
        if let Ok(changed) = decode(kind(&message), &payload) {
            prop_assert_eq!(&bytes_of(&changed)[HEADER_LEN..], &payload[..]);
        }
    }

    #[test]
    fn payloads_of_another_length_are_refused(message in any_message(), at: prop::sample::Index, more in 1usize..9) {
        let kind = kind(&message);
        let payload = bytes_of(&message).split_off(HEADER_LEN);
        // A chunk may have any content that fits its mask: that is the session's to judge, with the geometry.
        if kind != Kind::Chunk {
            let longer = [payload.clone(), vec![0; more]].concat();
            prop_assert_eq!(decode(kind, &longer), Err(WireError::Trailing { what: kind.name(), extra: more }));
            if !payload.is_empty() {
                let cut = at.index(payload.len());
                prop_assert_eq!(decode(kind, &payload[..cut]), Err(WireError::Short { what: kind.name() }));
            }
        }
    }

    #[test]
    fn garbage_is_refused(bytes in vec(any::<u8>(), 0..300)) {
        prop_assert!(parse(&bytes).is_err());
    }
}

#[test]
fn a_misplaced_content_is_noticed() {
    let of = |chunk, byte| {
        let body = Body::Blocks { mask: BlockMask(1), bytes: vec![byte; 512] };
        let (migration, epoch, version) = (MigrationId([7; 16]), Epoch(1), Version(2));
        let data =
            ChunkData { migration, epoch, chunk: ChunkId(chunk), version, purpose: Purpose::Push, body };
        encode(Message::Chunk(data)).unwrap()
    };
    let (one, other) = (of(1, 0xaa), of(2, 0xbb));
    let mixed = [one.head, other.body].concat();
    assert_eq!(parse(&mixed), Err(WireError::Checksum { what: "Chunk" }));
}

#[test]
fn lists_and_contents_above_their_limits_are_refused_by_both_ends() {
    let entries = vec![(ChunkId(0), Version(0)); MAX_ENTRIES + 1];
    let refused = Err(WireError::TooLong { what: "a list", len: 4097, limit: 4096 });
    assert_eq!(encode(Message::Ack { entries }), refused);
    let payload = [4097u32.to_le_bytes().to_vec(), vec![0; 4097 * 12]].concat();
    assert_eq!(decode(Kind::Ack, &payload), refused.map(|_: Frame| Message::Cancel));

    let largest = |len: usize| ChunkData {
        migration: MigrationId::default(),
        epoch: Epoch(0),
        chunk: ChunkId(0),
        version: Version(0),
        purpose: Purpose::Push,
        body: Body::Blocks { mask: BlockMask(u64::MAX), bytes: vec![1; len] },
    };
    let frame = encode(Message::Chunk(largest(MAX_CHUNK_SIZE as usize))).unwrap();
    assert_eq!(frame.len(), HEADER_LEN + MAX_CHUNK_PAYLOAD as usize);
    assert!(matches!(
        encode(Message::Chunk(largest(MAX_CHUNK_SIZE as usize + 1))),
        Err(WireError::TooLong { .. })
    ));
    assert!(matches!(encode(Message::Chunk(largest(0))), Err(WireError::Value { .. })));
}

#[test]
fn the_longest_list_fits_its_frame() {
    let settled =
        Announcement { first: ChunkId(1), run: 1, standing: Standing::Settled { version: Version(1) } };
    let message = Message::Announce { entries: vec![settled; MAX_ENTRIES] };
    assert_eq!(parse(&bytes_of(&message)).unwrap().0, message);
}

#[test]
fn a_long_text_is_cut_between_characters() {
    let text = "\u{20ac}".repeat(MAX_TEXT); // three bytes each
    let bytes = bytes_of(&Message::Refuse { reason: Refusal::Io, text });
    let Message::Refuse { text, .. } = parse(&bytes).unwrap().0 else { unreachable!() };
    assert_eq!(text, "\u{20ac}".repeat(MAX_TEXT / 3));
}

/// The bytes are a contract between versions: this test changes only together with the protocol's version.
#[test]
fn the_bytes_of_version_1_stay() {
    let pull = Message::Pull { epoch: Epoch(0x0102), chunk: ChunkId(0x0304), demand: true };
    let bytes = bytes_of(&pull);
    assert_eq!(bytes[..8], [13, 0, 0, 0, 12, 0, 0, 0]);
    assert_eq!(bytes[HEADER_LEN..], [2, 1, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 1]);
    let zero = Message::Chunk(ChunkData {
        migration: MigrationId([0x11; 16]),
        epoch: Epoch(2),
        chunk: ChunkId(4),
        version: Version(3),
        purpose: Purpose::Demand,
        body: Body::Zero,
    });
    let bytes = bytes_of(&zero);
    assert_eq!(bytes[..5], [48, 0, 0, 0, 7]);
    let mut expected = vec![0x11; 16];
    expected.extend([2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([0; 8]);
    expected.extend([4, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(bytes[HEADER_LEN..], expected);
}
