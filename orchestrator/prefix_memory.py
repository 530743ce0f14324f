"""What each generation server has probably still cached, judged by what was sent there. An estimate, and a bounded one.

It decides only how a prompt is prefilled, never whether a token is right: a block that was evicted meanwhile is
computed again where it is missing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from disaggregated.block_hash import BlockHash

BLOCKS_MAX: Final = 50_000
"""Of all servers together: about ten megabytes. When full, the block that was not seen for longest is forgotten."""


class PrefixMemory:
    """Invariant: at most `blocks_max` entries, the one seen last at the end."""

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._seen: OrderedDict[tuple[str, BlockHash], None] = OrderedDict()

    def remember(self, instance_id: str, hashes: Sequence[BlockHash]) -> None:
        """A sequence that begins with these blocks was sent to the server."""
        for block in hashes:
            self._seen[instance_id, block] = None
            self._seen.move_to_end((instance_id, block))
        while len(self._seen) > self._blocks_max:
            self._seen.popitem(last=False)

    def num_cached_blocks(self, instance_id: str, hashes: Sequence[BlockHash]) -> int:
        """How many of these blocks, from the first one on without a gap, the server has seen."""
        for count, block in enumerate(hashes):
            if (instance_id, block) not in self._seen:
                return count
        return len(hashes)


class LocalPrefillRule:
    """Conditional disaggregation: a prompt of which little is left to compute is prefilled where it decodes."""

    def __init__(self, num_uncached_max: int, memory: PrefixMemory | None = None) -> None:
        self._num_uncached_max = num_uncached_max
        self._memory = memory or PrefixMemory()

    @property
    def is_on(self) -> bool:
        return self._num_uncached_max > 0

    def sent(self, instance_id: str, hashes: Sequence[BlockHash]) -> None:
        if self.is_on:
            self._memory.remember(instance_id, hashes)

    def num_uncached(self, instance_id: str, num_tokens: int, hashes: Sequence[BlockHash], block_size: int) -> int:
        return num_tokens - block_size * self._memory.num_cached_blocks(instance_id, hashes)

    def wants_local(self, num_uncached: int) -> bool:
        return num_uncached <= self._num_uncached_max
