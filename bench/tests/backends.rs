// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The load generator against real back-ends: blkferryd, and qemu-storage-daemon where it is installed.
//!
//! What matters most is that verification passes on a sound back-end and fails on one that loses data.

#![allow(clippy::unwrap_used, clippy::panic)]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::OnceLock;
use tempfile::TempDir;

const SIZE: &str = "64M";

/// The daemon, built like this test. It belongs to another package, so cargo names no path to it here.
fn blkferryd() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        // target/PROFILE/deps/this
        let this = std::env::current_exe().unwrap();
        let folder = this.parent().and_then(Path::parent).unwrap();
        let profile = if folder.ends_with("release") { "release" } else { "test" };
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let status = Command::new(env!("CARGO"))
            // With the features of the whole workspace, as it has mostly been built already.
            .args(["build", "--quiet", "--workspace", "--bin", "blkferryd", "--profile", profile])
            .arg("--target-dir")
            .arg(folder.parent().unwrap())
            .current_dir(root)
            .status()
            .unwrap();
        assert!(status.success(), "building blkferryd: {status}");
        folder.join("blkferryd")
    })
}

/// A back-end on a disk of its own.
struct Backend {
    dir: TempDir,
    child: Child,
    /// The file that holds the disk's content.
    file: PathBuf,
}

impl Backend {
    fn blkferryd() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(blkferryd());
        command.arg("--socket-path").arg(dir.path().join("sock"));
        command.arg("--state-dir").arg(dir.path().join("state"));
        command.args(["--size", SIZE, "--num-queues", "2", "--log-level", "warn"]);
        let file = dir.path().join("state/layer");
        Self { child: command.spawn().unwrap(), dir, file }
    }

    /// QEMU's back-end; `None` where it is not installed.
    fn qsd() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
        let blockdev = format!("driver=file,filename={},node-name=file,discard=unmap", file.display());
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=file,writable=on,num-queues=2,addr.type=unix,addr.path={}",
            dir.path().join("sock").display()
        );
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &blockdev, "--export", &export]);
        match command.spawn() {
            Ok(child) => Some(Self { dir, child, file }),
            Err(error) => {
                eprintln!("qemu-storage-daemon: {error}: only blkferryd is driven");
                None
            }
        }
    }

    fn all() -> Vec<Self> {
        [Some(Self::blkferryd()), Self::qsd()].into_iter().flatten().collect()
    }

    fn bench(&self, arguments: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkferry-bench"));
        command.arg("iops").arg("--socket-path").arg(self.dir.path().join("sock"));
        command.args(["--json", "--connect-timeout", "20", "--ramp", "0"]).args(arguments.split_whitespace());
        command.output().unwrap()
    }

    /// A run that must succeed.
    fn good(&self, arguments: &str) -> Value {
        let output = self.bench(arguments);
        assert!(output.status.success(), "{arguments}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn number(report: &Value, pointer: &str) -> f64 {
    report.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer} in {report}"))
}

#[test]
fn the_result_has_what_it_promises() {
    for backend in Backend::all() {
        let report = backend.good("--rw randrw --rwmixread 70 --iodepth 8 --runtime 0.4 --flush-every 50");
        for pointer in ["/iops", "/bw_bytes", "/lat_us/mean", "/lat_us/p50", "/lat_us/p99", "/lat_us/p999"] {
            assert!(number(&report, pointer) > 0.0, "{pointer} in {report}");
        }
        let sum = number(&report, "/read/iops") + number(&report, "/write/iops");
        assert!((sum - number(&report, "/iops")).abs() <= 2.0, "{report}");
        assert!((number(&report, "/bw_bytes") / number(&report, "/iops") - 4096.0).abs() < 20.0, "{report}");
        assert!(number(&report, "/flush/lat_us/mean") > 0.0 && number(&report, "/cpu_us_per_io") > 0.0);
        assert_eq!(number(&report, "/errors"), 0.0);
        assert_eq!(number(&report, "/pid"), f64::from(backend.child.id()));
    }
}

#[test]
fn every_way_to_drive_a_ring_moves_the_right_data() {
    let ways = [
        "--mode poll",
        "--no-event-idx",
        "--no-indirect --iodepth 40",
        "--no-event-idx --no-indirect --iodepth 8 --queue-size 32 --mode poll",
        "--queues 2 --iodepth 128 --queue-size 128",
        "--bs 64k --segments 16",
        "--bs 512 --segments 1 --zipf 1.1",
        "--rate 3000",
        "--discard-pct 20",
        "--rw rw --bs 8k --offset 1M --size 5M",
    ];
    for backend in Backend::all() {
        for way in ways {
            let flags = if way.contains("--rw") { "" } else { "--rw randrw" };
            let report = backend.good(&format!("{flags} {way} --runtime 0.3 --verify --flush-every 64"));
            assert!(number(&report, "/verified") > 0.0, "{way}: {report}");
            assert_eq!(number(&report, "/wrong"), 0.0, "{way}: {report}");
        }
    }
}

#[test]
fn lost_and_altered_data_is_found() {
    for backend in Backend::all() {
        let file = backend.file.display();
        for (harm, wrong) in [
            // Eight blocks that were written become zeros; one byte is altered; one block stands where another should.
            (format!("dd if=/dev/zero of={file} bs=4096 seek=40 count=8 conv=notrunc"), 8.0),
            (format!("printf x | dd of={file} bs=1 seek=123456 conv=notrunc"), 1.0),
            (format!("dd if={file} of={file} bs=4096 skip=9 seek=200 count=1 conv=notrunc"), 1.0),
        ] {
            let socket = backend.dir.path().join("sock");
            let mut command = Command::new(env!("CARGO_BIN_EXE_blkferry-bench"));
            command.arg("iops").arg("--socket-path").arg(socket);
            // Every block of the first megabyte once.
            command.args(["--json", "--verify", "--rw", "write", "--size", "1M", "--requests", "256"]);
            command.args(["--connect-timeout", "20", "--before-verify", &harm]);
            let output = command.output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{harm}: {output:?}");
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(number(&report, "/wrong"), wrong, "{harm}: {report}");
            assert_eq!(number(&report, "/verified"), 256.0);
            assert!(String::from_utf8_lossy(&output.stderr).contains("wrong data at byte"), "{output:?}");
        }
    }
}

#[test]
fn a_counted_load_ends_with_its_count_and_a_flush_of_its_own() {
    for backend in Backend::all() {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkferry-bench"));
        command.arg("iops").arg("--socket-path").arg(backend.dir.path().join("sock"));
        command.args(["--json", "--rw", "write", "--stride", "64k", "--requests", "1000", "--final-flush"]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(number(&report, "/requests"), 1000.0);
        assert!(number(&report, "/final_flush_us") > 0.0);
    }
}

#[test]
fn a_back_end_that_goes_away_is_an_error_and_no_result() {
    let mut backend = Backend::blkferryd();
    let socket = backend.dir.path().join("sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_blkferry-bench"));
    command.arg("iops").arg("--socket-path").arg(&socket);
    command.args(["--runtime", "60", "--ramp", "0", "--json", "--connect-timeout", "20"]);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let bench = command.spawn().unwrap();
    // Kill it when it is surely under load: the generator's threads use CPU time.
    let used = |pid: u32| -> u64 {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
        let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("schedstat")).ok();
        let nanos = |text: String| text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
        tasks.flatten().filter_map(stat).filter_map(nanos).sum()
    };
    while used(bench.id()) < 50_000_000 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    backend.child.kill().unwrap();
    let output = bench.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("closed the connection"), "{output:?}");
}

#[test]
fn what_the_back_end_cannot_do_is_said() {
    let backend = Backend::blkferryd();
    for (arguments, said) in [
        ("--queues 3", "the back-end has 2"),
        ("--bs 1000", "block size"),
        ("--no-indirect --iodepth 128 --queue-size 128", "--queue-size"),
        ("--size 1G", "the disk ends"),
        ("--bs 64k --segments 3", "whole sectors"),
    ] {
        let output = backend.bench(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(said), "{arguments}: {output:?}");
    }
}
