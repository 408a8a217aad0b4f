// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Links over real loopback TCP: what two daemons do to each other, and what strangers do to a listener.
//!
//! No test looks at a clock: each waits for an event, under one generous limit that only a hang reaches.

#![allow(clippy::unwrap_used, clippy::panic)]

use super::connect::{ConnectError, ConnectParams, connect};
use super::link::{CloseReason, LinkEvent, LinkOptions, PeerLink, SendError};
use super::listen::{ListenParams, Listener};
use super::throttle::Throttle;
use super::tls::{TlsClient, TlsError, TlsServer};
use crate::core::geometry::{BlockMask, ChunkId};
use crate::core::message::{
    Announcement, Body, ChunkData, Epoch, MAX_ENTRIES, Message, MigrationId, Purpose, Refusal, Standing,
    Version,
};
use crate::wire::WireError;
use crate::wire::codec;
use crate::wire::frame::{Preamble, StreamKind, Verdict};
use crate::wire::negotiate::{NegotiateError, Terms, VersionRange};
use std::collections::BTreeSet;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Runs a test to its end, or fails it when it hangs.
async fn bounded<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), test).await.unwrap()
}

fn localhost() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

async fn listen(params: ListenParams) -> Listener {
    Listener::bind(localhost(), params).await.unwrap()
}

fn streams(streams: u8) -> ConnectParams {
    ConnectParams { streams, ..ConnectParams::default() }
}

async fn pair(listener: &mut Listener, params: &ConnectParams) -> (PeerLink, PeerLink) {
    let address = listener.local_addr().to_string();
    let source = connect(&address, params).await.unwrap();
    (source, listener.accept().await.unwrap())
}

fn chunk(number: u32, purpose: Purpose, len: usize) -> ChunkData {
    let pattern: Vec<u8> = (0..=250).map(|byte| byte ^ u8::try_from(number % 251).unwrap()).collect();
    let bytes: Vec<u8> = pattern.into_iter().cycle().take(512).collect::<Vec<u8>>().repeat(len.div_ceil(512));
    let bytes = bytes[..len].to_vec();
    ChunkData {
        migration: MigrationId([1; 16]),
        epoch: Epoch(1),
        chunk: ChunkId(number),
        version: Version(number.into()),
        purpose,
        body: Body::Blocks { mask: BlockMask(u64::MAX), bytes },
    }
}

async fn message(link: &mut PeerLink) -> Message {
    match link.rx.recv().await {
        Some(LinkEvent::Message(message)) => message,
        other => panic!("{other:?}"),
    }
}

async fn closed(link: &mut PeerLink) -> CloseReason {
    loop {
        match link.rx.recv().await {
            Some(LinkEvent::Closed(reason)) => return reason,
            Some(LinkEvent::Message(_)) => {}
            None => panic!("a link ended without a reason"),
        }
    }
}

/// Forwards `count` connections to `target`, until it is told to cut them all.
async fn cable(target: SocketAddr, count: usize) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let socket = TcpListener::bind(localhost()).await.unwrap();
    let address = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut wires = tokio::task::JoinSet::new();
        for _ in 0..count {
            let (mut near, _) = socket.accept().await.unwrap();
            let mut far = TcpStream::connect(target).await.unwrap();
            wires.spawn(async move {
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
        wires.join_all().await;
    });
    (address, task)
}

#[tokio::test]
async fn messages_and_chunks_cross_over_several_streams() {
    bounded(async {
        let mut listener = listen(ListenParams::default()).await;
        let (mut source, mut destination) = pair(&mut listener, &streams(4)).await;
        assert_eq!(source.agreed, destination.agreed);
        for number in 0..40 {
            source.tx.send_data(chunk(number, Purpose::Push, 256 << 10)).unwrap();
        }
        source.tx.send(Message::Cancel).unwrap();
        let mut missing: BTreeSet<u32> = (0..40).collect();
        let mut cancelled = false;
        while !(missing.is_empty() && cancelled) {
            match message(&mut destination).await {
                Message::Chunk(data) => {
                    assert_eq!(data, chunk(data.chunk.0, Purpose::Push, 256 << 10));
                    assert!(missing.remove(&data.chunk.0));
                    let entries = vec![(data.chunk, data.version)];
                    destination.tx.send(Message::Ack { entries }).unwrap();
                }
                other => {
                    assert_eq!(other, Message::Cancel);
                    cancelled = true;
                }
            }
        }
        for _ in 0..40 {
            assert!(matches!(message(&mut source).await, Message::Ack { .. }));
        }
        source.tx.writable().await;
        assert!(source.tx.stats().sent >= 40 * (256 << 10));
        assert!(destination.tx.stats().received >= 40 * (256 << 10));
        assert_eq!(source.tx.data_backlog(), 0);
    })
    .await;
}

#[tokio::test]
async fn control_messages_keep_their_order() {
    bounded(async {
        let mut listener = listen(ListenParams::default()).await;
        let (source, mut destination) = pair(&mut listener, &streams(1)).await;
        let of = |first| {
            let standing = Standing::Remaining { count: 1 };
            let entry = Announcement { first: ChunkId(first), run: 1, standing };
            Message::Announce { entries: vec![entry; MAX_ENTRIES] }
        };
        // More than sockets and channels hold: the queue takes it, `writable` says when it has drained.
        for first in 0..100 {
            source.tx.send(of(first)).unwrap();
        }
        for first in 0..100 {
            assert_eq!(message(&mut destination).await, of(first));
        }
        source.tx.writable().await;
        assert!(source.tx.is_writable());
    })
    .await;
}

#[tokio::test]
async fn a_cut_closes_both_ends_and_the_next_link_is_whole() {
    bounded(async {
        let mut listener = listen(ListenParams::default()).await;
        let (address, cable) = cable(listener.local_addr(), 3).await;
        let mut source = connect(&address.to_string(), &streams(2)).await.unwrap();
        let mut destination = listener.accept().await.unwrap();
        for number in 0..200 {
            source.tx.send_data(chunk(number, Purpose::Push, 256 << 10)).unwrap();
        }
        assert!(matches!(message(&mut destination).await, Message::Chunk(_)));
        cable.abort();
        assert!(matches!(closed(&mut source).await, CloseReason::Peer | CloseReason::Io(_)));
        assert!(matches!(closed(&mut destination).await, CloseReason::Peer | CloseReason::Io(_)));
        assert!(source.rx.recv().await.is_none(), "nothing follows a close");
        assert_eq!(source.tx.send(Message::Cancel), Err(SendError::Closed));
        assert_eq!(source.tx.send_data(chunk(0, Purpose::Push, 1)), Err(SendError::Closed));
        assert_eq!(source.tx.data_backlog(), 0, "a closed link drops its queue");
        source.tx.writable().await;

        let (again, mut other) = pair(&mut listener, &streams(2)).await;
        again.tx.send(Message::Cancelled).unwrap();
        assert_eq!(message(&mut other).await, Message::Cancelled, "nothing of the old link");
    })
    .await;
}

#[tokio::test]
async fn last_words_arrive_before_a_close() {
    bounded(async {
        let mut listener = listen(ListenParams::default()).await;
        let (mut source, mut destination) = pair(&mut listener, &streams(2)).await;
        let refuse = Message::Refuse { reason: Refusal::Geometry, text: "sizes differ".to_owned() };
        // Unread messages of the source must not turn the close into a reset that overtakes the refusal.
        for number in 0..50 {
            source.tx.send(Message::Synced { epoch: Epoch(number) }).unwrap();
        }
        destination.tx.send(refuse.clone()).unwrap();
        destination.tx.close();
        assert_eq!(destination.tx.send(Message::Cancel), Err(SendError::Closed));
        assert_eq!(message(&mut source).await, refuse);
        assert_eq!(closed(&mut source).await, CloseReason::Peer);
        assert_eq!(closed(&mut destination).await, CloseReason::Local);
    })
    .await;
}

#[tokio::test]
async fn who_drops_its_end_is_seen_to_go() {
    bounded(async {
        let mut listener = listen(ListenParams::default()).await;
        let (mut source, destination) = pair(&mut listener, &streams(2)).await;
        destination.tx.send(Message::Cancelled).unwrap();
        drop(destination);
        assert_eq!(message(&mut source).await, Message::Cancelled);
        assert_eq!(closed(&mut source).await, CloseReason::Peer);

        // In the middle of chunks that nobody reads.
        let (mut source, destination) = pair(&mut listener, &streams(2)).await;
        for number in 0..100 {
            source.tx.send_data(chunk(number, Purpose::Push, 1 << 20)).unwrap();
        }
        drop(destination);
        assert!(matches!(closed(&mut source).await, CloseReason::Peer | CloseReason::Io(_)));
        assert_eq!(source.tx.data_backlog(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_demanded_chunk_overtakes_everything_that_waits() {
    bounded(async {
        let mut listener = listen(ListenParams::default()).await;
        // A cap that lets nothing through any more: what waits, waits in the queue and nowhere else.
        let throttle = Throttle::new(1);
        throttle.take(1 << 30);
        let link = LinkOptions { throttle: throttle.clone(), ..LinkOptions::default() };
        let params = ConnectParams { link, ..streams(2) };
        let (source, mut destination) = pair(&mut listener, &params).await;
        for number in 0..50 {
            source.tx.send_data(chunk(number, Purpose::Push, 256 << 10)).unwrap();
        }
        for number in 50..100 {
            source.tx.send_data(chunk(number, Purpose::Prefetch, 256 << 10)).unwrap();
        }
        tokio::task::yield_now().await;
        source.tx.send_data(chunk(100, Purpose::Demand, 256 << 10)).unwrap();
        // Neither the cap nor the queue stops it; the rest does not move until the cap is lifted.
        let Message::Chunk(first) = message(&mut destination).await else { panic!() };
        assert_eq!(first, chunk(100, Purpose::Demand, 256 << 10));
        assert!(source.tx.data_backlog() >= 100 * (256 << 10));
        assert!(!source.tx.is_writable());
        throttle.set_rate(0);
        let mut order = Vec::new();
        for _ in 0..100 {
            let Message::Chunk(data) = message(&mut destination).await else { panic!() };
            order.push(data.purpose);
        }
        // Two streams: a prefetched chunk may arrive on one while the other is ahead by as much as sockets hold.
        let first_push = order.iter().position(|purpose| *purpose == Purpose::Push).unwrap();
        assert!(first_push > 0, "prefetched chunks go ahead of pushed ones");
        let prefetched = order[..50].iter().filter(|purpose| **purpose == Purpose::Prefetch).count();
        assert!(prefetched > 40, "{prefetched} of the first 50 chunks were prefetched ones");
        source.tx.writable().await;
    })
    .await;
}

#[tokio::test]
async fn a_demanded_chunk_does_not_wait_behind_what_the_socket_holds() {
    bounded(async {
        let mut listener = listen(ListenParams::default()).await;
        let (source, mut destination) = pair(&mut listener, &streams(1)).await;
        // The destination does not read for now: everything backs up.
        for number in 0..400 {
            source.tx.send_data(chunk(number, Purpose::Push, 256 << 10)).unwrap();
        }
        let mut before = usize::MAX;
        while source.tx.data_backlog() < before {
            before = source.tx.data_backlog();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(!source.tx.is_writable());
        source.tx.send_data(chunk(400, Purpose::Demand, 256 << 10)).unwrap();
        let mut ahead = 0;
        loop {
            let Message::Chunk(data) = message(&mut destination).await else { panic!() };
            if data.purpose == Purpose::Demand {
                break;
            }
            ahead += 1;
        }
        assert!(ahead < 200, "{ahead} of 400 chunks were ahead");
    })
    .await;
}

#[tokio::test]
async fn silence_is_noticed_and_pings_are_answered() {
    bounded(async {
        let quick = LinkOptions {
            keepalive: Duration::from_millis(20),
            dead_after: Duration::from_millis(400),
            ..LinkOptions::default()
        };
        let mut listener = listen(ListenParams { link: quick.clone(), ..ListenParams::default() }).await;
        let params = ConnectParams { link: quick.clone(), ..streams(1) };
        let (source, destination) = pair(&mut listener, &params).await;
        while source.tx.stats().round_trip.is_none() || destination.tx.stats().round_trip.is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // A peer that joins and then says nothing at all.
        let address = listener.local_addr();
        let mut mute = Vec::new();
        for kind in [StreamKind::Control, StreamKind::Data(0)] {
            mute.push(stranger(address, Some(&preamble(kind, 1, 9))).await);
        }
        let mut link = listener.accept().await.unwrap();
        assert_eq!(closed(&mut link).await, CloseReason::Silent(quick.dead_after));
        assert!(!source.tx.is_closed() && !destination.tx.is_closed(), "idle, but not silent");
    })
    .await;
}

/// A daemon that was stopped for longer than its patience has not heard anything, but nobody was silent.
#[tokio::test]
async fn a_stalled_daemon_does_not_take_its_peer_for_dead() {
    bounded(async {
        let quick = LinkOptions {
            keepalive: Duration::from_millis(50),
            dead_after: Duration::from_secs(1),
            ..LinkOptions::default()
        };
        let mut listener = listen(ListenParams { link: quick.clone(), ..ListenParams::default() }).await;
        let params = ConnectParams { link: quick, ..streams(1) };
        let (source, mut destination) = pair(&mut listener, &params).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        std::thread::sleep(Duration::from_millis(1500));
        tokio::time::sleep(Duration::from_millis(100)).await;
        source.tx.send(Message::Cancel).unwrap();
        assert_eq!(message(&mut destination).await, Message::Cancel);
    })
    .await;
}

fn preamble(stream: StreamKind, streams: u8, token: u8) -> Preamble {
    Preamble { terms: Terms::OURS, stream, streams, answer: None, token: [token; 16] }
}

async fn stranger(address: SocketAddr, first: Option<&Preamble>) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    if let Some(preamble) = first {
        stream.write_all(&preamble.encode()).await.unwrap();
    }
    stream
}

async fn verdict(stream: &mut TcpStream) -> Verdict {
    let mut bytes = [0; 64];
    stream.read_exact(&mut bytes).await.unwrap();
    Preamble::decode(&bytes).unwrap().answer.unwrap()
}

/// Reads until the other side closes; what came before that does not matter.
async fn hung_up(stream: &mut TcpStream) {
    let mut sink = vec![0; 4096];
    while !matches!(stream.read(&mut sink).await, Ok(0) | Err(_)) {}
}

#[tokio::test]
async fn garbage_costs_its_own_connection_only() {
    bounded(async {
        let mut listener = listen(ListenParams::default()).await;
        let address = listener.local_addr();
        for garbage in [
            &[0u8; 64][..],
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n ...............................................",
        ] {
            let mut stream = stranger(address, None).await;
            stream.write_all(garbage).await.unwrap();
            hung_up(&mut stream).await;
        }
        let mut broken = preamble(StreamKind::Control, 1, 3).encode();
        broken[20] ^= 1;
        let mut stream = stranger(address, None).await;
        stream.write_all(&broken).await.unwrap();
        hung_up(&mut stream).await;

        // Garbage behind a good preamble closes that link, and says why.
        let mut control = stranger(address, Some(&preamble(StreamKind::Control, 1, 4))).await;
        let mut data = stranger(address, Some(&preamble(StreamKind::Data(0), 1, 4))).await;
        assert_eq!(verdict(&mut control).await, Verdict::Accepted);
        assert_eq!(verdict(&mut data).await, Verdict::Accepted);
        let mut link = listener.accept().await.unwrap();
        control.write_all(&[0xaa; 100]).await.unwrap();
        let reason = closed(&mut link).await;
        assert_eq!(reason, CloseReason::Protocol(WireError::Checksum { what: "frame header" }));
        hung_up(&mut data).await;

        let (source, mut destination) = pair(&mut listener, &streams(2)).await;
        source.tx.send(Message::Cancel).unwrap();
        assert_eq!(message(&mut destination).await, Message::Cancel);
    })
    .await;
}

#[tokio::test]
async fn only_chunks_travel_on_data_streams() {
    bounded(async {
        let mut listener = listen(ListenParams::default()).await;
        let address = listener.local_addr();
        let _control = stranger(address, Some(&preamble(StreamKind::Control, 1, 4))).await;
        let mut data = stranger(address, Some(&preamble(StreamKind::Data(0), 1, 4))).await;
        let mut link = listener.accept().await.unwrap();
        data.write_all(&codec::encode(Message::Cancel).unwrap().head).await.unwrap();
        let reason = closed(&mut link).await;
        assert_eq!(reason, CloseReason::Protocol(WireError::Misplaced { what: "Cancel" }));
    })
    .await;
}

#[tokio::test]
async fn slow_joiners_do_not_hold_up_others_and_are_dropped() {
    bounded(async {
        let params = ListenParams { join_timeout: Duration::from_secs(1), ..ListenParams::default() };
        let mut listener = listen(params).await;
        let address = listener.local_addr();
        let mut mute = stranger(address, None).await;
        let mut half = stranger(address, Some(&preamble(StreamKind::Control, 2, 5))).await;
        let mut other = stranger(address, Some(&preamble(StreamKind::Data(1), 2, 5))).await;
        let (source, mut destination) = pair(&mut listener, &streams(2)).await;
        source.tx.send(Message::Cancel).unwrap();
        assert_eq!(message(&mut destination).await, Message::Cancel);
        for stream in [&mut mute, &mut half, &mut other] {
            hung_up(stream).await;
        }
    })
    .await;
}

#[tokio::test]
async fn half_joined_connections_are_bounded() {
    bounded(async {
        let mut listener = listen(ListenParams { max_joins: 2, ..ListenParams::default() }).await;
        let address = listener.local_addr();
        let mut first = stranger(address, Some(&preamble(StreamKind::Control, 1, 1))).await;
        let _second = stranger(address, Some(&preamble(StreamKind::Control, 1, 2))).await;
        // The same stream twice, and one that counts differently: refused, the connection goes on waiting.
        let mut twice = stranger(address, Some(&preamble(StreamKind::Control, 1, 1))).await;
        assert_eq!(verdict(&mut twice).await, Verdict::Streams);
        let mut third = stranger(address, Some(&preamble(StreamKind::Control, 1, 3))).await;
        assert_eq!(verdict(&mut third).await, Verdict::Crowded);
        let mut differs = stranger(address, Some(&preamble(StreamKind::Data(0), 2, 1))).await;
        assert_eq!(verdict(&mut differs).await, Verdict::Streams);
        let mut data = stranger(address, Some(&preamble(StreamKind::Data(0), 1, 1))).await;
        assert_eq!(verdict(&mut data).await, Verdict::Accepted);
        assert_eq!(verdict(&mut first).await, Verdict::Accepted);
        assert!(listener.accept().await.is_some());
    })
    .await;
}

#[tokio::test]
async fn strangers_are_bounded() {
    bounded(async {
        let mut listener = listen(ListenParams { max_strangers: 3, ..ListenParams::default() }).await;
        let address = listener.local_addr();
        let mut first = stranger(address, None).await;
        let _second = stranger(address, None).await;
        let _third = stranger(address, None).await;
        let mut fourth = stranger(address, None).await;
        hung_up(&mut fourth).await;
        first.write_all(&[0; 64]).await.unwrap();
        hung_up(&mut first).await;
        drop((_second, _third));
        // Their places are free again as soon as the listener has seen them go.
        let address = address.to_string();
        let source = loop {
            match connect(&address, &streams(1)).await {
                Ok(source) => break source,
                Err(error) => assert!(matches!(error, ConnectError::NoAnswer { .. }), "{error}"),
            }
        };
        assert!(listener.accept().await.is_some());
        drop(source);
    })
    .await;
}

#[tokio::test]
async fn another_version_is_refused_with_what_would_do() {
    bounded(async {
        let listener = listen(ListenParams::default()).await;
        let versions = VersionRange { min: 7, max: 9 };
        let terms = Terms { versions, ..Terms::OURS };
        let first = Preamble { terms, ..preamble(StreamKind::Control, 1, 1) };
        let mut stream = stranger(listener.local_addr(), Some(&first)).await;
        assert_eq!(verdict(&mut stream).await, Verdict::Terms);
        hung_up(&mut stream).await;

        // The same from the connecting side: a listener of the future.
        let socket = TcpListener::bind(localhost()).await.unwrap();
        let address = socket.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = socket.accept().await {
                let mut bytes = [0; 64];
                stream.read_exact(&mut bytes).await.unwrap();
                let asked = Preamble::decode(&bytes).unwrap();
                let answer = Preamble { terms, answer: Some(Verdict::Terms), ..asked };
                stream.write_all(&answer.encode()).await.unwrap();
            }
        });
        let error = connect(&address, &streams(1)).await.unwrap_err();
        let expected = NegotiateError::PeerTooNew { theirs: 7, ours: 1 };
        assert!(matches!(&error, ConnectError::Terms { error, .. } if *error == expected), "{error}");
    })
    .await;
}

#[tokio::test]
async fn connecting_to_what_is_no_peer_says_so() {
    bounded(async {
        let socket = TcpListener::bind(localhost()).await.unwrap();
        let address = socket.local_addr().unwrap();
        let server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = socket.accept().await {
                stream.write_all(&[b'x'; 64]).await.unwrap();
                hung_up(&mut stream).await;
            }
        });
        let error = connect(&address.to_string(), &streams(1)).await.unwrap_err();
        assert!(matches!(error, ConnectError::Wire { error: WireError::Magic, .. }), "{error}");
        server.abort();
        let _ = server.await;
        let error = connect(&address.to_string(), &streams(1)).await.unwrap_err();
        assert!(matches!(error, ConnectError::Connect { .. }), "{error}");
        let error = connect("127.0.0.1:1", &streams(0)).await.unwrap_err();
        assert!(matches!(error, ConnectError::Streams(0)), "{error}");
    })
    .await;
}

/// An authority that signs certificates for 127.0.0.1.
struct Authority {
    issuer: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        let key = rcgen::KeyPair::generate().unwrap();
        Self { issuer: rcgen::CertifiedIssuer::self_signed(params, key).unwrap() }
    }

    /// Fills `dir` in QEMU's layout.
    fn fill(&self, dir: &Path) {
        std::fs::write(dir.join("ca-cert.pem"), self.issuer.pem()).unwrap();
        for (side, serial) in [("server", 1u64), ("client", 2)] {
            let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
            params.serial_number = Some(serial.into());
            let key = rcgen::KeyPair::generate().unwrap();
            let cert = params.signed_by(&key, &self.issuer).unwrap();
            std::fs::write(dir.join(format!("{side}-cert.pem")), cert.pem()).unwrap();
            std::fs::write(dir.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
        }
    }

    /// Writes a list that revokes the client's certificate.
    fn revoke_client(&self, dir: &Path) {
        let revoked = rcgen::RevokedCertParams {
            serial_number: 2u64.into(),
            revocation_time: rcgen::date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = rcgen::CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2024, 1, 1),
            next_update: rcgen::date_time_ymd(2100, 1, 1),
            crl_number: 1u64.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        std::fs::write(dir.join("ca-crl.pem"), list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
    }
}

fn with_tls(client: TlsClient) -> ConnectParams {
    ConnectParams { tls: Some(client), ..streams(2) }
}

#[tokio::test]
async fn tls_takes_those_whom_the_authority_knows_and_nobody_else() {
    bounded(async {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let authority = Authority::new("ours");
        authority.fill(ours.path());
        Authority::new("theirs").fill(theirs.path());
        let server = TlsServer::from_dir(ours.path()).unwrap();
        let mut listener = listen(ListenParams { tls: Some(server), ..ListenParams::default() }).await;
        let address = listener.local_addr().to_string();

        let good = with_tls(TlsClient::from_dir(ours.path()).unwrap());
        let (source, mut destination) = pair(&mut listener, &good).await;
        source.tx.send_data(chunk(1, Purpose::Push, 4 << 20)).unwrap();
        assert_eq!(message(&mut destination).await, Message::Chunk(chunk(1, Purpose::Push, 4 << 20)));
        source.tx.close();
        assert_eq!(closed(&mut destination).await, CloseReason::Peer);

        let error =
            connect(&address, &with_tls(TlsClient::from_dir(theirs.path()).unwrap())).await.unwrap_err();
        assert!(matches!(error, ConnectError::Tls { .. }), "{error}");
        assert!(error.to_string().contains("UnknownIssuer"), "{error}");
        let nameless = with_tls(TlsClient::anonymous(ours.path()).unwrap());
        let error = connect(&address, &nameless).await.unwrap_err();
        assert!(matches!(error, ConnectError::NoAnswer { .. } | ConnectError::Tls { .. }), "{error}");
        let error = connect(&address, &streams(2)).await.unwrap_err();
        assert!(matches!(error, ConnectError::NoAnswer { .. } | ConnectError::Wire { .. }), "{error}");
        // The authority is the same, but the certificate is not for this name.
        let other_name = format!("localhost:{}", listener.local_addr().port());
        let error = connect(&other_name, &good).await.unwrap_err();
        assert!(matches!(error, ConnectError::Tls { .. }), "{error}");

        let (source, mut destination) = pair(&mut listener, &good).await;
        source.tx.send(Message::Cancel).unwrap();
        assert_eq!(message(&mut destination).await, Message::Cancel, "the listener is as good as before");
    })
    .await;
}

#[tokio::test]
async fn a_stranger_with_a_certificate_of_another_authority_is_refused_by_the_listener_too() {
    bounded(async {
        let (ours, mixed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let authority = Authority::new("ours");
        authority.fill(ours.path());
        // Trusts our authority, but shows a certificate that another one signed.
        Authority::new("theirs").fill(mixed.path());
        std::fs::copy(ours.path().join("ca-cert.pem"), mixed.path().join("ca-cert.pem")).unwrap();
        let server = TlsServer::from_dir(ours.path()).unwrap();
        let listener = listen(ListenParams { tls: Some(server), ..ListenParams::default() }).await;
        let address = listener.local_addr().to_string();
        let error =
            connect(&address, &with_tls(TlsClient::from_dir(mixed.path()).unwrap())).await.unwrap_err();
        assert!(matches!(error, ConnectError::NoAnswer { .. } | ConnectError::Tls { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_revoked_certificate_is_refused() {
    bounded(async {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new("ours");
        authority.fill(dir.path());
        let client = TlsClient::from_dir(dir.path()).unwrap();
        authority.revoke_client(dir.path());
        let server = TlsServer::from_dir(dir.path()).unwrap();
        let listener = listen(ListenParams { tls: Some(server), ..ListenParams::default() }).await;
        let error = connect(&listener.local_addr().to_string(), &with_tls(client)).await.unwrap_err();
        assert!(matches!(error, ConnectError::NoAnswer { .. } | ConnectError::Tls { .. }), "{error}");
    })
    .await;
}

#[test]
fn what_is_wrong_with_a_tls_folder_is_said_with_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let error = TlsServer::from_dir(dir.path()).unwrap_err();
    assert!(matches!(error, TlsError::File { .. }) && error.to_string().contains("ca-cert.pem"), "{error}");
    Authority::new("ours").fill(dir.path());
    std::fs::remove_file(dir.path().join("client-key.pem")).unwrap();
    let error = TlsClient::from_dir(dir.path()).unwrap_err();
    assert!(error.to_string().contains("client-key.pem"), "{error}");
    assert!(TlsServer::from_dir(dir.path()).is_ok(), "a listener needs no client files");
    std::fs::write(dir.path().join("server-cert.pem"), "nothing").unwrap();
    let error = TlsServer::from_dir(dir.path()).unwrap_err();
    assert!(error.to_string().contains("server-cert.pem"), "{error}");
}
