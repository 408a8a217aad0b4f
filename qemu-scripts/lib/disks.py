# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One guest with two disks, each with two daemons and a writer of its own, that move together: whatever becomes of one
of them, the guest must never run where one is missing, and both must stay recoverable (T20).

QEMU's own bandwidth holds the phase before the switchover open, a destination that does not start its guest by itself
(-S) the switchover, and the daemons' bandwidth the pull, so that no scenario has to hit a short moment."""

import concurrent.futures
import os
import signal
import time

from host import final_object
from machine import Machine
from process import Failure, Process, tail, wait_for
from stage import MIB, Stage


class Move:
    """The `blkferry` client at work on both disks and the VM."""

    def __init__(self, stage, here, there, number):
        log = os.path.join(stage.root, f"migrate-{number}.log")
        words = [word for source, target in zip(stage.sites("a"), stage.sites("b"))
                 for word in ("--disk", f"{source.api}={target.address}")]
        argv = [stage.tools["BLKFERRY"], "migrate", *words, "--qmp", here.path("qmp"), "--vm-uri", there.uri, "--json"]
        self.out = log + ".out"
        with open(self.out, "wb") as out:
            self.process = Process("blkferry migrate", argv, log, stdout=out)

    def await_says(self, text, timeout=20):
        def said():
            with open(self.process.log, errors="replace") as log:
                return text in log.read()
        wait_for(f"the client says '{text}'", said, timeout, alive=[self.process])

    def end(self, status, *states, timeout=90):
        """Waits for the end, which must be this, in these states of the disks; returns the client's object."""
        found = self.process.wait(timeout)
        with open(self.out, errors="replace") as out:
            text = out.read()
        if found != status:
            raise Failure(f"blkferry migrate ended with status {found}, not {status}\n{tail(self.process.log, 12)}{text}")
        result = final_object(text)
        if states and (found := [disk["state"] for disk in result["disks"]]) != list(states):
            raise Failure(f"the disks are {found}, not {list(states)}: {result['message']}")
        return result


class TwoDisks:
    """Two stages under one guest: the first has the machines' files, the second only those of its disk."""

    def __init__(self, tools, seed=1, bandwidth=None):
        self.tools = tools
        self.disks = [Stage(tools, 128 * MIB, seed + 1000 * n, pace_us=8000, bandwidth=bandwidth) for n in (0, 1)]
        self.root, self.machines, self.moves = self.disks[0].root, 0, 0

    def sites(self, name):
        return [disk.sites[name] for disk in self.disks]

    def machine(self, name, **more):
        """Boots (or, with incoming=True, prepares) a QEMU whose disks are the daemons of that name."""
        self.machines += 1
        first, second = self.disks
        machine = Machine(self.tools, self.root, f"{self.machines}-at-{name}", first.sites[name].vhost, "guest",
                          first.writer_args("/dev/vda"),
                          more=(second.sites[name].vhost, second.writer_args("/dev/vdb")), **more)
        first.processes.append(machine.process)
        first.guest.attach(machine.path("port"))
        second.guest.attach(machine.path("port2"))
        return machine

    def boot(self, warm_up_ios=800):
        machine = self.machine("a")
        for disk in self.disks:
            disk.guest.await_line("ready", 60, [machine.process])
        self.settle(machine, warm_up_ios)
        return machine

    def settle(self, machine, ios=150):
        """Both disks must work on, at once and for a while."""
        for disk in self.disks:
            disk.guest.await_io(ios, 60, [machine.process])

    def move(self, here, there):
        self.moves += 1
        move = Move(self, here, there, self.moves)
        self.disks[0].processes.append(move.process)
        return move

    def expect_at(self, name, state):
        if (found := [site.state() for site in self.sites(name)]) != [state, state]:
            raise Failure(f"the disks at {name} are {found}, not both {state}")

    def finish(self, site, machine):
        """Stops both writers and holds every sector of both disks against their records."""
        verified = sum(disk.take_record(machine) for disk in self.disks)
        machine.quit()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            checked = sum(pool.map(lambda disk: disk.check(disk.sites[site.name]), self.disks))
        return checked, verified

    def logs(self):
        return "".join(disk.logs() for disk in self.disks)

    def close(self, keep):
        for disk in self.disks:
            disk.close(keep)


def memory_bandwidth(machine, count):
    """How fast QEMU may send the guest's memory, in bytes a second."""
    machine.monitor.execute("migrate-set-parameters", **{"max-bandwidth": count})


def under_way(stage, here, there):
    """A migration that pushes while QEMU sends the guest's memory, slowly."""
    memory_bandwidth(here, 2 * MIB)
    move = stage.move(here, there)
    wait_for("QEMU sends the guest's memory", lambda: here.migration_status() == "active", 20, alive=[move.process])
    stage.expect_at("a", "active")
    return move


def all_back(stage, here, move, words):
    """The client must have brought everything back, and the guest must work on."""
    result = move.end(1, "cancelled", "cancelled")
    if words not in result["message"] or {disk["owner"] for disk in result["disks"]} != {"source"}:
        raise Failure(f"the client tells something else than '{words}' and both disks at the source: {result}")
    if here.run_state() != "running":
        raise Failure(f"the guest is {here.run_state()} at the source")
    stage.settle(here)


def in_switchover(stage):
    """The source has sent everything, the destination does not start the guest: returns (here, there, move)."""
    here = stage.boot()
    there = stage.machine("b", incoming=True, paused=True)
    move = stage.move(here, there)
    here.await_migrated()
    stage.expect_at("a", "pre-switchover")
    stage.expect_at("b", "pre-switchover")
    return here, there, move


def story(stage):
    """Two migrations that fail and bring all back, then one that loses a source's daemon in the pull."""
    here = stage.boot()
    there = stage.machine("b", incoming=True)
    move = under_way(stage, here, there)
    time.sleep(0.5)
    move.process.popen.send_signal(signal.SIGINT)
    all_back(stage, here, move, "cancelled by the operator")
    there.kill()

    lamed = stage.sites("b")[1]
    there = stage.machine("b", incoming=True)
    move = under_way(stage, here, there)
    lamed.kill()
    memory_bandwidth(here, 1 << 30)
    all_back(stage, here, move, f"does not hold the disk of {stage.sites('a')[1].api}")
    there.kill()
    lamed.start()

    killed = stage.sites("a")[1]
    there = stage.machine("b", incoming=True)
    move = stage.move(here, there)
    wait_for("the second disk is pulled", lambda: killed.state() == "postcopy-active", 40, alive=[move.process])
    killed.kill()
    time.sleep(0.5)
    killed.start()
    move.end(0, "completed", "completed")
    here.quit()
    stage.settle(there)
    return stage.sites("b")[0], there, "back after Ctrl-C, back without a destination, moved over a killed source"


def late(stage, victim):
    """One of the daemons of the second disk is away when the guest starts at the destination: the first disk is granted
    and cannot come back, so the second must follow."""
    if victim == "b" and stage.tools["QEMU_VERSION"].startswith("7."):
        raise Failure("QEMU 7.2 loses a device for good whose daemon was away at its start: use 10.0 here")
    here, there, move = in_switchover(stage)
    killed = stage.sites(victim)[1]
    killed.kill()
    start = time.monotonic()
    there.monitor.socket.settimeout(60)
    # QEMU 10.0 answers only when its devices have started, or have given up; 7.2 waits for none.
    there.cont()
    held = time.monotonic() - start
    stage.disks[0].guest.await_io(100, 60, [there.process])
    stage.sites("a")[0].await_state(("postcopy-active", "completed"), 10)
    move.await_says("the disks are on both sides")
    killed.start()
    move.end(0, "completed", "completed")
    here.quit()
    stage.settle(there)
    return stage.sites("b")[0], there, f"QEMU held for {held:.1f} s, went on with one disk, the other followed"


def resumed(stage):
    """The destination's QEMU dies before it starts the guest; the operator lets it run at the source again."""
    here, there, move = in_switchover(stage)
    there.kill()
    here.cont()
    all_back(stage, here, move, "resumed at the source")
    return stage.sites("a")[0], here, "reclaimed"


def split(stage):
    """The worst: the first disk is granted, the second is not, and the destination's QEMU dies. The guest has not run
    there, and it cannot run at the source any more. Resumed there it waits for its disk; sent again it goes on."""
    here, there, move = in_switchover(stage)
    killed = stage.sites("a")[1]
    killed.kill()
    there.monitor.socket.sendall(b'{"execute": "cont"}\n')
    wait_for("the first disk is granted", lambda: stage.sites("b")[0].state() in ("postcopy-active", "completed"), 20,
             alive=[there.process])
    there.kill()
    here.cont()
    result = move.end(1)
    if "resumed at the source" not in result["message"] or result["disks"][0]["owner"] != "destination":
        raise Failure(f"the client does not tell what happened: {result}")
    killed.start()
    before = stage.disks[0].guest.last["ios"]
    time.sleep(2)
    if stage.disks[0].guest.last["ios"] > before + 8:
        raise Failure("the guest was served by a disk that was given away")
    there = stage.machine("b", incoming=True)
    here.migrate(there.uri)
    here.quit()
    stage.settle(there)
    for site in stage.sites("a"):
        wait_for("the last disk is pulled", lambda: site.state() == "completed", 60, alive=[site.daemon])
    return stage.sites("b")[0], there, "sent again, went on with both disks"


SCENARIOS = {
    "two-disks": (story, 12 * MIB, TwoDisks),
}
# Slower ones, or of what the story has the like of: only by name.
MORE = {
    "two-disks-late-destination": (lambda stage: late(stage, "b"), 12 * MIB, TwoDisks),
    "two-disks-late-source": (lambda stage: late(stage, "a"), 12 * MIB, TwoDisks),
    "two-disks-resumed": (resumed, 12 * MIB, TwoDisks),
    "two-disks-split": (split, 12 * MIB, TwoDisks),
}
