"""Running checksums are the same with native code and without."""

from __future__ import annotations

import concurrent.futures
import random

import pytest
import xxhash

from disaggregated.kv_layout import KVLayout
from kvtransfer import checksum
from kvtransfer.checksum import (
    BlockSums,
    NativeSums,
    PlainSums,
    PoolBlocks,
    block_checksum,
    block_checksums,
    block_sums,
)
from kvtransfer.native import library
from kvtransfer.region import Region
from kvtransfer.transport import ReadStop, ReadStopped
from tests.support.kv_pools import LARGE, SMALL, blocks_of, regions

TINY = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=2, dtype="float32", num_blocks=8)
"""128 bytes a block: shorter than the native code takes."""


@pytest.fixture(params=["native", "none"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With native code, and as on a machine without a compiler."""
    way: str = request.param
    if way == "none":
        monkeypatch.setattr(checksum, "library", lambda: None)
    elif library.library() is None:
        pytest.skip("no native code here")
    return way


def expected(pool: Region, layout: KVLayout, block_ids: list[int], layers: range) -> tuple[int, ...]:
    """As the package has it, over each block's layers in order."""
    blocks = blocks_of(pool, layout, block_ids)[layers.start : layers.stop]
    return tuple(xxhash.xxh3_64_intdigest(blocks[:, i].tobytes()) for i in range(len(block_ids)))


def in_pool(region: Region, layout: KVLayout, ids: list[int]) -> PoolBlocks:
    return PoolBlocks(region.base_address, layout, ids)


@pytest.mark.parametrize("layout", [TINY, SMALL, LARGE], ids=["tiny", "small", "large"])
@pytest.mark.parametrize("layers", [None, range(1), range(1, 2)])
def test_checksums_of_a_pool_are_the_packages(way: str, layout: KVLayout, layers: range | None) -> None:
    with regions(layout, 1) as (pool,):
        ids = random.Random(3).sample(range(layout.num_blocks), 5)
        wanted = expected(pool, layout, ids, layers or range(layout.num_layers))
        assert block_checksums(pool.buffer, layout, ids, layers) == wanted
        assert block_checksum(pool.buffer, layout, ids[2], layers) == wanted[2]


def test_no_blocks_have_no_checksums(way: str) -> None:
    with regions(SMALL, 1) as (pool,):
        assert block_checksums(pool.buffer, SMALL, []) == ()


@pytest.mark.parametrize("layout", [TINY, SMALL, LARGE], ids=["tiny", "small", "large"])
def test_a_copy_sums_up_what_it_copies(way: str, layout: KVLayout) -> None:
    with regions(layout) as (source, into):
        ids, into_ids = [5, 6, 7, 1], [2, 3, 0, 4]
        sums = block_sums(len(ids), layout)
        was_untouched = sums.is_untouched
        every = range(layout.num_layers)
        sums.copy(in_pool(source, layout, ids), in_pool(into, layout, into_ids), every, ReadStop())
        assert (was_untouched, sums.is_untouched) == (True, False)
        assert sums.values() == expected(source, layout, ids, every)
        assert (blocks_of(into, layout, into_ids) == blocks_of(source, layout, ids)).all()
        untouched = sorted(set(range(layout.num_blocks)) - set(into_ids))
        assert not blocks_of(into, layout, untouched).any()


def test_layers_that_come_in_several_calls_are_one_checksum(way: str) -> None:
    with regions(SMALL) as (source, into):
        ids = [9, 4]
        sums = block_sums(2, SMALL)
        for layers in (range(1), range(1, 3)):
            sums.copy(in_pool(source, SMALL, ids), in_pool(into, SMALL, ids), layers, ReadStop())
        assert sums.values() == expected(source, SMALL, ids, range(3))


def test_parts_are_fed_by_several_threads_and_read_as_one(way: str) -> None:
    with regions(LARGE, 1) as (pool,), concurrent.futures.ThreadPoolExecutor(4) as threads:
        ids = random.Random(1).sample(range(LARGE.num_blocks), 64)
        sums = block_sums(64, LARGE)

        def feed(begin: int) -> None:
            part = sums.part(begin, begin + 16)
            part.take(in_pool(pool, LARGE, ids[begin : begin + 16]), range(LARGE.num_layers), ReadStop())

        assert list(threads.map(feed, range(0, 64, 16))) == [None] * 4
        assert not sums.is_untouched
        assert sums.values() == expected(pool, LARGE, ids, range(LARGE.num_layers))


def test_pools_of_another_number_of_blocks_are_copied_between(way: str) -> None:
    larger = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32", num_blocks=40)
    with regions(SMALL, 1) as (source,), Region.allocate(larger.pool_bytes) as into:
        sums = block_sums(1, SMALL)
        sums.copy(in_pool(source, SMALL, [31]), in_pool(into, larger, [39]), range(3), ReadStop())
        assert (blocks_of(into, larger, [39]) == blocks_of(source, SMALL, [31])).all()


def a_stopped_stop() -> ReadStop:
    stop = ReadStop()
    stop.request()
    return stop


def test_a_stopped_copy_raises_and_copies_nothing_more(way: str) -> None:
    with regions(SMALL) as (source, into):
        sums = block_sums(1, SMALL)
        with pytest.raises(ReadStopped):
            sums.copy(in_pool(source, SMALL, [1]), in_pool(into, SMALL, [1]), range(3), a_stopped_stop())
        with pytest.raises(ReadStopped):
            block_checksums(source.buffer, SMALL, [1], stop=a_stopped_stop())
        assert not any(into.buffer)


@pytest.mark.parametrize(("ids", "into_ids"), [([32], [1]), ([1], [32])])
def test_a_block_that_is_not_there_is_our_own_mistake(way: str, ids: list[int], into_ids: list[int]) -> None:
    with regions(SMALL) as (source, into):
        sums: BlockSums = block_sums(1, SMALL)
        with pytest.raises(AssertionError):
            sums.copy(in_pool(source, SMALL, ids), in_pool(into, SMALL, into_ids), range(3), ReadStop())
        assert not any(into.buffer)


def test_short_blocks_are_left_to_the_package() -> None:
    assert isinstance(block_sums(1, TINY), PlainSums)
    assert isinstance(block_sums(1, SMALL), NativeSums if library.library() else PlainSums)
