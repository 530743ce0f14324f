"""A stream of server-sent events that no client can make us wait for.

Events are written straight to the connection while it takes them. When a client reads too slowly, writing stops as soon
as the kernel's buffer is full, what its sequences say meanwhile is kept as text, and once the connection has drained it
goes out as one event: a slow client gets the same text in fewer events, costs a few bytes a token, and delays nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from disaggregated.text.detokenizer import ESCAPED_MAX
from orchestrator.api.direct import head_of, put
from orchestrator.api.outbox import Outbox
from orchestrator.http.exchange import Exchange

_LINES: Final = "Content-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
_CHUNKED_LINES: Final = _LINES + "Transfer-Encoding: chunked\r\n"
_LAST_CHUNK: Final = b"0\r\n\r\n"


FRAME_MAX: Final = 4096
"""Bytes of an event beside its text, if there is a frame for it."""


class TextFrame(NamedTuple):
    """What stands around the text of events that differ in nothing else, as it is written to the connection."""

    lines: Sequence[bytes]
    """What comes first, by the length of the text."""
    before: bytes
    after: bytes


@functools.lru_cache(maxsize=256)
def _chunk_sizes(num_around: int) -> Sequence[bytes]:
    """The first lines of HTTP's chunks, by the length of the text in them. Streams differ little: they share them."""
    return tuple(b"%x\r\n" % (num_around + num_bytes) for num_bytes in range(ESCAPED_MAX + 1))


_NO_SIZES: Final = (b"",) * (ESCAPED_MAX + 1)


class Kept(Protocol):
    """Somebody who keeps what a client is too slow for."""

    stream: EventStream
    """Set by the stream."""

    def flush(self) -> None:
        """Send whatever has been kept, as the client has caught up."""

    def taken(self) -> bytes:
        """As events, whatever has been kept; it is not any more."""

    def fell_behind(self) -> None:
        """The client did not take all that was written."""


class EventStream:
    """One HTTP response. Nothing is sent, not even its status, before the first `send()`."""

    def __init__(self, exchange: Exchange, headers: Mapping[str, str], choices: Sequence[Kept], outbox: Outbox) -> None:
        """
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
        self._choices = choices
        self.is_of_one = len(choices) == 1
        """Where its only choice ends, it ends, and takes along what that has kept."""
        for each in choices:
            each.stream = self
        self._gathered: list[bytes] = []
        """Events that leave with the end."""
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
        self._put(self._framed(event))

    def _framed(self, event: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(event), event) if self._is_chunked else event

    def _put(self, framed: bytes) -> None:
        if not self.is_open:
            self.is_open = self._exchange.has_begun = True
            lines = _CHUNKED_LINES if self._is_chunked else _LINES
            framed = head_of(self._exchange, lines, self._headers) + framed
        put(self, self.transport, framed, self.outbox)

    def frame(self, before: bytes, after: bytes) -> TextFrame | None:
        """For events that differ only in the text between the two, and may go into the outbox; None: none may, because
        bytes are not written to this connection as they are, or they are very long."""
        num_around = len(before) + len(after)
        if self.descriptor < 0 or num_around > FRAME_MAX:
            return None
        if self._is_chunked:
            return TextFrame(_chunk_sizes(num_around), before, after + b"\r\n")
        return TextFrame(_NO_SIZES, before, after)

    def write_rest(self, rest: bytes) -> None:
        self.transport.write(rest)
        for each in self._choices:
            each.fell_behind()

    def _flush(self) -> None:
        for each in self._choices:
            each.flush()

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

    def gather(self) -> None:
        """Take what is kept, for the end: whoever tells how it ended asks what was said before."""
        self._gathered += [event for each in self._choices if (event := each.taken())]

    def _send_last(self, events: Sequence[bytes]) -> None:
        """In one write."""
        self.gather()
        self._choices = ()  # Each of them has this stream: no circle is left behind.
        if last := b"".join(events):
            self._gathered.append(last)
        framed = b"".join(map(self._framed, self._gathered))
        self._put(framed + _LAST_CHUNK if self._is_chunked else framed)

    def abort(self) -> None:
        """The client does not read and its time is up."""
        self.transport.abort()
