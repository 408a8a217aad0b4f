// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! blkferry-bench: a load generator for vhost-user-blk back-ends without a VM.
//!
//! A member of its own, so that what it needs stays out of the daemon. The scripts beside it compare back-ends
//! (`bench/compare`), draw (`bench/plot`) and measure what volumes cost (`bench/scale`).

mod cli;
mod cpu;
mod front_end;
mod load;
mod memory;
mod report;
mod ring;
mod run;
mod stats;
mod verify;
mod worker;

use clap::Parser;
use std::process::ExitCode;

/// 0: done; 1: it could not be done, or requests failed, or blocks were wrong. clap answers unusable arguments with 2.
fn main() -> ExitCode {
    let cli::Command::Iops(args) = cli::Cli::parse().command;
    let result = run::iops(&args).and_then(|report| {
        println!("{}", if args.json { report.json()? } else { report.to_string() });
        Ok(report.failed())
    });
    match result {
        Ok(false) => ExitCode::SUCCESS,
        Ok(true) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("blkferry-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
