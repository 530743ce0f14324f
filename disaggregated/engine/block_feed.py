"""From the engine's thread to whoever follows the prefix cache: changes of a step, to each watcher at its own pace.

The engine never waits for a watcher and keeps nothing for a slow one beyond a bound. Who has missed a change begins
again with a snapshot; the numbers of the events tell what the snapshot holds already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from disaggregated.engine.block_events import BlockEvent, BlockEventBatch
from disaggregated.errors import AdmissionError, InvalidRequest

NUM_WATCHERS_MAX: Final = 64


class BlockWatcher:
    """The changes that one reader has not taken yet, at most `num_events_max`. Any thread may call any method.

    collect() → a snapshot is made → skip_to(its number) → take(), take(), … until it gives None: then once more.

    Invariant: what is kept has no gap.
    """

    def __init__(self, num_events_max: int, wake: Callable[[], None]) -> None:
        """wake: called, on the thread that pushes, when there is something to take after there was nothing."""
        self._num_events_max = num_events_max
        self._wake = wake
        self._lock = threading.Lock()
        self._events: list[BlockEvent] = []
        self._next_number: int | None = None
        """Of the event after the last one here; None: any may come first."""
        self._has_missed = True

    def collect(self) -> None:
        """Keep what comes from now on, whatever number it begins with."""
        with self._lock:
            self._events.clear()
            self._next_number = None
            self._has_missed = False

    def skip_to(self, number: int) -> None:
        """Forget the changes before `number`: the reader has a snapshot that holds them."""
        with self._lock:
            if self._has_missed:
                return  # More came than is kept while the snapshot was made: take() will say so.
            if self._next_number is None:
                self._next_number = number
            num_since = self._next_number - number
            if num_since > len(self._events):  # A step after the snapshot changed more than the engine's log keeps.
                self._has_missed = True
                self._events.clear()
                return
            del self._events[: len(self._events) - max(0, num_since)]
            self._next_number = max(self._next_number, number)

    def take(self) -> list[BlockEvent] | None:
        """The changes since the last call, in order, maybe none; None: some were missed."""
        with self._lock:
            if self._has_missed:
                return None
            events, self._events = self._events, []
            return events

    def push(self, batch: BlockEventBatch) -> None:
        with self._lock:
            if self._has_missed:
                return
            is_news = not self._events
            is_gap = self._next_number not in (None, batch.first_number)
            if is_gap or len(self._events) + len(batch.events) > self._num_events_max:
                self._has_missed = True
                self._events.clear()
            else:
                self._events.extend(batch.events)
                self._next_number = batch.next_number
        if is_news:
            self._wake()


class BlockFeed:
    """All watchers of one engine."""

    def __init__(self, num_events_max: int) -> None:
        """num_events_max: kept for each watcher; 0: nobody may watch."""
        self._num_events_max = num_events_max
        self._lock = threading.Lock()
        self._watchers: tuple[BlockWatcher, ...] = ()

    def publish(self, batch: BlockEventBatch) -> None:
        """On the engine's thread. Without watchers this is one comparison."""
        if batch.events:
            for watcher in self._watchers:
                watcher.push(batch)

    @contextmanager
    def watching(self, wake: Callable[[], None]) -> Iterator[BlockWatcher]:
        """
        Raises:
            InvalidRequest: this engine keeps no events.
            AdmissionError: there are `NUM_WATCHERS_MAX` already.
        """
        if not self._num_events_max:
            raise InvalidRequest("kv_cache_config.event_buffer_max_size is 0 here: no changes are kept", param=None)
        watcher = BlockWatcher(self._num_events_max, wake)
        with self._lock:
            if len(self._watchers) >= NUM_WATCHERS_MAX:
                raise AdmissionError(f"{len(self._watchers)} watch the blocks of this server, that is the limit")
            self._watchers = (*self._watchers, watcher)
        try:
            yield watcher
        finally:
            with self._lock:
                self._watchers = tuple(other for other in self._watchers if other is not watcher)
