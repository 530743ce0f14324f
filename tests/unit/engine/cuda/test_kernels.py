"""Each Triton kernel against its formula in float64, and the law of the op table: a row's bits are its own."""

from __future__ import annotations

import random

import pytest
import torch

from tests.unit.engine.cuda.kernel_device import AS_INTERPRETED, DEVICE, DTYPES  # isort: skip  # It chooses where kernels run.

from disaggregated.engine.cuda.kernels import attention, elementwise
from disaggregated.engine.cuda.kernels.quantise import quantise_rows
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool
from disaggregated.engine.ops.quantise import quantise_rows as quantise_in_torch
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.kv_layout import KVLayout
from tests.unit.engine.attention_cases import PagedSequences, SequenceKV, chunks_of, dense_attention

pytestmark = AS_INTERPRETED


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype is torch.float32 else 2e-2


class Kernels:
    """As much of an op table as `PagedSequences` asks for."""

    def __init__(self, num_multiprocessors: int) -> None:
        self._num_multiprocessors = num_multiprocessors

    def store_kv(
        self, key_TGD: torch.Tensor, value_TGD: torch.Tensor | None, pool: LayerPool, slots_T: torch.Tensor
    ) -> None:
        elementwise.store_kv(key_TGD, value_TGD, pool, slots_T)

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        return attention.paged_attention(q_TND, pool, batch, spec, num_multiprocessors=self._num_multiprocessors)


LENGTH = 140 if DEVICE == "cpu" else 700
"""Tokens of the longest sequence: some splits of keys."""
CUT, WHOLE = Kernels(1000), Kernels(0)
"""Sequences are cut among programs, or each program folds its splits itself."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 177])
def test_rms_norm_is_its_formula_and_row_invariant(width: int, dtype: torch.dtype) -> None:
    x, weight = randn(9, width, dtype=dtype), randn(width, seed=1, dtype=dtype)
    normed = elementwise.rms_norm(x, weight, 1e-5)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype))
    for i in range(len(x)):
        assert torch.equal(elementwise.rms_norm(x[i : i + 1].clone(), weight, 1e-5), normed[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_and_its_norm_have_the_bits_of_the_two_ops(dtype: torch.dtype) -> None:
    x, added, weight = randn(5, 96, dtype=dtype), randn(5, 96, seed=1, dtype=dtype), randn(96, seed=2, dtype=dtype)
    summed, normed = elementwise.add_rms_norm(x, added, weight, 1e-5)
    assert torch.equal(summed, x + added)
    assert torch.equal(normed, elementwise.rms_norm(x + added, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_gelu", [False, True])
def test_gates_are_their_formulas(is_gelu: bool, dtype: torch.dtype) -> None:
    x = randn(5, 2 * 1100, dtype=dtype) * 4
    gate, up = x.double().chunk(2, -1)
    activation = torch.nn.functional.gelu(gate, approximate="tanh") if is_gelu else torch.nn.functional.silu(gate)
    gated = elementwise.gated(x, is_gelu=is_gelu)
    torch.testing.assert_close(gated.double(), activation * up, rtol=tolerance(dtype), atol=tolerance(dtype))
    assert torch.equal(elementwise.gated(x[2:3].clone(), is_gelu=is_gelu), gated[2:3])


@pytest.mark.parametrize("head_dim", [64, 24])
def test_rope_turns_heads_as_the_reference_does(head_dim: int) -> None:
    angles = randn(50, head_dim // 2)
    positions = torch.tensor([3, 49, 0, 7], device=DEVICE)
    x = randn(4, 3, head_dim, seed=1)
    ours, theirs = x.clone(), x.clone()
    elementwise.rope(ours, angles.cos(), angles.sin(), positions)
    ReferenceOps().rope(theirs, angles.cos(), angles.sin(), positions)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def pool_of(dtype: str, *, num_planes: int = 2, head_dim: int = 32) -> LayerPool:
    """Of 6 blocks of 4 tokens, 2 heads, full of what earlier owners may have left."""
    layout = KVLayout(
        num_layers=1, num_kv_heads=2, head_dim=head_dim, block_size=4, dtype=dtype, num_blocks=6, num_planes=num_planes
    )
    region = torch.full((layout.num_blocks, layout.block_bytes), 255, dtype=torch.uint8, device=DEVICE)
    size = (6, num_planes, 2, 4)
    values = region[:, : layout.value_bytes].view(getattr(torch, dtype)).view(*size, head_dim)
    scales = region[:, layout.value_bytes :].view(torch.float32).view(size) if layout.is_quantised else None
    return LayerPool(values, scales)


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for what a device does in a nanosecond."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "SPLIT_KEYS", 64)


def same_numbers(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bit for bit; but the interpreter loses a carry now and then when it rounds to 8-bit floats."""
    equal = ours.view(torch.uint8) == theirs.view(torch.uint8)
    if DEVICE == "cpu" and ours.dtype is torch.float8_e4m3fn:
        return bool(equal.double().mean() > 0.97)
    return bool(equal.all())


def as_parts(pool: LayerPool) -> list[torch.Tensor]:
    return [pool.values.contiguous(), *([] if pool.scales is None else [pool.scales.contiguous()])]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("num_planes", [1, 2])
def test_a_pool_is_filled_with_the_very_bytes_of_the_reference(dtype: str, num_planes: int) -> None:
    ours, theirs = pool_of(dtype, num_planes=num_planes), pool_of(dtype, num_planes=num_planes)
    key, value = randn(5, 2, 32) * 3, randn(5, 2, 32, seed=1)
    key[1, 0] = 0.0
    key[2, 1] *= 1e-38
    value[3, 0, 5] = 1e30
    slots = torch.tensor([0, 7, 23, 12, 13], device=DEVICE)
    given = value if num_planes == 2 else None
    elementwise.store_kv(key, given, ours, slots)
    ReferenceOps().store_kv(key, given, theirs, slots)
    assert all(map(same_numbers, as_parts(ours), as_parts(theirs)))


def test_a_head_that_is_not_finite_is_stored_with_the_scale_nan() -> None:
    ours, theirs = pool_of("int8"), pool_of("int8")
    key = randn(2, 2, 32)
    key[0, 0, 3], key[1, 1, 0] = torch.inf, torch.nan
    slots = torch.tensor([2, 9], device=DEVICE)
    elementwise.store_kv(key, key, ours, slots)
    ReferenceOps().store_kv(key, key, theirs, slots)
    assert ours.scales is not None
    assert theirs.scales is not None
    assert torch.equal(ours.scales.isnan(), theirs.scales.isnan())
    assert bool(ours.scales[0, 0, 0, 2].isnan())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rope_and_store_in_one_kernel_have_the_bits_of_the_two(dtype: str) -> None:
    angles = randn(30, 16)
    cos, sin = angles.cos(), angles.sin()
    heads = randn(3, 8, 32, seed=2)
    q, k, v = torch.split(heads.clone(), [4, 2, 2], 1)
    positions, slots = torch.tensor([5, 0, 29], device=DEVICE), torch.tensor([22, 1, 8], device=DEVICE)
    fused, apart = pool_of(dtype), pool_of(dtype)
    expected_q, expected_k = q.contiguous().clone(), k.contiguous().clone()
    elementwise.rope(expected_q, cos, sin, positions)
    elementwise.rope(expected_k, cos, sin, positions)
    elementwise.store_kv(expected_k, v, apart, slots)
    elementwise.rope_and_store(q, k, v, fused, slots, (cos, sin, positions))
    assert torch.equal(q, expected_q)
    assert all(map(same_numbers, as_parts(fused), as_parts(apart)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_activations_are_quantised_by_the_rule_of_the_reference(dtype: torch.dtype) -> None:
    x = randn(6, 200) * torch.logspace(-30, 30, 6, device=DEVICE)[:, None]
    x[3] = 0.0
    x[4, 7] = torch.nan
    ours, ours_scale = quantise_rows(x, dtype)
    theirs, theirs_scale = quantise_in_torch(x, dtype)
    assert same_numbers(ours, theirs)
    assert torch.equal(ours_scale.nan_to_num(-1), theirs_scale.nan_to_num(-1))


SPECS = {
    "plain": AttentionSpec(scale=0.2),
    "window": AttentionSpec(scale=0.2, window=50),
    "small window": AttentionSpec(scale=0.2, window=3),
    "softcap": AttentionSpec(scale=0.2, softcap=2.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_attention_is_the_textbook_formula_however_it_is_cut(spec: AttentionSpec, dtype: torch.dtype) -> None:
    sequence = SequenceKV.random(LENGTH, (6, 2, 16), 0, dtype, DEVICE)
    outputs = []
    for seed, (kernels, sizes) in enumerate(
        zip((CUT, WHOLE, CUT), ([LENGTH], [LENGTH], [LENGTH - 10, 9, 1]), strict=True)
    ):
        paged = PagedSequences(kernels, [sequence], 16, seed, spec=spec)  # type: ignore[arg-type]
        for start, n in chunks_of(LENGTH, sizes):
            paged.step([(0, start, n)])
        outputs.append(paged.out[0])
    expected = dense_attention(sequence, spec)
    torch.testing.assert_close(outputs[0].double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 32), (5, 1, 48), (16, 2, 128)], ids=str)
def test_attention_takes_any_grouping_of_heads(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    sequence = SequenceKV.random(35, heads, 1, dtype, DEVICE)
    paged = PagedSequences(CUT, [sequence], 32, 0, spec=AttentionSpec(scale=heads[2] ** -0.5))  # type: ignore[arg-type]
    paged.step([(0, 0, 34)])
    paged.step([(0, 34, 1)])
    expected = dense_attention(sequence, AttentionSpec(scale=heads[2] ** -0.5))
    torch.testing.assert_close(paged.out[0].double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype))


def test_a_sequence_has_the_same_bits_alone_and_in_any_batch() -> None:
    rng = random.Random(0)
    spec = AttentionSpec(scale=0.3)
    lengths = [1, 5, 70, LENGTH]
    sequences = [SequenceKV.random(n, (6, 2, 16), i, torch.float32, DEVICE) for i, n in enumerate(lengths)]
    parts = [chunks_of(n, [max(1, n - rng.choice([1, 3])), 1]) for n in lengths]
    together = PagedSequences(CUT, sequences, 16, 1, spec=spec)  # type: ignore[arg-type]
    for step in range(max(map(len, parts))):
        together.step([(i, *own[step]) for i, own in enumerate(parts) if step < len(own)])
    for i, sequence in enumerate(sequences):
        alone = PagedSequences(WHOLE, [sequence], 16, 2, spec=spec)  # type: ignore[arg-type]
        alone.step([(0, 0, lengths[i])])
        assert torch.equal(together.out[i], alone.out[0]), lengths[i]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_attention_over_a_quantised_pool_is_that_over_what_the_pool_says(dtype: str) -> None:
    pool = pool_of(dtype, head_dim=16)
    key, value, q = randn(10, 2, 16), randn(10, 2, 16, seed=1), randn(10, 4, 16, seed=2)
    table = [3, 5, 0]
    slots = torch.tensor([table[p // 4] * 4 + p % 4 for p in range(10)], device=DEVICE)
    elementwise.store_kv(key, value, pool, slots)
    batch = AttentionBatch(
        query_start=torch.tensor([0, 10], dtype=torch.int32, device=DEVICE),
        first_position=torch.tensor([0], dtype=torch.int32, device=DEVICE),
        block_tables=torch.tensor([table], dtype=torch.int32, device=DEVICE),
        positions=torch.arange(10, device=DEVICE),
        slots=slots,
        max_context_len=10,
    )
    spec = AttentionSpec(scale=0.25)
    out = WHOLE.paged_attention(q, pool, batch, spec)
    torch.testing.assert_close(out, ReferenceOps().paged_attention(q, pool, batch, spec), rtol=1e-5, atol=1e-5)


def test_heads_that_the_kernels_cannot_take_are_told_apart() -> None:
    assert attention.unsupported(32, 8, 128) is None
    assert attention.unsupported(16, 16, 22) == "head size 22 is not a multiple of 16 up to 256"
    assert attention.unsupported(128, 1, 64) == "128 query heads share a key head, at most 64 may"
