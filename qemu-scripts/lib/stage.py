# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Two sites, a guest, and the moves between them: what the demo and the end-to-end scenarios share."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

from guest import Guest
from machine import Machine
from process import Failure, tail
from host import Site, final_object

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = os.path.dirname(HERE)
REPO = os.path.dirname(SCRIPTS)
MIB = 1 << 20


def say(text):
    print(text, file=sys.stderr, flush=True)


def provide_tools(qemu, *more):
    """Provisions and builds; returns the paths of everything that is run. BLKFERRY_BIN_DIR names ready binaries."""
    words = [os.path.join(SCRIPTS, "provision"), *(["--qemu", qemu] if qemu else []), *more]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failure("provisioning did not work")
    tools = dict(line.split("=", 1) for line in done.stdout.splitlines())
    folder = os.environ.get("BLKFERRY_BIN_DIR")
    if not folder:
        build = ["cargo", "build", "--release", "--bin", "blkferryd", "--bin", "blkferry"]
        if subprocess.run(build, cwd=REPO, stdout=sys.stderr, check=False).returncode:
            raise Failure("cargo build did not work")
        folder = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(REPO, "target")), "release")
    for name in ("blkferryd", "blkferry"):
        tools[name.upper()] = os.path.join(folder, name)
        if not os.access(tools[name.upper()], os.X_OK):
            raise Failure(f"no program {tools[name.upper()]}")
    return tools


class Stage:
    """A run's work folder and all that lives in it."""

    def __init__(self, tools, size=256 * MIB, seed=1, pace_us=4000, bandwidth=None, listen="ab"):
        self.tools, self.size, self.seed, self.pace_us = tools, size, seed, pace_us
        self.root = tempfile.mkdtemp(prefix="blkferry-")
        self.processes, self.machines = [], 0
        self.guest = Guest()
        # The base ends inside a chunk and before the volume: its edge is where a rounding mistake would show.
        self.base_sectors = (size - 8 * MIB) // 512 - 7
        self.base = os.path.join(self.root, "base.raw")
        self.writer("base", "--out", self.base, "--size", str(self.base_sectors * 512))
        self.sites = {name: Site(tools, self.root, name, self.base, size, name in listen, bandwidth)
                      for name in ("a", "b")}
        for site in self.sites.values():
            site.start()

    def writer(self, *words):
        done = subprocess.run([self.tools["WRITER"], *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, check=False)
        if done.returncode:
            raise Failure(f"writer {words[0]}: {done.stdout.strip()[-3000:]}")
        return done.stdout

    def writer_args(self, disk):
        """What the guest's writer for this disk is started with."""
        return {"disk": disk, "seed": self.seed, "base-sectors": self.base_sectors, "workers": 4,
                "pace-us": self.pace_us}

    def machine(self, site, **more):
        """Boots (or, with incoming=True, prepares) a QEMU whose disk is the site's daemon."""
        self.machines += 1
        machine = Machine(self.tools, self.root, f"{self.machines}-at-{site.name}", site.vhost, "guest",
                          self.writer_args("/dev/vda"), **more)
        self.processes.append(machine.process)
        self.guest.attach(machine.path("port"))
        return machine

    def alive(self, *machines):
        """What must not end while we wait for the guest: these machines and both daemons."""
        return [machine.process for machine in machines] + [site.daemon for site in self.sites.values()]

    def boot(self, site, warm_up_ios=1500):
        machine = self.machine(site)
        self.guest.await_line("ready", 60, self.alive(machine))
        self.guest.await_io(warm_up_ios, 90, self.alive(machine))
        return machine

    def move(self, source, target, from_machine, to_machine, *options, timeout=120):
        """A whole migration by the client, which asks QEMU itself; returns the client's result object."""
        text = source.run_client("migrate", "--to", target.address, "--qmp", from_machine.path("qmp"), "--vm-uri",
                                 to_machine.uri, "--json", *options, timeout=timeout)
        result = final_object(text)
        if result.get("state") != "completed":
            raise Failure(f"migrate ended in state {result.get('state')}: {result}")
        return result

    def finish(self, site, machine):
        """Stops the guest and checks its disk. Returns (sectors checked, sectors verified in the guest)."""
        verified = self.take_record(machine)
        machine.quit()
        return self.check(site), verified

    def take_record(self, machine):
        """Stops the guest's writer and keeps its record. Returns how many sectors it has verified."""
        record, verified, wrong = self.guest.stop(60, self.alive(machine))
        self.guest.expect_clean()
        if wrong:
            raise Failure(f"the guest counted {wrong} wrong")
        with open(os.path.join(self.root, "record"), "w", encoding="ascii") as out:
            out.write(record)
        return verified

    def check(self, site):
        """Ends the daemons, restarts the site's on the same state and holds every sector of its disk against the
        guest's record. Returns how many."""
        for each in self.sites.values():
            if each.daemon.running():
                each.stop()
        site.start()
        copy = self.dump(site)
        text = self.writer("check", "--image", copy, "--record", os.path.join(self.root, "record"))
        site.stop()
        checked, bad = (int(n) for n in re.search(r"checked (\d+) sectors, (\d+) wrong", text).groups())
        if bad:
            raise Failure(text)
        return checked

    def dump(self, site):
        """Reads the whole disk through the daemon, by a guest that only copies it to a raw file on the host."""
        copy = os.path.join(self.root, "copy.raw")
        with open(copy, "wb") as out:
            out.truncate(self.size)
        self.machines += 1
        reader = Machine(self.tools, self.root, f"{self.machines}-dump-{site.name}", site.vhost, "dump",
                         {"from": "/dev/vda", "to": "/dev/vdb"}, second_disk=copy)
        self.processes.append(reader.process)
        listener = Guest()
        listener.attach(reader.path("port"))
        listener.await_line("dumped", 60, [reader.process, site.daemon])
        reader.quit()
        return copy

    def logs(self):
        """The ends of all logs: what a failure is explained with."""
        names = sorted(name for name in os.listdir(self.root) if name.endswith(".log"))
        paths = [os.path.join(self.root, name) for name in names] + [site.log for site in self.sites.values()]
        for site in self.sites.values():
            names = sorted(name for name in os.listdir(site.folder) if name.startswith("blkferry-"))
            paths += [os.path.join(site.folder, name) for name in names]
        return "".join(f"--- {path}\n{tail(path)}" for path in paths if os.path.getsize(path))

    def close(self, keep):
        """Ends every process of this run, by its pid, and removes the work folder unless it is to be kept."""
        for process in self.processes + [site.daemon for site in self.sites.values() if site.daemon]:
            process.end(signal.SIGKILL)
        if not keep:
            shutil.rmtree(self.root, ignore_errors=True)
