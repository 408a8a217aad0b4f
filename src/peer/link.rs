// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A complete link: what the driver of a session holds, and the tasks that move its bytes.
//!
//! Each stream has a task that reads and one that writes; one more watches over them all. Whichever ends first ends the
//! link. The control reader then gets a moment to deliver what the peer had said before it went away (a refusal
//! with its reason is worth more than "connection reset"), then the driver is told once, by [`LinkEvent::Closed`].
//!
//! A peer is alive while anything comes on its control stream; it sends a `Ping` when it has had nothing to say for a
//! while. The clock of that runs only while this side is reading: a driver that is busy for long must not take its
//! own silence for the peer's.

use super::queue::{Batch, ControlQueue, DataQueue, Item};
use super::stream::{Cursor, Reader, Stream, StreamError, Writer, read_message};
use super::throttle::{SLICE, Throttle};
use crate::core::message::{ChunkData, Message, Purpose};
use crate::wire::WireError;
use crate::wire::codec;
use crate::wire::negotiate::Agreed;
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Events that wait for the driver; then the streams are not read any more.
const EVENTS: usize = 16;
/// Bytes of control messages that are written in one go.
const CONTROL_BATCH: usize = 64 << 10;
/// Bytes of control messages above which a link is not writable.
const CONTROL_HIGH_WATER: usize = 1 << 20;
/// Bytes of control messages above which pings are not answered any more: who floods does not read either.
const CONTROL_FLOOD: usize = 4 << 20;
/// How long a link that ends waits for the last words of either side.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How a link behaves.
#[derive(Debug, Clone)]
pub struct LinkOptions {
    /// After this much silence of its own, a side sends a `Ping`.
    pub keepalive: Duration,
    /// After this much silence, the peer is dead.
    pub dead_after: Duration,
    /// Bytes of waiting chunks above which [`LinkSender::writable`] waits.
    pub high_water: usize,
    /// The daemon's cap.
    pub throttle: Throttle,
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self {
            keepalive: Duration::from_secs(2),
            dead_after: Duration::from_secs(6),
            high_water: 4 << 20,
            throttle: Throttle::default(),
        }
    }
}

/// What happens on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// The peer said this.
    Message(Message),
    /// The link is gone. Nothing follows.
    Closed(CloseReason),
}

/// Why a link was closed.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum CloseReason {
    /// This side closed it.
    #[error("closed by this side")]
    Local,
    /// The peer closed it.
    #[error("closed by the peer")]
    Peer,
    /// Nothing was heard from the peer for this long.
    #[error("nothing was heard from the peer for {0:?}")]
    Silent(Duration),
    /// A socket failed.
    #[error("the connection failed: {0}")]
    Io(String),
    /// What the peer sent is not the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(WireError),
}

impl From<StreamError> for CloseReason {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Io(error) => Self::Io(error.to_string()),
            StreamError::Wire(error) => Self::Protocol(error),
            StreamError::Silent(time) => Self::Silent(time),
        }
    }
}

/// Why a message was not queued.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum SendError {
    /// The link is closed: [`LinkEvent::Closed`] has come or will.
    #[error("the link is closed")]
    Closed,
    /// The message is above the limits of the protocol.
    #[error("a message cannot be sent: {0}")]
    Refused(#[from] WireError),
}

/// Bytes on the wire so far (frames, without TCP and TLS) and the last round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkStats {
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    /// Time between the last answered `Ping` and its answer.
    pub round_trip: Option<Duration>,
}

/// One end of a link.
#[derive(Debug)]
pub struct PeerLink {
    /// Where messages go; may be cloned.
    pub tx: LinkSender,
    /// What happens. Dropping it closes the link.
    pub rx: mpsc::Receiver<LinkEvent>,
    /// The other end.
    pub peer: SocketAddr,
    /// What both speak.
    pub agreed: Agreed,
}

/// The sending side of a link. Nothing here waits but [`LinkSender::writable`].
#[derive(Debug, Clone)]
pub struct LinkSender {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    control: ControlQueue,
    data: DataQueue,
    options: LinkOptions,
    finish: watch::Sender<bool>,
    sent: AtomicU64,
    received: AtomicU64,
    ping: Mutex<PingState>,
}

#[derive(Debug, Default)]
struct PingState {
    number: u64,
    sent: Option<Instant>,
    round_trip: Option<Duration>,
}

impl LinkSender {
    /// Queues a message on the control stream, behind the earlier ones; a chunk goes to [`LinkSender::send_data`].
    ///
    /// # Errors
    /// [`SendError::Closed`] when the link is, [`SendError::Refused`] when no peer would take the message.
    pub fn send(&self, message: Message) -> Result<(), SendError> {
        if let Message::Chunk(chunk) = message {
            return self.send_data(chunk);
        }
        let frame = codec::encode(message)?;
        if self.shared.control.put(frame.head) { Ok(()) } else { Err(SendError::Closed) }
    }

    /// Queues a chunk for the data stream that is free first; demanded chunks go ahead of prefetched ones, and those
    /// ahead of pushed ones. Between chunks of one purpose on several streams there is no order.
    ///
    /// # Errors
    /// As [`LinkSender::send`].
    pub fn send_data(&self, chunk: ChunkData) -> Result<(), SendError> {
        let purpose = chunk.purpose;
        let frame = codec::encode(Message::Chunk(chunk))?;
        if self.shared.data.put(Item { frame, purpose }) { Ok(()) } else { Err(SendError::Closed) }
    }

    /// Bytes of chunks that have been queued and not yet handed to the kernel.
    #[must_use]
    pub fn data_backlog(&self) -> usize {
        self.shared.data.backlog()
    }

    /// Returns when little enough is queued ([`LinkOptions::high_water`]; 1 MiB of control messages), or when the
    /// link is closed.
    pub async fn writable(&self) {
        self.shared.control.below(CONTROL_HIGH_WATER).await;
        self.shared.data.below(self.shared.options.high_water).await;
    }

    /// Whether [`LinkSender::writable`] would return at once.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.is_closed()
            || (self.shared.control.backlog() < CONTROL_HIGH_WATER
                && self.data_backlog() < self.shared.options.high_water)
    }

    /// Closes the link: control messages that are queued still go out, chunks do not.
    pub fn close(&self) {
        self.shared.finish();
    }

    /// Whether the link takes nothing more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.control.is_finished()
    }

    /// Bytes on the wire and the round trip.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        LinkStats {
            sent: self.shared.sent.load(Ordering::Relaxed),
            received: self.shared.received.load(Ordering::Relaxed),
            round_trip: self.shared.ping.lock().round_trip,
        }
    }
}

impl PeerLink {
    /// Starts the tasks of a link whose streams have all joined.
    pub(super) fn start(
        control: Stream,
        data: Vec<Stream>,
        peer: SocketAddr,
        agreed: Agreed,
        options: &LinkOptions,
    ) -> Self {
        let shared = Arc::new(Shared {
            control: ControlQueue::default(),
            data: DataQueue::default(),
            options: options.clone(),
            finish: watch::Sender::new(false),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            ping: Mutex::default(),
        });
        let (events, rx) = mpsc::channel(EVENTS);
        tokio::spawn(watch_over(shared.clone(), control, data, events));
        Self { tx: LinkSender { shared }, rx, peer, agreed }
    }
}

impl Shared {
    fn finish(&self) {
        self.control.finish();
        self.data.close();
        self.finish.send_replace(true);
    }

    fn count_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn count_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn put_ping(&self) {
        let mut ping = self.ping.lock();
        ping.number += 1;
        ping.sent = Some(Instant::now());
        self.put_own(Message::Ping(ping.number));
    }

    fn pong(&self, number: u64) {
        let mut ping = self.ping.lock();
        if number == ping.number
            && let Some(sent) = ping.sent.take()
        {
            ping.round_trip = Some(sent.elapsed());
        }
    }

    /// Queues a message of the link's own; lost when the link is closed, which is all right.
    fn put_own(&self, message: Message) {
        if self.control.backlog() < CONTROL_FLOOD
            && let Ok(frame) = codec::encode(message)
        {
            self.control.put(frame.head);
        }
    }
}

/// How a task of a link ended.
enum Ended {
    /// The control reader: nothing more can come.
    Heard(CloseReason),
    /// The control writer has written everything after a [`LinkSender::close`].
    Said,
    /// A stream is of no more use.
    Broken(CloseReason),
}

async fn watch_over(
    shared: Arc<Shared>,
    control: Stream,
    data: Vec<Stream>,
    events: mpsc::Sender<LinkEvent>,
) {
    let mut tasks = JoinSet::new();
    let (reader, writer) = control.split();
    tasks.spawn(read_control(shared.clone(), reader, events.clone()));
    tasks.spawn(write_control(shared.clone(), writer));
    for stream in data {
        let (reader, writer) = stream.split();
        tasks.spawn(read_data(shared.clone(), reader, events.clone()));
        tasks.spawn(write_data(shared.clone(), writer));
    }
    let reason = first_end(&shared, &mut tasks, &events).await;
    shared.finish();
    tasks.shutdown().await;
    shared.data.abandon();
    log::debug!("link: {reason}");
    // Fails only when the driver has dropped its receiver: then it does not want to know.
    let _ = events.send(LinkEvent::Closed(reason)).await;
}

/// Waits until a link is over, and for its last words.
async fn first_end(
    shared: &Shared,
    tasks: &mut JoinSet<Ended>,
    events: &mpsc::Sender<LinkEvent>,
) -> CloseReason {
    let mut finish = shared.finish.subscribe();
    let first = tokio::select! {
        ended = next_end(tasks) => match ended {
            Ended::Heard(reason) => return reason,
            Ended::Said => CloseReason::Local,
            Ended::Broken(reason) => reason,
        },
        // Fails only when the sender is gone, which `shared` holds.
        _ = finish.wait_for(|finish| *finish) => CloseReason::Local,
        () = events.closed() => CloseReason::Local,
    };
    shared.finish();
    let heard = async { while !matches!(next_end(tasks).await, Ended::Heard(_)) {} };
    let _ = tokio::time::timeout(LAST_WORDS, heard).await;
    first
}

async fn next_end(tasks: &mut JoinSet<Ended>) -> Ended {
    match tasks.join_next().await {
        Some(Ok(ended)) => ended,
        Some(Err(error)) => Ended::Broken(CloseReason::Io(error.to_string())),
        None => Ended::Heard(CloseReason::Local),
    }
}

async fn read_control(shared: Arc<Shared>, mut reader: Reader, events: mpsc::Sender<LinkEvent>) -> Ended {
    let patience = Some(shared.options.dead_after);
    loop {
        let (message, len) = match read_message(&mut reader, patience, false).await {
            Ok(Some(read)) => read,
            Ok(None) => return Ended::Heard(CloseReason::Peer),
            Err(error) => return Ended::Heard(error.into()),
        };
        shared.count_received(len);
        match message {
            Message::Ping(number) => shared.put_own(Message::Pong(number)),
            Message::Pong(number) => shared.pong(number),
            // When nobody listens any more, the stream is still read to its end: closing a socket with unread
            // bytes would reset it, and could take this side's own last words from the peer.
            message => drop(events.send(LinkEvent::Message(message)).await),
        }
    }
}

async fn write_control(shared: Arc<Shared>, mut writer: Writer) -> Ended {
    loop {
        let written = match shared.control.take(CONTROL_BATCH) {
            Batch::Bytes(bytes) => {
                shared.count_sent(bytes.len());
                let written = write_all(&mut writer, &bytes).await;
                shared.control.written(bytes.len());
                written
            }
            Batch::Empty => {
                if tokio::time::timeout(shared.options.keepalive, shared.control.filled()).await.is_err() {
                    shared.put_ping();
                }
                Ok(())
            }
            Batch::Finished => {
                return match writer.shutdown().await {
                    Ok(()) => Ended::Said,
                    Err(error) => Ended::Broken(StreamError::from(error).into()),
                };
            }
        };
        if let Err(error) = written {
            return Ended::Broken(StreamError::from(error).into());
        }
    }
}

async fn write_all(writer: &mut Writer, bytes: &[u8]) -> std::io::Result<()> {
    writer.write_all(bytes).await?;
    writer.flush().await
}

async fn read_data(shared: Arc<Shared>, mut reader: Reader, events: mpsc::Sender<LinkEvent>) -> Ended {
    loop {
        match read_message(&mut reader, None, true).await {
            Ok(Some((message, len))) => {
                shared.count_received(len);
                // Fails only when nobody listens any more; the link is being closed then.
                let _ = events.send(LinkEvent::Message(message)).await;
            }
            Ok(None) => return Ended::Broken(CloseReason::Peer),
            Err(error) => return Ended::Broken(error.into()),
        }
    }
}

async fn write_data(shared: Arc<Shared>, mut writer: Writer) -> Ended {
    loop {
        let item = next_item(&shared).await;
        let written = write_item(&shared, &mut writer, &item).await;
        shared.data.written(item.frame.len());
        if let Err(error) = written {
            return Ended::Broken(StreamError::from(error).into());
        }
    }
}

/// Takes the next chunk only when it may be sent, so that one which is demanded meanwhile is taken instead.
async fn next_item(shared: &Shared) -> Item {
    loop {
        if shared.data.is_empty() {
            shared.data.filled().await;
            continue;
        }
        let only_demanded = urgent_before_ready(shared).await;
        if let Some(item) = shared.data.pop(only_demanded) {
            return item;
        }
    }
}

/// Waits for the throttle, but not while the guest waits for a queued chunk: then `true`.
async fn urgent_before_ready(shared: &Shared) -> bool {
    tokio::select! {
        biased;
        () = shared.options.throttle.ready() => false,
        () = shared.data.urgent() => true,
    }
}

async fn write_item(shared: &Shared, writer: &mut Writer, item: &Item) -> std::io::Result<()> {
    let throttle = &shared.options.throttle;
    let mut cursor = Cursor::new(&item.frame);
    while cursor.remaining() > 0 {
        let slice = if throttle.rate() == 0 { cursor.remaining() } else { SLICE.min(cursor.remaining()) };
        if item.purpose != Purpose::Demand {
            // A chunk that is half written makes way by being written out.
            urgent_before_ready(shared).await;
        }
        throttle.take(slice);
        cursor.write(writer, slice).await?;
        shared.count_sent(slice);
    }
    writer.flush().await
}
