// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! blkferry-bench: a load generator for vhost-user-blk back-ends without a VM.
//!
//! A member of its own, so that what it needs stays out of the daemon. It has no subcommand yet and says so; the
//! footprint of an idle daemon has a script beside it (`bench/footprint`).

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!(
        "blkferry-bench: no benchmark is available in this version; bench/footprint measures an idle daemon"
    );
    ExitCode::from(2)
}
