// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line of `blkferry`.

use crate::control::follow::{Hypervisor, Plan};
use crate::control::size;
use crate::node::status::{MigrationRequest, StartMode, StrategyName};
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Look after the disk of a running blkferryd: its state, and its migration to another host.
#[derive(Debug, Parser)]
#[command(name = "blkferry", version)]
pub struct Args {
    /// The daemon's --api-socket
    #[arg(long, value_name = "PATH", global = true)]
    api_socket: Option<PathBuf>,
    /// Write JSON, one object a line
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show the volume and its migration
    Status,
    /// Move the disk to another daemon, and the VM with it if --qmp is given
    Migrate(Migrate),
    /// Cancel the migration, while the disk is still here
    Cancel,
    /// Make the disk larger while the guest runs
    Resize {
        /// The new size in bytes, or with K, M, G, T, P; a multiple of 512
        #[arg(value_name = "SIZE", value_parser = size::parse)]
        size: u64,
    },
    /// Show every change until the daemon stops
    Watch,
    /// Print the metrics
    Metrics,
}

/// The flags of `migrate`.
#[derive(Debug, clap::Args)]
pub struct Migrate {
    /// The destination daemon's --listen
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// How the disk moves
    #[arg(long, value_enum, default_value_t = StrategyArg::Hybrid)]
    strategy: StrategyArg,
    /// Push a chunk only while it was written fewer times than this [default: 3]
    #[arg(long, value_name = "N")]
    threshold: Option<u32>,
    /// Data streams, 1 to 16 [default: 2]
    #[arg(long, value_name = "N")]
    connections: Option<u8>,
    /// Most bytes a second for this migration (100M); 0 is no cap [default: the daemon's]
    #[arg(long, value_name = "RATE", value_parser = size::parse)]
    bandwidth: Option<u64>,
    /// QEMU's monitor socket at the source: migrate the VM as well
    #[arg(long, value_name = "PATH", requires = "vm_uri")]
    qmp: Option<PathBuf>,
    /// Where QEMU sends the VM, as its migrate command takes it (tcp:HOST:PORT)
    #[arg(long, value_name = "URI", requires = "qmp")]
    vm_uri: Option<String>,
    /// When pushing begins
    #[arg(long, value_enum, default_value_t = StartArg::Now)]
    start: StartArg,
    /// Return as soon as the migration is armed
    #[arg(long, conflicts_with = "qmp")]
    pub no_wait: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StrategyArg {
    Hybrid,
    Precopy,
    Postcopy,
    Mirror,
    Shared,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StartArg {
    Now,
    WithHypervisor,
}

impl Migrate {
    /// What the flags ask for.
    #[must_use]
    pub fn plan(self) -> Plan {
        let request = MigrationRequest {
            destination_url: self.to,
            strategy: match self.strategy {
                StrategyArg::Hybrid => StrategyName::Hybrid,
                StrategyArg::Precopy => StrategyName::Precopy,
                StrategyArg::Postcopy => StrategyName::Postcopy,
                StrategyArg::Mirror => StrategyName::Mirror,
                StrategyArg::Shared => StrategyName::Shared,
            },
            threshold: self.threshold,
            connections: self.connections,
            bandwidth: self.bandwidth,
            start: match self.start {
                StartArg::Now => StartMode::Now,
                StartArg::WithHypervisor => StartMode::WithHypervisor,
            },
        };
        let hypervisor = self.qmp.zip(self.vm_uri).map(|(qmp, uri)| Hypervisor { qmp, uri });
        Plan { request, hypervisor }
    }
}

impl Args {
    /// The daemon's socket; [`parse`] has made sure that there is one.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.api_socket.clone().unwrap_or_default()
    }
}

/// Reads this process's command line.
///
/// # Errors
/// The exit status, after help, version or a complaint was printed: 0 or 2.
pub fn parse() -> Result<Args, ExitCode> {
    parse_from(std::env::args_os()).map_err(|error| {
        // Nothing can be done about a closed terminal.
        let _ = error.print();
        ExitCode::from(if error.use_stderr() { 2 } else { 0 })
    })
}

/// Reads a command line; the first word is the program's name.
///
/// # Errors
/// What clap says of it; also for help and version.
pub fn parse_from(words: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Args, clap::Error> {
    let args = Args::try_parse_from(words)?;
    // A global argument cannot be required by clap.
    if args.api_socket.is_none() {
        let kind = clap::error::ErrorKind::MissingRequiredArgument;
        return Err(
            Args::command().error(kind, "--api-socket PATH is missing: the socket of the daemon to ask")
        );
    }
    Ok(args)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use clap::error::ErrorKind;

    fn parse(line: &str) -> Result<Args, ErrorKind> {
        parse_from(std::iter::once("blkferry").chain(line.split_whitespace())).map_err(|error| error.kind())
    }

    fn plan(line: &str) -> Plan {
        match parse(line).unwrap().verb {
            Verb::Migrate(migrate) => migrate.plan(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn clap_finds_no_fault_with_the_definition() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_plain_migrate_leaves_the_choices_to_the_daemon() {
        let plan = plan("--api-socket /a migrate --to h:1");
        let expected: MigrationRequest = serde_json::from_str(r#"{"destination_url":"h:1"}"#).unwrap();
        assert_eq!(plan.request, expected);
        assert!(plan.hypervisor.is_none());
    }

    #[test]
    fn every_flag_of_migrate_arrives() {
        let plan = plan(
            "migrate --api-socket /a --to tcp:h:1 --strategy precopy --threshold 9 --connections 4 \
             --bandwidth 100M --qmp /q --vm-uri tcp:h:2 --start with-hypervisor --json",
        );
        let expected = MigrationRequest {
            destination_url: "tcp:h:1".to_owned(),
            strategy: StrategyName::Precopy,
            threshold: Some(9),
            connections: Some(4),
            bandwidth: Some(100 << 20),
            start: StartMode::WithHypervisor,
        };
        assert_eq!(plan.request, expected);
        let hypervisor = plan.hypervisor.unwrap();
        assert_eq!((hypervisor.qmp, hypervisor.uri.as_str()), ("/q".into(), "tcp:h:2"));
    }

    #[test]
    fn flags_that_make_no_sense_together_are_refused() {
        for (line, kind) in [
            ("status", ErrorKind::MissingRequiredArgument),
            ("--api-socket /a", ErrorKind::MissingSubcommand),
            ("--api-socket /a migrate", ErrorKind::MissingRequiredArgument),
            ("--api-socket /a migrate --to h:1 --qmp /q", ErrorKind::MissingRequiredArgument),
            ("--api-socket /a migrate --to h:1 --vm-uri u", ErrorKind::MissingRequiredArgument),
            ("--api-socket /a migrate --to h:1 --qmp /q --vm-uri u --no-wait", ErrorKind::ArgumentConflict),
            ("--api-socket /a migrate --to h:1 --strategy magic", ErrorKind::InvalidValue),
            ("--api-socket /a migrate --to h:1 --bandwidth fast", ErrorKind::ValueValidation),
            ("--api-socket /a image info", ErrorKind::InvalidSubcommand),
        ] {
            assert_eq!(parse(line).unwrap_err(), kind, "{line}");
        }
    }
}
