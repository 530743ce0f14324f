"""Frames of one turn of the event loop leave together, in order, and before the connection is closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from disaggregated.wire.frame_writer import FrameWriter

PATIENCE_S = 5.0


class Segments(asyncio.Protocol):
    """What came, as it came."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.came = asyncio.Event()
        self.ended = asyncio.Event()

    def data_received(self, received: bytes) -> None:
        self.received.append(received)
        self.came.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set()


@contextlib.asynccontextmanager
async def both_ends() -> AsyncIterator[tuple[asyncio.Transport, Segments]]:
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    reading, segments = await loop.create_connection(Segments, sock=theirs)
    try:
        yield transport, segments
    finally:
        transport.abort()
        reading.abort()


async def test_frames_of_one_turn_leave_together_and_in_order() -> None:
    async with both_ends() as (transport, segments):
        writer = FrameWriter(transport)
        for part in (b"one ", b"two ", b"three"):
            writer.send(part)
        await _until_received(segments, 13)
        assert segments.received == [b"one two three"]
        writer.send(b"four")
        await _until_received(segments, 17)
        assert segments.received == [b"one two three", b"four"]


async def test_what_was_flushed_before_closing_arrives() -> None:
    async with both_ends() as (transport, segments):
        writer = FrameWriter(transport)
        writer.send(b"the last word")
        writer.flush()
        transport.close()
        async with asyncio.timeout(PATIENCE_S):
            await segments.ended.wait()
        assert b"".join(segments.received) == b"the last word"


async def test_after_closing_nothing_is_written_and_nothing_raises() -> None:
    async with both_ends() as (transport, segments):
        writer = FrameWriter(transport)
        writer.send(b"too late")
        transport.close()
        writer.send(b"later still")
        async with asyncio.timeout(PATIENCE_S):
            await segments.ended.wait()
        assert segments.received == []


async def _until_received(segments: Segments, num_bytes: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while sum(map(len, segments.received)) < num_bytes:
            segments.came.clear()
            await segments.came.wait()
