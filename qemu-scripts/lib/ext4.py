# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What the host holds a guest's disk against: fsck and file contents of an image, results of fio, and the state of a
daemon's store. Each of them can say no; test_ext4.py shows it."""

import filecmp
import glob
import hashlib
import json
import os
import re
import shutil
import zlib

from process import Failure

JOURNAL_MAGIC, BOOT_ID, HEADER_CRC = b"BLKFJRNL", 24, 60  # docs/on-disk.md, journal.<g>


def fsck_findings(text):
    """The lines of e2fsck's output that are more than its progress. The exit status of `e2fsck -n` says little: it is
    0 after "Fix? no" too. An extent tree that could be smaller is nothing wrong."""
    usual = re.compile(r"e2fsck 1\.|Pass \d|.*: \d+/\d+ files .* blocks$"
                       r"|Inode \d+ extent tree .* could be (short|narrow)er")
    return [line for line in text.splitlines() if line.strip() and not usual.match(line)]


def expect_whole(text, status, where):
    """Fails on anything that e2fsck has found."""
    if status or fsck_findings(text) or "Pass 5" not in text:
        raise Failure(f"fsck {where} is not content: status {status}\n{text[-2000:]}")


def fsck(tree, image):
    """A whole check that repairs nothing; a journal that wants a replay is a finding too."""
    expect_whole(tree.run("sbin/e2fsck", "-f", "-n", image), 0, "on the host")


def extract(tree, image, folder):
    """All files of an image, read by debugfs: the kernel's ext4 has no part in it."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    text = tree.run("sbin/debugfs", "-R", f"rdump / {folder}", image)
    errors = [line for line in text.splitlines()
              if not line.startswith("debugfs 1.") and "changing ownership" not in line]
    if errors:
        raise Failure(f"debugfs {image}: " + "\n".join(errors[:5]))


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def compare(folder, wanted):
    """Holds the files of a folder against {name: sha256}; the empty record proves nothing and is refused."""
    if not wanted:
        raise Failure("no file to compare with")
    wrong = []
    for name, sha256 in sorted(wanted.items()):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            wrong.append(f"{name} is missing")
        elif digest(path) != sha256:
            wrong.append(f"{name} has other content")
    if wrong:
        raise Failure(f"{len(wrong)} of {len(wanted)} files are wrong: " + ", ".join(wrong[:8]))
    return len(wanted)


def sums(text):
    """{name: sha256} of sha256sum's output."""
    return {name.removeprefix("./"): sha256 for sha256, name in (line.split(None, 1) for line in text.splitlines())}


def fio_verified(text, size):
    """The bytes that fio has read back and found right. `size` is what each job had to verify: a job that verified
    less has proved less than was asked, whatever its exit status."""
    try:
        jobs = json.loads(text[text.index("{"):])["jobs"]
    except (ValueError, KeyError) as error:
        raise Failure(f"fio gave no result: {error}: {text[:300]}") from error
    total = 0
    for job in jobs:
        read = job["read"]["io_bytes"]
        if job["error"] or read < size or any(job[way]["short_ios"] for way in ("read", "write")):
            raise Failure(f"fio job {job['jobname']}: error {job['error']}, {read} of {size} bytes verified")
        total += read
    if not total:
        raise Failure("fio ran no job")
    return total


def allocated(path):
    return os.stat(path).st_blocks * 512


def same_content(left, right):
    filecmp.clear_cache()
    return filecmp.cmp(left, right, shallow=False)


def pretend_host_crash(state_dir):
    """Makes a stopped daemon's store look as if the host had gone down since: recovery may then believe only what a
    flush of the guest has committed, though here the rest reached the disk as well."""
    journals = glob.glob(os.path.join(state_dir, "journal.*"))
    for path in journals:
        with open(path, "r+b") as file:
            header = bytearray(file.read(HEADER_CRC))
            if header[:8] != JOURNAL_MAGIC:
                raise Failure(f"{path} is no journal")
            header[BOOT_ID:BOOT_ID + 16] = os.urandom(16)
            file.seek(0)
            file.write(header + zlib.crc32(header).to_bytes(4, "little"))
    if not journals:
        raise Failure(f"no journal in {state_dir}")
