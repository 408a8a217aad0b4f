// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `status` and `cancel` of several daemons: the disks of one VM.
//!
//! Each answer says whose it is: with `--json` by a field `api_socket`, one object a line, else by a line before it. A
//! daemon that cannot be asked does not keep the others from being told; the exit status is 1 then.

use super::{CliError, print, print_json, render};
use crate::control::client::{Client, ClientError};
use crate::control::words::{is_handed_over, is_running};
use crate::node::status::{Denied, MigrationStatus, Snapshot};
use serde::Serialize;
use serde_json::json;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

/// An answer and whose it is.
#[derive(Serialize)]
struct Of<'a, T> {
    api_socket: &'a Path,
    #[serde(flatten)]
    answer: &'a T,
}

/// Says what a daemon answered.
fn tell<T: Serialize>(
    socket: &Path,
    answer: &T,
    text: impl FnOnce(&T) -> String,
    json: bool,
) -> Result<(), CliError> {
    if json {
        print_json(&Of { api_socket: socket, answer })
    } else {
        print(&format!("{}\n{}", socket.display(), text(answer)))
    }
}

/// Says how a migration stands.
pub(super) fn tell_migration(socket: &Path, status: &MigrationStatus, json: bool) -> Result<(), CliError> {
    tell(socket, status, render::migration, json)
}

/// Says why a daemon did not answer.
fn tell_error(socket: &Path, error: &ClientError, json: bool) -> Result<(), CliError> {
    if json {
        print_json(&json!({ "api_socket": socket, "code": error.code(), "message": error.to_string() }))?;
    }
    writeln!(io::stderr(), "error: {}: {error}", socket.display())?;
    Ok(())
}

/// Shows every volume and migration.
pub(super) async fn status(clients: &[Client], json: bool) -> Result<ExitCode, CliError> {
    let mut code = ExitCode::SUCCESS;
    for client in clients {
        match snapshot(client).await {
            Ok(answer) => tell(client.path(), &answer, render::snapshot, json)?,
            Err(error) => {
                tell_error(client.path(), &error, json)?;
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

async fn snapshot(client: &Client) -> Result<Snapshot, ClientError> {
    Ok(Snapshot { volume: client.volume().await?, migration: client.migration().await? })
}

/// Cancels every migration that is under way, or none if one of the disks cannot come back: the VM needs all of its disks
/// on one side (T20). Every daemon is asked before the first is told anything.
pub(super) async fn cancel(clients: &[Client], json: bool) -> Result<ExitCode, CliError> {
    let mut standings = Vec::new();
    for client in clients {
        match client.migration().await {
            Ok(status) => standings.push(status),
            Err(error) => {
                tell_error(client.path(), &error, json)?;
                return Err(CliError::from(refused(
                    &error,
                    format!("{} cannot be asked, so nothing was cancelled", client.path().display()),
                )));
            }
        }
    }
    let all = || clients.iter().zip(&standings);
    if let Some((client, _)) = all().find(|(_, status)| is_handed_over(status.state)) {
        let text = format!(
            "the destination owns the disk of {}, so nothing was cancelled: the others must follow it",
            client.path().display()
        );
        return Err(CliError::from(ClientError::from(Denied::new("handed-over", text))));
    }
    if !standings.iter().any(|status| is_running(status.state)) {
        return Err(CliError::from(ClientError::from(Denied::new(
            "none",
            "there is no migration to cancel",
        ))));
    }
    let mut code = ExitCode::SUCCESS;
    for (client, before) in all() {
        let answer = if is_running(before.state) { client.cancel().await } else { Ok(before.clone()) };
        match answer {
            Ok(status) => tell_migration(client.path(), &status, json)?,
            Err(error) => {
                tell_error(client.path(), &error, json)?;
                code = ExitCode::FAILURE;
                if error.code() == "handed-over" {
                    break;
                }
            }
        }
    }
    Ok(code)
}

/// A refusal of ours with the code of an error.
fn refused(error: &ClientError, text: String) -> ClientError {
    ClientError::from(Denied::new(error.code(), text))
}
