// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A migration from its request to its end, the hypervisor's beside it (paper, Algorithm 1).
//!
//! ```text
//!   arm the disk ──> peers agreed ──> QEMU: migrate ──> rings stop ──> disk owned by the destination ──> completed
//!        │                │                 │               │                     │
//!        └── refused      └── failed ───────┴── failed ─────┘                     └── nobody can go back
//!            nothing          cancel QEMU       cancel the disk                       any more
//!            happened         if it runs        if it still can be
//! ```
//!
//! Two migrations end together or not at all, but they are two programs: each step can fail on either side. The order
//! matters in one place. *QEMU is cancelled first, and its end is awaited, before the disk is*: the other way round,
//! QEMU could switch over in between, and a VM would wake up at the destination to a disk that is not coming.
//! If QEMU turns out to have completed, the disk goes on.
//!
//! This file decides nothing about who owns the disk. It asks, and the daemon may deny (`handed-over`).

use super::client::{Change, Client, ClientError, Events};
use super::qmp::{Qmp, QmpError, VmMigration, VmStatus};
use super::words::{is_final, is_handed_over, is_running, state_word};
use crate::node::status::{MigrationRequest, MigrationState, MigrationStatus, StartMode};
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

/// Time between two looks at QEMU.
const TICK: Duration = Duration::from_millis(50);
/// Ticks between two looks at the VM's run state after QEMU has completed.
const RUN_STATE_TICKS: u32 = 10;
/// Time between two attempts to cancel a disk that cannot be cancelled yet, and how long they go on.
const RETRY: Duration = Duration::from_millis(500);
const RETRIES: Duration = Duration::from_secs(10);
/// How long to wait for something that should be a matter of moments: a cancel, a lost daemon, a vanished QEMU.
const PATIENCE: Duration = Duration::from_secs(30);

/// The VM that moves with the disk.
#[derive(Debug, Clone)]
pub struct Hypervisor {
    /// QEMU's monitor socket at the source.
    pub qmp: PathBuf,
    /// Where QEMU sends the VM, such as `tcp:HOST:PORT`.
    pub uri: String,
}

/// What to migrate.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The disk's part.
    pub request: MigrationRequest,
    /// The VM's part, if this program is to start it.
    pub hypervisor: Option<Hypervisor>,
}

/// Somebody who watches.
pub trait Observer {
    /// How it stands; called often.
    fn progress(&mut self, disk: &MigrationStatus, vm: Option<&VmStatus>);
    /// A sentence for people.
    fn note(&mut self, text: &str);
}

/// How it ended, once the disk was armed.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The disk's last status.
    pub disk: MigrationStatus,
    /// QEMU's last status, if it was started.
    pub vm: Option<VmStatus>,
    /// Why it is no success.
    pub failure: Option<String>,
}

/// Why nothing was armed.
#[derive(Debug, Error)]
pub enum FollowError {
    /// The daemon.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// QEMU.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU migrates already.
    #[error("QEMU is migrating this VM already ({0})")]
    VmBusy(String),
}

impl FollowError {
    /// A stable word for programs.
    #[must_use]
    pub fn code(&self) -> &str {
        match self {
            Self::Client(error) => error.code(),
            Self::Qmp(_) => "qmp",
            Self::VmBusy(_) => "busy",
        }
    }
}

/// Arms the disk, starts QEMU's migration if the plan has one, and follows both to their end. Each value on
/// `interrupts` is one wish of the operator to cancel.
///
/// # Errors
/// [`FollowError`] if nothing was armed; whatever happens later is in the [`Outcome`].
pub async fn run(
    client: &Client,
    plan: Plan,
    observer: &mut (dyn Observer + Send),
    mut interrupts: mpsc::UnboundedReceiver<()>,
) -> Result<Outcome, FollowError> {
    // QEMU first: a wrong monitor path must not leave an armed disk behind.
    let vm = match plan.hypervisor {
        Some(hypervisor) => Some(Vm::connect(hypervisor).await?),
        None => None,
    };
    let before = client.migration().await?;
    let events = client.events().await?;
    let disk = client.migrate(&plan.request).await?;
    let fresh = disk.id != before.id || is_running(disk.state);
    let mut follower = Follower {
        client,
        observer,
        id: if fresh { disk.id.clone() } else { String::new() },
        old_id: before.id,
        seen: false,
        disk,
        start: plan.request.start,
        link: Link::Up(Box::new(events)),
        vm,
        failure: None,
        cancel: CancelState::No,
        ticks: 0,
    };
    follower.drive(&mut interrupts).await;
    let vm = follower.vm.and_then(|vm| vm.status);
    Ok(Outcome { disk: follower.disk, vm, failure: follower.failure })
}

/// What QEMU's side of the migration is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not started: the peers have not agreed.
    Waiting,
    /// Started at QEMU.
    Running,
    /// QEMU has sent the VM away.
    Completed,
    /// It failed, was cancelled, or never began: the VM is at the source.
    Stopped,
    /// The monitor went away in the middle.
    Lost(Instant),
}

#[derive(Debug)]
struct Vm {
    qmp: Qmp,
    uri: String,
    phase: Phase,
    status: Option<VmStatus>,
    /// When QEMU was asked to cancel.
    cancelled: Option<Instant>,
}

impl Vm {
    async fn connect(hypervisor: Hypervisor) -> Result<Self, FollowError> {
        let mut qmp = Qmp::connect(&hypervisor.qmp).await?;
        let now = qmp.query_migrate().await?;
        if now.state == VmMigration::Running {
            return Err(FollowError::VmBusy(now.word));
        }
        Ok(Self { qmp, uri: hypervisor.uri, phase: Phase::Waiting, status: None, cancelled: None })
    }

    /// Looks at QEMU's migration and moves the phase on.
    async fn poll(&mut self) {
        match self.qmp.query_migrate().await {
            Ok(status) => {
                self.phase = match status.state {
                    VmMigration::None | VmMigration::Running => Phase::Running,
                    VmMigration::Completed => Phase::Completed,
                    VmMigration::Failed | VmMigration::Cancelled => Phase::Stopped,
                };
                self.status = Some(status);
            }
            Err(_) => self.phase = Phase::Lost(Instant::now()),
        }
    }

    /// Asks QEMU to cancel, once.
    async fn cancel(&mut self) {
        if self.cancelled.is_none() {
            self.cancelled = Some(Instant::now());
            if let Err(QmpError::Lost(_)) = self.qmp.migrate_cancel().await {
                self.phase = Phase::Lost(Instant::now());
            }
        }
    }

    /// QEMU's own account of its end.
    fn reason(&self) -> String {
        let Some(status) = &self.status else { return "it never began".to_owned() };
        match &status.error {
            Some(error) => format!("{}: {error}", status.word),
            None => status.word.clone(),
        }
    }
}

/// The connection to the daemon's events.
#[derive(Debug)]
enum Link {
    Up(Box<Events>),
    Down(Instant),
}

/// Whether the disk's migration was asked to cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CancelState {
    No,
    Accepted(Instant),
    /// Not now: a disk that is being offered comes back when the VM's rings start at the source again.
    NotYet {
        first: Instant,
        last: Instant,
    },
    Denied,
}

struct Follower<'a> {
    client: &'a Client,
    observer: &'a mut (dyn Observer + Send),
    /// The migration that was armed; empty until it shows.
    id: String,
    /// The migration before it, whose end must not be taken for this one's.
    old_id: String,
    /// Whether an event of this migration has come.
    seen: bool,
    disk: MigrationStatus,
    start: StartMode,
    link: Link,
    vm: Option<Vm>,
    failure: Option<String>,
    cancel: CancelState,
    ticks: u32,
}

impl Follower<'_> {
    async fn drive(&mut self, interrupts: &mut mpsc::UnboundedReceiver<()>) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.observer.progress(&self.disk, self.vm.as_ref().and_then(|vm| vm.status.as_ref()));
            self.act().await;
            if self.ended() {
                return;
            }
            tokio::select! {
                told = next_change(&mut self.link) => self.told(told),
                () = vm_event(&mut self.vm) => self.poll_vm().await,
                _ = tick.tick() => {
                    self.relink().await;
                    self.poll_vm().await;
                }
                Some(()) = interrupts.recv() => self.interrupted().await,
            }
        }
    }

    /// Takes what the daemon's events brought.
    fn told(&mut self, told: Result<Option<Change>, ClientError>) {
        match told {
            Ok(Some(Change::Migration(disk))) => self.disk_told(*disk),
            Ok(Some(Change::Volume(_))) => {}
            Ok(None) => self.link_lost("the daemon is stopping"),
            Err(error) => self.link_lost(&error.to_string()),
        }
    }

    fn disk_told(&mut self, disk: MigrationStatus) {
        if self.id.is_empty() && disk.id != self.old_id {
            self.id.clone_from(&disk.id);
        }
        if disk.id == self.id && !self.id.is_empty() {
            self.seen = true;
            self.disk = disk;
        } else if self.seen {
            self.fail("the daemon no longer knows this migration");
            self.disk.state = MigrationState::Failed;
        }
    }

    fn link_lost(&mut self, why: &str) {
        self.observer.note(&format!("lost the daemon's events ({why}); trying again"));
        self.link = Link::Down(Instant::now());
    }

    /// Connects the events again after they broke.
    async fn relink(&mut self) {
        if matches!(self.link, Link::Down(_))
            && let Ok(events) = self.client.events().await
        {
            self.observer.note("the daemon is back");
            self.link = Link::Up(Box::new(events));
        }
    }

    /// Looks at QEMU, as often as its phase is worth.
    async fn poll_vm(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        let Some(vm) = &mut self.vm else { return };
        if vm.phase == Phase::Running {
            vm.poll().await;
            return;
        }
        // A source VM that runs again after `completed` was resumed: the destination did not take it.
        let look = vm.phase == Phase::Completed && self.ticks.is_multiple_of(RUN_STATE_TICKS);
        if look
            && !is_handed_over(self.disk.state)
            && vm.qmp.query_status().await.is_ok_and(|word| word == "running")
        {
            vm.phase = Phase::Stopped;
            self.fail("QEMU's migration completed, but the VM was resumed at the source");
        }
    }

    /// Does what the two states together ask for.
    async fn act(&mut self) {
        let Some(phase) = self.vm.as_ref().map(|vm| vm.phase) else { return };
        let broken = matches!(self.disk.state, MigrationState::Failed | MigrationState::Cancelled);
        match phase {
            Phase::Waiting if self.agreed() => self.forward().await,
            Phase::Running if broken || self.gone() => {
                self.fail_disk();
                if let Some(vm) = &mut self.vm {
                    vm.cancel().await;
                }
            }
            Phase::Stopped => {
                let reason = self.vm.as_ref().map(Vm::reason).unwrap_or_default();
                self.fail(&format!("QEMU's migration did not complete ({reason})"));
                if is_running(self.disk.state) && self.cancel_due() {
                    self.cancel_disk().await;
                }
            }
            // A QEMU that is gone before the rings stopped is no reason to move the disk on. After the stop it may
            // have been ended by a manager because all is well: that is for the daemons to find out.
            Phase::Lost(_)
                if matches!(self.disk.state, MigrationState::Setup | MigrationState::Active)
                    && self.cancel_due() =>
            {
                self.fail("QEMU's monitor went away before the switchover");
                self.cancel_disk().await;
            }
            _ => {}
        }
    }

    /// Whether the peers have agreed, so that QEMU may begin. With `with-hypervisor`, pushing itself waits for QEMU.
    fn agreed(&self) -> bool {
        match self.disk.state {
            MigrationState::Active | MigrationState::PreSwitchover | MigrationState::PostcopyActive => true,
            MigrationState::Setup => self.start == StartMode::WithHypervisor && self.disk.connected,
            _ => false,
        }
    }

    async fn forward(&mut self) {
        let Some(vm) = &mut self.vm else { return };
        self.observer.note(&format!("the peers have agreed; QEMU sends the VM to {}", vm.uri));
        let uri = vm.uri.clone();
        match vm.qmp.migrate(&uri).await {
            Ok(()) => vm.phase = Phase::Running,
            Err(error) => {
                vm.phase = Phase::Stopped;
                self.fail(&error.to_string());
            }
        }
    }

    /// Whether the disk is still to be cancelled, and now is the time to try.
    fn cancel_due(&self) -> bool {
        match self.cancel {
            CancelState::No => true,
            CancelState::NotYet { last, .. } => last.elapsed() >= RETRY,
            CancelState::Accepted(_) | CancelState::Denied => false,
        }
    }

    /// Cancels the disk's migration, if the daemon still can.
    async fn cancel_disk(&mut self) {
        let now = Instant::now();
        let first = if let CancelState::NotYet { first, .. } = self.cancel { first } else { now };
        self.cancel = CancelState::Accepted(now);
        match self.client.cancel().await {
            Ok(_) => {}
            Err(ClientError::Denied(denied)) if denied.code != "handed-over" && first.elapsed() < RETRIES => {
                self.cancel = CancelState::NotYet { first, last: now };
            }
            Err(ClientError::Denied(denied)) => {
                self.cancel = CancelState::Denied;
                self.observer.note(&format!("the disk's migration cannot be cancelled: {denied}"));
                // The refusal is newer than the last event: what is reported must not contradict it.
                if let Ok(disk) = self.client.migration().await {
                    self.disk_told(disk);
                }
            }
            Err(error) => {
                self.observer.note(&format!("the disk's migration could not be cancelled: {error}"))
            }
        }
    }

    /// The operator wants out: QEMU first, then the disk.
    async fn interrupted(&mut self) {
        self.observer.note("cancelling; interrupt again to leave at once");
        let mut completed = false;
        if let Some(vm) = &mut self.vm {
            if vm.phase == Phase::Running {
                vm.cancel().await;
            }
            let since = Instant::now();
            while vm.phase == Phase::Running && since.elapsed() < PATIENCE {
                vm.poll().await;
                sleep(TICK).await;
            }
            if vm.phase == Phase::Waiting {
                vm.phase = Phase::Stopped;
            }
            completed = vm.phase == Phase::Completed;
        }
        if completed {
            self.observer.note("QEMU has sent the VM away already: the disk must follow");
            return;
        }
        self.cancel_disk().await;
        match self.cancel {
            // Without a VM of ours the disk's migration simply goes on; a later wish may be granted.
            CancelState::Denied | CancelState::NotYet { .. } if self.vm.is_none() => {
                self.cancel = CancelState::No;
                self.observer.note("the migration goes on");
            }
            CancelState::Denied => {}
            _ => self.fail("cancelled by the operator"),
        }
    }

    /// Whether nothing more can come.
    fn ended(&mut self) -> bool {
        let phase = self.vm.as_ref().map(|vm| vm.phase);
        if self.gone() {
            self.fail_disk();
            return phase != Some(Phase::Running) || self.vm_overdue();
        }
        if is_final(self.disk.state) {
            if self.disk.state != MigrationState::Completed {
                self.fail_disk();
            }
            return phase != Some(Phase::Running) || self.vm_overdue();
        }
        match phase {
            Some(Phase::Stopped | Phase::Lost(_)) if self.cancel == CancelState::Denied => true,
            Some(Phase::Lost(since)) if !matches!(self.cancel, CancelState::Accepted(_)) => {
                self.lost_too_long(since)
            }
            _ => self.cancel_overdue(),
        }
    }

    /// Whether QEMU has not ended although it was asked to, long ago.
    fn vm_overdue(&self) -> bool {
        self.vm.as_ref().and_then(|vm| vm.cancelled).is_some_and(|since| since.elapsed() > PATIENCE)
    }

    /// Whether the daemon has accepted a cancel and nothing came of it.
    fn cancel_overdue(&mut self) -> bool {
        let overdue = matches!(self.cancel, CancelState::Accepted(since) if since.elapsed() > PATIENCE);
        if overdue {
            self.fail("the cancel had no effect");
        }
        overdue
    }

    /// A QEMU that vanished during the switchover: the daemons find out who has the disk, or nobody comes.
    fn lost_too_long(&mut self, since: Instant) -> bool {
        let stuck = self.disk.state == MigrationState::PreSwitchover && since.elapsed() > PATIENCE;
        if stuck {
            self.fail(
                "QEMU's monitor went away in the switchover and no VM has started; the disk stays offered",
            );
        }
        stuck
    }

    /// Whether the daemon has been gone for too long.
    fn gone(&self) -> bool {
        matches!(self.link, Link::Down(since) if since.elapsed() > PATIENCE)
    }

    fn fail_disk(&mut self) {
        let state = state_word(self.disk.state);
        let text = match self.disk.message.as_str() {
            _ if self.gone() => "the daemon is gone".to_owned(),
            "" => format!("the disk's migration ended as {state}"),
            message => format!("the disk's migration ended as {state}: {message}"),
        };
        self.fail(&text);
    }

    /// Remembers the first reason: what follows from it is no news.
    fn fail(&mut self, why: &str) {
        if self.failure.is_none() {
            self.failure = Some(why.to_owned());
        }
    }
}

/// The next event; never, while there is no connection.
async fn next_change(link: &mut Link) -> Result<Option<Change>, ClientError> {
    match link {
        Link::Up(events) => events.next().await,
        Link::Down(_) => std::future::pending().await,
    }
}

/// Returns when QEMU says that its migration changed, or cannot be heard any more; never, while it does not run.
async fn vm_event(vm: &mut Option<Vm>) {
    match vm {
        // A monitor that is gone shows at the next look as well, so the error is not lost here.
        Some(vm) if vm.phase == Phase::Running => drop(vm.qmp.migration_event().await),
        _ => std::future::pending().await,
    }
}
