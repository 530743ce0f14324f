"""A TCP relay of limited speed, as a process of its own: a slow link that needs no root and works wherever tests do.

    python -m tests.support.slow_link HOST PORT BYTES_PER_S

It relays every connection to HOST:PORT and prints the port that it listens on. What comes back from there, over all
connections together, goes on at BYTES_PER_S at most (0: as fast as it comes); what goes there is not held up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import sys
import threading
import time

PIECE_BYTES = 64 << 10
"""Sent at once, and what may be sent without waiting after a pause."""
BUFFER_BYTES = 256 << 10
"""Of the kernel's, before the link: without a bound megabytes would wait there that nobody has received."""


@dataclasses.dataclass(slots=True)
class TokenBucket:
    """How long to wait so that no more than `bytes_per_s` goes on, but for one burst. Time is an argument."""

    bytes_per_s: float
    burst_bytes: int
    _full_at_s: float = 0.0
    """When the bucket would be full if nothing more were sent."""

    def wait_s(self, num_bytes: int, *, now_s: float) -> float:
        """Take `num_bytes` out, and say how long to wait before they may be sent."""
        if not self.bytes_per_s:
            return 0.0
        self._full_at_s = max(self._full_at_s, now_s) + num_bytes / self.bytes_per_s
        return max(0.0, self._full_at_s - now_s - self.burst_bytes / self.bytes_per_s)


class SlowLink:
    def __init__(self, host: str, port: int, bytes_per_s: float) -> None:
        self._target = (host, port)
        self._bucket = TokenBucket(bytes_per_s, PIECE_BYTES)
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]

    def close(self) -> None:
        """Take no more connections; those that there are go on."""
        self._listening.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        """Until it is closed, or the process ends."""
        while True:
            try:
                accepted, _ = self._listening.accept()
            except OSError:
                self._listening.close()
                return
            onward = socket.socket()
            onward.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            onward.connect(self._target)
            for sock in (accepted, onward):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._relay, args=[accepted, onward], daemon=True).start()

    def _relay(self, accepted: socket.socket, onward: socket.socket) -> None:
        forth = threading.Thread(target=self._pump, args=[accepted, onward, False], daemon=True)
        forth.start()
        self._pump(onward, accepted, True)
        forth.join()
        accepted.close()
        onward.close()

    def _pump(self, source: socket.socket, into: socket.socket, is_slow: bool) -> None:
        piece = memoryview(bytearray(PIECE_BYTES))
        with contextlib.suppress(OSError):  # Either end may go at any time.
            while count := source.recv_into(piece):
                if is_slow:
                    with self._lock:
                        wait_s = self._bucket.wait_s(count, now_s=time.monotonic())
                    time.sleep(wait_s)
                into.sendall(piece[:count])
        for sock in (source, into):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    link = SlowLink(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    sys.stdout.write(f"{link.port}\n")
    sys.stdout.flush()
    link.serve()
