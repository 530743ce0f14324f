"""Which tokens of a prompt lie where in a pool, and so where the tokens of a source's block go in our blocks.

A rank holds some stripes of a prompt, one after another in blocks of its own:

    prompt      0 1 2 3 4 5 6 7 8 9 …         stripes of 2 tokens over 2 ranks
    rank 0      0 1 4 5 │ 8 9 …               blocks of 4
    rank 1      2 3 6 7 │ …

A pool with every token is one rank of one. Positions count tokens: of the prompt, or of what a rank holds of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from disaggregated.kv_shard import KVHolding

WHOLE: Final = 1 << 62
"""A stripe longer than every prompt."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenMap:
    """Where one rank keeps the tokens of one prompt."""

    block_size: int
    rank: int
    num_ranks: int
    stripe: int
    """Tokens; at least 1."""

    @classmethod
    def of(cls, holding: KVHolding, num_tokens: int | None) -> TokenMap:
        """`num_tokens` of the whole prompt must be known where one contiguous part goes to each rank.

        Parts are equal and whole blocks, but for the last ones, which may be shorter or empty.
        """
        shard, block_size = holding.shard, holding.layout.block_size
        stripe = shard.stripe_tokens
        if shard.num_token_ranks == 1:
            stripe = WHOLE
        elif not stripe:
            assert num_tokens is not None, "a prompt is cut into parts, and its length is not known"
            num_blocks = -(-num_tokens // (shard.num_token_ranks * block_size))
            stripe = max(1, num_blocks) * block_size
        return cls(block_size, shard.token_rank, shard.num_token_ranks, stripe)

    def in_prompt(self, position: int) -> int:
        """Where in the prompt the rank's token `position` is."""
        stripe, offset = divmod(position, self.stripe)
        return (stripe * self.num_ranks + self.rank) * self.stripe + offset

    def in_rank(self, position: int) -> int:
        """How many tokens before `position` of the prompt this rank holds: where it keeps it, if it does."""
        stripe, offset = divmod(position, self.stripe)
        rounds, rank = divmod(stripe, self.num_ranks)
        if rank == self.rank:
            return rounds * self.stripe + offset
        return (rounds + (rank > self.rank)) * self.stripe

    def holds(self, position: int) -> bool:
        return position // self.stripe % self.num_ranks == self.rank

    def left_in_stripe(self, position: int) -> int:
        """Tokens from `position` of the prompt to the end of its stripe."""
        return self.stripe - position % self.stripe


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that are neighbours on both sides: from a source's block into one of ours."""

    offset: int
    """In the source's block, in tokens."""
    into_block: int
    """Number of our block, in our own table."""
    into_offset: int
    count: int

    @property
    def tokens(self) -> range:
        return range(self.offset, self.offset + self.count)

    @property
    def into_tokens(self) -> range:
        return range(self.into_offset, self.into_offset + self.count)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenPlan:
    """Where the tokens of a source's blocks go."""

    source: TokenMap
    ours: TokenMap
    begin: int
    """Of our own tokens, the first that is wanted: the ones before are here already."""
    end: int
    """And one past the last for which we have room."""
    num_tokens: int = WHOLE
    """Of the whole prompt, as far as it is known: places beyond hold nothing."""

    def segments(self, block: int) -> Iterator[Segment]:
        """Of the source's block number `block`, what goes into our blocks, in order; nothing for one not needed."""
        position, end = block * self.source.block_size, (block + 1) * self.source.block_size
        while position < end:
            in_prompt = self.source.in_prompt(position)
            if in_prompt >= self.num_tokens:
                return
            count = min(
                end - position,
                self.num_tokens - in_prompt,
                self.source.left_in_stripe(in_prompt),
                self.ours.left_in_stripe(in_prompt),
            )
            if self.ours.holds(in_prompt):
                yield from self._into_blocks(position % self.source.block_size, self.ours.in_rank(in_prompt), count)
            position += count

    def _into_blocks(self, offset: int, into: int, count: int) -> Iterator[Segment]:
        """`count` tokens from `offset` of the source's block to our position `into` on, cut at our blocks' ends."""
        begin, end = max(into, self.begin), min(into + count, self.end)
        while begin < end:
            into_block, into_offset = divmod(begin, self.ours.block_size)
            length = min(end - begin, self.ours.block_size - into_offset)
            yield Segment(offset + begin - into, into_block, into_offset, length)
            begin += length

    def is_needed(self, block: int) -> bool:
        return next(self.segments(block), None) is not None

    def num_here(self) -> int:
        """Source blocks at the beginning that hold nothing but what is here already."""
        end = self.ours.in_prompt(self.begin - 1) + 1 if self.begin else 0
        return self.source.in_rank(end) // self.source.block_size

    def num_source_blocks(self) -> int:
        """How many blocks the source may publish of a prompt for which we have room."""
        end = min(self.num_tokens, self.ours.in_prompt(self.end))
        return -(-self.source.in_rank(end) // self.source.block_size)
