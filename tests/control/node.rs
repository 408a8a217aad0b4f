// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A node that does what the test says, behind the real API, in a thread of its own.

use blkferry::control::{api, client::Client, socket};
use blkferry::node::status::{Command, Denied, MigrationRequest, MigrationState, NodeHandle, Side, Snapshot};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

/// What the node did and shall do.
#[derive(Debug, Default)]
pub(crate) struct Script {
    pub(crate) requests: Vec<MigrationRequest>,
    pub(crate) cancels: u32,
    pub(crate) deny_resize: Option<Denied>,
    pub(crate) deny_migrate: Option<Denied>,
    pub(crate) deny_cancel: Option<Denied>,
    /// Answer a request before the snapshot shows it.
    pub(crate) publish_late: bool,
    /// With every refresh the guest has flushed once more.
    pub(crate) busy_guest: bool,
    /// Go away instead of answering.
    pub(crate) vanish: bool,
}

pub(crate) struct Node {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) script: Arc<Mutex<Script>>,
    snapshots: Arc<watch::Sender<Snapshot>>,
    server: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Node {
    pub(crate) fn start() -> Self {
        let (snapshots, _) = watch::channel(Snapshot::default());
        let mut node = Self {
            dir: tempfile::tempdir().unwrap(),
            script: Arc::default(),
            snapshots: Arc::new(snapshots),
            server: None,
        };
        node.serve();
        node
    }

    /// Serves the API, also again after [`Node::stop`].
    pub(crate) fn serve(&mut self) {
        let (stop, stopped) = oneshot::channel();
        let (ready, listening) = std::sync::mpsc::channel();
        let (path, script, snapshots) = (self.socket(), self.script.clone(), self.snapshots.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let (listener, _file) = socket::bind(&path).unwrap();
                let (commands, asked) = mpsc::channel(4);
                let handle = NodeHandle { commands, snapshots: snapshots.subscribe() };
                tokio::spawn(obey(asked, script, snapshots));
                ready.send(()).unwrap();
                let shutdown = async { drop(stopped.await) };
                api::serve(listener, handle, Registry::default(), shutdown).await.unwrap();
            });
        });
        listening.recv().unwrap();
        self.server = Some((stop, thread));
    }

    pub(crate) fn stop(&mut self) {
        if let Some((stop, thread)) = self.server.take() {
            let _ = stop.send(());
            thread.join().unwrap();
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("api")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        Path::join(self.dir.path(), name)
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.socket())
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut Snapshot)) {
        self.snapshots.send_modify(change);
    }

    pub(crate) fn state(&self, state: MigrationState) {
        self.set(|snapshot| snapshot.migration.state = state);
    }

    pub(crate) fn now(&self) -> MigrationState {
        self.snapshots.borrow().migration.state
    }

    /// Waits until the node was asked to migrate, without blocking the test's runtime.
    pub(crate) async fn armed(&self) {
        until(|| !self.script.lock().requests.is_empty() && self.now() != MigrationState::None).await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Waits for a condition; a test that hangs says where.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn obey(
    mut asked: mpsc::Receiver<Command>,
    script: Arc<Mutex<Script>>,
    snapshots: Arc<watch::Sender<Snapshot>>,
) {
    while let Some(command) = asked.recv().await {
        if script.lock().vanish {
            return;
        }
        match command {
            Command::Migrate(request, reply) => {
                let denied = script.lock().deny_migrate.clone();
                let answer = denied.map_or(Ok(()), Err);
                let good = answer.is_ok();
                let publish = {
                    let (snapshots, request) = (snapshots.clone(), request.clone());
                    move || {
                        snapshots.send_modify(|snapshot| {
                            let migration = &mut snapshot.migration;
                            migration.id = format!("{}+", migration.id);
                            migration.state = MigrationState::Setup;
                            migration.side = Some(Side::Source);
                            migration.strategy = request.strategy;
                            migration.peer.clone_from(&request.destination_url);
                        });
                    }
                };
                let late = script.lock().publish_late;
                if good && !late {
                    publish();
                }
                script.lock().requests.push(request);
                let _ = reply.send(answer);
                if good && late {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    publish();
                }
            }
            Command::Resize(size, reply) => {
                let denied = script.lock().deny_resize.clone();
                if denied.is_none() {
                    snapshots.send_modify(|snapshot| snapshot.volume.size = size);
                }
                let _ = reply.send(denied.map_or(Ok(()), Err));
            }
            Command::Refresh(reply) => {
                if script.lock().busy_guest {
                    snapshots.send_modify(|snapshot| snapshot.volume.io.flushes += 1);
                }
                let _ = reply.send(Ok(()));
            }
            Command::Cancel(reply) => {
                let denied = {
                    let mut script = script.lock();
                    script.cancels += 1;
                    script.deny_cancel.clone()
                };
                if denied.is_none() {
                    snapshots.send_modify(|snapshot| snapshot.migration.state = MigrationState::Cancelled);
                }
                let _ = reply.send(denied.map_or(Ok(()), Err));
            }
        }
    }
}
