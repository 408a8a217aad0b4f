// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Things that a configuration must reach, or it proves little.

use crate::world::{DESTINATION, SOURCE, World};
use blkferry::core::message::{ChunkData, Message, Purpose};
use blkferry::core::ownership::{DestinationStep, destination_serves};
use blkferry::core::record::{DestinationStage, MigrationRecord, Role};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Seen {
    Handoff,
    Released,
    Settled,
    Cancelled,
    Failed,
    Denied,
    StartDenied,
    LateStartRefused,
    Reclaimed,
    Mismatch,
    Pushed,
    Pulled,
    Demanded,
    TornCapture,
    LatePush,
    OvertakenPush,
    Superseded,
    ForeignRun,
    NewRun,
    Overwritten,
    HeldFlush,
    LostByName,
    Flushed,
}

pub(crate) const ALL: [Seen; 23] = [
    Seen::Handoff,
    Seen::Released,
    Seen::Settled,
    Seen::Cancelled,
    Seen::Failed,
    Seen::Denied,
    Seen::StartDenied,
    Seen::LateStartRefused,
    Seen::Reclaimed,
    Seen::Mismatch,
    Seen::Pushed,
    Seen::Pulled,
    Seen::Demanded,
    Seen::TornCapture,
    Seen::LatePush,
    Seen::OvertakenPush,
    Seen::Superseded,
    Seen::ForeignRun,
    Seen::NewRun,
    Seen::Overwritten,
    Seen::HeldFlush,
    Seen::LostByName,
    Seen::Flushed,
];

impl Seen {
    pub(crate) fn bit(self) -> u32 {
        1 << self as u8
    }
}

impl World {
    pub(crate) fn see(&mut self, seen: Seen) {
        self.seen.0 |= seen.bit();
    }

    pub(crate) fn see_said(&mut self, side: usize, message: &Message) {
        match message {
            Message::Denied { .. } => self.see(Seen::Denied),
            Message::Reclaimed { .. } => self.see(Seen::Reclaimed),
            Message::Mismatch { .. } => self.see(Seen::Mismatch),
            Message::Pull { demand: true, .. } if side == DESTINATION => self.see(Seen::Demanded),
            _ => {}
        }
    }

    pub(crate) fn see_sent(&mut self, data: &ChunkData) {
        self.see(if data.purpose == Purpose::Push { Seen::Pushed } else { Seen::Pulled });
    }

    pub(crate) fn see_heard(&mut self, from: usize, message: &Message) {
        if from != SOURCE {
            return;
        }
        let Some(session) = self.destination() else { return };
        match message {
            Message::Chunk(data) if data.purpose == Purpose::Push => {
                let late = session.step() == DestinationStep::Prepared || destination_serves(session.step());
                if late && data.epoch <= session.epoch() {
                    self.see(Seen::LatePush);
                }
            }
            Message::Hello(hello) => {
                let MigrationRecord::V1 { epoch, role, .. } = &self.side(DESTINATION).record;
                let Role::Destination(record) = role else { return };
                if record.migration != hello.migration || record.incarnation == hello.incarnation {
                    return;
                }
                let prepared = record.stage == DestinationStage::Prepared && *epoch == hello.epoch;
                self.see(if prepared { Seen::ForeignRun } else { Seen::NewRun });
            }
            _ => {}
        }
    }
}
