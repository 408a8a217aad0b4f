// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each fault led to, as a table and as lines for a spreadsheet.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

/// How a migration came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recovered {
    /// It went on as if nothing had been.
    Migrated,
    /// The same migration went on after a new connection, or with daemons that were started again.
    Resumed,
    /// The guest went on at the source after a handoff that failed, and the disk was offered again.
    Reclaimed,
    /// The migration failed with a reason, and a second request succeeded.
    Again,
    /// It was cancelled; the guest stays at the source.
    Cancelled,
}

/// One fault.
#[derive(Debug, Clone)]
pub struct Row {
    pub seed: u64,
    pub fault: String,
    pub point: String,
    /// `None`: there was no legal end.
    pub recovered: Option<Recovered>,
    pub wrong: u64,
    pub owners: u64,
    pub stall: Duration,
    /// Why it failed.
    pub failure: String,
}

impl Row {
    pub fn new(seed: u64, fault: String, point: String) -> Self {
        let (stall, failure) = (Duration::ZERO, String::new());
        Self { seed, fault, point, recovered: None, wrong: 0, owners: 0, stall, failure }
    }
}

/// Shows what has been, and fails if anything did.
pub fn judge(rows: &[Row]) {
    println!("{}", table(rows));
    for row in rows.iter().filter(|row| row.recovered.is_none()) {
        println!("FAILED: seed {}: {} at {}: {}", row.seed, row.fault, row.point, row.failure);
    }
    println!("{}", sum(rows));
    assert!(rows.iter().all(|row| row.recovered.is_some() && row.owners == 0), "see the table");
}

impl Row {
    fn end(&self) -> &'static str {
        match self.recovered {
            None => "FAILED",
            Some(Recovered::Migrated) => "migrated",
            Some(Recovered::Resumed) => "resumed",
            Some(Recovered::Reclaimed) => "reclaimed",
            Some(Recovered::Again) => "asked again",
            Some(Recovered::Cancelled) => "cancelled",
        }
    }
}

/// The table: one line for each kind of fault at each point.
pub fn table(rows: &[Row]) -> String {
    let mut lines: BTreeMap<(&str, &str), Vec<&Row>> = BTreeMap::new();
    for row in rows {
        lines.entry((&row.fault, &row.point)).or_default().push(row);
    }
    let mut out = String::from(
        "| fault | point | times | wrong blocks | double owners | recovered | longest stall, ms |\n\
         |---|---|---:|---:|---:|---|---:|\n",
    );
    for ((fault, point), rows) in lines {
        let mut ends: BTreeMap<&str, u32> = BTreeMap::new();
        rows.iter().for_each(|row| *ends.entry(row.end()).or_default() += 1);
        let ends: Vec<_> = ends.iter().map(|(end, count)| format!("{end} {count}")).collect();
        let (times, wrong, owners) = (rows.len(), wrong(&rows), owners(&rows));
        let stall = rows.iter().map(|row| row.stall.as_millis()).max().unwrap_or(0);
        let ends = ends.join(", ");
        writeln!(out, "| {fault} | {point} | {times} | {wrong} | {owners} | {ends} | {stall} |").unwrap();
    }
    out
}

fn wrong(rows: &[&Row]) -> u64 {
    rows.iter().map(|row| row.wrong).sum()
}

fn owners(rows: &[&Row]) -> u64 {
    rows.iter().map(|row| row.owners).sum()
}

/// The last line.
pub fn sum(rows: &[Row]) -> String {
    let all: Vec<&Row> = rows.iter().collect();
    let failed = rows.iter().filter(|row| row.recovered.is_none()).count();
    let stall = rows.iter().map(|row| row.stall.as_millis()).max().unwrap_or(0);
    let failed = if failed > 0 { format!(", {failed} FAILED") } else { String::new() };
    let (wrong, owners) = (wrong(&all), owners(&all));
    format!(
        "torture: {} faults, {wrong} wrong blocks, {owners} double owners, longest stall {stall} ms{failed}",
        rows.len()
    )
}

/// One line for each fault.
pub fn csv(rows: &[Row]) -> String {
    let mut out = String::from("seed,fault,point,recovered,wrong_blocks,double_owners,stall_ms\n");
    for row in rows {
        let end = row.end();
        let (seed, fault, point, stall) = (row.seed, &row.fault, &row.point, row.stall.as_millis());
        writeln!(out, "{seed},{fault},{point},{end},{},{},{stall}", row.wrong, row.owners).unwrap();
    }
    out
}
