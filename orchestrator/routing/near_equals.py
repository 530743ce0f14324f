"""Which of several estimates is taken, when they are so close that their difference is noise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from orchestrator.routing.estimate import Estimate

NEAR: Final = 1.1
"""Two figures that were measured are rarely equal: up to so much more than the least is as good as the least."""
NEAR_S: Final = 0.0005
NAMES_MAX: Final = 10_000
"""Instances whose last turn is remembered; when full, the one that was not taken for longest is forgotten."""


class Turns:
    """Who was taken when. Servers that cost the same are taken in turn, so that the caches of all of them are used.

    Invariant: the instance taken last stands at the end.
    """

    def __init__(self) -> None:
        self._taken: OrderedDict[str, int] = OrderedDict()
        self._count = 0

    def least(self, estimates: Sequence[Estimate]) -> Estimate | None:
        """Of those near the least, who computes the fewest tokens; then who has the fewest requests; then whose cache
        is emptiest, so that nothing is evicted while another one has room; then in turn."""
        limit_s = NEAR * min((estimate.score_s for estimate in estimates), default=0.0) + NEAR_S
        near = [estimate for estimate in estimates if estimate.score_s <= limit_s]
        if len(near) == 1:
            return near[0]
        return min(near, key=self._order, default=None)

    def taken(self, estimate: Estimate) -> None:
        for server in (estimate.context, estimate.generation):
            if server is not None:
                self._count += 1
                self._taken[server.instance_id] = self._count
                self._taken.move_to_end(server.instance_id)
        while len(self._taken) > NAMES_MAX:
            self._taken.popitem(last=False)

    def _order(self, estimate: Estimate) -> tuple[object, ...]:
        servers = [server for server in (estimate.context, estimate.generation) if server is not None]
        return (
            -estimate.prefill.num_cached,
            sum(server.num_requests for server in servers),
            len(estimate.prefill.server.known_blocks),
            [self._taken.get(server.instance_id, 0) for server in servers],
            [server.instance_id for server in servers],
        )
