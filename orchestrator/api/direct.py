"""Answers that are written to the connection as they are, past aiohttp's own response.

What it does for one answer (header objects, a writer, a payload) costs more than all else that a streamed token costs.
aiohttp still reads the request, routes it, and keeps the connection for the next one: it gets an `AlreadySent`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Mapping

from aiohttp import HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time

from orchestrator.api.outbox import Outbox


class AlreadySent(web.StreamResponse):
    """There is nothing left to do for this answer. Sets two private fields of aiohttp's class, as a test sees."""

    def __init__(self, http: web.Request) -> None:
        super().__init__()
        self._eof_sent = True
        self._keep_alive = http.keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """It was."""

    async def write_eof(self, data: bytes = b"") -> None:
        """It was."""


def head_of(http: web.Request, headers: Mapping[str, str]) -> bytes:
    """Status line and headers of an answer that is well, with the empty line after them."""
    lines = [f"HTTP/1.{http.version.minor} 200 OK", f"Date: {rfc822_formatted_time()}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if not http.keep_alive:
        lines.append("Connection: close")
    elif http.version < HttpVersion11:
        lines.append("Connection: keep-alive")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def send_json(http: web.Request, body: bytes, headers: Mapping[str, str], outbox: Outbox) -> AlreadySent:
    """The whole answer in one write; returns when the connection could take more. To a client that left: nothing."""
    transport = http.transport
    if transport is not None:
        kind = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(body))}
        answer = head_of(http, {**kind, **headers}) + body
        if (descriptor := plain_descriptor(transport)) < 0 or transport.get_write_buffer_size():
            transport.write(answer)
        else:
            outbox.put(_Answered(transport, descriptor), answer)
            await asyncio.sleep(0)  # It has left by then, and whoever runs the handler may close the connection.
        await http.writer.drain()
    return AlreadySent(http)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Answered:
    """Implements `Outlet`."""

    transport: asyncio.Transport
    descriptor: int

    def write_rest(self, rest: bytes) -> None:
        self.transport.write(rest)


def plain_descriptor(transport: asyncio.Transport) -> int:
    """Of the socket, where bytes go to it as they are, else -1. Valid while the transport is not closing."""
    connected = transport.get_extra_info("socket")
    return -1 if connected is None or transport.get_extra_info("sslcontext") is not None else int(connected.fileno())


def write(transport: asyncio.Transport, descriptor: int, message: bytes) -> None:
    """As `transport.write`, but to the kernel at once where nothing waits before it: past the event loop's own queue.

    What the kernel does not take, and whatever is wrong with the connection, is the transport's.
    """
    if transport.is_closing():
        return
    if descriptor >= 0 and not transport.get_write_buffer_size():
        try:
            num_taken = os.write(descriptor, message)
        except OSError:  # It is full (BlockingIOError), or broken: the transport finds that out by itself.
            num_taken = 0
        if num_taken == len(message):
            return
        message = message[num_taken:]
    transport.write(message)
