"""The blocks of a sequence: found in the cache, taken, filled one after the other, and given back.

Between the scheduler, which decides who gets blocks, and the `BlockPool`, which knows nothing of tokens.
"""

from __future__ import annotations

from typing import Final

from disaggregated.engine.block_events import BlockLabel
from disaggregated.engine.block_pool import BlockPool, HoldingKind
from disaggregated.engine.scheduler_limits import SchedulerLimits
from disaggregated.engine.sequence import Phase, Sequence
from disaggregated.engine.tiered_cache import CachedRun

HOLDING_NO_MORE: Final = frozenset({Phase.WAITING, Phase.QUARANTINED, Phase.ENDING})
"""Whoever decodes here wants no other block in these phases."""


class SequenceBlocks:
    """Part of a scheduler.

    Invariant: `num_growing` sequences hold blocks and will want more.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self._pool = pool
        self._block_size = limits.block_size
        self._reuses = limits.enable_block_reuse
        self.num_growing = 0

    def has_room(self, sequence: Sequence) -> bool:
        """For its next token."""
        return sequence.num_computed < len(sequence.block_table) * self._block_size

    def find_cached(self, sequence: Sequence, num_blocks_max: int) -> CachedRun:
        may_find = self._reuses and not sequence.wants_prompt_logprobs
        num_blocks = num_blocks_max if may_find else 0
        return self._pool.find(sequence.hash_blocks(num_blocks, self._block_size), owner=sequence.request_id)

    def will_ask(self, sequence: Sequence) -> None:
        """It waits for its turn. Those before it are to evict other blocks than what is cached of its own prompt."""
        cached = self.find_cached(sequence, (len(sequence.token_ids) - 1) // self._block_size)
        self._pool.cache.device.use(cached.hashes)

    def hold(self, sequence: Sequence, kind: HoldingKind, cached: CachedRun, num_new: int, now_s: float) -> None:
        sequence.holding = self._pool.hold(sequence.request_id, kind, cached=cached, num_new=num_new, now_s=now_s)
        sequence.num_findable_blocks = cached.num_findable
        if not sequence.was_started:
            sequence.num_cached_prompt_tokens = len(cached) * self._block_size
            sequence.was_started = True
        self.num_growing += sequence.can_grow

    def grow(self, sequence: Sequence) -> None:
        assert sequence.holding is not None, f"{sequence.request_id} is {sequence.phase}"
        self._pool.grow(sequence.holding)

    def num_slots_ahead(self, sequence: Sequence, wanted: int, *, num_promised: int) -> int:
        """Slots after its next token, at most `wanted`; another block only if there are more than `num_promised`."""
        first = sequence.num_computed + 1
        while len(sequence.block_table) * self._block_size < first + wanted and self._pool.num_free > num_promised:
            self.grow(sequence)
        return min(wanted, len(sequence.block_table) * self._block_size - first)

    def quarantine(self, sequence: Sequence, *, now_s: float) -> None:
        """All but the shared ones stay held: a transfer may still write into them."""
        assert sequence.holding is not None, f"{sequence.request_id} is {sequence.phase}"
        num_shared = sequence.num_cached_prompt_tokens // self._block_size
        self._pool.quarantine(sequence.holding, num_shared=num_shared, now_s=now_s)
        self.num_growing -= 1

    def swap_out(self, sequence: Sequence, *, now_s: float) -> None:
        """Its blocks are back; where the host tier has room, they are found again when it returns."""
        assert sequence.holding is not None, f"{sequence.request_id} is {sequence.phase}"
        self._pool.swap_out(
            sequence.holding,
            sequence.hash_blocks(sequence.num_findable_blocks, self._block_size),
            num_tokens=sequence.num_computed,
            num_blocks=-(-sequence.num_computed // self._block_size),
            now_s=now_s,
        )
        sequence.holding = None
        self.num_growing -= sequence.can_grow

    def grows_no_more(self, sequence: Sequence) -> None:
        """Its phase is about to be one of `HOLDING_NO_MORE`, or it is over: it holds what it has until then."""
        self.num_growing -= sequence.can_grow and sequence.phase not in HOLDING_NO_MORE

    def give_back(self, sequence: Sequence) -> None:
        if sequence.holding is None:
            return
        self.grows_no_more(sequence)
        self._pool.give_back(sequence.holding)
        sequence.holding = None

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is there; blocks that they fill can be found from now on.

        Those of a reservation are offered when they have landed.
        """
        num_full = num_tokens // self._block_size
        if num_full <= sequence.num_findable_blocks or not self._reuses:
            return
        hashes = sequence.hash_blocks(num_full, self._block_size)
        for index in range(sequence.num_findable_blocks, num_full):
            parent = hashes[index - 1] if index else None
            self._pool.make_findable(sequence.block_table[index], BlockLabel(hashes[index], parent, index))
        sequence.num_findable_blocks = num_full
