"""Each native op against its formula in float64, and the law of the op table: a row's bits depend on the row alone.

Every test runs for each instruction set that this CPU has. Without a C compiler there is nothing to test.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.engine.ops.api import AttentionSpec, LayerPool, Ops
from tests.unit.engine.attention_cases import (
    PagedSequences,
    Row,
    SequenceKV,
    attention_batch,
    chunks_of,
    dense_attention,
)
from tests.unit.engine.native_libraries import ISAS, loaded, needs_kernels

HEADS = ((9, 3, 64), (4, 4, 16), (5, 1, 48), (2, 1, 256), (40, 2, 32), (120, 1, 16))
"""Query heads, kv heads, head size: grouped, multi-head, odd vectors, the largest, and groups beyond a tile's rows."""

pytestmark = needs_kernels
thorough = settings(max_examples=25)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ops(isa: str) -> Ops:
    return loaded(isa)


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def linear(ops: Ops, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return ops.linear(x, ops.prepare_linear(weight, bias))


@pytest.mark.parametrize("isa", ISAS)
@given(num_rows=st.integers(0, 40), width=st.integers(1, 700), seed=st.integers(0, 1000))
@thorough
def test_rms_norm_and_silu_mul_are_their_formulas_and_row_invariant(
    isa: str, num_rows: int, width: int, seed: int
) -> None:
    ops = loaded(isa)
    x, weight = randn(num_rows, width, seed=seed), randn(width, seed=seed + 1)
    normed = ops.rms_norm(x, weight, 1e-5)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)
    gate_up = randn(num_rows, 2 * width, seed=seed) * 6
    gated = ops.silu_mul(gate_up)
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(gated.double(), torch.nn.functional.silu(gate) * up, rtol=2e-6, atol=1e-12)
    for row in range(0, num_rows, 7):
        assert torch.equal(ops.rms_norm(x[row : row + 1], weight, 1e-5)[0], normed[row])
        assert torch.equal(ops.silu_mul(gate_up[row : row + 1])[0], gated[row])


def test_elementwise_ops_have_the_same_bits_for_any_number_of_threads(isa: str) -> None:
    one, two = loaded(isa, 1), loaded(isa, 2)
    x, weight, gate_up = randn(300, 577), randn(577, seed=1), randn(300, 1002, seed=2)
    assert torch.equal(one.rms_norm(x, weight, 1e-5), two.rms_norm(x, weight, 1e-5))
    assert torch.equal(one.silu_mul(gate_up), two.silu_mul(gate_up))


def test_silu_of_the_extremes_is_what_arithmetic_says(ops: Ops) -> None:
    gate = torch.tensor([[-1e30, -1e4, -88.0, -0.0, 0.0, 88.0, 1e4, 1e30, torch.nan]])
    out = ops.silu_mul(torch.cat([gate, torch.ones_like(gate)], -1))[0]
    torch.testing.assert_close(out[1:8], torch.tensor([0.0, 0.0, 0.0, 0.0, 88.0, 1e4, 1e30]), rtol=1e-6, atol=1e-30)
    assert out[8].isnan()


@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
def test_rope_turns_pairs_by_their_angle_wherever_the_tokens_lie(ops: Ops, head_dim: int) -> None:
    angles = randn(50, head_dim // 2)
    cos, sin, positions = angles.cos(), angles.sin(), torch.randperm(50)
    wide = randn(50, 7, head_dim, seed=1)
    slice_of_wide, contiguous = wide[:, 2:5], wide[:, 2:5].contiguous()
    neighbours = wide[:, 5:].clone()
    turned = torch.view_as_complex(torch.stack(contiguous.double().chunk(2, -1), -1))
    turned = turned * torch.polar(torch.ones(50, head_dim // 2).double(), angles.double())[positions][:, None]
    alone = contiguous[20:21].clone()
    for x, own in ((slice_of_wide, positions), (contiguous, positions), (alone, positions[20:21])):
        ops.rope(x, cos, sin, own)
    torch.testing.assert_close(contiguous.double(), torch.cat([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(slice_of_wide, contiguous)
    assert torch.equal(alone[0], contiguous[20])
    assert torch.equal(wide[:, 5:], neighbours)


def test_store_kv_writes_each_token_into_its_slot_and_nothing_else(ops: Ops) -> None:
    key, value = randn(5, 6, 32).chunk(2, dim=1)
    slots = torch.tensor([40, 3, 17, 31, 16])
    pool = torch.full((6, 2, 3, 8, 32), -1.0)
    ops.store_kv(key, value, LayerPool(pool), slots)
    expected = torch.full((6, 2, 3, 8, 32), -1.0)
    expected[slots // 8, 0, :, slots % 8] = key
    expected[slots // 8, 1, :, slots % 8] = value
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_is_the_textbook_formula_for_any_chunks_and_blocks(isa: str, heads: tuple[int, int, int]) -> None:
    sequence = SequenceKV.random(300, heads, 0, torch.float32)
    whole = PagedSequences(loaded(isa), [sequence], 16, 0)
    whole.step([(0, 0, 300)])
    torch.testing.assert_close(whole.out[0].double(), dense_attention(sequence, whole.scale), rtol=1e-5, atol=1e-5)
    for seed, sizes in enumerate(([7], [64, 1], [96], [129, 1, 1], [3, 50, 1]), 1):
        block_size, num_threads = (8, 12, 16, 32, 100)[seed - 1], 1 + seed % 2
        chunked = PagedSequences(loaded(isa, num_threads), [sequence], block_size, seed)
        for start, n in chunks_of(300, sizes):
            chunked.step([(0, start, n)])
        assert torch.equal(chunked.out[0], whole.out[0]), (sizes, block_size)


def test_decode_has_the_same_bits_as_prefill_of_the_same_position(ops: Ops) -> None:
    sequence = SequenceKV.random(200, (6, 2, 32), 0, torch.float32)
    whole, stepwise = (PagedSequences(ops, [sequence], 32, seed) for seed in range(2))
    whole.step([(0, 0, 200)])
    for position in range(200):
        stepwise.step([(0, position, 1)])
    assert torch.equal(whole.out[0], stepwise.out[0])


@pytest.mark.parametrize("isa", ISAS)
@given(lengths=st.lists(st.integers(1, 230), min_size=2, max_size=8), rng=st.randoms(use_true_random=False))
@thorough
def test_attention_has_the_same_bits_alone_and_beside_others(isa: str, lengths: list[int], rng: random.Random) -> None:
    """Each in chunks of its own, some in prefill while others decode, blocks anywhere."""
    ops = loaded(isa, rng.choice([1, 2]))
    sequences = [SequenceKV.random(n, (6, 2, 16), i, torch.float32) for i, n in enumerate(lengths)]
    together = PagedSequences(ops, sequences, 24, rng.randrange(1000))
    parts = [chunks_of(n, [rng.choice([20, 64, 100]), 30]) for n in lengths]
    for step in range(max(map(len, parts))):
        together.step([(i, *own[step]) for i, own in enumerate(parts) if step < len(own)])
    for i, sequence in enumerate(sequences):
        alone = PagedSequences(loaded(isa), [sequence], 32, 0)
        alone.step([(0, 0, lengths[i])])
        assert torch.equal(together.out[i], alone.out[0])


def test_attention_of_enormous_scores_is_still_a_mean_of_values(ops: Ops) -> None:
    sequence = SequenceKV.random(150, (2, 1, 32), 0, torch.float32)
    sequence.q_LND.mul_(1e4)
    paged = PagedSequences(ops, [sequence], 16, 0)
    paged.step([(0, 0, 150)])
    torch.testing.assert_close(paged.out[0].double(), dense_attention(sequence, paged.scale), rtol=1e-2, atol=1e-2)


def test_attention_reads_queries_out_of_a_wider_projection(ops: Ops) -> None:
    batch = attention_batch([Row(0, 40, range(5))], 8)
    pool, wide = LayerPool(randn(5, 2, 2, 8, 16)), randn(40, 8, 16, seed=1)
    spec = AttentionSpec(scale=0.25)
    sliced = ops.paged_attention(wide[:, 1:5], pool, batch, spec)
    assert torch.equal(sliced, ops.paged_attention(wide[:, 1:5].contiguous(), pool, batch, spec))


def test_a_step_without_tokens_gives_results_without_rows(ops: Ops) -> None:
    batch = attention_batch([Row(0, 0, [0]), Row(3, 0, [1])], 8)
    pool, spec = LayerPool(randn(2, 2, 2, 8, 16)), AttentionSpec(scale=0.25)
    assert ops.paged_attention(randn(0, 4, 16), pool, batch, spec).shape == (0, 4, 16)
    assert ops.linear(randn(0, 8), ops.prepare_linear(randn(5, 8), None)).shape == (0, 5)
    ops.rope(randn(0, 4, 16), randn(3, 8), randn(3, 8), torch.zeros(0, dtype=torch.int64))
    ops.store_kv(randn(0, 2, 16), randn(0, 2, 16), pool, torch.zeros(0, dtype=torch.int64))


@pytest.mark.skipif("avx512" not in ISAS, reason="this CPU has no AVX-512")
def test_avx2_and_avx512_give_the_same_bits() -> None:
    """So a sequence that moves between two such machines goes on with the same tokens."""
    sequence = SequenceKV.random(250, (6, 2, 48), 0, torch.float32)
    x, weight, bias, gate_up = randn(20, 700), randn(90, 700, seed=1), randn(90, seed=2), randn(9, 150, seed=3) * 9
    results = []
    for isa in ("avx2", "avx512"):
        ops = loaded(isa)
        paged = PagedSequences(ops, [sequence], 16, 0)
        paged.step([(0, 0, 250)])
        turned = randn(9, 3, 48, seed=4)
        ops.rope(turned, randn(20, 24, seed=5), randn(20, 24, seed=6), torch.arange(9))
        results.append(
            (
                paged.out[0],
                linear(ops, x, weight, bias),
                ops.rms_norm(x, weight[0].clone(), 1e-6),
                ops.silu_mul(gate_up),
                turned,
            )
        )
    assert all(torch.equal(narrow, wide) for narrow, wide in zip(*results, strict=True))


def test_a_wrong_dtype_stride_or_shape_is_refused(ops: Ops) -> None:
    with pytest.raises(AssertionError, match="dtype"):
        ops.rope(randn(1, 2, 16), randn(3, 8), randn(3, 8), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(AssertionError, match="not contiguous"):
        ops.rope(randn(1, 16, 2).transpose(1, 2), randn(3, 8), randn(3, 8), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(AssertionError, match="head_dim 24"):
        ops.paged_attention(
            randn(1, 2, 24),
            LayerPool(randn(1, 2, 2, 8, 24)),
            attention_batch([Row(0, 1, [0])], 8),
            AttentionSpec(scale=1.0),
        )


def test_memory_outside_the_pool_and_the_tables_is_never_touched(ops: Ops) -> None:
    pool = torch.zeros(2, 2, 1, 8, 16)
    for slot in (-1, 16):
        with pytest.raises(AssertionError, match=f"token 1 goes to slot {slot}"):
            ops.store_kv(randn(2, 1, 16), randn(2, 1, 16), LayerPool(pool), torch.tensor([0, slot]))
    assert not pool.any(), "a refused call wrote something"
    with pytest.raises(AssertionError, match="token 0 is at position 3"):
        ops.rope(randn(1, 2, 16), randn(3, 8), randn(3, 8), torch.tensor([3]))
    good = attention_batch([Row(0, 4, [0]), Row(5, 6, [0, 1])], 8)
    assert ops.paged_attention(randn(10, 1, 16), LayerPool(pool), good, AttentionSpec(scale=1.0)).shape == (10, 1, 16)
    for tensor, index, wrong in (
        (good.block_tables, (1, 1), 2),
        (good.block_tables, (1, 1), -1),
        (good.first_position, (1,), 11),
        (good.query_start, (2,), 11),
        (good.query_start, (1,), -1),
    ):
        before = int(tensor[index])
        tensor[index] = wrong
        with pytest.raises(AssertionError, match="does not lie within 10 tokens"):
            ops.paged_attention(randn(10, 1, 16), LayerPool(pool), good, AttentionSpec(scale=1.0))
        tensor[index] = before
