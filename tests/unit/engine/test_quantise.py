"""The rule of quantised numbers, linears in int8, and pools whose entries are smaller than float32."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.ops import reference_linear
from disaggregated.engine.ops.api import AttentionSpec, LayerPool
from disaggregated.engine.ops.kv_values import read_planes, write_plane
from disaggregated.engine.ops.native import load as load_native
from disaggregated.engine.ops.quantise import Q_MAX, SMALLEST, dequantise, quantise_rows, rotate, rotation_block
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.ops.reference_linear import EXACT_DEPTH, integer_products
from disaggregated.kv_layout import DTYPE_BYTES, KVLayout
from tests.unit.engine.attention_cases import PagedSequences, SequenceKV, chunks_of, dense_attention

QUANTISED = (torch.int8, torch.float8_e4m3fn)
ROWS = st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=40)
"""Of the largest floats, 127 times their scale may be no float any more."""
RELATIVE_ERROR = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.5 / 127, "float8_e4m3fn": 2**-4}
"""Of the largest number of an entry; half a step of the format."""


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def random_int8(*size: int, seed: int) -> torch.Tensor:
    return torch.randint(-127, 128, size, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@given(values=ROWS)
def test_a_quantised_row_is_within_half_a_step_of_the_row(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor([values])
    quantised, scale = quantise_rows(x, dtype)
    assert quantised.dtype is dtype
    largest = x.abs().max()
    error = (dequantise(quantised, scale) - x).abs().max()
    step = RELATIVE_ERROR[str(dtype).removeprefix("torch.")]
    assert error <= largest * step * 1.0001 or largest < SMALLEST[dtype]
    assert quantised.float().abs().max() <= Q_MAX[dtype]


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@given(values=ROWS, mates=st.lists(ROWS, max_size=3), place=st.integers(0, 3))
def test_a_row_is_quantised_the_same_whatever_its_mates(
    values: list[float], mates: list[list[float]], place: int, dtype: torch.dtype
) -> None:
    rows = [torch.tensor((mate * len(values))[: len(values)]) for mate in mates]
    place = min(place, len(rows))
    rows.insert(place, torch.tensor(values))
    (alone, own_scale), (together, scales) = (
        quantise_rows(rows[place][None], dtype),
        quantise_rows(torch.stack(rows), dtype),
    )
    assert torch.equal(together[place].float(), alone[0].float())
    assert torch.equal(scales[place], own_scale[0])


def test_the_rule_is_the_written_one_bit_for_bit() -> None:
    x = randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    quantised, scale = quantise_rows(x)
    for row, own, own_scale in zip(x, quantised, scale, strict=True):
        largest = row.abs().max()
        assert own_scale == largest / 127.0
        assert torch.equal(own.float(), torch.round(row * (torch.tensor(127.0) / largest)))


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_rows_that_have_no_scale_are_zeros_and_say_so(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[0.0, 0.0], [9e-37, -1e-40], [nan, 1.0], [2.0, -inf], [3.0, 1.0]])
    quantised, scale = quantise_rows(x, dtype)
    assert torch.equal(quantised[:4].float(), torch.zeros(4, 2))
    assert scale[:2].tolist() == [0.0, 0.0]
    assert bool(scale[2:4].isnan().all())
    assert quantised[4, 0].float() == Q_MAX[dtype]


@pytest.mark.parametrize("depth", [1, 64, EXACT_DEPTH, EXACT_DEPTH + 1, 3 * EXACT_DEPTH])
@pytest.mark.parametrize("has_vnni", [True, False])
def test_sums_of_integers_are_exact(depth: int, has_vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_vnni:
        monkeypatch.setattr(reference_linear, "_integer_product_is_exact", lambda depth, num_threads: False)
    x, weight = random_int8(9, depth, seed=1), random_int8(33, depth, seed=2)
    x[0], weight[0], weight[1] = 127, -127, 127  # The largest sums that there are.
    expected = x.long() @ weight.long().t()
    assert torch.equal(integer_products(x, weight), expected.float())


@pytest.mark.parametrize(("k", "m", "with_bias"), [(576, 960, False), (1536, 57, True), (33, 7, True)])
def test_an_int8_linear_is_its_formula_and_row_invariant(k: int, m: int, with_bias: bool) -> None:
    ops = ReferenceOps("int8")
    weight, bias = randn(m, k) / k**0.5, randn(m, seed=1) if with_bias else None
    linear = ops.prepare_linear(weight, bias)
    x = randn(65, k, seed=2)
    together = ops.linear(x, linear)
    for size in (1, 2, 7, 33):
        start = random.Random(size).randrange(len(x) - size)
        assert torch.equal(ops.linear(x[start : start + size].clone(), linear), together[start : start + size])
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(together.double(), exact, rtol=0, atol=0.06)
    assert torch.nn.functional.cosine_similarity(together.double(), exact, dim=1).min() > 0.999


@pytest.mark.parametrize(("depth", "block"), [(576, 64), (1536, 512), (4096, 512), (64, 64), (176, 16), (33, 1)])
def test_a_rotation_keeps_products_and_is_its_matrix(depth: int, block: int) -> None:
    assert rotation_block(depth) == block
    x, weight = randn(5, depth), randn(7, depth, seed=1)
    turned = rotate(x).double()
    products = turned @ rotate(weight).double().t() / block
    torch.testing.assert_close(products, x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < block:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    expected = x.double().view(-1, block) @ hadamard.double()
    torch.testing.assert_close(turned.view(-1, block), expected, rtol=1e-5, atol=1e-4)


def test_an_outlier_channel_does_not_drown_the_others() -> None:
    ops = ReferenceOps("int8")
    x, weight = randn(4, 576), randn(50, 576, seed=1)
    x[:, 100] = 300.0
    out = ops.linear(x, ops.prepare_linear(weight, None)).double()
    plain = dequantise(*quantise_rows(x)).double() @ dequantise(*quantise_rows(weight)).double().t()
    exact = x.double() @ weight.double().t()
    assert (out - exact).square().mean() < (plain - exact).square().mean() / 20


@pytest.mark.parametrize(
    ("k", "m", "with_bias"), [(576, 960, False), (1536, 57, True), (33, 7, True), (176, 64, False)]
)
def test_native_int8_has_the_bits_of_the_reference(k: int, m: int, with_bias: bool) -> None:
    if (native := load_native(1, quantization="int8")) is None:
        pytest.skip("no native kernels on this machine")
    reference = ReferenceOps("int8")
    weight, bias = randn(m, k) / k**0.5, randn(m, seed=1) if with_bias else None
    x = randn(40, k, seed=2) * torch.logspace(-30, 30, 40)[:, None]
    x[3], x[5, 7], x[6, 8] = 0.0, torch.inf, torch.nan
    weight[2] = 0.0
    ours = native.linear(x, native.prepare_linear(weight, bias))
    theirs = reference.linear(x, reference.prepare_linear(weight, bias))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_a_linear_that_must_be_exact_is_not_quantised() -> None:
    ops, plain = ReferenceOps("int8"), ReferenceOps()
    weight, x = randn(8, 64), randn(3, 64, seed=1)
    exact = ops.linear(x, ops.prepare_linear(weight, None, exact=True))
    assert torch.equal(exact, plain.linear(x, plain.prepare_linear(weight, None)))
    assert (ops.name, plain.name) == ("torch-int8", "torch")


def test_a_row_with_a_nan_stays_alone_with_it() -> None:
    ops = ReferenceOps("int8")
    linear = ops.prepare_linear(randn(5, 32), None)
    x = randn(3, 32, seed=1)
    healthy = ops.linear(x, linear)
    x[1, 7] = torch.nan
    out = ops.linear(x, linear)
    assert bool(out[1].isnan().all())
    assert torch.equal(out[[0, 2]], healthy[[0, 2]])


def cache(dtype: str, *, num_planes: int = 2) -> KVCache:
    """A pool full of 0xFF, which is NaN in every float and in every scale."""
    layout = KVLayout(
        num_layers=2, num_kv_heads=3, head_dim=16, block_size=8, dtype=dtype, num_blocks=96, num_planes=num_planes
    )
    return KVCache(layout, device=torch.device("cpu"), allocate=lambda layout: bytearray(b"\xff" * layout.pool_bytes))


@pytest.fixture(params=sorted(DTYPE_BYTES))
def pool(request: pytest.FixtureRequest) -> LayerPool:
    return cache(request.param).layers[1]


def kv_dtype(pool: LayerPool) -> str:
    return str(pool.values.dtype).removeprefix("torch.")


def plane_of(slot: int, plane: int, head: int) -> int:
    return (slot // 8 * 2 + plane) * 3 + head


def test_what_is_stored_is_read_again_within_half_a_step(pool: LayerPool) -> None:
    x = randn(20, 3, 16) * torch.logspace(-3, 3, 20)[:, None, None]
    slots = torch.randperm(96 * 8, generator=torch.Generator().manual_seed(1))[:20]
    write_plane(pool, 1, x, slots)
    step = RELATIVE_ERROR[kv_dtype(pool)]
    for token, slot in enumerate(slots.tolist()):
        planes = torch.tensor([plane_of(slot, 1, head) for head in range(3)])
        read = read_planes(pool, planes)[:, slot % 8]
        assert read.dtype is torch.float32
        largest = x[token].abs().amax(-1, keepdim=True)
        assert bool(((read - x[token]).abs() <= largest * step * 1.0001).all())


def test_what_is_stored_depends_on_the_token_alone(pool: LayerPool) -> None:
    x, slots = randn(6, 3, 16), torch.tensor([5, 700, 8, 15, 16, 31])
    write_plane(pool, 0, x, slots)
    together = read_planes(pool, torch.arange(96 * 6)).clone()
    for token in range(6):
        write_plane(pool, 0, x[token : token + 1], slots[token : token + 1])
    assert torch.equal(read_planes(pool, torch.arange(96 * 6)).view(torch.int32), together.view(torch.int32))


def test_nothing_but_the_slot_is_written(pool: LayerPool) -> None:
    write_plane(pool, 0, torch.zeros(1, 3, 16), torch.tensor([8 * 40 + 3]))
    read = read_planes(pool, torch.arange(96 * 6)).view(96, 2, 3, 8, 16)
    assert int(read.isfinite().sum()) == 3 * 16
    assert bool((read[40, 0, :, 3] == 0).all())


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("num_planes", [1, 2])
def test_attention_over_any_pool_is_near_the_textbook_and_row_invariant(dtype: str, num_planes: int) -> None:
    spec = AttentionSpec(scale=0.25, latent_value_dim=8 if num_planes == 1 else None)
    sequences = [SequenceKV.random(length, (6, 3, 16), length, torch.float32) for length in (3, 60, 141)]
    whole = attend(dtype, num_planes, spec, sequences, [400])
    assert all(
        torch.equal(a, b) for a, b in zip(whole, attend(dtype, num_planes, spec, sequences, [7, 1, 30]), strict=True)
    )
    for sequence, out in zip(sequences, whole, strict=True):
        stored = sequence if dtype in ("float32", "bfloat16", "float16") else requantised(sequence, dtype)
        stored = dataclasses.replace(stored, k_LGD=stored.k_LGD, v_LGD=stored.v_LGD)
        tolerance = {"bfloat16": 3e-2, "float16": 3e-3}.get(dtype, 1e-5)
        torch.testing.assert_close(out.double(), dense_attention(stored, spec), rtol=0, atol=tolerance)


def attend(
    dtype: str, num_planes: int, spec: AttentionSpec, sequences: list[SequenceKV], sizes: list[int]
) -> list[torch.Tensor]:
    paged = PagedSequences(ReferenceOps(), sequences, 8, 5, spec=spec)
    paged.pool = cache(dtype, num_planes=num_planes).layers[0]
    for i, sequence in enumerate(sequences):
        for start, count in chunks_of(len(sequence.q_LND), sizes):
            paged.step([(i, start, count)])
    return paged.out


def requantised(sequence: SequenceKV, dtype: str) -> SequenceKV:
    """What a quantised pool remembers of it."""
    k, v = (dequantise(*quantise_rows(x, getattr(torch, dtype))) for x in (sequence.k_LGD, sequence.v_LGD))
    return dataclasses.replace(sequence, k_LGD=k, v_LGD=v)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
