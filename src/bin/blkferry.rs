// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command-line client of `blkferryd`.

use blkferry::control::cli;
use std::process::ExitCode;

fn main() -> anyhow::Result<ExitCode> {
    let args = match cli::args::parse() {
        Ok(args) => args,
        Err(status) => return Ok(status),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(cli::run(args)))
}
