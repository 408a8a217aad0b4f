# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""End-to-end scenarios with a real guest: each breaks a migration in one phase, then demands that the guest goes on,
that the disk can still be moved, and that in the end every sector is as the guest left it.

Disk and memory are moved separately where a phase must be held open: the client arms the disk's migration, which then
pushes at a limited bandwidth for as long as QEMU has not been asked to move the guest; asking it early leaves much to
be pulled. So no scenario depends on hitting a short moment."""

import argparse
import signal
import sys
import time

import disks
import resize
from process import Failure, wait_for
from stage import MIB, Stage, provide_tools, say

SLOW = 6 * MIB  # bytes a second: some 100 MiB of modified data keep a phase open for many seconds


def arm(source, target):
    """Begins the disk's migration alone and waits until it pushes."""
    source.run_client("migrate", "--to", target.address, "--no-wait")
    source.await_state(("active",), 20)


def await_done(source, target, timeout=120):
    """Waits for `completed` at either end: a source that crashed after its last chunk may know of nothing."""
    def done():
        states = [source.state(), target.state()]
        if "failed" in states or "cancelled" in states:
            raise Failure(f"the migration is {states[0]} at the source, {states[1]} at the destination: "
                          f"{source.migration()}")
        return "completed" in states
    wait_for("the migration completes", done, timeout, step=0.1, alive=[source.daemon, target.daemon])


def move_again(stage, source, target, here, there):
    """Brings a broken migration to its end. The daemons may have resumed it by themselves (then only the guest's
    memory is left to move) or given it up (then it is asked anew, for a while: both must first see that it is over)."""
    end = time.monotonic() + 60
    while True:
        stage.guest.expect_clean()
        status = source.migration()
        if status.get("state") == "active" and status.get("connected", True):
            here.migrate(there.uri)
            await_done(source, target)
            return "resumed"
        try:
            if status.get("state") == "active":
                raise Failure(f"the source is not connected: {status.get('message')}")
            stage.move(source, target, here, there)
            return "repeated"
        except Failure as failure:
            if time.monotonic() > end or here.migration_status() == "completed":
                raise
            say(f"    not yet: {str(failure).splitlines()[0]}")
            time.sleep(1)


def settle(stage, machine, ios=300):
    """The guest must work on, at once and for a while."""
    stage.guest.await_io(ios, 60, stage.alive(machine))


def there_and_back(stage):
    a, b = stage.sites["a"], stage.sites["b"]
    first = stage.boot(a)
    second = stage.machine(b, incoming=True)
    stage.move(a, b, first, second)
    first.quit()
    settle(stage, second, 1000)
    third = stage.machine(a, incoming=True)
    back = stage.move(b, a, second, third)
    second.quit()
    settle(stage, third)
    # A busy guest: but not every chunk is written while it is away.
    if not back["kept_chunks"]:
        raise Failure(f"nothing of what the first host had was used: {back}")
    travelled = sum(back[path] for path in ("push_bytes", "prefetch_bytes", "demand_bytes"))
    return a, third, f"moved twice, back with {travelled >> 10} KiB and {back['kept_bytes'] >> 10} KiB kept"


def cancel(stage):
    a, b = stage.sites["a"], stage.sites["b"]
    here = stage.boot(a)
    there = stage.machine(b, incoming=True)
    arm(a, b)
    time.sleep(1)
    a.run_client("cancel")
    a.await_state(("cancelled",), 20)
    settle(stage, here)
    how = move_again(stage, a, b, here, there)
    here.quit()
    settle(stage, there)
    return b, there, how


def fail_after_stop(stage, again=False):
    """The destination's QEMU has all it needs but never starts the guest (-S, as under libvirt), then dies. The
    source's guest is stopped by then; `cont` must give it its disk back, whatever becomes of the migration."""
    a, b = stage.sites["a"], stage.sites["b"]
    here = stage.boot(a)
    there = stage.machine(b, incoming=True, paused=True)
    arm(a, b)
    here.migrate(there.uri)
    if here.run_state() != "postmigrate":
        raise Failure(f"the source's QEMU is {here.run_state()}, not postmigrate")
    there.kill()
    here.cont()
    settle(stage, here)
    state = a.await_state(("active", "failed", "cancelled", "none"), 30)
    if again:
        there = stage.machine(b, incoming=True)
        how = move_again(stage, a, b, here, there)
        here.quit()
        settle(stage, there)
        return b, there, f"reclaimed ({state}), then {how}"
    if state == "active":
        a.run_client("cancel")
        a.await_state(("cancelled",), 20)
    settle(stage, here)
    return a, here, f"reclaimed ({state})"


def kill_in_push(stage, victim):
    a, b = stage.sites["a"], stage.sites["b"]
    here = stage.boot(a)
    there = stage.machine(b, incoming=True)
    arm(a, b)
    time.sleep(1.5)
    stage.sites[victim].kill()
    time.sleep(0.5)
    stage.sites[victim].start()
    settle(stage, here)
    how = move_again(stage, a, b, here, there)
    here.quit()
    settle(stage, there)
    return b, there, how


def kill_in_pull(stage, victim):
    a, b = stage.sites["a"], stage.sites["b"]
    here = stage.boot(a)
    there = stage.machine(b, incoming=True)
    arm(a, b)
    here.migrate(there.uri)
    a.await_state(("postcopy-active",), 30)
    here.quit()
    time.sleep(1)
    if a.state() != "postcopy-active":
        raise Failure(f"the pull was too short to be hit: {a.migration()}")
    stage.sites[victim].kill()
    time.sleep(1)
    stage.sites[victim].start()
    await_done(a, b)
    settle(stage, there)
    return b, there, "pulled to the end"


SCENARIOS = {
    "there-and-back": (there_and_back, None),
    "resize": (resize.grow, None),
    "cancel": (cancel, SLOW),
    "fail-after-stop": (fail_after_stop, SLOW),
    "reclaim-then-move": (lambda stage: fail_after_stop(stage, again=True), SLOW),
    "kill-source-push": (lambda stage: kill_in_push(stage, "a"), SLOW),
    "kill-dest-push": (lambda stage: kill_in_push(stage, "b"), SLOW),
    "kill-source-pull": (lambda stage: kill_in_pull(stage, "a"), SLOW),
    "kill-dest-pull": (lambda stage: kill_in_pull(stage, "b"), SLOW),
    **disks.SCENARIOS,
}
ALL = {**SCENARIOS, **disks.MORE}


def run(name, tools, args):
    """Plays one scenario; True when it holds."""
    scenario, bandwidth, make = (*ALL[name], Stage)[:3]
    began, stage, keep = time.monotonic(), None, args.keep
    try:
        stage = make(tools, seed=args.seed, bandwidth=bandwidth)
        site, machine, how = scenario(stage)
        checked, verified = stage.finish(site, machine)
        print(f"e2e {name}: ok  {how}; {checked} sectors checked at {site.name}, {verified} verified in the guest, "
              f"0 wrong, {time.monotonic() - began:.0f} s", flush=True)
        return True
    except (Failure, OSError, KeyError) as error:
        keep = True
        if stage:
            print(stage.logs())
        print(f"e2e {name}: FAILED {error!s}" + (f" (seed {args.seed}, logs in {stage.root})" if stage else ""),
              flush=True)
        return False
    finally:
        if stage:
            stage.close(keep)


def main():
    parser = argparse.ArgumentParser(prog="e2e", description=__doc__)
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help="default: all of " + ", ".join(SCENARIOS)
                        + "; only by name: " + ", ".join(disks.MORE))
    parser.add_argument("--qemu", choices=["7.2", "10.0"], help="default: the machine's own, else 10.0")
    parser.add_argument("--keep", action="store_true", help="leave the work folders of good runs behind too")
    parser.add_argument("--seed", type=int, default=1, help="of the guest's random I/O (1)")
    args = parser.parse_args()
    if unknown := [name for name in args.scenario if name not in ALL]:
        parser.error("no scenario " + ", ".join(unknown))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        tools = provide_tools(args.qemu)
    except Failure as error:
        print(f"e2e: FAILED {error}")
        return 1
    results = [run(name, tools, args) for name in args.scenario or SCENARIOS]
    print(f"{results.count(True)} passed, {results.count(False)} failed")
    return min(results.count(False), 100)


if __name__ == "__main__":
    sys.exit(main())
