# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Commands in the guest (guest/serve at its other end): text out, status back, and notes of what runs in the
background there. A command that fails is a Failure, and so is a guest that boots when nobody asked it to."""

import re
import select
import socket
import time

from process import Failure, tail


class Shell:
    def __init__(self, machine):
        self.machine = machine
        self.partial, self.number = b"", 0
        self.boots, self.expected_boots = 0, 1
        self.output, self.ended = [], None
        self.notes = []
        self.port = socket.socket(socket.AF_UNIX)
        self.port.connect(machine.path("port"))

    def take(self, data):
        """Bytes from the guest, in pieces of any size."""
        *lines, self.partial = (self.partial + data).split(b"\n")
        for line in lines:
            word, _, text = line.decode(errors="replace").partition(" ")
            if word == "note":
                self.notes.append(text)
            elif word == "ready":
                self.boots += 1
            elif word in ("out", "end"):
                number, _, text = text.partition(" ")
                if number != str(self.number):
                    continue  # of a command that was given up
                if word == "out":
                    self.output.append(text)
                else:
                    self.ended = [int(n) for n in text.split()]
        if self.boots > self.expected_boots:
            raise Failure(f"the guest of {self.machine.name} has booted by itself\n"
                          + tail(self.machine.path("console.log")))

    def pump(self, seconds):
        """Hears what the guest says, for at most so long; False once its QEMU is gone and all it said was heard."""
        if not select.select([self.port], [], [], seconds)[0]:
            return True
        try:
            data = self.port.recv(1 << 16)
        except OSError:
            data = b""
        self.take(data)
        return bool(data)

    def drain(self):
        """Hears all that a killed guest has said."""
        while self.pump(1):
            pass

    def until(self, what, condition, timeout):
        end = time.monotonic() + timeout
        while not condition():
            if not self.pump(0.2) or not self.machine.process.running():
                raise Failure(f"{what}: QEMU {self.machine.name} has ended")
            if time.monotonic() > end:
                raise Failure(f"{what}: not within {timeout} s\n" + tail(self.machine.path("console.log")))

    def await_ready(self, timeout=60):
        self.until("the guest boots", lambda: self.boots == self.expected_boots, timeout)

    def rest(self, seconds):
        """Lets time pass without missing what the guest says."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not self.pump(left):
                raise Failure(f"QEMU {self.machine.name} has ended")

    def send(self, command):
        if "\n" in command:
            raise ValueError("one line, please")
        self.number, self.output, self.ended = self.number + 1, [], None
        try:
            self.port.sendall(f"{self.number} {command}\n".encode())
        except OSError as error:
            raise Failure(f"QEMU {self.machine.name} has ended: {error}") from error

    def attempt(self, command, timeout=60):
        """Runs a command; returns (status, output)."""
        self.send(command)
        self.until(f"guest runs '{command[:200]}'", lambda: self.ended is not None, timeout)
        status, lines = self.ended
        if lines != len(self.output):
            raise Failure(f"guest runs '{command[:200]}': {len(self.output)} of {lines} lines were heard")
        return status, "\n".join(self.output)

    def run(self, command, timeout=60):
        """Runs a command that must work; returns its output."""
        status, text = self.attempt(command, timeout)
        if status:
            raise Failure(f"guest runs '{command[:200]}': status {status}\n{text[-3000:]}")
        return text

    def start(self, command):
        """Starts a command in the background."""
        self.run(f"({command}) > /tmp/background.$$ 2>&1 &")

    def reboot(self, how, timeout=60):
        """Resets the guest by calling `how`, and waits until it is up again."""
        self.expected_boots += 1
        how()
        self.await_ready(timeout)

    def noted(self, pattern):
        """The matches of a pattern among the notes, in order."""
        return [match for note in self.notes if (match := re.fullmatch(pattern, note))]
