"""An exchange over one end of a pair of sockets, for what writes events to a client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator

from orchestrator.http.exchange import Exchange

PATIENCE_S = 5.0


class Wire(Exchange, asyncio.Protocol):
    """An exchange over one end of a pair of sockets; the client has the other one."""

    def __init__(self, client: socket.socket, *, is_http_11: bool = True) -> None:
        super().__init__("/v1/completions", {}, keep_alive=True, descriptor=-1, is_http_11=is_http_11)
        self.client = client
        self._transport: asyncio.Transport | None = None
        self._is_paused = False
        self._drained = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.descriptor = transport.get_extra_info("socket").fileno()
        transport.set_write_buffer_limits(high=0, low=0)

    def pause_writing(self) -> None:
        self._is_paused = True
        self._drained.clear()

    def resume_writing(self) -> None:
        self._is_paused = False
        self._drained.set()

    @property
    def remote(self) -> None:
        return None

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._transport

    @property
    def writing_paused(self) -> bool:
        return self._is_paused

    async def drain(self) -> None:
        if self._is_paused:
            await self._drained.wait()

    def answered(self) -> None:
        """Nobody waits for it."""

    def refuse(self, error: Exception) -> None:
        raise error

    async def read_all(self) -> bytes:
        """Until the answer has ended."""
        read, loop = b"", asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_S):
            while not read.endswith(b"0\r\n\r\n" if self.is_http_11 else b"data: [DONE]\n\n"):
                read += await loop.sock_recv(self.client, 1 << 16)
        return read


@contextlib.asynccontextmanager
async def wire(*, is_http_11: bool = True, buffer_bytes: int = 0) -> AsyncIterator[Wire]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    if buffer_bytes:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    made = functools.partial(Wire, theirs, is_http_11=is_http_11)
    transport, exchange = await asyncio.get_running_loop().create_connection(made, sock=ours)
    try:
        yield exchange
    finally:
        transport.abort()
        theirs.close()
