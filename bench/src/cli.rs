// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line.

use crate::load::Access;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Load generator for vhost-user-blk back-ends, without a VM
#[derive(Debug, Parser)]
#[command(name = "blkferry-bench", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Drive a back-end and say how fast it is
    Iops(Box<Iops>),
}

/// What to do with the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rw {
    Read,
    Write,
    /// Both, sequentially
    #[value(name = "rw", alias = "readwrite")]
    Both,
    Randread,
    Randwrite,
    Randrw,
}

/// How a thread waits for completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Sleep until the back-end calls, as a guest does
    Event,
    /// Look at the ring all the time
    Poll,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Iops {
    /// The back-end's socket
    #[arg(long, value_name = "PATH")]
    pub(crate) socket_path: PathBuf,
    #[arg(long, value_enum, default_value_t = Rw::Randread)]
    pub(crate) rw: Rw,
    /// Bytes of a request
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = size)]
    pub(crate) bs: u64,
    /// Requests in flight, of each queue
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) iodepth: u16,
    /// Queues; each has a thread
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: u16,
    /// Seconds that are measured
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
    pub(crate) runtime: f64,
    /// Seconds of load before that
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5, value_parser = seconds)]
    pub(crate) ramp: f64,
    /// End after N data requests and flushes of all queues together, at the latest after the runtime; the figures are of
    /// the time that they took
    #[arg(long, value_name = "N", conflicts_with = "ramp", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) requests: Option<u64>,
    /// One JSON object on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// Stamp what is written; compare what is read, and at the end everything that was written
    #[arg(long)]
    pub(crate) verify: bool,
    /// Run this shell command after the load and before everything is read again
    #[arg(long, value_name = "COMMAND", requires = "verify")]
    pub(crate) before_verify: Option<String>,
    /// Percent of reads in a mixed load
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) rwmixread: u8,
    /// Percent of the other requests that discard instead of writing
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) discard_pct: u8,
    /// A flush after every N writes of a queue
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) flush_every: u32,
    /// One more flush when all requests of the load have come back; its time is reported on its own
    #[arg(long)]
    pub(crate) final_flush: bool,
    /// Use only the blocks at multiples of this, counted from the beginning of the range
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) stride: Option<u64>,
    /// Zipf-distributed offsets instead of uniform ones
    #[arg(long, value_name = "THETA")]
    pub(crate) zipf: Option<f64>,
    /// Where the range that is used begins
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size)]
    pub(crate) offset: u64,
    /// How long the range is; the rest of the disk if not given
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) size: Option<u64>,
    #[arg(long, value_enum, default_value_t = Mode::Event)]
    pub(crate) mode: Mode,
    /// Open loop: so many requests a second of all queues together, whether or not earlier ones have come back;
    /// latency counts from the intended start
    #[arg(long, value_name = "IOPS", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// Entries of a ring; as many as are needed and at least 128 if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=1024))]
    pub(crate) queue_size: Option<u16>,
    /// Descriptors that the data of a request is split over
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=254))]
    pub(crate) segments: u16,
    /// The back-end's process, for its CPU time; whoever listens at the socket if not given
    #[arg(long, value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// Guest memory of 2 MiB pages
    #[arg(long)]
    pub(crate) hugepages: bool,
    /// Do not use VIRTIO_F_EVENT_IDX
    #[arg(long)]
    pub(crate) no_event_idx: bool,
    /// Do not use indirect descriptors
    #[arg(long)]
    pub(crate) no_indirect: bool,
    /// Pin the threads of the queues to these processors, in turn
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) cpu: Vec<usize>,
    /// Seed of offsets and directions
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Write the latencies there, as an HDR histogram log
    #[arg(long, value_name = "FILE")]
    pub(crate) histogram: Option<PathBuf>,
    /// Wait so long for a back-end that is only just starting
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
    pub(crate) connect_timeout: f64,
    /// Copied into the result
    #[arg(long, value_name = "TEXT")]
    pub(crate) label: Option<String>,
}

impl Iops {
    pub(crate) fn access(&self) -> Access {
        match (self.rw, self.zipf) {
            (Rw::Read | Rw::Write | Rw::Both, _) => Access::Sequential,
            (_, Some(theta)) => Access::Zipf(theta),
            (_, None) => Access::Uniform,
        }
    }

    /// Percent of reads.
    pub(crate) fn reads(&self) -> u8 {
        match self.rw {
            Rw::Read | Rw::Randread => 100,
            Rw::Write | Rw::Randwrite => 0,
            Rw::Both | Rw::Randrw => self.rwmixread,
        }
    }
}

/// Bytes, with a suffix in powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        other => return Err(format!("unknown suffix {other}")),
    };
    let number: u64 = digits.parse().map_err(|_| "not a number".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".to_owned())
}

fn positive(text: &str, least: f64, most: f64) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (least..=most).contains(&number) { Ok(number) } else { Err(format!("must be from {least} to {most}")) }
}

fn seconds(text: &str) -> Result<f64, String> {
    positive(text, 0.0, 1e7)
}

fn rate(text: &str) -> Result<f64, String> {
    positive(text, 0.001, 1e9)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn iops(line: &str) -> Result<Iops, clap::Error> {
        let words =
            ["blkferry-bench", "iops", "--socket-path", "/s"].into_iter().chain(line.split_whitespace());
        let Command::Iops(iops) = Cli::try_parse_from(words)?.command;
        Ok(*iops)
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(size("4k"), Ok(4096));
        assert_eq!(size("16T"), Ok(16 << 40));
        assert_eq!(size("3MiB"), Ok(3 << 20));
        for bad in ["", "k", "1x", "-1", "99999999999T", "1.5k"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn directions_and_patterns() {
        let of = |line| {
            let iops = iops(line).unwrap();
            (iops.access(), iops.reads())
        };
        assert_eq!(of(""), (Access::Uniform, 100));
        assert_eq!(of("--rw write"), (Access::Sequential, 0));
        assert_eq!(of("--rw readwrite"), (Access::Sequential, 50));
        assert_eq!(of("--rw randrw --rwmixread 70 --zipf 1.2"), (Access::Zipf(1.2), 70));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for line in [
            "--iodepth 0",
            "--rwmixread 101",
            "--runtime -1",
            "--rate 0",
            "--rw both",
            "--before-verify true",
            "--bs 4z",
        ] {
            assert!(iops(line).is_err(), "{line}");
        }
    }
}
