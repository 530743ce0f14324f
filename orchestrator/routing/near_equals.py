"""Which of several servers is taken, when what they cost is so close that the difference is noise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, TypeVar

from orchestrator.routing.estimate import Decode, Estimate, Prefill

NEAR: Final = 1.1
"""Two figures that were measured are rarely equal: up to so much more than the least is as good as the least."""
NEAR_S: Final = 0.0005
SIDE_MAX: Final = 4
"""Pairs are made of so many servers of a side, the first in the order of preference. So what a placement costs grows
with the number of servers, and not with its square."""
NAMES_MAX: Final = 10_000
"""Instances whose last turn is remembered; when full, the one that was not taken for longest is forgotten."""


Side = TypeVar("Side", Prefill, Decode)


class Turns:
    """Who was taken when. Servers that cost the same are taken in turn, so that the caches of all of them are used.

    Each side is put into an order of preference, pairs are made in this order, and the first pair is taken that is near
    the least of all. What a server costs is no part of the order, but for who is in it when a side has too many.

    Invariant: the instance taken last stands at the end.
    """

    def __init__(self) -> None:
        self._taken: OrderedDict[str, int] = OrderedDict()
        self._count = 0

    def prefills(self, prefills: list[Prefill]) -> list[Prefill]:
        """First who has the fewest tokens to compute; then the fewest requests; then the emptiest cache, so that
        nothing is evicted while another one has room; then in turn."""
        if len(prefills) > 1:
            prefills.sort(key=self._prefill_order)
        return _cheapest(prefills) if len(prefills) > SIDE_MAX else prefills

    def decodes(self, decodes: list[Decode]) -> list[Decode]:
        """First who has the fewest requests; then in turn."""
        if len(decodes) > 1:
            decodes.sort(key=self._decode_order)
        return _cheapest(decodes) if len(decodes) > SIDE_MAX else decodes

    def least(self, estimates: Sequence[Estimate]) -> Estimate | None:
        """The first one that is near the least."""
        if not estimates:
            return None
        limit_s = _near(min([estimate.score_s for estimate in estimates]))
        return next(estimate for estimate in estimates if estimate.score_s <= limit_s)

    def _prefill_order(self, prefill: Prefill) -> tuple[int, int, int, int]:
        _, server, num_cached, _, _, _ = prefill
        turn = self._taken.get(server.instance_id, 0)
        return -num_cached, server.num_requests, len(server.known_blocks), turn

    def _decode_order(self, decode: Decode) -> tuple[int, int]:
        _, server, _, num_requests = decode
        return num_requests, self._taken.get(server.instance_id, 0)

    def taken(self, estimate: Estimate) -> None:
        for server in (estimate.context, estimate.generation):
            if server is not None:
                self._count += 1
                self._taken[server.instance_id] = self._count
                self._taken.move_to_end(server.instance_id)
        if len(self._taken) > NAMES_MAX:
            self._taken.popitem(last=False)


def _cheapest(side: list[Side]) -> list[Side]:
    """Those near the least come first, in their order; then the others, by what they cost."""
    limit_s = _near(min([seconds for seconds, *_ in side]))
    return sorted(side, key=lambda server: max(limit_s, server[0]))[:SIDE_MAX]


def _near(least_s: float) -> float:
    return NEAR * least_s + NEAR_S
