// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two migrations that end together or not at all: every step fails once.

use crate::node::{Node, until};
use crate::qemu::Qemu;
use blkferry::control::follow::{DiskPlan, FollowError, Hypervisor, Observer, Outcome, Plan, run};
use blkferry::control::qmp::VmStatus;
use blkferry::node::status::{
    Denied, MigrationRequest, MigrationState, MigrationStatus, StartMode, StrategyName,
};
use std::time::Duration;
use tokio::sync::mpsc;

pub(crate) struct Silent;

impl Observer for Silent {
    fn progress(&mut self, _: &[&MigrationStatus], _: Option<&VmStatus>) {}
    fn note(&mut self, _: &str) {}
}

pub(crate) fn request() -> MigrationRequest {
    MigrationRequest {
        destination_url: "h:1".to_owned(),
        strategy: StrategyName::Hybrid,
        threshold: None,
        connections: None,
        bandwidth: None,
        start: StartMode::Now,
    }
}

fn alone(node: &Node) -> Plan {
    Plan { disks: vec![DiskPlan { client: node.client(), request: request() }], hypervisor: None }
}

fn with_vm(node: &Node, qemu: &Qemu) -> Plan {
    let hypervisor = Hypervisor { qmp: qemu.path.clone(), uri: "tcp:h:2".to_owned() };
    Plan { hypervisor: Some(hypervisor), ..alone(node) }
}

/// Follows a plan while `script` plays the others; `interrupt` is the operator's Ctrl-C.
async fn play<S: Future<Output = ()>>(
    plan: Plan,
    script: impl FnOnce(mpsc::UnboundedSender<()>) -> S,
) -> Result<Outcome, FollowError> {
    let (interrupt, interrupts) = mpsc::unbounded_channel();
    let mut observer = Silent;
    let (outcome, ()) = tokio::join!(run(plan, &mut observer, interrupts), script(interrupt));
    outcome
}

fn pair() -> (Node, Qemu) {
    let node = Node::start();
    let qemu = Qemu::start(node.path("qmp"));
    (node, qemu)
}

/// Brings both to the point where QEMU migrates and the disk is pushed.
async fn under_way(node: &Node, qemu: &Qemu) {
    node.armed().await;
    node.state(MigrationState::Active);
    until(|| qemu.asked("migrate")).await;
}

fn assert_failed(outcome: &Outcome, words: &str) {
    let failure = outcome.failure.as_deref().expect("a failure");
    assert!(failure.contains(words), "{failure}");
}

#[tokio::test]
async fn qemu_begins_when_the_peers_have_agreed_and_both_complete() {
    let (node, qemu) = pair();
    let outcome = play(with_vm(&node, &qemu), |_| async {
        node.armed().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!qemu.asked("migrate"), "QEMU was started before the peers agreed");
        under_way(&node, &qemu).await;
        assert_eq!(qemu.script.lock().uri, "tcp:h:2");
        node.state(MigrationState::PreSwitchover);
        qemu.set("completed", "postmigrate");
        node.state(MigrationState::PostcopyActive);
        node.state(MigrationState::Completed);
    })
    .await
    .unwrap();
    assert_eq!(outcome.failure, None);
    assert_eq!(outcome.disks[0].status.state, MigrationState::Completed);
    assert_eq!(outcome.vm.unwrap().downtime_ms, Some(11));
    assert_eq!(node.script.lock().cancels, 0);
}

#[tokio::test]
async fn with_hypervisor_qemu_begins_once_the_peer_is_connected() {
    let (node, qemu) = pair();
    let mut plan = with_vm(&node, &qemu);
    plan.disks[0].request.start = StartMode::WithHypervisor;
    let outcome = play(plan, |_| async {
        node.armed().await;
        node.set(|snapshot| snapshot.migration.connected = true);
        until(|| qemu.asked("migrate")).await;
        qemu.set("completed", "postmigrate");
        node.state(MigrationState::Completed);
    })
    .await
    .unwrap();
    assert_eq!(outcome.failure, None);
}

#[tokio::test]
async fn without_a_monitor_nothing_is_armed() {
    let node = Node::start();
    let hypervisor = Hypervisor { qmp: node.path("nothing-here"), uri: "tcp:h:2".to_owned() };
    let plan = Plan { hypervisor: Some(hypervisor), ..alone(&node) };
    let error = play(plan, |_| async {}).await.unwrap_err();
    assert_eq!(error.code(), "qmp");
    assert!(node.script.lock().requests.is_empty());
}

#[tokio::test]
async fn a_vm_that_migrates_already_is_left_alone() {
    let (node, qemu) = pair();
    qemu.set("active", "running");
    let error = play(with_vm(&node, &qemu), |_| async {}).await.unwrap_err();
    assert_eq!(error.code(), "busy");
    assert!(node.script.lock().requests.is_empty());
}

#[tokio::test]
async fn a_refusal_of_the_daemon_leaves_qemu_alone() {
    let (node, qemu) = pair();
    node.script.lock().deny_migrate = Some(Denied::new("internal", "nobody there"));
    let error = play(with_vm(&node, &qemu), |_| async {}).await.unwrap_err();
    assert_eq!(error.code(), "internal");
    assert!(!qemu.asked("migrate"));
}

#[tokio::test]
async fn a_disk_that_fails_before_the_agreement_leaves_qemu_alone() {
    let (node, qemu) = pair();
    let outcome = play(with_vm(&node, &qemu), |_| async {
        node.armed().await;
        node.set(|snapshot| {
            snapshot.migration.message = "sizes differ".to_owned();
            snapshot.migration.state = MigrationState::Failed;
        });
    })
    .await
    .unwrap();
    assert_failed(&outcome, "sizes differ");
    assert!(!qemu.asked("migrate") && !qemu.asked("migrate_cancel"));
}

#[tokio::test]
async fn a_refusal_of_qemu_cancels_the_disk() {
    let (node, qemu) = pair();
    qemu.script.lock().refuse_migrate = Some("blocked".to_owned());
    let outcome = play(with_vm(&node, &qemu), |_| async {
        node.armed().await;
        node.state(MigrationState::Active);
    })
    .await
    .unwrap();
    assert_failed(&outcome, "blocked");
    assert_eq!((outcome.disks[0].status.state, node.script.lock().cancels), (MigrationState::Cancelled, 1));
}

#[tokio::test]
async fn a_failure_of_qemu_cancels_the_disk() {
    for (status, state) in [
        ("failed", MigrationState::Active),
        ("cancelled", MigrationState::Active),
        ("failed", MigrationState::PreSwitchover),
    ] {
        let (node, qemu) = pair();
        let outcome = play(with_vm(&node, &qemu), |_| async {
            under_way(&node, &qemu).await;
            node.state(state);
            qemu.script.lock().error = Some("link down".to_owned());
            qemu.set(status, "running");
        })
        .await
        .unwrap();
        assert_failed(&outcome, "link down");
        assert_eq!(
            (outcome.disks[0].status.state, node.script.lock().cancels),
            (MigrationState::Cancelled, 1)
        );
    }
}

#[tokio::test]
async fn a_failure_of_qemu_after_the_handover_is_reported_and_the_disk_left() {
    let (node, qemu) = pair();
    node.script.lock().deny_cancel = Some(Denied::new("handed-over", "the destination owns the disk"));
    let outcome = play(with_vm(&node, &qemu), |_| async {
        under_way(&node, &qemu).await;
        node.state(MigrationState::PostcopyActive);
        qemu.set("failed", "paused");
    })
    .await
    .unwrap();
    assert_failed(&outcome, "QEMU's migration did not complete (failed)");
    assert_eq!(outcome.disks[0].status.state, MigrationState::PostcopyActive);
}

#[tokio::test]
async fn a_disk_that_is_being_offered_is_cancelled_when_it_has_come_back() {
    let (node, qemu) = pair();
    node.script.lock().deny_cancel = Some(Denied::new("busy", "the disk is offered"));
    let outcome = play(with_vm(&node, &qemu), |_| async {
        under_way(&node, &qemu).await;
        node.state(MigrationState::PreSwitchover);
        qemu.set("failed", "running");
        until(|| node.script.lock().cancels == 1).await;
        node.state(MigrationState::Active);
        node.script.lock().deny_cancel = None;
    })
    .await
    .unwrap();
    assert_failed(&outcome, "QEMU's migration did not complete (failed)");
    assert_eq!((outcome.disks[0].status.state, node.script.lock().cancels), (MigrationState::Cancelled, 2));
}

#[tokio::test]
async fn a_failure_of_qemu_is_no_success_even_if_the_disk_completed() {
    let (node, qemu) = pair();
    let outcome = play(with_vm(&node, &qemu), |_| async {
        under_way(&node, &qemu).await;
        qemu.set("failed", "paused");
        node.state(MigrationState::Completed);
    })
    .await
    .unwrap();
    assert_failed(&outcome, "QEMU's migration did not complete (failed)");
}

#[tokio::test]
async fn a_failure_of_the_disk_cancels_qemu() {
    let (node, qemu) = pair();
    let outcome = play(with_vm(&node, &qemu), |_| async {
        under_way(&node, &qemu).await;
        node.set(|snapshot| {
            snapshot.migration.message = "no space".to_owned();
            snapshot.migration.state = MigrationState::Failed;
        });
    })
    .await
    .unwrap();
    assert_failed(&outcome, "no space");
    assert!(qemu.asked("migrate_cancel"));
    assert_eq!(outcome.vm.unwrap().word, "cancelled");
    assert_eq!(node.script.lock().cancels, 0, "there is nothing left to cancel");
}

#[tokio::test]
async fn a_monitor_that_vanishes_before_the_switchover_cancels_the_disk() {
    let (node, qemu) = pair();
    let outcome = play(with_vm(&node, &qemu), |_| async {
        under_way(&node, &qemu).await;
        qemu.vanish();
    })
    .await
    .unwrap();
    assert_failed(&outcome, "monitor went away");
    assert_eq!((outcome.disks[0].status.state, node.script.lock().cancels), (MigrationState::Cancelled, 1));
}

#[tokio::test]
async fn a_monitor_that_vanishes_in_the_switchover_is_no_reason_to_cancel() {
    let (node, qemu) = pair();
    let outcome = play(with_vm(&node, &qemu), |_| async {
        under_way(&node, &qemu).await;
        node.state(MigrationState::PreSwitchover);
        tokio::time::sleep(Duration::from_millis(300)).await;
        qemu.vanish();
        tokio::time::sleep(Duration::from_millis(300)).await;
        node.state(MigrationState::PostcopyActive);
        node.state(MigrationState::Completed);
    })
    .await
    .unwrap();
    assert_eq!((outcome.failure, node.script.lock().cancels), (None, 0));
}

#[tokio::test]
async fn a_vm_that_is_resumed_at_the_source_takes_its_disk_back() {
    let (node, qemu) = pair();
    let outcome = play(with_vm(&node, &qemu), |_| async {
        under_way(&node, &qemu).await;
        node.state(MigrationState::PreSwitchover);
        qemu.set("completed", "postmigrate");
        tokio::time::sleep(Duration::from_millis(300)).await;
        qemu.set("completed", "running");
        node.state(MigrationState::Active);
    })
    .await
    .unwrap();
    assert_failed(&outcome, "resumed at the source");
    assert_eq!((outcome.disks[0].status.state, node.script.lock().cancels), (MigrationState::Cancelled, 1));
}

#[tokio::test]
async fn an_interrupt_cancels_qemu_and_then_the_disk() {
    let (node, qemu) = &pair();
    // While QEMU is still cancelling, the disk must wait.
    "cancelling".clone_into(&mut qemu.script.lock().cancel_gives);
    let outcome = play(with_vm(node, qemu), |interrupt| async move {
        under_way(node, qemu).await;
        interrupt.send(()).unwrap();
        until(|| qemu.asked("migrate_cancel")).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(node.script.lock().cancels, 0, "the disk was cancelled before QEMU");
        qemu.set("cancelled", "running");
    })
    .await
    .unwrap();
    assert_failed(&outcome, "cancelled by the operator");
    assert_eq!((outcome.disks[0].status.state, node.script.lock().cancels), (MigrationState::Cancelled, 1));
}

#[tokio::test]
async fn an_interrupt_that_comes_too_late_lets_the_disk_follow_the_vm() {
    let (node, qemu) = &pair();
    "completed".clone_into(&mut qemu.script.lock().cancel_gives);
    let outcome = play(with_vm(node, qemu), |interrupt| async move {
        under_way(node, qemu).await;
        interrupt.send(()).unwrap();
        until(|| qemu.asked("migrate_cancel")).await;
        qemu.set("completed", "postmigrate");
        tokio::time::sleep(Duration::from_millis(300)).await;
        node.state(MigrationState::PostcopyActive);
        node.state(MigrationState::Completed);
    })
    .await
    .unwrap();
    assert_eq!((outcome.failure, node.script.lock().cancels), (None, 0));
}

#[tokio::test]
async fn an_interrupt_before_the_agreement_starts_nothing_at_qemu() {
    let (node, qemu) = &pair();
    let outcome = play(with_vm(node, qemu), |interrupt| async move {
        node.armed().await;
        interrupt.send(()).unwrap();
    })
    .await
    .unwrap();
    assert_failed(&outcome, "cancelled by the operator");
    assert!(!qemu.asked("migrate"));
    assert_eq!(outcome.disks[0].status.state, MigrationState::Cancelled);
}

#[tokio::test]
async fn without_a_vm_the_disk_is_followed_alone() {
    for (state, good) in [
        (MigrationState::Completed, true),
        (MigrationState::Failed, false),
        (MigrationState::Cancelled, false),
    ] {
        let node = &Node::start();
        let plan = alone(node);
        let outcome = play(plan, |_| async move {
            node.armed().await;
            node.state(MigrationState::Active);
            node.state(state);
        })
        .await
        .unwrap();
        assert_eq!((outcome.disks[0].status.state, outcome.failure.is_none()), (state, good));
    }
}

#[tokio::test]
async fn without_a_vm_a_denied_interrupt_changes_nothing() {
    let node = &Node::start();
    node.script.lock().deny_cancel = Some(Denied::new("handed-over", "the destination owns the disk"));
    let plan = alone(node);
    let outcome = play(plan, |interrupt| async move {
        node.armed().await;
        node.state(MigrationState::PostcopyActive);
        interrupt.send(()).unwrap();
        until(|| node.script.lock().cancels == 1).await;
        node.state(MigrationState::Completed);
    })
    .await
    .unwrap();
    assert_eq!(outcome.failure, None);
}

#[tokio::test]
async fn the_end_of_an_earlier_migration_is_not_taken_for_this_ones() {
    let node = &Node::start();
    node.set(|snapshot| {
        snapshot.migration.id = "earlier".to_owned();
        snapshot.migration.state = MigrationState::Completed;
    });
    node.script.lock().publish_late = true;
    let plan = alone(node);
    let outcome = play(plan, |_| async move {
        until(|| node.now() == MigrationState::Setup).await;
        node.state(MigrationState::Failed);
    })
    .await
    .unwrap();
    assert_eq!(
        (outcome.disks[0].status.id.as_str(), outcome.disks[0].status.state),
        ("earlier+", MigrationState::Failed)
    );
}

#[tokio::test]
async fn a_restart_of_the_daemon_is_survived() {
    let mut node = Node::start();
    let (_interrupt, interrupts) = mpsc::unbounded_channel();
    let plan = alone(&node);
    let following = tokio::spawn(async move { run(plan, &mut Silent, interrupts).await });
    node.armed().await;
    node.state(MigrationState::Active);
    tokio::time::sleep(Duration::from_millis(100)).await;
    node.stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    node.serve();
    node.state(MigrationState::Completed);
    let outcome = following.await.unwrap().unwrap();
    assert_eq!((outcome.failure, outcome.disks[0].status.state), (None, MigrationState::Completed));
}

#[tokio::test]
async fn a_daemon_that_forgot_the_migration_is_a_failure() {
    let node = &Node::start();
    let plan = alone(node);
    let outcome = play(plan, |_| async move {
        node.armed().await;
        node.state(MigrationState::Active);
        tokio::time::sleep(Duration::from_millis(200)).await;
        node.set(|snapshot| snapshot.migration = MigrationStatus::default());
    })
    .await
    .unwrap();
    assert_failed(&outcome, "no longer knows");
}
