# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Live-migrates a real Linux guest between two QEMUs, its disk moving between two blkferryds on different local
stores, while a verifying writer runs in the guest. Installs and builds what it needs. The last line says whether
every sector of the disk is as the guest left it."""

import argparse
import signal
import sys
import time

from process import Failure
from host import final_object
from stage import MIB, Stage, provide_tools, say

STRATEGIES = ["hybrid", "precopy", "postcopy", "mirror", "shared"]


def size(text):
    """Bytes, with an optional suffix K, M or G."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(text[:-1]) * factor if factor else int(text)


def human(count):
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f}{unit}" if unit != "B" else f"{count}B"
        count /= 1024
    return f"{count:.1f}GiB"


def arguments():
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--strategy", choices=STRATEGIES, default="hybrid")
    parser.add_argument("--qemu", choices=["7.2", "10.0"], help="default: the machine's own, else 10.0")
    parser.add_argument("--keep", action="store_true", help="leave the work folder behind")
    parser.add_argument("--size", type=size, default=256 * MIB, help="of the volume (default 256M)")
    parser.add_argument("--warmup", type=float, default=4, help="seconds of guest I/O before the migration (4)")
    parser.add_argument("--after", type=float, default=3, help="seconds of guest I/O after it (3)")
    parser.add_argument("--seed", type=int, default=None, help="of the guest's random I/O (default: the clock)")
    args = parser.parse_args()
    if args.size < 64 * MIB or args.size % MIB:
        parser.error("--size must be whole MiB and at least 64M")
    if args.seed is None:
        args.seed = int(time.time()) % 100000 + 1
    return args


def draw(progress, started):
    """One line of progress, drawn over the last one; only on a terminal."""
    moved = sum(progress.get(key) or 0 for key in ("push_bytes", "prefetch_bytes", "demand_bytes"))
    total = progress.get("modified_bytes") or 0
    share = min(1, moved / total) if total else 0
    bar = "#" * int(30 * share)
    sys.stderr.write(f"\r  [{bar:<30}] {progress.get('state', 'none'):<16} {human(moved):>10} of {human(total)}"
                     f"  {time.monotonic() - started:4.1f} s\x1b[K")
    sys.stderr.flush()


def migrate(stage, source, target, here, there, strategy):
    """Runs the client and shows its progress; returns (result, start, end) on the host's clock."""
    start = time.monotonic()
    client = source.client("migrate", "--to", target.address, "--strategy", strategy, "--qmp", here.path("qmp"),
                           "--vm-uri", there.uri, "--json")
    stage.processes.append(client)
    while client.running():
        stage.guest.expect_clean()
        for process in stage.alive(there):
            if not process.running():
                raise Failure(f"{process.name} ended during the migration, with status {process.popen.returncode}")
        if time.monotonic() - start > 180:
            raise Failure(f"the migration did not end within 180 s: {source.migration()}")
        if sys.stderr.isatty():
            draw(source.migration(), start)
        time.sleep(0.1)
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    with open(client.out, errors="replace") as out:
        text = out.read()
    if client.popen.returncode:
        raise Failure(f"blkferry migrate ended with status {client.popen.returncode}: {text[-500:]}")
    result = final_object(text)
    if result.get("state") != "completed":
        raise Failure(f"the migration is {result.get('state')}")
    return result, start, time.monotonic()


def play(stage, args):
    """The whole story; returns the last line."""
    a, b = stage.sites["a"], stage.sites["b"]
    here = stage.machine(a)
    there = stage.machine(b, incoming=True)
    began = time.monotonic()
    stage.guest.await_line("ready", 60, stage.alive(here))
    say(f"demo: the guest runs after {time.monotonic() - began:.1f} s; it writes for {args.warmup:g} s")
    time.sleep(args.warmup)
    stage.guest.await_io(1, 30, stage.alive(here))
    usual = stage.guest.longest_gap_ms(time.monotonic() - args.warmup * 0.75, time.monotonic())
    result, start, end = migrate(stage, a, b, here, there, args.strategy)
    holds = [site.migration().get(key, 0) / 1000 for site, key in ((a, "stop_hold_us"), (b, "start_hold_us"))]
    here.await_migrated(10)
    downtime = here.monitor.execute("query-migrate").get("downtime")
    here.quit()
    say(f"demo: the guest writes on at its new place for {args.after:g} s")
    time.sleep(args.after)
    stage.guest.await_io(1, 30, stage.alive(there))
    pause = stage.guest.longest_gap_ms(start, end)
    ios = stage.guest.last["ios"]
    say("demo: stopping the guest, restarting the destination's blkferryd, reading its disk from outside")
    checked, verified = stage.finish(b, there)
    print(f"daemons hold {sum(holds):.1f} ms of the pause: {holds[0]:.1f} at the stop, {holds[1]:.1f} at the start")
    return summary(result, pause, usual, downtime, ios, checked, verified, args)


def summary(result, pause, usual, downtime, ios, checked, verified, args):
    paths = {name: int(result[name + "_bytes"]) for name in ("push", "prefetch", "demand")}
    total, seconds = sum(paths.values()), result["total_ms"] / 1000
    print(f"  strategy {args.strategy}, threshold {result.get('threshold')}, volume {human(args.size)}, "
          f"modified {human(result.get('modified_bytes') or 0)}, on the wire {human(result.get('wire_bytes') or 0)}")
    print("  chunks: " + ", ".join(f"{result.get('chunks_' + name)} {name}"
                                   for name in ("pushed", "repushed", "pulled", "cancelled"))
          + f", {result.get('zero_chunks')} zero")
    print(f"  time: push {result.get('push_ms')} ms, handoff {result.get('handoff_ms')} ms, "
          f"pull {result.get('pull_ms')} ms")
    print(f"  guest: {ios} I/Os, {verified} sectors verified inside; longest wait for an I/O {pause} ms "
          f"({usual} ms before the migration), QEMU's downtime {downtime} ms")
    print(f"  outside: all {checked} sectors of the disk hold what the guest left (seed {args.seed})")
    print(f"  moved: {human(total)}, of these "
          + ", ".join(f"{human(count)} by {name}" for name, count in paths.items()))
    # For programs: bytes and seconds as plain numbers.
    parts = ", ".join(f"{name} {count}" for name, count in paths.items())
    return (f"demo: ok  migrated {total} in {seconds:.1f} ({parts}), guest pause {pause} ms, "
            f"{checked} blocks verified, 0 wrong")


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stage = None
    try:
        tools = provide_tools(args.qemu)
        say(f"demo: QEMU {tools['QEMU_VERSION']} ({tools['QEMU']}), seed {args.seed}")
        stage = Stage(tools, args.size, args.seed, listen="b")
        last = play(stage, args)
    except (Failure, OSError, KeyError, KeyboardInterrupt) as error:
        if stage:
            args.keep = True
            print(stage.logs() + f"demo: these logs lie in {stage.root}, the seed was {args.seed}")
        print("demo: FAILED " + (str(error) if isinstance(error, Failure) else repr(error)))
        return 1
    finally:
        if stage:
            stage.close(args.keep)
    if args.keep:
        say(f"demo: the work folder is {stage.root}")
    print(last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
