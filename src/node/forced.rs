// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A daemon whose side was made the owner by force (`recover`, docs/adr/0013): what it lacks is lost and not at a
//! source, and a source that comes back after all must not get the disk.
//!
//! Where an offer was taken without a grant, that source could still take it back by itself: so it is asked for the
//! grant after the fact. It makes the grant durable, as it always does, and serves no guest from then on. A source that
//! has taken the disk back already cannot be stopped by anybody but the operator.

use super::links;
use super::node::{Node, RoleDriver};
use crate::core::geometry::ChunkId;
use crate::core::message::{Epoch, Hello, Message, Refusal, VolumeId, Welcome};
use crate::core::takeover::Was;
use crate::peer::{LinkEvent, PeerLink};
use crate::store::{Forced, utc};
use log::Level;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use tokio::task::spawn_local;
use tokio::time::timeout;

/// How long a source may take to greet, and to grant.
const PATIENCE: Duration = Duration::from_secs(5);

/// An ownership that was forced, as far as this run of the daemon goes.
#[derive(Debug, Default)]
pub(super) struct ForcedOwner {
    forced: Option<Forced>,
    told_of_loss: bool,
    /// The source that was given up has come back: it goes on trying for ever, and the log has had it once.
    met: Rc<Cell<bool>>,
}

impl ForcedOwner {
    /// Tells the log.
    pub(super) fn new(forced: Option<Forced>) -> Self {
        if let Some(forced) = &forced {
            log::warn!("{}", in_words(forced));
        }
        Self { forced, told_of_loss: false, met: Rc::default() }
    }
}

/// What was forced, for log and status.
fn in_words(forced: &Forced) -> String {
    format!(
        "this side was made the owner by force at {}: it was {} (epoch {}, now {}); {} chunks ({} bytes) were lost; \
         recover.log in the state directory has all of it",
        utc(forced.at),
        forced.was,
        forced.before.0,
        forced.after.0,
        forced.chunks,
        forced.bytes
    )
}

impl Node {
    pub(super) fn forced_words(&self) -> String {
        self.forced.forced.as_ref().map(in_words).unwrap_or_default()
    }

    /// Chunks of which a part is lost: no migration brings them, and only the guest can heal them.
    pub(super) fn lost_chunks(&self) -> u64 {
        match &self.role {
            RoleDriver::Serving => self.volume.counts().remote,
            RoleDriver::Idle | RoleDriver::Source(_) | RoleDriver::Destination(_) => 0,
        }
    }

    /// The guest wants what is lost. Only the first time is told: a guest may ask very often.
    pub(super) fn lost_demand(&mut self, chunk: ChunkId) {
        if !std::mem::replace(&mut self.forced.told_of_loss, true) {
            log::error!(
                "the guest wants {chunk}, a part of which is lost: it gets I/O errors for what is lost until it has \
                 written it (blkferry recover shows where)"
            );
        }
        self.fail_waiting(chunk);
    }

    /// Takes a connection at a side that serves; returns it if nobody was given up here.
    pub(super) fn meet_given_up(&self, link: PeerLink) -> Option<PeerLink> {
        let (RoleDriver::Serving, Some(forced)) = (&self.role, self.forced.forced) else { return Some(link) };
        if forced.was.is_source() {
            return Some(link);
        }
        let (volume, met) = (self.volume_id, Rc::clone(&self.forced.met));
        spawn_local(async move { meet(link, forced, volume, &met).await });
        None
    }
}

async fn next(link: &mut PeerLink) -> Option<Message> {
    match timeout(PATIENCE, link.rx.recv()).await {
        Ok(Some(LinkEvent::Message(message))) => Some(message),
        Ok(Some(LinkEvent::Closed(_)) | None) | Err(_) => None,
    }
}

/// Hears who connects, and turns it away, the source that was given up with the reason.
async fn meet(mut link: PeerLink, forced: Forced, volume: VolumeId, met: &Cell<bool>) {
    let Some(Message::Hello(hello)) = next(&mut link).await else { return link.tx.close() };
    if hello.migration != forced.migration || hello.volume != volume {
        return links::turn_away(&link, "this daemon serves a disk of its own");
    }
    let why = format!(
        "the disk was taken by force at {} and has another owner since (epoch {}): this source is given up",
        utc(forced.at),
        forced.after.0
    );
    let level = if met.replace(true) { Level::Debug } else { Level::Warn };
    if forced.was == Was::Prepared {
        fence(&mut link, &hello, forced.before, level).await;
    }
    log::log!(level, "the source at {} was turned away: {why}", link.peer);
    // The peer may be gone already.
    let _ = link.tx.send(Message::Refuse { reason: Refusal::Busy, text: why });
    link.tx.close();
}

/// Has the source make the grant durable that was not waited for.
async fn fence(link: &mut PeerLink, hello: &Hello, offered: Epoch, level: Level) {
    if hello.epoch == offered && granted(link, offered).await {
        log::log!(
            level,
            "the source at {} was given up and has come back: it has granted the disk",
            link.peer
        );
    } else {
        log::error!(
            "the source at {} was given up and has come back (epoch {}), and does not grant the disk that it offered \
             under epoch {}: it may serve a guest, and then there are TWO OWNERS. Stop one of them",
            link.peer,
            hello.epoch.0,
            offered.0
        );
    }
}

async fn granted(link: &mut PeerLink, offered: Epoch) -> bool {
    let welcome = Welcome {
        prepared: Some(offered),
        active: None,
        complete: false,
        standing: None,
        have_follows: false,
    };
    let asked = link.tx.send(Message::Welcome(welcome)).is_ok()
        && link.tx.send(Message::Activate { epoch: Some(offered) }).is_ok();
    if !asked {
        return false;
    }
    loop {
        match next(link).await {
            Some(Message::Granted { epoch }) if epoch == offered => return true,
            Some(Message::Denied { reason, .. }) => {
                log::error!("the source at {} denies the disk: {reason:?}", link.peer);
                return false;
            }
            Some(_) => {}
            None => return false,
        }
    }
}
