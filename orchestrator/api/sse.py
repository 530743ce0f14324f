"""A stream of server-sent events that no client can make us wait for.

Events are written straight to the connection while it takes them. When a client reads too slowly, writing stops as soon
as the kernel's buffer is full, what its sequences say meanwhile is kept as text, and once the connection has drained it
goes out as one event: a slow client gets the same text in fewer events, costs a few bytes a token, and delays nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from orchestrator.api.direct import head_of, put
from orchestrator.api.outbox import Outbox
from orchestrator.http.exchange import Exchange

_HEADERS: Final = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
_LAST_CHUNK: Final = b"0\r\n\r\n"


class TextFrame:
    """One event with any text: what stands around the text is put together once for each length of it."""

    __slots__ = ("_before", "_is_chunked", "after", "beginnings")

    def __init__(self, before: bytes, after: bytes, *, is_chunked: bool) -> None:
        self._before = before
        self._is_chunked = is_chunked
        self.after = after + b"\r\n" if is_chunked else after
        self.beginnings: dict[int, bytes] = {}
        """By the length of the text. Tokens are short, so there are few."""

    def beginning_of(self, text: bytes) -> bytes:
        """What stands before it, which is in `beginnings` from now on."""
        length = len(self._before) + len(text) + len(self.after) - 2
        beginning = b"%x\r\n%b" % (length, self._before) if self._is_chunked else self._before
        self.beginnings[len(text)] = beginning
        return beginning


class EventStream:
    """One HTTP response. Nothing is sent, not even its status, before the first `send()`."""

    def __init__(
        self, exchange: Exchange, headers: Mapping[str, str], flush: Callable[[], None], outbox: Outbox
    ) -> None:
        """`flush` sends whatever has been kept; called when a client that was too slow has caught up.

        Raises:
            ConnectionResetError: the client has gone.
        """
        if exchange.transport is None:
            raise ConnectionResetError("the client went away")
        self._exchange = exchange
        self.outbox = outbox
        self.transport: asyncio.Transport = exchange.transport
        self.descriptor = exchange.descriptor
        self._is_chunked = exchange.is_http_11
        self._headers = headers
        self._flush = flush
        self._catching_up: asyncio.Task[None] | None = None
        """Waits for a slow client. Ends by itself, at the latest with the connection."""
        self.is_open = False
        """The status line is out; from now on an error can only be an event."""

    @property
    def takes_more(self) -> bool:
        return not self._exchange.writing_paused

    def wake(self) -> None:
        """There is something to send that could not be sent now."""
        if self._catching_up is None or self._catching_up.done():
            self._catching_up = asyncio.get_running_loop().create_task(self._catch_up())

    async def _catch_up(self) -> None:
        with contextlib.suppress(ConnectionError):  # Whoever works for the request hears of that.
            await self._exchange.drain()
            self._flush()

    def send(self, event: bytes) -> None:
        """Whole events, in HTTP's chunked framing. A client that has gone is noticed by whoever works for it."""
        framed = b"%x\r\n%b\r\n" % (len(event), event) if self._is_chunked else event
        self._put(framed)

    def _put(self, framed: bytes) -> None:
        if not self.is_open:
            self.is_open = self._exchange.has_begun = True
            framing = {"Transfer-Encoding": "chunked"} if self._is_chunked else {}
            framed = head_of(self._exchange, {**_HEADERS, **framing, **self._headers}) + framed
        put(self, self.transport, framed, self.outbox)

    def frame(self, before: bytes, after: bytes) -> TextFrame | None:
        """For events that differ only in the text between the two, and may go into the outbox; None: none may, because
        bytes are not written to this connection as they are."""
        if self.descriptor < 0:
            return None
        return TextFrame(before, after, is_chunked=self._is_chunked)

    def write_rest(self, rest: bytes) -> None:
        self.transport.write(rest)

    def try_end(self, *events: bytes) -> bool:
        """Whatever is kept, then `events`, then the end of the response. False, and nothing was sent: the client is too
        slow to take it at once; `end()` waits for it."""
        if not self.takes_more or (self._catching_up is not None and not self._catching_up.done()):
            return False
        self._send_last(events)
        return True

    async def end(self, *events: bytes) -> None:
        """As `try_end`, once the client has taken all that comes before; returns when it has taken the last byte.

        Raises:
            ConnectionError: the client has gone.
        """
        if self._catching_up is not None:
            await asyncio.wait([self._catching_up])
        self.outbox.flush()
        await self._exchange.drain()
        self._send_last(events)
        self.outbox.flush()
        await self._exchange.drain()

    def _send_last(self, events: Sequence[bytes]) -> None:
        self._flush()
        last = b"".join(events)
        if self._is_chunked:
            last = b"%x\r\n%b\r\n%b" % (len(last), last, _LAST_CHUNK) if last else _LAST_CHUNK
        self._put(last)

    def abort(self) -> None:
        """The client does not read and its time is up."""
        self.transport.abort()
