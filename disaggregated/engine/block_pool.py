"""Who holds which block of KV memory.

Each block is free, cached (findable, held by nobody, evictable) or held; a held block may have several holders, which
share a prefix. A holder is a `Holding`: one request's block table together with why it holds the blocks and since
when, so that a block that does not come back has a name in the ledger.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from disaggregated.engine.prefix_cache import PrefixCache
from disaggregated.errors import PoolExhausted


class HoldingKind(enum.StrEnum):
    SEQUENCE = "sequence"
    """Being computed."""
    RESERVED = "reserved"
    """Being filled by a transfer."""
    LEASED = "leased"
    """Computed, and read by another server."""
    QUARANTINED = "quarantined"
    """Cancelled while a transfer may still write into them."""


_OF_A_TRANSFER = frozenset({HoldingKind.RESERVED, HoldingKind.LEASED, HoldingKind.QUARANTINED})


@dataclasses.dataclass(slots=True, eq=False)
class Holding:
    """One request's blocks. Made and changed by the `BlockPool` only; `block_ids` is the request's block table."""

    owner: str
    kind: HoldingKind
    since_s: float
    block_ids: list[int]


class LedgerEntry(NamedTuple):
    kind: str
    owner: str
    num_blocks: int
    age_s: float


class BlockPool:
    """The books of a pool of `num_blocks` blocks. Constant time a block, no I/O; not thread-safe.

    Invariant: each block is in exactly one of three places: on the free list, evictable in the prefix cache, or in
    the block tables of as many holdings as its reference count says. Hence a held block is never handed out or evicted.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self.prefix_cache = PrefixCache()
        self.num_returns = 0
        """Grows whenever a holding ends or shrinks: the moment at which one who found no room may try again."""
        self._free = list(range(num_blocks - 1, -1, -1))  # A stack: the block used last is the likeliest in a cache.
        self._num_holders = [0] * num_blocks
        self._num_transfers = [0] * num_blocks
        self._num_leased = 0
        self._num_quarantined = 0
        self._holdings: dict[str, Holding] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be had: free ones and cached ones that nobody holds."""
        return len(self._free) + self.prefix_cache.num_evictable

    @property
    def num_leased(self) -> int:
        """Blocks held for a transfer, on either side; a shared one counts once."""
        return self._num_leased

    @property
    def num_quarantined(self) -> int:
        return self._num_quarantined

    def num_wanted(self, cached: Sequence[int], num_new: int) -> int:
        """By how much `num_free` falls when `cached` blocks are shared and `num_new` are taken."""
        return num_new + sum(map(self.prefix_cache.is_evictable, cached))

    def hold(self, owner: str, kind: HoldingKind, *, cached: Sequence[int], num_new: int, now_s: float) -> Holding:
        """Begin a holding of the `cached` blocks, which are shared, followed by `num_new` blocks of its own.

        Raises:
            PoolExhausted: nothing has changed.
        """
        assert owner not in self._holdings, f"{owner} already holds {self._holdings[owner]}"
        wanted = self.num_wanted(cached, num_new)
        if wanted > self.num_free:
            raise PoolExhausted.of(wanted=wanted, free=self.num_free)
        for block_id in cached:  # First, so that taking the new ones can't evict them.
            self.prefix_cache.hold(block_id)
            self._num_holders[block_id] += 1
        holding = Holding(owner, kind, now_s, [*cached, *(self._take() for _ in range(num_new))])
        self._holdings[owner] = holding
        self._count(holding, 1)
        return holding

    def grow(self, holding: Holding) -> None:
        """Add a block at the end.

        Raises:
            PoolExhausted: nothing has changed.
        """
        assert self._holdings.get(holding.owner) is holding, f"{holding} has ended"
        assert holding.kind is HoldingKind.SEQUENCE, f"{holding} has its size for good"
        if self.num_free == 0:
            raise PoolExhausted.of(wanted=1, free=0)
        holding.block_ids.append(self._take())

    def change_kind(self, holding: Holding, kind: HoldingKind, *, now_s: float) -> None:
        """Hold the same blocks for another reason; their age starts again."""
        assert self._holdings.get(holding.owner) is holding, f"{holding} has ended"
        self._count(holding, -1)
        holding.kind = kind
        holding.since_s = now_s
        self._count(holding, 1)

    def give_back(self, holding: Holding) -> None:
        """End a holding. Findable blocks stay in the prefix cache, the end of the sequence being evicted first."""
        assert self._holdings.get(holding.owner) is holding, f"{holding} has ended"
        del self._holdings[holding.owner]
        self._count(holding, -1)
        self._return(holding.block_ids)
        holding.block_ids = []

    def quarantine(self, holding: Holding, *, num_shared: int, now_s: float) -> None:
        """Keep only the blocks a transfer may still write into: all but the first `num_shared`."""
        assert holding.kind is HoldingKind.RESERVED, f"{holding} is not being filled by a transfer"
        self._count(holding, -1)
        shared, holding.block_ids = holding.block_ids[:num_shared], holding.block_ids[num_shared:]
        self._return(shared)
        holding.kind = HoldingKind.QUARANTINED
        holding.since_s = now_s
        self._count(holding, 1)

    def ledger(self, now_s: float) -> list[LedgerEntry]:
        """Every holding, the oldest first. Empty when no request is here."""
        entries = [LedgerEntry(h.kind, h.owner, len(h.block_ids), now_s - h.since_s) for h in self._holdings.values()]
        return sorted(entries, key=lambda entry: entry.age_s, reverse=True)

    def check_integrity(self) -> None:
        self.prefix_cache.check_integrity()
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        holders = Counter(block_id for h in self._holdings.values() for block_id in h.block_ids)
        for block_id in range(self.num_blocks):
            counted = self._num_holders[block_id]
            assert counted == holders[block_id], f"block {block_id}: {counted} holders, {holders[block_id]} tables"
        free = set(self._free)
        evictable = {block_id for block_id in range(self.num_blocks) if self.prefix_cache.is_evictable(block_id)}
        assert free.isdisjoint(holders), f"free and held: {sorted(free & holders.keys())}"
        assert evictable.isdisjoint(holders), f"evictable and held: {sorted(evictable & holders.keys())}"
        assert free.isdisjoint(evictable), f"free and evictable: {sorted(free & evictable)}"
        num_known = len(free) + len(evictable) + len(holders)
        assert num_known == self.num_blocks, f"{self.num_blocks - num_known} blocks are lost"
        leased = {b for h in self._holdings.values() if h.kind in _OF_A_TRANSFER for b in h.block_ids}
        assert len(leased) == self._num_leased, f"{self._num_leased} blocks counted as leased, {len(leased)} are"
        for holding in self._holdings.values():
            assert len(set(holding.block_ids)) == len(holding.block_ids), f"{holding} holds a block twice"

    def _take(self) -> int:
        block_id = self._free.pop() if self._free else self.prefix_cache.evict()
        assert self._num_holders[block_id] == 0, f"block {block_id} is handed out while it is held"
        self._num_holders[block_id] = 1
        return block_id

    def _return(self, block_ids: list[int]) -> None:
        for block_id in reversed(block_ids):
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0 and not self.prefix_cache.keep(block_id):
                self._free.append(block_id)
        self.num_returns += 1

    def _count(self, holding: Holding, sign: int) -> None:
        """Keep the two sums that the statistics show, so that a snapshot after each step costs nothing."""
        if holding.kind not in _OF_A_TRANSFER:
            return
        if holding.kind is HoldingKind.QUARANTINED:
            self._num_quarantined += sign * len(holding.block_ids)
        for block_id in holding.block_ids:
            before = self._num_transfers[block_id]
            self._num_transfers[block_id] = before + sign
            self._num_leased += (before + sign > 0) - (before > 0)
