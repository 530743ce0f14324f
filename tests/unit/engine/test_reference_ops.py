"""The law of the op table, measured bit by bit, and each op against its textbook formula."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from disaggregated.engine.ops.api import AttentionSpec
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.ops.reference_attention import ReferenceAttention
from disaggregated.engine.ops.row_invariant import exact_row_counts, probe_pair, row_cumsum, split_rows
from tests.unit.engine.attention_cases import (
    PagedSequences,
    Row,
    SequenceKV,
    attention_batch,
    chunks_of,
    dense_attention,
)

DTYPES = (torch.float32, torch.bfloat16)
HEADS = ((9, 3, 64), (4, 4, 16), (8, 1, 32), (32, 8, 128))
"""Query heads, kv heads, head size: grouped, multi-head, multi-query, large."""
SPECS = {
    "plain": AttentionSpec(scale=0.2),
    "window": AttentionSpec(scale=0.2, window=150),
    "narrow window": AttentionSpec(scale=0.2, window=3),
    "softcap": AttentionSpec(scale=0.4, softcap=2.0),
    "window and softcap": AttentionSpec(scale=0.3, window=130, softcap=3.0),
    "latent": AttentionSpec(scale=0.2, latent_value_dim=32),
}
BATCH_SIZES = (1, 2, 3, 7, 16, 17, 33, 64)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threaded_ops(request: pytest.FixtureRequest) -> Iterator[ReferenceOps]:
    """Libraries cut their sums by the number of threads, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield ReferenceOps()
    torch.set_num_threads(before)


@pytest.fixture
def ops() -> Iterator[ReferenceOps]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ReferenceOps()
    torch.set_num_threads(before)


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("k", "m", "with_bias"),
    [(576, 960, False), (1536, 576, True), (64, 200, False), (176, 64, True), (33, 7, False)],
)
def test_a_linear_row_is_bitwise_the_same_in_any_batch(
    threaded_ops: ReferenceOps, k: int, m: int, with_bias: bool, dtype: torch.dtype
) -> None:
    weight, bias = randn(m, k, dtype=dtype), randn(m, seed=1, dtype=dtype) if with_bias else None
    linear = threaded_ops.prepare_linear(weight, bias)
    x = randn(65, k, seed=2, dtype=dtype)
    alone = torch.cat([threaded_ops.linear(x[i : i + 1].clone(), linear) for i in range(len(x))])
    for size in BATCH_SIZES:
        start = random.Random(size).randrange(len(x) - size)
        assert torch.equal(threaded_ops.linear(x[start : start + size].clone(), linear), alone[start : start + size]), (
            size
        )
    assert torch.equal(threaded_ops.linear(x, linear), alone)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 1e-4 if dtype is torch.float32 else 0.3
    torch.testing.assert_close(alone.double(), expected, rtol=2e-2, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 176, 576, 577, 4096])
def test_rms_norm_is_its_formula_and_row_invariant(threaded_ops: ReferenceOps, width: int, dtype: torch.dtype) -> None:
    x, weight = randn(70, width, dtype=dtype), randn(width, seed=1, dtype=dtype)
    alone = torch.cat([threaded_ops.rms_norm(x[i : i + 1].clone(), weight, 1e-5) for i in range(len(x))])
    for size in BATCH_SIZES:
        assert torch.equal(threaded_ops.rms_norm(x[:size].clone(), weight, 1e-5), alone[:size])
    assert torch.equal(threaded_ops.rms_norm(x.view(7, 10, width), weight, 1e-5).view(70, width), alone)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(alone.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [22, 176, 1536])
def test_silu_mul_is_its_formula_and_row_invariant(threaded_ops: ReferenceOps, width: int, dtype: torch.dtype) -> None:
    x = randn(70, 2 * width, dtype=dtype) * 4
    alone = torch.cat([threaded_ops.silu_mul(x[i : i + 1].clone()) for i in range(len(x))])
    for size in BATCH_SIZES:
        assert torch.equal(threaded_ops.silu_mul(x[:size].clone()), alone[:size])
    gate, up = x.double().chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(alone.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [22, 176, 1536])
def test_gelu_mul_is_its_formula_and_row_invariant(threaded_ops: ReferenceOps, width: int, dtype: torch.dtype) -> None:
    x = randn(70, 2 * width, dtype=dtype) * 4
    alone = torch.cat([threaded_ops.gelu_mul(x[i : i + 1].clone()) for i in range(len(x))])
    for size in BATCH_SIZES:
        assert torch.equal(threaded_ops.gelu_mul(x[:size].clone()), alone[:size])
    gate, up = x.double().chunk(2, -1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(alone.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_turns_pairs_by_their_angle_and_is_row_invariant(ops: ReferenceOps, dtype: torch.dtype) -> None:
    angles = randn(50, 32)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    x = randn(50, 3, 64, seed=1, dtype=dtype)
    alone = x.clone()
    for i in range(len(x)):
        ops.rope(alone[i : i + 1], cos, sin, positions[i : i + 1].clone())
    together = x.clone()
    ops.rope(together, cos, sin, positions)
    assert torch.equal(together, alone)
    turned = torch.view_as_complex(torch.stack(x.double().chunk(2, -1), -1))
    turned = turned * torch.polar(torch.ones(50, 32).double(), angles.double())[positions][:, None]
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(together.double(), expected, rtol=1e-2, atol=1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_is_the_textbook_formula(ops: ReferenceOps, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    sequence = SequenceKV.random(300, heads, 0, dtype)
    paged = PagedSequences(ops, [sequence], 16, 0)
    paged.step([(0, 0, 300)])
    expected = dense_attention(sequence, paged.scale)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(paged.out[0].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_is_bitwise_the_same_for_any_chunking_and_any_blocks(
    ops: ReferenceOps, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    length = 300 if heads[2] < 128 else 140
    sequence = SequenceKV.random(length, heads, 0, dtype)
    whole = PagedSequences(ops, [sequence], 16, 0)
    whole.step([(0, 0, length)])
    for seed, sizes in enumerate(([7], [64], [128], [129, 1, 1], [3, 50, 1]), 1):
        chunked = PagedSequences(ops, [sequence], 16, seed)
        for start, n in chunks_of(length, sizes):
            chunked.step([(0, start, n)])
        assert torch.equal(chunked.out[0], whole.out[0]), sizes


def test_decode_is_bitwise_the_same_as_prefill_of_the_same_position(threaded_ops: ReferenceOps) -> None:
    sequence = SequenceKV.random(140, (6, 2, 32), 0, torch.float32)
    whole, stepwise = (PagedSequences(threaded_ops, [sequence], 32, seed) for seed in range(2))
    whole.step([(0, 0, 140)])
    for position in range(140):
        stepwise.step([(0, position, 1)])
    assert torch.equal(whole.out[0], stepwise.out[0])


@pytest.mark.parametrize("num_mates", [2, 7, 24])
def test_attention_is_bitwise_the_same_alone_and_in_a_batch(ops: ReferenceOps, num_mates: int) -> None:
    """Mates of other lengths, some in prefill and some decoding, in every step."""
    rng = random.Random(num_mates)
    lengths = [rng.choice([1, 5, 30, 130, 140]) for _ in range(num_mates)]
    sequences = [SequenceKV.random(n, (6, 2, 32), i, torch.float32) for i, n in enumerate(lengths)]
    together = PagedSequences(ops, sequences, 64, 1)
    parts = [chunks_of(n, [rng.choice([1, 20, 64]), 1]) for n in lengths]
    for step in range(max(map(len, parts))):
        together.step([(i, *own[step]) for i, own in enumerate(parts) if step < len(own)])
    for i, sequence in enumerate(sequences):
        alone = PagedSequences(ops, [sequence], 64, 2)
        alone.step([(0, 0, lengths[i])])
        assert torch.equal(together.out[i], alone.out[0])


def test_where_products_disturb_each_other_rows_are_isolated_and_still_right(
    ops: ReferenceOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceAttention, "_exact_rows", lambda *_: (1,))
    for spec in SPECS.values():
        sequence = SequenceKV.random(150, (4, 1 if spec.latent_value_dim else 2, 32), 0, torch.float32)
        whole, stepwise = (PagedSequences(ops, [sequence], 32, seed, spec=spec) for seed in range(2))
        whole.step([(0, 0, 150)])
        for start, n in chunks_of(150, [50, 1, 2]):
            stepwise.step([(0, start, n)])
        assert torch.equal(whole.out[0], stepwise.out[0])
        torch.testing.assert_close(whole.out[0].double(), dense_attention(sequence, spec), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_attention_of_every_kind_is_its_formula_and_the_same_for_any_chunking_and_company(
    ops: ReferenceOps, name: str, dtype: torch.dtype
) -> None:
    spec, tolerance = SPECS[name], 1e-5 if dtype is torch.float32 else 3e-2
    heads = (6, 1, 48) if spec.latent_value_dim else (6, 2, 32)
    lengths = (420, 9, 131, 300)
    sequences = [SequenceKV.random(n, heads, i, dtype) for i, n in enumerate(lengths)]
    alone = [PagedSequences(ops, [sequence], 16, seed, spec=spec) for seed, sequence in enumerate(sequences)]
    for sequence, paged, length in zip(sequences, alone, lengths, strict=True):
        paged.step([(0, 0, length)])
        expected = dense_attention(sequence, spec)
        torch.testing.assert_close(paged.out[0].double(), expected, rtol=tolerance, atol=tolerance)
    together = PagedSequences(ops, sequences, 16, 9, spec=spec)
    parts = [chunks_of(n, sizes) for n, sizes in zip(lengths, ([64, 1], [1], [128, 1, 1], [7, 50]), strict=True)]
    for step in range(max(map(len, parts))):
        together.step([(i, *own[step]) for i, own in enumerate(parts) if step < len(own)])
    for paged, own in zip(alone, together.out, strict=True):
        assert torch.equal(paged.out[0], own)


def test_a_window_reads_only_the_tiles_that_it_touches(ops: ReferenceOps) -> None:
    """What is before them may be anything, even NaN."""
    spec = AttentionSpec(scale=0.2, window=100)
    sequence = SequenceKV.random(400, (4, 2, 32), 0, torch.float32)
    paged = PagedSequences(ops, [sequence], 16, 0, spec=spec)
    paged.step([(0, 0, 400)])
    expected = paged.out[0][399].clone()
    paged.pool.values[paged.blocks[0][: 299 // 128 * 128 // 16]] = torch.nan
    paged.step([(0, 399, 1)])
    assert torch.equal(paged.out[0][399], expected)


def test_layers_of_two_kinds_share_a_step(ops: ReferenceOps) -> None:
    """Plans are kept for each kind; switching back and forth within a step changes nothing."""
    sequence = SequenceKV.random(300, (4, 2, 32), 0, torch.float32)
    windowed, full = (SPECS[name] for name in ("window", "plain"))
    paged = PagedSequences(ops, [sequence], 16, 0)
    batch = attention_batch([Row(0, 300, paged.blocks[0])], 16)
    ops.store_kv(sequence.k_LGD, sequence.v_LGD, paged.pool, batch.slots)
    for spec in (windowed, full, windowed, full):
        out = ops.paged_attention(sequence.q_LND, paged.pool, batch, spec)
        torch.testing.assert_close(out.double(), dense_attention(sequence, spec), rtol=1e-5, atol=1e-5)


def test_block_sizes_that_divide_the_key_tile_give_the_same_bits(ops: ReferenceOps) -> None:
    sequence = SequenceKV.random(200, (6, 2, 32), 0, torch.float32)
    outputs = []
    for block_size in (8, 16, 32, 64, 128):
        paged = PagedSequences(ops, [sequence], block_size, block_size)
        paged.step([(0, 0, 200)])
        outputs.append(paged.out[0])
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_an_odd_block_size_is_right_too(ops: ReferenceOps) -> None:
    sequence = SequenceKV.random(200, (6, 2, 32), 0, torch.float32)
    for block_size in (12, 48, 200):
        paged = PagedSequences(ops, [sequence], block_size, 0)
        paged.step([(0, 0, 100)])
        paged.step([(0, 100, 100)])
        expected = dense_attention(sequence, paged.scale)
        torch.testing.assert_close(paged.out[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_product_that_depends_on_its_row_count_is_found_out() -> None:
    def fickle(rows: torch.Tensor) -> torch.Tensor:
        return rows.sum(-1, keepdim=True) + (1e-6 if len(rows) in (4, 128) else 0.0)

    assert exact_row_counts(fickle, torch.ones(512, 4), 1.0) == (2, 8, 16, 32, 64, 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_probe_tells_orders_of_summation_apart_in_any_dtype(dtype: torch.dtype, transposed: bool) -> None:
    like = torch.empty(40, 200, dtype=dtype).t() if transposed else torch.empty(200, 40, dtype=dtype)
    rows, matrix = probe_pair(64, like)
    assert matrix.stride() == like.stride()
    in_order, in_halves = torch.zeros(2, 64, 40)
    for k in range(200):
        in_order += rows[:, k : k + 1].float() * matrix[k].float()
    for k in [*range(0, 200, 2), *range(1, 200, 2)]:
        in_halves += rows[:, k : k + 1].float() * matrix[k].float()
    assert (in_order.to(dtype) != in_halves.to(dtype)).float().mean() > 0.5
    assert in_order.abs().max() < 1e-3


def test_a_product_that_depends_on_the_place_of_a_row_is_found_out() -> None:
    def placed(rows: torch.Tensor) -> torch.Tensor:
        return rows.sum(-1, keepdim=True) + torch.arange(len(rows))[:, None] * 1e-6

    assert exact_row_counts(placed, torch.ones(512, 4), 1.0) == (1,)


@pytest.mark.parametrize("exact", [(1,), (16,), (2, 16, 64), (2, 4, 8, 16, 32, 64, 128, 256)])
def test_calls_cover_every_row_with_little_padding(exact: tuple[int, ...]) -> None:
    for num_rows in range(1, 700):
        sizes = split_rows(num_rows, exact)
        assert set(sizes) <= set(exact)
        assert num_rows <= sum(sizes) < num_rows + max(exact[0], 9, num_rows // 4 + 1)


def test_a_running_sum_depends_on_what_came_before_alone() -> None:
    x = randn(3, 256).abs()
    whole = row_cumsum(x)
    torch.testing.assert_close(whole, x.cumsum(-1))
    for n in (1, 2, 100, 255):
        assert torch.equal(row_cumsum(x[:, :n]), whole[:, :n])
