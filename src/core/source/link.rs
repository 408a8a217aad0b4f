// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source's conversation with the destination: connections, the handshake, who answers which message.
//!
//! The source connects, and goes on connecting for as long as the migration lives. Each connection begins with a
//! handshake that compares what both sides know, so that whatever the last one lost needs no repair of its own.

use super::*;
use crate::core::message::MAX_ENTRIES;

impl SourceSession {
    /// Whether nothing is to be said any more: released, and the destination knows (or was asked often enough).
    #[must_use]
    pub fn rests(&self) -> bool {
        self.step == SourceStep::Released && self.farewells == 0
    }

    pub(super) fn connect(&mut self, now: Duration) {
        self.link = Link::Down;
        self.actions.push_back(SourceAction::Connect { not_before: now });
    }

    pub(super) fn send(&mut self, message: Message) {
        if self.link != Link::Down {
            self.actions.push_back(SourceAction::Send(message));
        }
    }

    /// A connection is there: says who this is.
    pub fn handle_connected(&mut self, _now: Duration) {
        self.link = Link::Greeted;
        *self.backoff = MIN_BACKOFF;
        let hello = Hello { epoch: self.durable_epoch, ..self.params.hello.clone() };
        self.send(Message::Hello(hello));
    }

    /// The connection is lost, or could not be made: it is made again, for ever.
    pub fn handle_disconnected(&mut self, now: Duration) {
        self.link = Link::Down;
        self.welcome = None;
        self.prepared = None;
        self.push.disconnected();
        if self.step == SourceStep::Left {
            return self.finish();
        }
        if self.step == SourceStep::Released {
            // The destination may not have heard that it is released; it refuses a source that it has forgotten.
            if self.farewells == 0 {
                return;
            }
            self.farewells -= 1;
        }
        self.actions.push_back(SourceAction::Connect { not_before: now + *self.backoff });
        *self.backoff = (*self.backoff * 2).min(MAX_BACKOFF);
    }

    pub(super) fn hang_up(&mut self, now: Duration) {
        self.actions.push_back(SourceAction::Disconnect);
        self.handle_disconnected(now);
    }

    /// Takes what the destination says.
    pub fn handle_message(&mut self, now: Duration, message: Message) {
        match message {
            Message::Welcome(welcome) => self.on_welcome(now, welcome),
            Message::Replica { migration } => self.on_replica(now, migration),
            Message::Have { entries, last } => {
                if self.link == Link::Listing {
                    self.push.confirm(&entries);
                    if last {
                        self.agree(now);
                    }
                }
            }
            Message::Ack { entries } => {
                for (chunk, version) in entries {
                    self.push.acknowledged(chunk, version);
                }
            }
            Message::Prepared { epoch } if epoch == self.epoch => {
                self.prepared = Some(epoch);
                self.answer_stop();
            }
            // What counts as settled here is not there. The lists of a new handshake find out what is.
            Message::Mismatch { epoch } if epoch == self.epoch && self.step == SourceStep::Offered => {
                self.hang_up(now);
            }
            Message::Pull { epoch, chunk, demand } => self.on_pull(now, epoch, chunk, demand),
            Message::Activate { epoch } => self.on_activate(now, epoch),
            Message::Complete { epoch } => self.on_complete(epoch),
            Message::Refuse { reason, text } => self.on_refuse(now, reason, text),
            Message::Cancelled => self.on_cancelled(now),
            Message::Ping(number) => self.send(Message::Pong(number)),
            Message::Prepared { .. } | Message::Mismatch { .. } | Message::Pong(_) => {}
            Message::Hello(_)
            | Message::Keep { .. }
            | Message::Announce { .. }
            | Message::HotBase { .. }
            | Message::Chunk(_)
            | Message::Offer(_)
            | Message::PullFailed { .. }
            | Message::Granted { .. }
            | Message::Denied { .. }
            | Message::Reclaimed { .. }
            | Message::Synced { .. }
            | Message::Released { .. }
            | Message::Cancel => self.hang_up(now),
        }
    }

    /// The destination has an older state of this very disk: says what of it is current. It keeps that and welcomes.
    fn on_replica(&mut self, now: Duration, migration: MigrationId) {
        let given = matches!(
            self.step,
            SourceStep::Granting
                | SourceStep::Relinquished
                | SourceStep::Releasing
                | SourceStep::Released
                | SourceStep::Left
        );
        if self.link != Link::Greeted || given {
            return self.hang_up(now);
        }
        let kept = self.push.keep(migration);
        let lists = kept.chunks(MAX_ENTRIES).map(<[_]>::to_vec).collect::<Vec<_>>();
        if lists.is_empty() {
            return self.send(Message::Keep { entries: Vec::new(), last: true });
        }
        let last = lists.len() - 1;
        for (index, entries) in lists.into_iter().enumerate() {
            self.send(Message::Keep { entries, last: index == last });
        }
    }

    pub(super) fn on_welcome(&mut self, now: Duration, welcome: Welcome) {
        if self.link != Link::Greeted {
            return self.hang_up(now);
        }
        self.push.begin_listing();
        if welcome.standing != Some(self.push.told_digest()) {
            self.push.forget_told();
        }
        let listed = !welcome.have_follows;
        self.welcome = Some(welcome);
        self.link = Link::Listing;
        if listed {
            self.agree(now);
        }
    }

    /// What the destination has is known: goes on where the last connection ended.
    pub(super) fn agree(&mut self, now: Duration) {
        let Some(welcome) = self.welcome.take() else { return };
        self.push.end_listing();
        self.link = Link::Agreed;
        self.ever_agreed = true;
        self.announce_at = Some(Aside(now));
        match self.step {
            SourceStep::Offered => self.offer(),
            SourceStep::Relinquished => {
                if welcome.active.is_none() {
                    self.send(Message::Granted { epoch: self.epoch });
                }
                if self.synced_recorded {
                    self.send(Message::Synced { epoch: self.epoch });
                }
                if welcome.complete {
                    self.on_complete(self.epoch);
                }
            }
            SourceStep::Released => self.send(Message::Released { epoch: self.epoch }),
            SourceStep::Left => self.send(Message::Cancel),
            // It waits for a grant that will not come, and takes no pushes meanwhile.
            SourceStep::Pushing | SourceStep::Draining if welcome.prepared.is_some() => {
                self.send(Message::Reclaimed { epoch: self.epoch });
            }
            SourceStep::Arming
            | SourceStep::Pushing
            | SourceStep::Draining
            | SourceStep::Offering
            | SourceStep::Reclaiming
            | SourceStep::Granting
            | SourceStep::Releasing
            | SourceStep::Leaving => {}
        }
    }

    pub(super) fn on_refuse(&mut self, now: Duration, reason: Refusal, text: String) {
        match self.step {
            SourceStep::Pushing | SourceStep::Draining | SourceStep::Offered => {
                self.leave(Outcome::Failed { reason, text });
            }
            SourceStep::Left => self.finish(),
            SourceStep::Released => {
                self.farewells = 0;
                self.hang_up(now);
            }
            // Nothing that the destination says can give the disk back now, and a record that is being written
            // decides first: ask again later.
            SourceStep::Arming
            | SourceStep::Offering
            | SourceStep::Reclaiming
            | SourceStep::Granting
            | SourceStep::Relinquished
            | SourceStep::Releasing
            | SourceStep::Leaving => self.hang_up(now),
        }
    }

    pub(super) fn on_cancelled(&mut self, now: Duration) {
        if self.step == SourceStep::Left {
            self.finish();
        } else {
            let text = "the destination has dropped the migration".to_owned();
            self.on_refuse(now, Refusal::Cancelled, text);
        }
    }
}
