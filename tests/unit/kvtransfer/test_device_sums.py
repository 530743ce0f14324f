"""The checksum of blocks on a device: what it finds, and that its parts may come in any order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.checksum import PoolBlocks
from kvtransfer.device_pool import DeviceSums, why_not_shared
from kvtransfer.transport import ReadStop, ReadStopped
from tests.support.fake_gpu import FakeDevicePool
from tests.support.kv_pools import SMALL

WORDS = SMALL.block_bytes // 8
EVERY = range(SMALL.num_layers)


@given(layer=st.integers(0, SMALL.num_layers - 1), word=st.integers(0, WORDS - 1), wrong=st.integers(1, 2**64 - 1))
def test_any_one_wrong_word_is_found(layer: int, word: int, wrong: int) -> None:
    pool = FakeDevicePool(SMALL, seed=1)
    (before,) = pool.checksums([4], EVERY)
    words = pool.blocks_LBX[layer, 4].view(np.uint64)
    words[word] ^= np.uint64(wrong)
    assert pool.checksums([4], EVERY) != (before,)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, WORDS - 1)), min_size=2, max_size=2, unique=True))
def test_words_that_changed_places_are_found(places: list[tuple[int, int]]) -> None:
    pool = FakeDevicePool(SMALL, seed=1)
    (before,) = pool.checksums([4], EVERY)
    (one, first), (other, second) = places
    here, there = pool.blocks_LBX[one, 4].view(np.uint64), pool.blocks_LBX[other, 4].view(np.uint64)
    here[first], there[second] = there[second].copy(), here[first].copy()
    assert pool.checksums([4], EVERY) != (before,)


def test_flipped_signs_of_any_two_numbers_do_not_cancel_out() -> None:
    """As they would in a plain sum of products with odd factors."""
    pool = FakeDevicePool(SMALL, seed=1)
    (before,) = pool.checksums([4], EVERY)
    for word in range(1, WORDS):
        words = pool.blocks_LBX[0, 4].view(np.uint64)
        words[[0, word]] ^= np.uint64(1 << 63)
        assert pool.checksums([4], EVERY) != (before,), word
        words[[0, word]] ^= np.uint64(1 << 63)


def test_another_block_another_layer_and_zeroes_have_another_sum() -> None:
    pool = FakeDevicePool(SMALL, seed=None)
    zeroes = [pool.checksums([0], range(layer, layer + 1))[0] for layer in EVERY]
    assert len({*zeroes, 0}) == SMALL.num_layers + 1, "zeroes of another layer are other zeroes"


def blocks_of(pool: FakeDevicePool, *ids: int) -> PoolBlocks:
    return PoolBlocks(pool.address, pool.layout, ids)


@given(st.permutations(list(EVERY)))
def test_layers_may_come_in_any_order(layers: list[int]) -> None:
    theirs, ours = FakeDevicePool(SMALL, seed=1), FakeDevicePool(SMALL, seed=None)
    sums = DeviceSums(ours, 2)
    assert [sums.is_untouched] == [True]
    for layer in layers:
        sums.copy(blocks_of(theirs, 3, 5), blocks_of(ours, 0, 1), range(layer, layer + 1), ReadStop())
    assert [sums.is_untouched] == [False]
    assert sums.values() == theirs.checksums([3, 5], EVERY)
    assert np.array_equal(ours.blocks_LBX[:, [0, 1]], theirs.blocks_LBX[:, [3, 5]])


def test_parts_of_the_blocks_feed_their_own_sums() -> None:
    theirs, ours = FakeDevicePool(SMALL, seed=1), FakeDevicePool(SMALL, seed=None)
    sums = DeviceSums(ours, 3)
    sums.part(1, 3).copy(blocks_of(theirs, 7, 8), blocks_of(ours, 1, 2), EVERY, ReadStop())
    sums.part(0, 1).copy(blocks_of(theirs, 6), blocks_of(ours, 0), EVERY, ReadStop())
    assert sums.values() == theirs.checksums([6, 7, 8], EVERY)
    own = DeviceSums(ours, 3)
    own.take(blocks_of(ours, 0, 1, 2), EVERY, ReadStop())
    assert own.values() == sums.values()


def test_a_stop_is_looked_at_before_a_kernel_is_launched() -> None:
    theirs, ours = FakeDevicePool(SMALL, seed=1), FakeDevicePool(SMALL, seed=None)
    stop = ReadStop()
    stop.request()
    with pytest.raises(ReadStopped):
        DeviceSums(ours, 1).copy(blocks_of(theirs, 3), blocks_of(ours, 0), EVERY, stop)
    assert ours.num_copies == 0


def test_blocks_of_no_whole_words_are_not_shared() -> None:
    odd = dataclasses.replace(SMALL, num_planes=1, num_kv_heads=1, block_size=1, head_dim=3, dtype="float16")
    assert why_not_shared(odd) == "a block of 6 bytes is no whole number of 64-bit words"
    assert why_not_shared(SMALL) is None
