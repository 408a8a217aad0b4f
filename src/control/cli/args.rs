// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line of `blkferry`.
//!
//! Several disks of one VM are several daemons. `status` and `cancel` take `--api-socket` repeatedly; `migrate` takes
//! `--disk API_SOCKET=HOST:PORT` repeatedly instead of `--api-socket` with `--to`. Rejected: pairing the first
//! `--api-socket` with the first `--to`, and so on. The one stands before the verb in most scripts and the other after it,
//! so a line with one too few or in another order would still parse, and would send a disk to a daemon of another one.

use crate::control::client::Client;
use crate::control::follow::{DiskPlan, Hypervisor, Plan};
use crate::control::size;
use crate::core::takeover::LostChunks;
use crate::node::status::{MigrationRequest, StartMode, StrategyName};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// What was asked, checked.
#[derive(Debug)]
pub struct Args {
    /// The daemons to ask: one, or several for the verbs that take several. The disks of `migrate` are not among them.
    pub sockets: Vec<PathBuf>,
    /// Write JSON, one object a line.
    pub json: bool,
    /// What to do.
    pub verb: Verb,
}

/// Look after the disks of running blkferryds: their state, and their migration to another host.
#[derive(Debug, Parser)]
#[command(name = "blkferry", version)]
struct Line {
    #[command(flatten)]
    sockets: Sockets,
    /// Write JSON, one object a line
    #[arg(long, global = true)]
    json: bool,
    /// What to do
    #[command(subcommand)]
    words: Words,
}

/// Before or after the verb, and both count. A global argument of clap would forget those before it.
#[derive(Debug, Default, clap::Args)]
struct Sockets {
    /// The daemon's --api-socket; status and cancel take several
    #[arg(long, value_name = "PATH")]
    api_socket: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Words {
    /// Show the volume and its migration
    Status(Sockets),
    /// Move the disk to another daemon, and the VM with it if --qmp is given
    Migrate(Box<Migrate>),
    /// Cancel the migration, while the disk is still here
    Cancel(Sockets),
    /// Make the disk larger while the guest runs
    Resize {
        #[command(flatten)]
        sockets: Sockets,
        /// The new size in bytes, or with K, M, G, T, P; a multiple of 512
        #[arg(value_name = "SIZE", value_parser = size::parse)]
        size: u64,
    },
    /// Show every change until the daemon stops
    Watch(Sockets),
    /// Print the metrics
    Metrics(Sockets),
    /// Explain a state directory without its daemon, and take the disk by force when the other side is lost for good
    Recover(Recover),
}

/// What to do.
#[derive(Debug)]
pub enum Verb {
    /// Show the volume and its migration.
    Status,
    /// Move disks, and their VM if there is a monitor.
    Migrate(Box<Migrate>),
    /// Cancel the migration.
    Cancel,
    /// Make the disk larger: the new size in bytes.
    Resize(u64),
    /// Show every change.
    Watch,
    /// Print the metrics.
    Metrics,
    /// Explain a state directory, and take the disk by force.
    Recover(Recover),
}

/// The flags of `recover`.
#[derive(Debug, clap::Args)]
pub struct Recover {
    /// The daemon's --state-dir; no daemon may run on it
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Where the base image is, if not where it was
    #[arg(long, value_name = "URL")]
    pub base: Option<String>,
    /// Make this side the owner of the disk although its record does not say so; only tells what that loses, without
    /// --accept-loss
    #[arg(long, value_enum, value_name = "WHAT")]
    pub force: Option<Force>,
    /// Accept that what was told is lost
    #[arg(long, requires = "force")]
    pub accept_loss: bool,
    /// What becomes of chunks that only the lost side had: I/O errors until the guest writes them, zeros, or the base
    /// image's content
    #[arg(long, value_enum, default_value_t = Lost::Error)]
    pub lost_chunks: Lost,
}

/// What may be forced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Force {
    /// This side owns the disk and serves it
    Serve,
}

/// What becomes of lost chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Lost {
    /// I/O errors
    Error,
    /// Zeros
    Zero,
    /// The base image's content
    Base,
}

impl From<Lost> for LostChunks {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Error => Self::Error,
            Lost::Zero => Self::Zero,
            Lost::Base => Self::Base,
        }
    }
}

/// A disk and where it goes: `API_SOCKET=HOST:PORT`. An address has no `=`, a path may have one: the last one counts.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Leg {
    socket: PathBuf,
    to: String,
}

impl Leg {
    fn parse(word: &str) -> Result<Self, String> {
        match word.rsplit_once('=') {
            Some((socket, to)) if !socket.is_empty() && !to.is_empty() => {
                Ok(Self { socket: socket.into(), to: to.to_owned() })
            }
            _ => Err("a disk is API_SOCKET=HOST:PORT".to_owned()),
        }
    }
}

/// The flags of `migrate`.
#[derive(Debug, clap::Args)]
pub struct Migrate {
    #[command(flatten)]
    sockets: Sockets,
    /// The destination daemon's --listen
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "disk")]
    to: Option<String>,
    /// Instead of --api-socket and --to, once for each disk of the VM: its daemon here and its daemon there
    #[arg(long, value_name = "API_SOCKET=HOST:PORT", conflicts_with = "to", value_parser = Leg::parse)]
    disk: Vec<Leg>,
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
            destination_url: String::new(),
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
        let disk = |leg: Leg| DiskPlan {
            client: Client::new(leg.socket),
            request: MigrationRequest { destination_url: leg.to, ..request.clone() },
        };
        let disks = self.disk.into_iter().map(disk).collect();
        let hypervisor = self.qmp.zip(self.vm_uri).map(|(qmp, uri)| Hypervisor { qmp, uri });
        Plan { disks, hypervisor }
    }

    /// Makes `--api-socket` and `--to` the disk that they are, or says what is wrong with the disks.
    fn settle(&mut self, sockets: &mut Vec<PathBuf>) -> Result<(), (ErrorKind, &'static str)> {
        if let Some(to) = self.to.take() {
            match sockets.as_slice() {
                [] => return Err((ErrorKind::MissingRequiredArgument, NO_SOCKET)),
                [socket] => self.disk.push(Leg { socket: socket.clone(), to }),
                _ => return Err((ErrorKind::ArgumentConflict, MANY_TO_MOVE)),
            }
        } else if !sockets.is_empty() {
            return Err((ErrorKind::ArgumentConflict, "--disk names the socket: --api-socket is too much"));
        }
        sockets.clear();
        let twice = |same: fn(&Leg, &Leg) -> bool| {
            (1..self.disk.len()).any(|at| self.disk[..at].iter().any(|other| same(other, &self.disk[at])))
        };
        if twice(|a, b| a.socket == b.socket || a.to == b.to) {
            return Err((
                ErrorKind::ArgumentConflict,
                "two disks have one daemon: each has its own, at both sides",
            ));
        }
        Ok(())
    }
}

const NO_SOCKET: &str = "--api-socket PATH is missing: the socket of the daemon to ask";
const MANY_TO_MOVE: &str =
    "several disks are named by --disk API_SOCKET=HOST:PORT, once for each, instead of --api-socket and --to";
const MANY: &str = "--api-socket is given more than once: only status and cancel take several daemons";

impl Line {
    fn settle(self) -> Result<Args, (ErrorKind, &'static str)> {
        let (several, after, mut verb) = match self.words {
            Words::Status(after) => (true, after, Verb::Status),
            Words::Migrate(mut migrate) => {
                (true, std::mem::take(&mut migrate.sockets), Verb::Migrate(migrate))
            }
            Words::Cancel(after) => (true, after, Verb::Cancel),
            Words::Resize { sockets, size } => (false, sockets, Verb::Resize(size)),
            Words::Watch(after) => (false, after, Verb::Watch),
            Words::Metrics(after) => (false, after, Verb::Metrics),
            // Asks no daemon.
            Words::Recover(recover) => {
                let verb = Verb::Recover(recover);
                return Ok(Args { sockets: Vec::new(), json: self.json, verb });
            }
        };
        let mut sockets = self.sockets.api_socket;
        sockets.extend(after.api_socket);
        if let Verb::Migrate(migrate) = &mut verb {
            migrate.settle(&mut sockets)?;
        } else if sockets.is_empty() {
            return Err((ErrorKind::MissingRequiredArgument, NO_SOCKET));
        } else if sockets.len() > 1 && !several {
            return Err((ErrorKind::ArgumentConflict, MANY));
        }
        Ok(Args { sockets, json: self.json, verb })
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
    let line = Line::try_parse_from(words)?;
    line.settle().map_err(|(kind, text)| Line::command().error(kind, text))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

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
        Line::command().debug_assert();
    }

    #[test]
    fn a_plain_migrate_leaves_the_choices_to_the_daemon() {
        let plan = plan("--api-socket /a migrate --to h:1");
        let expected: MigrationRequest = serde_json::from_str(r#"{"destination_url":"h:1"}"#).unwrap();
        assert_eq!(plan.disks.len(), 1);
        assert_eq!((plan.disks[0].client.path(), &plan.disks[0].request), ("/a".as_ref(), &expected));
        assert!(plan.hypervisor.is_none());
    }

    #[test]
    fn recover_needs_no_daemon_and_forces_nothing_by_itself() {
        let recover = |line: &str| match parse(line).unwrap().verb {
            Verb::Recover(recover) => recover,
            other => panic!("{other:?}"),
        };
        let plain = recover("recover --state-dir /s");
        assert_eq!((plain.force, plain.accept_loss, plain.lost_chunks), (None, false, Lost::Error));
        let all =
            recover("recover --state-dir /s --base /b --force serve --accept-loss --lost-chunks base --json");
        assert_eq!((all.force, all.accept_loss, all.lost_chunks), (Some(Force::Serve), true, Lost::Base));
        assert_eq!(LostChunks::from(all.lost_chunks), LostChunks::Base);
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
        assert_eq!(plan.disks[0].request, expected);
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
            ("recover", ErrorKind::MissingRequiredArgument),
            ("recover --state-dir /s --accept-loss", ErrorKind::MissingRequiredArgument),
            ("recover --state-dir /s --force all", ErrorKind::InvalidValue),
            ("recover --state-dir /s --lost-chunks guess", ErrorKind::InvalidValue),
            ("--api-socket /a image info", ErrorKind::InvalidSubcommand),
            ("--api-socket /a --api-socket /b migrate --to h:1", ErrorKind::ArgumentConflict),
            ("--api-socket /a migrate --to h:1 --api-socket /b", ErrorKind::ArgumentConflict),
            ("--api-socket /a migrate --disk /b=h:1", ErrorKind::ArgumentConflict),
            ("migrate --disk /b=h:1 --to h:1", ErrorKind::ArgumentConflict),
            ("migrate --disk /b=h:1 --disk /b=h:2", ErrorKind::ArgumentConflict),
            ("migrate --disk /a=h:1 --disk /b=h:1", ErrorKind::ArgumentConflict),
            ("migrate --disk /b", ErrorKind::ValueValidation),
            ("migrate --disk =h:1", ErrorKind::ValueValidation),
            ("migrate --to h:1", ErrorKind::MissingRequiredArgument),
            ("--api-socket /a watch --api-socket /b", ErrorKind::ArgumentConflict),
            ("--api-socket /a --api-socket /b resize 1M", ErrorKind::ArgumentConflict),
            ("--api-socket /a --api-socket /b metrics", ErrorKind::ArgumentConflict),
        ] {
            assert_eq!(parse(line).unwrap_err(), kind, "{line}");
        }
    }

    #[test]
    fn several_disks_are_pairs_and_share_the_other_flags() {
        let plan = plan("migrate --disk /x=y/a=h:1 --threshold 9 --disk /b=h:2 --qmp /q --vm-uri u");
        let legs: Vec<_> = plan
            .disks
            .iter()
            .map(|disk| (disk.client.path(), disk.request.destination_url.as_str(), disk.request.threshold))
            .collect();
        assert_eq!(legs, [("/x=y/a".as_ref(), "h:1", Some(9)), ("/b".as_ref(), "h:2", Some(9))]);
        assert!(plan.hypervisor.is_some());
    }

    #[test]
    fn sockets_count_wherever_they_stand() {
        for (line, sockets) in [
            ("--api-socket /a status", &["/a"][..]),
            ("status --api-socket /a", &["/a"]),
            ("--api-socket /a --api-socket /b cancel", &["/a", "/b"]),
            ("--api-socket /a cancel --api-socket /b --json", &["/a", "/b"]),
            ("migrate --disk /a=h:1", &[]),
        ] {
            let wanted: Vec<PathBuf> = sockets.iter().map(PathBuf::from).collect();
            assert_eq!(parse(line).unwrap().sockets, wanted, "{line}");
        }
    }
}
