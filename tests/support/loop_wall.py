"""How late an event loop is by the clock, and beside which requests: they can be asked again, alone.

On a machine that others use too, a loop is late without having done anything. But what holds it up by itself does so
each time: of several tries the best one tells.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, Generic, TypeVar

from orchestrator.loop_lag import LoopLag

INTERVAL_S: Final = 0.005
TRIES: Final = 40

Asked = TypeVar("Asked")


class LoopWall(Generic[Asked]):
    """As a context manager, from within the loop."""

    def __init__(self, late_s: float) -> None:
        self._late_s = late_s
        self._lag = LoopLag(self._observe, interval_s=INTERVAL_S)
        self._under_way: list[Asked] = []
        self._over: list[Asked] = []
        """Since the timer came last."""
        self.suspects: list[Asked] = []
        """Beside which the loop was late."""

    @property
    def longest_s(self) -> float:
        return self._lag.longest_s

    def __enter__(self) -> LoopWall[Asked]:
        self._lag.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lag.stop()

    @contextlib.contextmanager
    def asking(self, asked: Asked) -> Iterator[None]:
        self._under_way.append(asked)
        yield
        self._under_way.remove(asked)
        self._over.append(asked)

    def _observe(self, lag_s: float) -> None:
        if lag_s > self._late_s:
            self.suspects += [*self._under_way, *self._over]
        self._over.clear()


async def shortest_lag_s(ask: Callable[[], Awaitable[None]], enough_s: float) -> float:
    """Of several tries, the first that is short enough or else the best one: how late the loop is while it asks, and
    no later than for as long as this process computes."""
    best_s = float("inf")
    for _ in range(TRIES):
        began_s = time.process_time()
        with LoopWall[None](enough_s) as wall:
            await ask()
        best_s = min(best_s, wall.longest_s, time.process_time() - began_s)
        if best_s < enough_s:
            break
    return best_s
