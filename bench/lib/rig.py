# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the measuring scripts share: a work folder on a real disk, processes that are ended by pid, the API of a daemon,
and what this machine is."""

import http.client
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "qemu-scripts", "lib"))
from process import Failure, Process, tail, wait_for  # noqa: E402  (the end-to-end tests' own)

CACHE = os.environ.get("BLKFERRY_CACHE", os.path.join(ROOT, ".cache"))
GIB = 1 << 30


def say(text):
    print(text, file=sys.stderr, flush=True)


def output(argv, **options):
    """Standard output of a command that must succeed."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, **options)
    if done.returncode != 0:
        raise Failure(f"{' '.join(argv)}: exit status {done.returncode}")
    return done.stdout


def target():
    return os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))


def build():
    """Builds the daemon, the client and the load generator; returns the folder that holds them."""
    say("building (cargo build --release)")
    packages = ["--package", "blkferry", "--package", "blkferry-bench"]
    output(["cargo", "build", "--release", "--quiet", "--bins", *packages], cwd=ROOT)
    return os.path.join(target(), "release")


def filesystem(path):
    return output(["stat", "-f", "-c", "%T", path]).strip()


def version(argv, env=None):
    """The first line of what a program says of itself."""
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=20)
        return done.stdout.splitlines()[0] if done.stdout else f"exit status {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def commit():
    try:
        done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
        return done.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def machine(work):
    """Lines that say where the figures come from."""
    with open("/proc/cpuinfo") as info:
        models = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    with open("/proc/meminfo") as info:
        memory = int(info.readline().split()[1]) // 1024
    device = output(["df", "--output=source", work]).splitlines()[-1]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processor": f"{os.cpu_count()} x {models[0] if models else platform.machine()}",
        "memory": f"{memory} MiB",
        "kernel": platform.release(),
        "disk": f"{filesystem(work)} on {device}",
        "blkferry": commit(),
    }


class Rig:
    """A work folder and the processes that use it. Leaving it ends them and removes the folder, also on Ctrl-C."""

    def __init__(self, name, folder=None, keep=False):
        parent = folder or CACHE
        os.makedirs(parent, exist_ok=True)
        if filesystem(parent) in ("tmpfs", "ramfs"):
            raise Failure(f"{parent} is no real disk: give --work a folder on one")
        self.work = tempfile.mkdtemp(prefix=f"{name}.", dir=parent)
        self.keep, self.processes, self.count = keep, [], 0

    def __enter__(self):
        # SIGTERM ends a run as Ctrl-C does: through the clean-up.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *_):
        # A second Ctrl-C must not stop the clean-up half-way: it is short, and leaves nothing running.
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, signal.SIG_IGN)
        for process in reversed(self.processes):
            process.end(timeout=10)
        if self.keep:
            say(f"kept {self.work}")
        else:
            shutil.rmtree(self.work, ignore_errors=True)

    def path(self, name):
        return os.path.join(self.work, name)

    def folder(self, name):
        """An empty folder of a name of its own."""
        self.count += 1
        path = self.path(f"{name}.{self.count}")
        os.mkdir(path)
        return path

    def start(self, name, argv, env=None):
        self.count += 1
        process = Process(name, argv, self.path(f"{name}.{self.count}.log"), env)
        self.processes.append(process)
        return process

    def stop(self, process):
        """Ends a process; what it says about that is no longer of interest."""
        process.end(timeout=30)
        self.processes.remove(process)

    def listening(self, process, path, timeout=60):
        """Waits until the socket is there; nothing connects, since that would be a front-end."""
        wait_for(f"{process.name} listens", lambda: os.path.exists(path), timeout, 0.005, [process])


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=60)
        self.unix = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.unix)


def api(path, method, what, body=None):
    """One request to a daemon's API."""
    connection = UnixConnection(path)
    try:
        connection.request(method, f"/api/v1/{what}", json.dumps(body) if body is not None else None,
                           {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise Failure(f"{method} {what}: {answer.status} {text.decode(errors='replace')}")
        return json.loads(text)
    finally:
        connection.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def drop_cache(path):
    """Forgets a file's pages, so that it is read from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(path):
    with open(path, "rb", buffering=0) as file:
        while file.read(8 << 20):
            pass


def main(run):
    """Runs a script's main function; failures are one line, and Ctrl-C is 130."""
    try:
        sys.exit(run())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except Failure as failure:
        say(f"FAILED {failure}")
        sys.exit(1)
