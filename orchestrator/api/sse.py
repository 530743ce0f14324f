"""A stream of server-sent events that no client can make us wait for.

Events are written straight to the connection while it takes them. When a client reads too slowly, writing stops as soon
as the kernel's buffer is full, what its sequences say meanwhile is kept as text, and once the connection has drained it
goes out as one event: a slow client gets the same text in fewer events, costs a few bytes a token, and delays nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Final

from aiohttp import HttpVersion11, web

from orchestrator.api.direct import AlreadySent, head_of, plain_descriptor, write

DONE = b"data: [DONE]\n\n"
_HEADERS: Final = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
_LAST_CHUNK: Final = b"0\r\n\r\n"


class EventStream:
    """One HTTP response. Nothing is sent, not even its status, before the first `send()`."""

    def __init__(self, http: web.Request, headers: Mapping[str, str], flush: Callable[[], None]) -> None:
        """`flush` sends whatever has been kept; called when a client that was too slow has caught up.

        Raises:
            ConnectionResetError: the client has gone.
        """
        if http.transport is None:
            raise ConnectionResetError("the client went away")
        self._http = http
        self._protocol = http.protocol
        self._transport: asyncio.Transport = http.transport
        # "Writing is paused" then means that anything at all is left over. With 0, TLS would count nothing as something.
        self._transport.set_write_buffer_limits(high=1, low=0)
        self._descriptor = plain_descriptor(self._transport)
        self._is_chunked = http.version >= HttpVersion11
        framing = {"Transfer-Encoding": "chunked"} if self._is_chunked else {}
        self._headers = {**_HEADERS, **framing, **headers}
        self._flush = flush
        self._catching_up: asyncio.Task[None] | None = None
        """Waits for a slow client. Ends by itself, at the latest with the connection."""
        self.is_open = False
        """The status line is out; from now on an error can only be an event."""

    @property
    def takes_more(self) -> bool:
        return not self._protocol.writing_paused

    def wake(self) -> None:
        """There is something to send that could not be sent now."""
        if self._catching_up is None or self._catching_up.done():
            self._catching_up = asyncio.get_running_loop().create_task(self._catch_up())

    async def _catch_up(self) -> None:
        with contextlib.suppress(ConnectionError):  # Whoever runs the handler hears of that.
            await self._http.writer.drain()
            self._flush()

    def send(self, event: bytes) -> None:
        """Whole events, in HTTP's chunked framing. A client that has gone is noticed by whoever runs the handler."""
        framed = b"%x\r\n%b\r\n" % (len(event), event) if self._is_chunked else event
        if not self.is_open:
            self.is_open = True
            framed = head_of(self._http, self._headers) + framed
        write(self._transport, self._descriptor, framed)

    def send_between(self, before: bytes, text: bytes, after: bytes) -> None:
        """As `send` of the three, put together once. Only on an open stream that `takes_more`."""
        if self._is_chunked:
            length = len(before) + len(text) + len(after)
            write(self._transport, self._descriptor, b"%x\r\n%b%b%b\r\n" % (length, before, text, after))
        else:
            write(self._transport, self._descriptor, before + text + after)

    async def end(self, *events: bytes) -> web.StreamResponse:
        """Whatever is kept, then `events`, then the end of the response, once the client has taken all of it."""
        if self._catching_up is not None:
            await asyncio.wait([self._catching_up])
        await self._http.writer.drain()
        self._flush()
        if last := b"".join(events):
            self.send(last)
        if self._is_chunked:
            write(self._transport, self._descriptor, _LAST_CHUNK)
        await self._http.writer.drain()
        self._transport.set_write_buffer_limits()
        return AlreadySent(self._http)

    def abort(self) -> None:
        """The client does not read and its time is up."""
        self._transport.abort()
