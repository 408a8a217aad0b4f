// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client of the API over its UNIX socket: typed calls and a reader of its events.
//!
//! Every call makes a connection of its own: they are local and rare, and a pool would have to deal with a daemon that
//! was restarted between two calls. Answers are bounded, so that a wrong socket cannot fill the memory.

use super::events::{KEEP_ALIVE, MIGRATION, VOLUME};
use crate::node::status::{Denied, MigrationRequest, MigrationStatus, ResizeRequest, VolumeStatus};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout, timeout_at};

/// Longest answer in bytes, and longest event.
const MAX_ANSWER: usize = 4 << 20;
/// How long a call may take; the daemon itself gives up after 60 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(90);
/// How long the events may be silent before the daemon counts as gone: keep-alives come more often.
const SILENCE: Duration = Duration::from_secs(KEEP_ALIVE.as_secs() * 4);

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens at the socket.
    #[error("cannot reach a daemon at {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the daemon broke: {0}")]
    Http(#[from] hyper::Error),
    /// The daemon refused.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The daemon said something that is not the API.
    #[error("the daemon's answer makes no sense: {0}")]
    Protocol(String),
    /// The daemon did not answer.
    #[error("the daemon does not answer")]
    Silent,
}

impl ClientError {
    /// A stable word for programs: the daemon's own code if it refused.
    #[must_use]
    pub fn code(&self) -> &str {
        match self {
            Self::Denied(denied) => &denied.code,
            Self::Connect { .. } => "no-daemon",
            Self::Http(_) | Self::Silent => "lost",
            Self::Protocol(_) => "protocol",
        }
    }
}

/// A client of one daemon.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the daemon whose `--api-socket` is `path`. Nothing is connected yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The daemon's socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The volume as it is now.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn volume(&self) -> Result<VolumeStatus, ClientError> {
        self.json(Method::GET, "/api/v1/volume", Bytes::new()).await
    }

    /// The newest migration; state `none` without one.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn migration(&self) -> Result<MigrationStatus, ClientError> {
        self.json(Method::GET, "/api/v1/migration", Bytes::new()).await
    }

    /// Makes the volume larger.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::Denied`] with the daemon's reason if it refuses.
    pub async fn resize(&self, size: u64) -> Result<VolumeStatus, ClientError> {
        let body = serde_json::to_vec(&ResizeRequest { size })
            .map_err(|error| ClientError::Protocol(error.to_string()))?;
        self.json(Method::PUT, "/api/v1/volume", body.into()).await
    }

    /// Arms a migration.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::Denied`] with the daemon's reason if it refuses.
    pub async fn migrate(&self, request: &MigrationRequest) -> Result<MigrationStatus, ClientError> {
        let body = serde_json::to_vec(request).map_err(|error| ClientError::Protocol(error.to_string()))?;
        self.json(Method::PUT, "/api/v1/migration", body.into()).await
    }

    /// Cancels the migration.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::Denied`] with `none` or `handed-over` if there is nothing to cancel any more.
    pub async fn cancel(&self) -> Result<MigrationStatus, ClientError> {
        self.json(Method::DELETE, "/api/v1/migration", Bytes::new()).await
    }

    /// The metrics as text.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let body = self.whole(Method::GET, "/metrics", Bytes::new()).await?;
        String::from_utf8(body.into()).map_err(|_| ClientError::Protocol("metrics are not UTF-8".to_owned()))
    }

    /// The API's description.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn openapi(&self) -> Result<serde_json::Value, ClientError> {
        self.json(Method::GET, "/openapi.json", Bytes::new()).await
    }

    /// Listens to the changes of volume and migration; the first two events say how they are now.
    ///
    /// # Errors
    /// [`ClientError`]
    pub async fn events(&self) -> Result<Events, ClientError> {
        let response = self.send(Method::GET, "/api/v1/events", Bytes::new());
        let response = timeout(CALL_TIMEOUT, response).await.map_err(|_| ClientError::Silent)??;
        if response.status() != StatusCode::OK {
            return Err(refusal(&collect(response).await?));
        }
        Ok(Events {
            body: response.into_body(),
            lines: Lines::default(),
            name: String::new(),
            data: String::new(),
            heard: Instant::now(),
        })
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let body = self.whole(method, path, body).await?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// Sends a request and reads the whole of a good answer.
    async fn whole(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let call = async {
            let response = self.send(method, path, body).await?;
            let good = response.status().is_success();
            let body = collect(response).await?;
            if good { Ok(body) } else { Err(refusal(&body)) }
        };
        timeout(CALL_TIMEOUT, call).await.map_err(|_| ClientError::Silent)?
    }

    /// Connects, sends a request, reads the answer's head.
    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| ClientError::Connect { path: self.path.clone(), source })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends by itself when the request's sender and the answer's body are gone; its error shows there as well.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "blkferryd")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| ClientError::Protocol(error.to_string()))?;
        Ok(sender.send_request(request).await?)
    }
}

/// The whole body of an answer, bounded.
async fn collect(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    body.map(http_body_util::Collected::to_bytes).map_err(|error| ClientError::Protocol(error.to_string()))
}

/// What the body of a refusal says.
fn refusal(body: &[u8]) -> ClientError {
    match serde_json::from_slice::<Denied>(body) {
        Ok(denied) => ClientError::Denied(denied),
        Err(_) => ClientError::Protocol("a refusal without a code".to_owned()),
    }
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// The volume changed.
    Volume(Box<VolumeStatus>),
    /// The migration changed.
    Migration(Box<MigrationStatus>),
}

/// The events of a daemon.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    lines: Lines,
    name: String,
    data: String,
    /// When something came last: a caller that waits in slices must not begin the silence anew with each.
    heard: Instant,
}

impl Events {
    /// The next event, or `None` after the daemon has ended the stream. Events of unknown names are skipped. Dropping
    /// the future loses nothing: what was read is kept for the next call.
    ///
    /// # Errors
    /// [`ClientError`] if the connection breaks, falls silent, or carries something else.
    pub async fn next(&mut self) -> Result<Option<Change>, ClientError> {
        loop {
            while let Some(line) = self.lines.pop() {
                if let Some(change) = self.line(&line)? {
                    return Ok(Some(change));
                }
            }
            let frame = timeout_at(self.heard + SILENCE, self.body.frame());
            let Some(frame) = frame.await.map_err(|_| ClientError::Silent)? else { return Ok(None) };
            self.heard = Instant::now();
            if let Ok(data) = frame?.into_data() {
                self.lines.push(&data)?;
            }
        }
    }

    /// Takes one line; an empty one ends an event.
    fn line(&mut self, line: &str) -> Result<Option<Change>, ClientError> {
        if !line.is_empty() {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => value.clone_into(&mut self.name),
                "data" if self.data.len() + value.len() > MAX_ANSWER => {
                    return Err(ClientError::Protocol("an event is too long".to_owned()));
                }
                "data" => {
                    if !self.data.is_empty() {
                        self.data.push('\n');
                    }
                    self.data.push_str(value);
                }
                _ => {}
            }
            return Ok(None);
        }
        let (name, data) = (std::mem::take(&mut self.name), std::mem::take(&mut self.data));
        let change = match name.as_str() {
            VOLUME => serde_json::from_str(&data).map(|v| Some(Change::Volume(Box::new(v)))),
            MIGRATION => serde_json::from_str(&data).map(|m| Some(Change::Migration(Box::new(m)))),
            _ => Ok(None),
        };
        change.map_err(|error| ClientError::Protocol(error.to_string()))
    }
}

/// Cuts bytes into lines, bounded.
#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        if self.bytes.len() + bytes.len() > MAX_ANSWER {
            return Err(ClientError::Protocol("an event line is too long".to_owned()));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn pop(&mut self) -> Option<String> {
        let end = self.bytes.iter().position(|byte| *byte == b'\n')?;
        let mut line: Vec<u8> = self.bytes.drain(..=end).collect();
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Some(String::from_utf8_lossy(&line).into_owned())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_are_cut_wherever_the_frames_end() {
        let mut lines = Lines::default();
        for piece in [&b"eve"[..], b"nt: volume\r", b"\n", b"data: {}\n\n: x"] {
            lines.push(piece).unwrap();
        }
        let cut: Vec<_> = std::iter::from_fn(|| lines.pop()).collect();
        assert_eq!(cut, ["event: volume", "data: {}", ""]);
        lines.push(b"\n").unwrap();
        assert_eq!(lines.pop().unwrap(), ": x");
    }

    #[test]
    fn endless_lines_are_refused() {
        let mut lines = Lines::default();
        lines.push(&vec![b'x'; MAX_ANSWER]).unwrap();
        assert!(matches!(lines.push(b"x"), Err(ClientError::Protocol(_))));
    }
}
