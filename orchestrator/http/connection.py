"""A client's connection, read by ourselves as long as it brings plain requests to generate.

    bytes ──read_head──▶ Exchange ──serve──▶ answer, which is written past us ──answered──▶ the next request

The first request that is anything else goes, with all the bytes that came from its first one on, to aiohttp, which has
the connection from then on. A request is served once all of it is here, and one at a time: what a client sends ahead of
the answers waits, in a bounded number of bytes.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol, cast

from orchestrator.api.direct import plain_descriptor
from orchestrator.api.outbox import Outbox
from orchestrator.http.exchange import Exchange
from orchestrator.http.heads import BODY_BYTES_MAX, Head, may_become_ours, read_head

AHEAD_BYTES_MAX: Final = 2 * BODY_BYTES_MAX
"""Of requests that are sent before the one under way is answered. Then no more is read."""


class Served(Protocol):
    """Whoever has the connections."""

    outbox: Outbox
    body_bytes_max: int

    def came(self, connection: Connection) -> None: ...

    def left(self, connection: Connection) -> None:
        """It is closed, or another's."""

    def make_other(self) -> asyncio.Protocol:
        """Reads what we do not."""

    def serve(self, exchange: WholeRequest) -> None:
        """Answer it, at once or later. Raises nothing."""

    def refuse(self, exchange: WholeRequest, error: Exception) -> None:
        """This is its answer. Raises nothing."""


class WholeRequest(Exchange):
    """A request of which everything is here."""

    is_told_at_once = True

    __slots__ = ("_connection", "body")

    def __init__(self, connection: Connection, head: Head, body: bytes) -> None:
        super().__init__(head.path, head.headers, keep_alive=head.keep_alive, descriptor=connection.descriptor)
        self._connection = connection
        self.body = body

    @property
    def remote(self) -> str | None:
        return self._connection.remote

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._connection.transport

    @property
    def writing_paused(self) -> bool:
        return self._connection.writing_paused

    async def drain(self) -> None:
        await self._connection.drain()

    def answered(self) -> None:
        self.on_gone = None
        self._connection.go_on(self)

    def refuse(self, error: Exception) -> None:
        self.on_gone = None
        self._connection.served.refuse(self, error)


class Connection(asyncio.Protocol):
    """Invariant: `_ahead` is what came after the request under way, or, while there is none, a part of the next."""

    __slots__ = (
        "_ahead", "_drained", "_exchange", "_is_last", "_is_reading", "_loop", "_num_left", "_num_needed",
        "descriptor", "served",
        "transport", "waits_for_body", "waits_since_s", "writing_paused",
    )  # fmt: skip

    def __init__(self, served: Served, loop: asyncio.AbstractEventLoop) -> None:
        self.served = served
        self._loop = loop
        self.transport: asyncio.Transport | None = None
        self.descriptor = -1
        self.writing_paused = False
        self._drained: asyncio.Future[None] | None = None
        """Somebody waits until writing is not paused."""
        self._exchange: WholeRequest | None = None
        self._ahead = bytearray()
        self._num_needed = 0
        """Bytes that `_ahead` must have before there is any use in looking at it."""
        self._is_reading = True
        self._is_last = False
        """The connection is closed after the answer that is under way."""
        self.waits_since_s = loop.time()
        """For a request, while none is under way, or for the rest of its body."""
        self.waits_for_body = False
        self._num_left = 0
        """Bytes of answers that the client had not taken when somebody last asked."""

    @property
    def is_waiting(self) -> bool:
        """No request is under way."""
        return self._exchange is None

    def waited_s(self, now_s: float) -> float:
        """While no request is under way: since when nothing has come. Who still reads an answer, however slowly, is not
        waited for."""
        num_left = 0 if self.transport is None else self.transport.get_write_buffer_size()
        if num_left < self._num_left:
            self.waits_since_s = now_s
        self._num_left = num_left
        return now_s - self.waits_since_s

    @property
    def remote(self) -> str | None:
        name = self.transport.get_extra_info("peername") if self.transport is not None else None
        return str(name[0]) if isinstance(name, tuple) else None

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)
        self.descriptor = plain_descriptor(transport)
        # "Writing is paused" then means that anything at all is left over. At 0, TLS would count nothing as something.
        transport.set_write_buffer_limits(high=0 if self.descriptor >= 0 else 1, low=0)
        self.served.came(self)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None and not self._ahead and not self.writing_paused:
            self._read(data)
            return
        self._ahead += data
        if self._exchange is None and len(self._ahead) >= self._num_needed:
            self._read_ahead()
        elif self._is_reading and len(self._ahead) > AHEAD_BYTES_MAX and self.transport is not None:
            self._is_reading = False
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None
        if self._exchange is None and self._ahead:
            self._read_ahead()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.served.left(self)
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.gone()

    # Requests.

    def _read_ahead(self) -> None:
        """Look at what came ahead, if the client takes its answers: one at a time, so that they stay in order."""
        if self._exchange is not None or self.writing_paused or self.transport is None:
            return
        if not self._is_reading:
            self._is_reading = True
            self.transport.resume_reading()
        received = bytes(self._ahead)
        self._ahead.clear()
        if received:
            self._read(received)

    def _read(self, received: bytes) -> None:
        """What a request begins with, none being under way."""
        head = read_head(received)
        if head is None or head.body_bytes > self.served.body_bytes_max:
            if head is None and may_become_ours(received):
                self._wait_for(received, len(received) + 1)
            else:
                self._hand_over(received)
            return
        end = head.num_bytes + head.body_bytes
        if len(received) < end:
            if not self.waits_for_body:
                self.waits_for_body = True
                self.waits_since_s = self._loop.time()
            self._wait_for(received, end)
            return
        self.waits_for_body = False
        if len(received) > end:
            self._ahead += received[end:]
        self._exchange = WholeRequest(self, head, received[head.num_bytes : end])
        self.served.serve(self._exchange)

    def _wait_for(self, received: bytes, num_bytes: int) -> None:
        self._ahead += received
        self._num_needed = num_bytes

    def go_on(self, exchange: WholeRequest) -> None:
        """After the answer to `exchange`."""
        if self._exchange is not exchange:
            return
        self._exchange = None
        self._num_needed = 0
        self.waits_since_s = self._loop.time()
        if self._is_last or not exchange.keep_alive:
            self.close()
        elif self._ahead:
            self._loop.call_soon(self._read_ahead)

    def _hand_over(self, received: bytes) -> None:
        self.served.outbox.flush()
        transport, self.transport = self.transport, None
        self.served.left(self)
        if transport is None or transport.is_closing():
            return
        transport.set_write_buffer_limits()
        other = self.served.make_other()
        transport.set_protocol(other)
        other.connection_made(transport)
        if self.writing_paused:
            other.pause_writing()
        other.data_received(received)

    # The end.

    def close_when_answered(self) -> None:
        """Now, if no request is under way."""
        self._is_last = True
        if self._exchange is None:
            self.close()

    def close(self) -> None:
        """Once everything that was written has left."""
        if self.transport is not None:
            self.served.outbox.flush()
            self.transport.close()

    def give_up(self) -> None:
        """At once; whoever works for the request under way is told."""
        if self.transport is not None:
            self.transport.abort()

    def body_is_late(self, error: Exception) -> None:
        """Answer the request whose body does not come, and close."""
        head = read_head(self._ahead)
        assert head is not None, "it waits for the body of a head that was read"
        self._exchange = exchange = WholeRequest(self, head, b"")
        exchange.keep_alive = False
        self.served.refuse(exchange, error)

    async def drain(self) -> None:
        if self.transport is None:
            raise ConnectionResetError("the client went away")
        if self.writing_paused:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)
            if self.transport is None:
                raise ConnectionResetError("the client went away")
