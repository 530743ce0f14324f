"""From the engine's thread to whoever waits for a sequence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from disaggregated.engine.api import EngineEvent, RequestFailed, TokensSampled
from disaggregated.errors import DisaggregatedError, ServerLost

Deliver = Callable[[EngineEvent], None]
"""Takes one event on the engine's thread, without waiting."""


class EventRouter:
    """Every open sequence gets its events, and exactly one that is its last: a finish reason, or a failure.

    Invariant: a sequence is open from `open()` until its last event was delivered or `close()` was called for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._receivers: dict[str, Deliver] = {}
        self._over_because: Callable[[], DisaggregatedError] | None = None

    def open(self, request_id: str, deliver: Deliver) -> None:
        """Raises the reason why nothing comes any more, once there is one."""
        with self._lock:
            if self._over_because is not None:
                raise self._over_because()
            self._receivers[request_id] = deliver

    def close(self, request_id: str) -> None:
        """Nothing more is delivered for it. Idempotent."""
        with self._lock:
            self._receivers.pop(request_id, None)

    def on_events(self, events: Sequence[EngineEvent]) -> None:
        with self._lock:
            for event in events:
                receiver = self._receivers.get(event.request_id)
                if receiver is None:
                    continue
                if is_last(event):
                    del self._receivers[event.request_id]
                receiver(event)

    def on_crash(self, error: BaseException) -> None:
        words = f"the engine crashed: {error!r}"
        self.end(lambda: ServerLost(words))

    def end(self, because: Callable[[], DisaggregatedError]) -> None:
        """Fail every open sequence, and those that would be opened from now on. The first reason stays."""
        with self._lock:
            self._over_because = self._over_because or because
            for request_id, receiver in self._receivers.items():
                receiver(RequestFailed(request_id=request_id, error=self._over_because()))
            self._receivers.clear()


def is_last(event: EngineEvent) -> bool:
    return isinstance(event, RequestFailed) or (isinstance(event, TokensSampled) and event.finish_reason is not None)
