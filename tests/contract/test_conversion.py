"""The table of conversions: instances of unlike ranks, block sizes and dtypes, pool to pool, over real transfers.

Every cell has a server for each rank in this process, and each destination rank's pool is compared, byte for byte, with
what it would hold had it computed the prompt itself. `docs/conversion.md` shows the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from disaggregated.kv_layout import DTYPE_BYTES, QUANTISED
from disaggregated.kv_shard import KVHolding
from kvtransfer.conversion.executor import PoolView
from tests.support.kv_instances import GenerationRank, instances
from tests.support.kv_shards import Floats, Ranks, model_kv, model_layout

TENSOR = [Ranks(tensor=1), Ranks(tensor=2), Ranks(tensor=4)]
PIPELINE = [Ranks(stages=(6,)), Ranks(stages=(2, 4)), Ranks(stages=(1, 2, 1, 2))]
BOTH = [Ranks(tensor=2, stages=(4, 2)), Ranks(tensor=4, stages=(1, 5)), Ranks(tensor=1, stages=(3, 1, 2))]
CONTEXT = [
    Ranks(context=2),
    Ranks(context=4),
    Ranks(context=2, stripe_tokens=8),
    Ranks(context=3, stripe_tokens=4),
    Ranks(tensor=2, stages=(2, 4), context=2, stripe_tokens=16),
]
BLOCK_SIZES = [8, 16, 32, 64]
DTYPES = ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]


async def check_cell(source: Ranks, into: Ranks, *, backend: str = "SHM", **layout: Any) -> None:
    """`layout` is of both; a pair of values is of the source and of the destination."""
    theirs, ours = (
        model_layout(**{name: value[side] if isinstance(value, tuple) else value for name, value in layout.items()})
        for side in (0, 1)
    )
    kv = model_kv(theirs, 45)
    async with instances(source.holdings(theirs), into.holdings(ours), backend=backend) as both:
        for landed in await both.transfer("t", kv):
            assert (landed.num_tokens, landed.first_token) == (45, 42)
        for rank in both.generation:
            rank.check_holds(kv)


def name(ranks: Ranks) -> str:
    return str(ranks)


@pytest.mark.parametrize("into", TENSOR, ids=name)
@pytest.mark.parametrize("source", TENSOR, ids=name)
@pytest.mark.parametrize("num_kv_heads", [4, 2], ids=["split", "replicated"])
async def test_tensor_parallel_ranks_into_any_number_of_them(source: Ranks, into: Ranks, num_kv_heads: int) -> None:
    """Of two heads, four ranks hold one each, every one of them twice."""
    await check_cell(source, into, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("into", PIPELINE, ids=name)
@pytest.mark.parametrize("source", PIPELINE, ids=name)
async def test_pipeline_stages_into_others_with_uneven_layers(source: Ranks, into: Ranks) -> None:
    await check_cell(source, into)


@pytest.mark.parametrize("into", BOTH, ids=name)
@pytest.mark.parametrize("source", BOTH, ids=name)
async def test_ranks_and_stages_at_once(source: Ranks, into: Ranks) -> None:
    await check_cell(source, into, block_size=(8, 16))


@pytest.mark.parametrize("into", BLOCK_SIZES)
@pytest.mark.parametrize("source", BLOCK_SIZES)
async def test_blocks_of_any_size_into_any_other(source: int, into: int, transport_name: str) -> None:
    await check_cell(Ranks(), Ranks(), block_size=(source, into), backend=transport_name)


@pytest.mark.parametrize("source", CONTEXT, ids=name)
async def test_tokens_of_context_parallel_ranks_come_together(source: Ranks) -> None:
    await check_cell(source, Ranks())
    await check_cell(source, Ranks(tensor=2), block_size=(8, 32))


async def test_tokens_are_spread_over_context_parallel_ranks() -> None:
    await check_cell(Ranks(), Ranks(context=2, stripe_tokens=16))
    await check_cell(Ranks(context=3), Ranks(context=2), block_size=(8, 16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("source", "into"),
    [
        (Ranks(), Ranks(tensor=2)),
        (Ranks(tensor=4), Ranks()),
        (Ranks(stages=(2, 4)), Ranks(tensor=2, stages=(5, 1))),
        (Ranks(context=2, stripe_tokens=8), Ranks(stages=(4, 2))),
    ],
    ids=name,
)
async def test_one_latent_head_is_replicated_and_cut_by_layers_and_tokens(
    source: Ranks, into: Ranks, dtype: str
) -> None:
    await check_cell(source, into, num_kv_heads=1, num_planes=1, head_dim=36, dtype=dtype, block_size=(16, 8))


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
async def test_scales_go_where_their_numbers_go(dtype: str, transport_name: str) -> None:
    await check_cell(
        Ranks(tensor=2, stages=(2, 4)),
        Ranks(tensor=4, stages=(3, 3)),
        dtype=dtype,
        block_size=(32, 8),
        backend=transport_name,
    )


@pytest.mark.parametrize("into", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
async def test_any_dtype_into_any_other(source: str, into: str) -> None:
    """What lands is what the source's numbers stand for, in our dtype; the bounds are those of `values`."""
    theirs, ours = model_layout(dtype=source), model_layout(dtype=into, block_size=16)
    kv = model_kv(theirs, 45)
    ranks = [KVHolding.whole(theirs)], [KVHolding.whole(ours)]
    async with instances(*ranks) as both:
        await both.transfer("t", kv)
        (context,), (generation,) = both.context, both.generation
        meant = numbers(PoolView(context.served.region.buffer, theirs), context.table, 45)
        generation.check_holds(meant)
        assert relative_error(generation, kv) < {"int8": 0.02, "float8_e4m3fn": 0.08}.get(
            source if source in QUANTISED else into, 0.005
        ) * (2 if source != into else 1)


def relative_error(rank: GenerationRank, kv: Floats) -> float:
    found = numbers(PoolView(rank.region.buffer, rank.holding.layout), rank.table, kv.shape[3])
    return float(np.linalg.norm(found - kv) / np.linalg.norm(kv))


def numbers(view: PoolView, table: Any, num_tokens: int) -> Floats:
    """What the entries of a whole pool stand for: (L, P, H, T, D)."""
    values = view.values[:, list(table)].astype(np.float32)
    if view.scales is not None:
        values *= view.scales[:, list(table)][..., None]
    layers, blocks, planes, heads, size, dim = values.shape
    together = values.transpose(0, 2, 3, 1, 4, 5).reshape(layers, planes, heads, blocks * size, dim)
    return np.ascontiguousarray(together[:, :, :, :num_tokens])
