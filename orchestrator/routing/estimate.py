"""What a request would cost at each pair of servers, in seconds; the least is taken. Pure arithmetic.

    ttft     the prompts before it there, and what is not cached of its own
    gap      from the first token to the second: what of the transfer prefill does not hide, and decode steps there
    harm     what it takes from the sequences that decode where its prompt is computed

    score  =  ttft + gap + harm

A generation server alone is one more pair: nothing travels, and the sequences there are held up for as long as the
prompt takes. So conditional disaggregation is no rule of its own: a prompt that is short, cached there, or would wait
elsewhere costs less on a generation server that has little else to do.

A prompt whose beginning lies on a generation server may be brought to the context server: it decides so by the same
arithmetic, and the estimate follows it.

This runs for each request: a server is looked at once, and what is left for a pair is an addition.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Final, NamedTuple

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


class Prefill(NamedTuple):
    """One server that could compute the prompt."""

    ttft_s: float
    """Of this server alone: both of the seconds below."""
    server: Server
    num_cached: int
    """Tokens, that it will not compute: held there, or brought there."""
    num_held: int
    """Of these, held there."""
    queue_s: float
    compute_s: float


class Decode(NamedTuple):
    """One server that could go on from there."""

    decode_s: float
    server: Server
    moving_bytes: int
    """Of the prompt's KV, that it does not hold."""
    num_requests: int


class Estimate(NamedTuple):
    """One way to serve the request: the servers, and what is kept of it as a `Scored` when they may be gone."""

    context: Server | None
    generation: Server | None
    context_id: str
    generation_id: str
    score_s: float
    queue_s: float
    compute_s: float
    gap_s: float
    harm_s: float
    num_cached: int

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.compute_s


as_scored: Final = operator.itemgetter(slice(2, None))
"""What is kept of an estimate: all but the servers."""


class Estimator:
    """For one request. Asks each server for what it holds once, however many pairs it is in."""

    __slots__ = ("_hashes", "_held", "_num_steps", "_num_tokens")

    def __init__(self, num_tokens: int, hashes: Sequence[BlockHash], *, num_tokens_left: int) -> None:
        """num_tokens: of the prompt; hashes: of its full blocks, as far as somebody wants to know them."""
        self._num_tokens = num_tokens
        self._hashes = hashes
        self._num_steps = min(max(1, num_tokens_left - 1), TOKENS_WEIGHED)
        self._held: dict[str, int] = {}

    def num_held(self, server: Server) -> int:
        """Tokens of the prompt in whole blocks that the server is known to hold; the last token is computed anyway."""
        if not self._hashes or not server.block_size:
            return 0
        held = self._held.get(server.instance_id)
        if held is None:
            num_blocks = (self._num_tokens - 1) // server.block_size
            held = server.block_size * server.known_blocks.num_held(self._hashes, num_blocks)
            self._held[server.instance_id] = held
        return held

    def prefills(self, servers: Sequence[Server], holders: Sequence[Server] = ()) -> list[Prefill]:
        """What each of them would take. holders: whose blocks could be brought there."""
        holder = max(holders, key=self.num_held) if holders and self._hashes else None
        return [self._prefill(server, holder) for server in servers]

    def _prefill(self, server: Server, holder: Server | None) -> Prefill:
        held = self.num_held(server) if self._hashes else 0
        queue_s, compute_s = server.prefill_backlog_s(), self._compute_s(server, held)
        if holder is not None and server.pulls_back:
            brought = min(self.num_held(holder), self._num_tokens - 1)
            rate = server.speed.link_rates.get(holder.instance_id, LINK_BYTES_PER_S)
            pull_s = ASKING_S + (brought - held) * server.token_bytes / rate
            there_s = pull_s + self._compute_s(server, brought) if brought > held else compute_s
            if there_s < compute_s:
                return Prefill(queue_s + there_s, server, brought, held, queue_s, there_s)
        return Prefill(queue_s + compute_s, server, held, held, queue_s, compute_s)

    def _compute_s(self, server: Server, num_cached: int) -> float:
        """As `StepCost.part_s` of the whole rest of the prompt."""
        cost, num_tokens = server.speed.prompt, self._num_tokens
        num_left = num_tokens - num_cached
        num_steps = -(-num_left // (server.max_num_tokens or 1))
        return cost.fixed_s * num_steps + cost.token_s * num_left + cost.pair_s * num_pairs(num_cached, num_tokens)

    def decodes(self, servers: Sequence[Server]) -> list[Decode]:
        decodes = []
        for server in servers:
            num_requests = server.num_requests
            held = self.num_held(server) if self._hashes else 0
            moving_bytes = (self._num_tokens - held) * server.token_bytes
            decodes.append(Decode(self._decode_s(server, num_requests), server, moving_bytes, num_requests))
        return decodes

    def _decode_s(self, server: Server, num_requests: int) -> float:
        return self._num_steps * server.speed.decode_step_s(num_requests + 1)

    def alone(self, prefills: Sequence[Prefill]) -> list[Estimate]:
        """Prefilled on the generation servers that decode them."""
        estimates = []
        for ttft_s, server, num_cached, _, queue_s, compute_s in prefills:
            gap_s, harm_s = (
                self._decode_s(server, server.num_requests),
                compute_s * max(server.num_decoding, ROWS_TO_COME),
            )
            score_s = ttft_s + gap_s + harm_s
            name = server.instance_id
            estimates.append(Estimate(None, server, "", name, score_s, queue_s, compute_s, gap_s, harm_s, num_cached))
        return estimates


def pairs(prefills: Sequence[Prefill], decodes: Sequence[Decode]) -> list[Estimate]:
    """Of each with each, in their order. What moves while the prompt is computed is hidden, but for the last part."""
    estimates = []
    for ttft_s, context, num_cached, _, queue_s, compute_s in prefills:
        context_id = context.instance_id
        for decode_s, generation, moving_bytes, _ in decodes:
            exposed_s = moving_bytes / generation.speed.link_rates.get(context_id, LINK_BYTES_PER_S) - compute_s
            gap_s = decode_s + HAND_OFF_S + (exposed_s if exposed_s > 0.0 else 0.0)
            name, score_s = generation.instance_id, ttft_s + gap_s
            fields = (context, generation, context_id, name, score_s, queue_s, compute_s, gap_s, 0.0, num_cached)
            estimates.append(tuple.__new__(Estimate, fields))  # As Estimate(*fields), in a third of the time.
    return estimates


def one_token(prefills: Sequence[Prefill]) -> list[Estimate]:
    """Nothing has to be decoded."""
    return [
        Estimate(server, None, server.instance_id, "", ttft_s, queue_s, compute_s, 0.0, 0.0, num_cached)
        for ttft_s, server, num_cached, _, queue_s, compute_s in prefills
    ]
