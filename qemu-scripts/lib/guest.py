# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The guest as the host hears it: lines of its writer, over whichever QEMU it runs in at the moment.

During a migration the guest's port moves from one QEMU's socket to the other's. At any time only one of them speaks,
so one thread reads them all into one stream; a line that was cut by the migration is whole again.

The pause is measured here, on the host's clock, as the longest time in which the guest completed no I/O: a stopped
guest's own clock stands still, and QEMU's downtime does not know when the disk answered again.
"""

import re
import selectors
import socket
import threading
import time

from process import Failure, wait_for


class Guest:
    def __init__(self):
        self.selector = selectors.DefaultSelector()
        self.lock = threading.Lock()
        self.partial = b""
        self.beats = []    # (host time, completed I/Os), one for each change
        self.last = {}     # fields of the last beat
        self.heard = time.monotonic()
        self.record = []
        self.lines = []    # everything but beats and records
        self.live = None   # the port that spoke last
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def attach(self, path):
        """Listens also to the port of one more QEMU."""
        port = socket.socket(socket.AF_UNIX)
        port.connect(path)
        with self.lock:
            self.selector.register(port, selectors.EVENT_READ)
            self.live = self.live or port

    def listen(self):
        while True:
            if not self.selector.get_map():
                time.sleep(0.01)
                continue
            for key, _ in self.selector.select(0.05):
                try:
                    data = key.fileobj.recv(1 << 16)
                except OSError:
                    data = b""
                with self.lock:
                    if data:
                        self.live = key.fileobj
                        self.take(data)
                    else:
                        self.selector.unregister(key.fileobj)
                        key.fileobj.close()

    def take(self, data):
        now = self.heard = time.monotonic()
        *lines, self.partial = (self.partial + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            if text.startswith("beat "):
                self.last = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", text)}
                if not self.beats or self.beats[-1][1] != self.last["ios"]:
                    self.beats.append((now, self.last["ios"]))
            elif text.startswith(("record ", "r ", "end ")):
                self.record.append(text)
            elif text:
                self.lines.append(text)

    def find(self, prefix):
        """The last line that starts so, or None."""
        with self.lock:
            return next((line for line in reversed(self.lines) if line.startswith(prefix)), None)

    def complaints(self):
        with self.lock:
            return [line for line in self.lines if line.startswith(("WRONG", "FATAL"))]

    def expect_clean(self):
        """Fails at once when the writer has already seen something wrong."""
        if bad := self.complaints():
            raise Failure("the guest found wrong data:\n    " + "\n    ".join(bad[:10]))

    def await_line(self, prefix, timeout, alive):
        def there():
            if self.find("FATAL"):
                raise Failure(f"the guest's writer gave up: {self.find('FATAL')}")
            return self.find(prefix)
        return wait_for(f"guest says '{prefix}'", there, timeout, alive=alive)

    def await_io(self, count, timeout, alive):
        """Waits until the guest has completed `count` more I/Os."""
        goal = self.last.get("ios", 0) + count
        try:
            wait_for(f"guest completes {count} more I/Os", lambda: self.last.get("ios", 0) >= goal, timeout,
                     alive=alive)
        except Failure as failure:
            silent = time.monotonic() - self.heard
            raise Failure(f"{failure}; " + (
                f"nothing was heard of it for {silent:.0f} s: see its console log" if silent > 2 else
                f"it is alive, but its disk has answered nothing since I/O {self.last.get('ios', 0)} or too slowly: "
                "a request was lost or waits")) from None
        self.expect_clean()

    def longest_gap_ms(self, start, end):
        """The longest time between two completions that overlaps [start, end] of the host's monotonic clock."""
        with self.lock:
            beats = list(self.beats)
        gaps = [b - a for (a, _), (b, _) in zip(beats, beats[1:]) if b > start and a < end]
        return round(max(gaps, default=0) * 1000)

    def stop(self, timeout, alive):
        """Ends the writer, returns (record text, sectors verified in the guest, wrong)."""
        with self.lock:
            if self.live is None:
                raise Failure("the guest has no open port")
            self.live.sendall(b"stop\n")
        done = self.await_line("done ", timeout, alive)
        blocks, wrong = (int(n) for n in re.findall(r"=(\d+)", done))
        return "\n".join(self.record) + "\n", blocks, wrong
