// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A migration from its request to its end, the hypervisor's beside it (paper, Algorithm 1).
//!
//! ```text
//!   arm the disks ──> peers agreed ──> QEMU: migrate ──> rings stop ──> disks owned by the destination ──> completed
//!        │                │                 │               │                     │
//!        └── refused      └── failed ───────┴── failed ─────┘                     └── nobody can go back
//!            nothing          cancel QEMU       cancel the disks                      any more
//!            happened         if it runs        if they still can be
//! ```
//!
//! The migrations end together or not at all, but they are several programs: each step can fail on either side. The order
//! matters in one place. *QEMU is cancelled first, and its end is awaited, before a disk is*: the other way round,
//! QEMU could switch over in between, and a VM would wake up at the destination to a disk that is not coming.
//! If QEMU turns out to have completed, the disks go on.
//!
//! With several disks there is one more point to wait at. Each disk has a handoff of its own, and the first that is granted
//! makes the way back impossible for all. So QEMU is told to wait with the VM stopped (`pause-before-switchover`) until
//! every destination has said that it holds its disk's offer. What can still part the disks after that is a daemon that dies
//! between two grants; then the others wait for it, and where each stands is said.
//!
//! [`decide`] has the decisions, `drive` the loop around them, `disk` and `vm` the two kinds of partners, [`account`]
//! the words for who owns what. Nothing here decides who owns a disk. It asks, and the daemons may deny (`handed-over`).

pub mod account;
pub mod decide;
mod disk;
mod drive;
mod vm;

use super::client::{Client, ClientError};
use super::qmp::{QmpError, VmStatus};
use crate::node::status::{MigrationRequest, MigrationStatus};
use disk::Disk;
use drive::Follower;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::mpsc;
use vm::Vm;

/// How long to wait for something that should be a matter of moments: a cancel, a lost daemon, a vanished QEMU.
const PATIENCE: Duration = Duration::from_secs(30);

/// The VM that moves with its disks.
#[derive(Debug, Clone)]
pub struct Hypervisor {
    /// QEMU's monitor socket at the source.
    pub qmp: PathBuf,
    /// Where QEMU sends the VM, such as `tcp:HOST:PORT`.
    pub uri: String,
}

/// One disk to migrate.
#[derive(Debug, Clone)]
pub struct DiskPlan {
    /// Its daemon at the source.
    pub client: Client,
    /// What is asked of it.
    pub request: MigrationRequest,
}

/// What to migrate.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The disks, at least one.
    pub disks: Vec<DiskPlan>,
    /// The VM's part, if this program is to start it.
    pub hypervisor: Option<Hypervisor>,
}

/// Somebody who watches.
pub trait Observer {
    /// How it stands, the disks in the order of the plan; called often.
    fn progress(&mut self, disks: &[&MigrationStatus], vm: Option<&VmStatus>);
    /// A sentence for people.
    fn note(&mut self, text: &str);
}

/// How it ended for one disk.
#[derive(Debug, Clone)]
pub struct DiskOutcome {
    /// Its daemon's API socket.
    pub socket: PathBuf,
    /// Its last status.
    pub status: MigrationStatus,
    /// The daemon did not answer any more: the status is the last that it said.
    pub lost: bool,
}

/// How it ended, once the disks were armed.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The disks, in the order of the plan.
    pub disks: Vec<DiskOutcome>,
    /// QEMU's last status, if it was started.
    pub vm: Option<VmStatus>,
    /// Why it is no success.
    pub failure: Option<String>,
}

/// Why nothing was armed.
#[derive(Debug, Error)]
pub enum FollowError {
    /// The daemon of the only disk.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The daemon of one of several disks.
    #[error("{}: {source}{left}", socket.display())]
    Disk {
        /// Its API socket.
        socket: PathBuf,
        /// What it said.
        source: ClientError,
        /// What could not be undone at the others; empty if they are as before.
        left: String,
    },
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
            Self::Client(error) | Self::Disk { source: error, .. } => error.code(),
            Self::Qmp(_) => "qmp",
            Self::VmBusy(_) => "busy",
        }
    }
}

/// Arms the disks, starts QEMU's migration if the plan has one, and follows all to their end. Each value on
/// `interrupts` is one wish of the operator to cancel.
///
/// # Errors
/// [`FollowError`] if nothing was armed; whatever happens later is in the [`Outcome`].
pub async fn run(
    plan: Plan,
    observer: &mut (dyn Observer + Send),
    mut interrupts: mpsc::UnboundedReceiver<()>,
) -> Result<Outcome, FollowError> {
    // QEMU first: a wrong monitor path must not leave an armed disk behind.
    let vm = match plan.hypervisor {
        Some(hypervisor) => Some(Vm::connect(hypervisor, plan.disks.len() > 1).await?),
        None => None,
    };
    let disks = arm_all(plan.disks).await?;
    let mut follower = Follower::new(disks, vm, observer);
    follower.drive(&mut interrupts).await;
    Ok(follower.outcome().await)
}

/// Arms the disks and returns at once: all or none.
///
/// # Errors
/// [`FollowError`] if nothing was armed.
pub async fn arm(disks: Vec<DiskPlan>) -> Result<Vec<MigrationStatus>, FollowError> {
    Ok(arm_all(disks).await?.into_iter().map(|disk| disk.status).collect())
}

/// Arms every disk. If one is refused, those before it are taken back: nothing has left them yet that matters.
async fn arm_all(plans: Vec<DiskPlan>) -> Result<Vec<Disk>, FollowError> {
    let several = plans.len() > 1;
    let named = |socket: PathBuf, source, left| {
        if several { FollowError::Disk { socket, source, left } } else { FollowError::Client(source) }
    };
    let mut disks = Vec::new();
    for plan in plans {
        let socket = plan.client.path().to_owned();
        disks.push(Disk::connect(plan, several).await.map_err(|error| named(socket, error, String::new()))?);
    }
    for at in 0..disks.len() {
        if let Err(error) = disks[at].arm().await {
            let mut left = String::new();
            for disk in &disks[..at] {
                if let Err(error) = disk.disarm().await {
                    left += &format!("; {}stays armed, cancel it: {error}", disk.name());
                }
            }
            return Err(named(disks[at].client().path().to_owned(), error, left));
        }
    }
    Ok(disks)
}
