"""A bound on the bytes that are under way into this process, over all transfers, shared fairly by their sources.

Who reads holds bytes of the budget first. A source gets at most as much as it leaves free, so that a slow one keeps no
other waiting, but always what one read needs at least, as soon as that is free: any budget moves any prompt, a small
one slowly. (The rule is that of `readers.py`, for bytes.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Final

from disaggregated.errors import TransferTimeout
from kvtransfer.deadline import Deadline
from kvtransfer.transport import PROGRESS_TIMEOUT_S, ReadStop

KEEPS_ROOM_S: Final = PROGRESS_TIMEOUT_S


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Request:
    source: str
    least: int
    most: int
    came_s: float = dataclasses.field(default_factory=time.monotonic)


class InFlight:
    """Used from any thread.

    Invariant: what is held is no more than `num_bytes_max`, or is the one read that needs more than that alone.
    """

    def __init__(self, num_bytes_max: int) -> None:
        assert num_bytes_max > 0, f"{num_bytes_max} bytes in flight move nothing"
        self.num_bytes_max = num_bytes_max
        self.high_water_bytes = 0
        """The most that was held at once."""
        self._changed = threading.Condition()
        self._held: collections.Counter[str] = collections.Counter()
        self._queue: list[_Request] = []

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return self._held.total()

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @contextlib.contextmanager
    def holding(self, source: str, *, least: int, most: int, stop: ReadStop, deadline: Deadline) -> Iterator[int]:
        """Gives so many bytes, between `least` and `most`, as the caller may have under way inside. Waits for them.

        Raises TransferTimeout, and ReadStopped when a stop is requested while it waits.
        """
        assert 0 < least <= most, f"at least {least}, at most {most} bytes"
        granted = self._take(_Request(source, least, most), stop, deadline)
        try:
            yield granted
        finally:
            with self._changed:
                self._held[source] -= granted
                if not self._held[source]:
                    del self._held[source]
                self._changed.notify_all()

    def _take(self, request: _Request, stop: ReadStop, deadline: Deadline) -> int:
        with stop.waking(self._wake), self._changed:
            self._queue.append(request)
            try:
                while not (granted := self._share(request)):
                    stop.check()
                    if deadline.left_s() <= 0:
                        raise TransferTimeout(f"no {request.least} of {self.num_bytes_max} bytes came free in time")
                    self._changed.wait(min(deadline.left_s(), KEEPS_ROOM_S))
                self._held[request.source] += granted
                self.high_water_bytes = max(self.high_water_bytes, self._held.total())
                return granted
            finally:
                self._queue.remove(request)
                self._changed.notify_all()

    def _share(self, request: _Request) -> int:
        """What it gets now; 0: it waits. Who came first goes first, of those who do not wait for their own source."""
        first = next((each for each in self._queue if self._fits(each) or self._keeps_room(each)), None)
        if first is not request or not self._fits(request):
            return 0
        free = self.num_bytes_max - self._held.total()
        fair = (free - self._held[request.source]) // 2
        return max(request.least, min(request.most, fair))

    def _fits(self, request: _Request) -> bool:
        free, own = self.num_bytes_max - self._held.total(), self._held[request.source]
        if not self._held:
            return True
        return free >= request.least and (own == 0 or (free - own) // 2 >= request.least)

    def _keeps_room(self, request: _Request) -> bool:
        """One that finds too little room, and whose source holds none of it, is not passed by: small reads that always
        find some would keep a large one out for ever. But only for as long as a read that is not stuck may take."""
        return not self._held[request.source] and time.monotonic() - request.came_s < KEEPS_ROOM_S

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
