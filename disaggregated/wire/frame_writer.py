"""Frames on their way out: those of one turn of the event loop leave together."""

from __future__ import annotations

import asyncio


class FrameWriter:
    """One connection's. What is sent in one turn costs one call of the kernel, and wakes the other end up once."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._waiting: list[bytes] = []
        self._loop = asyncio.get_running_loop()

    def send(self, frame: bytes) -> None:
        """To a connection that is closing: nothing."""
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(frame)

    def flush(self) -> None:
        """Also before the connection is closed: what was sent before that is to arrive."""
        waiting, self._waiting = self._waiting, []
        if waiting and not self._transport.is_closing():
            self._transport.write(waiting[0] if len(waiting) == 1 else b"".join(waiting))
