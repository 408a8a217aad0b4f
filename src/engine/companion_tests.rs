// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The companion's engine on a real runtime and real files.
#![allow(clippy::unwrap_used)]

use super::*;
use std::fs::File;
use std::os::unix::fs::FileExt;

#[tokio::test(flavor = "current_thread")]
async fn transfers_sync_and_punch() {
    let file = tempfile::tempfile().unwrap();
    let engine = CompanionEngine::new(8).unwrap();
    let id = engine.register_file(AnyFile::Kernel { file: &file, direct: None }).unwrap();
    let content: Vec<u8> = (0..300_000u32).map(|n| (n % 253) as u8).collect();
    let (result, buf) = engine.write(id, 100, IoBuf::copy_of(&content)).await;
    result.unwrap();
    engine.sync(id).await.unwrap();
    buf.fill_zero();
    let (result, buf) = engine.read(id, 100, buf).await;
    result.unwrap();
    assert_eq!(buf.to_vec(), content);
    engine.punch(id, 0, 200_000).await.unwrap();
    engine.zero_range(id, 200_000, 10).await.unwrap();
    let (result, buf) = engine.read(id, 0, IoBuf::zeroed(200_010)).await;
    result.unwrap();
    assert!(buf.is_zero());
    let (result, buf) = engine.read(id, 300_000, buf).await;
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(buf.len(), 200_010);
    assert!(engine.sync(FileId(7)).await.is_err());
    assert_eq!(engine.in_flight(), 0);
}

#[tokio::test(flavor = "current_thread")]
async fn many_futures_at_once() {
    let file = tempfile::tempfile().unwrap();
    let engine = Arc::new(CompanionEngine::new(8).unwrap());
    let id = engine.register_file(AnyFile::Kernel { file: &file, direct: None }).unwrap();
    let tasks: Vec<_> = (0..500u64)
        .map(|n| {
            let engine = Arc::clone(&engine);
            tokio::spawn(async move { engine.write(id, n * 8, IoBuf::copy_of(&n.to_le_bytes())).await.0 })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let mut word = [0; 8];
    for n in 0..500u64 {
        file.read_exact_at(&mut word, n * 8).unwrap();
        assert_eq!(u64::from_le_bytes(word), n);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_dropped_future_leaves_its_buffer_to_the_kernel() {
    let (reader, writer) = std::io::pipe().unwrap();
    let engine = CompanionEngine::new(8).unwrap();
    let id = engine
        .register_file(AnyFile::Kernel {
            file: &File::from(std::os::fd::OwnedFd::from(reader)),
            direct: None,
        })
        .unwrap();
    let memory = IoBuf::zeroed(4);
    let buf = memory.slice(0, 4);
    {
        let read = engine.read(id, 0, buf);
        tokio::pin!(read);
        let waited = tokio::time::timeout(std::time::Duration::from_millis(1), &mut read).await;
        assert!(waited.is_err(), "the pipe is empty");
    }
    assert_eq!(engine.in_flight(), 1, "the operation goes on without its future");
    std::io::Write::write_all(&mut &writer, b"late").unwrap();
    while engine.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(memory.to_vec(), b"late");
}
