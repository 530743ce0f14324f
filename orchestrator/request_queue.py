"""The one place where requests wait: priority first, then first come, first served. Pure: no clock, no I/O.

A request that comes back because its server was lost keeps the arrival number it had, so it stands before everything
that came later, and it is never refused: it was admitted once.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections import deque
from typing import Final, Generic, TypeVar

from disaggregated.errors import QueueFull

Item = TypeVar("Item")

_RECENT: Final = 64
"""Departures that the estimate of Retry-After looks back on."""
RETRY_AFTER_S_MAX: Final = 60


@dataclasses.dataclass(slots=True, eq=False)
class Waiting(Generic[Item]):
    """One place in the queue. `deadline_s` is on the caller's monotonic clock."""

    item: Item
    priority: int
    arrival: int
    deadline_s: float
    is_gone: bool = False

    def __lt__(self, other: Waiting[Item]) -> bool:
        return (self.priority, self.arrival) < (other.priority, other.arrival)


class RequestQueue(Generic[Item]):
    """Invariant: `len(queue)` is the number of entries in the heap that are not gone, and is at most `depth_max`
    except for what was put back.
    """

    def __init__(self, depth_max: int) -> None:
        self.depth_max = depth_max
        self._heap: list[Waiting[Item]] = []
        self._length = 0
        self._arrivals = itertools.count()
        self._departures_s: deque[float] = deque(maxlen=_RECENT)

    def __len__(self) -> int:
        return self._length

    def put(self, item: Item, *, priority: int, deadline_s: float) -> Waiting[Item]:
        """Stand at the end of `priority`; a lower number is served earlier.

        Raises:
            QueueFull: `depth_max` wait already. When full, the newcomer is refused and nobody is pushed out.
        """
        if self._length >= self.depth_max:
            raise QueueFull(f"{self._length} requests are waiting, the limit is {self.depth_max}")
        waiting = Waiting(item, priority, next(self._arrivals), deadline_s)
        self._push(waiting)
        return waiting

    def put_back(self, waiting: Waiting[Item]) -> Waiting[Item]:
        """A request whose dispatch came to nothing waits again, in its old place; it may stand above `depth_max`."""
        assert waiting.is_gone, "it waits already"
        again = dataclasses.replace(waiting, is_gone=False)
        self._push(again)
        return again

    def _push(self, waiting: Waiting[Item]) -> None:
        heapq.heappush(self._heap, waiting)
        self._length += 1

    def first(self, *, now_s: float) -> Waiting[Item] | None:
        """Who is served next; it stays. Whoever's deadline has passed is dropped: nothing late is ever started."""
        while self._heap:
            head = self._heap[0]
            if not head.is_gone and head.deadline_s > now_s:
                return head
            heapq.heappop(self._heap)
            self._leave(head)
        return None

    def take(self, waiting: Waiting[Item], *, now_s: float) -> None:
        """The first one is being dispatched."""
        assert self._heap[0] is waiting, "only the first one may be taken"
        heapq.heappop(self._heap)
        self._leave(waiting)
        self._departures_s.append(now_s)

    def remove(self, waiting: Waiting[Item]) -> None:
        """It no longer waits: cancelled, or past its deadline. Idempotent."""
        self._leave(waiting)
        if len(self._heap) > 2 * self._length + _RECENT:
            self._heap = [entry for entry in self._heap if not entry.is_gone]
            heapq.heapify(self._heap)

    def _leave(self, waiting: Waiting[Item]) -> None:
        if not waiting.is_gone:
            waiting.is_gone = True
            self._length -= 1

    def retry_after_s(self, *, now_s: float) -> int:
        """Whole seconds until a newcomer may hope to be taken, from the pace of late; at least 1."""
        if len(self._departures_s) < 2:
            return 1 if not self._length else 5
        pace = len(self._departures_s) / max(now_s - self._departures_s[0], 1e-3)
        return min(max(1, math.ceil(self._length / pace)), RETRY_AFTER_S_MAX)

    def check_integrity(self) -> None:
        assert self._length == sum(not entry.is_gone for entry in self._heap), "an entry is lost"
        assert len({id(entry) for entry in self._heap if not entry.is_gone}) == self._length, "an entry is there twice"
