"""One request's way through an engine.

                  ┌──── preempted ────┐
submit → WAITING ─┴→ RUNNING ─────────┼→ ENDED          FULL
                        │  └→ LEASED ─┼→ ENDED          PREFILL_ONLY: leased until released
reserve → RESERVED → LANDED → RUNNING ┴→ ENDED          FROM_REMOTE: landed, waiting for a row in the batch
             └→ QUARANTINED → ENDED                     cancelled while the transfer may still write

RUNNING, LEASED → ENDING → ENDED: over, while a step that was launched before still writes into its blocks.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from disaggregated.block_hash import BlockHash, block_hashes
from disaggregated.engine.api import PLACEHOLDER, EngineRequest, FinishReason, RequestKind
from disaggregated.engine.block_pool import Holding
from disaggregated.engine.token_history import history_of
from disaggregated.errors import DisaggregatedError
from disaggregated.token_logprobs import TokenLogprob

if TYPE_CHECKING:
    from disaggregated.engine.grammar.follower import GrammarFollower
    from disaggregated.engine.speculation import Drafting

PRIORITY_STEP_S: Final = 10.0
"""A priority that is lower by one goes before who came so many seconds earlier. So whoever waits gets on in the end:
of those that come later, only the ones within a bounded time can still go first."""


class Phase(enum.StrEnum):
    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    RESERVED = "reserved"
    LANDED = "landed"
    LEASED = "leased"
    QUARANTINED = "quarantined"
    ENDING = "ending"
    ENDED = "ended"


NEXT: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.NEW: frozenset({Phase.WAITING, Phase.RESERVED}),
    Phase.WAITING: frozenset({Phase.RUNNING, Phase.ENDED}),
    Phase.RUNNING: frozenset({Phase.WAITING, Phase.LEASED, Phase.ENDING, Phase.ENDED}),  # WAITING: preempted
    Phase.RESERVED: frozenset({Phase.LANDED, Phase.QUARANTINED, Phase.ENDED}),
    Phase.LANDED: frozenset({Phase.RUNNING, Phase.WAITING, Phase.ENDED}),  # WAITING: preempted
    Phase.LEASED: frozenset({Phase.ENDING, Phase.ENDED}),
    Phase.QUARANTINED: frozenset({Phase.ENDED}),
    Phase.ENDING: frozenset({Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


class InvalidTransition(DisaggregatedError, AssertionError):
    """Our own mistake: a sequence was moved where it can't go."""


class Sequence:
    """The tokens known so far, how many of them have their KV in the pool, and the blocks that hold it.

    A step that has been launched counts as done: the token that it samples is in `token_ids` as a PLACEHOLDER until
    the step is finished.

    Invariant: the first `num_computed` tokens have their KV in `block_table`, and at least one token has not, but in
    RESERVED, LEASED, QUARANTINED and ENDING.
    """

    __slots__ = (
        "arrival",
        "awaits_grammar",
        "block_hashes",
        "cache_salt",
        "drafting",
        "grammar",
        "history",
        "holding",
        "is_published",
        "kind",
        "num_cached_prompt_tokens",
        "num_computed",
        "num_findable_blocks",
        "num_launched",
        "num_prompt_tokens",
        "num_tokens_max",
        "phase",
        "prompt_logprobs",
        "rank",
        "request_id",
        "sampling",
        "stop_token_ids",
        "story",
        "token_ids",
        "was_started",
    )

    def __init__(self, request: EngineRequest, *, arrival: int, num_tokens_max: int, arrived_s: float = 0.0) -> None:
        """`arrival`: how many came before, in this engine."""
        self.request_id = request.request_id
        self.kind = request.kind
        self.sampling = request.sampling
        self.token_ids = list(request.token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_tokens_max = num_tokens_max
        """Prompt and generated tokens at which it ends, whatever the request says."""
        self.arrival = arrival
        self.rank = (arrived_s + PRIORITY_STEP_S * request.priority, arrival)
        """The lowest goes first and is preempted last; it never changes."""
        self.phase = Phase.NEW
        self.story: list[tuple[float, Phase]] = []
        self.num_computed = 0
        self.num_launched = 0
        """Steps that compute a part of it and are not finished."""
        self.is_published = False
        """A chunk of its prompt was told: somebody may be reading its blocks."""
        self.was_started = False
        """It has held blocks; when it holds some again, it was preempted."""
        self.num_cached_prompt_tokens = 0
        """Found in the prefix cache at its first start."""
        self.holding: Holding | None = None
        self.block_hashes: list[BlockHash] = []
        self.cache_salt = request.cache_salt
        self.num_findable_blocks = 0
        """Blocks of the table, from the first on, that have been offered to the prefix cache."""
        self.drafting: Drafting | None = None
        self.grammar: GrammarFollower | None = None
        """Knows every generated token that is known; None: any text, or it is still compiled."""
        self.awaits_grammar = False
        self.stop_token_ids = request.sampling.stop_token_ids
        """What ends it: where a grammar decides on the end, every token that ends a text."""
        self.history = history_of(request.sampling, self.num_prompt_tokens)
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the prompt's second token and those after it, as far as they are known."""

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_computable(self) -> int:
        """What a step may compute: nothing is sampled while its grammar is not there."""
        return self.num_to_compute - self.awaits_grammar

    @property
    def is_complete(self) -> bool:
        """It has its last token, or will have once the steps that are launched are finished; it may end earlier."""
        num_tokens_max = 1 if self.kind is RequestKind.PREFILL_ONLY else self.sampling.max_tokens
        return self.num_generated >= num_tokens_max or len(self.token_ids) >= self.num_tokens_max

    @property
    def wants_prompt_logprobs(self) -> bool:
        """They come with computing the prompt: what is found in a cache would bring none. A prompt that a transfer
        brings is told of by who computed it."""
        wanted = self.sampling.prompt_logprobs is not None and self.kind is not RequestKind.FROM_REMOTE
        return wanted and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def can_grow(self) -> bool:
        """It decodes here, so it will want more blocks, and it can be preempted.

        The blocks of a PREFILL_ONLY may already be read by another server: they stay where they are.
        """
        return self.kind is not RequestKind.PREFILL_ONLY

    @property
    def block_table(self) -> list[int]:
        assert self.holding is not None, f"{self.request_id} is {self.phase} and holds no blocks"
        return self.holding.block_ids

    def advance(self, to: Phase, *, now_s: float) -> None:
        if to not in NEXT[self.phase]:
            raise InvalidTransition(f"{self.request_id}: {self.phase} -> {to}; story={self.story}")
        self.phase = to
        self.story.append((now_s, to))

    def hash_blocks(self, num_blocks: int, block_size: int) -> list[BlockHash]:
        """Hashes of the first `num_blocks` blocks, all of them full. Each block is hashed once in a sequence's life."""
        known = len(self.block_hashes)
        if known < num_blocks:
            parent = self.block_hashes[-1] if known else None
            tokens = self.token_ids[known * block_size : num_blocks * block_size]
            self.block_hashes.extend(block_hashes(tokens, block_size, salt=self.cache_salt, parent=parent))
        return self.block_hashes[:num_blocks]

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; says whether it was the last one."""
        self.token_ids.append(PLACEHOLDER)
        return self.learn(len(self.token_ids) - 1, token_id)

    def learn(self, position: int, token_id: int) -> FinishReason | None:
        """The token in this place, which was a placeholder, is known; says whether it is the last one."""
        assert self.token_ids[position] == PLACEHOLDER, f"{self.request_id} has a token at {position} already"
        self.token_ids[position] = token_id
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        if position + 1 - self.num_prompt_tokens >= self.sampling.max_tokens or position + 1 >= self.num_tokens_max:
            return FinishReason.LENGTH
        return FinishReason.REPETITION if self._repeats_itself(position) else None

    def _repeats_itself(self, position: int) -> bool:
        """By the tokens up to this one, those generated elsewhere before among them."""
        rule = self.sampling.repetition
        if rule is None or position + 1 - self.num_prompt_tokens < self.sampling.min_tokens:
            return False
        first = max(self.num_prompt_tokens - self.sampling.num_emitted, position + 1 - rule.num_tokens)
        return rule.is_met_by(self.token_ids[first : position + 1])

    @property
    def forbidden_token_ids(self) -> frozenset[int]:
        return self.stop_token_ids if self.num_generated < self.sampling.min_tokens else frozenset()

    @property
    def emitted(self) -> list[int]:
        """Every token that was generated, here or by another server before."""
        return self.token_ids[self.num_prompt_tokens - self.sampling.num_emitted :]
