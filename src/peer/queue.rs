// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What waits for a socket: control messages in their order, and chunks by urgency - what the guest waits for first, then
//! prefetched ones, then pushed ones.
//!
//! One queue serves all streams of a link, and a stream takes its next chunk when it has written its last one. A queue a
//! stream was rejected: a chunk would wait behind a slow stream while another is idle, which is what a guest feels.
//! Nothing that has been handed to the kernel can be overtaken, so sockets are kept short (see `stream`).

use crate::core::message::Purpose;
use crate::wire::codec::Frame;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;

/// A chunk on its way into a socket.
#[derive(Debug)]
pub(super) struct Item {
    /// Its bytes.
    pub(super) frame: Frame,
    /// Why it travels.
    pub(super) purpose: Purpose,
}

#[derive(Debug, Default)]
struct Lanes {
    demand: VecDeque<Item>,
    prefetch: VecDeque<Item>,
    push: VecDeque<Item>,
    closed: bool,
}

/// The queue of a link.
#[derive(Debug, Default)]
pub(super) struct DataQueue {
    lanes: Mutex<Lanes>,
    /// Bytes queued or being written.
    backlog: AtomicUsize,
    filled: Notify,
    drained: Notify,
    urgent: Notify,
}

impl DataQueue {
    /// Queues a chunk; `false` when the link is closed.
    pub(super) fn put(&self, item: Item) -> bool {
        let demand = item.purpose == Purpose::Demand;
        {
            let mut lanes = self.lanes.lock();
            if lanes.closed {
                return false;
            }
            self.backlog.fetch_add(item.frame.len(), Ordering::Relaxed);
            match item.purpose {
                Purpose::Demand => lanes.demand.push_back(item),
                Purpose::Prefetch => lanes.prefetch.push_back(item),
                Purpose::Push => lanes.push.push_back(item),
            }
        }
        if demand {
            self.urgent.notify_waiters();
        }
        self.filled.notify_one();
        true
    }

    /// Whether no chunk waits.
    pub(super) fn is_empty(&self) -> bool {
        let lanes = self.lanes.lock();
        lanes.demand.is_empty() && lanes.prefetch.is_empty() && lanes.push.is_empty()
    }

    /// The next chunk, or the next one that the guest waits for; `None` if there is none. Wakes another stream when
    /// more are left.
    pub(super) fn pop(&self, only_demanded: bool) -> Option<Item> {
        let mut lanes = self.lanes.lock();
        let mut item = lanes.demand.pop_front();
        if !only_demanded {
            item = item.or_else(|| lanes.prefetch.pop_front()).or_else(|| lanes.push.pop_front());
        }
        let item = item?;
        if !(lanes.demand.is_empty() && lanes.prefetch.is_empty() && lanes.push.is_empty()) {
            self.filled.notify_one();
        }
        Some(item)
    }

    /// Returns when there may be a chunk to take.
    pub(super) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Returns when a chunk that the guest waits for is queued.
    pub(super) async fn urgent(&self) {
        loop {
            let urgent = self.urgent.notified();
            tokio::pin!(urgent);
            urgent.as_mut().enable();
            if !self.lanes.lock().demand.is_empty() {
                return;
            }
            urgent.await;
        }
    }

    /// A chunk of `len` bytes has been written.
    pub(super) fn written(&self, len: usize) {
        self.backlog.fetch_sub(len, Ordering::Relaxed);
        self.drained.notify_waiters();
    }

    /// Bytes queued or being written.
    pub(super) fn backlog(&self) -> usize {
        self.backlog.load(Ordering::Relaxed)
    }

    /// Returns when fewer than `limit` bytes wait, or the link is closed.
    pub(super) async fn below(&self, limit: usize) {
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            if self.backlog() < limit || self.lanes.lock().closed {
                return;
            }
            drained.await;
        }
    }

    /// No stream writes any more: what was half written is not on its way either.
    pub(super) fn abandon(&self) {
        self.close();
        self.backlog.store(0, Ordering::Relaxed);
    }

    /// Drops what is queued and takes nothing more.
    pub(super) fn close(&self) {
        {
            let mut lanes = self.lanes.lock();
            let freed = std::mem::take(&mut *lanes);
            lanes.closed = true;
            let freed = [freed.demand, freed.prefetch, freed.push];
            let bytes: usize = freed.iter().flatten().map(|item| item.frame.len()).sum();
            self.backlog.fetch_sub(bytes, Ordering::Relaxed);
        }
        self.drained.notify_waiters();
    }
}

/// What a control stream is to do next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Batch {
    /// Write these frames.
    Bytes(Vec<u8>),
    /// Wait for more.
    Empty,
    /// Nothing more will come.
    Finished,
}

#[derive(Debug, Default)]
struct Line {
    frames: VecDeque<Vec<u8>>,
    finished: bool,
}

/// Control messages on their way into a socket, in order.
#[derive(Debug, Default)]
pub(super) struct ControlQueue {
    line: Mutex<Line>,
    /// Bytes queued or being written.
    backlog: AtomicUsize,
    filled: Notify,
    drained: Notify,
}

impl ControlQueue {
    /// Queues an encoded message; `false` when the link is being closed.
    pub(super) fn put(&self, frame: Vec<u8>) -> bool {
        {
            let mut line = self.line.lock();
            if line.finished {
                return false;
            }
            self.backlog.fetch_add(frame.len(), Ordering::Relaxed);
            line.frames.push_back(frame);
        }
        self.filled.notify_one();
        true
    }

    /// The next frames, about `limit` bytes of them.
    pub(super) fn take(&self, limit: usize) -> Batch {
        let mut line = self.line.lock();
        let Some(mut bytes) = line.frames.pop_front() else {
            return if line.finished { Batch::Finished } else { Batch::Empty };
        };
        while bytes.len() < limit
            && let Some(frame) = line.frames.pop_front()
        {
            bytes.extend_from_slice(&frame);
        }
        Batch::Bytes(bytes)
    }

    /// Returns when there may be something to take.
    pub(super) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// `len` bytes have been written.
    pub(super) fn written(&self, len: usize) {
        self.backlog.fetch_sub(len, Ordering::Relaxed);
        self.drained.notify_waiters();
    }

    /// Bytes queued or being written.
    pub(super) fn backlog(&self) -> usize {
        self.backlog.load(Ordering::Relaxed)
    }

    /// Returns when fewer than `limit` bytes wait, or the link is being closed.
    pub(super) async fn below(&self, limit: usize) {
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            if self.backlog() < limit || self.is_finished() {
                return;
            }
            drained.await;
        }
    }

    /// Takes nothing more; what is queued is still to be written.
    pub(super) fn finish(&self) {
        self.line.lock().finished = true;
        self.filled.notify_one();
        self.drained.notify_waiters();
    }

    /// Whether it takes nothing more.
    pub(super) fn is_finished(&self) -> bool {
        self.line.lock().finished
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn item(purpose: Purpose, len: usize) -> Item {
        Item { frame: Frame { head: vec![0; len], body: Vec::new() }, purpose }
    }

    #[test]
    fn demand_overtakes_prefetch_overtakes_push() {
        let queue = DataQueue::default();
        let order = [Purpose::Push, Purpose::Prefetch, Purpose::Demand, Purpose::Push, Purpose::Demand];
        for (len, purpose) in order.into_iter().enumerate() {
            assert!(queue.put(item(purpose, len + 1)));
        }
        assert_eq!(queue.backlog(), 15);
        assert!(queue.put(item(Purpose::Demand, 6)));
        let demanded = std::iter::from_fn(|| queue.pop(true)).map(|item| item.frame.len());
        assert_eq!(demanded.collect::<Vec<_>>(), [3, 5, 6]);
        let lens: Vec<usize> = std::iter::from_fn(|| queue.pop(false)).map(|item| item.frame.len()).collect();
        assert_eq!(lens, [2, 1, 4]);
        assert_eq!(queue.backlog(), 21, "taken is not written");
        queue.written(21);
        assert_eq!(queue.backlog(), 0);
    }

    #[test]
    fn control_messages_keep_their_order_and_are_written_before_the_end() {
        let queue = ControlQueue::default();
        assert_eq!(queue.take(10), Batch::Empty);
        for byte in 0..5u8 {
            assert!(queue.put(vec![byte; 4]));
        }
        queue.finish();
        assert!(!queue.put(vec![9]));
        assert_eq!(queue.take(10), Batch::Bytes([[0; 4], [1; 4], [2; 4]].concat()));
        assert_eq!(queue.take(10), Batch::Bytes([[3; 4], [4; 4]].concat()));
        assert_eq!(queue.take(10), Batch::Finished);
        assert_eq!(queue.backlog(), 20);
    }

    #[tokio::test]
    async fn a_closed_queue_frees_what_it_held_and_lets_waiters_go() {
        let queue = std::sync::Arc::new(DataQueue::default());
        assert!(queue.put(item(Purpose::Push, 100)));
        let waiting = queue.clone();
        let waiter = tokio::spawn(async move { waiting.below(1).await });
        tokio::task::yield_now().await;
        queue.close();
        waiter.await.unwrap();
        assert_eq!(queue.backlog(), 0);
        assert!(!queue.put(item(Purpose::Push, 1)));
        assert!(queue.pop(false).is_none());
    }
}
