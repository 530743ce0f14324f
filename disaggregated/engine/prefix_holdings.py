"""Beginnings of prompts that are held for their content, and not for a request that is computed here.

    lend()      what is found here of a run of blocks stays while another server reads it
    reserve()   blocks that continue what is found here, to be filled by a transfer from another server
    land()      they are filled and verified: whoever has the same tokens finds them from here on

Neither is anybody's sequence: nothing is computed for it, it never waits for room, and what is not there, or has no
room, is simply not part of it. So that others' conversations never crowd out our own, all of them together hold half
of the pool at most, and nothing that the scheduler has promised to somebody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Final

from disaggregated.block_hash import BlockHash
from disaggregated.engine.block_events import BlockLabel
from disaggregated.engine.block_pool import BlockPool, Holding, HoldingKind
from disaggregated.engine.tiered_cache import CachedRun

POOL_SHARE: Final = 2
"""One block in so many of the pool, at most."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefixReservation:
    """What is here of a run of blocks, and the blocks that were taken for what follows it."""

    num_cached_blocks: int
    block_ids: tuple[int, ...]
    """The caller's alone, to fill in order. Empty: nothing is held, and there is nothing to release."""


@dataclasses.dataclass(slots=True)
class _Reserved:
    hashes: Sequence[BlockHash]
    num_cached: int
    is_quarantined: bool = False


class PrefixHoldings:
    """Part of an engine, and owned by its thread.

    Invariant: an owner is here exactly while the pool has a holding of that name, which is LEASED, RESERVED or
    QUARANTINED.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._holdings: dict[str, Holding] = {}
        self._reserved: dict[str, _Reserved] = {}

    @property
    def owners(self) -> Collection[str]:
        return self._holdings.keys()

    def lend(self, owner: str, hashes: Sequence[BlockHash], *, num_free: int, now_s: float) -> tuple[int, ...]:
        """Hold the longest run of `hashes`, from the first on, that is here and for which there is room.

        Blocks of running sequences are shared like any other: they are full, and nobody writes into them again. A run
        may begin in a sequence's midst. Empty: nothing is held.
        """
        found = self._pool.find(hashes, owner=owner)
        cached = self._affordable(found, min(num_free, self._room()))
        if not cached:
            return ()
        self._holdings[owner] = self._pool.hold(owner, HoldingKind.LEASED, cached=cached, num_new=0, now_s=now_s)
        return tuple(self._holdings[owner].block_ids)

    def reserve(
        self,
        owner: str,
        hashes: Sequence[BlockHash],
        num_wanted: Callable[[int], int],
        *,
        num_free: int,
        now_s: float,
    ) -> PrefixReservation:
        """Take blocks for what follows the longest run of `hashes` that is here.

        num_wanted: how many blocks, given how many are here; called once, on the engine's thread, so it is quick.
        """
        found = self._pool.find(hashes, owner=owner)
        num_cached = len(found)
        room = min(num_free, self._room()) - self._pool.num_wanted(found, 0)
        num_new = max(0, min(num_wanted(num_cached), len(hashes) - num_cached, room))
        if not num_new:
            return PrefixReservation(num_cached_blocks=num_cached, block_ids=())
        holding = self._pool.hold(owner, HoldingKind.RESERVED, cached=found, num_new=num_new, now_s=now_s)
        self._holdings[owner] = holding
        self._reserved[owner] = _Reserved(hashes, num_cached)
        return PrefixReservation(num_cached_blocks=num_cached, block_ids=tuple(holding.block_ids[num_cached:]))

    def land(self, owner: str, num_landed: int) -> bool:
        """The first `num_landed` blocks of a reservation are filled, and no transfer writes into any of them again.

        They can be found from here on, and are held by nobody. False when the reservation was cancelled meanwhile: the
        blocks are just back.
        """
        reserved, holding = self._reserved[owner], self._holdings[owner]
        if not reserved.is_quarantined:
            hashes = reserved.hashes
            for index in range(reserved.num_cached, reserved.num_cached + num_landed):
                parent = hashes[index - 1] if index else None
                self._pool.make_findable(holding.block_ids[index], BlockLabel(hashes[index], parent, index))
        self.release(owner)
        return not reserved.is_quarantined

    def cancel(self, owner: str, *, now_s: float) -> None:
        """A reservation is given up while its transfer may still write: its blocks wait for release(). Idempotent."""
        reserved = self._reserved.get(owner)
        if reserved is not None and not reserved.is_quarantined:
            reserved.is_quarantined = True
            self._pool.quarantine(self._holdings[owner], num_shared=reserved.num_cached, now_s=now_s)

    def release(self, owner: str) -> bool:
        """Nobody reads or writes these blocks any more. False when nothing is held under that name."""
        holding = self._holdings.pop(owner, None)
        self._reserved.pop(owner, None)
        if holding is not None:
            self._pool.give_back(holding)
        return holding is not None

    def check_integrity(self) -> None:
        assert self._reserved.keys() <= self._holdings.keys(), "a reservation without blocks"
        assert all(holding.block_ids for holding in self._holdings.values()), "a prefix of no blocks is held"

    def _room(self) -> int:
        held = sum(len(holding.block_ids) for holding in self._holdings.values())
        return max(0, self._pool.num_blocks // POOL_SHARE - held)

    def _affordable(self, found: CachedRun, room: int) -> CachedRun:
        """As much of the run, from its first block on, as `room` blocks allow; one that somebody holds costs none."""
        hashes = found.hashes[: self._room()]
        while hashes and self._pool.num_wanted(run := CachedRun(hashes, None, len(hashes)), 0) > room:
            hashes = hashes[: -max(1, self._pool.num_wanted(run, 0) - room)]
        return CachedRun(hashes, None, len(hashes))
