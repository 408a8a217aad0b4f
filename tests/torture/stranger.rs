// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Somebody who connects to the destination while a migration is under way, and has no business there.

use blkferry::core::message::{BaseIdentity, Epoch, Hello, Incarnation, Message, MigrationId, VolumeId};
use blkferry::wire::codec;
use blkferry::wire::frame::{Header, Kind, MAGIC, PREAMBLE_LEN, Preamble, StreamKind};
use blkferry::wire::negotiate::Terms;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// A listener lets a stranger wait for 5 s, and then closes.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a stranger says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Talk {
    RandomBytes,
    WrongMagic,
    /// A greeting as it should be, then random bytes on all streams.
    GarbageFrames,
    /// A greeting, then a header that is whole and promises more than there may be.
    HugeLength,
    /// A greeting of half of the streams, and silence.
    HalfGreeting,
    /// A source with another migration.
    SecondSource,
}

pub const TALKS: [Talk; 6] = [
    Talk::RandomBytes,
    Talk::WrongMagic,
    Talk::GarbageFrames,
    Talk::HugeLength,
    Talk::HalfGreeting,
    Talk::SecondSource,
];

/// Bytes that look like nothing.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    crate::guest::pattern(len, seed)
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Says something; the other side may hang up meanwhile.
fn say(mut stream: &TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).ok();
}

/// What the listener says before it closes the stream; it has to.
fn last_words(mut stream: &TcpStream) -> Vec<u8> {
    let (mut words, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return words,
            Ok(count) => words.extend(&piece[..count]),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => {
                panic!("the stranger is still connected")
            }
            // A reset, because something was not read.
            Err(_) => return words,
        }
    }
}

/// The greeting on a control stream and one data stream.
fn greet(address: &str, seed: u64) -> [TcpStream; 2] {
    let token = noise(16, seed).try_into().unwrap();
    [StreamKind::Control, StreamKind::Data(0)].map(|stream| {
        let preamble = Preamble { terms: Terms::OURS, stream, streams: 1, answer: None, token };
        let connection = connect(address);
        say(&connection, &preamble.encode());
        connection
    })
}

/// Waits for the listener's greeting.
fn greeted(mut stream: &TcpStream) -> Preamble {
    let mut bytes = [0; PREAMBLE_LEN];
    stream.read_exact(&mut bytes).unwrap();
    Preamble::decode(&bytes).unwrap()
}

fn hello(seed: u64) -> Vec<u8> {
    let name = |n| -> [u8; 16] { noise(16, seed + n).try_into().unwrap() };
    let hello = Hello {
        migration: MigrationId(name(1)),
        volume: VolumeId(name(2)),
        incarnation: Incarnation(seed),
        epoch: Epoch(1),
        size: 24 << 20,
        chunk_size: 64 << 10,
        base: BaseIdentity::default(),
        virtio_features: 0,
        queues: 1,
        read_only: false,
        serial: "blkferry".to_owned(),
    };
    let frame = codec::encode(Message::Hello(hello)).unwrap();
    [frame.head, frame.body].concat()
}

/// Talks until the other side has hung up.
pub fn talk(talk: Talk, address: &str, seed: u64) {
    match talk {
        Talk::RandomBytes => {
            let stream = connect(address);
            say(&stream, &noise(1 << 16, seed));
            last_words(&stream);
        }
        Talk::WrongMagic => {
            let stream = connect(address);
            let mut bytes = noise(PREAMBLE_LEN, seed);
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[seed as usize % 8] ^= 0x20;
            say(&stream, &bytes);
            last_words(&stream);
        }
        Talk::GarbageFrames => {
            let streams = greet(address, seed);
            greeted(&streams[0]);
            streams.iter().for_each(|stream| say(stream, &noise(1 << 16, seed)));
            streams.iter().for_each(|stream| drop(last_words(stream)));
        }
        Talk::HugeLength => {
            let streams = greet(address, seed);
            greeted(&streams[0]);
            let header = Header { kind: Kind::Chunk, len: u32::MAX, checksum: seed }.encode();
            streams.iter().for_each(|stream| say(stream, &header));
            streams.iter().for_each(|stream| drop(last_words(stream)));
        }
        Talk::HalfGreeting => {
            let [control, data] = greet(address, seed);
            drop(data);
            last_words(&control);
        }
        Talk::SecondSource => second_source(address, seed),
    }
}

/// It is closed without a word while the source is connected, or refused by name; it is never welcome.
fn second_source(address: &str, seed: u64) {
    let streams = greet(address, seed);
    greeted(&streams[0]);
    say(&streams[0], &hello(seed));
    let words = last_words(&streams[0]);
    if !words.is_empty() {
        let (message, _) = codec::parse(&words).unwrap();
        assert!(matches!(message, Message::Refuse { .. }), "{message:?}");
    }
}
