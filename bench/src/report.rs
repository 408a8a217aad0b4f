// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The result, for people and for programs.

use crate::cli::{Iops, Mode};
use crate::front_end::Disk;
use crate::ring::Shape;
use crate::stats::{Stats, Tally};
use anyhow::{Context, Result};
use clap::ValueEnum;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2Serializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use serde::Serialize;
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Duration;

/// What a run gave.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) stats: Stats,
    /// Length of the measured window.
    pub(crate) seconds: f64,
    /// Processor time of the back-end in it.
    pub(crate) backend: Option<Duration>,
    pub(crate) pid: Option<u32>,
    /// Nanoseconds of the flush after the load.
    pub(crate) final_flush: Option<u64>,
}

/// Latencies in microseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Latency {
    mean: f64,
    p50: f64,
    p99: f64,
    p999: f64,
    min: f64,
    p90: f64,
    p9999: f64,
    max: f64,
}

/// One kind of request.
#[derive(Debug, Serialize)]
pub(crate) struct Direction {
    iops: f64,
    bw_bytes: f64,
    lat_us: Latency,
}

/// The object of a line.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    iops: f64,
    bw_bytes: f64,
    lat_us: Latency,
    errors: u64,
    wrong: u64,
    verified: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    read: Option<Direction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    write: Option<Direction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    flush: Option<Direction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    discard: Option<Direction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    final_flush_us: Option<f64>,
    requests: u64,
    runtime_s: f64,
    pid: Option<u32>,
    cpu_us_per_io: Option<f64>,
    cpu_pct: Option<f64>,
    generator_cpu_us_per_io: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    rw: String,
    bs: u64,
    iodepth: u16,
    queues: u16,
    queue_size: u16,
    segments: u16,
    mode: &'static str,
    rate: Option<f64>,
    zipf: Option<f64>,
    event_idx: bool,
    indirect: bool,
    hugepages: bool,
    seed: u64,
    disk_bytes: u64,
    #[serde(skip)]
    failed: bool,
}

impl Latency {
    fn new(histogram: &Histogram<u64>) -> Self {
        #[allow(clippy::cast_precision_loss)]
        let at = |quantile: f64| round(histogram.value_at_quantile(quantile) as f64 / 1000.0);
        Self {
            mean: round(histogram.mean() / 1000.0),
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            min: us_of(histogram.min()),
            p90: at(0.9),
            p9999: at(0.9999),
            max: us_of(histogram.max()),
        }
    }
}

#[allow(clippy::cast_precision_loss)]
fn us_of(nanos: u64) -> f64 {
    round(nanos as f64 / 1000.0)
}

/// To three digits behind the point: more would be noise.
fn round(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

#[allow(clippy::cast_precision_loss)]
fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { (count as f64 / seconds).round() } else { 0.0 }
}

#[allow(clippy::cast_precision_loss)]
fn us_per(time: Duration, count: u64) -> f64 {
    if count > 0 { round(time.as_secs_f64() * 1e6 / count as f64) } else { 0.0 }
}

impl Direction {
    fn new(tally: &Tally, seconds: f64) -> Option<Self> {
        (tally.count > 0).then(|| Self {
            iops: per_second(tally.count, seconds),
            bw_bytes: per_second(tally.bytes, seconds),
            lat_us: Latency::new(&tally.latency),
        })
    }
}

impl Report {
    pub(crate) fn new(args: &Iops, disk: &Disk, shape: &Shape, outcome: Outcome) -> Result<Self> {
        let Outcome { stats, seconds, backend, pid, final_flush } = outcome;
        let data = stats.data()?;
        if let Some(path) = &args.histogram {
            write_log(path, &stats, seconds).with_context(|| format!("writing {}", path.display()))?;
        }
        let requests = data.count + stats.flush.count;
        Ok(Self {
            iops: per_second(data.count, seconds),
            bw_bytes: per_second(data.bytes, seconds),
            lat_us: Latency::new(&data.latency),
            errors: stats.errors + stats.wrong,
            wrong: stats.wrong,
            verified: stats.verified,
            read: Direction::new(&stats.read, seconds),
            write: Direction::new(&stats.write, seconds),
            flush: Direction::new(&stats.flush, seconds),
            discard: Direction::new(&stats.discard, seconds),
            final_flush_us: final_flush.map(us_of),
            requests,
            runtime_s: seconds,
            pid,
            cpu_us_per_io: backend.map(|time| us_per(time, requests)),
            cpu_pct: backend
                .filter(|_| seconds > 0.0)
                .map(|time| round(100.0 * time.as_secs_f64() / seconds)),
            generator_cpu_us_per_io: us_per(stats.cpu, requests),
            label: args.label.clone(),
            rw: args.rw.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default(),
            bs: args.bs,
            iodepth: args.iodepth,
            queues: args.queues,
            queue_size: shape.size,
            segments: args.segments,
            mode: if args.mode == Mode::Poll { "poll" } else { "event" },
            rate: args.rate,
            zipf: args.zipf,
            event_idx: shape.event_idx,
            indirect: shape.indirect,
            hugepages: args.hugepages,
            seed: args.seed,
            disk_bytes: disk.size,
            failed: stats.errors + stats.wrong > 0,
        })
    }

    /// Whether a request failed or a block was wrong.
    pub(crate) fn failed(&self) -> bool {
        self.failed
    }

    /// The object of a line.
    pub(crate) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let latency = |f: &mut fmt::Formatter<'_>, name: &str, iops: f64, bw: f64, lat: &Latency| {
            writeln!(
                f,
                "{name:<8} {iops:>9.0} IOPS {:>8.1} MiB/s   us: mean {:.1} p50 {:.1} p99 {:.1} p99.9 {:.1} max {:.1}",
                bw / f64::from(1 << 20),
                lat.mean,
                lat.p50,
                lat.p99,
                lat.p999,
                lat.max
            )
        };
        latency(f, "all", self.iops, self.bw_bytes, &self.lat_us)?;
        let parts = [
            ("read", &self.read),
            ("write", &self.write),
            ("discard", &self.discard),
            ("flush", &self.flush),
        ];
        for (name, part) in parts {
            if let Some(part) = part {
                latency(f, name, part.iops, part.bw_bytes, &part.lat_us)?;
            }
        }
        if let Some(us) = self.final_flush_us {
            writeln!(f, "final flush: {us:.1} us")?;
        }
        if let (Some(us), Some(percent), Some(pid)) = (self.cpu_us_per_io, self.cpu_pct, self.pid) {
            writeln!(
                f,
                "back-end (process {pid}): {us:.2} us of CPU a request, {percent:.0} % of one processor"
            )?;
        }
        writeln!(f, "generator: {:.2} us of CPU a request", self.generator_cpu_us_per_io)?;
        write!(f, "errors {}, blocks verified {}, wrong {}", self.errors, self.verified, self.wrong)
    }
}

/// The whole histograms, in the format that HdrHistogram's tools read; values are nanoseconds.
fn write_log(path: &Path, stats: &Stats, seconds: f64) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut serializer = V2Serializer::new();
    let mut writer = IntervalLogWriterBuilder::new()
        .add_comment("blkferry-bench: latencies in nanoseconds")
        .begin_log_with(&mut file, &mut serializer)?;
    let kinds = [
        ("read", &stats.read),
        ("write", &stats.write),
        ("flush", &stats.flush),
        ("discard", &stats.discard),
    ];
    for (name, tally) in kinds {
        if tally.count > 0 {
            let written = writer.write_histogram(
                &tally.latency,
                Duration::ZERO,
                Duration::from_secs_f64(seconds),
                Tag::new(name),
            );
            written.map_err(|error| anyhow::anyhow!("{error:?}"))?;
        }
    }
    file.flush()?;
    Ok(())
}
