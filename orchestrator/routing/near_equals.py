"""Which of several servers is taken, when what they cost is so close that the difference is noise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from orchestrator.routing.estimate import Decode, Estimate, Prefill

NEAR: Final = 1.1
"""Two figures that were measured are rarely equal: up to so much more than the least is as good as the least."""
NEAR_S: Final = 0.0005
SIDE_MAX: Final = 4
"""Pairs are made of so many servers of a side, the first in the order of preference. So what a placement costs grows
with the number of servers, and not with its square."""
NAMES_MAX: Final = 10_000
"""Instances whose last turn is remembered; when full, the one that was not taken for longest is forgotten."""


class Turns:
    """Who was taken when. Servers that cost the same are taken in turn, so that the caches of all of them are used.

    Each side is put into an order of preference first: those near the least of their side, then the others by what they
    cost. Pairs are made in this order, and the first one is taken that is near the least of all pairs.

    Invariant: the instance taken last stands at the end.
    """

    def __init__(self) -> None:
        self._taken: OrderedDict[str, int] = OrderedDict()
        self._count = 0

    def prefills(self, prefills: list[Prefill]) -> list[Prefill]:
        """Of those near the least, the one with the fewest tokens to compute comes first; then with the fewest
        requests; then with the emptiest cache, so that nothing is evicted while another one has room; then in turn."""
        if len(prefills) < 2:
            return prefills
        limit_s = _near(min([prefill.ttft_s for prefill in prefills]))
        taken = self._taken.get

        def order(prefill: Prefill) -> tuple[float, ...]:
            ttft_s, server, num_cached, _, _, _ = prefill
            near_s = ttft_s if ttft_s > limit_s else limit_s
            num_blocks = len(server.known_blocks)
            return near_s, -num_cached, server.num_requests, num_blocks, taken(server.instance_id, 0)

        return sorted(prefills, key=order)[:SIDE_MAX]

    def decodes(self, decodes: list[Decode]) -> list[Decode]:
        """Of those near the least, the one with the fewest requests comes first; then in turn."""
        if len(decodes) < 2:
            return decodes
        limit_s = _near(min([decode.decode_s for decode in decodes]))
        taken = self._taken.get

        def order(decode: Decode) -> tuple[float, ...]:
            decode_s, server, _, num_requests = decode
            near_s = decode_s if decode_s > limit_s else limit_s
            return near_s, num_requests, taken(server.instance_id, 0)

        return sorted(decodes, key=order)[:SIDE_MAX]

    def least(self, estimates: Sequence[Estimate]) -> Estimate | None:
        """The first one that is near the least."""
        if not estimates:
            return None
        limit_s = _near(min([estimate.score_s for estimate in estimates]))
        return next(estimate for estimate in estimates if estimate.score_s <= limit_s)

    def taken(self, estimate: Estimate) -> None:
        for server in (estimate.context, estimate.generation):
            if server is not None:
                self._count += 1
                self._taken[server.instance_id] = self._count
                self._taken.move_to_end(server.instance_id)
        if len(self._taken) > NAMES_MAX:
            self._taken.popitem(last=False)


def _near(least_s: float) -> float:
    return NEAR * least_s + NEAR_S
