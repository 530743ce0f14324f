"""Tells when a peer has been silent for too long, and is not fooled when it is we who were away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class SilenceAlarm:
    """Calls `on_silence` once, `limit_s` after the last `heard()`; the caller closes it.

    A timer that fires late means that this process was stopped or starved, and what the peer said meanwhile still lies
    in a socket: the peer then gets `second_chance_s` more. `heard()` is cheap: the timer is moved only when it fires.
    """

    def __init__(self, on_silence: Callable[[], None], *, limit_s: float, second_chance_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_silence = on_silence
        self._limit_s = limit_s
        self._second_chance_s = second_chance_s
        self._due_s = self._loop.time() + limit_s
        self._timer = self._loop.call_at(self._due_s, self._fired)

    def heard(self) -> None:
        self._due_s = self._loop.time() + self._limit_s

    def close(self) -> None:
        self._timer.cancel()

    def _fired(self) -> None:
        now_s = self._loop.time()
        if now_s - self._timer.when() > self._second_chance_s / 2:
            self._due_s = max(self._due_s, now_s + self._second_chance_s)
        if now_s >= self._due_s:
            self._on_silence()
        else:
            self._timer = self._loop.call_at(self._due_s, self._fired)
