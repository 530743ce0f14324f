"""Lines about strangers, who must not be able to fill a log: one at once, then one in a while that tells how many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

INTERVAL_S: Final = 10.0


class Seldom:
    """Thread-safe."""

    def __init__(self, *, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._due_s = float("-inf")
        self._num_unsaid = 0

    def may_say(self) -> int | None:
        """How many times it was None since the last line; None when the next line is not due yet."""
        with self._lock:
            now_s = self._clock()
            if now_s < self._due_s:
                self._num_unsaid += 1
                return None
            num_unsaid, self._num_unsaid = self._num_unsaid, 0
            self._due_s = now_s + self._interval_s
            return num_unsaid
