# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Processes with a log, ended by pid, and errors that show where to look."""

import os
import shutil
import signal
import subprocess
import time


class Failure(Exception):
    """Something that fails the run; the message is for the user."""


def wait_for(what, condition, timeout, step=0.02, alive=()):
    """Polls `condition` until it is true and returns its value; fails after `timeout` seconds, or as soon as one of
    the processes in `alive` has ended."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        for process in alive:
            if not process.running():
                raise Failure(f"{what}: {process.name} ended with status {process.popen.returncode}")
        if time.monotonic() > end:
            raise Failure(f"{what}: not within {timeout} s")
        time.sleep(step)


class Process:
    """A child process whose output goes to a log file."""

    def __init__(self, name, argv, log, env=None, stdout=None):
        self.name, self.log = name, log
        # If this script is killed hard, its children must not stay behind.
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with open(log, "ab") as out:
            out.write(("$ " + " ".join(argv) + "\n").encode())
            out.flush()
            self.popen = subprocess.Popen(guard + argv, stdin=subprocess.DEVNULL, stdout=stdout or out, stderr=out,
                                          env=dict(os.environ, **(env or {})), start_new_session=True)

    def running(self):
        return self.popen.poll() is None

    def end(self, sig=signal.SIGTERM, timeout=20):
        """Sends a signal and waits; a process that ignores it is killed and None returned, else its status."""
        if self.running():
            self.popen.send_signal(sig)
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            return None

    def wait(self, timeout):
        """The exit status; fails when the process does not end in time."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name}: still running after {timeout} s") from None


def tail(path, lines=25):
    """The end of a log, indented."""
    try:
        with open(path, "r", errors="replace") as log:
            text = log.read().splitlines()[-lines:]
    except OSError as error:
        text = [str(error)]
    return "".join(f"    {line[:300]}\n" for line in text)
