"""What has not come after a time that is the same for all: one timer for the oldest, instead of one for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Awaited = TypeVar("Awaited", bound=Hashable)


class Overdue(Generic[Awaited]):
    """Invariant: while anything is awaited a timer runs, and it fires no later than the oldest of it is due."""

    def __init__(self, after_s: float, late: Callable[[Awaited], None]) -> None:
        """`late` is told of each that has not come in time; it is awaited no more then."""
        self._after_s = after_s
        self._late = late
        self._due_s: dict[Awaited, float] = {}
        """In the order in which they are due, since each was put at the end."""
        self._timer: asyncio.TimerHandle | None = None
        """None: nothing is awaited, or nothing was when it last fired."""

    def __contains__(self, awaited: Awaited) -> bool:
        return awaited in self._due_s

    def expect(self, awaited: Awaited) -> None:
        assert awaited not in self._due_s, "it is awaited already"
        loop = asyncio.get_running_loop()
        self._due_s[awaited] = loop.time() + self._after_s
        if self._timer is None:
            self._timer = loop.call_later(self._after_s, self._look)

    def came(self, awaited: Awaited) -> bool:
        """Whether it was awaited; it is no more."""
        return self._due_s.pop(awaited, None) is not None

    def close(self) -> None:
        """Nothing is awaited any more."""
        self._due_s.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        late = []
        for awaited, due_s in self._due_s.items():
            if due_s > loop.time():
                self._timer = loop.call_at(due_s, self._look)
                break
            late.append(awaited)
        for awaited in late:
            if self.came(awaited):
                self._late(awaited)
