// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A QEMU monitor that does what the test says.

use parking_lot::Mutex;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// What QEMU did and shall do.
#[derive(Debug)]
pub(crate) struct Script {
    /// Every command but the looks, in order.
    pub(crate) commands: Vec<String>,
    pub(crate) status: String,
    pub(crate) error: Option<String>,
    pub(crate) run_state: String,
    pub(crate) refuse_migrate: Option<String>,
    /// Capability pause-before-switchover, as the client has set it.
    pub(crate) pauses: bool,
    /// What a migrate_cancel leads to.
    pub(crate) cancel_gives: String,
    pub(crate) uri: String,
}

pub(crate) struct Qemu {
    pub(crate) script: Arc<Mutex<Script>>,
    pub(crate) path: PathBuf,
    gone: watch::Sender<bool>,
}

impl Qemu {
    /// Listens at `path`. Must be called inside a runtime.
    pub(crate) fn start(path: PathBuf) -> Self {
        let script = Arc::new(Mutex::new(Script {
            commands: Vec::new(),
            status: "none".to_owned(),
            error: None,
            run_state: "running".to_owned(),
            refuse_migrate: None,
            pauses: false,
            cancel_gives: "cancelled".to_owned(),
            uri: String::new(),
        }));
        let (gone, leaving) = watch::channel(false);
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(serve(listener, script.clone(), leaving));
        Self { script, path, gone }
    }

    pub(crate) fn set(&self, status: &str, run_state: &str) {
        let mut script = self.script.lock();
        status.clone_into(&mut script.status);
        run_state.clone_into(&mut script.run_state);
    }

    pub(crate) fn asked(&self, command: &str) -> bool {
        self.script.lock().commands.iter().any(|asked| asked == command)
    }

    /// Closes the monitor and every connection, as a QEMU that exits.
    pub(crate) fn vanish(&self) {
        self.gone.send_replace(true);
        let _ = std::fs::remove_file(Path::new(&self.path));
    }
}

async fn serve(listener: UnixListener, script: Arc<Mutex<Script>>, mut leaving: watch::Receiver<bool>) {
    loop {
        let left = leaving.clone();
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.unwrap();
                tokio::spawn(monitor(stream, script.clone(), left));
            }
            _ = leaving.wait_for(|gone| *gone) => return,
        }
    }
}

async fn monitor(stream: UnixStream, script: Arc<Mutex<Script>>, mut leaving: watch::Receiver<bool>) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let greeting = json!({ "QMP": { "version": { "qemu": { "major": 10 } }, "capabilities": [] } });
    write.write_all(format!("{greeting}\r\n").as_bytes()).await.unwrap();
    let mut negotiated = false;
    loop {
        let line = tokio::select! {
            line = lines.next_line() => line,
            _ = leaving.wait_for(|gone| *gone) => return,
        };
        let Ok(Some(line)) = line else { return };
        let request: Value = serde_json::from_str(&line).unwrap();
        let command = request["execute"].as_str().unwrap().to_owned();
        if !negotiated && command != "qmp_capabilities" {
            panic!("{command} before the negotiation");
        }
        negotiated = true;
        let (answer, event) = answer(&mut script.lock(), &command, &request["arguments"]);
        let mut text = String::new();
        // The event comes before the answer, cut so that the reader must put lines together.
        if let Some(event) = event {
            text = format!("{event}\r\n");
        }
        let (key, value) = match answer {
            Ok(value) => ("return", value),
            Err(text) => ("error", json!({ "class": "GenericError", "desc": text })),
        };
        let mut object = json!({ "id": request["id"] });
        object[key] = value;
        text += &format!("{object}\r\n");
        let (head, tail) = text.split_at(text.len() / 2);
        for piece in [head, tail] {
            if write.write_all(piece.as_bytes()).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

fn answer(script: &mut Script, command: &str, arguments: &Value) -> (Result<Value, String>, Option<Value>) {
    let event =
        |status: &str| Some(json!({ "event": "MIGRATION", "data": { "status": status }, "timestamp": {} }));
    if !command.starts_with("query-") {
        script.commands.push(command.to_owned());
    }
    match command {
        "qmp_capabilities" => (Ok(json!({})), None),
        "migrate-set-capabilities" => {
            for one in arguments["capabilities"].as_array().unwrap() {
                if one["capability"] == "pause-before-switchover" {
                    script.pauses = one["state"].as_bool().unwrap();
                }
            }
            (Ok(json!({})), None)
        }
        "query-migrate-capabilities" => {
            let one = |name: &str, state: bool| json!({ "capability": name, "state": state });
            (Ok(json!([one("events", true), one("pause-before-switchover", script.pauses)])), None)
        }
        "migrate-continue" if script.status == "pre-switchover" && arguments["state"] == "pre-switchover" => {
            "device".clone_into(&mut script.status);
            (Ok(json!({})), event("device"))
        }
        "migrate-continue" => (Err("Migration not in expected state".to_owned()), None),
        "migrate" => match script.refuse_migrate.clone() {
            Some(text) => (Err(text), None),
            None => {
                arguments["uri"].as_str().unwrap().clone_into(&mut script.uri);
                "active".clone_into(&mut script.status);
                (Ok(json!({})), event("setup"))
            }
        },
        "migrate_cancel" => {
            script.status = script.cancel_gives.clone();
            (Ok(json!({})), event("cancelling"))
        }
        "query-status" => (Ok(json!({ "status": script.run_state, "running": true })), None),
        "query-migrate" => {
            let mut status = json!({ "status": script.status, "ram": { "remaining": 7, "transferred": 9 } });
            if let Some(error) = &script.error {
                status["error-desc"] = json!(error);
            }
            if script.status == "completed" {
                status["downtime"] = json!(11);
                status["total-time"] = json!(3000);
            }
            (Ok(if script.status == "none" { json!({}) } else { status }), None)
        }
        other => (Err(format!("The command {other} has not been found")), None),
    }
}
