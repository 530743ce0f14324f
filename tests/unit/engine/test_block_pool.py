from __future__ import annotations

import pytest

from disaggregated.block_hash import BlockHash
from disaggregated.engine.block_events import BlockLabel
from disaggregated.engine.block_pool import BlockPool, Holding, HoldingKind
from disaggregated.engine.tiered_cache import CachedRun
from disaggregated.errors import PoolExhausted

NOTHING = CachedRun()


def hold(
    pool: BlockPool,
    owner: str,
    num_new: int,
    *,
    cached: CachedRun = NOTHING,
    kind: HoldingKind = HoldingKind.SEQUENCE,
    now_s: float = 0.0,
) -> Holding:
    return pool.hold(owner, kind, cached=cached, num_new=num_new, now_s=now_s)


def cache(pool: BlockPool, holding: Holding, first_hash: int) -> None:
    """Make its blocks findable as one chain: `first_hash`, and the numbers after it."""
    for offset, block_id in enumerate(holding.block_ids):
        parent = BlockHash(first_hash + offset - 1) if offset else None
        pool.make_findable(block_id, BlockLabel(BlockHash(first_hash + offset), parent, offset))


def found(pool: BlockPool, *hashes: int, owner: str = "somebody") -> CachedRun:
    return pool.find(map(BlockHash, hashes), owner=owner)


def blocks(pool: BlockPool, run: CachedRun) -> list[int | None]:
    return [pool.cache.on_device(block_hash) for block_hash in run.hashes]


def test_a_block_is_held_by_one_or_free() -> None:
    pool = BlockPool(4)
    one, other = hold(pool, "one", 2), hold(pool, "other", 2)
    pool.check_integrity()
    assert sorted(one.block_ids + other.block_ids) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.give_back(one)
    pool.check_integrity()
    assert pool.num_free == 2


def test_a_holding_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(3)
    kept = hold(pool, "one", 2)
    cache(pool, kept, 100)
    with pytest.raises(PoolExhausted, match="wanted 2 KV blocks, 1 are free"):
        hold(pool, "other", 2, cached=found(pool, 100))
    pool.check_integrity()
    assert pool.num_free == 1
    assert [entry.owner for entry in pool.ledger(0.0)] == ["one"]


def test_growing_takes_the_last_block_and_then_says_that_there_is_none() -> None:
    pool = BlockPool(2)
    holding = hold(pool, "one", 1)
    pool.grow(holding)
    with pytest.raises(PoolExhausted):
        pool.grow(holding)
    pool.check_integrity()
    assert len(set(holding.block_ids)) == 2


def test_a_shared_block_is_back_when_its_last_holder_gives_it_up() -> None:
    pool = BlockPool(3)
    one = hold(pool, "one", 2)
    cache(pool, one, 100)
    other = hold(pool, "other", 1, cached=found(pool, 100, 101))
    pool.give_back(one)
    pool.check_integrity()
    assert pool.num_free == 0
    pool.give_back(other)
    pool.check_integrity()
    assert pool.num_free == 3


def test_cached_blocks_count_as_free_but_are_evicted_after_all_others() -> None:
    pool = BlockPool(3)
    one = hold(pool, "one", 1)
    cache(pool, one, 100)
    cached_block = one.block_ids[0]
    pool.give_back(one)
    assert pool.num_free == 3
    assert cached_block not in hold(pool, "other", 2).block_ids
    assert blocks(pool, found(pool, 100)) == [cached_block]
    assert hold(pool, "third", 1).block_ids == [cached_block]
    assert len(found(pool, 100)) == 0
    pool.check_integrity()


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3)
    one = hold(pool, "one", 3)
    cache(pool, one, 100)
    beginning = one.block_ids[:2]
    pool.give_back(one)
    hold(pool, "other", 1)
    assert blocks(pool, found(pool, 100, 101, 102)) == beginning


def test_sharing_cached_blocks_never_evicts_them_for_the_same_holding() -> None:
    pool = BlockPool(3)
    one = hold(pool, "one", 2)
    cache(pool, one, 100)
    shared = list(one.block_ids)
    cached = found(pool, 100, 101)
    pool.give_back(one)
    assert pool.num_wanted(cached, 1) == 3
    with pytest.raises(PoolExhausted):
        hold(pool, "other", 2, cached=cached)
    assert hold(pool, "other", 1, cached=cached).block_ids[:2] == shared
    pool.check_integrity()


@pytest.mark.parametrize("kind", list(HoldingKind))
def test_a_held_block_is_never_handed_out_whatever_it_is_held_for(kind: HoldingKind) -> None:
    pool = BlockPool(4)
    held = hold(pool, "held", 2, kind=kind)
    cache(pool, held, 100)
    for number in range(10):  # Everything else turns over many times.
        other = hold(pool, f"other-{number}", 2)
        assert set(other.block_ids).isdisjoint(held.block_ids)
        pool.give_back(other)
    pool.check_integrity()
    assert blocks(pool, found(pool, 100, 101)) == held.block_ids


def test_a_leased_block_counts_once_however_often_it_is_leased() -> None:
    pool = BlockPool(4)
    one = hold(pool, "one", 2)
    cache(pool, one, 100)
    assert pool.num_leased == 0
    pool.change_kind(one, HoldingKind.LEASED, now_s=1.0)
    other = hold(pool, "other", 1, cached=found(pool, 100, 101), kind=HoldingKind.LEASED)
    assert pool.num_leased == 3
    pool.give_back(one)
    assert pool.num_leased == 3
    pool.give_back(other)
    assert pool.num_leased == 0
    pool.check_integrity()


def test_a_quarantine_keeps_only_what_a_transfer_may_write_into() -> None:
    pool = BlockPool(4)
    one = hold(pool, "one", 1)
    cache(pool, one, 100)
    reserved = hold(pool, "other", 2, cached=found(pool, 100, 101), kind=HoldingKind.RESERVED)
    written = reserved.block_ids[1:]
    pool.quarantine(reserved, num_shared=1, now_s=1.0)
    assert reserved.block_ids == written
    assert (pool.num_quarantined, pool.num_leased) == (2, 2)
    pool.check_integrity()
    pool.give_back(reserved)
    assert (pool.num_quarantined, pool.num_leased, pool.num_free) == (0, 0, 3)
    pool.check_integrity()


def test_the_ledger_names_every_holder_the_oldest_first() -> None:
    pool = BlockPool(5)
    hold(pool, "young", 1, now_s=7.0)
    old = hold(pool, "old", 2, now_s=2.0)
    leased = hold(pool, "leased", 1, now_s=1.0)
    pool.change_kind(leased, HoldingKind.LEASED, now_s=6.0)
    assert pool.ledger(10.0) == [
        ("sequence", "old", 2, 8.0),
        ("leased", "leased", 1, 4.0),
        ("sequence", "young", 1, 3.0),
    ]
    pool.give_back(old)
    assert [entry.owner for entry in pool.ledger(10.0)] == ["leased", "young"]


def test_giving_back_twice_is_our_own_mistake() -> None:
    pool = BlockPool(2)
    holding = hold(pool, "one", 1)
    pool.give_back(holding)
    with pytest.raises(AssertionError, match="has ended"):
        pool.give_back(holding)


def test_an_owner_holds_blocks_once() -> None:
    pool = BlockPool(2)
    hold(pool, "one", 1)
    with pytest.raises(AssertionError, match="already holds"):
        hold(pool, "one", 1)


def test_a_lost_block_is_noticed() -> None:
    pool = BlockPool(3)
    holding = hold(pool, "one", 2)
    holding.block_ids.pop()
    with pytest.raises(AssertionError, match="1 holders, 0 tables"):
        pool.check_integrity()
