// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One operation in flight: which descriptor it goes through, what the kernel is given, what its answer means.

use super::direct::DirectAlign;
use super::fixed::FixedMemory;
use super::{IoBuf, Op};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{opcode, squeue};
use libc::iovec;
use std::io;

/// Most segments in one system call (`UIO_MAXIOV`); a longer list is carried out in several.
const MAX_SEGMENTS: usize = 1024;
/// Most bytes of a single-segment entry, whose length is 32 bits wide; the kernel stops below 2 GiB anyway.
const MAX_TRANSFER: usize = 1 << 30;

/// A file as the ring knows it: numbers in the ring's table of files.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) plain: Fixed,
    pub(super) direct: Option<(Fixed, DirectAlign)>,
}

/// An operation in flight. `iov` is what the kernel reads for a scattered transfer; its heap memory stays where it
/// is when the table grows.
#[derive(Default)]
pub(super) struct Slot {
    pub(super) tag: u64,
    pub(super) op: Option<Op>,
    /// Bytes transferred so far.
    done: usize,
    iov: Vec<iovec>,
    /// Aligned memory in place of the operation's own.
    bounce: Option<IoBuf>,
    /// The file system cannot zero a range: punch it.
    punch_instead: bool,
}

impl Slot {
    /// Takes an operation in.
    pub(super) fn fill(&mut self, tag: u64, op: Op) {
        (self.tag, self.op, self.done, self.bounce, self.punch_instead) = (tag, Some(op), 0, None, false);
    }

    /// Bytes of aligned memory that the operation needs before it can begin; 0 for none.
    pub(super) fn bounce_bytes(&self, target: &Target) -> usize {
        let Some((_, align)) = target.direct else { return 0 };
        match self.op.as_ref() {
            Some(Op::Read { offset, buf, .. } | Op::Write { offset, buf, .. })
                if align.fits(*offset, buf.len() as u64) && !align.fits_memory(buf) =>
            {
                buf.len()
            }
            _ => 0,
        }
    }

    /// Gives the operation its aligned memory, with what it writes.
    pub(super) fn bounce(&mut self, bytes: usize) {
        let aligned = IoBuf::zeroed(bytes);
        if let Some(Op::Write { buf, .. }) = self.op.as_ref() {
            buf.copy_into(&aligned);
        }
        self.bounce = Some(aligned);
    }

    /// Takes the operation out when it is over, and says how much aligned memory it had.
    pub(super) fn empty(&mut self, whole: bool) -> Option<(Op, usize)> {
        let op = self.op.take()?;
        let Some(bounce) = self.bounce.take() else { return Some((op, 0)) };
        if let (true, Op::Read { buf, .. }) = (whole, &op) {
            bounce.copy_into(buf);
        }
        Some((op, bounce.len()))
    }

    /// The entry for what is left to do; none for a slot that holds no operation.
    pub(super) fn entry(&mut self, target: &Target, memory: &FixedMemory) -> Option<squeue::Entry> {
        let plain = target.plain;
        let allocate = |offset: u64, len: u64, mode: i32| {
            let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(plain, len).offset(offset).mode(mode).build()
        };
        let done = self.done;
        let entry = match self.op.as_ref()? {
            Op::Sync { .. } => opcode::Fsync::new(plain).flags(FsyncFlags::DATASYNC).build(),
            Op::Punch { offset, len, .. } => allocate(*offset, *len, libc::FALLOC_FL_PUNCH_HOLE),
            Op::ZeroRange { offset, len, .. } if self.punch_instead => {
                allocate(*offset, *len, libc::FALLOC_FL_PUNCH_HOLE)
            }
            Op::ZeroRange { offset, len, .. } => allocate(*offset, *len, libc::FALLOC_FL_ZERO_RANGE),
            Op::Read { offset, buf, .. } => {
                let buf = self.bounce.as_ref().unwrap_or(buf);
                let (file, offset) = way(target, *offset, buf, done);
                match part(&mut self.iov, buf, done) {
                    Part::One(start, len) => match memory.find(start.addr(), len as usize) {
                        Some(index) => opcode::ReadFixed::new(file, start, len, index).offset(offset).build(),
                        None => opcode::Read::new(file, start, len).offset(offset).build(),
                    },
                    Part::Many(count) => {
                        opcode::Readv::new(file, self.iov.as_ptr(), count).offset(offset).build()
                    }
                }
            }
            Op::Write { offset, buf, .. } => {
                let buf = self.bounce.as_ref().unwrap_or(buf);
                let (file, offset) = way(target, *offset, buf, done);
                match part(&mut self.iov, buf, done) {
                    Part::One(start, len) => match memory.find(start.addr(), len as usize) {
                        Some(index) => opcode::WriteFixed::new(file, start.cast_const(), len, index)
                            .offset(offset)
                            .build(),
                        None => opcode::Write::new(file, start, len).offset(offset).build(),
                    },
                    Part::Many(count) => {
                        opcode::Writev::new(file, self.iov.as_ptr(), count).offset(offset).build()
                    }
                }
            }
        };
        Some(entry)
    }

    /// What a completion with `result` means: the operation's end, or `None` when it is to be launched again.
    pub(super) fn progress(&mut self, result: i32) -> Option<io::Result<()>> {
        let Ok(count) = usize::try_from(result) else {
            return match (-result, self.op.as_ref()) {
                (libc::EINTR | libc::EAGAIN, _) => None,
                (libc::EOPNOTSUPP, Some(Op::ZeroRange { .. })) if !self.punch_instead => {
                    self.punch_instead = true;
                    None
                }
                (errno, _) => Some(Err(io::Error::from_raw_os_error(errno))),
            };
        };
        let (len, nothing) = match self.op.as_ref() {
            Some(Op::Read { buf, .. }) => (buf.len(), io::ErrorKind::UnexpectedEof),
            Some(Op::Write { buf, .. }) => (buf.len(), io::ErrorKind::WriteZero),
            _ => return Some(Ok(())),
        };
        self.done = self.done.saturating_add(count);
        if self.done >= len {
            Some(Ok(()))
        } else if count == 0 {
            Some(Err(nothing.into()))
        } else {
            None
        }
    }
}

/// Which descriptor the rest of a transfer goes through, and where in the file it begins.
fn way(target: &Target, offset: u64, buf: &IoBuf, done: usize) -> (Fixed, u64) {
    let at = offset.saturating_add(done as u64);
    match target.direct {
        // A short transfer ends anywhere; what begins there, in the file or in memory, may be aligned no more.
        Some((direct, align))
            if align.fits(at, (buf.len() - done) as u64)
                && (done == 0 || (align.fits(done as u64, 0) && align.memory <= align.offset)) =>
        {
            (direct, at)
        }
        _ => (target.plain, at),
    }
}

/// What is left of a buffer, as the kernel wants it.
enum Part {
    One(*mut u8, u32),
    /// So many entries of the list.
    Many(u32),
}

/// The segments of `buf` after its first `done` bytes; several are listed in `iov`.
fn part(iov: &mut Vec<iovec>, buf: &IoBuf, done: usize) -> Part {
    let one =
        |start: *mut u8, len: usize| Part::One(start, u32::try_from(len.min(MAX_TRANSFER)).unwrap_or(0));
    if let [only] = buf.segments() {
        return one(only.iov_base.cast::<u8>().wrapping_add(done), only.iov_len - done);
    }
    iov.clear();
    let mut skip = done;
    for segment in buf.segments() {
        if skip >= segment.iov_len {
            skip -= segment.iov_len;
            continue;
        }
        let iov_base = segment.iov_base.cast::<u8>().wrapping_add(skip).cast();
        iov.push(iovec { iov_base, iov_len: segment.iov_len - skip });
        skip = 0;
        if iov.len() == MAX_SEGMENTS {
            break;
        }
    }
    match iov.as_slice() {
        [] => one(std::ptr::null_mut(), 0),
        [only] => one(only.iov_base.cast(), only.iov_len),
        list => Part::Many(u32::try_from(list.len()).unwrap_or(1)),
    }
}
