// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What becomes of a request: cut into pieces, each piece routed and carried out, then put together again.
//!
//! The order at the end of a batch is what durability and migration rest on: claims are noted and published, then
//! the writes are counted out of the table, then the tracker is told, and only then are completions handed out.

use super::{
    Active, BlockMask, Claim, Exclusive, FLAG, IoBuf, Op, Piece, Port, Request, RequestOp, Seat, Span,
    Status, Step, VolumeEvent, WINDOW,
};
use crate::core::chunk::{Access, ChunkState};
use crate::core::geometry::ChunkId;
use crate::volume::table::{Begun, TableError};
use std::io;

impl RequestOp {
    fn access(self) -> Access {
        match self {
            Self::Write => Access::Write,
            Self::Zero { .. } => Access::Zero,
            // A flush has no pieces.
            Self::Read | Self::Flush => Access::Read,
        }
    }
}

/// The status for an error of the file.
pub(super) fn status_of(result: &io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Status::Unsupported,
        Err(_) => Status::IoError,
    }
}

impl Port {
    /// Begins a request; the gate is open.
    pub(super) fn start(&mut self, request: Request) {
        let Request { op, offset, len, buf, token } = request;
        let (cut, pieces_left, cutting, status, position) = (0, 0, false, Status::Ok, 0);
        let active = Active { token, op, offset, buf, len, cut, pieces_left, cutting, status, position };
        let key = self.requests.insert(active);
        if op == RequestOp::Flush {
            if self.volume.flush_gate().is_open() {
                self.start_sync(key);
            } else if self.volume.flush_gate().is_failing() {
                self.complete(key, Some(Status::IoError));
            } else {
                self.held_flushes.push(key);
            }
            return;
        }
        self.cut_on(key);
    }

    /// Makes pieces of a request as far as its window allows; a request that has failed gets no more. Ends the
    /// request when there is no piece left.
    fn cut_on(&mut self, key: u64) {
        loop {
            let Some(active) = self.requests.get_mut(key) else { return };
            if active.status != Status::Ok {
                active.cut = active.len;
            }
            active.cutting = active.cut < active.len && active.pieces_left < WINDOW;
            if !active.cutting {
                break;
            }
            let rest = (active.offset + active.cut, active.len - active.cut);
            let Some(span) = self.volume.geometry().spans(rest.0, rest.1).next() else {
                // The volume has become smaller, which no volume does.
                active.status = Status::IoError;
                continue;
            };
            // A request is bounded by guest memory that it names, far below what an address can hold.
            let at = usize::try_from(active.cut).unwrap_or(usize::MAX);
            active.cut += u64::from(span.len);
            active.pieces_left += 1;
            let piece = self.pieces.insert(Piece { request: key, span, at, step: Step::Parked });
            self.begin(piece);
        }
        self.end_if_done(key);
    }

    /// Routes a piece and does what the route says.
    fn begin(&mut self, key: u64) {
        let Some(piece) = self.pieces.get_mut(key) else { return };
        let (span, at) = (piece.span, piece.at);
        let Some(active) = self.requests.get_mut(piece.request) else { return };
        let op = active.op;
        let seat = Seat { waker: &self.waker, piece: key };
        match self.volume.table().begin(op.access(), span, seat) {
            Ok(Begun::Layer) => {
                let buf = Self::cut(&mut active.buf, at, span);
                piece.step = Step::Reading;
                let offset = self.volume.offset(span);
                self.engine.submit(key, Op::Read { file: self.file, offset, buf });
            }
            Ok(Begun::Base) => {
                let buf = Self::cut(&mut active.buf, at, span);
                piece.step = Step::Reading;
                // The table says so only where there is a file.
                let (file, offset) = (self.base.unwrap_or(self.file), self.volume.offset(span));
                self.engine.submit(key, Op::Read { file, offset, buf });
            }
            Ok(Begun::Write { claim }) => {
                piece.step = Step::Writing { claim };
                let op = self.write_op(key, span);
                self.engine.submit(key, op);
            }
            Ok(Begun::Punch(exclusive)) => self.punch(key, exclusive),
            Ok(Begun::Zeros) => {
                Self::cut(&mut active.buf, at, span).fill_zero();
                self.piece_done(key, Status::Ok);
            }
            Ok(Begun::Done) => self.piece_done(key, Status::Ok),
            Ok(Begun::Parked { demand }) => {
                piece.step = Step::Parked;
                if let Some(origin) = demand {
                    self.volume.tell(VolumeEvent::Demand { chunk: span.chunk, origin });
                }
            }
            Err(error) => {
                self.blame(&error);
                self.piece_done(key, Status::IoError);
            }
        }
    }

    /// The piece's part of the request's buffer, to be given to the engine: no piece asks for its part twice.
    fn cut(buf: &mut Option<IoBuf>, at: usize, span: Span) -> IoBuf {
        let len = span.len as usize;
        let part = match buf {
            // The usual request is one piece: its buffer goes as it is.
            Some(whole) if whole.len() == len => buf.take(),
            Some(whole) => Some(whole.slice(at, len)),
            None => None,
        };
        // Reads and writes have a buffer of the request's length: `Request` made sure.
        part.unwrap_or_else(|| IoBuf::zeroed(0))
    }

    /// The operation that carries out the writing piece `key`.
    fn write_op(&mut self, key: u64, span: Span) -> Op {
        let (file, offset, len) = (self.file, self.volume.offset(span), u64::from(span.len));
        let piece = self.pieces.get_mut(key).map(|piece| (piece.request, piece.at));
        let active =
            piece.and_then(|(request, at)| self.requests.get_mut(request).map(|active| (active, at)));
        match active {
            Some((active, at)) if active.op == RequestOp::Write => {
                Op::Write { file, offset, buf: Self::cut(&mut active.buf, at, span) }
            }
            Some((active, _)) if active.op == (RequestOp::Zero { unmap: true }) => {
                Op::Punch { file, offset, len }
            }
            _ => Op::ZeroRange { file, offset, len },
        }
    }

    fn punch(&mut self, key: u64, exclusive: Exclusive) {
        let Some(piece) = self.pieces.get_mut(key) else { return };
        let (offset, len) = (self.volume.offset(piece.span), u64::from(piece.span.len));
        piece.step = Step::Punching(exclusive);
        self.engine.submit(key, Op::Punch { file: self.file, offset, len });
    }

    /// A parked piece may go on.
    pub(super) fn resume(&mut self, key: u64) {
        if !self.is_parked(key) {
            return;
        }
        if self.volume.gate().is_open() {
            self.begin(key);
        } else {
            self.stalled.push(key);
        }
    }

    /// A parked piece has been given its chunk. When it is gone, or may not go on, dropping gives the chunk back.
    pub(super) fn granted(&mut self, key: u64, exclusive: Exclusive) {
        if !self.is_parked(key) {
            return;
        }
        if self.volume.gate().is_open() {
            self.punch(key, exclusive);
        } else {
            self.stalled.push(key);
        }
    }

    pub(super) fn fail_one(&mut self, key: u64) {
        if self.is_parked(key) {
            self.piece_done(key, Status::IoError);
        }
    }

    fn is_parked(&mut self, key: u64) -> bool {
        self.pieces.get_mut(key).is_some_and(|piece| matches!(piece.step, Step::Parked))
    }

    /// Ends the file operations that have completed; see the header for the order.
    pub(super) fn finish_batch(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut self.batch);
        let mut claims = Vec::new();
        for (key, result) in &batch {
            let Some(Piece { span, step: Step::Writing { claim }, .. }) = self.pieces.get_mut(*key) else {
                continue;
            };
            let claim = Claim { chunk: span.chunk, blocks: *claim };
            // Where nothing lies under a chunk, what a failed write has left in the layer is valid all the same: else it
            // would read as zeros now and come back when a neighbour is written.
            if !claim.blocks.is_empty() && (result.is_ok() || self.volume.stands_on_nothing(claim.chunk)) {
                claims.push(claim);
            }
        }
        let published = self.publish(&claims);
        for (key, result) in batch.iter().filter(|(key, _)| key & FLAG == 0) {
            self.finish(*key, result, published);
        }
        self.synced(&batch);
        self.batch = batch;
        self.batch.clear();
    }

    fn publish(&self, claims: &[Claim]) -> bool {
        if claims.is_empty() {
            return true;
        }
        match self.volume.table().publish(claims) {
            Ok(overwritten) => {
                overwritten.into_iter().for_each(|chunk| self.volume.tell(VolumeEvent::Overwritten(chunk)));
                true
            }
            Err(error) => {
                self.blame(&error);
                false
            }
        }
    }

    fn finish(&mut self, key: u64, result: &io::Result<()>, published: bool) {
        let Some(piece) = self.pieces.get_mut(key) else { return };
        let span = piece.span;
        if let Err(error) = result {
            log::warn!("{} bytes at {} of {}: {error}", span.len, span.start, span.chunk);
        }
        let mut status = status_of(result);
        match std::mem::replace(&mut piece.step, Step::Reading) {
            Step::Reading | Step::Parked => {}
            Step::Writing { claim } => {
                if !claim.is_empty() && !published {
                    self.volume.take_back(span, claim);
                    if status == Status::Ok {
                        status = Status::IoError;
                    }
                }
                self.volume.table().end_write(span.chunk);
                self.note(span.chunk, self.volume.geometry().outer(span), status);
            }
            Step::Punching(exclusive) => {
                let remote = exclusive.was().0 == ChunkState::Remote;
                if status == Status::Ok {
                    match exclusive.finish(ChunkState::Zero, BlockMask::EMPTY, None) {
                        Ok(()) if remote => self.volume.tell(VolumeEvent::Overwritten(span.chunk)),
                        Ok(()) => {}
                        Err(error) => {
                            self.blame(&error);
                            status = Status::IoError;
                        }
                    }
                } else {
                    // The chunk is given back, which must come before the tracker looks.
                    drop(exclusive);
                }
                self.note(span.chunk, self.volume.geometry().full_mask(span.chunk), status);
            }
        }
        self.piece_done(key, status);
    }

    /// Tells the tracker of a change that has ended. One that failed may have changed the layer too; but a chunk that is
    /// the base image's all the same has nothing that could travel, and who waited for it there would wait for ever.
    fn note(&self, chunk: ChunkId, blocks: BlockMask, status: Status) {
        if status == Status::Ok || self.volume.table().look(chunk).has_content() {
            self.volume.tracker().note(chunk, blocks);
        }
    }

    /// Ends a piece, and its request if it was the last.
    pub(super) fn piece_done(&mut self, key: u64, status: Status) {
        if let Some(piece) = self.pieces.remove(key) {
            self.one_less(piece.request, status);
        }
    }

    fn one_less(&mut self, request: u64, status: Status) {
        let Some(active) = self.requests.get_mut(request) else { return };
        if active.status == Status::Ok {
            active.status = status;
        }
        active.pieces_left = active.pieces_left.saturating_sub(1);
        if !active.cutting {
            self.cut_on(request);
        }
    }

    /// Completes a request of which no piece is left; a stable one first makes its changes durable.
    fn end_if_done(&mut self, request: u64) {
        let Some(active) = self.requests.get_mut(request) else { return };
        if active.pieces_left > 0 || active.cut < active.len {
            return;
        }
        let changes = matches!(active.op, RequestOp::Write | RequestOp::Zero { .. });
        if changes && active.status == Status::Ok && !self.volume.write_cache() {
            self.start_sync(request);
        } else {
            self.complete(request, None);
        }
    }

    /// Makes durable what has completed; then the request is complete.
    pub(super) fn start_sync(&mut self, request: u64) {
        let Some(active) = self.requests.get_mut(request) else { return };
        if self.volume.is_faulty() {
            return self.complete(request, Some(Status::IoError));
        }
        active.position = self.volume.map().position();
        self.engine.submit(request | FLAG, Op::Sync { file: self.file });
    }

    /// Ends the syncs of a batch: one commit serves them all.
    fn synced(&mut self, batch: &[(u64, io::Result<()>)]) {
        let mut requests = Vec::new();
        let mut position = 0;
        for (tag, result) in batch.iter().filter(|(tag, _)| tag & FLAG != 0) {
            let key = tag & !FLAG;
            if let Err(error) = result {
                self.volume.layer_lost(error);
                self.complete(key, Some(Status::IoError));
            } else if let Some(active) = self.requests.get_mut(key) {
                position = position.max(active.position);
                requests.push(key);
                self.counters.count_sync();
            }
        }
        if requests.is_empty() {
            return;
        }
        if self.volume.is_faulty() {
            // Another sync was told of lost pages while these were under way; the kernel tells only one.
            return requests.into_iter().for_each(|key| self.complete(key, Some(Status::IoError)));
        }
        let committed = self.volume.map().commit(position);
        if let Err(error) = &committed {
            // Not for ever: a rotation replaces the journal.
            log::error!("the chunk map cannot be synced: {error}");
        }
        for key in requests {
            self.complete(key, committed.is_err().then_some(Status::IoError));
        }
    }

    /// Hands out the completion of a request; an error given here does not replace an earlier one.
    pub(super) fn complete(&mut self, request: u64, error: Option<Status>) {
        let Some(active) = self.requests.remove(request) else { return };
        let status = if active.status == Status::Ok { error.unwrap_or(Status::Ok) } else { active.status };
        self.counters.count(active.op, active.len, status);
        let read = active.op == RequestOp::Read && status == Status::Ok;
        let bytes_read = if read { u32::try_from(active.len).unwrap_or(u32::MAX) } else { 0 };
        self.answer(active.token, status, bytes_read);
    }

    /// A full disk may pass, and nothing has changed; an illegal move is a bug.
    fn blame(&self, error: &TableError) {
        match error {
            TableError::Note(_) => log::error!("{error}"),
            TableError::Illegal(_) => self.volume.fail(&error.to_string()),
        }
    }
}
