// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One disk of a migration, as its daemon at the source tells it, and the wish to cancel it.

use super::decide::{At, Cancel, Disk as View};
use super::{DiskPlan, PATIENCE};
use crate::control::client::{Change, Client, ClientError, Events};
use crate::control::words::{is_final, is_running, state_word};
use crate::node::status::{MigrationRequest, MigrationState, MigrationStatus, StartMode};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Time between two attempts to cancel a disk that cannot be cancelled yet, and how long they go on.
const RETRY: Duration = Duration::from_millis(500);
const RETRIES: Duration = Duration::from_secs(10);
/// How long a look may take: a daemon that hangs must not keep the other disks, the VM and the operator waiting.
const ANSWER: Duration = Duration::from_secs(2);

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

/// A disk that is followed.
#[derive(Debug)]
pub(super) struct Disk {
    client: Client,
    request: MigrationRequest,
    /// What notes about it begin with; empty for the only disk.
    name: String,
    /// The migration that was armed; empty until it shows.
    id: String,
    /// The migration before it, whose end must not be taken for this one's.
    old_id: String,
    /// Whether an event of this migration has come.
    seen: bool,
    pub(super) status: MigrationStatus,
    link: Link,
    cancel: CancelState,
}

impl Disk {
    /// Listens to the daemon; nothing is asked of it yet. Notes name the disk if there are `several`.
    pub(super) async fn connect(plan: DiskPlan, several: bool) -> Result<Self, ClientError> {
        let before = plan.client.migration().await?;
        let events = plan.client.events().await?;
        let name = if several { format!("{}: ", plan.client.path().display()) } else { String::new() };
        Ok(Self {
            client: plan.client,
            request: plan.request,
            name,
            id: String::new(),
            old_id: before.id,
            seen: false,
            status: MigrationStatus::default(),
            link: Link::Up(Box::new(events)),
            cancel: CancelState::No,
        })
    }

    /// Arms the migration.
    pub(super) async fn arm(&mut self) -> Result<(), ClientError> {
        let status = self.client.migrate(&self.request).await?;
        if status.id != self.old_id || is_running(status.state) {
            self.id.clone_from(&status.id);
        }
        self.status = status;
        Ok(())
    }

    /// Takes back what was just armed, because another disk was refused. Returns what became of it.
    pub(super) async fn disarm(&self) -> Result<(), ClientError> {
        self.client.cancel().await.map(drop)
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The next event; never, while there is no connection.
    pub(super) async fn next_change(&mut self) -> Result<Option<Change>, ClientError> {
        match &mut self.link {
            Link::Up(events) => events.next().await,
            Link::Down(_) => std::future::pending().await,
        }
    }

    /// Takes what the daemon's events brought. Returns a note for people.
    pub(super) fn told(&mut self, told: Result<Option<Change>, ClientError>) -> Option<String> {
        let why = match told {
            Ok(Some(Change::Migration(status))) => {
                self.take(*status);
                return None;
            }
            Ok(Some(Change::Volume(_))) => return None,
            Ok(None) => "the daemon is stopping".to_owned(),
            Err(error) => error.to_string(),
        };
        self.link = Link::Down(Instant::now());
        Some(format!("{}lost the daemon's events ({why}); trying again", self.name))
    }

    fn take(&mut self, status: MigrationStatus) {
        if self.id.is_empty() && status.id != self.old_id {
            self.id.clone_from(&status.id);
        }
        if status.id == self.id && !self.id.is_empty() {
            self.seen = true;
            self.status = status;
        } else if self.seen && !is_final(self.status.state) {
            self.status.state = MigrationState::Failed;
            "the daemon no longer knows this migration".clone_into(&mut self.status.message);
        }
    }

    /// Connects the events again after they broke. Returns a note for people.
    pub(super) async fn relink(&mut self) -> Option<String> {
        if matches!(self.link, Link::Down(_))
            && let Ok(Ok(events)) = timeout(ANSWER, self.client.events()).await
        {
            self.link = Link::Up(Box::new(events));
            return Some(format!("{}the daemon is back", self.name));
        }
        None
    }

    /// Asks the daemon how it stands now: events lag behind.
    pub(super) async fn look(&mut self) {
        match timeout(ANSWER, self.client.migration()).await {
            Ok(Ok(status)) => self.take(status),
            _ => self.status.prepared = false,
        }
    }

    /// Cancels the disk's migration, if the daemon still can and now is the time. Returns a note for people.
    pub(super) async fn cancel(&mut self) -> Option<String> {
        if self.cancel_view() != Cancel::Possible {
            return None;
        }
        let now = Instant::now();
        let first = if let CancelState::NotYet { first, .. } = self.cancel { first } else { now };
        self.cancel = CancelState::Accepted(now);
        match self.client.cancel().await {
            Ok(_) => None,
            Err(ClientError::Denied(denied)) if denied.code != "handed-over" && first.elapsed() < RETRIES => {
                self.cancel = CancelState::NotYet { first, last: now };
                None
            }
            Err(ClientError::Denied(denied)) => {
                self.cancel = CancelState::Denied;
                // The refusal is newer than the last event: what is reported must not contradict it.
                self.look().await;
                Some(format!("{}the disk's migration cannot be cancelled: {denied}", self.name))
            }
            Err(error) => Some(format!("{}the disk's migration could not be cancelled: {error}", self.name)),
        }
    }

    /// Whether it is being cancelled.
    pub(super) fn cancels(&self) -> bool {
        matches!(self.cancel, CancelState::Accepted(_))
    }

    /// Forgets that it was to be cancelled; a later wish may be granted.
    pub(super) fn forget_cancel(&mut self) {
        self.cancel = CancelState::No;
    }

    /// Whether the daemon has been gone for too long.
    pub(super) fn lost(&self) -> bool {
        matches!(self.link, Link::Down(since) if since.elapsed() > PATIENCE)
    }

    /// Whether it cannot come back any more.
    pub(super) fn away(&self) -> bool {
        self.view().away()
    }

    fn cancel_view(&self) -> Cancel {
        match self.cancel {
            CancelState::No => Cancel::Possible,
            CancelState::NotYet { last, .. } if last.elapsed() >= RETRY => Cancel::Possible,
            CancelState::Accepted(since) if since.elapsed() > PATIENCE => Cancel::Overdue,
            CancelState::NotYet { .. } | CancelState::Accepted(_) => Cancel::Pending,
            CancelState::Denied => Cancel::Denied,
        }
    }

    /// As the decision sees it.
    pub(super) fn view(&self) -> View {
        let status = &self.status;
        let at = match status.state {
            // With `with-hypervisor`, pushing itself waits for QEMU.
            MigrationState::Setup if self.request.start == StartMode::WithHypervisor && status.connected => {
                At::Agreed
            }
            MigrationState::None | MigrationState::Setup => At::Arming,
            MigrationState::Active => At::Agreed,
            MigrationState::PreSwitchover => At::Offered { prepared: status.prepared && status.connected },
            MigrationState::PostcopyActive => At::Away,
            MigrationState::Completed => At::Done,
            MigrationState::Failed | MigrationState::Cancelled => At::Back,
        };
        View { at, lost: self.lost(), cancel: self.cancel_view() }
    }

    /// Why it is no success.
    pub(super) fn failure(&self) -> String {
        let state = state_word(self.status.state);
        let text = match self.status.message.as_str() {
            _ if self.lost() => "the daemon is gone".to_owned(),
            "" => format!("the disk's migration ended as {state}"),
            message => format!("the disk's migration ended as {state}: {message}"),
        };
        format!("{}{text}", self.name)
    }
}
