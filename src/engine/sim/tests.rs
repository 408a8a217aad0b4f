// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a simulated disk promises, and what it does not.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;
use crate::engine::{AnyFile, CompanionEngine, Event, FileId, IoBuf, QueueEngine};

const LEN: usize = 64 << 10;

fn disk(seed: u64) -> (SimDisk, SimFile) {
    let disk = SimDisk::new(seed);
    let file = disk.create_file("layer").unwrap();
    file.set_len_now(LEN as u64).unwrap();
    disk.settle();
    (disk, file)
}

fn queue(file: &SimFile) -> (QueueEngine, FileId) {
    let mut engine = QueueEngine::new(8, AnyFile::Simulated(file)).unwrap();
    let id = engine.register_file(AnyFile::Simulated(file)).unwrap();
    (engine, id)
}

fn write(file: FileId, byte: u8) -> Op {
    Op::Write { file, offset: 0, buf: IoBuf::copy_of(&[byte; LEN]) }
}

/// Carries everything out; results by tag.
fn finish(disk: &SimDisk, engine: &mut QueueEngine) -> BTreeMap<u64, (io::Result<()>, Op)> {
    engine.enter(0, None).unwrap();
    while let Some(at) = disk.next_due() {
        disk.advance(at);
    }
    let mut ended = BTreeMap::new();
    while let Some(Event::Done(done)) = engine.next() {
        ended.insert(done.tag, (done.result, done.op));
    }
    ended
}

fn content(file: &SimFile) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    file.read_now(&mut bytes, 0);
    bytes
}

#[test]
fn operations_end_late_out_of_order_and_whole() {
    let mut orders = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let (disk, file) = disk(seed);
        disk.set_plan(SimPlan { latency: 100, ..SimPlan::default() });
        let (mut engine, id) = queue(&file);
        for tag in 0..4u8 {
            let buf = IoBuf::copy_of(&[tag + 1; 4096]);
            engine.submit(u64::from(tag), Op::Write { file: id, offset: u64::from(tag) * 4096, buf });
        }
        engine.enter(4, None).unwrap();
        assert_eq!(engine.in_flight(), 4);
        assert!(engine.next().is_none(), "no time has passed");
        let mut order = Vec::new();
        while let Some(at) = disk.next_due() {
            disk.advance(at);
            while let Some(Event::Done(done)) = engine.next() {
                done.result.unwrap();
                order.push(done.tag);
            }
        }
        assert_eq!((order.len(), engine.in_flight()), (4, 0));
        orders.insert(order);
        assert!((0..4).all(|n| content(&file)[n * 4096..(n + 1) * 4096] == [n as u8 + 1; 4096]));
        engine.submit(9, Op::Read { file: id, offset: 4096, buf: IoBuf::zeroed(8192) });
        engine.submit(8, Op::Read { file: id, offset: LEN as u64, buf: IoBuf::zeroed(512) });
        let mut ended = finish(&disk, &mut engine);
        let (result, op) = ended.remove(&9).unwrap();
        result.unwrap();
        assert_eq!(op.into_buf().unwrap().to_vec(), [[2; 4096], [3; 4096]].concat());
        assert_eq!(ended.remove(&8).unwrap().0.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
    assert!(orders.len() > 5, "the order is not drawn: {orders:?}");
}

#[test]
fn a_crash_keeps_what_was_synced_and_draws_for_the_rest() {
    let (mut old, mut new, mut torn) = (0, 0, 0);
    for seed in 0..200 {
        let (disk, file) = disk(seed);
        disk.set_plan(SimPlan { latency: 100, ..SimPlan::default() });
        let (mut engine, id) = queue(&file);
        engine.submit(1, write(id, 1));
        finish(&disk, &mut engine);
        engine.submit(2, Op::Sync { file: id });
        finish(&disk, &mut engine)[&2].0.as_ref().unwrap();
        engine.submit(3, write(id, 2));
        finish(&disk, &mut engine);
        disk.crash();
        assert!(file.write_now(&[9], 0).is_err(), "the process is gone");
        let found = content(&disk.reopened().file("layer").unwrap());
        let count = found.iter().filter(|byte| **byte == 2).count();
        assert!(found.iter().all(|byte| matches!(byte, 1 | 2)), "synced content is lost");
        assert_eq!(count % SIM_SECTOR, 0, "torn inside a sector");
        match count {
            0 => old += 1,
            LEN => new += 1,
            _ => torn += 1,
        }
    }
    assert!(old > 10 && new > 10 && torn > 10, "{old} {new} {torn}");
}

#[test]
fn a_sync_covers_what_came_before_it_and_goes_never_back() {
    let mut lost = 0;
    for seed in 0..200 {
        let (disk, file) = disk(seed);
        disk.set_plan(SimPlan { latency: 100, ..SimPlan::default() });
        let (mut engine, id) = queue(&file);
        engine.submit(1, write(id, 1));
        finish(&disk, &mut engine);
        // The first sync may end after the second, which covers more.
        engine.submit(2, Op::Sync { file: id });
        engine.enter(0, None).unwrap();
        file.write_now(&[2; LEN], 0).unwrap();
        engine.submit(3, Op::Sync { file: id });
        engine.enter(0, None).unwrap();
        file.write_now(&[3; 512], 0).unwrap();
        finish(&disk, &mut engine);
        disk.crash();
        let found = content(&disk.reopened().file("layer").unwrap());
        assert!(found[512..].iter().all(|byte| *byte == 2), "seed {seed}");
        lost += u32::from(found[0] == 2);
    }
    assert!(lost > 10, "what came after a sync was submitted is covered by it");
}

#[test]
fn a_sync_that_fails_lies_from_then_on() {
    let (disk, file) = disk(3);
    let (mut engine, id) = queue(&file);
    engine.submit(1, write(id, 1));
    finish(&disk, &mut engine);
    disk.fail_at(1, SimFault::Errno(libc::EIO));
    engine.submit(2, Op::Sync { file: id });
    let failed = finish(&disk, &mut engine).remove(&2).unwrap().0;
    assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EIO));
    engine.submit(3, Op::Sync { file: id });
    finish(&disk, &mut engine)[&3].0.as_ref().unwrap();
    assert_eq!(content(&file), [1; LEN], "the cache still has it");
    assert!(file.has_lost());
    disk.crash();
    let found = disk.reopened().file("layer").unwrap();
    assert_eq!(content(&found), [0; LEN]);
    assert!(!found.has_lost());
    assert_eq!(disk.failures(), 1);
}

#[test]
fn a_killed_process_changes_nothing_more_and_loses_nothing() {
    let mut parts = std::collections::BTreeSet::new();
    for seed in 0..60 {
        let (disk, file) = disk(seed);
        disk.set_plan(SimPlan { latency: 100, ..SimPlan::default() });
        file.write_now(&[1; 512], 0).unwrap();
        let (mut engine, id) = queue(&file);
        engine.submit(1, Op::Write { file: id, offset: 512, buf: IoBuf::copy_of(&[2; 8192]) });
        engine.enter(0, None).unwrap();
        disk.kill();
        assert_eq!((engine.in_flight(), disk.next_due()), (0, None));
        engine.submit(2, write(id, 3));
        assert!(finish(&disk, &mut engine).is_empty());
        assert!(file.sync_now().is_err() && disk.create_file("other").is_err());
        let found = content(&disk.reopened().file("layer").unwrap());
        assert_eq!(found[..512], [1; 512]);
        parts.insert(found.iter().filter(|byte| **byte == 2).count());
    }
    assert_eq!(parts.into_iter().collect::<Vec<_>>(), [0, 4096, 8192]);
}

#[test]
fn names_survive_in_the_order_in_which_they_changed() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..100 {
        let (disk, _) = disk(seed);
        let file = disk.create_file("a.tmp").unwrap();
        file.write_now(b"content", 0).unwrap();
        file.sync_now().unwrap();
        disk.rename_file("a.tmp", "a").unwrap();
        disk.remove_file("layer").unwrap();
        disk.crash();
        let disk = disk.reopened();
        seen.insert(disk.file_names().join(" "));
        if let Some(file) = disk.file("a") {
            assert_eq!(file.len(), 7);
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["a", "a layer", "a.tmp layer", "layer"]);
}

#[test]
fn failures_are_drawn_and_leave_parts() {
    let (disk, file) = disk(5);
    disk.set_plan(SimPlan { write_fails: 500, read_fails: 500, ..SimPlan::default() });
    let (mut engine, id) = queue(&file);
    let mut partly = 0;
    for round in 0..50 {
        file.write_now(&[0; LEN], 0).unwrap();
        engine.submit(1, write(id, round + 1));
        let failed = finish(&disk, &mut engine)[&1].0.is_err();
        let count = content(&file).iter().filter(|byte| **byte == round + 1).count();
        assert!(failed || count == LEN);
        partly += u32::from(failed && count > 0 && count < LEN);
    }
    engine.submit(1, Op::Punch { file: id, offset: 512, len: 1024 });
    disk.set_plan(SimPlan::default());
    finish(&disk, &mut engine)[&1].0.as_ref().unwrap();
    assert!(file.is_hole(512, 1024));
    assert!(partly > 5 && disk.failures() > 10);
}

#[test]
fn the_companion_waits_for_the_disks_clock_and_needs_no_runtime() {
    let (disk, file) = disk(1);
    disk.set_plan(SimPlan { latency: 50, ..SimPlan::default() });
    let engine = CompanionEngine::simulated();
    let id = engine.register_file(AnyFile::Simulated(&file)).unwrap();
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let mut task = std::pin::pin!(async {
        engine.write(id, 0, IoBuf::copy_of(&[7; 1024])).await.0?;
        engine.sync(id).await?;
        engine.punch(id, 0, 512).await?;
        io::Result::Ok(engine.read(id, 0, IoBuf::zeroed(1024)).await.1.to_vec())
    });
    let bytes = loop {
        if let std::task::Poll::Ready(result) = task.as_mut().poll(&mut context) {
            break result.unwrap();
        }
        assert_eq!(engine.in_flight(), 1);
        disk.advance(disk.next_due().unwrap());
    };
    assert_eq!(bytes, [[0; 512], [7; 512]].concat());
    assert_eq!(engine.in_flight(), 0);
}
