"""What has not come in time: one timer for the oldest, instead of one for each.

It is for times that are the same for all, or nearly all: what is due before something that was expected earlier has a
timer of its own, which costs twenty times as much.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

Awaited = TypeVar("Awaited", bound=Hashable)


SLACK_S: Final = 0.01
"""So much later than it is due somebody may hear of it, to stand in line."""


class Overdue(Generic[Awaited]):
    """Invariant: while anything stands in line a timer runs, and it fires no later than the oldest of it is due."""

    def __init__(self, after_s: float, late: Callable[[Awaited], None]) -> None:
        """`late` is told of each that has not come in time; it is awaited no more then."""
        self._after_s = after_s
        self._late = late
        self._due_s: dict[Awaited, float] = {}
        """In the order in which they are due."""
        self._last_due_s = 0.0
        """Of the last one that was put in line."""
        self._out_of_line: dict[Awaited, asyncio.TimerHandle] = {}
        self._timer: asyncio.TimerHandle | None = None
        """None: nothing stands in line, or nothing did when it last fired."""
        self._fires_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    def __contains__(self, awaited: Awaited) -> bool:
        return awaited in self._due_s or awaited in self._out_of_line

    def expect(self, awaited: Awaited, after_s: float | None = None) -> None:
        """`after_s`: where it is not as with all others."""
        assert awaited not in self._due_s, "it is awaited already"
        loop = self._loop or self._find_loop()
        due_s = loop.time() + (self._after_s if after_s is None else after_s)
        if due_s < self._last_due_s and self._due_s:
            if due_s < self._last_due_s - SLACK_S:
                self._out_of_line[awaited] = loop.call_at(due_s, self._tell, awaited)
                return
            due_s = self._last_due_s
        self._due_s[awaited] = self._last_due_s = due_s
        if self._timer is None or due_s < self._fires_s:
            self._look_at(loop, due_s)

    def _look_at(self, loop: asyncio.AbstractEventLoop, when_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._fires_s = loop.call_at(when_s, self._look), when_s

    def _find_loop(self) -> asyncio.AbstractEventLoop:
        """Found once: to ask for the running loop is a call of the kernel."""
        self._loop = asyncio.get_running_loop()
        return self._loop

    def came(self, awaited: Awaited) -> bool:
        """Whether it was awaited; it is no more."""
        if self._due_s.pop(awaited, None) is not None:
            return True
        timer = self._out_of_line.pop(awaited, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def close(self) -> None:
        """Nothing is awaited any more."""
        self._due_s.clear()
        for timer in self._out_of_line.values():
            timer.cancel()
        self._out_of_line.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        loop = self._loop or self._find_loop()
        self._timer = None
        late = []
        for awaited, due_s in self._due_s.items():
            if due_s > loop.time():
                self._look_at(loop, due_s)
                break
            late.append(awaited)
        for awaited in late:
            self._tell(awaited)

    def _tell(self, awaited: Awaited) -> None:
        if self.came(awaited):
            self._late(awaited)
