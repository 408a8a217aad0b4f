// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `blkferry` program: what it writes where, and its exit status.

use crate::node::{Node, until};
use blkferry::control::cli::summary::Summary;
use blkferry::node::status::{Denied, MigrationState, Snapshot};
use serde_json::Value;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

fn blkferry(node: &Node, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blkferry"));
    command.arg("--api-socket").arg(node.socket()).args(words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn done(node: &Node, words: &[&str]) -> Output {
    blkferry(node, words).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Standard output, which must be JSON objects, one a line.
fn objects(output: &Output) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"));
    stdout(output).lines().map(parse).collect()
}

async fn finish(child: Child) -> Output {
    tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap()
}

#[test]
fn unusable_arguments_exit_with_2_and_write_no_answer() {
    let node = Node::start();
    for words in
        [&[][..], &["frobnicate"], &["migrate"], &["migrate", "--to", "h:1", "--qmp", "/q"], &["image"]]
    {
        let output = done(&node, words);
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(2), ""), "{words:?}");
        assert!(!stderr(&output).is_empty());
    }
    let output = Command::new(env!("CARGO_BIN_EXE_blkferry")).arg("status").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--api-socket"));
}

#[test]
fn help_lists_what_there_is_and_no_more() {
    let output = Command::new(env!("CARGO_BIN_EXE_blkferry")).arg("--help").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    for verb in ["status", "migrate", "cancel", "resize", "watch", "metrics", "recover"] {
        assert!(text.contains(verb), "{text}");
    }
    assert!(!text.contains("image"), "{text}");
}

#[test]
fn resize_takes_a_size_and_tells_what_became_of_it() {
    let node = Node::start();
    let output = done(&node, &["resize", "96M"]);
    assert_eq!((output.status.code(), stdout(&output).trim()), (Some(0), "the volume has 100663296 bytes"));
    let output = done(&node, &["resize", "1T", "--json"]);
    assert_eq!(objects(&output)[0]["size"], 1u64 << 40);
    node.script.lock().deny_resize = Some(Denied::new("shrink", "no"));
    let output = done(&node, &["resize", "1M", "--json"]);
    assert_eq!((output.status.code(), &objects(&output)[0]["code"]), (Some(1), &Value::from("shrink")));
    for words in [&["resize"][..], &["resize", "big"], &["resize", "-1"], &["resize", "1M", "2M"]] {
        assert_eq!(done(&node, words).status.code(), Some(2), "{words:?}");
    }
}

#[test]
fn status_is_a_block_or_one_object() {
    let node = Node::start();
    node.set(|snapshot| snapshot.volume.size = 64 << 30);
    let output = done(&node, &["status"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("64.0 GiB"), "{}", stdout(&output));
    let output = done(&node, &["status", "--json"]);
    assert_eq!(stdout(&output).lines().count(), 1);
    let snapshot: Snapshot = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(snapshot.volume.size, 64 << 30);
}

#[test]
fn a_refusal_exits_with_1_and_names_its_code() {
    let node = Node::start();
    node.script.lock().deny_cancel = Some(Denied::new("none", "there is no migration"));
    let output = done(&node, &["cancel", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(objects(&output)[0]["code"], "none");
    let output = done(&node, &["cancel"]);
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(1), ""));
    assert!(stderr(&output).contains("there is no migration"));
    let output = done(&node, &["migrate", "--to", "h:1", "--strategy", "mirror", "--json"]);
    assert_eq!(
        (output.status.code(), &objects(&output)[0]["code"]),
        (Some(1), &Value::from("not-supported"))
    );
}

#[test]
fn without_a_daemon_the_client_says_so() {
    let mut node = Node::start();
    node.stop();
    let output = done(&node, &["status", "--json"]);
    assert_eq!((output.status.code(), &objects(&output)[0]["code"]), (Some(1), &Value::from("no-daemon")));
}

#[tokio::test]
async fn a_migration_ends_with_the_one_object_and_0() {
    let node = Node::start();
    let child = blkferry(&node, &["migrate", "--to", "h:1", "--threshold", "4", "--json"]).spawn().unwrap();
    node.armed().await;
    assert_eq!(node.script.lock().requests[0].threshold, Some(4));
    node.set(|snapshot| {
        snapshot.migration.state = MigrationState::Active;
        snapshot.migration.push_bytes = 77;
    });
    node.state(MigrationState::Completed);
    let output = finish(child).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let line = stdout(&output).lines().last().unwrap().to_owned();
    let expected = [
        "state",
        "strategy",
        "threshold",
        "volume_bytes",
        "modified_bytes",
        "total_ms",
        "push_ms",
        "handoff_ms",
        "pull_ms",
        "push_bytes",
        "prefetch_bytes",
        "demand_bytes",
        "wire_bytes",
        "chunks_pushed",
        "chunks_repushed",
        "chunks_pulled",
        "chunks_cancelled",
        "zero_chunks",
        "kept_chunks",
        "kept_bytes",
    ];
    let places: Vec<_> =
        expected.iter().map(|name| line.find(&format!("\"{name}\":")).expect(name)).collect();
    assert!(places.is_sorted(), "{line}");
    let summary: Summary = serde_json::from_str(&line).unwrap();
    assert_eq!((summary.state, summary.push_bytes), (MigrationState::Completed, 77));
    assert_eq!(objects(&output).len(), 1);
    assert!(stderr(&output).contains("left"), "progress goes to standard error: {}", stderr(&output));
}

#[tokio::test]
async fn a_migration_that_fails_exits_with_1_and_says_why() {
    let node = Node::start();
    let child = blkferry(&node, &["migrate", "--to", "h:1", "--json"]).spawn().unwrap();
    node.armed().await;
    node.set(|snapshot| {
        snapshot.migration.state = MigrationState::Failed;
        snapshot.migration.message = "no space".to_owned();
    });
    let output = finish(child).await;
    assert_eq!(output.status.code(), Some(1));
    let last = objects(&output).pop().unwrap();
    assert_eq!(last["state"], "failed");
    assert!(last["message"].as_str().unwrap().contains("no space"));
}

#[tokio::test]
async fn no_wait_returns_once_armed() {
    let node = Node::start();
    let output =
        finish(blkferry(&node, &["migrate", "--to", "h:1", "--no-wait", "--json"]).spawn().unwrap()).await;
    assert_eq!((output.status.code(), &objects(&output)[0]["state"]), (Some(0), &Value::from("setup")));
}

#[tokio::test]
async fn ctrl_c_cancels_and_exits_with_1() {
    let node = Node::start();
    let child = blkferry(&node, &["migrate", "--to", "h:1"]).spawn().unwrap();
    node.armed().await;
    node.state(MigrationState::Active);
    interrupt(&child);
    let output = finish(child).await;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((node.script.lock().cancels, node.now()), (1, MigrationState::Cancelled));
    assert!(stderr(&output).contains("cancelled by the operator"), "{}", stderr(&output));
}

#[tokio::test]
async fn a_second_ctrl_c_leaves_at_once() {
    let node = Node::start();
    node.script.lock().deny_cancel = Some(Denied::new("handed-over", "the destination owns the disk"));
    let child = blkferry(&node, &["migrate", "--to", "h:1"]).spawn().unwrap();
    node.armed().await;
    node.state(MigrationState::PostcopyActive);
    interrupt(&child);
    until(|| node.script.lock().cancels == 1).await;
    interrupt(&child);
    assert_eq!(finish(child).await.status.code(), Some(130));
    assert_eq!(node.now(), MigrationState::PostcopyActive);
}

fn interrupt(child: &Child) {
    let status = Command::new("kill").arg("-INT").arg(child.id().to_string()).status().unwrap();
    assert!(status.success());
}

#[tokio::test]
async fn watch_shows_changes_until_the_daemon_stops() {
    let mut node = Node::start();
    let mut child = blkferry(&node, &["watch", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = move || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!([next()["event"].clone(), next()["event"].clone()], ["migration", "volume"]);
    node.state(MigrationState::Active);
    let change = next();
    assert_eq!((&change["event"], &change["data"]["state"]), (&"migration".into(), &"active".into()));
    node.stop();
    assert_eq!(finish(child).await.status.code(), Some(0));
}

#[test]
fn metrics_come_as_text_or_as_objects() {
    let node = Node::start();
    node.set(|snapshot| snapshot.volume.io.reads = 3);
    assert!(stdout(&done(&node, &["metrics"])).contains("blkferry_requests_total{op=\"read\"} 3\n"));
    let objects = objects(&done(&node, &["metrics", "--json"]));
    let reads =
        objects.iter().find(|o| o["name"] == "blkferry_requests_total" && o["labels"]["op"] == "read");
    assert_eq!(reads.unwrap()["value"], 3);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let node = Node::start();
    let script = r#""$1" --api-socket "$2" metrics | true"#;
    let words = [OsStr::new(env!("CARGO_BIN_EXE_blkferry")).to_owned(), node.socket().into_os_string()];
    let output = Command::new("sh").arg("-c").arg(script).arg("sh").args(words).output().unwrap();
    assert_eq!(stderr(&output), "");
}
