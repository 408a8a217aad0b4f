// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The QMP client against the scripted monitor.

use crate::qemu::Qemu;
use blkferry::control::qmp::{Qmp, QmpError, VmMigration};
use std::path::Path;

#[tokio::test]
async fn negotiates_and_asks_for_events() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(dir.path().join("qmp"));
    let mut qmp = Qmp::connect(&qemu.path).await.unwrap();
    assert_eq!(qemu.script.lock().commands, ["qmp_capabilities", "migrate-set-capabilities"]);
    assert_eq!(qmp.query_status().await.unwrap(), "running");
    assert_eq!(qmp.query_migrate().await.unwrap().state, VmMigration::None);
}

#[tokio::test]
async fn answers_are_told_from_events_that_come_in_between() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(dir.path().join("qmp"));
    let mut qmp = Qmp::connect(&qemu.path).await.unwrap();
    qmp.migrate("tcp:h:1").await.unwrap();
    assert_eq!(qemu.script.lock().uri, "tcp:h:1");
    let status = qmp.query_migrate().await.unwrap();
    assert_eq!((status.state, status.ram_remaining, status.ram_transferred), (VmMigration::Running, 7, 9));
    qmp.migrate_cancel().await.unwrap();
    assert_eq!(qmp.query_migrate().await.unwrap().state, VmMigration::Cancelled);
}

#[tokio::test]
async fn every_step_of_qemu_counts_as_running() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(dir.path().join("qmp"));
    let mut qmp = Qmp::connect(&qemu.path).await.unwrap();
    for word in
        ["setup", "active", "pre-switchover", "device", "postcopy-active", "cancelling", "wait-unplug"]
    {
        qemu.set(word, "running");
        assert_eq!(qmp.query_migrate().await.unwrap().state, VmMigration::Running, "{word}");
    }
    qemu.set("completed", "postmigrate");
    let status = qmp.query_migrate().await.unwrap();
    assert_eq!((status.state, status.downtime_ms), (VmMigration::Completed, Some(11)));
}

#[tokio::test]
async fn a_refusal_carries_qemus_words() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(dir.path().join("qmp"));
    qemu.script.lock().refuse_migrate = Some("not today".to_owned());
    let mut qmp = Qmp::connect(&qemu.path).await.unwrap();
    let error = qmp.migrate("tcp:h:1").await.unwrap_err();
    assert!(matches!(&error, QmpError::Refused { .. }) && error.to_string().contains("not today"), "{error}");
    assert_eq!(qmp.query_status().await.unwrap(), "running", "the connection is still in step");
}

#[tokio::test]
async fn a_monitor_that_goes_away_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(dir.path().join("qmp"));
    let mut qmp = Qmp::connect(&qemu.path).await.unwrap();
    qemu.vanish();
    assert!(matches!(qmp.query_status().await, Err(QmpError::Lost(_))));
    assert!(matches!(Qmp::connect(Path::new("/nonexistent")).await, Err(QmpError::Connect { .. })));
}
