// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The API through its own client, and through bytes that the client would never send.

use crate::node::{Node, until};
use blkferry::control::client::{Change, Client, ClientError};
use blkferry::node::status::{
    ChunkCounts, Denied, IoCounts, MigrationRequest, MigrationState, MigrationStatus, Side, StartMode,
    StrategyName, VolumeStatus,
};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

fn request() -> MigrationRequest {
    MigrationRequest {
        destination_url: "tcp:127.0.0.1:7000".to_owned(),
        strategy: StrategyName::Precopy,
        threshold: Some(5),
        connections: Some(4),
        bandwidth: Some(1 << 20),
        start: StartMode::WithHypervisor,
    }
}

/// Sends a request as bytes; gives status and body.
fn raw(node: &Node, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(node.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A server that refuses a long body may close before it has read all of it.
    let _ = stream.write_all(body.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

fn refused(node: &Node, method: &str, path: &str, body: &str) -> (u16, String) {
    let (status, body) = raw(node, method, path, body);
    let denied: Denied =
        serde_json::from_str(&body).unwrap_or_else(|_| panic!("no {{code, message}}: {body}"));
    assert!(!denied.message.is_empty());
    (status, denied.code)
}

#[tokio::test]
async fn volume_and_migration_are_the_snapshots() {
    let node = Node::start();
    node.set(|snapshot| {
        snapshot.volume.size = 64 << 30;
        snapshot.migration.remaining_chunks = 42;
    });
    assert_eq!(node.client().volume().await.unwrap().size, 64 << 30);
    let migration = node.client().migration().await.unwrap();
    assert_eq!((migration.state, migration.remaining_chunks), (MigrationState::None, 42));
}

#[tokio::test]
async fn what_is_read_is_of_the_moment_it_was_asked_for() {
    let node = Node::start();
    node.script.lock().busy_guest = true;
    assert_eq!(node.client().volume().await.unwrap().io.flushes, 1);
    node.client().migration().await.unwrap();
    let text = node.client().metrics().await.unwrap();
    assert!(text.contains("blkferry_requests_total{op=\"flush\"} 3\n"), "{text}");
    // Nobody but the listener asks.
    let mut events = node.client().events().await.unwrap();
    let mut told = 3;
    while told < 6 {
        if let Some(Change::Volume(volume)) = events.next().await.unwrap() {
            assert!(volume.io.flushes > told);
            told = volume.io.flushes;
        }
    }
    drop(events);
    // A node that has gone leaves its last word.
    node.script.lock().vanish = true;
    let last = node.client().volume().await.unwrap().io.flushes;
    assert_eq!(node.client().volume().await.unwrap().io.flushes, last);
}

#[tokio::test]
async fn a_request_arrives_whole_and_its_answer_shows_it() {
    for publish_late in [false, true] {
        let node = Node::start();
        node.script.lock().publish_late = publish_late;
        let status = node.client().migrate(&request()).await.unwrap();
        assert_eq!((status.state, status.id.as_str()), (MigrationState::Setup, "+"), "late: {publish_late}");
        assert_eq!(node.script.lock().requests, [request()]);
    }
}

#[tokio::test]
async fn a_resize_answers_with_the_new_size_or_a_named_refusal() {
    let node = Node::start();
    assert_eq!(node.client().resize(1 << 30).await.unwrap().size, 1 << 30);
    let (status, body) = raw(&node, "PUT", "/api/v1/volume", r#"{"size":2147483648}"#);
    assert_eq!((status, serde_json::from_str::<VolumeStatus>(&body).unwrap().size), (200, 2 << 30));
    for body in
        ["", "{}", r#"{"size":-1}"#, r#"{"size":"1G"}"#, r#"{"size":1,"shrink":true}"#, r#"{"size":1e40}"#]
    {
        assert_eq!(refused(&node, "PUT", "/api/v1/volume", body), (400, "invalid".to_owned()), "{body}");
    }
    for (code, status) in [
        ("busy", 409),
        ("not-owner", 409),
        ("handed-over", 409),
        ("faulty", 409),
        ("shrink", 422),
        ("limit", 422),
        ("no-space", 507),
        ("internal", 500),
    ] {
        node.script.lock().deny_resize = Some(Denied::new(code, "no"));
        assert_eq!(refused(&node, "PUT", "/api/v1/volume", r#"{"size":512}"#), (status, code.to_owned()));
    }
    assert_eq!(refused(&node, "DELETE", "/api/v1/volume", "").0, 405);
}

#[tokio::test]
async fn curl_needs_only_the_address() {
    let node = Node::start();
    let (status, body) = raw(&node, "PUT", "/api/v1/migration", r#"{"destination_url":"h:1"}"#);
    assert_eq!(status, 202);
    assert_eq!(serde_json::from_str::<MigrationStatus>(&body).unwrap().state, MigrationState::Setup);
    let expected = MigrationRequest {
        destination_url: "h:1".to_owned(),
        strategy: StrategyName::Hybrid,
        threshold: None,
        connections: None,
        bandwidth: None,
        start: StartMode::Now,
    };
    assert_eq!(node.script.lock().requests, [expected]);
}

#[tokio::test]
async fn unusable_requests_never_reach_the_node() {
    let node = Node::start();
    let long = format!(r#"{{"destination_url":"{}:1"}}"#, "a".repeat(1000));
    for body in [
        "",
        "nonsense",
        "{}",
        "[]",
        r#"{"destination_url":7}"#,
        r#"{"destination_url":"h:1","bandwith":1}"#,
        r#"{"destination_url":"h:1","destination_url":"h:2"}"#,
        r#"{"destination_url":"h:1"} trailing"#,
        r#"{"destination_url":"h:1","threshold":-1}"#,
        r#"{"destination_url":"h:1","threshold":4294967296}"#,
        r#"{"destination_url":"h:1","connections":17}"#,
        r#"{"destination_url":"h:1","bandwidth":1.5}"#,
        r#"{"destination_url":"h:1","strategy":"magic"}"#,
        r#"{"destination_url":"http://h:1"}"#,
        &long,
    ] {
        assert_eq!(refused(&node, "PUT", "/api/v1/migration", body), (400, "invalid".to_owned()), "{body}");
    }
    for strategy in ["mirror", "shared"] {
        let body = json!({ "destination_url": "h:1", "strategy": strategy }).to_string();
        assert_eq!(refused(&node, "PUT", "/api/v1/migration", &body), (422, "not-supported".to_owned()));
    }
    let huge = " ".repeat(20 << 10);
    assert_eq!(refused(&node, "PUT", "/api/v1/migration", &huge), (413, "too-large".to_owned()));
    assert!(node.script.lock().requests.is_empty());
}

#[tokio::test]
async fn unknown_paths_and_methods_are_refused_like_everything_else() {
    let node = Node::start();
    assert_eq!(refused(&node, "GET", "/api/v2/volume", ""), (404, "not-found".to_owned()));
    assert_eq!(refused(&node, "POST", "/api/v1/volume", ""), (405, "method-not-allowed".to_owned()));
}

#[tokio::test]
async fn the_nodes_refusals_keep_their_code() {
    for (code, status) in [
        ("busy", 409),
        ("not-owner", 409),
        ("handed-over", 409),
        ("not-supported", 422),
        ("invalid", 400),
        ("none", 404),
        ("internal", 500),
    ] {
        let node = Node::start();
        let denied = Denied::new(code, "because");
        node.script.lock().deny_migrate = Some(denied.clone());
        node.script.lock().deny_cancel = Some(denied.clone());
        let put = refused(&node, "PUT", "/api/v1/migration", r#"{"destination_url":"h:1"}"#);
        assert_eq!(put, (status, code.to_owned()));
        let Err(ClientError::Denied(told)) = node.client().cancel().await else { panic!("not denied") };
        assert_eq!(told, denied);
    }
}

#[tokio::test]
async fn a_cancel_is_answered_with_its_effect() {
    let node = Node::start();
    node.client().migrate(&request()).await.unwrap();
    assert_eq!(node.client().cancel().await.unwrap().state, MigrationState::Cancelled);
    assert_eq!(node.script.lock().cancels, 1);
}

#[tokio::test]
async fn a_node_that_is_gone_is_said_to_be_stopping() {
    let node = Node::start();
    node.script.lock().vanish = true;
    for _ in 0..2 {
        let error = node.client().migrate(&request()).await.unwrap_err();
        assert_eq!(error.code(), "stopping");
    }
}

#[tokio::test]
async fn nobody_at_the_socket_is_said_so() {
    let node = Node::start();
    assert_eq!(Client::new(node.path("other")).volume().await.unwrap_err().code(), "no-daemon");
}

async fn migration(events: &mut blkferry::control::client::Events) -> Option<MigrationStatus> {
    loop {
        match events.next().await.unwrap() {
            Some(Change::Migration(migration)) => return Some(*migration),
            Some(Change::Volume(_)) => {}
            None => return None,
        }
    }
}

#[tokio::test]
async fn events_begin_with_what_is_and_end_with_the_daemon() {
    let mut node = Node::start();
    node.set(|snapshot| snapshot.volume.size = 4096);
    let mut events = node.client().events().await.unwrap();
    let first = [events.next().await.unwrap().unwrap(), events.next().await.unwrap().unwrap()];
    assert_eq!(first[0], Change::Migration(Box::default()));
    assert_eq!(first[1], Change::Volume(Box::new(VolumeStatus { size: 4096, ..VolumeStatus::default() })));

    node.set(|snapshot| snapshot.volume.io.reads = 7);
    let Some(Change::Volume(volume)) = events.next().await.unwrap() else {
        panic!("only the volume changed")
    };
    assert_eq!(volume.io.reads, 7);

    node.set(|snapshot| "a line\nand another \u{e9}".clone_into(&mut snapshot.migration.message));
    let told = migration(&mut events).await.unwrap();
    assert_eq!(told.message, "a line\nand another \u{e9}");

    node.stop();
    assert_eq!(migration(&mut events).await, None);
}

#[tokio::test]
async fn a_slow_listener_skips_but_never_misses_the_last() {
    let node = Node::start();
    let mut events = node.client().events().await.unwrap();
    for remaining in (0..10_000).rev() {
        node.set(|snapshot| snapshot.migration.remaining_chunks = remaining);
    }
    node.state(MigrationState::Completed);
    let mut seen = 0;
    while migration(&mut events).await.unwrap().state != MigrationState::Completed {
        seen += 1;
    }
    assert!(seen < 10_000, "every one of {seen} changes was queued");
}

#[tokio::test]
async fn the_daemon_stops_although_somebody_listens_and_somebody_stalls() {
    let mut node = Node::start();
    let _events = node.client().events().await.unwrap();
    let mut stalled = UnixStream::connect(node.socket()).unwrap();
    stalled.write_all(b"PUT /api/v1/migration HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{").unwrap();
    node.stop();
    until(|| !node.socket().exists()).await;
}

#[tokio::test]
async fn metrics_say_what_the_snapshot_knows() {
    let node = Node::start();
    node.set(|snapshot| {
        snapshot.volume.io = IoCounts {
            reads: 1,
            writes: 2,
            flushes: 3,
            zeroes: 4,
            errors: 5,
            read_bytes: 6,
            written_bytes: 7,
        };
        snapshot.volume.chunks = ChunkCounts {
            base: 10,
            zero: 11,
            local: 12,
            modified: 13,
            remote: 14,
            installing: 15,
            received: 16,
        };
        let migration = &mut snapshot.migration;
        migration.state = MigrationState::PostcopyActive;
        migration.remaining_chunks = 20;
        (migration.push_bytes, migration.prefetch_bytes, migration.demand_bytes) = (21, 22, 23);
        migration.chunks_repushed = 24;
        migration.kept_chunks = 25;
    });
    let text = node.client().metrics().await.unwrap();
    for line in [
        r#"blkferry_requests_total{op="read"} 1"#,
        r#"blkferry_requests_total{op="write"} 2"#,
        r#"blkferry_requests_total{op="flush"} 3"#,
        r#"blkferry_requests_total{op="zero"} 4"#,
        "blkferry_request_errors_total 5",
        r#"blkferry_io_bytes_total{op="read"} 6"#,
        r#"blkferry_io_bytes_total{op="write"} 7"#,
        r#"blkferry_chunks{state="base"} 10"#,
        r#"blkferry_chunks{state="zero"} 11"#,
        r#"blkferry_chunks{state="local"} 12"#,
        r#"blkferry_chunks{state="modified"} 13"#,
        r#"blkferry_chunks{state="remote"} 14"#,
        r#"blkferry_chunks{state="installing"} 15"#,
        r#"blkferry_chunks{state="received"} 16"#,
        r#"blkferry_migration_state{state="postcopy-active"} 1"#,
        r#"blkferry_migration_state{state="none"} 0"#,
        "blkferry_migration_chunks_remaining 20",
        r#"blkferry_migration_transferred_bytes_total{path="push"} 21"#,
        r#"blkferry_migration_transferred_bytes_total{path="prefetch"} 22"#,
        r#"blkferry_migration_transferred_bytes_total{path="demand"} 23"#,
        "blkferry_migration_chunk_resends_total 24",
        "blkferry_migration_kept_chunks_total 25",
        "# EOF",
    ] {
        assert!(text.lines().any(|have| have == line), "{line} is missing in\n{text}");
    }
}

/// The field names that a value is really written with.
fn written(value: &impl Serialize) -> BTreeSet<String> {
    serde_json::to_value(value).unwrap().as_object().unwrap().keys().cloned().collect()
}

#[tokio::test]
async fn openapi_describes_every_path_and_every_field() {
    let node = Node::start();
    let document = node.client().openapi().await.unwrap();
    let paths = document["paths"].as_object().unwrap();
    let methods =
        |path: &str| -> BTreeSet<String> { paths[path].as_object().unwrap().keys().cloned().collect() };
    let set = |words: &[&str]| -> BTreeSet<String> { words.iter().map(|word| (*word).to_owned()).collect() };
    assert_eq!(
        paths.keys().cloned().collect::<BTreeSet<_>>(),
        set(&["/api/v1/volume", "/api/v1/migration", "/api/v1/events", "/metrics", "/openapi.json"])
    );
    assert_eq!(methods("/api/v1/migration"), set(&["get", "put", "delete"]));
    for path in paths.keys() {
        for (method, operation) in paths[path].as_object().unwrap() {
            assert!(operation["responses"].as_object().is_some_and(|all| !all.is_empty()), "{method} {path}");
        }
        if path != "/api/v1/events" {
            assert_eq!(raw(&node, "GET", path, "").0, 200, "{path} is described but not served");
        }
    }

    let schemas = &document["components"]["schemas"];
    let described = |name: &str| -> BTreeSet<String> {
        schemas[name]["properties"].as_object().unwrap_or_else(|| panic!("{name}")).keys().cloned().collect()
    };
    assert_eq!(described("VolumeStatus"), written(&VolumeStatus::default()));
    assert_eq!(described("MigrationStatus"), written(&MigrationStatus::default()));
    assert_eq!(described("MigrationRequest"), written(&request()));
    assert_eq!(described("ChunkCounts"), written(&ChunkCounts::default()));
    assert_eq!(described("IoCounts"), written(&IoCounts::default()));
    assert_eq!(described("Denied"), written(&Denied::new("a", "b")));
    assert_eq!(schemas["MigrationRequest"]["additionalProperties"], Value::Bool(false));
    assert_eq!(schemas["MigrationRequest"]["required"], json!(["destination_url"]));

    let words = |name: &str| schemas[name]["enum"].clone();
    assert_eq!(words("Side"), json!([Side::Source, Side::Destination]));
    assert_eq!(words("StartMode"), json!([StartMode::Now, StartMode::WithHypervisor]));
    assert_eq!(words("StrategyName"), json!(["hybrid", "precopy", "postcopy", "mirror", "shared"]));
    assert_eq!(words("MigrationState"), json!(blkferry::control::words::STATES));
}
