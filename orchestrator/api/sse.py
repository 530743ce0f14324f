"""A stream of server-sent events that no client can make us wait for.

Events are written straight to the connection while it takes them. When a client reads too slowly, writing stops at the
transport's own limit (64 KiB), what its sequences say meanwhile is kept as text, and once the connection has drained it
goes out as one event: a slow client gets the same text in fewer events, costs a few bytes a token, and delays nobody.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

DONE = b"data: [DONE]\n\n"


class EventStream:
    """One HTTP response. Nothing is sent, not even its status, before `pump()` has seen the first `wake()`."""

    def __init__(self, http: web.Request, headers: Mapping[str, str], flush: Callable[[], None]) -> None:
        self._http = http
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **headers}
        )
        self._descriptor = -1
        """Of the connection's socket, where bytes go to it as they are; valid while the transport is not closing."""
        self._flush = flush
        """Sends whatever has been kept."""
        self._is_chunked = http.version >= HttpVersion11
        self._writer: AbstractStreamWriter | None = None
        self._transport: asyncio.Transport | None = None
        self._wanted = asyncio.Event()
        self._is_stopping = False

    @property
    def is_open(self) -> bool:
        """The status line is out; from now on an error can only be an event."""
        return self._transport is not None

    @property
    def takes_more(self) -> bool:
        return self._transport is not None and not self._transport.get_write_buffer_size()

    def wake(self) -> None:
        """There is something to send that could not be sent now."""
        self._wanted.set()

    def send(self, event: bytes) -> None:
        """Whole events, in HTTP's chunked framing. A client that has gone is noticed by whoever runs the handler."""
        self._write(b"%x\r\n%b\r\n" % (len(event), event) if self._is_chunked else event)

    def send_between(self, before: bytes, text: bytes, after: bytes) -> None:
        """As `send` of the three, put together once. Only while it `takes_more`."""
        if self._is_chunked:
            length = len(before) + len(text) + len(after)
            self._write(b"%x\r\n%b%b%b\r\n" % (length, before, text, after))
        else:
            self._write(before + text + after)

    def _write(self, message: bytes) -> None:
        """To the kernel at once, past the event loop's own queue: half of what a token costs is this one call.

        What the kernel does not take, and whatever is wrong with the connection, is the transport's.
        """
        transport = self._transport
        assert transport is not None, "the stream is not open yet"
        if transport.is_closing():
            return
        if self._descriptor >= 0 and not transport.get_write_buffer_size():
            try:
                num_taken = os.write(self._descriptor, message)
            except OSError:  # It is full (BlockingIOError), or broken: the transport finds that out by itself.
                num_taken = 0
            if num_taken == len(message):
                return
            message = message[num_taken:]
        transport.write(message)

    async def pump(self) -> None:
        """Opens the response at the first wake-up, and after each stall goes on when the client has caught up.

        Ended by `stop_pump()`, not by cancelling: aiohttp's waiter for a drained connection would be cancelled with it,
        and whoever waits for the same connection afterwards would be cancelled too.
        """
        while not self._is_stopping:
            await self._wanted.wait()
            self._wanted.clear()
            if not self._is_stopping:
                await self._ready()
                self._flush()

    def stop_pump(self) -> None:
        self._is_stopping = True
        self._wanted.set()

    async def _ready(self) -> None:
        if self._writer is None:
            self._writer = await self._response.prepare(self._http)
            assert self._writer is not None, "the response was prepared twice"
            self._writer.send_headers()
            self._transport = self._http.transport
            if self._transport is None:
                raise ConnectionResetError("the client went away")
            connected = self._transport.get_extra_info("socket")
            if connected is not None and self._transport.get_extra_info("sslcontext") is None:
                self._descriptor = connected.fileno()
        await self._writer.drain()

    async def end(self, *events: bytes) -> web.StreamResponse:
        """Whatever is kept, then `events`, then the end of the response, once the client has taken all of it."""
        await self._ready()
        self._flush()
        self.send(b"".join(events))
        await self._response.write_eof()
        return self._response

    def abort(self) -> None:
        """The client does not read and its time is up."""
        if self._transport is not None:
            self._transport.abort()
