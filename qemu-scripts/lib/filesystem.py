# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A real guest's ext4 on a blkferryd disk: fio that verifies what it reads back, discards, daemons killed under load,
power cuts, resets. In the end the guest's fsck, and on the host fsck and file contents of a copy of the disk, must all
be content."""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
import traceback

import ext4
from desk import Desk
from process import Failure, wait_for
from stage import MIB, provide_tools, say

DIRECT = "--ioengine=libaio --direct=1"


def human(count):
    return f"{count / MIB:.0f} MiB"


def verify(args, tools):
    """Everything that a file system does to a disk, in peace; first the bare disk, then ext4 with fstrim."""
    desk = Desk(tools, args)
    yield desk
    shell = desk.boot(copy=True)
    raw = f"--filename=/dev/vda {DIRECT}"
    desk.fio(f"--name=trims {raw} --rw=randtrimwrite --bs=16k --size=8m --iodepth=8", 8 * MIB)
    desk.fio(f"--name=small {raw} --rw=randrw --bsrange=512-64k --size=8m --offset=9m --iodepth=16", 8 * MIB)
    zeros_between(desk)
    before = ext4.allocated(desk.layer)
    desk.make()
    after = ext4.allocated(desk.layer)
    if after > before - 16 * MIB:
        raise Failure(f"mke2fs discards the disk, but the layer has {human(after)} of {human(before)} left")
    desk.fio(f"--name=whole --directory=/mnt {DIRECT} --rw=randwrite --bsrange=4k-64k --size=24m --iodepth=16",
             24 * MIB)
    desk.fio(f"--name=mixed --directory=/mnt {DIRECT} --rw=randrw --bsrange=512-32k --size=12m --iodepth=8 "
             "--verify_backlog=32", 12 * MIB)
    desk.fio_apart("--name=cached --directory=/mnt --ioengine=psync --rw=randwrite --bs=2k --size=8m --numjobs=2 "
                   "--fsync=256", 8 * MIB, jobs=2)
    desk.fio_apart("--name=mapped --directory=/mnt --ioengine=mmap --rw=randwrite --bs=4k --size=8m", 8 * MIB)
    wanted = desk.some_files("keep", 24)
    desk.some_files("drop", 12)
    trimmed = fstrim(desk)
    desk.fio(f"--name=cached --directory=/mnt --ioengine=psync --rw=randwrite --bs=2k --size=8m --numjobs=2 "
             "--verify_only", 8 * MIB, jobs=2)
    desk.expect_files(wanted)
    shell.run("rm -rf /mnt/cached* /mnt/mapped*")
    files = desk.finish(wanted)
    return f"{human(desk.verified)} verified by fio, {human(trimmed)} given back by fstrim, {files} files compared"


def zeros_between(desk):
    """A discarded and a zeroed range, both at odd sectors, read as zeros; what lies before, between and behind them is
    as it was."""
    shell, first, count = desk.shell, (20 * MIB >> 9) + 3, 4 * 2048 + 5
    second = first + count + 1000
    shell.run("head -c 12582912 /dev/urandom > /tmp/raw; dd if=/tmp/raw of=/dev/vda bs=1M seek=19 conv=fsync")
    for option, at in (("", first), ("-z ", second)):
        shell.run(f"/tools/blkdiscard -f {option}-o {at * 512} -l {count * 512} /dev/vda")
        shell.run(f"dd if=/dev/zero of=/tmp/raw bs=512 seek={at - 19 * 2048} count={count} conv=notrunc")
    desk.drop_caches()
    shell.run("dd if=/dev/vda of=/tmp/now bs=1M skip=19 count=12 && cmp /tmp/raw /tmp/now")
    shell.run("rm /tmp/now /tmp/raw")


def fstrim(desk):
    """Removes 32 MiB and more of files; returns how much of it came back to the host."""
    desk.shell.run("sync; /tools/fstrim /mnt")
    before = ext4.allocated(desk.layer)
    desk.shell.run("rm -rf /mnt/drop /mnt/whole* /mnt/mixed*; sync; /tools/fstrim -v /mnt")
    freed = before - ext4.allocated(desk.layer)
    if freed < 35 * MIB:
        raise Failure(f"36 MiB of files were removed, fstrim gave {human(freed)} back")
    return freed


def kill(args, tools):
    """The daemon is killed again and again while fio and a maker of files are at work; the guest never learns of it."""
    desk = Desk(tools, args)
    yield desk
    dice = random.Random(args.seed)
    shell = desk.boot(copy=True)
    desk.make("discard")
    wanted = desk.some_files("keep", 16)
    desk.load(args.seed)
    waiting = 0
    for _ in range(args.kills):
        desk.await_work()
        shell.rest(dice.uniform(0.2, 2.5))
        desk.kill_daemon()
        shell.rest(dice.uniform(0.5, 1.2))
        waiting += desk.counted()[2]
        desk.site.start()
    if waiting < args.kills:
        raise Failure(f"only {waiting} requests waited for the daemon in {args.kills} kills: that was no load")
    desk.await_work()
    runs = desk.end_load()
    wanted |= desk.synced()
    desk.expect_files(wanted)
    files = desk.finish(wanted)
    return (f"killed {args.kills} times with {waiting} requests waiting, {runs} fio runs verified "
            f"{human(desk.verified)}, {files} files compared")


def golden_image(wanted):
    """Gives a maker of a base image with an ext4 and some files, whose digests it adds to `wanted`. The image ends
    inside a chunk."""
    def make(desk):
        folder, image = os.path.join(desk.root, "golden"), os.path.join(desk.root, "base.raw")
        os.makedirs(os.path.join(folder, "golden"))
        dice = random.Random(7)
        for n in range(24):
            path = os.path.join(folder, "golden", f"g{n}")
            with open(path, "wb") as out:
                out.write(dice.randbytes(n * n * 700 + 1))
            wanted[f"golden/g{n}"] = ext4.digest(path)
        desk.tree.run("sbin/mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", folder, image, f"{96 * 1024 - 28}k")
        return image
    return make


def power_cut(args, tools):
    """The VM loses its power under load, on a base image: the next one replays the journal and finds every file that
    was synced. Once the daemon is killed just before, once it lives on, once the host seems to have gone down."""
    wanted = {}
    desk = Desk(tools, args, base=golden_image(wanted))
    yield desk
    desk.boot()
    desk.mount("discard")
    desk.shell.run("/tools/resize2fs /dev/vda", 60)
    for seed, how in enumerate(("daemon", "machine", "host"), 1):
        desk.load(seed)
        desk.await_work(300)
        desk.shell.rest(3)
        if how != "machine":
            desk.kill_daemon()
            desk.shell.rest(0.5)
        desk.shell.machine.kill()
        desk.shell.drain()
        synced = desk.synced()
        if not synced:
            raise Failure("the guest had not synced a single file")
        wanted |= synced
        for gone in desk.shell.noted(r"gone (\S+)"):
            wanted.pop(f"files/{gone[1]}", None)
        if how == "host":
            ext4.pretend_host_crash(os.path.join(desk.site.folder, "state"))
        if how != "machine":
            desk.site.start()
        shell = desk.boot(copy=how == "host")
        desk.mount("discard")
        if "recovery complete" not in shell.run("dmesg"):
            raise Failure("ext4 had no journal to replay: that was no power cut")
        desk.expect_files(wanted)
        # The journal's replay must have left a whole file system, before anything new is written to it.
        desk.unmount()
        desk.mount("discard")
    files = desk.finish(wanted)
    return f"3 power cuts, each with a replay of the journal, {files} files compared"


def queues(args, tools):
    """Four queues of 256: the cache mode changes at run time, the guest is reset under load, also without a daemon."""
    desk = Desk(tools, args, queues=4, queue_size=256, cpus=4)
    yield desk
    shell = desk.boot(copy=True)
    found = shell.run("ls /sys/block/vda/mq | wc -l"), shell.run("cat /sys/block/vda/queue/nr_requests")
    if found != ("4", "256"):
        raise Failure(f"the guest sees {found[0]} queues of {found[1]}")
    desk.make()
    wanted = desk.some_files("keep", 12)
    job = f"--directory=/mnt {DIRECT} --rw=randwrite --bs=8k --size=2m --numjobs=4 --iodepth=64"
    for mode in ("write through", "write back"):
        cache_mode(desk, mode)
        desk.fio(f"--name=mode {job} --fsync=16", 2 * MIB, jobs=4)
        desk.kill_daemon()
        desk.site.start()
        # QEMU (10.0) dies when the guest sets the mode while the daemon is away.
        desk.await_reconnected()
        expect_cache_mode(desk, mode)
    for daemon in ("alive", "dead"):
        desk.load(len(wanted))
        desk.await_work(100)
        if daemon == "dead":
            desk.kill_daemon()
        reset(desk)
        if daemon == "dead":
            time.sleep(1.5)
            desk.site.start()
        shell.await_ready()
        desk.mount()
        wanted |= desk.synced()
        for gone in shell.noted(r"gone (\S+)"):
            wanted.pop(f"files/{gone[1]}", None)
        desk.expect_files(wanted)
        desk.fio(f"--name=again {job}", 2 * MIB, jobs=4)
    files = desk.finish(wanted)
    return f"2 resets, {human(desk.verified)} verified by fio over 4 queues, {files} files compared"


def cache_mode(desk, mode):
    desk.shell.run(f"echo '{mode}' > /sys/block/vda/cache_type")
    expect_cache_mode(desk, mode)


def expect_cache_mode(desk, mode):
    """Guest and daemon must agree: a guest that believes in write-through sends no flush."""
    guest = desk.shell.run("cat /sys/block/vda/cache_type")
    if guest != mode:
        raise Failure(f"the guest's cache mode is '{guest}', wanted '{mode}'")
    # What the API tells may be a moment old.
    wait_for(f"the daemon's cache mode is '{mode}' too", lambda: desk.volume()["write_cache"] == (mode == "write back"),
             5)


def reset(desk):
    """The reset button."""
    desk.shell.expected_boots += 1
    desk.shell.machine.monitor.execute("system_reset")


def damage(args, tools):
    """The checks' own check: one byte of the layer is turned on the host, and fio must notice; then fsck must."""
    desk = Desk(tools, args, size=64 * MIB)
    yield desk
    shell = desk.boot()
    desk.make()
    job = "--name=data --directory=/mnt --ioengine=psync --rw=randwrite --bs=4k --size=4m"
    desk.fio_apart(job, 4 * MIB)
    shell.run("umount /mnt")  # until then the file's place may stand in the journal alone
    block = int(desk.tree.run("sbin/debugfs", "-R", "bmap /data.0.0 500", desk.layer).split()[-1])
    desk.mount()
    turn_byte(desk.layer, block * 4096 + 1000)
    expect_failure("fio", "verify failed at", lambda: desk.fio(f"{job} --verify_only", 4 * MIB))
    turn_byte(desk.layer, block * 4096 + 1000)
    desk.drop_caches()
    desk.fio(f"{job} --verify_only", 4 * MIB)
    desk.unmount()
    turn_byte(desk.layer, 4096 + 18)  # in the group descriptors
    expect_failure("fsck", "fsck in the guest is not content", desk.fsck)
    return "fio and fsck notice one wrong byte each"


def turn_byte(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x5a]))
        file.flush()
        os.fsync(file.fileno())


def expect_failure(who, word, action):
    try:
        action()
    except Failure as failure:
        if word in str(failure):
            return
        raise
    raise Failure(f"{who} did not notice a wrong byte")


SCENARIOS = {"verify": verify, "kill": kill, "power-cut": power_cut, "queues": queues, "damage": damage}


def run(name, tools, args):
    """Plays one scenario; True when it holds. It hands its desk out first, so that it is cleared away in any case."""
    began, desk, keep = time.monotonic(), None, args.keep
    try:
        play = SCENARIOS[name](args, tools)
        desk = next(play)
        try:
            next(play)
        except StopIteration as end:
            told = end.value
        print(f"filesystem {name}: ok  {told}, {time.monotonic() - began:.0f} s", flush=True)
        return True
    except Exception as error:  # whatever it is: the other scenarios are to run, and the logs to stay
        keep = True
        if not isinstance(error, Failure):
            traceback.print_exc()
        if desk:
            print(desk.logs())
        print(f"filesystem {name}: FAILED {error!s}" + (f" (seed {args.seed}, logs in {desk.root})" if desk else ""),
              flush=True)
        return False
    finally:
        if desk:
            desk.close(keep)


def main():
    parser = argparse.ArgumentParser(prog="filesystem", description=__doc__)
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help="default: all of " + ", ".join(SCENARIOS))
    parser.add_argument("--qemu", choices=["7.2", "10.0"], help="default: the machine's own, else 10.0")
    parser.add_argument("--cache", metavar="MODE", help="passed on to blkferryd")
    parser.add_argument("--kills", type=int, default=5, help="of the daemon in scenario kill (5)")
    parser.add_argument("--keep", action="store_true", help="leave the work folders of good runs behind too")
    parser.add_argument("--seed", type=int, default=1, help="of the load and the moments of the kills (1)")
    args = parser.parse_args()
    if unknown := [name for name in args.scenario if name not in SCENARIOS]:
        parser.error("no scenario " + ", ".join(unknown))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        tools = provide_tools(args.qemu, "--tools")
    except Failure as error:
        print(f"filesystem: FAILED {error}")
        return 1
    say(f"filesystem: QEMU {tools['QEMU_VERSION']} ({tools['QEMU']}), seed {args.seed}")
    results = [run(name, tools, args) for name in args.scenario or SCENARIOS]
    print(f"{results.count(True)} passed, {results.count(False)} failed")
    return min(results.count(False), 100)


if __name__ == "__main__":
    sys.exit(main())
