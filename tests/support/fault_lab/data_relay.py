"""Sits in a transport's control socket, knows its frames, and may hold or damage them at the READ of a chosen chunk.

Works for every transport, since each keeps that socket: over TCP its bytes include the blocks, over a unix socket
descriptors come along. Threads, because descriptors and blocking sockets are simplest so.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from kvtransfer.transports import frames
from kvtransfer.transports.frames import HEADER, Kind, MalformedFrame

PIECE_BYTES: Final = 1 << 16
DELAY_S: Final = 0.3
"""Shorter than any progress timeout: a delay is no fault that may end a transfer."""


@dataclasses.dataclass(slots=True)
class Passing:
    """One frame on its way. A tamperer changes these fields; the relay obeys."""

    kind: Kind
    is_from_source: bool
    body: bytearray
    """Of BLOCKS, its first bytes."""
    copies: int = 1
    keep_bytes: int | None = None
    """So many bytes of header and body go on, then the connection ends."""
    delay_s: float = 0.0


Tamper = Callable[[Passing], None]
"""Called on a relay's thread for each READ of our chunk, and for the BLOCKS that answers it. May block."""


class DataRelay:
    """Stands between one endpoint and whoever dials it."""

    def __init__(self, *, is_of_chunk: Callable[[frozenset[int]], bool], carries_blocks: bool) -> None:
        """`is_of_chunk` tells from the source's block ids whether a READ is for the chunk that is tampered with.

        `carries_blocks`: a BLOCKS frame is followed by its bytes, which go another way in other transports.
        """
        self._carries_blocks = carries_blocks
        self._is_of_chunk = is_of_chunk
        self._tamper: Tamper | None = None
        self._listening: list[socket.socket] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def stand_before(self, address: str) -> str:
        """`address` as an offer says it; returns what to say instead. A restarted source has another one."""
        place, _, nonce = address.rpartition("/")
        is_network = ":" in place
        listening = socket.socket(
            socket.AF_INET if is_network else socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC
        )
        listening.bind(("127.0.0.1", 0) if is_network else f"\0disaggregated-relay-{secrets.token_hex(6)}")
        listening.listen()
        self._listening.append(listening)
        self._spawn(self._accept, listening, place)
        name = listening.getsockname()
        ours = f"127.0.0.1:{name[1]}" if is_network else name[1:].decode()
        return f"{ours}/{nonce}"

    def tamper_with(self, tamper: Tamper | None) -> None:
        self._tamper = tamper

    def cut(self) -> None:
        """End every connection, both ways."""
        for sock in tuple(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for listening in self._listening:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), f"{thread.name} hangs"
        for listening in self._listening:
            listening.close()

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="fault-lab-relay", daemon=True)
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
        thread.start()

    def _accept(self, listening: socket.socket, target: str) -> None:
        while True:
            try:
                near, _ = listening.accept()
            except OSError:
                return  # We close.
            try:
                far = _dial(target)
            except OSError:  # The source has gone; its caller sees the connection end.
                near.close()
                continue
            self._sockets |= {near, far}
            self._spawn(self._relay, near, far)

    def _relay(self, near: socket.socket, far: socket.socket) -> None:
        """One connection, both ways, until either end hangs up."""
        is_ours = threading.Event()
        back = threading.Thread(target=self._pump, args=[far, near, True, is_ours], name="fault-lab-back", daemon=True)
        back.start()
        self._pump(near, far, False, is_ours)
        back.join()
        self._sockets -= {near, far}
        near.close()
        far.close()

    def _pump(self, into: socket.socket, out: socket.socket, is_from_source: bool, is_ours: threading.Event) -> None:
        """`is_ours` is set from the READ of our chunk to its answer."""
        try:
            while True:
                header, descriptors = _receive_header(into)
                self._pass_on(into, out, header, descriptors, is_from_source=is_from_source, is_ours=is_ours)
        except (OSError, EOFError, MalformedFrame):
            for sock in (into, out):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _pass_on(
        self,
        into: socket.socket,
        out: socket.socket,
        header: bytes,
        descriptors: list[int],
        *,
        is_from_source: bool,
        is_ours: threading.Event,
    ) -> None:
        kind, length = frames.unpack_header(header)
        if kind is Kind.BLOCKS and not self._carries_blocks:
            length = 0
        first = _receive(into, min(length, PIECE_BYTES))
        passing = Passing(kind, is_from_source, bytearray(first))
        if kind is Kind.READ and self._is_of_chunk(_blocks(first)):
            is_ours.set()
        if is_ours.is_set() and kind in (Kind.READ, Kind.BLOCKS) and self._tamper is not None:
            self._tamper(passing)
        if is_from_source:
            is_ours.clear()
        time.sleep(passing.delay_s)
        whole = header + bytes(passing.body)
        with _open(descriptors):
            if passing.keep_bytes is not None:
                _send(out, whole[: passing.keep_bytes], descriptors)
                raise EOFError
            _send(out, whole, descriptors)
        rest = b""
        for begin in range(len(first), length, PIECE_BYTES):
            piece = _receive(into, min(PIECE_BYTES, length - begin))
            out.sendall(piece)
            rest += piece if passing.copies > 1 else b""
        for _ in range(passing.copies - 1):
            out.sendall(whole + rest)


def _dial(target: str) -> socket.socket:
    if ":" in target:
        host, _, port = target.rpartition(":")
        return socket.create_connection((host, int(port)))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(f"\0{target}")
    except OSError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _open(descriptors: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _blocks(body: bytes) -> frozenset[int]:
    read = frames.unpack_read(body, num_layers=1 << 16, num_blocks=1 << 20)
    return frozenset(block for run in read.blocks for block in range(run.first, run.end))


def _receive_header(sock: socket.socket) -> tuple[bytes, list[int]]:
    if sock.family != socket.AF_UNIX:
        return _receive(sock, HEADER.size), []
    first, descriptors, _, _ = socket.recv_fds(sock, HEADER.size, 4)
    if not first:
        raise EOFError
    return first + _receive(sock, HEADER.size - len(first)), list(descriptors)


def _receive(sock: socket.socket, length: int) -> bytes:
    received = bytearray(length)
    view = memoryview(received)
    at = 0
    while at < length:
        if not (count := sock.recv_into(view[at:])):
            raise EOFError
        at += count
    return bytes(received)


def _send(sock: socket.socket, message: bytes, descriptors: list[int]) -> None:
    if descriptors:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        sent = sock.sendmsg([message], ancillary)
        message = message[sent:]
    sock.sendall(message)
