// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ring against real files and eventfds.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

use super::*;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

fn engine_with_file(entries: u32) -> (UringEngine, File, FileId) {
    let file = tempfile::tempfile().unwrap();
    let mut engine = UringEngine::new(entries).unwrap();
    let id = engine.register_file(&file, None).unwrap();
    (engine, file, id)
}

/// Drains until nothing is in flight.
fn finish(engine: &mut UringEngine) -> Vec<Completion> {
    let mut all = Vec::new();
    loop {
        while let Some(event) = engine.next() {
            match event {
                Event::Done(done) => all.push(done),
                Event::Ready(key) => panic!("key {key} is not polled"),
            }
        }
        if engine.in_flight() == 0 {
            return all;
        }
        engine.enter(1, None).unwrap();
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8 ^ seed).collect()
}

/// `len` bytes scattered over ranges of odd lengths.
fn scattered(len: usize, piece: usize) -> IoBuf {
    let whole = IoBuf::zeroed(len);
    let start = whole.segments()[0].iov_base.cast::<u8>();
    let ranges: Vec<_> =
        (0..len).step_by(piece).map(|at| (start.wrapping_add(at), piece.min(len - at))).collect();
    // SAFETY: all ranges lie inside `whole`, which the buffer keeps.
    unsafe { IoBuf::from_raw(ranges, std::sync::Arc::new(whole)) }
}

#[test]
fn what_is_written_is_read_back_in_any_shape() {
    let (mut engine, file, id) = engine_with_file(8);
    for (seed, piece) in [(1, 100_000), (2, 33_333), (3, 4097), (4, 7)] {
        // 7 bytes a piece are more segments than one system call takes.
        let content = pattern(100_000, seed);
        let buf = scattered(content.len(), piece);
        buf.copy_from(&content);
        engine.submit(1, Op::Write { file: id, offset: 4096, buf });
        let done = finish(&mut engine);
        assert!(done[0].result.is_ok());
        let mut seen = vec![0; content.len()];
        file.read_exact_at(&mut seen, 4096).unwrap();
        assert_eq!(seen, content);
        engine.submit(2, Op::Read { file: id, offset: 4096, buf: scattered(content.len(), piece) });
        let mut done = finish(&mut engine);
        let completion = done.pop().unwrap();
        assert!(completion.tag == 2 && completion.result.is_ok());
        assert_eq!(completion.op.into_buf().unwrap().to_vec(), content);
    }
}

#[test]
fn a_read_that_the_file_ends_is_an_error_and_never_short() {
    let (mut engine, file, id) = engine_with_file(8);
    file.write_all_at(&pattern(5000, 0), 0).unwrap();
    engine.submit(7, Op::Read { file: id, offset: 4096, buf: IoBuf::zeroed(4096) });
    let done = finish(&mut engine);
    assert_eq!(done[0].result.as_ref().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert!(matches!(&done[0].op, Op::Read { buf, .. } if buf.len() == 4096));
    engine.submit(8, Op::Read { file: id, offset: 4096, buf: IoBuf::zeroed(904) });
    assert!(finish(&mut engine)[0].result.is_ok());
    engine.submit(9, Op::Read { file: id, offset: 0, buf: IoBuf::zeroed(0) });
    assert!(finish(&mut engine)[0].result.is_ok());
}

#[test]
fn errors_of_the_kernel_come_back_with_the_operation() {
    let (mut engine, _, id) = engine_with_file(8);
    let path = tempfile::NamedTempFile::new().unwrap();
    let read_only = engine.register_file(&File::open(path.path()).unwrap(), None).unwrap();
    engine.submit(1, Op::Write { file: read_only, offset: 0, buf: IoBuf::zeroed(512) });
    engine.submit(2, Op::Sync { file: FileId(99) });
    engine.submit(3, Op::Sync { file: id });
    let mut done = finish(&mut engine);
    done.sort_by_key(|completion| completion.tag);
    assert_eq!(done[0].result.as_ref().unwrap_err().raw_os_error(), Some(libc::EBADF));
    assert_eq!(done[1].result.as_ref().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert!(done[2].result.is_ok());
}

#[test]
fn punched_and_zeroed_ranges_read_as_zeros_and_keep_the_length() {
    for path in ["/dev/shm", "/tmp"] {
        let Ok(file) = tempfile::tempfile_in(path) else { continue };
        let mut engine = UringEngine::new(8).unwrap();
        let id = engine.register_file(&file, None).unwrap();
        file.write_all_at(&pattern(1 << 20, 5), 0).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap();
        engine.submit(1, Op::Punch { file: id, offset: 512 << 10, len: 512 << 10 });
        engine.submit(2, Op::ZeroRange { file: id, offset: 1000, len: 2000 });
        for done in finish(&mut engine) {
            assert!(done.result.is_ok(), "{path}: {done:?}");
        }
        let mut expected = pattern(1 << 20, 5);
        expected[512 << 10..].fill(0);
        expected[1000..3000].fill(0);
        let mut seen = vec![1; 1 << 20];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == expected, "{path}");
        let after = file.metadata().unwrap();
        assert_eq!(after.len(), before.len());
        assert!(after.blocks() < before.blocks(), "{path}: space is given back");
    }
}

#[test]
fn more_operations_than_the_ring_has_room_for() {
    let (mut engine, file, id) = engine_with_file(8);
    let total = 1000u64;
    for n in 0..total {
        let buf = IoBuf::copy_of(&n.to_le_bytes());
        engine.submit(n, Op::Write { file: id, offset: n * 8, buf });
    }
    assert_eq!(engine.in_flight(), 1000);
    let mut tags: Vec<_> = finish(&mut engine).into_iter().map(|done| done.tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..total).collect::<Vec<_>>());
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 999 * 8).unwrap();
    assert_eq!(u64::from_le_bytes(word), 999);
}

#[test]
fn a_dropped_engine_has_finished_its_operations() {
    let (mut engine, file, id) = engine_with_file(8);
    for n in 0..100u64 {
        let buf = IoBuf::copy_of(&pattern(4096, 9));
        engine.submit(n, Op::Write { file: id, offset: n * 4096, buf });
    }
    drop(engine);
    let mut seen = vec![0; 4096];
    for n in 0..100 {
        file.read_exact_at(&mut seen, n * 4096).unwrap();
        assert_eq!(seen, pattern(4096, 9));
    }
}

fn keys(engine: &mut UringEngine) -> Vec<u32> {
    engine.enter(0, None).unwrap();
    let mut keys = Vec::new();
    while let Some(event) = engine.next() {
        match event {
            Event::Ready(key) => keys.push(key),
            Event::Done(_) => panic!("no operation was submitted"),
        }
    }
    keys
}

#[test]
fn a_polled_descriptor_is_reported_at_each_wake_up_and_not_read() {
    let mut engine = UringEngine::new(8).unwrap();
    let kick = EventFd::new(0).unwrap();
    // SAFETY: `kick` is open and outlives the borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
    engine.poll_fd(fd, 3, 1).unwrap();
    assert!(keys(&mut engine).is_empty());
    for _ in 0..100 {
        kick.write(1).unwrap();
        engine.enter(1, None).unwrap();
        assert!(keys(&mut engine).contains(&3));
    }
    assert_eq!(engine.in_flight(), 0);
    assert_eq!(kick.read().unwrap(), 100, "the engine has not read it");

    kick.write(1).unwrap();
    engine.enter(1, None).unwrap();
    engine.unpoll(3).unwrap();
    assert!(keys(&mut engine).is_empty(), "nothing comes after unpoll");
    kick.write(1).unwrap();
    assert!(keys(&mut engine).is_empty());
    // Readable already: reported at once.
    engine.poll_fd(fd, 3, 1).unwrap();
    engine.enter(1, None).unwrap();
    assert_eq!(keys(&mut engine), [3]);
}

#[test]
fn wake_ups_and_completions_survive_an_overflow_of_the_completion_queue() {
    let (mut engine, _file, id) = engine_with_file(8);
    let kick = EventFd::new(0).unwrap();
    // SAFETY: `kick` is open and outlives the borrow.
    engine.poll_fd(unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) }, 5, 1).unwrap();
    for _ in 0..3 {
        for n in 0..200u64 {
            engine.submit(n, Op::Write { file: id, offset: n * 8, buf: IoBuf::copy_of(&[1; 8]) });
        }
        // Nothing is taken out: far more completions than the queue has room for.
        for _ in 0..50 {
            engine.enter(32, Some(Duration::from_millis(1))).unwrap();
        }
        kick.write(1).unwrap();
        let (mut done, mut ready) = (0, 0);
        while done < 200 || ready == 0 {
            engine.enter(1, Some(Duration::from_secs(10))).unwrap();
            while let Some(event) = engine.next() {
                match event {
                    Event::Done(completion) => done += usize::from(completion.result.is_ok()),
                    Event::Ready(key) => ready += key,
                }
            }
        }
        assert_eq!(done, 200);
        while !keys(&mut engine).is_empty() {}
    }
}

#[test]
fn a_wait_ends_at_its_timeout() {
    let mut engine = UringEngine::new(8).unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    engine.poll_fd(reader.as_fd(), 0, 1).unwrap();
    engine.enter(1, Some(Duration::from_millis(5))).unwrap();
    assert!(keys(&mut engine).is_empty());
}
