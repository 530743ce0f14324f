"""A stream of server-sent events that no client can make us wait for.

Events are written straight to the connection while it takes them. When a client reads too slowly, writing stops as soon
as the kernel's buffer is full, what its sequences say meanwhile is kept as text, and once the connection has drained it
goes out as one event: a slow client gets the same text in fewer events, costs a few bytes a token, and delays nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Final

from aiohttp import HttpVersion11, web

from orchestrator.api.direct import AlreadySent, head_of, plain_descriptor, write

DONE = b"data: [DONE]\n\n"
_HEADERS: Final = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
_LAST_CHUNK: Final = b"0\r\n\r\n"


class TextFrame:
    """One event with any text: what stands around the text is put together once for each length of it."""

    __slots__ = ("_after", "_before", "_beginnings", "_is_chunked")

    def __init__(self, before: bytes, after: bytes, *, is_chunked: bool) -> None:
        self._before = before
        self._after = after + b"\r\n" if is_chunked else after
        self._is_chunked = is_chunked
        self._beginnings: dict[int, bytes] = {}
        """By the length of the text. Tokens are short, so there are few."""

    def of(self, text: bytes) -> bytes:
        try:
            return self._beginnings[len(text)] + text + self._after
        except KeyError:
            pass
        length = len(self._before) + len(text) + len(self._after) - 2
        beginning = b"%x\r\n%b" % (length, self._before) if self._is_chunked else self._before
        self._beginnings[len(text)] = beginning
        return beginning + text + self._after


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
        self._descriptor = plain_descriptor(self._transport)
        # "Writing is paused" then means that anything at all is left over. At 0, TLS would count nothing as something.
        self._transport.set_write_buffer_limits(high=0 if self._descriptor >= 0 else 1, low=0)
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

    def frame(self, before: bytes, after: bytes) -> TextFrame:
        """For events that differ only in the text between the two."""
        return TextFrame(before, after, is_chunked=self._is_chunked)

    def try_send(self, event: bytes) -> bool:
        """A framed event, on a stream that is open. False: the client is too slow, or has gone; nothing was taken.

        Each token of each stream comes here, and half of what it costs is the call of the kernel.
        """
        transport = self._transport
        if self._protocol.writing_paused or transport.is_closing():
            return False
        if self._descriptor < 0:
            transport.write(event)
            return True
        try:
            num_taken = os.write(self._descriptor, event)  # Nothing waits before it: writing would be paused.
        except OSError:  # It is full (BlockingIOError), or broken: the transport finds that out by itself.
            num_taken = 0
        if num_taken < len(event):
            transport.write(event[num_taken:])
        return True

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
