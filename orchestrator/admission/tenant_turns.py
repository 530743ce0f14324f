"""Whose turn it is among tenants of one priority: deficit round robin, counted in tokens. Pure.

Shreedhar and Varghese, "Efficient Fair Queuing using Deficit Round Robin", SIGCOMM 1995. A tenant whose turn comes is
given a quantum of tokens to spend, and keeps what it cannot spend yet; the one who sends long prompts is thereby
served as many tokens as the one who sends short ones, not as many requests. What a request costs is only estimated when
it is served, since nobody knows how long its answer will be: the difference is settled when it is over, so that a
deficit may fall below nothing and is then made up for in later turns.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")

QUANTUM_TOKENS: Final = 256
"""A turn's worth, for a tenant of weight 1. Between two tenants who both wait, what they were served never differs by
more than this and one request."""


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Waiting(Generic[Item]):
    """One request's place in its tenant's line. Times are on the caller's monotonic clock."""

    item: Item
    tenant: str = ""
    weight: float = 1.0
    """The tenant's share of the turns."""
    priority: int = 0
    """A lower one is served earlier."""
    arrival: int = 0
    cost: int
    """Tokens that it is expected to take; at least 1."""
    since_s: float
    start_by_s: float
    """After this there is no use in starting it."""
    is_gone: bool = False
    returned_of_s: float | None = None
    """Of one that was taken before, and whose dispatch came to nothing: when it had come."""

    def __lt__(self, other: Waiting[Item]) -> bool:
        return self.arrival < other.arrival


class Line(Generic[Item]):
    """One tenant's requests, first come, first served. Those who left are thrown away once they are at the head."""

    def __init__(self, tenant: str, *, weight: float, deficit: float) -> None:
        self.tenant = tenant
        self.weight = weight
        self.deficit = deficit
        self.num_waiting = 0
        self.tokens_waiting = 0
        self._heap: list[Waiting[Item]] = []

    def push(self, place: Waiting[Item]) -> None:
        heapq.heappush(self._heap, place)
        self.num_waiting += 1
        self.tokens_waiting += place.cost

    def head(self) -> Waiting[Item]:
        while self._heap[0].is_gone:
            heapq.heappop(self._heap)
        return self._heap[0]

    def last(self) -> Waiting[Item]:
        return max(place for place in self._heap if not place.is_gone)

    def left(self, place: Waiting[Item]) -> None:
        self.num_waiting -= 1
        self.tokens_waiting -= place.cost
        if len(self._heap) > 2 * self.num_waiting + 16:
            self._heap = [each for each in self._heap if not each.is_gone]
            heapq.heapify(self._heap)

    def check_integrity(self) -> None:
        there = [place for place in self._heap if not place.is_gone]
        assert len(there) == self.num_waiting, f"a place of {self.tenant!r} is lost"
        assert sum(place.cost for place in there) == self.tokens_waiting, f"tokens of {self.tenant!r} are miscounted"


class TenantTurns(Generic[Item]):
    """The lines of one priority. The one at the front of the rotation has its turn.

    Invariant: every line of the rotation has somebody waiting; a line that nobody waits in any more is gone, and what
    it owes is handed to whoever keeps the books of debts.
    """

    def __init__(self) -> None:
        self.lines: dict[str, Line[Item]] = {}
        self._rotation: deque[Line[Item]] = deque()
        self._has_turn: Line[Item] | None = None
        """The line that got its quantum for the turn it has now."""

    def push(self, place: Waiting[Item], *, debt: float) -> None:
        """debt: what the tenant was served too much before, when it comes without having waited here."""
        line = self.lines.get(place.tenant)
        if line is None:
            line = self.lines[place.tenant] = Line(place.tenant, weight=place.weight, deficit=-debt)
            self._rotation.append(line)
        line.push(place)

    def first(self) -> Waiting[Item]:
        """Whose turn it is; there must be somebody. Asking again changes nothing."""
        num_passed = 0
        while True:
            line = self._rotation[0]
            if line is not self._has_turn:
                self._has_turn = line
                self._top_up(line, num_rounds=1)
            head = line.head()
            if line.deficit >= head.cost:
                return head
            self._rotation.rotate(-1)
            self._has_turn = None
            num_passed += 1
            if num_passed == len(self._rotation):
                self._skip_fruitless_rounds()
                num_passed = 0

    def _skip_fruitless_rounds(self) -> None:
        """Nobody can afford what it wants yet: go round as often at once as it takes until somebody nearly can."""
        fewest = min(
            math.ceil((line.head().cost - line.deficit) / (QUANTUM_TOKENS * line.weight)) for line in self._rotation
        )
        for line in self._rotation:
            self._top_up(line, num_rounds=max(0, fewest - 1))

    def _top_up(self, line: Line[Item], *, num_rounds: int) -> None:
        line.deficit += num_rounds * QUANTUM_TOKENS * line.weight

    def left(self, place: Waiting[Item]) -> float:
        """It no longer waits. Returns what its tenant owes, if its line is thereby at its end; else 0."""
        line = self.lines[place.tenant]
        line.left(place)
        if line.num_waiting:
            return 0.0
        del self.lines[place.tenant]
        self._rotation.remove(line)
        return max(0.0, -line.deficit)

    def __iter__(self) -> Iterator[Line[Item]]:
        return iter(self._rotation)

    def __len__(self) -> int:
        return len(self._rotation)

    def check_integrity(self) -> None:
        assert set(self.lines.values()) == set(self._rotation), "a line has no turn"
        for line in self._rotation:
            assert line.num_waiting > 0, f"an empty line has a turn: {line.tenant!r}"
            line.check_integrity()
