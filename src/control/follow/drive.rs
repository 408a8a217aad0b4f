// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The loop: what the daemons, QEMU and the operator say comes in, [`decide`] says what follows, and that is done.

use super::account::{next, owner};
use super::decide::{At, Disk as DiskView, Step, Vm as VmView, Why, decide};
use super::disk::Disk;
use super::vm::{Phase, Vm};
use super::{DiskOutcome, Observer, Outcome};
use crate::control::client::{Change, ClientError};
use crate::control::words::state_word;
use crate::node::status::MigrationStatus;
use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Time between two looks at QEMU.
const TICK: Duration = Duration::from_millis(50);
/// Ticks between two looks at the VM's run state after QEMU has completed.
const RUN_STATE_TICKS: u32 = 10;
/// How long the disks may be on both sides before it is said: the VM starts them one after the other.
const SPLIT: Duration = Duration::from_secs(3);

pub(super) struct Follower<'a> {
    observer: &'a mut (dyn Observer + Send),
    disks: Vec<Disk>,
    vm: Option<Vm>,
    failure: Option<String>,
    /// Since when some disks are away and others are not, and whether that was said.
    split: Option<(Instant, bool)>,
    ticks: u32,
}

impl<'a> Follower<'a> {
    pub(super) fn new(disks: Vec<Disk>, vm: Option<Vm>, observer: &'a mut (dyn Observer + Send)) -> Self {
        Self { observer, disks, vm, failure: None, split: None, ticks: 0 }
    }

    /// Follows all to the end.
    pub(super) async fn drive(&mut self, interrupts: &mut mpsc::UnboundedReceiver<()>) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.show();
            if self.act().await {
                return;
            }
            tokio::select! {
                (at, told) = next_change(&mut self.disks) => {
                    let note = self.disks[at].told(told);
                    self.note(note);
                }
                () = vm_event(&mut self.vm) => self.poll_vm().await,
                _ = tick.tick() => {
                    self.relink().await;
                    self.poll_vm().await;
                    self.watch_split();
                }
                Some(()) = interrupts.recv() => self.interrupted().await,
            }
        }
    }

    /// How it ended.
    pub(super) async fn outcome(mut self) -> Outcome {
        if let Some(vm) = &mut self.vm {
            vm.restore().await;
        }
        if self.failure.is_some() && self.disks.len() > 1 {
            for line in self.account() {
                self.observer.note(&line);
            }
        }
        let told = |disk: &Disk| DiskOutcome {
            socket: disk.client().path().to_owned(),
            lost: disk.lost(),
            status: disk.status.clone(),
        };
        Outcome {
            disks: self.disks.iter().map(told).collect(),
            vm: self.vm.and_then(|vm| vm.status),
            failure: self.failure,
        }
    }

    fn show(&mut self) {
        let disks: Vec<&MigrationStatus> = self.disks.iter().map(|disk| &disk.status).collect();
        self.observer.progress(&disks, self.vm.as_ref().and_then(|vm| vm.status.as_ref()));
    }

    fn note(&mut self, note: Option<String>) {
        if let Some(text) = note {
            self.observer.note(&text);
        }
    }

    async fn relink(&mut self) {
        for at in 0..self.disks.len() {
            let note = self.disks[at].relink().await;
            self.note(note);
        }
    }

    /// Asks every daemon how its disk stands now.
    async fn look(&mut self) {
        for disk in &mut self.disks {
            disk.look().await;
        }
    }

    /// Looks at QEMU, as often as its phase is worth.
    async fn poll_vm(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        match &mut self.vm {
            Some(vm) if vm.runs() => vm.poll().await,
            Some(_) if self.ticks.is_multiple_of(RUN_STATE_TICKS) => self.look_for_resumed().await,
            _ => {}
        }
    }

    /// A source VM that runs again after `completed` was resumed: the destination did not take it. If disks are away
    /// then, they are missing where it runs.
    async fn look_for_resumed(&mut self) {
        if let Some(vm) = &mut self.vm
            && vm.phase == Phase::Completed
            && vm.runs_here().await
        {
            vm.phase = Phase::Resumed;
        }
    }

    fn views(&self) -> Vec<DiskView> {
        self.disks.iter().map(Disk::view).collect()
    }

    fn decide(&self) -> Step {
        decide(&self.views(), self.vm.as_ref().map_or(VmView::Absent, Vm::view))
    }

    /// Does what all states together ask for. Returns whether nothing more can come.
    async fn act(&mut self) -> bool {
        if self.vm.as_ref().is_some_and(|vm| matches!(vm.phase, Phase::Held(_))) {
            // What is decided now cannot be taken back: it must not rest on old news.
            self.look().await;
        }
        match self.decide() {
            Step::Wait => {}
            Step::StartVm => self.start_vm().await,
            Step::ContinueVm => {
                self.observer.note("every disk is prepared at its destination; QEMU goes on");
                if let Some(vm) = &mut self.vm {
                    vm.go_on().await;
                }
            }
            Step::CancelVm(why) => {
                self.give_up(why);
                if let Some(vm) = &mut self.vm {
                    vm.cancel().await;
                }
            }
            Step::CancelDisks(why) => {
                self.give_up(why);
                self.cancel_disks().await;
            }
            Step::End(Some(why)) => {
                self.give_up(why);
                return true;
            }
            Step::End(None) => {
                // The last look: a success must not hide a VM that is where its disks are not.
                self.look_for_resumed().await;
                if !self.vm.as_ref().is_some_and(|vm| vm.phase == Phase::Resumed) {
                    return true;
                }
            }
        }
        false
    }

    async fn start_vm(&mut self) {
        let Some(vm) = &mut self.vm else { return };
        self.observer.note(&format!("the peers have agreed; QEMU sends the VM to {}", vm.uri));
        match vm.start().await {
            Ok(()) => vm.phase = Phase::Running,
            Err(error) => {
                vm.phase = Phase::Stopped;
                self.fail(&error.to_string());
            }
        }
    }

    /// Cancels every disk that is here, one after the other, as long as none turns out to be away.
    async fn cancel_disks(&mut self) {
        if self.disks.len() > 1 {
            self.look().await;
        }
        for at in 0..self.disks.len() {
            let views = self.views();
            // The only disk may say for itself that it is too late.
            if views.len() > 1 && views.iter().any(|disk| disk.away()) {
                return;
            }
            if views[at].at != At::Back && !views[at].lost {
                let note = self.disks[at].cancel().await;
                self.note(note);
            }
        }
    }

    /// The operator wants out: QEMU first, then the disks.
    async fn interrupted(&mut self) {
        self.observer.note("cancelling; interrupt again to leave at once");
        if let Some(vm) = &mut self.vm {
            vm.cancel_to_the_end().await;
            if matches!(vm.phase, Phase::Completed | Phase::Resumed) {
                let disks = if self.disks.len() > 1 { "its disks" } else { "the disk" };
                self.observer.note(&format!("QEMU has sent the VM away already: {disks} must follow"));
                self.tell_account();
                return;
            }
        }
        self.cancel_disks().await;
        if self.vm.is_none() && !self.disks.iter().any(Disk::cancels) {
            // Without a VM of ours the migration simply goes on; a later wish may be granted.
            for disk in &mut self.disks {
                disk.forget_cancel();
            }
            self.observer.note("the migration goes on");
            self.tell_account();
        } else if !self.disks.iter().all(|disk| disk.away()) {
            self.fail("cancelled by the operator");
        }
    }

    /// Says once when the disks stay on both sides: the VM at the destination waits for those that are here.
    fn watch_split(&mut self) {
        let away = self.disks.iter().filter(|disk| disk.away()).count();
        if away == 0 || away == self.disks.len() {
            self.split = None;
            return;
        }
        let (since, said) = *self.split.get_or_insert((Instant::now(), false));
        if !said && since.elapsed() > SPLIT {
            self.split = Some((since, true));
            self.observer.note(
                "the disks are on both sides: those that are away cannot come back, the others must follow",
            );
            self.tell_account();
        }
    }

    fn tell_account(&mut self) {
        if self.disks.len() > 1 {
            for line in self.account() {
                self.observer.note(&line);
            }
        }
    }

    /// Where each disk stands, and what can be done.
    fn account(&self) -> Vec<String> {
        let away = self.disks.iter().any(Disk::away);
        let line = |disk: &Disk| {
            let status = &disk.status;
            format!(
                "{}{} ({}), owner {}, epoch {}; {}",
                disk.name(),
                state_word(status.state),
                status.stage,
                owner(status).word(),
                status.epoch,
                next(status, disk.lost(), away)
            )
        };
        self.disks.iter().map(line).collect()
    }

    fn give_up(&mut self, why: Why) {
        let text = self.sentence(why);
        self.fail(&text);
    }

    fn sentence(&self, why: Why) -> String {
        let unprepared = || {
            let names = self.disks.iter().filter(|disk| disk.view().at != At::Offered { prepared: true });
            names.map(|disk| disk.client().path().display().to_string()).collect::<Vec<_>>().join(", ")
        };
        match why {
            Why::Disk => {
                let broken = self.disks.iter().find(|disk| disk.view().broken());
                broken.map(Disk::failure).unwrap_or_default()
            }
            Why::NotPrepared => {
                format!("the VM has stopped, but its destination does not hold the disk of {}", unprepared())
            }
            Why::VmStopped => {
                let reason = self.vm.as_ref().map(Vm::reason).unwrap_or_default();
                format!("QEMU's migration did not complete ({reason})")
            }
            Why::VmResumed => {
                let away = self.disks.iter().any(Disk::away);
                let lacks = "; what is away serves it there no more: if it has not run at the destination, send it again";
                let lacks = if away { lacks } else { "" };
                format!("QEMU's migration completed, but the VM was resumed at the source{lacks}")
            }
            Why::VmLost => "QEMU's monitor went away before the switchover".to_owned(),
            Why::VmLostInSwitchover => {
                "QEMU's monitor went away in the switchover and no VM has started; the disk stays offered"
                    .to_owned()
            }
            Why::VmStuck => "QEMU does not end its migration".to_owned(),
            Why::CancelOverdue => "the cancel had no effect".to_owned(),
        }
    }

    /// Remembers the first reason: what follows from it is no news.
    fn fail(&mut self, why: &str) {
        if self.failure.is_none() {
            self.failure = Some(why.to_owned());
        }
    }
}

/// The next event of any daemon, and whose it is. Dropping the future loses nothing.
async fn next_change(disks: &mut [Disk]) -> (usize, Result<Option<Change>, ClientError>) {
    let mut waits: Vec<_> = disks.iter_mut().map(|disk| Box::pin(disk.next_change())).collect();
    poll_fn(|context| {
        for (at, wait) in waits.iter_mut().enumerate() {
            if let Poll::Ready(told) = wait.as_mut().poll(context) {
                return Poll::Ready((at, told));
            }
        }
        Poll::Pending
    })
    .await
}

/// Returns when QEMU says that its migration changed, or cannot be heard any more; never, while it does not run.
async fn vm_event(vm: &mut Option<Vm>) {
    match vm {
        Some(vm) if vm.runs() => vm.event().await,
        _ => std::future::pending().await,
    }
}
