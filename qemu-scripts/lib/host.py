# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""One host of the story: a blkferryd with its store, its sockets and its API."""

import http.client
import json
import os
import shutil
import signal
import socket

from process import Failure, Process, tail, wait_for

ENDED = ("completed", "failed", "cancelled")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=5)
        self.unix_path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.unix_path)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Site:
    def __init__(self, tools, root, name, base, size, listen, bandwidth=None, queues=2,
                 extra=()):
        self.tools, self.name = tools, name
        self.folder = os.path.join(root, name)
        os.makedirs(os.path.join(self.folder, "state"))
        self.vhost = os.path.join(self.folder, "vhost.sock")
        self.api = os.path.join(self.folder, "api.sock")
        self.log = os.path.join(self.folder, "blkferryd.log")
        self.address = f"127.0.0.1:{free_port()}"
        self.argv = [tools["BLKFERRYD"], "--socket-path", self.vhost, "--state-dir", os.path.join(self.folder, "state"),
                     "--size", str(size), "--api-socket", self.api, "--num-queues", str(queues)]
        if base:
            self.argv += ["--base", base]
        if listen:
            self.argv += ["--listen", self.address]
        if bandwidth:
            self.argv += ["--bandwidth", str(bandwidth)]
        self.argv += extra
        self.daemon = None

    def resized(self, size):
        """Begins anew with another size: an empty store, and the arguments that go with it."""
        state = os.path.join(self.folder, "state")
        shutil.rmtree(state)
        os.makedirs(state)
        self.argv[self.argv.index("--size") + 1] = str(size)

    def start(self):
        """Starts the daemon, always with the same arguments, and waits until it serves."""
        self.daemon = Process(f"blkferryd {self.name}", self.argv, self.log)
        wait_for(f"blkferryd {self.name} serves", self.serves, 20, alive=[self.daemon])

    def serves(self):
        """Whether the API answers. A socket file alone proves nothing: a killed daemon leaves its own behind."""
        return os.path.exists(self.vhost) and self.get("/api/v1/volume") is not None

    def kill(self):
        """The crash: no chance to write anything more."""
        self.daemon.end(signal.SIGKILL)

    def stop(self):
        """The orderly end; the contract says exit status 0 after SIGTERM."""
        status = self.daemon.end(signal.SIGTERM)
        if status != 0:
            why = "did not end within 20 s of SIGTERM" if status is None else f"ended with status {status}"
            raise Failure(f"blkferryd {self.name} {why}")

    def get(self, path):
        """GET of the API: (status, object), or None when the daemon does not answer."""
        connection = UnixConnection(self.api)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"{}")
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def migration(self):
        """What the API says of the migration; {} when the daemon cannot be asked or knows of none."""
        status, value = self.get("/api/v1/migration") or (0, {})
        return value if status == 200 and isinstance(value, dict) else {}

    def state(self):
        return self.migration().get("state", "none")

    def await_state(self, wanted, timeout, alive=()):
        """Waits for one of the states; a final state that is not wanted fails at once."""
        def reached():
            state = self.state()
            if state in wanted:
                return state
            if state in ENDED:
                raise Failure(f"migration at {self.name}: {state}, wanted {' or '.join(wanted)}: {self.migration()}")
            return None
        return wait_for(f"migration at {self.name} becomes {' or '.join(wanted)}", reached, timeout,
                        alive=[self.daemon, *alive])

    def client(self, *words, log=None):
        """Starts the `blkferry` client; its standard output goes to a file of its own."""
        log = log or os.path.join(self.folder, f"blkferry-{words[0]}.log")
        argv = [self.tools["BLKFERRY"], "--api-socket", self.api, *words]
        with open(log + ".out", "wb") as out:
            process = Process(f"blkferry {words[0]}", argv, log, stdout=out)
        process.out = log + ".out"
        return process

    def run_client(self, *words, timeout=60):
        """Runs the client to its end; fails unless its status is 0. Returns its output."""
        process = self.client(*words)
        status = process.wait(timeout)
        with open(process.out, errors="replace") as out:
            text = out.read()
        if status != 0:
            raise Failure(f"blkferry {words[0]} at {self.name} ended with status {status}\n{tail(process.log, 8)}"
                          f"{tail(process.out, 8)}")
        return text


def final_object(text):
    """The last line that is a JSON object with a result in it."""
    for line in reversed(text.splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "total_ms" in value:
            return value
    raise Failure("blkferry migrate --json did not end with its result object")
