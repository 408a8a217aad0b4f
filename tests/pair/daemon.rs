// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A daemon process: started, asked, killed, started again on the same arguments.

use blkferry::control::client::{Client, ClientError};
use blkferry::node::status::{MigrationRequest, MigrationState, MigrationStatus, StrategyName, VolumeStatus};
use std::fs::File;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for anything that must come.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Where a daemon runs.
#[derive(Debug, Clone)]
pub struct Place {
    /// The address that it listens on.
    pub address: String,
    /// What is put before its command line.
    pub launcher: Vec<String>,
}

impl Default for Place {
    fn default() -> Self {
        Self { address: "127.0.0.1".to_owned(), launcher: Vec::new() }
    }
}

/// One side.
pub struct Daemon {
    pub name: &'static str,
    dir: PathBuf,
    pub port: u16,
    place: Place,
    args: Vec<String>,
    child: Option<Child>,
    runtime: tokio::runtime::Runtime,
}

impl Daemon {
    /// Another one beside this one, on the same arguments, with files of its own.
    pub fn another(&self, name: &'static str) -> Self {
        Self::start(name, self.dir.parent().unwrap(), Place::default(), &self.args)
    }

    /// Starts `blkferryd` with its files in `dir` and these arguments more.
    pub fn start(name: &'static str, dir: &Path, place: Place, args: &[String]) -> Self {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut daemon = Self { name, dir, port, place, args: args.to_vec(), child: None, runtime };
        daemon.spawn();
        daemon
    }

    /// Starts the process (again), and waits until it listens for its front-end, or at least for the API.
    pub fn spawn(&mut self) {
        let ended = self.try_spawn();
        assert!(ended.is_none(), "{} has ended: {ended:?}", self.name);
    }

    /// As [`spawn`](Self::spawn); a daemon that ends at once says how.
    pub fn try_spawn(&mut self) -> Option<ExitStatus> {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(self.log_file()).unwrap();
        let words = self.place.launcher.iter().map(String::as_str);
        let mut words = words.chain(std::iter::once(env!("CARGO_BIN_EXE_blkferryd")));
        let child = Command::new(words.next().unwrap())
            .args(words)
            .arg("--socket-path")
            .arg(self.socket())
            .arg("--state-dir")
            .arg(self.state_dir())
            .arg("--api-socket")
            .arg(self.api())
            .args(["--listen", &self.address(), "--log-level", "debug"])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let since = Instant::now();
        while UnixStream::connect(self.api()).is_err() {
            if let Some(ended) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                return Some(ended);
            }
            assert!(since.elapsed() < LIMIT, "{} does not listen", self.name);
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// Waits for a daemon that ends by itself.
    pub fn ended(&mut self) -> ExitStatus {
        let (mut child, since) = (self.child.take().unwrap(), Instant::now());
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if since.elapsed() > LIMIT {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{} does not end", self.name);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Where a source connects to.
    pub fn address(&self) -> String {
        format!("{}:{}", self.place.address, self.port)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("vhost.sock")
    }

    pub fn api(&self) -> PathBuf {
        self.dir.join("api.sock")
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Whether a front-end can connect. A connection to find out would be one that the daemon counts.
    pub fn listens(&self) -> bool {
        let path = self.socket().display().to_string();
        let sockets = std::fs::read_to_string(format!("/proc/{}/net/unix", self.pid())).unwrap();
        // The fourth column has __SO_ACCEPTCON.
        sockets.lines().any(|line| line.ends_with(&path) && line.split(' ').nth(3) == Some("00010000"))
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_file()).unwrap_or_default()).into_owned()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM; it must end well, and soon.
    pub fn terminate(&mut self) {
        let sent = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status().unwrap();
        assert!(sent.success());
        let status = self.ended();
        assert!(status.success(), "{}: {status}", self.name);
    }

    /// Is started again with these arguments more.
    pub fn change(&mut self, more: &[&str]) {
        self.terminate();
        self.args.extend(more.iter().map(|arg| (*arg).to_owned()));
        self.spawn();
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// `blkferry recover --state-dir ..` with these words more.
    pub fn recover(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkferry"));
        command.args(["recover", "--json", "--state-dir"]).arg(self.state_dir()).args(words);
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// A value of the metrics.
    pub fn metric(&self, name: &str) -> u64 {
        let text = self.runtime.block_on(self.client().metrics()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    /// Begins anew with another `--size` and an empty state directory.
    pub fn renew(&mut self, size: u64) {
        self.terminate();
        std::fs::remove_dir_all(self.state_dir()).unwrap();
        let at = self.args.iter().position(|arg| arg == "--size").unwrap();
        self.args[at + 1] = size.to_string();
        self.spawn();
    }

    pub fn client(&self) -> Client {
        Client::new(self.api())
    }

    pub fn migration(&self) -> MigrationStatus {
        self.try_migration().unwrap()
    }

    /// What a daemon says that may be dead.
    pub fn try_migration(&self) -> Result<MigrationStatus, ClientError> {
        self.runtime.block_on(self.client().migration())
    }

    /// What a daemon says that may be dead.
    pub fn try_volume(&self) -> Result<VolumeStatus, ClientError> {
        self.runtime.block_on(self.client().volume())
    }

    pub fn state(&self) -> MigrationState {
        self.migration().state
    }

    pub fn volume(&self) -> VolumeStatus {
        self.try_volume().unwrap()
    }

    /// How often a thread of the daemon has gone to sleep.
    pub fn sleeps(&self) -> u64 {
        let tasks = format!("/proc/{}/task", self.child.as_ref().unwrap().id());
        let of = |task: std::io::Result<std::fs::DirEntry>| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
            line.trim().parse::<u64>().unwrap()
        };
        std::fs::read_dir(tasks).unwrap().map(of).sum()
    }

    /// Arms a migration to the daemon that listens on `port` of this host.
    pub fn migrate(
        &self,
        port: u16,
        strategy: StrategyName,
        bandwidth: Option<u64>,
    ) -> Result<(), ClientError> {
        self.migrate_to(format!("127.0.0.1:{port}"), strategy, bandwidth)
    }

    /// Arms a migration to whoever listens there.
    pub fn migrate_to(
        &self,
        destination_url: String,
        strategy: StrategyName,
        bandwidth: Option<u64>,
    ) -> Result<(), ClientError> {
        let request = MigrationRequest {
            destination_url,
            strategy,
            threshold: None,
            connections: None,
            bandwidth,
            start: Default::default(),
        };
        self.runtime.block_on(self.client().migrate(&request)).map(drop)
    }

    /// Makes the volume larger.
    pub fn resize(&self, size: u64) -> Result<VolumeStatus, ClientError> {
        self.runtime.block_on(self.client().resize(size))
    }

    pub fn cancel(&self) -> Result<(), ClientError> {
        self.runtime.block_on(self.client().cancel()).map(drop)
    }

    /// Lines of the log that say ERROR, but for those that contain one of `expected`.
    pub fn errors(&self, expected: &[&str]) -> Vec<String> {
        let log = self.log();
        let lines = log.lines().filter(|line| line.contains(" ERROR ") || line.contains("panicked"));
        lines.filter(|line| !expected.iter().any(|word| line.contains(word))).map(str::to_owned).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}
