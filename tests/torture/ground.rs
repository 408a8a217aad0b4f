// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the daemons stand on where a fault needs more than loopback: network namespaces with a link that can go down,
//! and disks that are small enough to be full. Both need root, and tests of them are in a mount namespace of their own
//! ([`alone`]), with which everything goes away again.

use crate::daemon::Place;
use crate::proxy::Proxy;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// Says to a test that it is in the namespace that was made for it.
const ALONE: &str = "TORTURE_ALONE";
const NAMESPACES: &str = "/run/netns";
/// The two ends of the link.
const ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];
/// Bytes of a disk that gets full: the journal, the layer, and not much more.
const SMALL: &str = "size=40m";

/// Runs the calling test again in a mount namespace of its own and says how that ended; `None` in there.
pub fn alone(name: &str) -> Option<ExitStatus> {
    if std::env::var_os(ALONE).is_some() {
        std::fs::create_dir_all(NAMESPACES).unwrap();
        sh("mount", &["-t", "tmpfs", "none", NAMESPACES]);
        return None;
    }
    let mut command = Command::new("unshare");
    command.arg("--mount").arg(std::env::current_exe().unwrap()).args([name, "--exact", "--nocapture"]);
    command.arg("--include-ignored").env(ALONE, "1").stdin(Stdio::null());
    Some(command.status().unwrap_or_else(|error| panic!("unshare (of util-linux) is needed: {error}")))
}

/// Runs a program that must succeed.
pub fn sh(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed, and root: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?} (it needs root): {} {error}", output.status);
}

/// Two network namespaces with a veth pair between them.
pub struct Link {
    names: [String; 2],
}

impl Link {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let names = ["a", "b"].map(|side| format!("torture{}-{number}-{side}", std::process::id()));
        for name in &names {
            sh("ip", &["netns", "add", name]);
            sh("ip", &["-n", name, "link", "set", "lo", "up"]);
        }
        let [a, b] = &names;
        let pair = ["type", "veth", "peer", "name", "wire", "netns", b];
        sh("ip", &[&["-n", a, "link", "add", "wire"], &pair[..]].concat());
        for (name, address) in names.iter().zip(ADDRESSES) {
            sh("ip", &["-n", name, "address", "add", &format!("{address}/24"), "dev", "wire"]);
            sh("ip", &["-n", name, "link", "set", "wire", "up"]);
        }
        Self { names }
    }

    pub fn places(&self) -> [Place; 2] {
        [0, 1].map(|side| Place {
            address: ADDRESSES[side].to_owned(),
            launcher: ["ip", "netns", "exec", &self.names[side]].map(str::to_owned).to_vec(),
        })
    }

    /// A proxy in the destination's namespace: what goes over the link is between it and the source.
    pub fn proxy(&self, target: &str) -> Proxy {
        let file = File::open(Path::new(NAMESPACES).join(&self.names[1])).unwrap();
        std::thread::scope(|scope| {
            // The threads that this one makes inherit its namespace.
            let within = move || {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                Proxy::new(ADDRESSES[1], target)
            };
            scope.spawn(within).join().unwrap()
        })
    }

    /// Takes the source's end down, and up again after this time: nothing is reset, nothing arrives.
    pub fn down(&self, time: Duration) -> impl Fn() + Send + use<> {
        let name = self.names[0].clone();
        move || {
            sh("ip", &["-n", &name, "link", "set", "wire", "down"]);
            let name = name.clone();
            std::thread::spawn(move || {
                std::thread::sleep(time);
                sh("ip", &["-n", &name, "link", "set", "wire", "up"]);
            });
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for name in &self.names {
            Command::new("ip").args(["netns", "delete", name]).status().ok();
        }
    }
}

/// A folder for a world in which one side's volume is on a small disk of its own.
pub struct SmallDisk {
    mount: PathBuf,
}

impl SmallDisk {
    pub fn new(side: usize) -> (Self, TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join(["a", "b"][side]);
        let mount = home.join("disk");
        std::fs::create_dir_all(&mount).unwrap();
        sh("mount", &["-t", "tmpfs", "-o", SMALL, "none", mount.to_str().unwrap()]);
        std::fs::create_dir(mount.join("state")).unwrap();
        std::os::unix::fs::symlink(mount.join("state"), home.join("state")).unwrap();
        (Self { mount }, dir)
    }

    /// Whether nothing fills it.
    pub fn has_space(&self) -> bool {
        std::fs::metadata(self.mount.join("filler")).map_or(true, |filler| filler.len() == 0)
    }

    /// Fills it to the last byte, and frees it again after this time.
    pub fn fill(&self, time: Duration) -> impl Fn() + Send + use<> {
        let path = self.mount.join("filler");
        move || {
            let mut file = File::create(&path).unwrap();
            for block in [1 << 20, 4096, 1] {
                let zeros = vec![0; block];
                while file.write_all(&zeros).is_ok() {}
            }
            std::thread::spawn(move || {
                std::thread::sleep(time);
                file.set_len(0).unwrap();
            });
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(&self.mount).status().ok();
    }
}

/// What is wrong with a state directory when its daemon is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoil {
    /// It is on a file system that was mounted read-only.
    ReadOnly,
    /// There is a file where it should be.
    File,
    /// Its superblock is gone.
    NoSuperblock,
}

impl Spoil {
    /// Words of the refusal.
    pub fn complaint(self) -> &'static str {
        match self {
            Self::ReadOnly => "Read-only file system",
            Self::File => "File exists",
            Self::NoSuperblock => "it is missing, and the layer holds data",
        }
    }

    pub fn spoil(self, state: &Path) {
        let path = state.to_str().unwrap();
        match self {
            Self::ReadOnly => {
                sh("mount", &["--bind", path, path]);
                sh("mount", &["-o", "remount,ro,bind", path]);
            }
            Self::File => {
                std::fs::rename(state, state.with_extension("away")).unwrap();
                std::fs::write(state, "").unwrap();
            }
            Self::NoSuperblock => {
                std::fs::rename(state.join("superblock"), state.with_extension("away")).unwrap();
            }
        }
    }

    pub fn repair(self, state: &Path) {
        match self {
            Self::ReadOnly => sh("umount", &[state.to_str().unwrap()]),
            Self::File => {
                std::fs::remove_file(state).unwrap();
                std::fs::rename(state.with_extension("away"), state).unwrap();
            }
            Self::NoSuperblock => {
                std::fs::rename(state.with_extension("away"), state.join("superblock")).unwrap();
            }
        }
    }
}
