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
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, NamedTuple

from orchestrator.routing.candidate import Asked
from orchestrator.routing.decision import Scored
from orchestrator.server import Server

HAND_OFF_S: Final = 0.004
"""Between two servers beyond the bytes: a ticket, a publication, the release."""
ASKING_S: Final = 0.010
"""For blocks that a generation server holds, beyond the bytes."""
TOKENS_WEIGHED: Final = 16
"""Decode steps that count, of those that are to come: a slow batch is worse than its first step tells."""
ROWS_TO_COME: Final = 0.1
"""Sequences that will arrive, and be held up, while a prompt is computed where it decodes and nobody is there yet."""
SIDE_MAX: Final = 8
"""Pairs are made of so many servers of a side, the cheapest by themselves."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """One server that could compute the prompt."""

    server: Server
    num_cached: int
    """Tokens, that it will not compute: held there, or brought there."""
    num_held: int
    """Of these, held there."""
    queue_s: float
    compute_s: float

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.compute_s


class Estimate(NamedTuple):
    """One way to serve the request."""

    context: Server | None
    generation: Server | None
    prefill: Prefill
    gap_s: float
    harm_s: float

    @property
    def score_s(self) -> float:
        return self.prefill.queue_s + self.prefill.compute_s + self.gap_s + self.harm_s

    def scored(self) -> Scored:
        prefill = self.prefill
        return Scored(
            context=self.context.instance_id if self.context else "",
            generation=self.generation.instance_id if self.generation else "",
            score=self.score_s,
            parts={
                "queue_s": prefill.queue_s,
                "compute_s": prefill.compute_s,
                "gap_s": self.gap_s,
                "harm_s": self.harm_s,
                "num_cached_tokens": float(prefill.num_cached),
            },
        )


class Estimator:
    """For one request. Asks each server for what it holds once, however many pairs it is in."""

    def __init__(self, asked: Asked, *, num_tokens_left: int) -> None:
        self._asked = asked
        self._num_tokens_left = num_tokens_left
        self._held: dict[str, int] = {}

    def num_held(self, server: Server) -> int:
        """Tokens of the prompt in blocks that the server is known to hold. The last token is always computed."""
        held = self._held.get(server.instance_id)
        if held is None:
            held = self._held[server.instance_id] = num_held_tokens(self._asked, server)
        return held

    def prefills(self, servers: Sequence[Server], holders: Sequence[Server] = ()) -> list[Prefill]:
        """What each of them would take. holders: whose blocks could be brought there."""
        holder = max(holders, key=self.num_held, default=None)
        return [self._prefill(server, holder) for server in servers]

    def _prefill(self, server: Server, holder: Server | None) -> Prefill:
        held = self.num_held(server)
        here = Prefill(server, held, held, server.prefill_backlog_s(), self._compute_s(server, held))
        brought = min(self.num_held(holder), self._asked.num_tokens - 1) if holder is not None else 0
        if holder is None or brought <= held or not server.pulls_back:
            return here
        num_bytes = (brought - held) * server.token_bytes
        pull_s = ASKING_S + num_bytes / server.speed.link_bytes_per_s(holder.instance_id)
        there = dataclasses.replace(here, num_cached=brought, compute_s=pull_s + self._compute_s(server, brought))
        return min(here, there, key=lambda prefill: prefill.compute_s)

    def _compute_s(self, server: Server, num_cached: int) -> float:
        num_tokens = self._asked.num_tokens
        chunk_size = max(1, server.max_num_tokens)
        return server.speed.prompt.part_s(num_cached, num_tokens, num_tokens=num_tokens, chunk_size=chunk_size)

    def pairs(self, context: Sequence[Prefill], generation: Sequence[Server]) -> list[Estimate]:
        """Every pair of the cheapest of both sides, in no order."""
        cheapest = sorted(context, key=lambda prefill: prefill.ttft_s)[:SIDE_MAX]
        decodes = sorted(((self._decode_s(server), index) for index, server in enumerate(generation)))[:SIDE_MAX]
        return [
            Estimate(
                prefill.server,
                generation[index],
                prefill,
                decode_s + self._exposed_s(prefill, generation[index]),
                0.0,
            )
            for prefill in cheapest
            for decode_s, index in decodes
        ]

    def alone(self, generation: Sequence[Server]) -> list[Estimate]:
        """Prefilled where they decode."""
        return [
            Estimate(
                None,
                prefill.server,
                prefill,
                self._decode_s(prefill.server),
                prefill.compute_s * max(prefill.server.num_decoding, ROWS_TO_COME),
            )
            for prefill in self.prefills(generation)
        ]

    def one_token(self, context: Sequence[Prefill]) -> list[Estimate]:
        """Nothing has to be decoded."""
        return [Estimate(prefill.server, None, prefill, 0.0, 0.0) for prefill in context]

    def _decode_s(self, server: Server) -> float:
        num_steps = min(max(1, self._num_tokens_left - 1), TOKENS_WEIGHED)
        return num_steps * server.speed.decode_step_s(server.num_requests + 1)

    def _exposed_s(self, prefill: Prefill, generation: Server) -> float:
        """What moves while the prompt is computed is hidden, but for the last part."""
        num_tokens = self._asked.num_tokens - self.num_held(generation)
        moving_s = num_tokens * generation.token_bytes / generation.speed.link_bytes_per_s(prefill.server.instance_id)
        return HAND_OFF_S + max(0.0, moving_s - prefill.compute_s)


def num_held_tokens(asked: Asked, server: Server) -> int:
    """Of the prompt, in whole blocks that the server is known to hold; the last token is computed in any case."""
    block_size = server.block_size
    if not block_size or not asked.block_hashes:
        return 0
    num_blocks = min(len(asked.block_hashes), (asked.num_tokens - 1) // block_size)
    return block_size * server.known_blocks.num_held(asked.block_hashes[:num_blocks])
