# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A disk that grows under a real guest: its kernel must learn the new size while it works, once while it runs and once
while it is paused; and a migration afterwards must carry the larger disk."""

import os
import re

import stage as stages
from machine import Machine
from process import Failure, wait_for

MIB = 1 << 20


class Talkative(Machine):
    """The guest's kernel writes to its console what it notices of the disk."""

    def board(self, mode, args):
        return [word.replace(" quiet ", " loglevel=6 ") for word in super().board(mode, args)]


def sizes(machine):
    """The sizes in bytes that the guest's kernel says it has learned, in order."""
    with open(machine.path("console.log"), errors="replace") as log:
        return [int(n) * 512 for n in re.findall(r"virtio_blk.*\[vda\] new size: (\d+) 512-byte", log.read())]


def resize(stage, site, machine, size):
    """Asks for the new size, as an operator would."""
    site.run_client("resize", str(size))
    status, volume = site.get("/api/v1/volume")
    if (status, volume["size"]) != (200, size):
        raise Failure(f"the volume is {volume['size']} bytes after a resize to {size}")
    stage.size = size


def learns(stage, machine, size):
    wait_for(f"the guest's kernel learns of {size} bytes (it knows {sizes(machine)})",
             lambda: sizes(machine)[-1:] == [size], 30, alive=stage.alive(machine))


def cut(copy, size):
    """What nobody has written must be zeros; the guest's record is of the disk as it was in the beginning."""
    with open(copy, "r+b") as image:
        image.seek(size)
        if any(image.read()):
            raise Failure("the new part of the disk is not zeros")
        image.truncate(size)
    return copy


def grow(stage):
    """Returns (site, machine, how) as every scenario does; `finish` then reads the whole larger disk."""
    a, b = stage.sites["a"], stage.sites["b"]
    original, stages.Machine = stages.Machine, Talkative
    try:
        here = stage.boot(a)
    finally:
        stages.Machine = original
    old, dump = stage.size, stage.dump
    stage.dump = lambda site: cut(dump(site), old)
    for more in (512, 8 * MIB):
        resize(stage, a, here, stage.size + more)
        learns(stage, here, stage.size)
        stage.guest.await_io(300, 60, stage.alive(here))
    # Paused, QEMU does not listen; the guest must learn of it all the same.
    here.monitor.execute("stop")
    resize(stage, a, here, stage.size + 24 * MIB)
    here.cont()
    learns(stage, here, stage.size)
    stage.guest.await_io(300, 60, stage.alive(here))
    if os.path.getsize(os.path.join(a.folder, "state", "layer")) != stage.size:
        raise Failure("the layer is not as long as the volume")
    # The other side has the size of old, and is made anew.
    b.stop()
    b.resized(stage.size)
    b.start()
    there = stage.machine(b, incoming=True)
    stage.move(a, b, here, there)
    here.quit()
    stage.guest.await_io(300, 60, stage.alive(there))
    return b, there, f"grew from {old} to {stage.size} bytes under the guest, then moved"
