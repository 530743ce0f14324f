"""Events of many streams leave together, in order, and never to somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

from orchestrator.api.outbox import Outbox

PATIENCE_S = 5.0


class Stream:
    """Implements `Outlet` over one end of a connection."""

    def __init__(self, transport: asyncio.Transport, reader: socket.socket) -> None:
        self.transport = transport
        self.descriptor = int(transport.get_extra_info("socket").fileno())
        self.rests: list[int] = []
        self._reader = reader

    def write_rest(self, rest: bytes) -> None:
        self.rests.append(len(rest))
        self.transport.write(rest)

    async def read(self, num_bytes: int) -> bytes:
        read = b""
        async with asyncio.timeout(PATIENCE_S):
            while len(read) < num_bytes:
                read += await asyncio.get_running_loop().sock_recv(self._reader, num_bytes - len(read))
        return read


@contextlib.asynccontextmanager
async def connected(*, send_bytes: int = 0) -> AsyncIterator[Stream]:
    ours, theirs = socket.socketpair()
    if send_bytes:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
    try:
        yield Stream(transport, theirs)
    finally:
        transport.abort()
        theirs.close()


async def test_what_is_put_in_one_turn_leaves_at_its_end_in_order() -> None:
    outbox = Outbox()
    async with connected() as one, connected() as other:
        for number in range(3):
            outbox.put(one, b"a%d" % number)
            outbox.put(other, b"b%d" % number)
        assert len(outbox.waiting) == 6
        assert (await one.read(6), await other.read(6)) == (b"a0a1a2", b"b0b1b2")
        assert not outbox.waiting
        outbox.put(one, b"next")
        assert await one.read(4) == b"next"


async def test_what_the_kernel_does_not_take_stays_before_what_comes_after_it() -> None:
    outbox = Outbox()
    events = [bytes([number]) * 30_000 for number in range(8)]
    async with connected(send_bytes=4096) as slow, connected() as other:
        for event in events:
            outbox.put(slow, event)
            outbox.put(other, b"x")
        outbox.flush()
        assert len(slow.rests) > 1, "the kernel took it all: the test shows nothing"
        assert await other.read(8) == b"x" * 8
        assert await slow.read(240_000) == b"".join(events)


async def test_a_descriptor_that_became_somebody_elses_is_not_written_to() -> None:
    outbox = Outbox()
    async with connected() as gone:
        outbox.put(gone, b"not for you")
        gone.transport.abort()
        reader, writer = os.pipe()
        try:
            os.set_blocking(reader, False)
            os.dup2(writer, gone.descriptor)
            outbox.flush()
            with contextlib.suppress(BlockingIOError):
                assert os.read(reader, 100) == b"", "the event went to whoever has the number now"
        finally:
            os.close(reader)
            os.close(writer)


async def test_a_connection_that_broke_keeps_nobody_else_from_theirs() -> None:
    outbox = Outbox()
    async with connected() as broken, connected() as other:
        broken._reader.close()
        for _ in range(2):
            outbox.put(broken, b"lost")
            outbox.put(other, b"kept")
        outbox.flush()
        assert await other.read(8) == b"keptkept"
