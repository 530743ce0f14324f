from __future__ import annotations

import pytest

from disaggregated.block_hash import BlockHash
from disaggregated.engine.prefix_cache import PrefixCache


def test_a_run_ends_at_the_first_block_that_is_missing() -> None:
    cache = PrefixCache()
    for block_id in (0, 1, 3):
        cache.add(block_id, BlockHash(block_id + 10))
    assert cache.find(map(BlockHash, (10, 11, 12, 13))) == [0, 1]
    assert cache.find(map(BlockHash, (12, 13))) == []


def test_of_two_blocks_with_the_same_tokens_the_first_is_found_and_the_second_is_not_kept() -> None:
    cache = PrefixCache()
    cache.add(0, BlockHash(10))
    cache.add(1, BlockHash(10))
    assert cache.find([BlockHash(10)]) == [0]
    assert not cache.keep(1)
    assert cache.keep(0)
    cache.check_integrity()


def test_the_block_that_nobody_has_held_for_longest_is_evicted() -> None:
    cache = PrefixCache()
    for block_id in range(3):
        cache.add(block_id, BlockHash(block_id + 10))
        cache.keep(block_id)
    cache.hold(0)
    cache.keep(0)
    assert [cache.evict() for _ in range(3)] == [1, 2, 0]
    assert cache.num_evictable == 0
    cache.check_integrity()


def test_a_held_block_is_not_evictable() -> None:
    cache = PrefixCache()
    cache.add(0, BlockHash(10))
    cache.keep(0)
    cache.hold(0)
    assert cache.num_evictable == 0
    with pytest.raises(KeyError):
        cache.evict()


def test_a_block_stands_for_one_content_until_it_is_evicted() -> None:
    cache = PrefixCache()
    cache.add(0, BlockHash(10))
    with pytest.raises(AssertionError, match="already stands for other tokens"):
        cache.add(0, BlockHash(11))
    cache.keep(0)
    assert cache.evict() == 0
    cache.add(0, BlockHash(11))
    assert cache.find([BlockHash(11)]) == [0]
