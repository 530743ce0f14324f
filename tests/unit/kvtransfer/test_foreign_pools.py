"""Staging regions: one for each shape unlike ours, none for our own, bounded in number and in size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from disaggregated.errors import TransferError
from disaggregated.kv_shard import KVHolding, tensor_parallel
from kvtransfer import Region
from kvtransfer.destination.foreign import SHAPES_MAX, ForeignPools
from kvtransfer.destination.our_transports import OurTransports
from kvtransfer.negotiate import Preference
from kvtransfer.transport import OurEnd
from tests.support.kv_shards import Ranks, model_layout

OURS = KVHolding.whole(model_layout(block_size=8))


@contextlib.contextmanager
def foreign(part_tokens: int) -> Iterator[ForeignPools]:
    with Region.allocate(OURS.layout.pool_bytes) as region:
        us = OurEnd(region=region, layout=OURS.layout, peer_id="generation-0")
        pools = ForeignPools(OURS, OurTransports(us, Preference("SHM")), part_tokens=part_tokens)
        try:
            yield pools
        finally:
            pools.close()


def test_a_pool_like_ours_is_staged_nowhere() -> None:
    with foreign(64) as pools:
        assert pools.staging_for(KVHolding.whole(model_layout(num_blocks=7))) is None


def test_sources_of_one_shape_share_a_region_in_their_shape() -> None:
    with foreign(64) as pools:
        first, second = (tensor_parallel(KVHolding.whole(model_layout(block_size=16)), rank, 2) for rank in (0, 1))
        staging = pools.staging_for(first)
        assert staging is not None
        assert staging is pools.staging_for(second)
        assert (staging.layout.num_kv_heads, staging.layout.block_size, staging.layout.num_blocks) == (2, 16, 4)
        assert staging.region.nbytes == staging.layout.pool_bytes
        assert staging.transports.us.region is staging.region


@pytest.mark.parametrize(("part_tokens", "num_blocks"), [(1, 1), (31, 1), (64, 2)])
def test_a_region_holds_a_part_and_a_block_at_least(part_tokens: int, num_blocks: int) -> None:
    with foreign(part_tokens) as pools:
        staging = pools.staging_for(KVHolding.whole(model_layout(block_size=32)))
        assert staging is not None
        assert staging.layout.num_blocks == num_blocks


def test_a_part_of_the_model_in_our_shape_is_unlike_us() -> None:
    with foreign(64) as pools:
        for holding in (*Ranks(stages=(3, 3)).holdings(OURS.layout), *Ranks(context=2).holdings(OURS.layout)):
            assert pools.staging_for(holding) is not None


def test_one_shape_too_many_is_refused() -> None:
    with foreign(64) as pools:
        shapes = [KVHolding.whole(model_layout(block_size=size)) for size in range(9, 9 + SHAPES_MAX)]
        for holding in shapes:
            assert pools.staging_for(holding) is not None
        with pytest.raises(TransferError, match="pools of 16 other shapes are converted already"):
            pools.staging_for(KVHolding.whole(model_layout(dtype="int8")))
        assert pools.staging_for(shapes[0]) is not None
