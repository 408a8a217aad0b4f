// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line of `blkferryd`, turned into a [`Config`].
//!
//! The flags follow QEMU's conventions for vhost-user back-ends (docs/interop/vhost-user.rst, "Backend program
//! conventions"): `--socket-path` or `--fd`, `--print-capabilities`, `--blk-file`, `--read-only`. Management tools call
//! `--print-capabilities` alone, so nothing else may be demanded beside it; that is why clap does not require
//! `--state-dir` and this file does.
//!
//! A refusal is one line: clap's own come with usage and hints, which a journal or a management tool cuts anyway.

use super::size;
use crate::config::{
    CacheMode, Config, ConfigError, DEFAULT_SOURCE_GRACE, FrontendSocket, MAX_CPUS, QueueTuning,
};
use crate::core::destination::OnSourceLoss;
use crate::core::geometry::DEFAULT_CHUNK_SIZE;
use clap::builder::TypedValueParser;
use clap::{Parser, ValueEnum};
use log::LevelFilter;
use std::ffi::OsString;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

/// What QEMU's conventions call the capabilities of a block back-end.
const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// What the command line asked for.
#[derive(Debug, Clone)]
pub enum ParsedDaemon {
    /// Serve a volume.
    Run {
        /// The validated configuration.
        config: Box<Config>,
        /// How much to log.
        log_level: LevelFilter,
    },
    /// Print this line to standard output and exit with 0.
    Print(String),
    /// Print this line to standard error and exit with 2.
    Refuse(String),
}

/// Serve one virtual disk over vhost-user-blk; it can migrate to another blkferryd while the VM runs.
#[derive(Debug, Parser)]
#[command(name = "blkferryd", version)]
struct Args {
    /// Listen for the hypervisor on this UNIX socket
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,
    /// Serve the hypervisor on this inherited socket
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(RawFd).range(0..))]
    fd: Option<RawFd>,
    /// Everything that this volume needs to know after a restart lies in this directory
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Base image: a raw file's path, or a file:// URL
    #[arg(long, value_name = "URL")]
    base: Option<String>,
    /// Size of the volume (64G); with a base image it may only grow the disk
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,
    /// Adopt this raw image as the volume's content, all of it modified
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,
    /// The guest may not write
    #[arg(long)]
    read_only: bool,
    /// Serial number that the guest sees, at most 20 ASCII characters [default: blkferry]
    #[arg(long, value_name = "TEXT")]
    serial: Option<String>,
    /// Serve the API on this UNIX socket
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// Let a migration source connect here
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_listen)]
    listen: Option<SocketAddr>,
    /// Mutual TLS between peers, with the certificates of this directory (QEMU's file names)
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// Most bytes a second that go to a peer (100M); 0 is no cap [default: 0]
    #[arg(long, value_name = "BYTES_PER_S", value_parser = size::parse)]
    bandwidth: Option<u64>,
    /// What the guest gets of chunks that are still at a migration source that is away: nothing until it is back, or
    /// an I/O error after --source-grace
    #[arg(long, value_enum, default_value_t = SourceLossArg::Stall)]
    on_source_loss: SourceLossArg,
    /// With --on-source-loss error: how long requests wait for the source first [default: 30]
    #[arg(long, value_name = "SECONDS")]
    source_grace: Option<u32>,
    /// Request queues, 1 to 16 [default: 1]
    #[arg(long, value_name = "N")]
    num_queues: Option<u16>,
    /// Largest ring, a power of two from 4 to 1024 [default: 128]
    #[arg(long, value_name = "N")]
    queue_size: Option<u16>,
    /// Chunk size of a new volume, a power of two from 64K to 4M [default: 256K]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    chunk_size: Option<u64>,
    /// Use of the host's page cache: past it where the file system can (auto), always past it, or through it
    #[arg(long, value_enum, default_value_t = Cache::Auto)]
    cache: Cache,
    /// Pin all guest memory for io_uring: less CPU for each request, but no ballooning, swapping or merging
    #[arg(long)]
    register_memory: bool,
    /// Longest time that an idle queue thread spins before it sleeps, 0 to 10000 microseconds [default: 0]
    #[arg(long, value_name = "N")]
    poll_us: Option<u32>,
    /// CPUs for the queue threads, in turn (0,2-3) [default: any]
    #[arg(long, value_name = "LIST", value_parser = parse_cpus)]
    queue_cpus: Option<CpuList>,
    /// How much to log
    #[arg(long, value_name = "L", default_value = "info", value_parser = level_parser())]
    log_level: LevelFilter,
    /// Print what this program can do, as JSON, and exit
    #[arg(long)]
    print_capabilities: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Cache {
    Auto,
    Direct,
    Buffered,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SourceLossArg {
    Stall,
    Error,
}

/// CPU numbers, in the order in which queues take them.
#[derive(Debug, Clone)]
struct CpuList(Vec<u16>);

/// Numbers and ranges between commas, as `taskset` takes them.
fn parse_cpus(text: &str) -> Result<CpuList, String> {
    let number = |word: &str| word.parse::<u16>().map_err(|_| format!("{word:?} is no CPU number"));
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= MAX_CPUS {
            return Err(format!("{part:?} is no range of CPU numbers below {MAX_CPUS}"));
        }
        cpus.extend(first..=last);
    }
    Ok(CpuList(cpus))
}

fn level_parser() -> impl TypedValueParser<Value = LevelFilter> {
    clap::builder::PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
        .try_map(|word| word.parse::<LevelFilter>())
}

/// An address to listen on; a name is looked up, and its first address is taken.
fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let mut addresses = text.to_socket_addrs().map_err(|error| format!("not HOST:PORT: {error}"))?;
    addresses.next().ok_or_else(|| "the name has no address".to_owned())
}

/// Reads this process's command line.
#[must_use]
pub fn parse() -> ParsedDaemon {
    parse_from(std::env::args_os())
}

/// Reads a command line; the first word is the program's name.
#[must_use]
pub fn parse_from(words: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ParsedDaemon {
    let args = match Args::try_parse_from(words) {
        Ok(args) => args,
        Err(error) if error.use_stderr() => return ParsedDaemon::Refuse(one_line(&error)),
        Err(help) => return ParsedDaemon::Print(help.render().to_string().trim_end().to_owned()),
    };
    if args.print_capabilities {
        return ParsedDaemon::Print(CAPABILITIES.to_owned());
    }
    let log_level = args.log_level;
    match args.into_config() {
        Ok(config) => ParsedDaemon::Run { config: Box::new(config), log_level },
        Err(error) => ParsedDaemon::Refuse(format!("error: {error}")),
    }
}

/// The first paragraph of clap's complaint, in one line.
pub(super) fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let first: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    first.join(" ")
}

impl Args {
    fn into_config(self) -> Result<Config, ConfigError> {
        let socket = match (self.socket_path, self.fd) {
            (Some(path), None) => FrontendSocket::Path(path),
            (None, Some(fd)) => FrontendSocket::Fd(fd),
            _ => return Err(ConfigError::Socket),
        };
        let Some(state_dir) = self.state_dir else {
            return Err(ConfigError::Combination(
                "--state-dir is missing: give the volume's own directory".into(),
            ));
        };
        let mut config = Config::new(socket, state_dir);
        config.base = self.base;
        config.size = self.size;
        config.blk_file = self.blk_file;
        config.read_only = self.read_only;
        config.api_socket = self.api_socket;
        config.listen = self.listen;
        config.tls_dir = self.tls_dir;
        config.cache = match self.cache {
            Cache::Auto => CacheMode::Auto,
            Cache::Direct => CacheMode::Direct,
            Cache::Buffered => CacheMode::Buffered,
        };
        config.serial = self.serial.unwrap_or(config.serial);
        config.bandwidth = self.bandwidth.unwrap_or(config.bandwidth);
        config.on_source_loss = on_source_loss(self.on_source_loss, self.source_grace)?;
        config.num_queues = self.num_queues.unwrap_or(config.num_queues);
        config.queue_size = self.queue_size.unwrap_or(config.queue_size);
        config.chunk_size = chunk_size(self.chunk_size)?;
        config.queues = QueueTuning {
            register_memory: self.register_memory,
            poll_us: self.poll_us.unwrap_or_default(),
            cpus: self.queue_cpus.map(|list| list.0).unwrap_or_default(),
        };
        config.validate()?;
        Ok(config)
    }
}

fn on_source_loss(policy: SourceLossArg, grace: Option<u32>) -> Result<OnSourceLoss, ConfigError> {
    match (policy, grace) {
        (SourceLossArg::Stall, None) => Ok(OnSourceLoss::Stall),
        (SourceLossArg::Stall, Some(_)) => Err(ConfigError::Combination(
            "--source-grace means nothing without --on-source-loss error: a guest that stalls waits for ever"
                .to_owned(),
        )),
        (SourceLossArg::Error, grace) => {
            let grace = grace.map_or(DEFAULT_SOURCE_GRACE, |seconds| Duration::from_secs(seconds.into()));
            Ok(OnSourceLoss::Error { grace })
        }
    }
}

fn chunk_size(asked: Option<u64>) -> Result<u32, ConfigError> {
    let asked = asked.unwrap_or(u64::from(DEFAULT_CHUNK_SIZE));
    u32::try_from(asked).map_err(|_| ConfigError::Value {
        flag: "--chunk-size",
        value: asked.to_string(),
        rule: "a power of two from 64K to 4M".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]
    use super::*;

    fn parse(line: &str) -> ParsedDaemon {
        parse_from(std::iter::once("blkferryd").chain(line.split_whitespace()))
    }

    fn config(line: &str) -> Config {
        match parse(line) {
            ParsedDaemon::Run { config, .. } => *config,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn refusal(line: &str) -> String {
        match parse(line) {
            ParsedDaemon::Refuse(text) => {
                assert_eq!(text.lines().count(), 1, "{text}");
                text
            }
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn errors_for_a_lost_source_have_a_grace_time() {
        let policy = |more: &str| config(&format!("--fd 3 --state-dir /s {more}")).on_source_loss;
        let error = |seconds| OnSourceLoss::Error { grace: Duration::from_secs(seconds) };
        assert_eq!(policy(""), OnSourceLoss::Stall);
        assert_eq!(policy("--on-source-loss stall"), OnSourceLoss::Stall);
        assert_eq!(policy("--on-source-loss error"), error(30));
        assert_eq!(policy("--on-source-loss error --source-grace 0"), error(0));
    }

    #[test]
    fn little_is_needed_and_the_rest_has_defaults() {
        let config = config("--socket-path /run/v --state-dir /var/v");
        assert_eq!(config.socket, FrontendSocket::Path("/run/v".into()));
        let defaults = Config::new(config.socket.clone(), config.state_dir.clone());
        assert_eq!(format!("{config:?}"), format!("{defaults:?}"));
    }

    #[test]
    fn every_flag_arrives() {
        let config = config(
            "--fd 7 --state-dir /s --base file:///b --size 64G --read-only --serial disk-1 --api-socket /a \
             --listen 127.0.0.1:7000 --tls-dir /t --bandwidth 100M --num-queues 4 --queue-size 256 \
             --chunk-size 1M --cache direct --register-memory --poll-us 50 --queue-cpus 3,0-1 --log-level debug",
        );
        assert_eq!(config.socket, FrontendSocket::Fd(7));
        assert_eq!(config.base.as_deref(), Some("file:///b"));
        assert_eq!((config.size, config.bandwidth), (Some(64 << 30), 100 << 20));
        assert!(config.read_only);
        assert_eq!(config.serial, "disk-1");
        assert_eq!(config.listen, Some(SocketAddr::from(([127, 0, 0, 1], 7000))));
        assert_eq!((config.num_queues, config.queue_size, config.chunk_size), (4, 256, 1 << 20));
        assert_eq!((config.api_socket, config.tls_dir), (Some("/a".into()), Some("/t".into())));
        assert_eq!(config.cache, CacheMode::Direct);
        assert_eq!(config.queues, QueueTuning { register_memory: true, poll_us: 50, cpus: vec![3, 0, 1] });
        let ParsedDaemon::Run { log_level, .. } = parse("--fd 7 --state-dir /s --log-level trace") else {
            panic!("not accepted");
        };
        assert_eq!(log_level, LevelFilter::Trace);
    }

    #[test]
    fn capabilities_need_nothing_else() {
        let ParsedDaemon::Print(text) = parse("--print-capabilities") else { panic!("not printed") };
        assert!(
            serde_json::from_str::<serde_json::Value>(&text).is_ok_and(|v| v["type"] == "block"),
            "{text}"
        );
    }

    #[test]
    fn help_and_version_are_no_refusal() {
        for line in ["--help", "--version"] {
            assert!(matches!(parse(line), ParsedDaemon::Print(text) if text.contains("blkferryd")), "{line}");
        }
    }

    #[test]
    fn unusable_arguments_are_refused_in_one_line_that_names_them() {
        for (line, named) in [
            ("", "--socket-path"),
            ("--state-dir /s", "--fd"),
            ("--socket-path /v --fd 3 --state-dir /s", "exactly one"),
            ("--socket-path /v", "--state-dir"),
            ("--fd -1 --state-dir /s", "--fd"),
            ("--fd 3 --state-dir /s --size 1.5G", "--size"),
            ("--fd 3 --state-dir /s --size 513", "--size"),
            ("--fd 3 --state-dir /s --chunk-size 3K", "--chunk-size"),
            ("--fd 3 --state-dir /s --chunk-size 64G", "--chunk-size"),
            ("--fd 3 --state-dir /s --num-queues 17", "--num-queues"),
            ("--fd 3 --state-dir /s --queue-size 100", "--queue-size"),
            ("--fd 3 --state-dir /s --serial abcdefghijklmnopqrstu", "--serial"),
            ("--fd 3 --state-dir /s --base /b --blk-file /f", "--blk-file"),
            ("--fd 3 --state-dir /s --poll-us 10001", "--poll-us"),
            ("--fd 3 --state-dir /s --queue-cpus 3-1", "--queue-cpus"),
            ("--fd 3 --state-dir /s --queue-cpus 0,x", "--queue-cpus"),
            ("--fd 3 --state-dir /s --queue-cpus 1024", "--queue-cpus"),
            ("--fd 3 --state-dir /s --cache maybe", "--cache"),
            ("--fd 3 --state-dir /s --on-source-loss zero", "--on-source-loss"),
            ("--fd 3 --state-dir /s --source-grace 5", "--source-grace"),
            ("--fd 3 --state-dir /s --on-source-loss error --source-grace 86401", "--source-grace"),
            ("--fd 3 --state-dir /s --log-level loud", "--log-level"),
            ("--fd 3 --state-dir /s --listen 7000", "--listen"),
            ("--fd 3 --state-dir /s --frobnicate", "--frobnicate"),
            ("--fd 3 --state-dir /s surplus", "surplus"),
        ] {
            let text = refusal(line);
            assert!(text.contains(named), "{line}: {text}");
        }
    }
}
