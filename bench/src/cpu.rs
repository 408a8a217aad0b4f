// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processor time of another process and of this thread, from what the scheduler accounts to the nanosecond.
//!
//! /proc/PID/task/*/schedstat leaves out threads that have ended; if one ended between two samples, the coarser
//! utime + stime of the whole process (ticks of 10 ms) are taken instead.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// What a process has used so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Nanoseconds by thread; empty without CONFIG_SCHED_INFO.
    threads: BTreeMap<u32, u64>,
    /// Ticks of the whole process, dead threads included.
    ticks: u64,
}

impl Sample {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let stat =
            fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
        Ok(Self { threads: threads(pid).unwrap_or_default(), ticks: ticks(&stat)? })
    }

    /// Time used from `earlier` to this sample.
    pub(crate) fn since(&self, earlier: &Self) -> Duration {
        let ended = earlier.threads.keys().any(|thread| !self.threads.contains_key(thread));
        if ended || self.threads.is_empty() {
            return Duration::from_millis(10 * self.ticks.saturating_sub(earlier.ticks));
        }
        let used = |(thread, now): (&u32, &u64)| {
            now.saturating_sub(earlier.threads.get(thread).copied().unwrap_or_default())
        };
        Duration::from_nanos(self.threads.iter().map(used).sum())
    }
}

fn threads(pid: u32) -> Option<BTreeMap<u32, u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let entry = entry.ok()?;
        let thread = entry.file_name().to_str()?.parse().ok()?;
        // A thread may end while we look.
        let Ok(text) = fs::read_to_string(entry.path().join("schedstat")) else { continue };
        found.insert(thread, text.split_whitespace().next()?.parse().ok()?);
    }
    Some(found)
}

/// utime + stime: fields 14 and 15, counted after the name, which may contain anything.
fn ticks(stat: &str) -> Result<u64> {
    let Some((_, rest)) = stat.rsplit_once(')') else { bail!("/proc/PID/stat is not what it was") };
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || -> Result<u64> { Ok(fields.next().context("/proc/PID/stat is short")?.parse()?) };
    Ok(next()? + next()?)
}

/// Processor time of the calling thread.
pub(crate) fn this_thread() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn work_is_seen() {
        let before = Sample::of(std::process::id()).unwrap();
        let start = this_thread();
        while this_thread() - start < Duration::from_millis(30) {
            std::hint::spin_loop();
        }
        let used = Sample::of(std::process::id()).unwrap().since(&before);
        assert!(used >= Duration::from_millis(20), "{used:?}");
    }

    #[test]
    fn a_thread_that_ended_is_not_forgotten() {
        let before = Sample { threads: BTreeMap::from([(1, 500), (2, 900)]), ticks: 10 };
        let after = Sample { threads: BTreeMap::from([(1, 700)]), ticks: 13 };
        assert_eq!(after.since(&before), Duration::from_millis(30));
        let both = Sample { threads: BTreeMap::from([(1, 700), (2, 950), (3, 1000)]), ticks: 13 };
        assert_eq!(both.since(&before), Duration::from_nanos(1250));
    }

    #[test]
    fn names_with_brackets_and_blanks_do_not_confuse() {
        let stat = "7 (a) b (c) S 1 1 1 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 1 0 5 6";
        assert_eq!(ticks(stat).unwrap(), 200);
        assert!(ticks("7 nothing").is_err());
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(Sample::of(u32::MAX).is_err());
    }
}
