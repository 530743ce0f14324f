"""A model that is a hash function, and a KV pool that remembers what it was given.

Each slot keeps its token and the digest of its sequence up to there, as real keys and values depend on everything
before them. So whatever a scheduler can do wrong (a block shared too early, freed too early, written twice, a chunk at
the wrong position) is an assertion here, or another token than the oracle's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from disaggregated.engine.api import PLACEHOLDER, FinishReason, ScheduledSequence, TokenMask
from disaggregated.engine.grammar.bitmask import allows
from disaggregated.engine.grammar.follower import GrammarFollower
from disaggregated.sampling_params import SamplingParams

VOCAB_SIZE = 97
_ROOT = 17

Slot = tuple[int, int]
"""Token and digest."""


def _digest(before: int, token_id: int) -> int:
    return hash((before, token_id))  # Of integers: the same in each process.


def kv_of(token_ids: Iterable[int]) -> list[Slot]:
    """What the slots of a sequence hold when they are right."""
    found, before = [], _ROOT
    for token_id in token_ids:
        before = _digest(before, token_id)
        found.append((token_id, before))
    return found


def _next_token(digest: int, sampling: SamplingParams, forbidden: frozenset[int], mask: TokenMask | None = None) -> int:
    draw = random.Random(hash((digest, sampling.seed if sampling.temperature else 0)))
    assert mask is None or any(allows(mask, token_id) for token_id in range(VOCAB_SIZE)), "no token may come"
    while True:
        token_id = draw.randrange(VOCAB_SIZE)
        if token_id not in forbidden and (mask is None or allows(mask, token_id)):
            return token_id


def oracle(
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    max_seq_len: int,
    grammar: GrammarFollower | None = None,
    stop_token_ids: frozenset[int] | None = None,
) -> tuple[list[int], FinishReason]:
    """The tokens of a sequence that has the machine for itself and needs no cache."""
    token_ids: list[int] = []
    digest = kv_of(prompt)[-1][1]
    stop_token_ids = sampling.stop_token_ids if stop_token_ids is None else stop_token_ids
    while True:
        forbidden = stop_token_ids if len(token_ids) < sampling.min_tokens else frozenset[int]()
        if grammar is None:
            token_ids.append(_next_token(digest, sampling, forbidden))
        else:
            (mask,) = grammar.masks((), forbidden)
            token_ids.append(_next_token(digest, sampling, frozenset(), mask))
            assert grammar.follow(token_ids[-1:])
        digest = _digest(digest, token_ids[-1])
        if token_ids[-1] in stop_token_ids:
            return token_ids, FinishReason.STOP
        if len(token_ids) == sampling.max_tokens or len(prompt) + len(token_ids) == max_seq_len:
            return token_ids, FinishReason.LENGTH


class FakeModelRunner:
    """Implements `ModelRunner`. Also asserts what every batch has to keep: its limits, and one writer a slot."""

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_tokens: int = 10**9, max_batch_size: int = 10**9
    ) -> None:
        self.block_size = block_size
        self.max_num_tokens = max_num_tokens
        self.max_batch_size = max_batch_size
        self.slots: list[Slot | None] = [None] * (num_blocks * block_size)
        self.batches: list[list[tuple[str, int, int]]] = []
        """Of every step: (request id, first position, number of tokens, drafts not counted) of each row."""
        self.num_drafts = 0

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        self.batches.append([(row.request_id, row.first_position, len(row.token_ids)) for row in batch])
        self.num_drafts += sum(len(row.draft_token_ids) for row in batch)
        self._check_limits(batch)
        prefixes = [self.read(row.block_table, row.first_position) for row in batch]  # All reads, then all writes.
        self._check_writers(batch)
        return [self._compute(row, prefix) for row, prefix in zip(batch, prefixes, strict=True)]

    def read(self, block_table: Sequence[int], num_tokens: int) -> list[Slot | None]:
        return [self.slots[self._slot(block_table, position)] for position in range(num_tokens)]

    def fill(self, block_ids: Sequence[int], token_ids: Sequence[int], *, first_block: int = 0) -> None:
        """What a transfer does: the KV of `token_ids` from block `first_block` on, as if computed elsewhere."""
        right = kv_of(token_ids)
        for position in range(first_block * self.block_size, len(token_ids)):
            self.slots[self._slot(block_ids, position)] = right[position]

    def spoil(self, block_ids: Iterable[int]) -> None:
        """What a late write of a broken transfer does."""
        for block_id in block_ids:
            first = block_id * self.block_size
            self.slots[first : first + self.block_size] = [None] * self.block_size

    def _slot(self, block_table: Sequence[int], position: int) -> int:
        return block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _check_limits(self, batch: Sequence[ScheduledSequence]) -> None:
        num_tokens = sum(len(row.token_ids) + len(row.draft_token_ids) for row in batch)
        assert 0 < len(batch) <= self.max_batch_size, f"{len(batch)} rows of {self.max_batch_size}"
        assert num_tokens <= self.max_num_tokens, f"{num_tokens} tokens, the budget is {self.max_num_tokens}"
        assert all(row.token_ids for row in batch), "a row without tokens"
        assert all(row.sampling is not None or not row.draft_token_ids for row in batch), "drafts within a prompt"
        assert all(PLACEHOLDER not in row.token_ids for row in batch), "a token that nobody knows"
        assert len({row.request_id for row in batch}) == len(batch), "a sequence has two rows"

    def _check_writers(self, batch: Sequence[ScheduledSequence]) -> None:
        """A block that a row writes into is in nobody else's table: sharing is of full and computed blocks only."""
        tables = [set(row.block_table) for row in batch]
        for index, row in enumerate(batch):
            first = row.first_position // self.block_size
            num_tokens = len(row.token_ids) + len(row.draft_token_ids)
            last = (row.first_position + num_tokens - 1) // self.block_size
            written = set(row.block_table[first : last + 1])
            for other, table in enumerate(tables):
                assert other == index or not written & table, f"{row.request_id} writes into a row mate's block"

    def _compute(self, row: ScheduledSequence, prefix: list[Slot | None]) -> list[int]:
        """Each attended slot must continue the one before it; whether the tokens are right, the oracle tells."""
        digest = _ROOT
        for position, slot in enumerate(prefix):
            assert slot is not None, f"{row.request_id} attends to position {position}, which was never computed"
            token_id, found = slot
            digest = _digest(digest, token_id)
            assert found == digest, f"{row.request_id} attends to another sequence's KV at position {position}"
        for position, token_id in enumerate(row.token_ids, start=row.first_position):
            digest = _digest(digest, token_id)
            self.slots[self._slot(row.block_table, position)] = (token_id, digest)
        if row.sampling is None:
            return []
        masks = [None] * (1 + len(row.draft_token_ids)) if row.masks is None else row.masks()
        tokens = [_next_token(digest, row.sampling, row.forbidden_token_ids, masks[0])]
        is_right = True
        for position, draft in enumerate(row.draft_token_ids, start=row.first_position + len(row.token_ids)):
            digest = _digest(digest, draft)
            self.slots[self._slot(row.block_table, position)] = (draft, digest)
            is_right = is_right and tokens[-1] == draft
            if is_right:
                mask = masks[len(tokens)]
                tokens.append(_next_token(digest, row.sampling, row.forbidden_token_ids, mask))
        return tokens
