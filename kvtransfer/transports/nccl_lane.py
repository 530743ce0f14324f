"""A process group of two, for one connection: the source is rank 0, the destination rank 1.

    destination                                              source
    listens for gloo, HELLO tells where    ── control ──▶
                                           ◀── control ──    listens for gloo, WELCOME tells where
    at its first receive: connects         ═══  gloo  ═══    at its first send: connects

What is told, a store of our own hands to torch: there is no rendezvous server, and an address is believed only when it
came in a proven frame. Connecting waits for the other end and cannot be stopped, so it waits until both ends are there.

Waiting for a gloo message blocks in C++, deaf to all but its own deadline. So a thread of the lane does that, and who
waits for the message listens to the control socket, too. That thread is ended by the one thing that closes a gloo pair
at once: a receive that times out. It is a fence as well: from then on nothing is written into a buffer of ours.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import distributed

from disaggregated.errors import TransferError
from kvtransfer.deadline import Deadline
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.transit import Doorbell, Transit

if not (distributed.is_available() and distributed.is_gloo_available()):
    raise ImportError("this build of torch has no gloo")

LIBRARY: Final = "NCCL (gloo)"
JOIN_TIMEOUT_S: Final = 2.0
"""For the other end to listen, and to connect: it was there a moment ago."""
MESSAGE_TIMEOUT_S: Final = 60.0
"""The last resort: whoever waits for a message has given up long before."""
ADDRESS_BYTES_MAX: Final = 4096
_CLOSE_TIMEOUT_S: Final = 2 * JOIN_TIMEOUT_S
_AT_ONCE: Final = datetime.timedelta(milliseconds=1)
_BLOCKS_TAG: Final = 1
_NEVER_SENT_TAG: Final = 2


class GlooLane:
    """Our rank of a group of two. The group is made on the lane's thread, which then waits for each message."""

    def __init__(self, our_host: str, *, rank: int) -> None:
        self._our_host = our_host
        self._rank = rank
        self._bell = Doorbell()
        self._store = _Addresses()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kv-NCCL-lane")
        self._jobs: list[concurrent.futures.Future[None]] = []
        self._peer = b""
        self._group: Any = None
        self._failure = ""
        self._is_closed = False
        self._submit(self._make)

    def address(self, *, deadline: Deadline) -> bytes:
        """Raises TransferError when gloo cannot listen, TransferTimeout when the deadline is before we know."""
        ours = self._store.ours(deadline.no_later_than(JOIN_TIMEOUT_S))
        if ours is None:
            if not self._failure:
                deadline.check("gloo to listen")
            raise TransferError(f"gloo does not listen on {self._our_host}: {self._failure or 'it says nothing'}")
        return ours

    def connect(self, peer: bytes, *, deadline: Deadline) -> None:
        """Only notes the address: see above."""
        if not 0 < len(peer) <= ADDRESS_BYTES_MAX:
            raise TransferError(f"a gloo address of {len(peer)} bytes")
        self._peer = peer

    def send(self, message: memoryview) -> Transit:
        tensor = torch.frombuffer(message, dtype=torch.uint8)
        return self._follow(lambda group: group.send([tensor], 1 - self._rank, _BLOCKS_TAG))

    def receive(self, message: memoryview) -> Transit:
        tensor = torch.frombuffer(message, dtype=torch.uint8)
        return self._follow(lambda group: group.recv([tensor], 1 - self._rank, _BLOCKS_TAG))

    def hear(self, connection: FrameSocket) -> None:
        """What is under way has a thread of its own."""

    def close(self) -> bool:
        if not self._is_closed:
            self._is_closed = True
            self._store.close()
            self._fence()
            self._thread.shutdown(wait=False, cancel_futures=True)
            _, running = concurrent.futures.wait(self._jobs, timeout=_CLOSE_TIMEOUT_S)
            if not running:
                self._thread.shutdown(wait=True)
            self._group = None
            self._bell.close()
        return all(job.done() for job in self._jobs)

    def _make(self) -> None:
        """By the lane's thread: returns when both ends are connected."""
        try:
            self._group = _make_group(self._store, self._rank, self._our_host)
        except (RuntimeError, ValueError) as error:  # c10d raises nothing else.
            self._failure = _in_a_line(error)
            self._store.close()

    def _follow(self, begin: Callable[[Any], Any]) -> Transit:
        """`begin` hands a message to gloo, once those before it are through."""
        transit = Transit(self._bell, library=LIBRARY)
        self._store.tell(self._peer)
        self._submit(lambda: self._carry(begin, transit))
        return transit

    def _carry(self, begin: Callable[[Any], Any], transit: Transit) -> None:
        if self._group is None:
            transit.end(self._failure)
            return
        try:
            begin(self._group).wait(datetime.timedelta(seconds=MESSAGE_TIMEOUT_S))
        except RuntimeError as error:
            transit.end(_in_a_line(error))
        else:
            transit.end()

    def _submit(self, job: Callable[[], None]) -> None:
        self._jobs = [*(each for each in self._jobs if not each.done()), self._thread.submit(job)]

    def _fence(self) -> None:
        if self._group is not None and not all(job.done() for job in self._jobs):
            with contextlib.suppress(RuntimeError):
                nothing = torch.empty(1, dtype=torch.uint8)
                self._group.recv([nothing], 1 - self._rank, _NEVER_SENT_TAG).wait(_AT_ONCE)


class _Addresses(distributed.Store):  # type: ignore[name-defined, misc]
    """What torch takes for the store by which ranks find each other: the address of each end, told by the lane.

    torch calls it from its own threads, with whatever names it likes; each rank sets one value, and asks for both.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}
        self._peer: bytes | None = None
        self._ours: bytes | None = None
        self._is_closed = False

    def ours(self, deadline: Deadline) -> bytes | None:
        """None when torch has made no address by then, or never will."""
        with self._changed:
            self._changed.wait_for(lambda: self._ours is not None or self._is_closed, deadline.left_s())
            return self._ours

    def tell(self, peer: bytes) -> None:
        with self._changed:
            self._peer = peer
            self._changed.notify_all()

    def close(self) -> None:
        """Whoever waits for an address gets an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # By torch.

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = bytes(value)
            self._ours = self._values[key]
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        self.wait([key])
        with self._changed:
            return self._values.get(key, self._peer or b"")

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._knows(keys))  # The lane ends this wait.
            if self._is_closed:
                raise RuntimeError("the lane was closed")

    def _knows(self, keys: Sequence[str]) -> bool:
        return self._peer is not None or all(key in self._values for key in keys)


def _make_group(store: Any, rank: int, our_host: str) -> Any:
    gloo: Any = distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=our_host)]
    options._timeout = datetime.timedelta(seconds=JOIN_TIMEOUT_S)
    options._threads = 1
    return gloo(store, rank, 2, options)


def _in_a_line(error: Exception) -> str:
    """Without the place in torch's source, and its advice."""
    sentence = str(error).partition("] ")[2] or str(error)
    return sentence.partition(". ")[0].partition("\n")[0]
