"""Events of many streams, written to their connections one right after the other.

A decode step brings a token for each of its streams at once. Written as they are made, each write would find its
reader asleep, because it takes longer to make an event than to read one; and waking somebody up costs as much as
writing. So what is made in one turn of the event loop is kept, and written at its end.
"""

from __future__ import annotations

import asyncio
import os
from typing import Protocol


class Outlet(Protocol):
    """A connection that takes events as they are."""

    @property
    def descriptor(self) -> int:
        """Of its socket; valid while the transport is not closing."""

    @property
    def transport(self) -> asyncio.Transport | None:
        """None: the client has gone."""

    def write_rest(self, rest: bytes) -> None:
        """What the kernel did not take, or all of it when something is wrong with the connection."""


Address = tuple[int, asyncio.Transport, Outlet]
"""An outlet with its descriptor and its transport: who writes to it often makes this once."""


class Outbox:
    """Of one event loop. Invariant: a flush is due whenever something waits."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Address, bytes]] = []
        """Always the same list: whoever finds it empty calls `flush_soon()`, and whoever writes to an outlet otherwise
        `flush()`."""
        self._loop: asyncio.AbstractEventLoop | None = None
        """Kept: to ask for the running loop is a call of the kernel."""

    def put(self, outlet: Outlet, event: bytes) -> None:
        """For who can afford the call."""
        if (transport := outlet.transport) is None:
            return
        if not self.waiting:
            self.flush_soon()
        self.waiting.append(((outlet.descriptor, transport, outlet), event))

    def flush_soon(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self.flush)

    def flush(self) -> None:
        if not self.waiting:
            return
        waiting = self.waiting[:]
        self.waiting.clear()
        late: set[Outlet] = set()
        write = os.write
        for (descriptor, transport, outlet), event in waiting:
            # Before each write: a descriptor that is closed may by now be somebody else's.
            if transport.is_closing():
                continue
            if late and outlet in late:
                outlet.write_rest(event)
                continue
            try:
                num_taken = write(descriptor, event)
            except OSError:  # It is full (BlockingIOError), or broken: the transport finds that out by itself.
                num_taken = 0
            if num_taken != len(event):
                outlet.write_rest(event[num_taken:])
                late.add(outlet)
