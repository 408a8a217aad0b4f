// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The node's one peer connection: which one is taken, and when it is let go.
//!
//! Connections are numbered: what an older one still says is dropped. One that nobody uses must be closed, or its
//! tasks keep it alive by themselves, and the other side takes it for a live peer.

use super::admission::Standing;
use super::input::Input;
use super::node::{Node, RoleDriver};
use crate::core::message::{ChunkData, Message, Refusal};
use crate::core::record::SourceStage;
use crate::peer::{Features, LinkEvent, LinkSender, PeerLink};

/// Refuses a source that cannot be served.
pub(super) fn turn_away(link: &PeerLink, why: &str) {
    log::warn!("a migration source at {} was turned away: {why}", link.peer);
    // The peer may be gone already.
    let _ = link.tx.send(Message::Refuse { reason: Refusal::Busy, text: why.to_owned() });
    link.tx.close();
}

fn wire_bytes(link: &LinkSender) -> u64 {
    let stats = link.stats();
    stats.sent + stats.received
}

impl Node {
    pub(super) fn on_accepted(&mut self, link: PeerLink) {
        let Some(link) = self.meet_given_up(link) else { return };
        let refusal = match &self.role {
            RoleDriver::Serving => Some("this daemon serves a disk of its own"),
            RoleDriver::Source(source) if !matches!(source.session.stage(), SourceStage::Released { .. }) => {
                Some("this daemon is the source of a migration itself")
            }
            RoleDriver::Source(_) | RoleDriver::Idle | RoleDriver::Destination(_) => None,
        };
        if let Some(why) = refusal {
            return turn_away(&link, why);
        }
        // A live connection on which a source has greeted is not given up for a stranger's, and a released source
        // first hears that its destination knows. Who is closed without a word comes again.
        let taken = match &self.role {
            RoleDriver::Source(source) => !source.session.rests(),
            RoleDriver::Destination(destination) => {
                destination.greeted && destination.link.as_ref().is_some_and(|link| !link.is_closed())
            }
            RoleDriver::Serving | RoleDriver::Idle => false,
        };
        if taken {
            log::warn!("a connection from {} was closed: another one comes first", link.peer);
            return link.tx.close();
        }
        self.drop_link();
        self.tell_disconnected();
        let released = self.standing() == Standing::Released;
        if matches!(self.role, RoleDriver::Source(_) | RoleDriver::Idle) {
            self.jobs.begin_run();
            let replica = self.replica().filter(|_| link.agreed.features.has(Features::REPLICA));
            self.stand_ready(released, replica);
        }
        self.report.peer(&link.peer.to_string());
        self.use_link(link);
    }

    /// Makes `link` the peer connection.
    pub(super) fn use_link(&mut self, link: PeerLink) {
        self.drop_link();
        if matches!(self.role, RoleDriver::Serving | RoleDriver::Idle) {
            return link.tx.close();
        }
        self.link_number += 1;
        let number = self.link_number;
        let (sender, mut events) = (link.tx, link.rx);
        let inputs = self.inputs.clone();
        tokio::task::spawn_local(async move {
            while let Some(event) = events.recv().await {
                let closed = matches!(event, LinkEvent::Closed(_));
                if inputs.send(Input::Link(number, event)).is_err() || closed {
                    break;
                }
            }
        });
        let now = self.now();
        match &mut self.role {
            RoleDriver::Source(source) => {
                source.link = Some(sender);
                source.session.handle_connected(now);
            }
            RoleDriver::Destination(destination) => {
                destination.link = Some(sender);
                destination.greeted = false;
                destination.session.handle_connected(now);
            }
            RoleDriver::Serving | RoleDriver::Idle => {}
        }
    }

    pub(super) fn drop_link(&mut self) {
        self.link_number += 1;
        let link = match &mut self.role {
            RoleDriver::Source(source) => source.link.take(),
            RoleDriver::Destination(destination) => destination.link.take(),
            RoleDriver::Serving | RoleDriver::Idle => None,
        };
        if let Some(link) = link {
            self.wire_before += wire_bytes(&link);
            link.close();
        }
    }

    /// Bytes on the wire in this migration, both directions.
    pub(super) fn link_bytes(&self) -> u64 {
        self.wire_before + self.link().map_or(0, wire_bytes)
    }

    pub(super) fn link(&self) -> Option<&LinkSender> {
        match &self.role {
            RoleDriver::Source(source) => source.link.as_ref(),
            RoleDriver::Destination(destination) => destination.link.as_ref(),
            RoleDriver::Serving | RoleDriver::Idle => None,
        }
    }

    /// Sends a message if there is a connection; the session says it again on the next one if it must.
    pub(super) fn send(&self, message: Message) {
        if let Some(link) = self.link()
            && let Err(error) = link.send(message)
        {
            log::debug!("a message was not sent: {error}");
        }
    }

    /// Sends a chunk if there is a connection.
    pub(super) fn send_data(&self, data: ChunkData) {
        if let Some(link) = self.link()
            && let Err(error) = link.send_data(data)
        {
            log::debug!("a chunk was not sent: {error}");
        }
    }

    pub(super) fn on_link(&mut self, event: LinkEvent) {
        let now = self.now();
        match event {
            LinkEvent::Message(message) => match &mut self.role {
                RoleDriver::Source(source) => source.session.handle_message(now, message),
                RoleDriver::Destination(destination) => {
                    destination.greeted |= matches!(message, Message::Hello(_));
                    destination.session.handle_message(now, message);
                }
                RoleDriver::Serving | RoleDriver::Idle => {}
            },
            LinkEvent::Closed(reason) => {
                log::warn!("the connection to the peer has ended: {reason}");
                self.report.message(&format!("not connected: {reason}"));
                self.drop_link();
                self.tell_disconnected();
            }
        }
    }

    pub(super) fn tell_disconnected(&mut self) {
        let now = self.now();
        match &mut self.role {
            RoleDriver::Source(source) => source.session.handle_disconnected(now),
            RoleDriver::Destination(destination) => destination.session.handle_disconnected(now),
            RoleDriver::Serving | RoleDriver::Idle => {}
        }
    }

    pub(super) fn on_connected(&mut self, result: Result<PeerLink, String>) {
        match result {
            Ok(link) => {
                log::info!("connected to {}", link.peer);
                self.report.message("");
                self.report.connected();
                self.use_link(link);
            }
            Err(error) => {
                self.report.message(&format!("cannot connect: {error}"));
                log::warn!("cannot connect to the destination: {error}");
                self.tell_disconnected();
            }
        }
    }
}
