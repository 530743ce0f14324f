"""Native attention over every kind of pool: the textbook formula, of what the pool really holds, and never a bit of
difference between alone and together, chunks and single tokens, one thread and two."""

from __future__ import annotations

import random
from typing import Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import AttentionSpec, LayerPool, Ops
from disaggregated.engine.ops.kv_values import write_plane
from disaggregated.engine.ops.quantise import dequantise, quantise_rows
from disaggregated.kv_layout import KVLayout
from tests.unit.engine.attention_cases import (
    NUM_BLOCKS,
    PagedSequences,
    Row,
    SequenceKV,
    attention_batch,
    chunks_of,
    dense_attention,
)
from tests.unit.engine.native_libraries import ISAS, loaded, needs_kernels

DTYPES: Final = sorted(native.KV_DTYPES)
HEADS: Final = (
    (6, 2, 16), (3, 1, 48), (9, 3, 64), (4, 4, 32), (12, 1, 16), (4, 2, 80), (2, 1, 96), (5, 1, 128), (2, 1, 256),
)  # fmt: skip
"""Query heads, kv heads, head size. One and two tokens of a group are few rows, many tokens or 12 heads are many."""
SPECS: Final = st.builds(
    AttentionSpec,
    scale=st.sampled_from([0.1, 0.25, 1.0]),
    window=st.none() | st.integers(1, 260),
    softcap=st.none() | st.floats(0.5, 60.0),
)

pytestmark = needs_kernels
thorough = settings(max_examples=12)


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return loaded(request.param)


def pool_of(dtype: str, num_kv_heads: int, block_size: int, head_dim: int, num_blocks: int = NUM_BLOCKS) -> LayerPool:
    """As the engine makes it, scales behind each block's numbers. All bytes are 255: NaN where the dtype has one."""
    layout = KVLayout(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        num_blocks=num_blocks,
    )
    cache = KVCache(layout, device=torch.device("cpu"), allocate=lambda layout: bytearray(b"\xff" * layout.pool_bytes))
    return cache.layers[0]


def paged(
    ops: Ops, sequences: list[SequenceKV], dtype: str, block_size: int, spec: AttentionSpec, *, seed: int = 0
) -> PagedSequences:
    made = PagedSequences(ops, sequences, block_size, seed, spec=spec)
    _, num_kv_heads, head_dim = sequences[0].k_LGD.shape
    made.pool = pool_of(dtype, num_kv_heads, block_size, head_dim)
    return made


def as_stored(sequence: SequenceKV, dtype: str) -> SequenceKV:
    """With the keys and values that a pool of that dtype holds."""
    if dtype == "int8":
        k, v = (dequantise(*quantise_rows(x)) for x in (sequence.k_LGD, sequence.v_LGD))
    else:
        k, v = (x.to(getattr(torch, dtype)).float() for x in (sequence.k_LGD, sequence.v_LGD))
    return SequenceKV(sequence.q_LND, k, v)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(heads=st.sampled_from(HEADS), spec=SPECS, rng=st.randoms(use_true_random=False))
@thorough
def test_attention_is_the_textbook_formula_of_what_the_pool_holds(
    isa: str, dtype: str, heads: tuple[int, int, int], spec: AttentionSpec, rng: random.Random
) -> None:
    length = rng.choice([1, 30, 191, 192, 193, rng.randint(1, 260)])
    sequence = SequenceKV.random(length, heads, rng.randrange(1000), torch.float32)
    block_size = rng.choice([8, 12, 16, 32])
    whole = paged(loaded(isa), [sequence], dtype, block_size, spec)
    whole.step([(0, 0, length)])
    expected = dense_attention(as_stored(sequence, dtype), spec)
    torch.testing.assert_close(whole.out[0].double(), expected, rtol=1e-4, atol=1e-4)
    chunked = paged(loaded(isa, 2), [sequence], dtype, rng.choice([12, 16, 32]), spec, seed=1)
    for start, n in chunks_of(length, [rng.choice([1, 2, 7, 64]), rng.choice([1, 100])]):
        chunked.step([(0, start, n)])
    assert torch.equal(chunked.out[0], whole.out[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [2, 7, 32])
def test_a_sequence_has_the_same_bits_in_any_batch(ops: Ops, dtype: str, batch_size: int) -> None:
    rng, spec = random.Random(batch_size), AttentionSpec(scale=0.25, window=50, softcap=20.0)
    lengths = [rng.randint(1, 110) for _ in range(batch_size)]
    sequences = [SequenceKV.random(n, (6, 2, 16), i, torch.float32) for i, n in enumerate(lengths)]
    together = paged(ops, sequences, dtype, 48, spec)
    together.step([(i, 0, max(1, n // 2)) for i, n in enumerate(lengths)])
    together.step([(i, n // 2, n - n // 2) for i, n in enumerate(lengths) if n > 1])
    for i in rng.sample(range(batch_size), 2):
        alone = paged(ops, [sequences[i]], dtype, 32, spec, seed=1)
        for position in range(lengths[i]):
            alone.step([(0, position, 1)])
        assert torch.equal(together.out[i], alone.out[0])


@pytest.mark.skipif("avx512" not in ISAS, reason="this CPU has no AVX-512")
@pytest.mark.parametrize("dtype", DTYPES)
def test_avx2_and_avx512_give_the_same_bits(dtype: str) -> None:
    sequence = SequenceKV.random(250, (6, 2, 48), 0, torch.float32)
    outs = []
    for isa in ("avx2", "avx512"):
        whole = paged(loaded(isa), [sequence], dtype, 16, AttentionSpec(scale=0.3, window=130, softcap=9.0))
        whole.step([(0, 0, 249)])
        whole.step([(0, 249, 1)])
        outs.append(whole.out[0])
    assert torch.equal(*outs)


def test_what_a_window_hides_may_be_anything(ops: Ops) -> None:
    """A block that a window has left may have a new owner; here all that is out of sight becomes NaN."""
    sequence, spec = SequenceKV.random(300, (3, 1, 32), 0, torch.float32), AttentionSpec(scale=0.2, window=40)
    whole, forgetful = (paged(ops, [sequence], "float32", 16, spec) for _ in range(2))
    whole.step([(0, 0, 300)])
    for start, n in chunks_of(300, [50, 1]):
        hidden_blocks = forgetful.blocks[0][: max(0, start + 1 - 40) // 16]
        forgetful.pool.values[hidden_blocks] = torch.nan
        forgetful.step([(0, start, n)])
    assert torch.equal(forgetful.out[0], whole.out[0])


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.lists(st.lists(st.floats(width=32), min_size=16, max_size=16), min_size=1, max_size=6),
    rng=st.randoms(use_true_random=False),
)
@thorough
def test_store_kv_writes_the_bytes_that_the_reference_writes(
    dtype: str, rows: list[list[float]], rng: random.Random
) -> None:
    """Subnormal, infinite and NaN numbers, and ties between two halves, come with hypothesis's floats."""
    key = torch.tensor(rows)[:, None]
    value = torch.stack([key[rng.randrange(len(rows)), 0] * 0.37 for _ in rows])[:, None]
    slots = torch.tensor(rng.sample(range(32), len(rows)))
    for isa in ISAS:
        ours, expected = (pool_of(dtype, 1, 8, 16, num_blocks=4) for _ in range(2))
        loaded(isa).store_kv(key, value, ours, slots)
        write_plane(expected, 0, key, slots)
        write_plane(expected, 1, value, slots)
        assert torch.equal(
            ours.values.view(torch.uint8)[slots // 8], expected.values.view(torch.uint8)[slots // 8]
        ) or (
            torch.equal(ours.values.isnan(), expected.values.isnan())
            and torch.equal(ours.values.nan_to_num(7), expected.values.nan_to_num(7))
        )
        if ours.scales is not None and expected.scales is not None:
            torch.testing.assert_close(ours.scales, expected.scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_a_half_precision_is_read_as_it_is(ops: Ops, dtype: str) -> None:
    """Attention to one key is its value, whatever bits it has."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    numbers = torch.where(numbers.isfinite(), numbers, 0).view(-1, 1, 256)
    pool = LayerPool(torch.zeros(len(numbers), 2, 1, 1, 256, dtype=numbers.dtype))
    pool.values[:, 1] = numbers[:, None]
    batch = attention_batch([Row(0, 1, [block]) for block in range(len(numbers))], 1)
    seen = ops.paged_attention(torch.zeros(len(numbers), 1, 256), pool, batch, AttentionSpec(scale=1.0))
    assert torch.equal(seen, numbers.float())


def test_a_pool_that_the_kernels_cannot_read_is_refused(ops: Ops) -> None:
    spec, batch = AttentionSpec(scale=1.0), attention_batch([Row(0, 1, [0])], 8)
    q = torch.zeros(1, 2, 16)
    for pool, words in (
        (LayerPool(torch.zeros(1, 2, 2, 8, 16, dtype=torch.float64)), "dtype"),
        (LayerPool(torch.zeros(1, 1, 2, 8, 16)), "1 planes"),
        (LayerPool(torch.zeros(1, 2, 2, 8, 16, dtype=torch.int8)), "without scales"),
        (LayerPool(torch.zeros(1, 2, 2, 16, 8).transpose(3, 4)), "not contiguous"),
        (LayerPool(torch.zeros(1, 2, 2, 8, 16, dtype=torch.int8), torch.zeros(1, 2, 2, 8)), "blocks of scales lie"),
        (LayerPool(torch.zeros(1, 2, 2, 8, 32)), "head_dim 16, the pool's is 32"),
    ):
        with pytest.raises(AssertionError, match=words):
            ops.paged_attention(q, pool, batch, spec)
    for wrong in (AttentionSpec(scale=1.0, window=0), AttentionSpec(scale=1.0, latent_value_dim=8)):
        with pytest.raises(AssertionError):
            ops.paged_attention(q, LayerPool(torch.zeros(1, 2, 2, 8, 16)), batch, wrong)


@pytest.mark.parametrize("isa", ISAS)
@given(num_rows=st.integers(0, 20), width=st.integers(1, 300), seed=st.integers(0, 1000))
@thorough
def test_gelu_mul_is_its_formula_and_row_invariant(isa: str, num_rows: int, width: int, seed: int) -> None:
    gate_up = torch.randn(num_rows, 2 * width, generator=torch.Generator().manual_seed(seed)) * 4
    gate, up = gate_up.double().chunk(2, -1)
    gated = loaded(isa).gelu_mul(gate_up)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(gated.double(), expected, rtol=5e-6, atol=1e-6)
    for row in range(0, num_rows, 5):
        assert torch.equal(loaded(isa, 2).gelu_mul(gate_up[row : row + 1])[0], gated[row])


def test_gelu_of_the_extremes_is_what_arithmetic_says(ops: Ops) -> None:
    gate = torch.tensor([[-1e30, -1e4, -20.0, -0.0, 0.0, 20.0, 1e4, 1e30, torch.nan]])
    out = ops.gelu_mul(torch.cat([gate, torch.ones_like(gate)], -1))[0]
    torch.testing.assert_close(out[:8], torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 20.0, 1e4, 1e30]), rtol=1e-6, atol=1e-7)
    assert out[8].isnan()
