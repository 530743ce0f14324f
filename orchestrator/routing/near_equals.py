"""Which of several servers is taken, when what they cost is so close that the difference is noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from orchestrator.routing.estimate import Decode, Prefill
from orchestrator.server import Server

NEAR: Final = 1.1
"""Two figures that were measured are rarely equal: up to so much more than the least is as good as the least."""
NEAR_S: Final = 0.0005
SIDE_MAX: Final = 4
"""Pairs are made of so many servers of a side, the first in the order of preference. So what a placement costs grows
with the number of servers, and not with its square."""
NAMES_MAX: Final = 10_000
"""Instances whose last turn is remembered; when full, the one that was not taken for longest is forgotten."""

Row = TypeVar("Row", Prefill, Decode)


class Turns:
    """Who was taken when. Servers that cost the same are taken in turn, so that the caches of all of them are used.

    Each side is put into an order of preference, pairs are made in this order, and the first pair is taken that is near
    the least of all. What a server costs is no part of the order, but for who is in it when a side has too many.

    Invariant: no two instances have the same turn.
    """

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}
        """The last turn of each instance; a later one is greater."""
        self._count = 0

    def take(self, *servers: Server | None) -> None:
        taken = self.taken
        for server in servers:
            if server is not None:
                self._count += 1
                taken[server.instance_id] = self._count
        while len(taken) > NAMES_MAX:
            del taken[min(taken, key=taken.__getitem__)]


def first_prefills(rows: list[Prefill]) -> list[Prefill]:
    """First who has the fewest tokens to compute; then the fewest requests; then the emptiest cache, so that nothing is
    evicted while another one has room; then in turn."""
    rows.sort()
    return _cheapest(rows, _prefill_s) if len(rows) > SIDE_MAX else rows


def first_decodes(rows: list[Decode]) -> list[Decode]:
    """First who has the fewest requests; then in turn."""
    rows.sort()
    return _cheapest(rows, _decode_s) if len(rows) > SIDE_MAX else rows


def first_near_least(scores: Sequence[float]) -> int:
    """Its place; there is at least one."""
    limit, place = NEAR * min(scores) + NEAR_S, 0
    while scores[place] > limit:
        place += 1
    return place


def _cheapest(rows: list[Row], seconds: Callable[[Row], float]) -> list[Row]:
    """Those near the least come first, in their order; then the others, by what they cost."""
    limit_s = NEAR * min(map(seconds, rows)) + NEAR_S
    return sorted(rows, key=lambda row: max(limit_s, seconds(row)))[:SIDE_MAX]


def _prefill_s(row: Prefill) -> float:
    *_, queue_s, compute_s = row
    return queue_s + compute_s


def _decode_s(row: Decode) -> float:
    *_, decode_s, _, _ = row
    return decode_s
