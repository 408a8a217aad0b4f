# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Programs out of a tree of unpacked Debian packages that has all they need, its own C library too: the tree's own
loader runs them, so what the machine has installed does not matter."""

import functools
import os
import re
import subprocess

from process import Failure


class Tree:
    LOADER = "lib64/ld-linux-x86-64.so.2"

    def __init__(self, root):
        self.root = root

    def path(self, name):
        return os.path.join(self.root, name)

    @functools.cached_property
    def loader(self):
        folders = sorted(folder for folder, _, files in os.walk(self.root)
                         if any(re.match(r"lib.*\.so\.\d", name) for name in files))
        return [self.path(self.LOADER), "--inhibit-cache", "--library-path", ":".join(folders)]

    def libraries(self, program):
        """Every library that the program is linked with, however far off: {soname: path}."""
        done = subprocess.run([*self.loader, "--list", self.path(program)], capture_output=True, text=True, check=False)
        lines = [line.split() for line in done.stdout.splitlines()]
        missing = [words[0] for words in lines if words[1:] == ["=>", "not", "found"]]
        if done.returncode or missing:
            raise SystemExit(f"{program}: cannot be loaded: {' '.join(missing)} {done.stderr}")
        return {words[0]: words[2] for words in lines if words[1:2] == ["=>"]}

    def run(self, program, *words, expect=(0,)):
        """Runs a program on this machine; returns its output, both streams."""
        done = subprocess.run([*self.loader, self.path(program), *words], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                              check=False)
        if done.returncode not in expect:
            raise Failure(f"{os.path.basename(program)} {' '.join(words)}: status {done.returncode}\n"
                          f"{done.stdout[-2000:]}")
        return done.stdout
