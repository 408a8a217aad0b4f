// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU's part of a joint migration: how far it is, and the few things that are asked of it.

use super::decide::{Asked, Vm as View};
use super::{FollowError, Hypervisor, PATIENCE};
use crate::control::qmp::{Qmp, QmpError, VmMigration, VmStatus};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long a stopped VM waits for disks that are not prepared: long enough for a daemon that connects again (at most
/// every 2 s), short for a guest that stands still.
const HELD_LIMIT: Duration = Duration::from_secs(3);
/// Time between two looks at a QEMU that cancels.
const LOOK: Duration = Duration::from_millis(50);

/// What QEMU's side of the migration is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not started: the peers have not agreed.
    Waiting,
    /// Started at QEMU.
    Running,
    /// The VM has stopped, and QEMU waits for leave.
    Held(Instant),
    /// QEMU has sent the VM away.
    Completed,
    /// It had, and the VM runs here again.
    Resumed,
    /// It failed, was cancelled, or never began: the VM is at the source.
    Stopped,
    /// The monitor went away in the middle.
    Lost(Instant),
}

/// QEMU at the source.
#[derive(Debug)]
pub(super) struct Vm {
    qmp: Qmp,
    pub(super) uri: String,
    pub(super) phase: Phase,
    pub(super) status: Option<VmStatus>,
    /// When QEMU was asked to cancel.
    cancelled: Option<Instant>,
    /// QEMU shall wait before the destination may start.
    hold: bool,
    /// It was this program that told QEMU to wait: it is set back in the end.
    hold_set: bool,
    /// QEMU has been given leave.
    continued: bool,
}

impl Vm {
    /// Connects to QEMU. With `hold`, QEMU will be made to wait for [`Vm::go_on`] once the VM has stopped. Nothing is
    /// changed at QEMU yet.
    pub(super) async fn connect(hypervisor: Hypervisor, hold: bool) -> Result<Self, FollowError> {
        let mut qmp = Qmp::connect(&hypervisor.qmp).await?;
        let now = qmp.query_migrate().await?;
        if now.state == VmMigration::Running {
            return Err(FollowError::VmBusy(now.word));
        }
        let hold_set = hold && !qmp.pauses_before_switchover().await?;
        Ok(Self {
            qmp,
            uri: hypervisor.uri,
            phase: Phase::Waiting,
            status: None,
            cancelled: None,
            hold,
            hold_set,
            continued: false,
        })
    }

    /// Lets QEMU begin.
    pub(super) async fn start(&mut self) -> Result<(), QmpError> {
        if self.hold_set {
            self.qmp.pause_before_switchover(true).await?;
        }
        self.qmp.migrate(&self.uri).await
    }

    /// Lets QEMU finish.
    pub(super) async fn go_on(&mut self) {
        self.continued = true;
        self.phase = Phase::Running;
        // If it is no longer waiting, the next look tells what it does instead.
        if let Err(QmpError::Lost(_)) = self.qmp.migrate_continue().await {
            self.phase = Phase::Lost(Instant::now());
        }
    }

    /// Looks at QEMU's migration and moves the phase on.
    pub(super) async fn poll(&mut self) {
        match self.qmp.query_migrate().await {
            Ok(status) => {
                self.phase = match (status.state, self.phase) {
                    (VmMigration::None | VmMigration::Running, phase) => {
                        if !self.hold || self.continued || !status.is_held() {
                            Phase::Running
                        } else if let Phase::Held(since) = phase {
                            Phase::Held(since)
                        } else {
                            Phase::Held(Instant::now())
                        }
                    }
                    (VmMigration::Completed, _) => Phase::Completed,
                    (VmMigration::Failed | VmMigration::Cancelled, _) => Phase::Stopped,
                };
                self.status = Some(status);
            }
            Err(_) => self.phase = Phase::Lost(Instant::now()),
        }
    }

    /// Whether its migration is under way.
    pub(super) fn runs(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Held(_))
    }

    /// Whether a VM that was sent away runs here again.
    pub(super) async fn runs_here(&mut self) -> bool {
        self.qmp.query_status().await.is_ok_and(|word| word == "running")
    }

    /// Asks QEMU to cancel, once.
    pub(super) async fn cancel(&mut self) {
        if self.cancelled.is_none() {
            self.cancelled = Some(Instant::now());
            if let Err(QmpError::Lost(_)) = self.qmp.migrate_cancel().await {
                self.phase = Phase::Lost(Instant::now());
            }
        }
    }

    /// Cancels and waits for the end, whatever it is; without an end, for [`PATIENCE`].
    pub(super) async fn cancel_to_the_end(&mut self) {
        if self.runs() {
            self.cancel().await;
        }
        let since = Instant::now();
        while self.runs() && since.elapsed() < PATIENCE {
            self.poll().await;
            sleep(LOOK).await;
        }
        if self.phase == Phase::Waiting {
            self.phase = Phase::Stopped;
        }
    }

    /// Leaves QEMU as it was found, as far as it can be asked.
    pub(super) async fn restore(&mut self) {
        if self.hold_set && !self.runs() && !matches!(self.phase, Phase::Lost(_)) {
            // A QEMU that is about to exit needs no capabilities.
            let _ = self.qmp.pause_before_switchover(false).await;
        }
    }

    /// Returns when QEMU says that its migration changed, or cannot be heard any more.
    pub(super) async fn event(&mut self) {
        // A monitor that is gone shows at the next look as well, so the error is not lost here.
        drop(self.qmp.migration_event().await);
    }

    /// QEMU's own account of its end.
    pub(super) fn reason(&self) -> String {
        let Some(status) = &self.status else { return "it never began".to_owned() };
        match &status.error {
            Some(error) => format!("{}: {error}", status.word),
            None => status.word.clone(),
        }
    }

    /// As the decision sees it.
    pub(super) fn view(&self) -> View {
        let asked = match self.cancelled {
            None => Asked::No,
            Some(since) if since.elapsed() > PATIENCE => Asked::Overdue,
            Some(_) => Asked::Yes,
        };
        match self.phase {
            Phase::Waiting => View::Waiting,
            Phase::Running => View::Running(asked),
            Phase::Held(since) => View::Held { asked, overdue: since.elapsed() > HELD_LIMIT },
            Phase::Completed => View::Completed,
            Phase::Resumed => View::Resumed,
            Phase::Stopped => View::Stopped,
            Phase::Lost(since) => View::Lost { overdue: since.elapsed() > PATIENCE },
        }
    }
}
