// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Server-sent events (WHATWG HTML, section 9.2): the snapshot's changes as they come.
//!
//! A listener gets `volume` and `migration` at once, then each again whenever it changed. The data of an event is the
//! whole object, not a difference: a listener that missed some is right again with the next one. So a slow listener
//! needs no queue: the watch channel keeps only the newest snapshot, and what lies between is skipped. What is never
//! skipped is the last one. Nobody announces that a counter has moved, so each listener's task asks now and then: the
//! daemon ticks only while somebody listens.

use crate::node::status::{MigrationStatus, NodeHandle, VolumeStatus};
use axum::response::sse::{Event, KeepAlive, KeepAliveStream, Sse};
use serde::Serialize;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;

/// Name of the events that carry a [`VolumeStatus`].
pub const VOLUME: &str = "volume";
/// Name of the events that carry a [`MigrationStatus`].
pub const MIGRATION: &str = "migration";
/// Time between keep-alive comments.
pub const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Least time between two batches of events, so that a busy guest does not turn into a busy API.
const PACE: Duration = Duration::from_millis(50);
/// How much longer a listener waits for a change before it asks for one.
const PATIENCE: Duration = Duration::from_millis(150);

type Item = Result<Event, Infallible>;

/// The events of `node`'s snapshots until `stopping` turns true or the node is gone.
pub(super) fn stream(
    node: NodeHandle,
    stopping: watch::Receiver<bool>,
) -> Sse<KeepAliveStream<ReceiverStream<Item>>> {
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(pump(node, stopping, sender));
    Sse::new(ReceiverStream::new(receiver))
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("still here"))
}

/// Feeds one listener. Ends when the listener leaves, the daemon stops, or the node is gone.
async fn pump(mut node: NodeHandle, mut stopping: watch::Receiver<bool>, listener: mpsc::Sender<Item>) {
    let mut volume: Option<VolumeStatus> = None;
    let mut migration: Option<MigrationStatus> = None;
    node.refresh().await;
    loop {
        let now = node.snapshots.borrow_and_update().clone();
        let events =
            [changed(MIGRATION, &mut migration, now.migration), changed(VOLUME, &mut volume, now.volume)];
        for event in events.into_iter().flatten() {
            if listener.send(Ok(event)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            gone = changes(&mut node) => {
                if gone {
                    return;
                }
            }
            _ = stopping.wait_for(|stop| *stop) => return,
            () = listener.closed() => return,
        }
    }
}

/// Waits for another snapshot, or makes one; returns whether the node has gone.
async fn changes(node: &mut NodeHandle) -> bool {
    sleep(PACE).await;
    match timeout(PATIENCE, node.snapshots.changed()).await {
        Ok(next) => next.is_err(),
        Err(_) => {
            node.refresh().await;
            false
        }
    }
}

/// The event for `now` if it differs from what was last told.
fn changed<T: Serialize + PartialEq>(name: &'static str, told: &mut Option<T>, now: T) -> Option<Event> {
    if told.as_ref() == Some(&now) {
        return None;
    }
    let event = Event::default().event(name).json_data(&now);
    *told = Some(now);
    event.inspect_err(|error| log::error!("cannot write a {name} event: {error}")).ok()
}
