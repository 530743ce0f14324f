"""A blocking socket that speaks frames and waits no longer than it is told.

Timeouts are the kernel's (SO_RCVTIMEO, SO_SNDTIMEO): one system call moves megabytes while the interpreter lock is
released, where Python's own socket timeouts would poll before each.
"""

from __future__ import annotations

import array
import contextlib
import math
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from disaggregated.errors import PeerLost
from kvtransfer.deadline import Deadline
from kvtransfer.native.library import Outcome, library
from kvtransfer.transport import PROGRESS_TIMEOUT_S, ReadStop
from kvtransfer.transports import frames
from kvtransfer.transports.frames import Kind, MalformedFrame

_NEVER: Final = Deadline(math.inf)
_VECTORS_MAX: Final = 64
"""Buffers of one system call; the kernel takes 1024, but handing over what it will not reach costs more."""
_LOOK_OUT_S: Final = 100e-6
"""Before a thread goes to sleep until the peer speaks. A small read is over in less, and to be woken up costs more than
all of it where the core has gone to sleep, too. Between hosts that are further away it is spent in vain."""
_DESCRIPTORS_MAX: Final = 8
_INT_BYTES: Final = array.array("i").itemsize


class FrameSocket:
    """Owns `sock`. Used by one thread at a time; `shut` may come from any."""

    def __init__(self, sock: socket.socket, *, progress_timeout_s: float = PROGRESS_TIMEOUT_S) -> None:
        self._sock = sock
        self._progress_timeout_s = progress_timeout_s
        self._deadline = _NEVER
        self._timeout_s = 0.0
        self._idle = select.poll()
        self._idle.register(sock, select.POLLIN)
        self._waiting: dict[tuple[int | None, bool], select.poll] = {}
        sock.setblocking(True)
        if sock.family in {socket.AF_INET, socket.AF_INET6}:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)

    def stopped_by(self, stop: ReadStop) -> contextlib.AbstractContextManager[None]:
        return stop.shuts(self._sock)

    def limit_waits(self, deadline: Deadline) -> None:
        """From here on each system call waits until `deadline`, and at most the progress timeout."""
        left_s = deadline.left_s()
        if left_s == 0.0:
            deadline.check("a peer")
        self._deadline = deadline
        self._set_timeouts(min(left_s, self._progress_timeout_s))

    def wait_for_ever(self) -> None:
        """Until the peer says something or closes. Only for an idle connection; its owner shuts it to end the wait."""
        self._deadline = _NEVER
        self._look_out()
        self._idle.poll()

    @property
    def is_quiet(self) -> bool:
        """Nothing has come that nobody has read: the peer is there, and owes no answer, as far as can be seen here."""
        return not self._idle.poll(0)

    @property
    def progress_timeout_s(self) -> float:
        return self._progress_timeout_s

    @property
    def deadline(self) -> Deadline:
        """What `limit_waits` was told last."""
        return self._deadline

    @property
    def our_host(self) -> str:
        """The address of ours by which the peer reached us, or we it. TCP only."""
        return str(self._sock.getsockname()[0])

    def watch(self, fd: int | None = None, *, within_s: float = math.inf, listening: bool = True) -> bool:
        """Wait until the peer speaks or closes (True), or `fd` can be read or `within_s` has passed (False).

        For a transport whose bytes come another way, through a library that has a descriptor for it, or none. Not
        `listening`, only the end of the connection counts, and what the peer says waits.
        Raises PeerLost when nothing happens within the progress timeout, TransferTimeout at the deadline.
        """
        waiting = self._waiting_for(fd, listening)
        limit_s = min(self._progress_timeout_s, self._deadline.left_s())
        ready = waiting.poll(math.ceil(min(limit_s, within_s) * 1000))
        if not ready:
            self._deadline.check("bytes of a peer")
            if within_s >= limit_s:
                raise PeerLost(f"the peer moved no byte for {self._progress_timeout_s} s")
        return any(descriptor == self._sock.fileno() for descriptor, _ in ready)

    def _waiting_for(self, fd: int | None, listening: bool) -> select.poll:
        """Made once: a library's bytes come in thousands of pieces. A connection has one such descriptor at most."""
        key = (fd, listening)
        if key not in self._waiting:
            waiting = self._waiting[key] = select.poll()
            waiting.register(self._sock, select.POLLRDHUP | (select.POLLIN if listening else 0))
            if fd is not None:
                waiting.register(fd, select.POLLIN)
        return self._waiting[key]

    def send(self, frame: bytes) -> None:
        try:
            sent = self._sock.send(frame)
        except OSError as error:
            raise self._lost(error) from error
        if sent < len(frame):
            self.send_views([memoryview(frame)[sent:]])

    def send_views(self, views: Sequence[memoryview]) -> None:
        """Send all of `views`, in order, without copying them together."""
        for pending in _batches(views):
            while pending:
                with self._broken_as_peer_lost():
                    sent = self._sock.sendmsg(pending)
                _consume(pending, sent)
                self._deadline.check("a peer to take its blocks")

    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill all of `views`, in order, straight from the kernel."""
        for pending in _batches(views):
            while pending:
                with self._broken_as_peer_lost():
                    received = self._sock.recvmsg_into(pending, 0, socket.MSG_WAITALL)[0]
                if received == 0:
                    raise PeerLost("the peer closed the connection")
                _consume(pending, received)
                self._deadline.check("bytes of a peer")

    def move(self, native: Callable[[int, float], int], *, what: str) -> None:
        """Let native code move `what` through this socket; it gets the descriptor and the deadline, in seconds."""
        with self._broken_as_peer_lost():
            outcome = native(self._sock.fileno(), self._deadline.at_s)
            if outcome < 0:
                raise OSError(-outcome, os.strerror(-outcome))
        if outcome == Outcome.CLOSED:
            raise PeerLost("the peer closed the connection")
        if outcome == Outcome.LATE:
            self._deadline.check(what)
        assert outcome in (Outcome.DONE, Outcome.LATE), f"{what}: {Outcome(outcome).name}"

    def receive_header(self) -> tuple[Kind, int]:
        self._look_out()
        return frames.unpack_header(self._receive(frames.HEADER.size))

    def receive_frame(self, *allowed: Kind) -> tuple[Kind, bytes]:
        """One frame of a bounded kind. A REFUSED is raised as the error it carries."""
        return self.finish_frame(*self.receive_header(), allowed=allowed)

    def finish_frame(self, kind: Kind, length: int, *, allowed: Sequence[Kind]) -> tuple[Kind, bytes]:
        """The body of a frame whose header has been read."""
        if kind is Kind.REFUSED:
            raise frames.unpack_refused(self._receive(length))
        if kind not in allowed:
            raise MalformedFrame(f"a {kind.name} where {' or '.join(each.name for each in allowed)} belongs")
        return kind, self._receive(length)

    def send_with_descriptor(self, frame: bytes, fd: int) -> None:
        """Unix sockets only; the peer gets a descriptor of its own."""
        with self._broken_as_peer_lost():
            sent = socket.send_fds(self._sock, [frame], [fd])
        self.send(frame[sent:])

    def receive_with_descriptor(self) -> tuple[bytes, int]:
        """A WELCOME's body and the descriptor that came with it, which is the caller's to close.

        Raises MalformedFrame when not exactly one came; none is left open then.
        """
        with self._broken_as_peer_lost():
            space = socket.CMSG_SPACE(_DESCRIPTORS_MAX * _INT_BYTES)
            first, ancillary, _, _ = self._sock.recvmsg(frames.HEADER.size, space, socket.MSG_CMSG_CLOEXEC)
        fds = _descriptors(ancillary)
        try:
            header = first + self._receive(frames.HEADER.size - len(first))
            _, body = self.finish_frame(*frames.unpack_header(header), allowed=[Kind.WELCOME])
            if len(fds) != 1:
                raise MalformedFrame(f"a WELCOME with {len(fds)} descriptors where one belongs")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return body, fds[0]

    def shut(self) -> None:
        """Whoever waits in this socket returns at once. From any thread, while the owner has not closed it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _look_out(self) -> None:
        """For an answer that is likely to come at once, without the interpreter lock."""
        if (native := library()) is not None:
            native.look_out(self._sock.fileno(), _LOOK_OUT_S)

    def _receive(self, length: int) -> bytes:
        if length == 0:
            return b""
        try:
            first = self._sock.recv(length, socket.MSG_WAITALL)
        except OSError as error:
            raise self._lost(error) from error
        if len(first) == length:
            return first
        if not first:
            raise PeerLost("the peer closed the connection")
        rest = bytearray(length - len(first))
        self.receive_into([memoryview(rest)])
        return first + rest

    @contextlib.contextmanager
    def _broken_as_peer_lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> PeerLost:
        if isinstance(error, BlockingIOError):
            return PeerLost(f"the peer moved no byte for {self._progress_timeout_s} s")
        return PeerLost(f"the link broke: {error}")

    def _set_timeouts(self, seconds: float) -> None:
        """0 waits for ever, as the kernel has it."""
        if seconds == self._timeout_s:
            return
        self._timeout_s = seconds
        interval = struct.pack("@ll", int(seconds), max(int(seconds % 1 * 1e6), 1 if seconds else 0))
        with self._broken_as_peer_lost():
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)


def _batches(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    for begin in range(0, len(views), _VECTORS_MAX):
        yield list(views[begin : begin + _VECTORS_MAX])


def _consume(pending: list[memoryview], num_bytes: int) -> None:
    """Drop the first `num_bytes` of `pending`, in place."""
    done = 0
    while done < len(pending) and num_bytes >= len(pending[done]):
        num_bytes -= len(pending[done])
        done += 1
    del pending[:done]
    if num_bytes:
        pending[0] = pending[0][num_bytes:]


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _INT_BYTES])
    return list(fds)
