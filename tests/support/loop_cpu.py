"""What an event loop's thread computes between two timers: a busy machine does not count, a blocking call does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Final

INTERVAL_S: Final = 0.01


class LoopCpu:
    """As a context manager, from within the loop. `longest_s` is at least what the longest callback took."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._last_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> LoopCpu:
        self._last_s = time.thread_time()
        self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._timer is not None
        self._timer.cancel()
        self._count()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._tick)

    def _tick(self) -> None:
        self._count()
        self._arm()

    def _count(self) -> None:
        now_s = time.thread_time()
        self.longest_s = max(self.longest_s, now_s - self._last_s - INTERVAL_S)
        self._last_s = now_s


@contextlib.contextmanager
def frozen_garbage() -> Iterator[None]:
    """As the orchestrator does it when it has started: a collection does not look at everything that is there already.
    It stays so, as after the collection of the tests."""
    gc.collect()
    gc.freeze()
    yield
