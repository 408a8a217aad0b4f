// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several disks of one VM: they end on one side, or it is said where each stands (T20).

use crate::follow::{Silent, request};
use crate::node::{Node, until};
use crate::qemu::Qemu;
use blkferry::control::cli::summary::SetSummary;
use blkferry::control::follow::account::Owner;
use blkferry::control::follow::{DiskPlan, FollowError, Hypervisor, Outcome, Plan, arm, run};
use blkferry::node::status::{Denied, MigrationState};
use serde_json::Value;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::sleep;

/// The time in which something that must not happen would have happened.
const QUIET: Duration = Duration::from_millis(400);

struct Rig {
    nodes: [Node; 2],
    qemu: Option<Qemu>,
}

impl Rig {
    fn alone() -> Self {
        Self { nodes: [Node::start(), Node::start()], qemu: None }
    }

    fn with_vm() -> Self {
        let rig = Self::alone();
        let qemu = Qemu::start(rig.nodes[0].path("qmp"));
        Self { qemu: Some(qemu), ..rig }
    }

    fn qemu(&self) -> &Qemu {
        self.qemu.as_ref().unwrap()
    }

    fn disks(&self) -> Vec<DiskPlan> {
        self.nodes.iter().map(|node| DiskPlan { client: node.client(), request: request() }).collect()
    }

    async fn play<S: Future<Output = ()>>(
        &self,
        script: impl FnOnce(mpsc::UnboundedSender<()>) -> S,
    ) -> Result<Outcome, FollowError> {
        let hypervisor =
            self.qemu.as_ref().map(|q| Hypervisor { qmp: q.path.clone(), uri: "tcp:h:2".to_owned() });
        let plan = Plan { disks: self.disks(), hypervisor };
        let (interrupt, interrupts) = mpsc::unbounded_channel();
        let mut observer = Silent;
        let (outcome, ()) = tokio::join!(run(plan, &mut observer, interrupts), script(interrupt));
        outcome
    }

    fn both(&self, state: MigrationState) {
        for node in &self.nodes {
            node.state(state);
        }
    }

    async fn under_way(&self) {
        for node in &self.nodes {
            node.armed().await;
            node.state(MigrationState::Active);
        }
        if let Some(qemu) = &self.qemu {
            until(|| qemu.asked("migrate")).await;
        }
    }

    /// The VM stops: both disks are offered, and QEMU waits if it was told to.
    fn stop_vm(&self) {
        self.both(MigrationState::PreSwitchover);
        assert!(self.qemu().script.lock().pauses, "QEMU would not wait for the disks");
        self.qemu().set("pre-switchover", "finish-migrate");
    }

    fn prepared(&self, disk: usize) {
        self.nodes[disk].set(|snapshot| {
            snapshot.migration.connected = true;
            snapshot.migration.prepared = true;
        });
    }

    /// Both disks are prepared and QEMU goes on.
    async fn continued(&self) {
        self.stop_vm();
        self.prepared(0);
        self.prepared(1);
        until(|| self.qemu().asked("migrate-continue")).await;
    }

    fn cancels(&self) -> [u32; 2] {
        self.nodes.each_ref().map(|node| node.script.lock().cancels)
    }
}

fn failed(outcome: &Outcome, words: &str) {
    let failure = outcome.failure.as_deref().expect("a failure");
    assert!(failure.contains(words), "{failure}");
}

fn states(outcome: &Outcome) -> Vec<MigrationState> {
    outcome.disks.iter().map(|disk| disk.status.state).collect()
}

#[tokio::test]
async fn t20_qemu_waits_for_every_disk_at_the_start_and_at_the_switchover() {
    let rig = &Rig::with_vm();
    let outcome = rig
        .play(|_| async {
            rig.nodes[0].armed().await;
            rig.nodes[0].state(MigrationState::Active);
            sleep(QUIET).await;
            assert!(!rig.qemu().asked("migrate"), "QEMU began with one disk of two");
            rig.under_way().await;
            rig.stop_vm();
            rig.prepared(0);
            sleep(QUIET).await;
            assert!(!rig.qemu().asked("migrate-continue"), "QEMU went on with one disk of two");
            rig.prepared(1);
            until(|| rig.qemu().asked("migrate-continue")).await;
            rig.qemu().set("completed", "postmigrate");
            rig.both(MigrationState::PostcopyActive);
            rig.both(MigrationState::Completed);
        })
        .await
        .unwrap();
    assert_eq!((outcome.failure.as_deref(), rig.cancels()), (None, [0, 0]));
    assert_eq!(states(&outcome), [MigrationState::Completed; 2]);
    assert!(!rig.qemu().script.lock().pauses, "QEMU is left as it was found");
}

#[tokio::test]
async fn a_hypervisor_that_waited_before_goes_on_waiting_afterwards() {
    let rig = &Rig::with_vm();
    rig.qemu().script.lock().pauses = true;
    rig.play(|_| async {
        rig.under_way().await;
        rig.continued().await;
        rig.qemu().set("completed", "postmigrate");
        rig.both(MigrationState::Completed);
    })
    .await
    .unwrap();
    assert!(rig.qemu().script.lock().pauses);
}

#[tokio::test]
async fn t20_a_refusal_of_the_second_disk_takes_the_first_back() {
    let rig = &Rig::with_vm();
    rig.nodes[1].script.lock().deny_migrate = Some(Denied::new("not-owner", "owns no disk"));
    let error = rig.play(|_| async {}).await.unwrap_err();
    assert_eq!(error.code(), "not-owner");
    let socket = rig.nodes[1].socket().display().to_string();
    assert!(error.to_string().starts_with(&socket), "{error}");
    assert_eq!((rig.cancels(), rig.nodes[0].now()), ([1, 0], MigrationState::Cancelled));
    assert!(!rig.qemu().asked("migrate"));
    // What cannot be taken back is named.
    let rig = &Rig::alone();
    rig.nodes[0].script.lock().deny_cancel = Some(Denied::new("busy", "not now"));
    rig.nodes[1].script.lock().deny_migrate = Some(Denied::new("busy", "under way"));
    let error = arm(rig.disks()).await.unwrap_err();
    let socket = rig.nodes[0].socket().display().to_string();
    assert!(error.to_string().contains(&format!("{socket}: stays armed")), "{error}");
}

#[tokio::test]
async fn t20_without_one_of_the_daemons_nothing_is_armed() {
    let mut rig = Rig::with_vm();
    rig.nodes[1].stop();
    let error = rig.play(|_| async {}).await.unwrap_err();
    assert_eq!(error.code(), "no-daemon");
    assert!(rig.nodes[0].script.lock().requests.is_empty());
}

#[tokio::test]
async fn t20_a_disk_that_fails_cancels_qemu_and_then_the_other_disk() {
    let rig = &Rig::with_vm();
    "cancelling".clone_into(&mut rig.qemu().script.lock().cancel_gives);
    let outcome = rig
        .play(|_| async {
            rig.under_way().await;
            rig.nodes[1].set(|snapshot| {
                snapshot.migration.message = "no space".to_owned();
                snapshot.migration.state = MigrationState::Failed;
            });
            until(|| rig.qemu().asked("migrate_cancel")).await;
            sleep(QUIET).await;
            assert_eq!(rig.cancels(), [0, 0], "a disk was cancelled before QEMU");
            rig.qemu().set("cancelled", "running");
        })
        .await
        .unwrap();
    failed(&outcome, "no space");
    failed(&outcome, &rig.nodes[1].socket().display().to_string());
    assert_eq!(states(&outcome), [MigrationState::Cancelled, MigrationState::Failed]);
    assert_eq!(rig.cancels(), [1, 0]);
    assert!(!rig.qemu().script.lock().pauses);
}

#[tokio::test]
async fn t20_a_disk_that_is_not_prepared_in_time_brings_all_back() {
    let rig = &Rig::with_vm();
    let outcome = rig
        .play(|_| async {
            rig.under_way().await;
            rig.stop_vm();
            rig.prepared(0);
            until(|| rig.qemu().asked("migrate_cancel")).await;
            // The VM goes on at the source, which takes both disks back.
            rig.both(MigrationState::Active);
        })
        .await
        .unwrap();
    failed(&outcome, "does not hold the disk");
    failed(&outcome, &rig.nodes[1].socket().display().to_string());
    assert_eq!(states(&outcome), [MigrationState::Cancelled; 2]);
    assert!(!rig.qemu().asked("migrate-continue"));
}

#[tokio::test]
async fn t20_a_disk_that_lags_behind_a_granted_one_is_waited_for_and_never_cancelled() {
    let rig = &Rig::with_vm();
    let outcome = rig
        .play(|_| async {
            rig.under_way().await;
            rig.continued().await;
            rig.qemu().set("completed", "postmigrate");
            rig.nodes[0].state(MigrationState::PostcopyActive);
            rig.nodes[0].state(MigrationState::Completed);
            // A link that is down, a daemon that is started again.
            rig.nodes[1].set(|snapshot| snapshot.migration.prepared = false);
            sleep(QUIET * 2).await;
            rig.both(MigrationState::Completed);
        })
        .await
        .unwrap();
    assert_eq!((outcome.failure.as_deref(), rig.cancels()), (None, [0, 0]));
}

#[tokio::test]
async fn t20_a_vm_that_is_resumed_without_one_of_its_disks_is_reported_and_nothing_cancelled() {
    let rig = &Rig::with_vm();
    let outcome = rig
        .play(|_| async {
            rig.under_way().await;
            rig.continued().await;
            rig.nodes[0].set(|snapshot| {
                snapshot.migration.state = MigrationState::PostcopyActive;
                "relinquished".clone_into(&mut snapshot.migration.stage);
            });
            rig.nodes[1].state(MigrationState::Active);
            sleep(QUIET).await;
            rig.qemu().set("completed", "running");
        })
        .await
        .unwrap();
    failed(&outcome, "resumed at the source");
    assert_eq!(rig.cancels(), [0, 0]);
    let told = SetSummary::new(&outcome);
    assert_eq!(
        told.disks.iter().map(|disk| disk.owner).collect::<Vec<_>>(),
        [Owner::Destination, Owner::Source]
    );
    assert!(told.disks[1].next.contains("do not cancel it"), "{}", told.disks[1].next);
}

#[tokio::test]
async fn t20_a_disk_that_fails_beside_a_granted_one_leaves_that_one_its_way() {
    let rig = &Rig::with_vm();
    let outcome = rig
        .play(|_| async {
            rig.under_way().await;
            rig.continued().await;
            rig.qemu().set("completed", "postmigrate");
            rig.nodes[0].state(MigrationState::PostcopyActive);
            sleep(QUIET).await;
            rig.nodes[1].state(MigrationState::Failed);
            sleep(QUIET).await;
            rig.nodes[0].state(MigrationState::Completed);
        })
        .await
        .unwrap();
    failed(&outcome, "ended as failed");
    assert_eq!(states(&outcome), [MigrationState::Completed, MigrationState::Failed]);
    assert_eq!(rig.cancels(), [0, 0]);
}

#[tokio::test]
async fn t20_an_interrupt_cancels_qemu_and_then_every_disk() {
    let rig = &Rig::with_vm();
    "cancelling".clone_into(&mut rig.qemu().script.lock().cancel_gives);
    let outcome = rig
        .play(|interrupt| async move {
            rig.under_way().await;
            interrupt.send(()).unwrap();
            until(|| rig.qemu().asked("migrate_cancel")).await;
            sleep(QUIET).await;
            assert_eq!(rig.cancels(), [0, 0], "a disk was cancelled before QEMU");
            rig.qemu().set("cancelled", "running");
        })
        .await
        .unwrap();
    failed(&outcome, "cancelled by the operator");
    assert_eq!((states(&outcome), rig.cancels()), (vec![MigrationState::Cancelled; 2], [1, 1]));
}

#[tokio::test]
async fn t20_without_a_vm_one_failure_cancels_the_other_disk() {
    let rig = &Rig::alone();
    let outcome = rig
        .play(|_| async {
            rig.under_way().await;
            rig.nodes[0].state(MigrationState::Failed);
        })
        .await
        .unwrap();
    failed(&outcome, "ended as failed");
    assert_eq!((states(&outcome)[1], rig.cancels()), (MigrationState::Cancelled, [0, 1]));
}

#[tokio::test]
async fn t20_without_a_vm_an_interrupt_after_the_first_grant_changes_nothing() {
    let rig = &Rig::alone();
    let outcome = rig
        .play(|interrupt| async move {
            rig.under_way().await;
            rig.nodes[0].state(MigrationState::PostcopyActive);
            rig.nodes[1].state(MigrationState::PreSwitchover);
            sleep(QUIET).await;
            interrupt.send(()).unwrap();
            sleep(QUIET).await;
            rig.both(MigrationState::Completed);
        })
        .await
        .unwrap();
    assert_eq!((outcome.failure.as_deref(), rig.cancels()), (None, [0, 0]));
}

// The program.

fn blkferry(words: &[String]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blkferry"));
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn sockets(rig: &Rig) -> Vec<String> {
    rig.nodes
        .iter()
        .flat_map(|node| ["--api-socket".to_owned(), node.socket().display().to_string()])
        .collect()
}

fn legs(rig: &Rig) -> Vec<String> {
    let mut words = vec!["migrate".to_owned()];
    for (n, node) in rig.nodes.iter().enumerate() {
        words.extend(["--disk".to_owned(), format!("{}=h:{}", node.socket().display(), n + 1)]);
    }
    words
}

fn also(mut words: Vec<String>, more: &[&str]) -> Vec<String> {
    words.extend(more.iter().map(|word| (*word).to_owned()));
    words
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn objects(output: &Output) -> Vec<Value> {
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

async fn finish(child: Child) -> Output {
    tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_migration_of_two_disks_ends_with_one_object_of_all_and_each() {
    let rig = Rig::alone();
    let child = blkferry(&also(legs(&rig), &["--json"])).spawn().unwrap();
    for (n, node) in rig.nodes.iter().enumerate() {
        node.armed().await;
        assert_eq!(node.script.lock().requests[0].destination_url, format!("h:{}", n + 1));
        node.set(|snapshot| {
            snapshot.migration.push_bytes = 5 + n as u64;
            snapshot.migration.state = MigrationState::Active;
        });
    }
    rig.both(MigrationState::Completed);
    let output = finish(child).await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let told: SetSummary = serde_json::from_value(objects(&output).pop().unwrap()).unwrap();
    assert_eq!((told.all.state, told.all.push_bytes), (MigrationState::Completed, 11));
    let each: Vec<_> = told.disks.iter().map(|disk| (&disk.api_socket, disk.summary.push_bytes)).collect();
    assert_eq!(each, [(&rig.nodes[0].socket(), 5), (&rig.nodes[1].socket(), 6)]);
    assert_eq!(objects(&output).len(), 1);
}

#[tokio::test]
async fn a_failure_of_one_of_two_disks_exits_with_1_and_tells_where_each_stands() {
    let rig = Rig::alone();
    let child = blkferry(&legs(&rig)).spawn().unwrap();
    rig.under_way().await;
    rig.nodes[1].state(MigrationState::Failed);
    let output = finish(child).await;
    assert_eq!(output.status.code(), Some(1));
    for node in &rig.nodes {
        let socket = node.socket().display().to_string();
        let line =
            text(&output.stdout).lines().find(|line| line.starts_with(&socket)).expect("a line of each");
        assert!(line.contains("owner source, epoch"), "{line}");
    }
}

#[tokio::test]
async fn no_wait_arms_every_disk() {
    let rig = Rig::alone();
    let output = finish(blkferry(&also(legs(&rig), &["--no-wait", "--json"])).spawn().unwrap()).await;
    let told = objects(&output);
    assert_eq!((output.status.code(), told.len()), (Some(0), 2));
    for (node, object) in rig.nodes.iter().zip(&told) {
        assert_eq!(object["api_socket"], node.socket().display().to_string());
        assert_eq!((&object["state"], node.now()), (&Value::from("setup"), MigrationState::Setup));
    }
}

#[test]
fn status_of_two_daemons_says_whose_it_is_and_tells_the_one_that_answers() {
    let mut rig = Rig::alone();
    let output = blkferry(&also(sockets(&rig), &["status", "--json"])).output().unwrap();
    let told = objects(&output);
    assert_eq!((output.status.code(), told.len()), (Some(0), 2));
    assert_eq!(told[1]["api_socket"], rig.nodes[1].socket().display().to_string());
    assert!(told[1]["volume"].is_object());
    rig.nodes[0].stop();
    let output = blkferry(&also(sockets(&rig), &["status", "--json"])).output().unwrap();
    let told = objects(&output);
    assert_eq!((output.status.code(), &told[0]["code"]), (Some(1), &Value::from("no-daemon")));
    assert!(told[1]["volume"].is_object());
}

#[test]
fn t20_cancel_of_two_disks_cancels_both_or_none() {
    let rig = Rig::alone();
    rig.both(MigrationState::Active);
    let output = blkferry(&also(sockets(&rig), &["cancel", "--json"])).output().unwrap();
    assert_eq!((output.status.code(), rig.cancels()), (Some(0), [1, 1]));
    assert!(objects(&output).iter().all(|object| object["state"] == "cancelled"));
    // Nothing is left to cancel.
    let output = blkferry(&also(sockets(&rig), &["cancel", "--json"])).output().unwrap();
    assert_eq!((output.status.code(), &objects(&output)[0]["code"]), (Some(1), &Value::from("none")));
    // One is away.
    rig.nodes[0].state(MigrationState::Active);
    rig.nodes[1].state(MigrationState::PostcopyActive);
    let output = blkferry(&also(sockets(&rig), &["cancel", "--json"])).output().unwrap();
    assert_eq!((output.status.code(), &objects(&output)[0]["code"]), (Some(1), &Value::from("handed-over")));
    // One has ended already.
    rig.nodes[1].state(MigrationState::Failed);
    let output = blkferry(&also(sockets(&rig), &["cancel"])).output().unwrap();
    assert_eq!((output.status.code(), rig.cancels()), (Some(0), [2, 1]), "{}", text(&output.stderr));
}
