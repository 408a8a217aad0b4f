# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One QEMU process with the guest in it, or waiting for the guest to arrive."""

import os
import signal

from process import Failure, Process, wait_for
from qmp import Qmp

MEMORY_KIB = 192 << 10


def join(args):
    """The writer's arguments as one word of the kernel's command line."""
    return ",".join(f"--{key}={value}" for key, value in args.items())


class Machine:
    def __init__(self, tools, folder, name, vhost_socket, mode, args, incoming=False, paused=False, second_disk=None,
                 cpus=1, memory_kib=MEMORY_KIB, disk_options="num-queues=2", more=None):
        """`mode` and `args` are the writer's, `incoming` makes a migration's destination, which with `paused` does
        not start the guest by itself (as libvirt does it). Mode `shell` boots the guest with the tools. `more` is
        (vhost socket, writer's arguments) of a second disk whose writer speaks over `port2`."""
        self.more = more
        self.tools, self.name, self.cpus, self.memory_kib = tools, name, cpus, memory_kib
        self.disk_options, self.initrd = disk_options, tools["TOOLS_INITRD" if mode == "shell" else "INITRD"]
        self.path = lambda suffix: os.path.join(folder, f"{name}.{suffix}")
        self.uri = "unix:" + self.path("mig")
        argv = [tools["QEMU"]] + self.board(mode, args) + self.ports() + self.disk(vhost_socket)
        if more:
            argv += self.disk(more[0], "disk2", 8)
        if second_disk:
            argv += ["-drive", f"if=none,id=copy,file={second_disk},format=raw,cache=unsafe",
                     "-device", "virtio-blk-pci,drive=copy,addr=7"]
        if incoming:
            argv += ["-incoming", self.uri]
        if paused:
            argv += ["-S"]
        env = {"LD_LIBRARY_PATH": tools["QEMU_LIBS"]} if tools["QEMU_LIBS"] else {}
        self.process = Process(f"QEMU {name}", argv, self.path("qemu.log"), env)
        for socket in ("port", "monitor", *(["port2"] if more else [])):
            wait_for(f"QEMU {name} opens its {socket}", lambda: os.path.exists(self.path(socket)), 30,
                     alive=[self.process])
        self.monitor = wait_for(f"QEMU {name} answers", self.connect, 30, alive=[self.process])

    def connect(self):
        try:
            return Qmp(self.path("monitor"))
        except (OSError, Failure):
            return None

    def version(self):
        return tuple(int(n) for n in self.tools["QEMU_VERSION"].split("."))

    def memory(self):
        """Guest memory in KiB. QEMU before 9.0 loses guest writes when it migrates an emulated CPU: where a memory
        block is a multiple of 64 pages, it clears dirty bits without telling the CPU's TLB. One guest in fifteen died
        of it here, with a plain virtio-blk disk too. An odd size keeps QEMU on the path that works."""
        return self.memory_kib if self.version() >= (9, 0) else self.memory_kib + 8

    def accelerator(self):
        """CPUs take turns: with a thread for each, one can use a memory map that another has just replaced, and QEMU
        ends by an assertion (iotlb_to_section) while the guest sets up its PCI devices."""
        return "tcg" if self.cpus == 1 else "tcg,thread=single"

    def board(self, mode, args):
        firmware = [word for folder in self.tools["QEMU_FIRMWARE"].split(":") if folder for word in ("-L", folder)]
        words = join(args) + (f" blkferry.more={join(self.more[1])}" if self.more else "")
        return firmware + [
            "-nodefaults", "-no-user-config", "-display", "none", "-M", "q35", "-accel", self.accelerator(),
            "-cpu", "max", "-smp", str(self.cpus), "-m", f"{self.memory()}K",
            "-object", f"memory-backend-memfd,id=mem,size={self.memory()}K,share=on", "-numa", "node,memdev=mem",
            "-kernel", self.tools["KERNEL"], "-initrd", self.initrd,
            "-append", f"console=ttyS0 quiet panic=1 blkferry.mode={mode} blkferry.args={words}",
        ]

    def ports(self):
        """Console log, the writer's port, and two monitors: one is ours, one is for the `blkferry` client, because
        a monitor serves one client at a time."""
        options = "server=on,wait=off"
        second = [
            "-chardev", f"socket,id=port2,path={self.path('port2')},{options}",
            "-device", "virtserialport,chardev=port2,name=blkferry2,nr=2",
        ]
        return [
            "-serial", "file:" + self.path("console.log"),
            "-qmp", f"unix:{self.path('monitor')},{options}", "-qmp", f"unix:{self.path('qmp')},{options}",
            "-device", "virtio-serial-pci,addr=5",
            "-chardev", f"socket,id=port,path={self.path('port')},{options}",
            "-device", "virtserialport,chardev=port,name=blkferry,nr=1",
        ] + (second if self.more else [])

    def disk(self, vhost_socket, name="disk", slot=6):
        reconnect = "reconnect-ms=200" if self.version() >= (9, 2) else "reconnect=1"
        return [
            "-chardev", f"socket,id={name},path={vhost_socket},{reconnect}",
            "-device", f"vhost-user-blk-pci,chardev={name},{self.disk_options},addr={slot}",
        ]

    def migration_status(self):
        return self.monitor.execute("query-migrate").get("status", "none")

    def migrate(self, uri, timeout=60):
        """Lets QEMU move the guest's memory and waits for the end."""
        self.monitor.execute("migrate", uri=uri)
        self.await_migrated(timeout)

    def await_migrated(self, timeout=60):
        def ended():
            status = self.migration_status()
            if status in ("failed", "cancelled"):
                raise Failure(f"QEMU {self.name}: its migration is {status}")
            return status == "completed"
        wait_for(f"QEMU {self.name} has migrated", ended, timeout, alive=[self.process])

    def run_state(self):
        return self.monitor.execute("query-status")["status"]

    def cont(self):
        self.monitor.execute("cont")

    def quit(self):
        """Ends QEMU as a user would; the guest is not asked."""
        if self.process.running():
            try:
                self.monitor.execute("quit")
            except Failure:
                pass  # it may close the monitor before it answers
            self.process.end(signal.SIGTERM)

    def kill(self):
        self.process.end(signal.SIGKILL)
