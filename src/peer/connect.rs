// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The connecting side (the source): all streams at once, and a link when the listener has accepted each of them.
//!
//! The listener answers when all streams have joined, so a link that this side holds is complete on the other side
//! too. An error says whether the network, the certificates, the versions or the peer itself is in the way.

use super::link::{LinkOptions, PeerLink};
use super::stream::{Stream, StreamError, prepare};
use super::tls::TlsClient;
use crate::wire::WireError;
use crate::wire::frame::{MAX_STREAMS, Preamble, StreamKind, Token, Verdict};
use crate::wire::negotiate::{Agreed, NegotiateError, Terms, negotiate};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// How long a data stream's bytes may stay unacknowledged. Longer than the control stream's: a peer whose disk is
/// slow does not read for a while, and that must not look like a dead network.
pub(super) const DATA_PATIENCE: Duration = Duration::from_secs(30);

/// How to connect.
#[derive(Debug, Clone)]
pub struct ConnectParams {
    /// Data streams, 1 to 16.
    pub streams: u8,
    /// TLS, if it is to be used.
    pub tls: Option<TlsClient>,
    /// How long the whole connecting may take.
    pub timeout: Duration,
    /// How the link behaves.
    pub link: LinkOptions,
}

impl Default for ConnectParams {
    fn default() -> Self {
        Self {
            streams: crate::config::DEFAULT_CONNECTIONS,
            tls: None,
            timeout: Duration::from_secs(10),
            link: LinkOptions::default(),
        }
    }
}

/// Why there is no link.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The destination is not `HOST:PORT` or `tcp:HOST:PORT`.
    #[error("destination {0:?} is not HOST:PORT (an IPv6 address goes in brackets)")]
    Destination(String),
    /// The number of data streams is not allowed.
    #[error("{0} data streams are not allowed: 1 to 16")]
    Streams(u8),
    /// The network does not lead there, or nobody listens.
    #[error("cannot connect to {destination}: {error}")]
    Connect {
        /// The destination.
        destination: String,
        /// Why.
        error: io::Error,
    },
    /// The TLS handshake failed.
    #[error("TLS handshake with {destination}: {error}")]
    Tls {
        /// The destination.
        destination: String,
        /// Why.
        error: io::Error,
    },
    /// The peer closed the connection instead of an answer.
    #[error(
        "{destination} did not answer ({error}): its log says why; a listener with --tls-dir takes TLS with a known certificate only"
    )]
    NoAnswer {
        /// The destination.
        destination: String,
        /// What was seen.
        error: String,
    },
    /// Something else listens there.
    #[error("{destination} does not answer as a peer: {error}")]
    Wire {
        /// The destination.
        destination: String,
        /// What is wrong with its answer.
        error: WireError,
    },
    /// The two do not speak the same protocol.
    #[error("{destination}: {error}")]
    Terms {
        /// The destination.
        destination: String,
        /// Who has to change.
        error: NegotiateError,
    },
    /// The peer refused the connection.
    #[error("{destination} refused the connection: {verdict}")]
    Refused {
        /// The destination.
        destination: String,
        /// Its word.
        verdict: Verdict,
    },
    /// It took too long.
    #[error("{destination} did not take the connection within {timeout:?}")]
    Timeout {
        /// The destination.
        destination: String,
        /// The limit.
        timeout: Duration,
    },
}

/// Splits `HOST:PORT` or `tcp:HOST:PORT`; an IPv6 address goes in brackets.
///
/// # Errors
/// [`ConnectError::Destination`].
pub fn parse_destination(text: &str) -> Result<(String, u16), ConnectError> {
    let bad = || ConnectError::Destination(text.to_owned());
    let (host, port) = text.strip_prefix("tcp:").unwrap_or(text).rsplit_once(':').ok_or_else(bad)?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if host.is_empty() || bare.is_some_and(str::is_empty) || (bare.is_none() && host.contains([':', '/'])) {
        return Err(bad());
    }
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
    Ok((bare.unwrap_or(host).to_owned(), port))
}

/// Connects to the listener at `destination` (`HOST:PORT` or `tcp:HOST:PORT`).
///
/// # Errors
/// A [`ConnectError`] that says what is in the way.
pub async fn connect(destination: &str, params: &ConnectParams) -> Result<PeerLink, ConnectError> {
    let (host, port) = parse_destination(destination)?;
    if !(1..=MAX_STREAMS).contains(&params.streams) {
        return Err(ConnectError::Streams(params.streams));
    }
    let attempt = Attempt {
        destination: destination.to_owned(),
        host,
        port,
        tls: params.tls.clone(),
        streams: params.streams,
        token: uuid::Uuid::new_v4().into_bytes(),
        control_patience: params.link.dead_after,
    };
    match tokio::time::timeout(params.timeout, join_all(attempt, &params.link)).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::Timeout { destination: destination.to_owned(), timeout: params.timeout }),
    }
}

#[derive(Clone)]
struct Attempt {
    destination: String,
    host: String,
    port: u16,
    tls: Option<TlsClient>,
    streams: u8,
    token: Token,
    control_patience: Duration,
}

async fn join_all(attempt: Attempt, options: &LinkOptions) -> Result<PeerLink, ConnectError> {
    let kinds = (0..attempt.streams).map(StreamKind::Data).chain([StreamKind::Control]);
    let mut joining = JoinSet::new();
    for kind in kinds {
        joining.spawn(join_one(attempt.clone(), kind));
    }
    let mut control = None;
    let mut data = Vec::new();
    while let Some(joined) = joining.join_next().await {
        let joined = joined.map_err(|error| attempt.failed(error.into()))??;
        match joined.kind {
            StreamKind::Control => control = Some(joined),
            StreamKind::Data(_) => data.push(joined.stream),
        }
    }
    let control = control.ok_or_else(|| attempt.failed(io::ErrorKind::NotConnected.into()))?;
    Ok(PeerLink::start(control.stream, data, control.peer, control.agreed, options))
}

struct Joined {
    kind: StreamKind,
    stream: Stream,
    peer: SocketAddr,
    agreed: Agreed,
}

async fn join_one(attempt: Attempt, kind: StreamKind) -> Result<Joined, ConnectError> {
    let tcp = TcpStream::connect((attempt.host.as_str(), attempt.port))
        .await
        .map_err(|error| attempt.failed(error))?;
    let patience = if kind == StreamKind::Control { attempt.control_patience } else { DATA_PATIENCE };
    prepare(&tcp, patience).map_err(|error| attempt.failed(error))?;
    let peer = tcp.peer_addr().map_err(|error| attempt.failed(error))?;
    let mut stream = match &attempt.tls {
        None => Stream::Plain(tcp),
        Some(tls) => {
            let tls = tls.connect(&attempt.host, tcp).await;
            let destination = attempt.destination.clone();
            Stream::Tls(Box::new(tls.map_err(|error| ConnectError::Tls { destination, error })?))
        }
    };
    let ours = Preamble {
        terms: Terms::OURS,
        stream: kind,
        streams: attempt.streams,
        answer: None,
        token: attempt.token,
    };
    stream.write_preamble(&ours).await.map_err(|error| attempt.no_answer(StreamError::from(error)))?;
    let answer = stream.read_preamble().await.map_err(|error| attempt.no_answer(error))?;
    let agreed = attempt.judge(&ours, &answer)?;
    Ok(Joined { kind, stream, peer, agreed })
}

impl Attempt {
    fn failed(&self, error: io::Error) -> ConnectError {
        ConnectError::Connect { destination: self.destination.clone(), error }
    }

    fn no_answer(&self, error: StreamError) -> ConnectError {
        let destination = self.destination.clone();
        match error {
            StreamError::Wire(error) => ConnectError::Wire { destination, error },
            other => ConnectError::NoAnswer { destination, error: other.to_string() },
        }
    }

    fn judge(&self, ours: &Preamble, answer: &Preamble) -> Result<Agreed, ConnectError> {
        let destination = self.destination.clone();
        let Some(verdict) = answer.answer.filter(|_| answer.token == ours.token) else {
            let error = WireError::Value { what: "the answer to a preamble" };
            return Err(ConnectError::Wire { destination, error });
        };
        match (negotiate(&ours.terms, &answer.terms), verdict) {
            (Err(error), _) => Err(ConnectError::Terms { destination, error }),
            (Ok(agreed), Verdict::Accepted) => Ok(agreed),
            (Ok(_), verdict) => Err(ConnectError::Refused { destination, verdict }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_host_and_port() {
        let of = |text| parse_destination(text).ok();
        assert_eq!(of("host-b:4950"), Some(("host-b".to_owned(), 4950)));
        assert_eq!(of("tcp:10.0.0.2:1"), Some(("10.0.0.2".to_owned(), 1)));
        assert_eq!(of("tcp:[fd00::2]:4950"), Some(("fd00::2".to_owned(), 4950)));
        for bad in ["", "host", "host:", ":1", "host:0", "host:70000", "fd00::2:1", "tcp:[]:1", "http://h:1"]
        {
            assert!(of(bad).is_none(), "{bad}");
        }
    }
}
