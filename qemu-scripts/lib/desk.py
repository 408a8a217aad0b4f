# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One daemon, one guest with a file system on its disk, and what is done to both."""

import os
import re
import shutil
import signal
import tempfile

import ext4
from host import Site
from machine import Machine
from process import Failure, tail, wait_for
from shell import Shell
from stage import MIB
from tree import Tree

# What the guest's kernel says when a disk has failed it.
COMPLAINTS = re.compile(r"I/O error|EXT4-fs (error|warning)|EXT4-fs .*[Ee]rror|[Aa]bort(ed|ing) journal"
                        r"|remount.*read-only|Kernel panic|BUG:|Call Trace|critical (target|medium) error"
                        r"|blocked for more than|JBD2: .*([Ee]rror|fail)")
FIO = "--verify=crc32c --verify_fatal=1"


class Desk:
    def __init__(self, tools, args, size=192 * MIB, base=None, queues=2, queue_size=None, cpus=1):
        self.tools, self.size, self.cpus = tools, size, cpus
        self.tree = Tree(tools["TOOLS"])
        self.root = tempfile.mkdtemp(prefix="blkferry-")
        self.base = base(self) if base else None
        extra = ["--cache", args.cache] if args.cache else []
        self.disk_options = f"num-queues={queues}"
        if queue_size:
            extra += ["--queue-size", str(queue_size)]
            self.disk_options += f",queue-size={queue_size}"
        self.site = Site(tools, self.root, "a", self.base, size, False, queues=queues, extra=extra)
        self.layer = os.path.join(self.site.folder, "state", "layer")
        self.copy = os.path.join(self.root, "copy.raw")
        self.machines, self.shell, self.verified = [], None, 0
        self.site.start()

    # The guest.

    def boot(self, copy=False):
        """A new VM on the same disk; with `copy` it has a second one, a raw file, to copy the disk to."""
        if copy:
            with open(self.copy, "wb") as out:
                out.truncate(self.size)
        machine = Machine(self.tools, self.root, f"{len(self.machines) + 1}", self.site.vhost, "shell", {},
                          second_disk=self.copy if copy else None, cpus=self.cpus, memory_kib=512 << 10,
                          disk_options=self.disk_options)
        self.machines.append(machine)
        self.shell = Shell(machine)
        self.shell.await_ready()
        return self.shell

    def make(self, options=""):
        self.shell.run("/tools/mke2fs -q -F -t ext4 -b 4096 -E lazy_itable_init=0 /dev/vda")
        self.mount(options)

    def mount(self, options=""):
        self.shell.run("mount -t ext4 " + (f"-o {options} " if options else "") + "/dev/vda /mnt")

    def unmount(self):
        self.shell.run("umount /mnt")
        self.fsck()

    def fsck(self):
        """The guest's own fsck; its caches are dropped, so that it looks at the disk."""
        self.drop_caches()
        status, text = self.shell.attempt("/tools/e2fsck -f -n /dev/vda")
        ext4.expect_whole(text, status, "in the guest")
        self.expect_quiet()

    def drop_caches(self):
        self.shell.run("sync && echo 3 > /proc/sys/vm/drop_caches")

    def counted(self):
        """What the guest's kernel has counted for the disk: (requests completed, bytes read, requests in flight)."""
        fields = [int(n) for n in self.shell.run("cat /sys/block/vda/stat").split()]
        return fields[0] + fields[4] + fields[11] + fields[15], fields[2] * 512, fields[8]

    def fio(self, words, size, jobs=1, read_back=True, timeout=90):
        """Runs fio. With `read_back`, each of its jobs must verify `size` bytes, and as much must have been read from
        the disk: what the guest's page cache could answer proves nothing."""
        before = self.counted()[1]
        self.shell.run(f"/tools/fio --output-format=json --output=/tmp/fio.json {FIO} {words}", timeout)
        if not read_back:
            return
        self.verified += ext4.fio_verified(self.shell.run("cat /tmp/fio.json"), size)
        read = self.counted()[1] - before
        if read < size * jobs:
            raise Failure(f"fio {words}: only {read} bytes came from the disk, {size * jobs} were verified")

    def fio_apart(self, words, size, jobs=1):
        """Writes, then verifies in a second run with the guest's page cache dropped in between."""
        self.fio(f"{words} --do_verify=0", size, read_back=False)
        self.drop_caches()
        self.fio(f"{words} --verify_only", size, jobs)

    def some_files(self, folder, count):
        """Makes files of odd sizes in the guest; returns {name: sha256}, names from the file system's root."""
        self.shell.run(f"mkdir -p /mnt/{folder} && cd /mnt/{folder} && for n in $(seq {count}); do "
                       f"head -c $((n * n * 1709 % 300000 + n)) /dev/urandom > f$n; done; sync")
        return ext4.sums(self.shell.run(f"cd /mnt && sha256sum {folder}/*"))

    def expect_files(self, wanted):
        """The guest reads the files again, from the disk."""
        self.drop_caches()
        found = ext4.sums(self.shell.run("cd /mnt && find . -type f | xargs sha256sum"))
        wrong = [name for name, sha256 in wanted.items() if found.get(name) != sha256]
        if wrong or not wanted:
            raise Failure(f"{len(wrong)} of {len(wanted)} files are wrong in the guest: " + ", ".join(
                f"{name} {'is missing' if name not in found else 'has other content'}" for name in wrong[:8]))

    def expect_quiet(self):
        """The guests' kernels must not have complained."""
        for machine in self.machines:
            with open(machine.path("console.log"), errors="replace") as log:
                if bad := [line for line in log if COMPLAINTS.search(line)]:
                    raise Failure(f"the kernel of guest {machine.name} complained:\n    " + "    ".join(bad[:8]))

    # Load in the background.

    def load(self, seed):
        self.shell.run("rm -f /tmp/stop /tmp/fio.*; mkdir -p /mnt/load /mnt/files")
        self.shell.start(f"sh /bin/load fio /mnt/load {seed}")
        self.shell.start(f"sh /bin/load files /mnt/files {seed}")

    def synced(self):
        """{name: sha256} of all files that the guest has said to be on the disk."""
        self.load_alive()
        wanted = {f"files/{match[1]}": match[2] for match in self.shell.noted(r"synced (\S+) (\S+)")}
        for match in self.shell.noted(r"gone (\S+)"):
            wanted.pop(f"files/{match[1]}", None)
        return wanted

    def load_alive(self):
        if bad := self.shell.noted(r"ended (\S+) (?!0$)(\d+)"):
            text = self.shell.run("cat /tmp/background.* | tail -n 40") if self.shell.machine.process.running() else ""
            raise Failure(f"the load '{bad[0][1]}' failed in the guest: status {bad[0][2]}\n{text}")

    def await_work(self, count=30, timeout=60):
        """The guest's disk must complete so many more requests."""
        goal = self.counted()[0] + count
        wait_for(f"the guest's disk does {count} more requests", lambda: self.counted()[0] >= goal, timeout, step=0.1,
                 alive=[self.shell.machine.process, self.site.daemon])
        self.load_alive()

    def end_load(self):
        """Lets the load finish what it is at, and holds every fio run against its due."""
        self.shell.run("touch /tmp/stop")
        self.shell.until("the load ends", lambda: len(self.shell.noted(r"ended \S+ \d+")) == 2, 90)
        self.load_alive()
        runs = self.shell.run("ls /tmp/fio.*.json").split()
        for run in runs:
            self.verified += ext4.fio_verified(self.shell.run(f"cat {run}"), 8 * MIB)
        return len(runs)

    # The daemon.

    def kill_daemon(self):
        self.site.kill()

    def await_reconnected(self):
        """Reads the last block of the disk, which ext4 does not hold on to: it comes when QEMU has found the daemon."""
        self.shell.run("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null bs=4096 count=1 "
                       f"skip={self.size // 4096 - 1}")

    def volume(self):
        status, value = self.site.get("/api/v1/volume") or (0, {})
        if status != 200:
            raise Failure(f"the API does not tell the volume: {status} {value}")
        return value

    # The end.

    def finish(self, wanted):
        """Unmounts, ends the daemon in order and starts it again, copies the whole disk through it, and checks the
        copy on the host: fsck, then every file of `wanted`, read without the kernel's ext4."""
        self.unmount()
        self.site.stop()
        self.site.start()
        self.shell.run("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/vdb bs=1M && sync", 90)
        self.expect_quiet()
        self.shell.machine.quit()
        self.site.stop()
        ext4.fsck(self.tree, self.copy)
        folder = os.path.join(self.root, "extracted")
        ext4.extract(self.tree, self.copy, folder)
        files = ext4.compare(folder, wanted)
        # Without a base image the layer alone is the disk.
        if not self.base and not ext4.same_content(self.copy, self.layer):
            raise Failure("what the guest reads is not what the layer holds")
        return files

    def logs(self):
        paths = [machine.path(suffix) for machine in self.machines for suffix in ("console.log", "qemu.log")]
        paths = [path for path in [*paths, self.site.log] if os.path.exists(path) and os.path.getsize(path)]
        return "".join(f"--- {path}\n{tail(path)}" for path in paths)

    def close(self, keep):
        """Ends every process of this run, by its pid, and removes the work folder unless it is to be kept."""
        for process in [machine.process for machine in self.machines] + [self.site.daemon]:
            if process:
                process.end(signal.SIGKILL)
        if not keep:
            shutil.rmtree(self.root, ignore_errors=True)
