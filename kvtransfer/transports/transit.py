"""One message that a library carries, as the thread sees it that waits for it: done, failed, or the peer is gone."""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading

from disaggregated.errors import PeerLost
from kvtransfer.deadline import Deadline
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.packed import heed


class Doorbell:
    """A descriptor that can be read once something has happened: rung by any thread, waited for in `poll`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        """Harmless once it is closed."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def silence(self) -> None:
        """Before looking at what has happened, so that what happens after the look rings again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def wait(self, deadline: Deadline) -> bool:
        """True once it was rung; False at the deadline."""
        waiting = select.poll()
        waiting.register(self._fd, select.POLLIN)
        return bool(waiting.poll(math.ceil(deadline.left_s() * 1000)))

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


class Transit:
    """One message on its way. Its buffer is the library's until `is_done`."""

    def __init__(self, bell: Doorbell, *, library: str) -> None:
        """`bell` may be that of many transits."""
        self._bell = bell
        self._library = library
        self._failure: str | None = None
        self.is_done = False

    def end(self, failure: str | None = None) -> None:
        """By whoever asks the library. `failure` is why it did not arrive."""
        self._failure = failure
        self.is_done = True
        self._bell.ring()

    def wait(self, connection: FrameSocket, *, listening: bool) -> None:
        """Until it has arrived. `listening`: whatever the peer says meanwhile ends the wait, too.

        Raises PeerLost when the message failed, the peer has closed, or nothing came for the progress timeout;
        TransferTimeout; the error that a REFUSED of the peer carries.
        """
        while not self.is_done:
            self._bell.silence()
            if not self.is_done:
                heed(connection, self._bell.fileno(), listening=listening)
        self.check()

    def wait_alone(self, deadline: Deadline) -> None:
        """The same where no connection can be listened to. Raises PeerLost."""
        while not self.is_done:
            self._bell.silence()
            if not self.is_done and not self._bell.wait(deadline):
                raise PeerLost(f"{self._library}: no message came in time")
        self.check()

    def check(self) -> None:
        """Raises PeerLost when it is done, and has failed."""
        if self._failure is not None:
            raise PeerLost(f"{self._library}: {self._failure}")
