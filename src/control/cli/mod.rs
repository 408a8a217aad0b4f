// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `blkferry` does with its command line.
//!
//! Standard output carries the answer and nothing else: with `--json` only JSON, one object a line. Progress and notes go
//! to standard error. Exit status: 0 done, 1 refused or failed, 2 unusable arguments, 130 left on the second Ctrl-C.

pub mod args;
pub mod progress;
pub mod recover;
pub mod render;
mod several;
pub mod summary;
pub mod total;

use crate::control::client::{Change, Client, ClientError};
use crate::control::follow::{self, DiskPlan, FollowError};
use crate::node::recover::RecoverError;
use crate::node::status::{MigrationStatus, Snapshot};
use args::{Args, Migrate, Verb};
use progress::Progress;
use serde::Serialize;
use serde_json::json;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use summary::{SetSummary, Summary};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Exit status after the second Ctrl-C, as a shell shows SIGINT.
const INTERRUPTED: i32 = 130;

/// Why the client did not do what it was asked.
#[derive(Debug, Error)]
pub enum CliError {
    /// The daemon could not be asked, or refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A migration was not armed.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// A state directory was not explained, or not forced.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// The answer cannot be written.
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
    /// An answer cannot be put in words.
    #[error("cannot put the answer in words: {0}")]
    Json(#[from] serde_json::Error),
}

impl CliError {
    fn code(&self) -> &str {
        match self {
            Self::Client(error) => error.code(),
            Self::Follow(error) => error.code(),
            Self::Recover(error) => error.code(),
            Self::Output(_) | Self::Json(_) => "output",
        }
    }
}

/// Does what was asked and tells how it went.
pub async fn run(args: Args) -> ExitCode {
    let json = args.json;
    let done = match args.verb {
        Verb::Migrate(migrate) if migrate.no_wait => arm(*migrate, json).await,
        Verb::Migrate(migrate) => move_disks(*migrate, json).await,
        Verb::Recover(recover) => recover::run(&recover, json),
        verb => ask(args.sockets, verb, json).await,
    };
    match done {
        Ok(code) => code,
        // Whoever read our output has read enough.
        Err(CliError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            if json {
                // If even this cannot be written, the exit status still tells.
                let _ = print_json(&json!({ "code": error.code(), "message": error.to_string() }));
            }
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Asks the daemon, or each of several.
async fn ask(sockets: Vec<PathBuf>, verb: Verb, json: bool) -> Result<ExitCode, CliError> {
    let clients: Vec<Client> = sockets.into_iter().map(Client::new).collect();
    match (verb, clients.as_slice()) {
        (Verb::Status, [client]) => status(client, json).await,
        (Verb::Status, clients) => several::status(clients, json).await,
        (Verb::Cancel, [client]) => cancel(client, json).await,
        (Verb::Cancel, clients) => several::cancel(clients, json).await,
        (Verb::Resize(size), [client, ..]) => resize(client, size, json).await,
        (Verb::Watch, [client, ..]) => watch(client, json).await,
        (Verb::Metrics, [client, ..]) => metrics(client, json).await,
        // `args` lets none of these through.
        (Verb::Resize(_) | Verb::Watch | Verb::Metrics | Verb::Migrate(_) | Verb::Recover(_), _) => {
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Writes a text and a line's end. Not `println!`: that panics when the reader has left.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", text.trim_end())?;
    Ok(out.flush()?)
}

fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    print(&serde_json::to_string(value)?)
}

async fn status(client: &Client, json: bool) -> Result<ExitCode, CliError> {
    let snapshot = Snapshot { volume: client.volume().await?, migration: client.migration().await? };
    if json {
        print_json(&snapshot)?;
    } else {
        print(&render::snapshot(&snapshot))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn arm(migrate: Migrate, json: bool) -> Result<ExitCode, CliError> {
    let plan = migrate.plan();
    let sockets: Vec<PathBuf> = plan.disks.iter().map(|disk| disk.client.path().to_owned()).collect();
    let armed = follow::arm(plan.disks).await?;
    if let [status] = armed.as_slice() {
        tell_migration(status, json)?;
    } else {
        for (socket, status) in sockets.iter().zip(&armed) {
            several::tell_migration(socket, status, json)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn tell_migration(status: &MigrationStatus, json: bool) -> Result<(), CliError> {
    if json { print_json(status) } else { print(&render::migration(status)) }
}

async fn cancel(client: &Client, json: bool) -> Result<ExitCode, CliError> {
    tell_migration(&client.cancel().await?, json)?;
    Ok(ExitCode::SUCCESS)
}

async fn resize(client: &Client, size: u64, json: bool) -> Result<ExitCode, CliError> {
    let volume = client.resize(size).await?;
    if json {
        print_json(&volume)?;
    } else {
        print(&format!("the volume has {} bytes", volume.size))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn move_disks(migrate: Migrate, json: bool) -> Result<ExitCode, CliError> {
    let plan = migrate.plan();
    let several = plan.disks.len() > 1;
    let name = |disk: &DiskPlan| disk.client.path().display().to_string();
    let mut progress = Progress::new(plan.disks.iter().filter(|_| several).map(name).collect());
    let outcome = follow::run(plan, &mut progress, interrupts()?).await;
    progress.finish();
    let outcome = outcome?;
    match (several, json) {
        (false, true) => print_json(&Summary::new(&outcome))?,
        (false, false) => print(&render::summary(&Summary::new(&outcome)))?,
        (true, true) => print_json(&SetSummary::new(&outcome))?,
        (true, false) => print(&render::set_summary(&SetSummary::new(&outcome)))?,
    }
    match &outcome.failure {
        None => Ok(ExitCode::SUCCESS),
        Some(why) => {
            writeln!(io::stderr(), "error: {why}")?;
            Ok(ExitCode::FAILURE)
        }
    }
}

/// The operator's Ctrl-Cs: the first is told, the second ends the program wherever it stands.
fn interrupts() -> Result<mpsc::UnboundedReceiver<()>, CliError> {
    let mut signals = signal(SignalKind::interrupt())?;
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        signals.recv().await;
        // Nobody listens any more: then the program is about to end.
        let _ = sender.send(());
        signals.recv().await;
        std::process::exit(INTERRUPTED);
    });
    Ok(receiver)
}

async fn watch(client: &Client, json: bool) -> Result<ExitCode, CliError> {
    let mut events = client.events().await?;
    while let Some(change) = events.next().await? {
        match (change, json) {
            (Change::Volume(volume), true) => print_json(&json!({ "event": "volume", "data": volume }))?,
            (Change::Migration(migration), true) => {
                print_json(&json!({ "event": "migration", "data": migration }))?;
            }
            (Change::Volume(volume), false) => print(&render::volume_line(&volume))?,
            (Change::Migration(migration), false) => print(&render::migration_line(&migration))?,
        }
    }
    writeln!(io::stderr(), "the daemon has ended the stream")?;
    Ok(ExitCode::SUCCESS)
}

async fn metrics(client: &Client, json: bool) -> Result<ExitCode, CliError> {
    let text = client.metrics().await?;
    if json {
        for sample in render::samples(&text) {
            print_json(&sample)?;
        }
    } else {
        print(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}
