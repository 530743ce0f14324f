"""What a request would cost at each pair of servers, in seconds; the least is taken. Pure arithmetic.

    ttft     the prompts before it there, and what is not cached of its own
    gap      from the first token to the second: what of the transfer prefill does not hide, and decode steps there
    harm     what it takes from the sequences that decode where its prompt is computed

    score  =  ttft + gap + harm

A generation server alone is one more way: nothing travels, and the sequences there are held up for as long as the
prompt takes. So conditional disaggregation is no rule of its own: a prompt that is short, cached there, or would wait
elsewhere costs less on a generation server that has little else to do.

A prompt whose beginning lies on a generation server may be brought to the context server: it decides so by the same
arithmetic, and the estimate follows it.

This runs for each request: a server is looked at once and becomes a row, and what is left for a pair is an addition.
Rows are plain tuples that begin with what servers are preferred by, so that they are sorted as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from disaggregated.block_hash import BlockHash
from disaggregated.compute_cost import num_pairs
from orchestrator.routing.speed import LINK_BYTES_PER_S
from orchestrator.server import Server

HAND_OFF_S: Final = 0.004
"""Between two servers beyond the bytes: a ticket, a publication, the release."""
ASKING_S: Final = 0.010
"""For blocks that a generation server holds, beyond the bytes."""
TOKENS_WEIGHED: Final = 16
"""Decode steps that count, of those that are to come: a slow batch is worse than its first step tells."""
ROWS_TO_COME: Final = 0.1
"""Sequences that will arrive, and be held up, while a prompt is computed where it decodes and nobody is there yet."""

Prefill = tuple[int, int, int, int, int, Server, str, int, float, float]
"""One server that could compute the prompt:

- less its cached tokens, which it will not compute: they are held there, or brought there
- its requests
- blocks in its cache: nothing is evicted while another one has room
- its last turn
- its place among those that were asked, so that no two rows are equal in all that they are sorted by
- the server, and its name
- its cached tokens
- seconds until what is before it has been computed
- seconds in which the prompt is
"""
Decode = tuple[int, int, int, Server, str, float, int, Mapping[str, float]]
"""One server that could go on from there: its requests, its last turn, its place among those that were asked, the
server, its name, seconds of decode steps there, bytes of the prompt's KV that it does not hold, and at how many bytes
a second they come from each context server."""


class Estimator:
    """For one request. Asks each server for what it holds once, however many ways it is in."""

    __slots__ = ("_hashes", "_held", "_num_steps", "_num_tokens", "_turns")

    def __init__(
        self, num_tokens: int, hashes: Sequence[BlockHash], num_tokens_left: int, turns: Mapping[str, int]
    ) -> None:
        """num_tokens: of the prompt; hashes: of its full blocks, as far as somebody wants to know them; turns: when
        each instance was taken last."""
        self._num_tokens = num_tokens
        self._hashes = hashes
        self._num_steps = TOKENS_WEIGHED if num_tokens_left > TOKENS_WEIGHED else max(1, num_tokens_left - 1)
        self._turns = turns
        self._held: dict[Server, int] = {}

    def num_held(self, server: Server) -> int:
        """Tokens of the prompt in whole blocks that the server is known to hold."""
        known = server.known_blocks
        if not self._hashes or not known.num_blocks:
            return 0
        held = self._held.get(server)
        if held is None:
            size = server.block_size
            held = self._held[server] = size * known.num_held(self._hashes, (self._num_tokens - 1) // size)
        return held

    def prefills(self, servers: Sequence[Server], holders: Sequence[Server] = ()) -> list[Prefill]:
        """What each of them would take. holders: whose blocks could be brought there."""
        turns, hashes = self._turns, self._hashes
        holder, most = self._holder(holders) if hashes else (None, 0)
        rows = []
        for place, server in enumerate(servers):
            num_blocks = server.known_blocks.num_blocks
            cached = self.num_held(server) if num_blocks and hashes else 0
            compute_s = self._compute_s(server, cached)
            if holder is not None and most > cached and server.pulls_back:
                rate = server.speed.link_rates.get(holder.instance_id, LINK_BYTES_PER_S)
                there_s = ASKING_S + (most - cached) * server.token_bytes / rate + self._compute_s(server, most)
                if there_s < compute_s:
                    cached, compute_s = most, there_s
            queue_s, name = server.prefill_backlog_s(), server.instance_id
            requests, turn = server.num_requests, turns.get(name, 0)
            rows.append((-cached, requests, num_blocks, turn, place, server, name, cached, queue_s, compute_s))
        return rows

    def _holder(self, holders: Sequence[Server]) -> tuple[Server | None, int]:
        """Who holds most of the prompt, and how many tokens; of equals the first one."""
        holder, most = None, 0
        for server in holders:
            if server.known_blocks.num_blocks and (held := self.num_held(server)) > most:
                holder, most = server, held
        return holder, most

    def _compute_s(self, server: Server, num_cached: int) -> float:
        """As `StepCost.part_s` of the whole rest of the prompt."""
        cost, num_tokens = server.speed.prompt, self._num_tokens
        num_left = num_tokens - num_cached
        num_steps = -(-num_left // (server.max_num_tokens or 1))
        linear_s = cost.fixed_s * num_steps + cost.token_s * num_left
        return linear_s + cost.pair_s * num_pairs(num_cached, num_tokens) if cost.pair_s else linear_s

    def decodes(self, servers: Sequence[Server]) -> list[Decode]:
        turns, num_steps = self._turns, self._num_steps
        rows: list[Decode] = []
        for place, server in enumerate(servers):
            num_requests, speed, name = server.num_requests, server.speed, server.instance_id
            held = self.num_held(server) if server.known_blocks.num_blocks and self._hashes else 0
            moving_bytes = (self._num_tokens - held) * server.token_bytes
            decode_s = num_steps * speed.decode_step_s(num_requests + 1)
            turn = turns.get(name, 0)
            rows.append((num_requests, turn, place, server, name, decode_s, moving_bytes, speed.link_rates))
        return rows

    def alone_s(self, server: Server, compute_s: float) -> tuple[float, float]:
        """What a generation server that computes the prompt itself adds to that: the gap, and the harm."""
        gap_s = self._num_steps * server.speed.decode_step_s(server.num_requests + 1)
        return gap_s, compute_s * max(server.num_decoding, ROWS_TO_COME)


def pair_costs(prefills: Sequence[Prefill], decodes: Sequence[Decode]) -> tuple[list[float], list[float]]:
    """Gaps and scores of each with each, in their order.

    What moves while the prompt is computed is hidden, but for the last part.
    """
    gaps, scores = [], []
    for _, _, _, _, _, _, context_name, _, queue_s, compute_s in prefills:
        ttft_s = queue_s + compute_s
        for _, _, _, _, _, decode_s, moving_bytes, link_rates in decodes:
            gap_s = decode_s + HAND_OFF_S
            exposed_s = moving_bytes / link_rates.get(context_name, LINK_BYTES_PER_S) - compute_s
            if exposed_s > 0.0:
                gap_s += exposed_s
            gaps.append(gap_s)
            scores.append(ttft_s + gap_s)
    return gaps, scores
