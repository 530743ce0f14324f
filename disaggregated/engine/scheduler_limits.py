"""What bounds a step, and what a step is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as AnySequence
from typing import NamedTuple

from disaggregated.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    block_size: int
    """Tokens in a block."""
    max_num_tokens: int
    """Tokens computed in one step."""
    max_batch_size: int
    """Sequences in one step."""
    max_prefill_tokens_beside_decode: int | None = None
    """Tokens of prompts in a step in which somebody decodes; None: as many as fit. Bounds how much longer a prompt
    makes a decode step."""
    enable_block_reuse: bool = True

    @property
    def max_rows(self) -> int:
        """Each row takes a token at least, so that everybody in the batch moves in every step."""
        return min(self.max_batch_size, self.max_num_tokens)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a sequence that have no KV yet, and guesses of what follows them."""

    sequence: Sequence
    num_tokens: int
    draft_token_ids: AnySequence[int] = ()
