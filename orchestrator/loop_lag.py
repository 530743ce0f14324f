"""How long the event loop could not turn to anything else: what every stream of the process waits for.

A timer is due every INTERVAL_S; how late it comes is how long the loop, or the interpreter, was held by something else.
A stall of `d` is seen as at least `d - INTERVAL_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

INTERVAL_S: Final = 0.02
"""A wake-up costs 10 microseconds: a two-thousandth of one core."""


class LoopLag:
    """Tells `observe` how late each timer came, in seconds, from `start()` to `stop()`."""

    def __init__(self, observe: Callable[[float], object], *, interval_s: float = INTERVAL_S) -> None:
        self._observe = observe
        self._interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None
        self.longest_s = 0.0

    def start(self) -> None:
        """From within the loop."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._interval_s, self._tick, loop, loop.time() + self._interval_s)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        now_s = loop.time()
        lag_s = max(0.0, now_s - due_s)
        self.longest_s = max(self.longest_s, lag_s)
        self._observe(lag_s)
        self._timer = loop.call_later(self._interval_s, self._tick, loop, now_s + self._interval_s)
