"""The cost model written down as plainly as it goes, one way of serving a request after the other.

The product looks at each server once and keeps rows of numbers; this asks the same question for every pair anew. It
knows nothing of large pools, of which only some pairs are made.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from orchestrator.routing.estimate import ASKING_S, HAND_OFF_S, ROWS_TO_COME, TOKENS_WEIGHED
from orchestrator.routing.least import LOCAL_GAIN
from orchestrator.routing.near_equals import NEAR, NEAR_S
from orchestrator.routing.placement import Needs
from orchestrator.routing.speed import LINK_BYTES_PER_S
from orchestrator.server import Server


@dataclasses.dataclass
class Way:
    context: Server | None
    generation: Server
    num_cached: int
    queue_s: float
    compute_s: float
    gap_s: float
    harm_s: float

    @property
    def score_s(self) -> float:
        return self.queue_s + self.compute_s + self.gap_s + self.harm_s

    @property
    def names(self) -> tuple[str, str]:
        return (self.context.instance_id if self.context else "", self.generation.instance_id)


class PlainCosts:
    """Remembers whose turn it was."""

    def __init__(self) -> None:
        self._taken: list[str] = []

    def choose(
        self, needs: Needs, contexts: Sequence[Server], generations: Sequence[Server], alone: Sequence[Server]
    ) -> Way:
        """contexts, generations: those that may be asked, of which there are some each."""
        pairs = [self._pair(needs, *pair, generations) for pair in itertools.product(contexts, generations)]
        locals_ = [self._alone(needs, server) for server in alone]
        best, local = self._best(pairs), self._best(locals_)
        if local is not None and best is not None and local.score_s < LOCAL_GAIN * best.score_s:
            best = local
        assert best is not None
        self._taken += [name for name in best.names if name]
        return best

    def _best(self, ways: Sequence[Way]) -> Way | None:
        """Of those near the least: the most cached, the fewest requests, the emptiest cache, then in turn."""
        if not ways:
            return None
        limit_s = NEAR * min(way.score_s for way in ways) + NEAR_S
        near = [way for way in ways if way.score_s <= limit_s]
        return min(near, key=lambda way: (*self._prefill_order(way), *self._decode_order(way)))

    def _prefill_order(self, way: Way) -> tuple[int, ...]:
        server = way.context or way.generation
        return -way.num_cached, server.num_requests, len(server.known_blocks), self._turn(server)

    def _decode_order(self, way: Way) -> tuple[int, ...]:
        return way.generation.num_requests, self._turn(way.generation)

    def _turn(self, server: Server) -> int:
        name = server.instance_id
        return len(self._taken) - self._taken[::-1].index(name) if name in self._taken else 0

    def _pair(self, needs: Needs, context: Server, generation: Server, holders: Sequence[Server]) -> Way:
        num_cached = held(needs, context)
        compute_s = seconds_to_compute(needs, context, num_cached)
        holder = max(holders, key=lambda server: held(needs, server))
        more = held(needs, holder) - num_cached
        if context.pulls_back and more > 0:
            rate = context.speed.link_rates.get(holder.instance_id, LINK_BYTES_PER_S)
            bring_s = ASKING_S + more * context.token_bytes / rate
            bring_s += seconds_to_compute(needs, context, num_cached + more)
            if bring_s < compute_s:
                num_cached, compute_s = num_cached + more, bring_s
        num_bytes = (needs.num_prompt_tokens - held(needs, generation)) * generation.token_bytes
        transfer_s = num_bytes / generation.speed.link_rates.get(context.instance_id, LINK_BYTES_PER_S)
        gap_s = seconds_to_decode(needs, generation) + HAND_OFF_S + max(0.0, transfer_s - compute_s)
        return Way(context, generation, num_cached, context.prefill_backlog_s(), compute_s, gap_s, 0.0)

    def _alone(self, needs: Needs, server: Server) -> Way:
        num_cached = held(needs, server)
        compute_s = seconds_to_compute(needs, server, num_cached)
        harm_s = compute_s * max(server.num_decoding, ROWS_TO_COME)
        gap_s = seconds_to_decode(needs, server)
        return Way(None, server, num_cached, server.prefill_backlog_s(), compute_s, gap_s, harm_s)


def held(needs: Needs, server: Server) -> int:
    num_blocks = (needs.num_prompt_tokens - 1) // server.block_size
    return server.block_size * server.known_blocks.num_held(needs.block_hashes[:num_blocks])


def seconds_to_compute(needs: Needs, server: Server, num_cached: int) -> float:
    end = needs.num_prompt_tokens
    chunk_size = server.max_num_tokens
    return server.speed.prompt.part_s(num_cached, end, num_tokens=end, chunk_size=chunk_size)


def seconds_to_decode(needs: Needs, server: Server) -> float:
    num_steps = min(max(1, needs.num_tokens_left - 1), TOKENS_WEIGHED)
    return num_steps * server.speed.decode_step_s(server.num_requests + 1)
