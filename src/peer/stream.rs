// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One stream of a link: socket options, the preambles, and frames in and out of it.
//!
//! Two hazards. *Depth*: a chunk that the guest waits for cannot overtake what the kernel already has, and a default
//! send buffer grows to megabytes; so data sockets accept at most 256 KiB beyond what is on its way
//! (TCP_NOTSENT_LOWAT: a small SO_SNDBUF would also cap what is on its way, and with it the throughput of a long path).
//! *Trust*: nothing is allocated before a header's checksum and limits have been checked.

use crate::core::message::Message;
use crate::wire::WireError;
use crate::wire::codec::{self, ChunkHead, Frame};
use crate::wire::frame::{CHUNK_HEAD_LEN, HEADER_LEN, Header, Kind, PREAMBLE_LEN, Preamble};
use bytes::BufMut;
use std::io::{self, IoSlice};
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

/// Bytes that a data socket accepts beyond what is on its way.
const NOT_SENT_LIMIT: u32 = 256 << 10;
/// Buffer of a reader: headers and short messages; contents go past it.
const READ_BUFFER: usize = 16 << 10;

/// Looks that have to find nothing before a peer is silent.
const PATIENCE_SLICES: u32 = 4;

/// The reading half of a stream.
pub(super) type Reader = BufReader<Box<dyn AsyncRead + Send + Unpin>>;
/// The writing half of a stream.
pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// A connected stream, plain or not.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// Both halves.
    pub(super) fn split(self) -> (Reader, Writer) {
        let (reader, writer): (Box<dyn AsyncRead + Send + Unpin>, Writer) = match self {
            Self::Plain(stream) => {
                let (reader, writer) = stream.into_split();
                (Box::new(reader), Box::new(writer))
            }
            Self::Tls(stream) => {
                let (reader, writer) = tokio::io::split(stream);
                (Box::new(reader), Box::new(writer))
            }
        };
        (BufReader::with_capacity(READ_BUFFER, reader), writer)
    }

    /// Writes a preamble.
    pub(super) async fn write_preamble(&mut self, preamble: &Preamble) -> io::Result<()> {
        let bytes = preamble.encode();
        match self {
            Self::Plain(stream) => stream.write_all(&bytes).await,
            Self::Tls(stream) => {
                stream.write_all(&bytes).await?;
                stream.flush().await
            }
        }
    }

    /// Reads a preamble, and not a byte more.
    pub(super) async fn read_preamble(&mut self) -> Result<Preamble, StreamError> {
        let mut bytes = [0; PREAMBLE_LEN];
        match self {
            Self::Plain(stream) => stream.read_exact(&mut bytes).await?,
            Self::Tls(stream) => stream.read_exact(&mut bytes).await?,
        };
        Ok(Preamble::decode(&bytes)?)
    }
}

/// Why a stream is of no more use.
#[derive(Debug, Error)]
pub(super) enum StreamError {
    /// The socket failed, or ended inside a frame.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is not the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Nothing came for this long.
    #[error("nothing was heard for {0:?}")]
    Silent(Duration),
}

/// Sets the options that every stream has. `patience`: how long bytes may stay unacknowledged.
pub(super) fn prepare(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(patience))?;
    socket.set_tcp_notsent_lowat(NOT_SENT_LIMIT)
}

/// Waits for `read`; [`StreamError::Silent`] when nothing comes for `patience`. Only time in which this side looked
/// counts: `patience` is cut into slices, and a runtime that was stalled (a debugger, a paused host) has
/// missed one slice, however long that took.
async fn patiently(
    read: impl Future<Output = io::Result<usize>>,
    patience: Duration,
) -> Result<usize, StreamError> {
    tokio::pin!(read);
    for _ in 0..PATIENCE_SLICES {
        if let Ok(read) = tokio::time::timeout(patience / PATIENCE_SLICES, &mut read).await {
            return Ok(read?);
        }
    }
    Err(StreamError::Silent(patience))
}

/// Fills `bytes`; `false` when the stream ends before the first of them. Every byte that comes renews `patience`.
async fn fill(
    reader: &mut Reader,
    mut bytes: &mut [u8],
    patience: Option<Duration>,
) -> Result<bool, StreamError> {
    let mut begun = false;
    while bytes.has_remaining_mut() {
        let read = reader.read_buf(&mut bytes);
        let count = match patience {
            None => read.await?,
            Some(patience) => patiently(read, patience).await?,
        };
        match (count, begun) {
            (0, false) => return Ok(false),
            (0, true) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            _ => begun = true,
        }
    }
    Ok(true)
}

/// Fills `bytes`, which a header promised.
async fn fill_all(
    reader: &mut Reader,
    bytes: &mut [u8],
    patience: Option<Duration>,
) -> Result<(), StreamError> {
    if bytes.is_empty() || fill(reader, bytes, patience).await? {
        return Ok(());
    }
    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
}

/// Reads the next message and the length of its frame; `None` when the stream ends between two frames. With
/// `patience`, silence for that long is an error.
pub(super) async fn read_message(
    reader: &mut Reader,
    patience: Option<Duration>,
    data_stream: bool,
) -> Result<Option<(Message, usize)>, StreamError> {
    let mut header = [0; HEADER_LEN];
    if !fill(reader, &mut header, patience).await? {
        return Ok(None);
    }
    let header = Header::decode(&header)?;
    let len = header.len as usize;
    let message = if header.kind == Kind::Chunk {
        read_chunk(reader, &header, patience).await?
    } else if data_stream {
        return Err(WireError::Misplaced { what: header.kind.name() }.into());
    } else {
        let mut payload = vec![0; len];
        fill_all(reader, &mut payload, patience).await?;
        header.check(&payload, &[])?;
        codec::decode(header.kind, &payload)?
    };
    Ok(Some((message, HEADER_LEN + len)))
}

async fn read_chunk(
    reader: &mut Reader,
    header: &Header,
    patience: Option<Duration>,
) -> Result<Message, StreamError> {
    let len = (header.len as usize)
        .checked_sub(CHUNK_HEAD_LEN)
        .ok_or(WireError::Short { what: header.kind.name() })?;
    let mut bytes = [0; CHUNK_HEAD_LEN];
    fill_all(reader, &mut bytes, patience).await?;
    let head = ChunkHead::decode(&bytes, len)?;
    let mut content = Vec::with_capacity(len);
    while content.len() < len {
        // The content goes from the socket into its own vector, which is not zeroed first.
        let missing = len - content.len();
        if reader.read_buf(&mut (&mut content).limit(missing)).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
    header.check(&bytes, &content)?;
    Ok(Message::Chunk(head.into_chunk(content)))
}

/// A frame that has been written up to some byte.
pub(super) struct Cursor<'a> {
    head: &'a [u8],
    body: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) fn new(frame: &'a Frame) -> Self {
        Self { head: &frame.head, body: &frame.body }
    }

    /// Bytes that have not been written.
    pub(super) fn remaining(&self) -> usize {
        self.head.len() + self.body.len()
    }

    /// Writes the next `count` bytes (or what is left).
    pub(super) async fn write(&mut self, writer: &mut Writer, count: usize) -> io::Result<()> {
        let mut count = count.min(self.remaining());
        while count > 0 {
            let head = self.head.get(..count.min(self.head.len())).unwrap_or_default();
            let body = self.body.get(..count - head.len()).unwrap_or_default();
            let written = writer.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            let of_head = written.min(self.head.len());
            self.head = self.head.get(of_head..).unwrap_or_default();
            self.body = self.body.get(written - of_head..).unwrap_or_default();
            count = count.saturating_sub(written);
        }
        Ok(())
    }
}
