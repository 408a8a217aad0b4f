// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The listening side (the destination): streams of strangers come in, complete links come out.
//!
//! Anybody can reach this port, so a stranger gets little: a bounded number of strangers has a bounded time each for
//! the TLS handshake and one preamble of fixed size; a bounded number of half-joined connections has a bounded time
//! to get complete. Whatever goes wrong costs that connection and one line in the log, never the listener.

use super::connect::DATA_PATIENCE;
use super::link::{LinkOptions, PeerLink};
use super::stream::{Stream, StreamError, prepare};
use super::tls::TlsServer;
use crate::wire::frame::{Preamble, StreamKind, Token, Verdict};
use crate::wire::negotiate::{Agreed, Terms, negotiate};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Complete links that wait for [`Listener::accept`].
const READY_LINKS: usize = 4;
/// Pause after the system could not give a connection (out of descriptors, for one).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How to listen.
#[derive(Debug, Clone)]
pub struct ListenParams {
    /// TLS, if it is to be used: then nothing else is taken.
    pub tls: Option<TlsServer>,
    /// How long a stranger may take to say who it is, and a connection to get complete.
    pub join_timeout: Duration,
    /// Streams at a time that belong to no link yet.
    pub max_strangers: usize,
    /// Connections at a time of which some streams have joined.
    pub max_joins: usize,
    /// How the links behave.
    pub link: LinkOptions,
}

impl Default for ListenParams {
    fn default() -> Self {
        Self {
            tls: None,
            join_timeout: Duration::from_secs(5),
            max_strangers: 64,
            max_joins: 8,
            link: LinkOptions::default(),
        }
    }
}

/// A listening socket and the task that serves it; dropping it stops both.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    links: mpsc::Receiver<PeerLink>,
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener {
    /// Listens on `address` (port 0: any free one).
    ///
    /// # Errors
    /// The system's, when the address cannot be had.
    pub async fn bind(address: SocketAddr, params: ListenParams) -> io::Result<Self> {
        let socket = TcpListener::bind(address).await?;
        let address = socket.local_addr()?;
        let (ready, links) = mpsc::channel(READY_LINKS);
        let task = tokio::spawn(serve(socket, Arc::new(params), ready));
        Ok(Self { address, links, task })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The next complete link. May be dropped and called again without loss. `None` only when the runtime is
    /// being shut down.
    pub async fn accept(&mut self) -> Option<PeerLink> {
        self.links.recv().await
    }
}

/// A stream that has said who it is.
struct Joiner {
    preamble: Preamble,
    agreed: Agreed,
    stream: Stream,
    peer: SocketAddr,
    /// A stranger's place, held until the connection is complete.
    _place: OwnedSemaphorePermit,
}

async fn serve(socket: TcpListener, params: Arc<ListenParams>, ready: mpsc::Sender<PeerLink>) {
    let places = Arc::new(Semaphore::new(params.max_strangers));
    let (known, mut joiners) = mpsc::channel(1);
    let mut table = JoinTable { params: params.clone(), ready, joins: HashMap::new() };
    loop {
        let deadline = table.next_deadline();
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((stream, peer)) => match places.clone().try_acquire_owned() {
                    Ok(place) => drop(tokio::spawn(meet(stream, peer, params.clone(), place, known.clone()))),
                    Err(_) => log::warn!("peer {peer}: refused, too many connections are being made"),
                },
                Err(error) => {
                    log::warn!("listener: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(joiner) = joiners.recv() => table.join(joiner),
            () = sleep_until(deadline) => table.expire(Instant::now()),
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Lets a stranger say who it is, in bounded time.
async fn meet(
    stream: TcpStream,
    peer: SocketAddr,
    params: Arc<ListenParams>,
    place: OwnedSemaphorePermit,
    known: mpsc::Sender<Joiner>,
) {
    match tokio::time::timeout(params.join_timeout, greet(stream, &params)).await {
        Ok(Ok((preamble, mut stream))) => match negotiate(&Terms::OURS, &preamble.terms) {
            Ok(agreed) => {
                // Fails only when the listener is gone.
                let _ = known.send(Joiner { preamble, agreed, stream, peer, _place: place }).await;
            }
            Err(error) => {
                log::warn!("peer {peer}: {error}");
                say(&mut stream, &preamble, Verdict::Terms, params.join_timeout).await;
            }
        },
        Ok(Err(error)) => log::warn!("peer {peer}: {error}"),
        Err(_) => log::warn!("peer {peer}: did not say who it is within {:?}", params.join_timeout),
    }
}

async fn greet(tcp: TcpStream, params: &ListenParams) -> Result<(Preamble, Stream), StreamError> {
    prepare(&tcp, DATA_PATIENCE)?;
    let mut stream = match &params.tls {
        None => Stream::Plain(tcp),
        Some(tls) => Stream::Tls(Box::new(tls.accept(tcp).await?)),
    };
    let preamble = stream.read_preamble().await?;
    if preamble.answer.is_some() {
        return Err(crate::wire::WireError::Value { what: "the answer flag of a first preamble" }.into());
    }
    Ok((preamble, stream))
}

/// Answers a preamble; a peer that is gone already does not hear it.
async fn say(stream: &mut Stream, asked: &Preamble, verdict: Verdict, limit: Duration) {
    let answer = Preamble { terms: Terms::OURS, answer: Some(verdict), ..*asked };
    match tokio::time::timeout(limit, stream.write_preamble(&answer)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("answer to a peer: {error}"),
        Err(_) => log::debug!("answer to a peer: not taken within {limit:?}"),
    }
}

/// A connection of which some streams have joined.
struct Join {
    deadline: Instant,
    streams: u8,
    peer: SocketAddr,
    control: Option<Joiner>,
    data: Vec<Joiner>,
}

impl Join {
    fn new(deadline: Instant, first: &Joiner) -> Self {
        let streams = first.preamble.streams;
        Self { deadline, streams, peer: first.peer, control: None, data: Vec::new() }
    }

    /// Whether `joiner` is of this connection and not there yet.
    fn wants(&self, joiner: &Joiner) -> bool {
        let taken = match joiner.preamble.stream {
            StreamKind::Control => self.control.is_some(),
            kind @ StreamKind::Data(_) => self.data.iter().any(|there| there.preamble.stream == kind),
        };
        !taken && joiner.preamble.streams == self.streams
    }

    fn add(&mut self, joiner: Joiner) {
        match joiner.preamble.stream {
            StreamKind::Control => self.control = Some(joiner),
            StreamKind::Data(_) => self.data.push(joiner),
        }
    }

    fn is_complete(&self) -> bool {
        self.control.is_some() && self.data.len() == usize::from(self.streams)
    }
}

struct JoinTable {
    params: Arc<ListenParams>,
    ready: mpsc::Sender<PeerLink>,
    joins: HashMap<Token, Join>,
}

impl JoinTable {
    fn next_deadline(&self) -> Option<Instant> {
        self.joins.values().map(|join| join.deadline).min()
    }

    fn expire(&mut self, now: Instant) {
        self.joins.retain(|_, join| {
            let keep = join.deadline > now;
            if !keep {
                let (joined, all) = (join.data.len() + usize::from(join.control.is_some()), join.streams + 1);
                log::warn!("peer {}: only {joined} of {all} streams joined in time", join.peer);
            }
            keep
        });
    }

    fn join(&mut self, joiner: Joiner) {
        let token = joiner.preamble.token;
        if !self.joins.contains_key(&token) && self.joins.len() >= self.params.max_joins {
            return self.refuse(vec![joiner], Verdict::Crowded);
        }
        let deadline = Instant::now() + self.params.join_timeout;
        let join = self.joins.entry(token).or_insert_with(|| Join::new(deadline, &joiner));
        if !join.wants(&joiner) {
            return self.refuse(vec![joiner], Verdict::Streams);
        }
        join.add(joiner);
        if join.is_complete()
            && let Some(join) = self.joins.remove(&token)
        {
            self.complete(join);
        }
    }

    fn refuse(&self, joiners: Vec<Joiner>, verdict: Verdict) {
        let limit = self.params.join_timeout;
        tokio::spawn(async move {
            for mut joiner in joiners {
                log::warn!("peer {}: refused: {verdict}", joiner.peer);
                say(&mut joiner.stream, &joiner.preamble, verdict, limit).await;
            }
        });
    }

    fn complete(&self, join: Join) {
        let Join { control: Some(mut control), data, .. } = join else { return };
        let Ok(place) = self.ready.clone().try_reserve_owned() else {
            return self.refuse(data.into_iter().chain([control]).collect(), Verdict::Crowded);
        };
        let params = self.params.clone();
        tokio::spawn(async move {
            let mut streams = Vec::new();
            for mut joiner in data {
                say(&mut joiner.stream, &joiner.preamble, Verdict::Accepted, params.join_timeout).await;
                streams.push(joiner.stream);
            }
            say(&mut control.stream, &control.preamble, Verdict::Accepted, params.join_timeout).await;
            let Joiner { stream, peer, agreed, .. } = control;
            log::info!("peer {peer}: connected with {} data streams", streams.len());
            place.send(PeerLink::start(stream, streams, peer, agreed, &params.link));
        });
    }
}
