// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The destination's half of the handshake (paper: MIGRATION_NOTIFICATION): which source is let in, what has to be
//! dropped for it first, and what it is told of what is here.
//!
//! Versions count the writes of one run of one source. So what came from another run is dropped before anything is
//! taken; with one exception, a prepared offer, whose content cannot have changed as long as its epoch is current.

use super::*;

impl DestinationSession {
    /// Takes up a greeting that came while a record was being written.
    pub(super) fn greet_again(&mut self) {
        if self.step_seq.is_none()
            && self.connected
            && let Some(hello) = self.greeting.take()
        {
            self.on_hello(hello);
        }
    }

    pub(super) fn on_hello(&mut self, hello: Hello) {
        if let Err((reason, text)) = self.check_hello(&hello) {
            return self.refuse(reason, text);
        }
        let known = hello.migration == self.migration && self.agreed();
        let same_run = hello.incarnation == self.incarnation;
        match self.step {
            DestinationStep::Idle => self.adopt(hello),
            // Of the same disk, or it would have been refused.
            DestinationStep::Keeping => {
                self.take_up(hello);
                self.ask_what_is_current();
            }
            // The same migration, and all that came is of the same run of the source.
            // If the offer that is prepared here was reclaimed meanwhile, that is made durable first.
            DestinationStep::Prepared if known && same_run && hello.epoch > self.epoch => {
                self.void(hello.epoch);
                self.greeting = Some(hello);
            }
            DestinationStep::Receiving | DestinationStep::Prepared if known && same_run => {
                self.epoch = Epoch(self.epoch.0.max(hello.epoch.0));
                self.hello = Some(hello);
                self.welcome();
            }
            // The source was restarted. Its content has not changed since the offer, and it may have granted it.
            DestinationStep::Prepared if known && hello.epoch == self.epoch => {
                self.foreign = true;
                // It tells everything anew; after a crash of its host that may be less than it told before.
                self.pull.forget_told();
                self.hello = Some(hello);
                self.welcome();
            }
            // Versions of another run mean nothing, and a newer migration makes an older one void.
            DestinationStep::Receiving | DestinationStep::Prepared => self.adopt(hello),
            DestinationStep::Active
            | DestinationStep::Completing
            | DestinationStep::Complete
            | DestinationStep::Settling
                if known =>
            {
                self.hello = Some(hello);
                self.welcome();
            }
            DestinationStep::Active
            | DestinationStep::Completing
            | DestinationStep::Complete
            | DestinationStep::Settling
            | DestinationStep::Left => self.refuse(Refusal::Busy, "this daemon serves a disk of its own"),
            // A record is being written: the greeting waits for it.
            DestinationStep::Clearing
            | DestinationStep::Pruning
            | DestinationStep::Adopting
            | DestinationStep::Preparing
            | DestinationStep::Voiding
            | DestinationStep::Activating
            | DestinationStep::Dropping => self.greeting = Some(hello),
        }
    }

    /// T14: equal geometry proves nothing about the base image, and a feature that the guest uses must be here.
    pub(super) fn check_hello(&self, hello: &Hello) -> Result<(), (Refusal, String)> {
        let facts = &self.facts;
        let here = (facts.geometry.size(), facts.geometry.chunk_size());
        if (hello.size, hello.chunk_size) != here {
            let text = format!(
                "the source's volume has {} bytes in chunks of {}, this one {} in chunks of {}",
                hello.size, hello.chunk_size, here.0, here.1
            );
            return Err((Refusal::Geometry, text));
        }
        if hello.base != facts.base {
            let text = "the source's volume has another base image than this one".to_owned();
            return Err((Refusal::BaseIdentity, text));
        }
        let missing = hello.virtio_features & !facts.virtio_features;
        if missing != 0 {
            return Err((Refusal::Features, format!("virtio features {missing:#x} are not available here")));
        }
        if hello.queues > facts.queues || hello.read_only != facts.read_only {
            let text = format!(
                "the source's device has {} queues and read-only {}, this one {} and {}",
                hello.queues, hello.read_only, facts.queues, facts.read_only
            );
            return Err((Refusal::Features, text));
        }
        if facts.released && hello.volume != facts.volume {
            return Err((Refusal::Busy, "this daemon keeps what is left of another volume".to_owned()));
        }
        let owner = self.stage() != DestinationStage::Receiving && self.stage() != DestinationStage::Prepared;
        if hello.epoch < self.epoch && !owner && hello.migration != self.migration {
            return Err((
                Refusal::StaleEpoch,
                format!("epoch {} is older than {}", hello.epoch.0, self.epoch.0),
            ));
        }
        Ok(())
    }

    /// Makes room for a migration: first durably nobody's, then empty, then this migration's.
    pub(super) fn adopt(&mut self, hello: Hello) {
        let virgin = self.facts.virgin && self.step == DestinationStep::Idle;
        self.take_up(hello);
        if virgin {
            self.begin_adopting();
        } else if self.go(DestinationStep::Clearing) {
            self.persist_role(Role::Idle, None);
        }
    }

    fn take_up(&mut self, hello: Hello) {
        self.migration = hello.migration;
        self.incarnation = hello.incarnation;
        self.foreign = false;
        self.epoch = Epoch(self.epoch.0.max(hello.epoch.0));
        self.facts.volume = hello.volume;
        self.offer = None;
        self.source_synced = false;
        self.synced_recorded = false;
        self.digest = RemainingDigest::default();
        self.hello = Some(hello);
        self.pull.reset();
    }

    // ---- a disk that comes back -------------------------------------------------------------------------------

    /// What is here is the disk as it was when it went away: the source knows what of it has not changed. From the
    /// record on that came before this, a restart drops all of it.
    pub(super) fn ask_what_is_current(&mut self) {
        if let Some(migration) = self.facts.replica.filter(|_| self.connected) {
            self.kept = Some(Vec::new());
            self.send(Message::Replica { migration });
        }
    }

    /// The source names chunks that are current here.
    pub(super) fn on_keep(&mut self, entries: &[(ChunkId, Version)], last: bool) {
        let Some(kept) = self.kept.as_mut().filter(|_| self.step == DestinationStep::Keeping) else { return };
        kept.extend(entries.iter().filter(|(chunk, _)| self.facts.geometry.has(*chunk)));
        if kept.len() > self.facts.geometry.chunk_count() as usize {
            self.kept = None;
            return self.refuse(Refusal::Protocol, "more chunks are to be kept than the volume has");
        }
        if last
            && let Some(kept) = self.kept.take()
            && self.go(DestinationStep::Pruning)
        {
            self.actions.push_back(DestinationAction::Prune(kept));
        }
    }

    /// What is not current is dropped; these chunks were kept.
    pub fn handle_pruned(&mut self, _now: Duration, kept: impl IntoIterator<Item = (ChunkId, Version)>) {
        if self.step == DestinationStep::Pruning {
            self.pull.restore(kept);
            self.begin_adopting();
        }
        self.greet_again();
    }

    pub(super) fn begin_adopting(&mut self) {
        self.facts.virgin = false;
        self.facts.released = false;
        self.facts.replica = None;
        if self.go(DestinationStep::Adopting)
            && let Some(hello) = self.hello.clone()
        {
            self.actions.push_back(DestinationAction::Adopt(hello));
            self.persist(DestinationStage::Receiving, None);
        }
    }

    /// Everything that had come is dropped.
    pub fn handle_wiped(&mut self, _now: Duration) {
        match self.step {
            DestinationStep::Clearing => self.begin_adopting(),
            DestinationStep::Dropping => {
                self.go(DestinationStep::Left);
                // One that came while all was being dropped: nobody answers it later.
                if self.start.is_some() {
                    self.answer_start(false, Some(Refusal::Cancelled));
                }
                self.send(Message::Cancelled);
                let outcome = self.outcome.take().unwrap_or(Outcome::Cancelled);
                self.actions.push_back(DestinationAction::Finished(outcome));
            }
            DestinationStep::Idle
            | DestinationStep::Keeping
            | DestinationStep::Pruning
            | DestinationStep::Adopting
            | DestinationStep::Receiving
            | DestinationStep::Preparing
            | DestinationStep::Prepared
            | DestinationStep::Voiding
            | DestinationStep::Activating
            | DestinationStep::Active
            | DestinationStep::Completing
            | DestinationStep::Complete
            | DestinationStep::Settling
            | DestinationStep::Left => {}
        }
        self.greet_again();
    }

    /// Tells the source where this side stands.
    pub(super) fn welcome(&mut self) {
        if !self.connected {
            return;
        }
        self.welcomed = true;
        self.source_back();
        let stage = self.stage();
        let owner = matches!(stage, DestinationStage::Active { .. } | DestinationStage::Complete);
        let lists = if owner || self.foreign { Vec::new() } else { self.pull.have_lists() };
        self.send(Message::Welcome(Welcome {
            prepared: (stage == DestinationStage::Prepared).then_some(self.epoch),
            active: owner.then_some(self.epoch),
            complete: stage == DestinationStage::Complete,
            standing: (!owner).then(|| self.pull.told_digest()),
            have_follows: !lists.is_empty(),
        }));
        let last = lists.len().saturating_sub(1);
        for (index, entries) in lists.into_iter().enumerate() {
            self.send(Message::Have { entries, last: index == last });
        }
        match stage {
            DestinationStage::Complete => self.send(Message::Complete { epoch: self.epoch }),
            DestinationStage::Receiving | DestinationStage::Prepared => self.ask_for_disk(),
            DestinationStage::Active { .. } => {}
        }
    }
}
