// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Direct transfers of every alignment, against a model of the file; registered memory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

use super::direct::DirectFile;
use super::{Completion, Event, FileId, IoBuf, Op, UringEngine};
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;

const SIZE: usize = 256 << 10;

/// Beside this program: a temporary folder may be in memory, where nothing is direct.
fn file() -> (tempfile::TempDir, File, DirectFile) {
    let here = std::env::current_exe().unwrap();
    let dir = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
    let path = dir.path().join("file");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(SIZE as u64).unwrap();
    let direct = DirectFile::open(&path, true, true).unwrap().unwrap();
    (dir, file, direct)
}

fn finish(engine: &mut UringEngine) -> Vec<Completion> {
    let mut all = Vec::new();
    while engine.in_flight() > 0 {
        engine.enter(1, None).unwrap();
        while let Some(event) = engine.next() {
            if let Event::Done(done) = event {
                all.push(done);
            }
        }
    }
    all
}

fn ok(engine: &mut UringEngine, op: Op) -> Op {
    engine.submit(1, op);
    let done = finish(engine).pop().unwrap();
    done.result.unwrap();
    done.op
}

#[derive(Debug, Clone)]
struct Transfer {
    write: bool,
    offset: usize,
    len: usize,
    /// Bytes by which the memory is off its alignment.
    skew: usize,
    /// Where the memory is cut in two.
    cut: usize,
}

fn transfer() -> impl Strategy<Value = Transfer> {
    let unit = prop_oneof![Just(1usize), Just(512), Just(4096)];
    (any::<bool>(), unit, 0usize..SIZE, 1usize..40_000, prop_oneof![Just(0usize), 0usize..512], 0usize..9000)
        .prop_map(|(write, unit, offset, len, skew, cut)| {
            let offset = offset / unit * unit;
            let len = len.next_multiple_of(unit).min(SIZE - offset).max(1);
            Transfer { write, offset, len, skew, cut }
        })
}

/// A buffer of `len` bytes in two pieces at addresses that are off by `skew`.
fn skewed(len: usize, skew: usize, cut: usize) -> IoBuf {
    let cut = cut.min(len);
    let whole = IoBuf::zeroed(len + skew + 4096);
    let (first, second) = (whole.slice(skew, cut), whole.slice(cut + skew + 4096 - 512, len - cut));
    let ranges: Vec<_> = [&first, &second]
        .iter()
        .flat_map(|buf| {
            buf.segments().iter().map(|s| (s.iov_base.cast::<u8>(), s.iov_len)).collect::<Vec<_>>()
        })
        .collect();
    // SAFETY: all ranges lie inside `whole`, which the buffer keeps.
    unsafe { IoBuf::from_raw(ranges, std::sync::Arc::new(whole)) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_alignment_reads_what_was_written(transfers in prop::collection::vec(transfer(), 1..12), pinned: bool) {
        let (_dir, file, direct) = file();
        let mut engine = UringEngine::new(8).unwrap();
        let id = engine.register_file(&file, Some(&direct)).unwrap();
        let mut model = vec![0u8; SIZE];
        for (n, t) in transfers.iter().enumerate() {
            let buf = skewed(t.len, t.skew, t.cut);
            if pinned {
                engine.register_memory(Some(buf.slice(0, t.len))).unwrap();
            }
            if t.write {
                let content: Vec<u8> = (0..t.len).map(|at| (at % 251) as u8 ^ n as u8).collect();
                buf.copy_from(&content);
                ok(&mut engine, Op::Write { file: id, offset: t.offset as u64, buf });
                model[t.offset..t.offset + t.len].copy_from_slice(&content);
            } else {
                let op = ok(&mut engine, Op::Read { file: id, offset: t.offset as u64, buf });
                prop_assert!(op.into_buf().unwrap().to_vec() == model[t.offset..t.offset + t.len]);
            }
        }
        ok(&mut engine, Op::Sync { file: id });
        let mut seen = vec![0; SIZE];
        file.read_exact_at(&mut seen, 0).unwrap();
        prop_assert!(seen == model);
    }
}

#[test]
fn misaligned_memory_of_many_operations_is_bounded_and_all_complete() {
    let (_dir, file, direct) = file();
    let mut engine = UringEngine::new(8).unwrap();
    let id = engine.register_file(&file, Some(&direct)).unwrap();
    file.write_all_at(&[7; SIZE], 0).unwrap();
    // 128 MiB of misaligned reads at once: four times what may stand in for them.
    let count = 512;
    let buf = IoBuf::zeroed(SIZE + 1);
    for tag in 0..count {
        engine.submit(tag, Op::Read { file: id, offset: 0, buf: buf.slice(1, SIZE) });
    }
    let done = finish(&mut engine);
    assert_eq!(done.len(), count as usize);
    assert!(done.iter().all(|done| done.result.is_ok()));
    assert!(buf.slice(1, SIZE).to_vec() == [7; SIZE]);
}

#[test]
fn a_direct_read_that_the_file_ends_is_an_error_and_never_short() {
    let (_dir, file, direct) = file();
    let mut engine = UringEngine::new(8).unwrap();
    let id: FileId = engine.register_file(&file, Some(&direct)).unwrap();
    for (len, skew) in [(1000, 0), (SIZE as u64 - 512, 0), (1000, 1)] {
        file.set_len(len).unwrap();
        engine.submit(1, Op::Read { file: id, offset: 0, buf: skewed(SIZE, skew, 0) });
        let done = finish(&mut engine).pop().unwrap();
        assert_eq!(done.result.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof, "{len} {skew}");
    }
}
