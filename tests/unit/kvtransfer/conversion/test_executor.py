"""Pools into pools, without a transfer between them: byte for byte what our rank would have computed itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.kv_layout import DTYPE_BYTES
from disaggregated.kv_shard import KVHolding
from kvtransfer.conversion.executor import Executor, PoolView
from kvtransfer.conversion.planner import plan_conversion
from kvtransfer.conversion.tokens import TokenMap, TokenPlan
from tests.support.kv_shards import Floats, Ranks, expected, fetch, model_kv, model_layout, store

SPREADS = [
    Ranks(), Ranks(tensor=2), Ranks(tensor=8), Ranks(stages=(1, 5)), Ranks(tensor=2, stages=(2, 3, 1)),
    Ranks(context=2), Ranks(context=3, stripe_tokens=4), Ranks(tensor=2, context=2, stripe_tokens=16),
]  # fmt: skip


def pool_of(holding: KVHolding, kv: Floats) -> memoryview:
    pool = memoryview(bytearray(holding.layout.pool_bytes))
    store(pool, holding, range(holding.layout.num_blocks), kv)
    return pool


def convert_all(sources: list[KVHolding], ours: KVHolding, kv: Floats, table: list[int]) -> memoryview:
    num_tokens = kv.shape[3]
    pool = memoryview(bytearray(b"\xee" * ours.layout.pool_bytes))
    plan = plan_conversion(sources, ours)
    for source, pieces in zip(sources, plan.pieces, strict=True):
        tokens = TokenPlan(
            TokenMap.of(source, num_tokens),
            TokenMap.of(ours, num_tokens),
            begin=0,
            end=len(table) * ours.layout.block_size,
            num_tokens=num_tokens,
        )
        views = PoolView(pool_of(source, kv), source.layout), PoolView(pool, ours.layout)
        executor = Executor(*views, pieces)
        for block in range(source.layout.num_blocks):
            for layer in range(source.layout.num_layers):  # One by one: it does not matter in which order they come.
                for segment in tokens.segments(block):
                    executor.convert(block, segment, table[segment.into_block], range(layer, layer + 1))
    return pool


@settings(max_examples=60)
@given(
    spread=st.sampled_from(SPREADS),
    into=st.sampled_from(SPREADS),
    shape=st.tuples(st.sampled_from([8, 16, 64]), st.sampled_from([8, 16, 64]), st.sampled_from(sorted(DTYPE_BYTES))),
    num_tokens=st.integers(1, 40),
    data=st.data(),
)
def test_placement_alone_changes_no_byte(
    spread: Ranks, into: Ranks, shape: tuple[int, int, str], num_tokens: int, data: st.DataObject
) -> None:
    theirs, ours = (model_layout(block_size=size, dtype=shape[2], num_blocks=6) for size in shape[:2])
    kv = model_kv(theirs, num_tokens)
    holding = data.draw(st.sampled_from(into.holdings(ours)))
    table = data.draw(st.permutations(range(6)))
    pool = convert_all(spread.holdings(theirs), holding, kv, table)
    assert (fetch(pool, holding, table, num_tokens) == expected(holding, kv)).all()


def test_nothing_is_written_beside_the_prompts_tokens() -> None:
    theirs, ours = KVHolding.whole(model_layout(block_size=16)), KVHolding.whole(model_layout(block_size=8))
    kv = model_kv(theirs.layout, 11)
    pool = convert_all([theirs], ours, kv, [3, 1])
    view = PoolView(pool, ours.layout).values.view(np.uint8).copy()
    view[:, 3] = 0xEE
    view[:, 1, :, :, :3] = 0xEE
    assert (view == 0xEE).all()


@pytest.mark.parametrize("into", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("num_planes", [1, 2])
def test_each_dtype_goes_into_each(dtype: str, into: str, num_planes: int) -> None:
    """From float32, as the engine would have rounded; from others, as from what they stand for."""
    layout = model_layout(num_planes=num_planes, num_kv_heads=1, dtype=dtype)
    source, ours = KVHolding.whole(layout), KVHolding.whole(dataclasses.replace(layout, dtype=into, block_size=16))
    kv = model_kv(layout, 19)
    pool = convert_all([source], ours, kv, list(range(24)))
    assert (fetch(pool, ours, range(24), 19) == expected(ours, numbers_of(source, kv))).all()


def numbers_of(holding: KVHolding, kv: Floats) -> Floats:
    """What a whole pool's entries stand for, (L, P, H, T, D)."""
    view = PoolView(pool_of(holding, kv), holding.layout)
    values = view.values.astype(np.float32)
    if view.scales is not None:
        values *= view.scales[..., None]
    layers, blocks, planes, heads, size, dim = values.shape
    together = values.transpose(0, 2, 3, 1, 4, 5).reshape(layers, planes, heads, blocks * size, dim)
    return together[:, :, :, : kv.shape[3]].copy()
