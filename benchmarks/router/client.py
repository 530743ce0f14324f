"""The load's side: connections that cost as little as they can, so that what is measured is what they talk to."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from typing import Final, cast

import orjson

ANSWER_TIMEOUT_S: Final = 60.0
_CHUNKED_END: Final = b"0\r\n\r\n"


@dataclasses.dataclass(slots=True)
class Reply:
    """Times are on the machine's monotonic clock."""

    began_s: float
    first_event_s: float | None = None
    """Of a stream: when its first event had come."""
    ended_s: float = 0.0
    num_events: int = 0
    status: int = 0

    @property
    def is_good(self) -> bool:
        return self.status == 200 and self.ended_s > 0.0

    @property
    def ttft_s(self) -> float:
        assert self.first_event_s is not None, "not a stream, or it never began"
        return self.first_event_s - self.began_s


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, kept alive; one request at a time."""

    def __init__(self) -> None:
        self.reply = Reply(0.0)
        self._answered: asyncio.Future[Reply] | None = None
        self._received = bytearray()
        self._body_bytes: int | None = None
        """Left of a body whose length was told; None: it is chunked, or not begun."""
        self._in_body = False
        self.num_events_total = 0

    @classmethod
    async def open(cls, port: int, *, receive_bytes: int = 0) -> Connection:
        """receive_bytes: of the socket's buffer; 0: the system's choice."""
        loop = asyncio.get_running_loop()
        connected = socket.socket()
        connected.setblocking(False)
        if receive_bytes:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await loop.sock_connect(connected, ("127.0.0.1", port))
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _, connection = await loop.create_connection(cls, sock=connected)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so.

    def connection_lost(self, error: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(self.reply)

    def begin(self, request: bytes) -> asyncio.Future[Reply]:
        self._answered = asyncio.get_running_loop().create_future()
        self._received.clear()
        self._in_body = False
        self.reply = Reply(time.monotonic())
        self.transport.write(request)
        return self._answered

    async def ask(self, request: bytes) -> Reply:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await self.begin(request)

    def data_received(self, received: bytes) -> None:
        if not self._in_body:
            self._received += received
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._received[:end]).lower()
            received = bytes(self._received[end + 4 :])
            self._received.clear()
            self.reply.status = int(head[9:12])
            at = head.find(b"content-length:")
            self._body_bytes = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else None
            self._in_body = True
        self._body_received(received)

    def _body_received(self, received: bytes) -> None:
        if self._body_bytes is not None:
            self._body_bytes -= len(received)
            if self._body_bytes <= 0:
                self._end()
            return
        num_events = received.count(b"data: {")
        self.reply.num_events += num_events
        self.num_events_total += num_events
        if num_events and self.reply.first_event_s is None:
            self.reply.first_event_s = time.monotonic()
        if (received if len(received) >= 5 else bytes(self._received[-5:]) + received).endswith(_CHUNKED_END):
            self._end()
        elif len(received) < 5:
            self._received += received

    def _end(self) -> None:
        self.reply.ended_s = time.monotonic()
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(self.reply)


def request(path: str, body: object) -> bytes:
    """A whole HTTP request."""
    encoded = orjson.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(encoded)}\r\n\r\n".encode() + encoded
