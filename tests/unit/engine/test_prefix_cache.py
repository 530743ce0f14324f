from __future__ import annotations

import pytest

from disaggregated.block_hash import BlockHash
from disaggregated.engine.block_events import BlockEventLog, BlockLabel
from disaggregated.engine.prefix_cache import PrefixCache


def root(number: int) -> BlockLabel:
    """The first block of a sequence of its own."""
    return BlockLabel(BlockHash(number), None, 0)


def chain(*numbers: int) -> list[BlockLabel]:
    parents = [None, *map(BlockHash, numbers)]
    return [BlockLabel(BlockHash(number), parents[depth], depth) for depth, number in enumerate(numbers)]


def new_cache() -> PrefixCache:
    return PrefixCache(BlockEventLog(0))


def evict_all(cache: PrefixCache) -> list[int]:
    """Block ids in the order of eviction."""
    evicted = []
    while cache.num_evictable:
        evicted.append(cache.evict()[0])
        cache.check_integrity()
    return evicted


def test_a_block_is_found_under_its_hash_until_it_is_evicted() -> None:
    cache = new_cache()
    cache.add(3, root(10))
    assert cache.find(BlockHash(10)) == 3
    cache.keep(3)
    assert cache.find(BlockHash(10)) == 3
    assert cache.evict() == (3, root(10))
    assert cache.find(BlockHash(10)) is None


def test_the_block_that_nobody_has_held_for_longest_is_evicted() -> None:
    cache = new_cache()
    for block_id in range(3):
        cache.add(block_id, root(block_id + 10))
        cache.keep(block_id)
    cache.hold(0)
    cache.keep(0)
    assert evict_all(cache) == [1, 2, 0]


def test_blocks_that_somebody_waits_for_are_evicted_last_and_their_beginning_last_of_all() -> None:
    cache = new_cache()
    wanted, other = chain(1, 2, 3), chain(7, 8)
    for block_id, label in enumerate([*wanted, *other]):
        cache.add(block_id, label)
    for block_id in (2, 1, 0, 4, 3):
        cache.keep(block_id)
    cache.use([label.block_hash for label in wanted[:2]])
    cache.check_integrity()
    assert evict_all(cache) == [2, 4, 3, 1, 0]


def test_a_held_block_is_not_evictable() -> None:
    cache = new_cache()
    cache.add(0, root(10))
    cache.keep(0)
    cache.hold(0)
    assert cache.num_evictable == 0
    with pytest.raises(KeyError):
        cache.evict()


def test_a_block_stands_for_one_content_until_it_is_evicted() -> None:
    cache = new_cache()
    cache.add(0, root(10))
    with pytest.raises(AssertionError, match="already stands for other tokens"):
        cache.add(0, root(11))
    cache.keep(0)
    cache.evict()
    cache.add(0, root(11))
    assert cache.find(BlockHash(11)) == 0


# Twins: two blocks with the same tokens.


def test_of_two_blocks_with_the_same_tokens_the_first_is_found_and_the_second_is_not_kept() -> None:
    cache = new_cache()
    cache.add(0, root(10))
    cache.add(1, root(10))
    assert cache.find(BlockHash(10)) == 0
    assert not cache.keep(1)
    assert cache.keep(0)
    cache.check_integrity()


def test_when_the_first_is_given_up_before_its_twin_the_twin_is_found_and_only_one_is_kept() -> None:
    cache = new_cache()
    cache.add(0, root(10))
    cache.add(1, root(10))
    assert not cache.keep(0)
    assert cache.find(BlockHash(10)) == 1
    assert cache.keep(1)
    cache.check_integrity()
    assert evict_all(cache) == [1]


def test_evicting_the_found_one_of_two_leaves_the_tokens_findable() -> None:
    cache = new_cache()
    cache.add(0, root(10))
    cache.keep(0)
    cache.add(1, root(10))
    assert cache.evict() == (0, None)  # Nothing is lost, so there is nothing to save.
    assert cache.find(BlockHash(10)) == 1
    cache.check_integrity()


def test_a_beginning_that_was_computed_twice_outlives_what_follows_it() -> None:
    """Two sequences compute the same first block; the one whose block is found ends long before the other."""
    cache = new_cache()
    first, second = chain(10, 11)
    cache.add(0, first)
    cache.keep(0)
    cache.add(1, first)
    cache.add(2, second)
    cache.check_integrity()
    cache.keep(2)
    cache.keep(1)
    cache.check_integrity()
    assert evict_all(cache) == [2, 0]


def test_a_block_whose_twin_lives_cannot_be_forgotten() -> None:
    cache = new_cache()
    cache.add(0, root(10))
    cache.add(1, root(10))
    with pytest.raises(AssertionError, match="before its twin"):
        cache.forget(0)


def test_an_orphan_is_noticed() -> None:
    cache = new_cache()
    cache.add(0, chain(10, 11)[1])
    with pytest.raises(AssertionError, match="its parent is not"):
        cache.check_integrity()
