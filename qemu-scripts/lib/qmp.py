# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A client of QEMU's monitor protocol: commands in, returns out, events ignored (states are polled)."""

import json
import socket

from process import Failure


class Qmp:
    def __init__(self, path, timeout=30):
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.lines = self.socket.makefile("r")
        self.receive()  # the greeting
        self.execute("qmp_capabilities")

    def receive(self):
        line = self.lines.readline()
        if not line:
            raise Failure(f"QEMU closed its monitor {self.path}")
        return json.loads(line)

    def execute(self, command, **arguments):
        """Runs a command; returns its result, fails with QEMU's own words."""
        request = {"execute": command, "arguments": arguments}
        try:
            self.socket.sendall(json.dumps(request).encode() + b"\n")
            while True:
                answer = self.receive()
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise Failure(f"QEMU refused {command}: {answer['error'].get('desc')}")
        except OSError as error:
            raise Failure(f"QEMU's monitor {self.path}: {command}: {error}") from error
