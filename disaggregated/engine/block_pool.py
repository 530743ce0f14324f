"""Who holds which block of KV memory.

Each block is free, cached (findable, held by nobody, evictable) or held; a held block may have several holders, which
share a prefix. A holder is a `Holding`: one request's block table together with why it holds the blocks and since
when, so that a block that does not come back has a name in the ledger.

What an evicted block held may live on in the host tier (`tiered_cache.py`): a holding that begins with such a block
gets a block of the pool, into which it is copied before anybody reads it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from disaggregated.block_hash import BlockHash
from disaggregated.engine.block_events import BlockLabel
from disaggregated.engine.tiered_cache import CachedRun, TieredCache
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


SWAPPED: Final = "swapped"
"""In the ledger: slots of the host tier that are kept for a preempted sequence."""


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

    def __init__(self, num_blocks: int, cache: TieredCache | None = None) -> None:
        """cache: where findable blocks are noted; left out, one without a host tier and without events."""
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self.cache = TieredCache() if cache is None else cache
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
        return len(self._free) + self.cache.device.num_evictable

    @property
    def num_leased(self) -> int:
        """Blocks held for a transfer, on either side; a shared one counts once."""
        return self._num_leased

    @property
    def num_quarantined(self) -> int:
        return self._num_quarantined

    def find(self, hashes: Iterable[BlockHash], *, owner: str) -> CachedRun:
        """The longest known beginning of a sequence, for `owner` to hold; also what a preempted `owner` left."""
        return self.cache.find(hashes, owner)

    def make_findable(self, block_id: int, label: BlockLabel) -> None:
        """A held block is full and computed: whoever has the same tokens may share it."""
        self.cache.device.add(block_id, label)

    def num_wanted(self, cached: CachedRun, num_new: int) -> int:
        """By how much `num_free` falls when the blocks of `cached` are shared or onboarded and `num_new` are taken."""
        on_device = map(self.cache.on_device, cached.hashes)
        return num_new + sum(block is None or self.cache.device.is_evictable(block) for block in on_device)

    def hold(self, owner: str, kind: HoldingKind, *, cached: CachedRun, num_new: int, now_s: float) -> Holding:
        """Begin a holding of the blocks of `cached`, which are shared, followed by `num_new` blocks of its own.

        What lies in the host tier is onboarded: see `TieredCache.take_copies`. If `owner` was swapped out, it is back.

        Raises:
            PoolExhausted: nothing has changed.
        """
        assert owner not in self._holdings, f"{owner} already holds {self._holdings[owner]}"
        wanted = self.num_wanted(cached, num_new)
        if wanted > self.num_free:
            raise PoolExhausted.of(wanted=wanted, free=self.num_free)
        block_ids = self._hold_cached(owner, cached)
        holding = Holding(owner, kind, now_s, [*block_ids, *(self._take() for _ in range(num_new))])
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

    def swap_out(
        self, holding: Holding, hashes: Sequence[BlockHash], *, num_tokens: int, num_blocks: int, now_s: float
    ) -> bool:
        """End a holding whose owner was preempted and will be back: then find() finds what is still there.

        The first `num_blocks` blocks hold `num_tokens` tokens that are computed; `hashes` are those of the findable
        ones. False: the host tier has no room for them, and this was give_back() and nothing else.
        """
        assert holding.kind is HoldingKind.SEQUENCE, f"{holding} is not being computed"
        own_blocks = holding.block_ids[len(hashes) : num_blocks]
        is_swapped = self.cache.swap_out(holding.owner, hashes, own_blocks, num_tokens=num_tokens, now_s=now_s)
        self.give_back(holding)
        return is_swapped

    def drop_swap(self, owner: str) -> None:
        """A preempted sequence ends before it is back. Nothing happens if nothing of it was kept."""
        self._free.extend(self.cache.end_swap(owner))

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
        """Every holding and every swapped-out sequence, the oldest first. Empty when no request is here."""
        held = [LedgerEntry(h.kind, h.owner, len(h.block_ids), now_s - h.since_s) for h in self._holdings.values()]
        swapped = [LedgerEntry(SWAPPED, owner, n, now_s - since) for owner, n, since in self.cache.num_slots_of_swaps()]
        return sorted([*held, *swapped], key=lambda entry: entry.age_s, reverse=True)

    def check_integrity(self) -> None:
        self.cache.check_integrity()
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        holders = Counter(block_id for h in self._holdings.values() for block_id in h.block_ids)
        for block_id in range(self.num_blocks):
            counted = self._num_holders[block_id]
            assert counted == holders[block_id], f"block {block_id}: {counted} holders, {holders[block_id]} tables"
        free = set(self._free)
        evictable = {block_id for block_id in range(self.num_blocks) if self.cache.device.is_evictable(block_id)}
        assert free.isdisjoint(holders), f"free and held: {sorted(free & holders.keys())}"
        assert evictable.isdisjoint(holders), f"evictable and held: {sorted(evictable & holders.keys())}"
        assert free.isdisjoint(evictable), f"free and evictable: {sorted(free & evictable)}"
        num_known = len(free) + len(evictable) + len(holders)
        assert num_known == self.num_blocks, f"{self.num_blocks - num_known} blocks are lost"
        leased = {b for h in self._holdings.values() if h.kind in _OF_A_TRANSFER for b in h.block_ids}
        assert len(leased) == self._num_leased, f"{self._num_leased} blocks counted as leased, {len(leased)} are"
        for holding in self._holdings.values():
            assert len(set(holding.block_ids)) == len(holding.block_ids), f"{holding} holds a block twice"

    def _hold_cached(self, owner: str, cached: CachedRun) -> list[int]:
        """First everything that is found is made safe, then blocks are taken: that may evict, and fill host slots.

        A slot may be filled anew as soon as its block is on its way to the pool, so the two tiers can trade places even
        when the host tier is full: at most the first block evicted here finds no slot.
        """
        cache = self.cache
        found = [cache.on_device(block_hash) for block_hash in cached.hashes]
        in_host = [block_hash for block_hash, block_id in zip(cached.hashes, found, strict=True) if block_id is None]
        cache.host.claim(in_host)
        for index, block_id in enumerate(found):
            if block_id is not None:
                cache.device.hold(block_id)
                self._num_holders[block_id] += 1
                if index >= cached.num_findable:
                    cache.device.forget(block_id)  # It was kept for this owner alone, who goes on writing into it.
        self._free.extend(cache.end_swap(owner))
        block_ids = []
        for block_hash, block_id in zip(cached.hashes, found, strict=True):
            block_ids.append(self._take() if block_id is None else block_id)
            if block_id is None:
                cache.onboard(block_hash, block_ids[-1])
                cache.host.give_up([block_hash], are_in_pool=True)
        return block_ids

    def _take(self) -> int:
        block_id = self._free.pop() if self._free else self.cache.evict()
        assert self._num_holders[block_id] == 0, f"block {block_id} is handed out while it is held"
        self._num_holders[block_id] = 1
        return block_id

    def _return(self, block_ids: list[int]) -> None:
        for block_id in reversed(block_ids):
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0 and not self.cache.device.keep(block_id):
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
