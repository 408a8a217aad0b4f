// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon: arguments, logging, the API beside the node, exit status. Everything else is the library's.

use blkferry::config::Config;
use blkferry::control::api;
use blkferry::control::daemon_args::{self, ParsedDaemon};
use blkferry::control::socket;
use blkferry::node::status::NodeHandle;
use blkferry::node::{NodeError, daemon};
use prometheus_client::registry::Registry;
use std::process::ExitCode;
use tokio::sync::oneshot;

fn main() -> ExitCode {
    match daemon_args::parse() {
        ParsedDaemon::Print(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        ParsedDaemon::Refuse(line) => {
            eprintln!("{line}");
            ExitCode::from(2)
        }
        ParsedDaemon::Run { config, log_level } => {
            env_logger::Builder::new().filter_level(log_level).format_timestamp_micros().init();
            match run(*config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("blkferryd: {error:#}");
                    ExitCode::FAILURE
                }
            }
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    let path = config.api_socket.clone();
    // Ends the API when it is dropped, after the node.
    let (stop, stopped) = oneshot::channel::<()>();
    let surface = move |handle: NodeHandle| {
        let Some(path) = path else { return Ok(()) };
        let (listener, file) = socket::bind(&path).map_err(|error| NodeError::Surface(error.to_string()))?;
        tokio::task::spawn_local(async move {
            let _file = file;
            let shutdown = async move { drop(stopped.await) };
            if let Err(error) = api::serve(listener, handle, Registry::default(), shutdown).await {
                log::error!("the API has ended: {error}");
            }
        });
        Ok(())
    };
    let result = daemon::run(config, Box::new(surface));
    drop(stop);
    Ok(result?)
}
