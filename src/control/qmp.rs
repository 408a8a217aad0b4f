// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! As much QMP (QEMU's docs/interop/qmp-spec.rst) as it takes to migrate a VM.
//!
//! One JSON object a line. The server greets, the client negotiates, then every command is answered by a `return` or an
//! `error` with the command's `id`; events come in between. A command must be read to its answer: a half-read one
//! would leave its answer for the next. So calls are not raced against a clock or a signal from outside; they carry
//! their own bound. The bound is long, because QEMU answers nothing while its big lock is held, as it is while a
//! vhost-user back-end holds an acknowledgement.
//!
//! QEMU tells MIGRATION events only with the capability `events`. The events shorten the reaction; what counts is
//! query-migrate, because an event can come before the connection did.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Longest line in bytes that is read.
const MAX_LINE: usize = 4 << 20;
/// How long one command may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the greeting may take: a second client of the same monitor socket waits for ever for its own.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// The capability to wait with the VM stopped.
const PAUSE: &str = "pause-before-switchover";

/// Why QEMU could not be asked.
#[derive(Debug, Error)]
pub enum QmpError {
    /// Nobody listens.
    #[error("cannot reach QEMU at {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// QEMU has closed the monitor, or it broke.
    #[error("QEMU's monitor is gone: {0}")]
    Lost(io::Error),
    /// Not QMP, or against its rules.
    #[error("QEMU's monitor makes no sense: {0}")]
    Protocol(String),
    /// No answer.
    #[error("QEMU does not answer {0} (is the monitor socket used by somebody else?)")]
    Silent(String),
    /// QEMU refused.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        description: String,
    },
}

/// State of QEMU's migration (qapi/migration.json, MigrationStatus), as far as a follower tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmMigration {
    /// There was none.
    None,
    /// Under way, whatever QEMU calls the step.
    Running,
    /// Done: the destination has the VM.
    Completed,
    /// Failed.
    Failed,
    /// Cancelled.
    Cancelled,
}

/// What query-migrate said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmStatus {
    /// The state, as it matters here.
    pub state: VmMigration,
    /// QEMU's own word.
    pub word: String,
    /// Why it failed, if QEMU says.
    pub error: Option<String>,
    /// Memory bytes that are left to move.
    pub ram_remaining: u64,
    /// Memory bytes moved.
    pub ram_transferred: u64,
    /// Milliseconds for which the guest stood still; once completed.
    pub downtime_ms: Option<u64>,
    /// Milliseconds in all.
    pub total_ms: Option<u64>,
}

impl VmStatus {
    /// Whether the VM has stopped and QEMU waits for migrate-continue.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.word == "pre-switchover"
    }
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "kebab-case", default)]
struct QueryMigrate {
    status: Option<String>,
    error_desc: Option<String>,
    ram: Option<Ram>,
    downtime: Option<u64>,
    total_time: Option<u64>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
struct Ram {
    remaining: u64,
    transferred: u64,
}

impl From<QueryMigrate> for VmStatus {
    fn from(answer: QueryMigrate) -> Self {
        let word = answer.status.unwrap_or_else(|| "none".to_owned());
        let state = match word.as_str() {
            "none" => VmMigration::None,
            "completed" => VmMigration::Completed,
            "failed" => VmMigration::Failed,
            "cancelled" => VmMigration::Cancelled,
            _ => VmMigration::Running,
        };
        let ram = answer.ram.unwrap_or_default();
        Self {
            state,
            word,
            error: answer.error_desc,
            ram_remaining: ram.remaining,
            ram_transferred: ram.transferred,
            downtime_ms: answer.downtime,
            total_ms: answer.total_time,
        }
    }
}

/// A negotiated monitor connection.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    unread: Vec<u8>,
    next_id: u64,
}

impl Qmp {
    /// Connects to a monitor socket (`-qmp unix:PATH,server=on`), negotiates, and asks for MIGRATION events.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn connect(path: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        let mut qmp = Self { stream, unread: Vec::new(), next_id: 0 };
        let greeting = timeout(GREETING_TIMEOUT, qmp.object())
            .await
            .map_err(|_| QmpError::Silent("the connection with a greeting".to_owned()))??;
        if !greeting.contains_key("QMP") {
            return Err(QmpError::Protocol("no greeting".to_owned()));
        }
        qmp.execute("qmp_capabilities", None).await?;
        let capabilities = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        qmp.execute("migrate-set-capabilities", Some(capabilities)).await?;
        Ok(qmp)
    }

    /// Starts the migration of the VM to `uri`.
    ///
    /// # Errors
    /// [`QmpError`]; [`QmpError::Refused`] if QEMU cannot even begin.
    pub async fn migrate(&mut self, uri: &str) -> Result<(), QmpError> {
        self.execute("migrate", Some(json!({ "uri": uri }))).await.map(drop)
    }

    /// Asks QEMU to give the migration up. It goes on for a moment; [`Self::query_migrate`] tells the end.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn migrate_cancel(&mut self) -> Result<(), QmpError> {
        self.execute("migrate_cancel", None).await.map(drop)
    }

    /// Whether QEMU waits for [`Self::migrate_continue`] once the VM has stopped.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn pauses_before_switchover(&mut self) -> Result<bool, QmpError> {
        let answer = self.execute("query-migrate-capabilities", None).await?;
        let all = answer
            .as_array()
            .ok_or_else(|| QmpError::Protocol("query-migrate-capabilities without a list".to_owned()))?;
        Ok(all.iter().any(|one| one["capability"] == PAUSE && one["state"] == true))
    }

    /// Sets whether QEMU waits so (capability pause-before-switchover, QEMU 2.11); not while it migrates.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn pause_before_switchover(&mut self, on: bool) -> Result<(), QmpError> {
        let capabilities = json!({ "capabilities": [{ "capability": PAUSE, "state": on }] });
        self.execute("migrate-set-capabilities", Some(capabilities)).await.map(drop)
    }

    /// Lets a QEMU that waits finish its migration.
    ///
    /// # Errors
    /// [`QmpError`]; [`QmpError::Refused`] if it does not wait.
    pub async fn migrate_continue(&mut self) -> Result<(), QmpError> {
        self.execute("migrate-continue", Some(json!({ "state": "pre-switchover" }))).await.map(drop)
    }

    /// How the migration stands.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn query_migrate(&mut self) -> Result<VmStatus, QmpError> {
        let answer = self.execute("query-migrate", None).await?;
        let answer: QueryMigrate =
            serde_json::from_value(answer).map_err(|error| QmpError::Protocol(error.to_string()))?;
        Ok(answer.into())
    }

    /// QEMU's word for the run state of the VM: `running`, `paused`, `postmigrate`, ..
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn query_status(&mut self) -> Result<String, QmpError> {
        let answer = self.execute("query-status", None).await?;
        let word = answer.get("status").and_then(Value::as_str);
        word.map(str::to_owned).ok_or_else(|| QmpError::Protocol("query-status without a status".to_owned()))
    }

    /// Waits until QEMU says that its migration changed state. Dropping the future loses nothing but events.
    ///
    /// # Errors
    /// [`QmpError::Lost`] when the monitor goes away, [`QmpError::Protocol`].
    pub async fn migration_event(&mut self) -> Result<(), QmpError> {
        loop {
            let object = self.object().await?;
            if object.get("event").and_then(Value::as_str) == Some("MIGRATION") {
                return Ok(());
            }
        }
    }

    /// Sends a command and reads to its answer.
    async fn execute(&mut self, command: &str, arguments: Option<Value>) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({ "execute": command, "id": id });
        if let (Some(arguments), Some(request)) = (arguments, request.as_object_mut()) {
            request.insert("arguments".to_owned(), arguments);
        }
        let call = async {
            let line = format!("{request}\r\n");
            self.stream.write_all(line.as_bytes()).await.map_err(QmpError::Lost)?;
            loop {
                let mut object = self.object().await?;
                if object.get("id").and_then(Value::as_u64) != Some(id) {
                    continue;
                }
                if let Some(value) = object.remove("return") {
                    return Ok(value);
                }
                let description = object
                    .get("error")
                    .and_then(|error| error.get("desc"))
                    .and_then(Value::as_str)
                    .ok_or_else(|| {
                        QmpError::Protocol(format!("{command} has neither a return nor an error"))
                    })?;
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    description: description.to_owned(),
                });
            }
        };
        timeout(ANSWER_TIMEOUT, call).await.map_err(|_| QmpError::Silent(command.to_owned()))?
    }

    /// The next line, which must be an object. Dropping the future loses nothing.
    async fn object(&mut self) -> Result<Map<String, Value>, QmpError> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.unread.iter().skip(searched).position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=searched + end).collect();
                searched = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|error| QmpError::Protocol(error.to_string()));
            }
            searched = self.unread.len();
            if searched > MAX_LINE {
                return Err(QmpError::Protocol("a line is too long".to_owned()));
            }
            if self.stream.read_buf(&mut self.unread).await.map_err(QmpError::Lost)? == 0 {
                return Err(QmpError::Lost(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}
