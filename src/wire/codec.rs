// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a message says: the payload of every [`Message`], to the byte.
//!
//! docs/protocol.md has the same as tables; change both together, and the protocol's version when the meaning of a
//! byte changes. The content of a chunk is never copied here: a [`Frame`] keeps it apart for a vectored write, and a
//! transport reads it straight into the vector that [`ChunkHead::into_chunk`] takes. Encodings are canonical: a
//! decoder refuses what an encoder does not write (reserved bytes, flags other than 0 and 1, an epoch that is not
//! there but is not zero), so that two daemons can never read one message differently.

use super::WireError;
use super::frame::{CHUNK_HEAD_LEN, HEADER_LEN, Header, Kind, payload_checksum};
use crate::config::MAX_SERIAL;
use crate::core::geometry::{BLOCKS_PER_CHUNK, BlockMask, ChunkId, MAX_CHUNK_SIZE};
use crate::core::message::{
    Announcement, BaseIdentity, Body, ChunkData, Epoch, Hello, Incarnation, MAX_ENTRIES, MAX_TEXT, Message,
    MigrationId, Offer, Purpose, Refusal, RemainingDigest, Standing, Version, VolumeId, Welcome,
};
use bytes::BufMut;

type Result<T> = std::result::Result<T, WireError>;

/// Largest version number: a version has 40 bits.
const MAX_VERSION: u64 = (1 << 40) - 1;

/// A message ready to be written: `head`, then `body`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The frame header and the payload, for a chunk without its content.
    pub head: Vec<u8>,
    /// The content of a chunk, else empty.
    pub body: Vec<u8>,
}

impl Frame {
    /// Bytes on the wire.
    #[must_use]
    pub fn len(&self) -> usize {
        self.head.len() + self.body.len()
    }

    /// Never: a frame has a header.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The type of a message.
#[must_use]
pub fn kind(message: &Message) -> Kind {
    match message {
        Message::Hello(_) => Kind::Hello,
        Message::Welcome(_) => Kind::Welcome,
        Message::Refuse { .. } => Kind::Refuse,
        Message::Have { .. } => Kind::Have,
        Message::Announce { .. } => Kind::Announce,
        Message::HotBase { .. } => Kind::HotBase,
        Message::Chunk(_) => Kind::Chunk,
        Message::Ack { .. } => Kind::Ack,
        Message::Offer(_) => Kind::Offer,
        Message::Prepared { .. } => Kind::Prepared,
        Message::Mismatch { .. } => Kind::Mismatch,
        Message::Pull { .. } => Kind::Pull,
        Message::PullFailed { .. } => Kind::PullFailed,
        Message::Activate { .. } => Kind::Activate,
        Message::Granted { .. } => Kind::Granted,
        Message::Denied { .. } => Kind::Denied,
        Message::Reclaimed { .. } => Kind::Reclaimed,
        Message::Synced { .. } => Kind::Synced,
        Message::Complete { .. } => Kind::Complete,
        Message::Released { .. } => Kind::Released,
        Message::Cancel => Kind::Cancel,
        Message::Cancelled => Kind::Cancelled,
        Message::Ping(_) => Kind::Ping,
        Message::Pong(_) => Kind::Pong,
        Message::Replica { .. } => Kind::Replica,
        Message::Keep { .. } => Kind::Keep,
    }
}

/// Encodes a message. The text of a refusal is for people: it is cut at [`MAX_TEXT`] bytes, at a character's border.
///
/// # Errors
/// [`WireError::TooLong`] for a list, serial or content above its limit, [`WireError::Value`] for a chunk whose
/// content cannot be that of its mask: no decoder would take them.
pub fn encode(message: Message) -> Result<Frame> {
    let kind = kind(&message);
    let mut head = vec![0; HEADER_LEN];
    let body = match message {
        Message::Chunk(chunk) => put_chunk(&mut head, chunk)?,
        other => {
            put_control(&mut head, &other)?;
            Vec::new()
        }
    };
    let payload = head.get(HEADER_LEN..).unwrap_or_default();
    let len = u32::try_from(payload.len() + body.len()).unwrap_or(u32::MAX);
    if len > kind.limit() {
        return Err(WireError::TooLong { what: kind.name(), len: len.into(), limit: kind.limit().into() });
    }
    let header = Header { kind, len, checksum: payload_checksum(payload, &body) }.encode();
    if let Some(place) = head.first_chunk_mut() {
        *place = header;
    }
    Ok(Frame { head, body })
}

/// Decodes the message at the start of `bytes`; also says how many bytes its frame has.
///
/// # Errors
/// [`WireError::Incomplete`] while the frame is cut short, else a [`WireError`] that names what is wrong with it.
pub fn parse(bytes: &[u8]) -> Result<(Message, usize)> {
    let header = bytes.first_chunk::<HEADER_LEN>().ok_or(WireError::Incomplete { needed: HEADER_LEN })?;
    let header = Header::decode(header)?;
    let needed = HEADER_LEN + header.len as usize;
    let payload = bytes.get(HEADER_LEN..needed).ok_or(WireError::Incomplete { needed })?;
    header.check(payload, &[])?;
    Ok((decode(header.kind, payload)?, needed))
}

/// Decodes a whole payload whose checksum has been checked.
///
/// # Errors
/// A [`WireError`] that names what is wrong with it.
pub fn decode(kind: Kind, payload: &[u8]) -> Result<Message> {
    if kind == Kind::Chunk {
        let (head, content) =
            payload.split_first_chunk::<CHUNK_HEAD_LEN>().ok_or(WireError::Short { what: kind.name() })?;
        let head = ChunkHead::decode(head, content.len())?;
        return Ok(Message::Chunk(head.into_chunk(content.to_vec())));
    }
    let mut fields = Fields { rest: payload, message: kind.name() };
    let message = take_control(kind, &mut fields)?;
    fields.end()?;
    Ok(message)
}

/// A chunk message without its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHead {
    migration: MigrationId,
    epoch: Epoch,
    chunk: ChunkId,
    version: Version,
    purpose: Purpose,
    /// `None`: zeros.
    mask: Option<BlockMask>,
}

impl ChunkHead {
    /// Reads the part before the content, which has `content` bytes.
    ///
    /// # Errors
    /// A [`WireError`] that names what is wrong with it; a content that its mask cannot have is wrong too.
    pub fn decode(bytes: &[u8; CHUNK_HEAD_LEN], content: usize) -> Result<Self> {
        let mut fields = Fields { rest: bytes, message: Kind::Chunk.name() };
        let migration = MigrationId(fields.array()?);
        let epoch = fields.epoch()?;
        let version = fields.version()?;
        let bits = fields.u64()?;
        let chunk = fields.chunk()?;
        let purpose = match fields.u8()? {
            1 => Purpose::Push,
            2 => Purpose::Prefetch,
            3 => Purpose::Demand,
            number => return Err(WireError::Unknown { what: "purpose", number: number.into() }),
        };
        let mask = match fields.u8()? {
            0 if bits == 0 => None,
            0 => return Err(WireError::Value { what: "the mask of a zero chunk" }),
            1 => Some(BlockMask(bits)),
            number => return Err(WireError::Unknown { what: "kind of content", number: number.into() }),
        };
        fields.zeros::<2>("the reserved part of a Chunk message")?;
        fields.end()?;
        check_content(mask, content)?;
        Ok(Self { migration, epoch, chunk, version, purpose, mask })
    }

    /// The message with its content, which must be as long as [`ChunkHead::decode`] was told.
    #[must_use]
    pub fn into_chunk(self, content: Vec<u8>) -> ChunkData {
        let Self { migration, epoch, chunk, version, purpose, mask } = self;
        let body = match mask {
            None => Body::Zero,
            Some(mask) => Body::Blocks { mask, bytes: content },
        };
        ChunkData { migration, epoch, chunk, version, purpose, body }
    }
}

/// Whether blocks of some chunk size can have this many bytes. Which size it is, the session knows.
fn check_content(mask: Option<BlockMask>, len: usize) -> Result<()> {
    let most = mask.map_or(0, BlockMask::count) as usize * (MAX_CHUNK_SIZE / BLOCKS_PER_CHUNK) as usize;
    if len > most {
        return Err(WireError::TooLong {
            what: "the content of a chunk",
            len: len as u64,
            limit: most as u64,
        });
    }
    if mask.is_some() && len == 0 {
        return Err(WireError::Value { what: "a chunk's empty content or mask" });
    }
    Ok(())
}

fn put_chunk(out: &mut Vec<u8>, chunk: ChunkData) -> Result<Vec<u8>> {
    let (content, mask, bytes) = match chunk.body {
        Body::Zero => (0, None, Vec::new()),
        Body::Blocks { mask, bytes } => (1, Some(mask), bytes),
    };
    check_content(mask, bytes.len())?;
    out.put_slice(&chunk.migration.0);
    out.put_u64_le(chunk.epoch.0);
    out.put_u64_le(chunk.version.0);
    out.put_u64_le(mask.unwrap_or_default().0);
    out.put_u32_le(chunk.chunk.0);
    out.put_slice(&[chunk.purpose as u8, content, 0, 0]);
    Ok(bytes)
}

fn put_control(out: &mut Vec<u8>, message: &Message) -> Result<()> {
    match message {
        Message::Hello(hello) => put_hello(out, hello)?,
        Message::Welcome(welcome) => put_welcome(out, welcome),
        Message::Refuse { reason, text } => {
            out.put_u8(*reason as u8);
            put_text(out, clip(text, MAX_TEXT));
        }
        Message::Replica { migration } => out.put_slice(&migration.0),
        Message::Have { entries, last } | Message::Keep { entries, last } => {
            out.put_u8((*last).into());
            put_pairs(out, entries)?;
        }
        Message::Announce { entries } => put_announcements(out, entries)?,
        Message::HotBase { chunks } => {
            put_count(out, chunks.len())?;
            chunks.iter().for_each(|chunk| out.put_u32_le(chunk.0));
        }
        Message::Chunk(_) => return Err(WireError::Misplaced { what: "Chunk" }),
        Message::Ack { entries } => put_pairs(out, entries)?,
        Message::Offer(offer) => {
            out.put_u64_le(offer.epoch.0);
            out.put_u128_le(offer.digest.0);
            out.put_u32_le(offer.remaining);
            out.put_u8(offer.write_cache.into());
        }
        Message::Pull { epoch, chunk, demand } => {
            out.put_u64_le(epoch.0);
            out.put_u32_le(chunk.0);
            out.put_u8((*demand).into());
        }
        Message::PullFailed { chunk, reason } => {
            out.put_u32_le(chunk.0);
            out.put_u8(*reason as u8);
        }
        Message::Activate { epoch } => put_maybe_epoch(out, *epoch),
        Message::Denied { epoch, reason } => {
            put_maybe_epoch(out, *epoch);
            out.put_u8(*reason as u8);
        }
        Message::Prepared { epoch }
        | Message::Mismatch { epoch }
        | Message::Granted { epoch }
        | Message::Reclaimed { epoch }
        | Message::Synced { epoch }
        | Message::Complete { epoch }
        | Message::Released { epoch } => out.put_u64_le(epoch.0),
        Message::Cancel | Message::Cancelled => {}
        Message::Ping(number) | Message::Pong(number) => out.put_u64_le(*number),
    }
    Ok(())
}

fn put_hello(out: &mut Vec<u8>, hello: &Hello) -> Result<()> {
    let len = hello.serial.len();
    if len > MAX_SERIAL {
        return Err(WireError::TooLong { what: "the serial", len: len as u64, limit: MAX_SERIAL as u64 });
    }
    out.put_slice(&hello.migration.0);
    out.put_slice(&hello.volume.0);
    out.put_u64_le(hello.incarnation.0);
    out.put_u64_le(hello.epoch.0);
    out.put_u64_le(hello.size);
    out.put_u32_le(hello.chunk_size);
    out.put_u64_le(hello.base.length);
    out.put_slice(&hello.base.digest);
    out.put_u64_le(hello.virtio_features);
    out.put_u16_le(hello.queues);
    out.put_u8(hello.read_only.into());
    put_text(out, &hello.serial);
    Ok(())
}

fn put_welcome(out: &mut Vec<u8>, welcome: &Welcome) {
    put_maybe_epoch(out, welcome.prepared);
    put_maybe_epoch(out, welcome.active);
    out.put_u8(welcome.complete.into());
    out.put_u8(welcome.standing.is_some().into());
    out.put_u128_le(welcome.standing.unwrap_or_default().0);
    out.put_u8(welcome.have_follows.into());
}

fn put_announcements(out: &mut Vec<u8>, entries: &[Announcement]) -> Result<()> {
    put_count(out, entries.len())?;
    for entry in entries {
        let (kind, count, version) = match entry.standing {
            Standing::Remaining { count } => (0, count, 0),
            Standing::Settled { version } => (1, 0, version.0),
        };
        check_run(entry.first, entry.run, kind)?;
        out.put_u32_le(entry.first.0);
        out.put_u32_le(entry.run);
        out.put_slice(&[kind, count, 0, 0]);
        out.put_u64_le(version);
    }
    Ok(())
}

/// A run has at least one chunk, stays inside the numbers that chunks have, and a settled chunk stands alone.
fn check_run(first: ChunkId, run: u32, kind: u8) -> Result<()> {
    if run == 0 || (kind == 1 && run != 1) || first.0.checked_add(run).is_none() {
        return Err(WireError::Value { what: "the run of an announcement" });
    }
    Ok(())
}

fn put_count(out: &mut Vec<u8>, len: usize) -> Result<()> {
    match u32::try_from(len) {
        Ok(count) if len <= MAX_ENTRIES => {
            out.put_u32_le(count);
            Ok(())
        }
        _ => Err(WireError::TooLong { what: "a list", len: len as u64, limit: MAX_ENTRIES as u64 }),
    }
}

fn put_pairs(out: &mut Vec<u8>, entries: &[(ChunkId, Version)]) -> Result<()> {
    put_count(out, entries.len())?;
    for (chunk, version) in entries {
        out.put_u32_le(chunk.0);
        out.put_u64_le(version.0);
    }
    Ok(())
}

fn put_maybe_epoch(out: &mut Vec<u8>, epoch: Option<Epoch>) {
    out.put_u8(epoch.is_some().into());
    out.put_u64_le(epoch.unwrap_or_default().0);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    // At most MAX_TEXT bytes: the callers saw to it.
    out.put_u16_le(u16::try_from(text.len()).unwrap_or(u16::MAX));
    out.put_slice(text.as_bytes());
}

/// The longest start of `text` that has at most `limit` bytes and ends between two characters.
fn clip(text: &str, limit: usize) -> &str {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

fn take_control(kind: Kind, fields: &mut Fields<'_>) -> Result<Message> {
    Ok(match kind {
        Kind::Hello => Message::Hello(take_hello(fields)?),
        Kind::Welcome => Message::Welcome(take_welcome(fields)?),
        Kind::Refuse => Message::Refuse { reason: fields.refusal()?, text: fields.text("a text", MAX_TEXT)? },
        Kind::Have => Message::Have { last: fields.flag("the last flag")?, entries: fields.pairs()? },
        Kind::Replica => Message::Replica { migration: MigrationId(fields.array()?) },
        Kind::Keep => Message::Keep { last: fields.flag("the last flag")?, entries: fields.pairs()? },
        Kind::Announce => Message::Announce { entries: fields.list(20, take_announcement)? },
        Kind::HotBase => Message::HotBase { chunks: fields.list(4, Fields::chunk)? },
        Kind::Chunk => return Err(WireError::Misplaced { what: "Chunk" }),
        Kind::Ack => Message::Ack { entries: fields.pairs()? },
        Kind::Offer => Message::Offer(Offer {
            epoch: fields.epoch()?,
            digest: RemainingDigest(fields.u128()?),
            remaining: fields.u32()?,
            write_cache: fields.flag("the write-cache flag")?,
        }),
        Kind::Prepared => Message::Prepared { epoch: fields.epoch()? },
        Kind::Mismatch => Message::Mismatch { epoch: fields.epoch()? },
        Kind::Pull => Message::Pull {
            epoch: fields.epoch()?,
            chunk: fields.chunk()?,
            demand: fields.flag("the demand flag")?,
        },
        Kind::PullFailed => Message::PullFailed { chunk: fields.chunk()?, reason: fields.refusal()? },
        Kind::Activate => Message::Activate { epoch: fields.maybe_epoch()? },
        Kind::Granted => Message::Granted { epoch: fields.epoch()? },
        Kind::Denied => Message::Denied { epoch: fields.maybe_epoch()?, reason: fields.refusal()? },
        Kind::Reclaimed => Message::Reclaimed { epoch: fields.epoch()? },
        Kind::Synced => Message::Synced { epoch: fields.epoch()? },
        Kind::Complete => Message::Complete { epoch: fields.epoch()? },
        Kind::Released => Message::Released { epoch: fields.epoch()? },
        Kind::Cancel => Message::Cancel,
        Kind::Cancelled => Message::Cancelled,
        Kind::Ping => Message::Ping(fields.u64()?),
        Kind::Pong => Message::Pong(fields.u64()?),
    })
}

fn take_hello(fields: &mut Fields<'_>) -> Result<Hello> {
    Ok(Hello {
        migration: MigrationId(fields.array()?),
        volume: VolumeId(fields.array()?),
        incarnation: Incarnation(fields.u64()?),
        epoch: fields.epoch()?,
        size: fields.u64()?,
        chunk_size: fields.u32()?,
        base: BaseIdentity { length: fields.u64()?, digest: fields.array()? },
        virtio_features: fields.u64()?,
        queues: fields.u16()?,
        read_only: fields.flag("the read-only flag")?,
        serial: fields.text("the serial", MAX_SERIAL)?,
    })
}

fn take_welcome(fields: &mut Fields<'_>) -> Result<Welcome> {
    Ok(Welcome {
        prepared: fields.maybe_epoch()?,
        active: fields.maybe_epoch()?,
        complete: fields.flag("the complete flag")?,
        standing: {
            let there = fields.flag("the digest flag")?;
            let digest = fields.u128()?;
            maybe(there, digest == 0, RemainingDigest(digest), "a digest that is not there")?
        },
        have_follows: fields.flag("the have-follows flag")?,
    })
}

fn take_announcement(fields: &mut Fields<'_>) -> Result<Announcement> {
    let first = fields.chunk()?;
    let run = fields.u32()?;
    let kind = fields.u8()?;
    let count = fields.u8()?;
    fields.zeros::<2>("the reserved part of an announcement")?;
    let version = fields.version()?;
    let standing = match kind {
        0 if version.0 == 0 => Standing::Remaining { count },
        1 if count == 0 => Standing::Settled { version },
        0 | 1 => return Err(WireError::Value { what: "the unused field of an announcement" }),
        number => return Err(WireError::Unknown { what: "standing", number: number.into() }),
    };
    check_run(first, run, kind)?;
    Ok(Announcement { first, run, standing })
}

fn maybe<T>(there: bool, zero: bool, value: T, what: &'static str) -> Result<Option<T>> {
    match (there, zero) {
        (true, _) => Ok(Some(value)),
        (false, true) => Ok(None),
        (false, false) => Err(WireError::Value { what }),
    }
}

/// The part of a payload that has not been read, from front to back.
struct Fields<'a> {
    rest: &'a [u8],
    message: &'static str,
}

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) =
            self.rest.split_first_chunk::<N>().ok_or(WireError::Short { what: self.message })?;
        self.rest = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn u128(&mut self) -> Result<u128> {
        self.array().map(u128::from_le_bytes)
    }

    fn zeros<const N: usize>(&mut self, what: &'static str) -> Result<()> {
        if self.array::<N>()? == [0; N] { Ok(()) } else { Err(WireError::Value { what }) }
    }

    fn flag(&mut self, what: &'static str) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Value { what }),
        }
    }

    fn chunk(&mut self) -> Result<ChunkId> {
        self.u32().map(ChunkId)
    }

    fn epoch(&mut self) -> Result<Epoch> {
        self.u64().map(Epoch)
    }

    fn maybe_epoch(&mut self) -> Result<Option<Epoch>> {
        let there = self.flag("the epoch flag")?;
        let epoch = self.epoch()?;
        maybe(there, epoch.0 == 0, epoch, "an epoch that is not there")
    }

    fn version(&mut self) -> Result<Version> {
        match self.u64()? {
            version @ 0..=MAX_VERSION => Ok(Version(version)),
            _ => Err(WireError::Value { what: "a version of more than 40 bits" }),
        }
    }

    fn refusal(&mut self) -> Result<Refusal> {
        let number = self.u8()?;
        Refusal::from_number(number).ok_or(WireError::Unknown { what: "refusal", number: number.into() })
    }

    /// A list whose entries have `size` bytes each.
    fn list<T>(&mut self, size: usize, entry: fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let count = self.u32()? as usize;
        if count > MAX_ENTRIES {
            return Err(WireError::TooLong { what: "a list", len: count as u64, limit: MAX_ENTRIES as u64 });
        }
        if self.rest.len() < count * size {
            return Err(WireError::Short { what: self.message });
        }
        (0..count).map(|_| entry(self)).collect()
    }

    fn pairs(&mut self) -> Result<Vec<(ChunkId, Version)>> {
        self.list(12, |fields| Ok((fields.chunk()?, fields.version()?)))
    }

    fn text(&mut self, what: &'static str, limit: usize) -> Result<String> {
        let len = usize::from(self.u16()?);
        if len > limit {
            return Err(WireError::TooLong { what, len: len as u64, limit: limit as u64 });
        }
        let (text, rest) = self.rest.split_at_checked(len).ok_or(WireError::Short { what: self.message })?;
        self.rest = rest;
        String::from_utf8(text.to_vec()).map_err(|_| WireError::Value { what })
    }

    fn end(&self) -> Result<()> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(WireError::Trailing { what: self.message, extra }),
        }
    }
}

#[cfg(test)]
mod tests;
