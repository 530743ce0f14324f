"""Native linears against their formulas, and the law of the op table: a row's bits depend on the row alone.

In int8 the formula itself is exact: sums of integers, and single rounded steps before and after. So a result is not
compared within a tolerance but bit by bit, on every instruction set that this CPU has, and for any number of threads.
"""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.native_isa import runnable_isas
from disaggregated.engine.ops.native_linear import FLOAT32, INT8, INT8_DEPTH_MAX, Quantization
from disaggregated.engine.ops.quantise import rotate, rotation_block
from disaggregated.engine.ops.reference import ReferenceOps

ISAS = runnable_isas()
FUSED_ISAS = [isa for isa in ISAS if isa != "baseline"]
"""Those with a fused multiply-add; without one, float32 sums are rounded differently."""
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8")
BATCHES = (1, 2, 4, 5, 7, 8, 9, 16, 32, 33, 49, 250)

pytestmark = pytest.mark.skipif(native.load(1) is None, reason="no native kernels here: no C compiler")
thorough = settings(max_examples=25)
shapes = st.tuples(st.integers(1, 200), st.integers(1, 900))
"""Columns and depth: several panels of any instruction set, and more than one block of depth."""


@functools.cache
def loaded(isa: str, quantization: Quantization = "none", num_threads: int = 1) -> Ops:
    ops = native.load(num_threads, isa, quantization=quantization)
    assert ops is not None
    return ops


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=QUANTIZATIONS)
def quantization(request: pytest.FixtureRequest) -> Quantization:
    chosen: Quantization = request.param
    return chosen


@pytest.fixture
def ops(isa: str, quantization: Quantization) -> Ops:
    return loaded(isa, quantization)


@pytest.fixture
def int8_ops(isa: str) -> Ops:
    return loaded(isa, "int8")


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def linear(ops: Ops, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return ops.linear(x, ops.prepare_linear(weight, bias))


def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) integers in float64 and (T, 1) scales, by the formula of csrc/quantize.c; rows of zeros have scale 0."""
    largest = rows.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(127.0) / largest
    integers = torch.where(largest > 0, rows * inverse, 0.0).round().double()
    return integers, largest / torch.tensor(127.0)


def int8_formula(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Float64 adds up integers of this size without an error."""
    block = rotation_block(x.shape[1])
    (x_values, x_scales), (weight_values, weight_scales) = quantised(rotate(x)), quantised(rotate(weight) / block)
    products = (x_values @ weight_values.t()).float() * (x_scales * weight_scales.t())
    return products if bias is None else products + bias


@pytest.mark.parametrize("isa", ISAS)
@given(num_rows=st.integers(0, 70), shape=shapes, with_bias=st.booleans(), seed=st.integers(0, 1000))
@thorough
def test_a_float32_linear_is_its_formula_and_a_row_is_the_same_alone(
    isa: str, num_rows: int, shape: tuple[int, int], with_bias: bool, seed: int
) -> None:
    ops, (num_columns, depth) = loaded(isa), shape
    x, weight = randn(num_rows, depth, seed=seed), randn(num_columns, depth, seed=seed + 1)
    bias = randn(num_columns, seed=seed + 2) if with_bias else None
    out = linear(ops, x, weight, bias)
    assert out.shape == (num_rows, num_columns)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5 * depth**0.5)
    for row in random.Random(seed).sample(range(num_rows), min(num_rows, 3)):
        assert torch.equal(linear(ops, x[row : row + 1], weight, bias)[0], out[row])


@pytest.mark.parametrize("isa", ISAS)
@given(num_rows=st.integers(0, 70), shape=shapes, with_bias=st.booleans(), seed=st.integers(0, 1000))
@thorough
def test_an_int8_linear_is_its_formula_to_the_last_bit(
    isa: str, num_rows: int, shape: tuple[int, int], with_bias: bool, seed: int
) -> None:
    num_columns, depth = shape
    x, weight = randn(num_rows, depth, seed=seed), randn(num_columns, depth, seed=seed + 1)
    bias = randn(num_columns, seed=seed + 2) if with_bias else None
    assert torch.equal(linear(loaded(isa, "int8"), x, weight, bias), int8_formula(x, weight, bias))


@given(shape=shapes, magnitude=st.integers(-30, 30), seed=st.integers(0, 1000))
@thorough
def test_an_int8_linear_is_as_close_to_the_real_product_as_rounding_allows(
    shape: tuple[int, int], magnitude: int, seed: int
) -> None:
    """Each factor is at most half a scale off; the bound follows, whatever the size of the numbers."""
    num_columns, depth = shape
    x, weight = randn(9, depth, seed=seed) * 2.0**magnitude, randn(num_columns, depth, seed=seed + 1)
    out = linear(loaded(ISAS[0], "int8"), x, weight).double()
    turned_x, turned_weight = rotate(x), rotate(weight) / rotation_block(depth)
    half_x, half_weight = quantised(turned_x)[1].double() / 2, quantised(turned_weight)[1].double() / 2
    bound = turned_x.double().abs().sum(-1, keepdim=True) * half_weight.t()
    bound += half_x * turned_weight.double().abs().sum(-1)
    bound += depth * half_x * half_weight.t()
    assert ((out - x.double() @ weight.double().t()).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize(("depth", "num_columns"), [(576, 960), (1500, 131), (641, 49)])
def test_a_row_has_the_same_bits_in_any_batch_and_for_any_number_of_threads(
    isa: str, quantization: Quantization, depth: int, num_columns: int
) -> None:
    """600 rows are more than a block of rows, and 1,500 deep is more than a block of depth."""
    one, two = loaded(isa, quantization, 1), loaded(isa, quantization, 2)
    weight = one.prepare_linear(randn(num_columns, depth), randn(num_columns, seed=1))
    x = randn(600, depth, seed=2)
    whole = one.linear(x, weight)
    for size in BATCHES:
        start = random.Random(size).randrange(600 - size)
        part = x[start : start + size].contiguous()
        for ops in (one, two):
            assert torch.equal(ops.linear(part, weight), whole[start : start + size]), size
    assert torch.equal(two.linear(x, weight), whole)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@given(num_rows=st.sampled_from(BATCHES), shape=shapes, seed=st.integers(0, 1000))
@thorough
def test_instruction_sets_agree_to_the_last_bit(
    quantization: Quantization, num_rows: int, shape: tuple[int, int], seed: int
) -> None:
    """So a sequence that moves between two machines goes on with the same tokens."""
    num_columns, depth = shape
    x, weight, bias = randn(num_rows, depth, seed=seed), randn(num_columns, depth, seed=1), randn(num_columns, seed=2)
    isas = ISAS if quantization == "int8" else FUSED_ISAS
    first, *others = (linear(loaded(isa, quantization), x, weight, bias) for isa in isas)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("depth", [4, 4096, INT8_DEPTH_MAX])
def test_no_sum_of_bytes_saturates_or_wraps(int8_ops: Ops, depth: int) -> None:
    """All factors at the ends of their range, the sums at theirs: rotated twice, a row is a multiple of itself."""
    signs = torch.tensor([[1.0], [-1.0]]).expand(2, depth)
    alternating = torch.where(torch.arange(depth) % 2 == 0, 1.0, -1.0)[None]
    rows, weight = rotate(signs), rotate(torch.cat([signs, alternating]))
    assert quantised(rotate(rows))[0].abs().min() == 127
    out = linear(int8_ops, rows, weight)
    assert torch.equal(out, int8_formula(rows, weight, None))
    torch.testing.assert_close(out.double(), rows.double() @ weight.double().t(), rtol=1e-6, atol=0)


def test_a_value_halfway_between_two_integers_goes_to_the_even_one(int8_ops: Ops) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -1.5, -2.5, 126.5]])  # An odd depth is not rotated.
    out = linear(int8_ops, x, torch.eye(7))
    assert out.tolist() == [[127.0, 0.0, 2.0, 2.0, -2.0, -2.0, 126.0]]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_spoils_itself_alone(ops: Ops, wrong: float) -> None:
    x, weight, bias = randn(12, 70), randn(50, 70, seed=1), randn(50, seed=2)
    clean = linear(ops, x, weight, bias)
    x[3, 69] = wrong
    out = linear(ops, x, weight, bias)
    assert not out[3].isfinite().any()
    others = [row for row in range(12) if row != 3]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45, 9e-37])
def test_rows_of_nothing_and_next_to_nothing_give_the_bias(int8_ops: Ops, tiny: float) -> None:
    bias = randn(30, seed=2)
    assert torch.equal(linear(int8_ops, torch.full((3, 41), tiny), randn(30, 41), bias), bias.expand(3, -1))
    assert torch.equal(linear(int8_ops, randn(3, 41), torch.full((30, 41), tiny), bias), bias.expand(3, -1))


def test_an_outlier_does_not_drown_its_neighbours(int8_ops: Ops) -> None:
    """One channel a hundred times larger: without the rotation the others would have a step or two each."""
    x, weight = randn(50, 576), randn(90, 576, seed=1)
    x[:, 100] = 100.0
    expected = x.double() @ weight.double().t()
    error = (linear(int8_ops, x, weight).double() - expected).square().mean().sqrt()
    (x_values, x_scales), (weight_values, weight_scales) = quantised(x), quantised(weight)
    plain = (x_values @ weight_values.t()) * (x_scales * weight_scales.t())
    assert error < 0.5 * (plain - expected).square().mean().sqrt()


@pytest.mark.parametrize("depth", [1, 2, 6, 20, 40, 48, 96, 320, 576, 1024, 1536, 2048])
def test_blocks_of_any_size_are_rotated_as_in_the_reference(int8_ops: Ops, depth: int) -> None:
    x, weight = randn(9, depth), randn(7, depth, seed=1)
    reference = ReferenceOps("int8")
    expected = reference.linear(x, reference.prepare_linear(weight, None))
    assert torch.equal(linear(int8_ops, x, weight), expected)


def test_an_exact_linear_of_an_int8_table_is_float32(isa: str) -> None:
    weight, bias, x = randn(20, 300), randn(20, seed=1), randn(3, 300, seed=2)
    table = loaded(isa, "int8")
    prepared = table.prepare_linear(weight, bias, exact=True)
    assert (prepared.weight.kind, table.prepare_linear(weight, bias).weight.kind) == (FLOAT32, INT8)
    assert torch.equal(table.linear(x, prepared), linear(loaded(isa), x, weight, bias))


def test_a_table_says_in_its_name_how_it_computes(isa: str) -> None:
    assert loaded(isa).name == f"native-{isa}"
    assert loaded(isa, "int8").name == f"native-int8-{isa}"


def test_int8_weights_take_about_a_quarter_of_the_memory(isa: str) -> None:
    weight = randn(960, 576)
    wide, narrow = (loaded(isa, q).prepare_linear(weight, None).panels.numel() for q in QUANTIZATIONS)
    assert narrow < 0.27 * wide


def test_linear_keeps_nothing_of_an_earlier_larger_call(ops: Ops) -> None:
    weight = ops.prepare_linear(randn(64, 96), None)
    x = randn(3, 96, seed=1)
    before = ops.linear(x, weight)
    ops.linear(torch.full((500, 96), torch.nan), weight)
    assert torch.equal(ops.linear(x, weight), before)


def test_the_original_weight_may_be_freed(ops: Ops) -> None:
    weight, x = randn(40, 50), randn(2, 50, seed=1)
    prepared = ops.prepare_linear(weight, None)
    before = ops.linear(x, prepared)
    weight.fill_(torch.nan)
    assert torch.equal(ops.linear(x, prepared), before)


def test_weights_of_half_precision_are_widened(ops: Ops) -> None:
    weight, x = randn(20, 30).bfloat16(), randn(2, 30)
    assert torch.equal(linear(ops, x, weight), linear(ops, x, weight.float()))


def test_a_weight_that_lies_transposed_is_the_same_weight(ops: Ops) -> None:
    weight, x = randn(30, 20), randn(2, 30, seed=1)
    assert torch.equal(linear(ops, x, weight.t()), linear(ops, x, weight.t().contiguous()))


def test_no_tokens_give_no_rows(ops: Ops) -> None:
    assert linear(ops, randn(0, 8), randn(5, 8)).shape == (0, 5)


def test_what_does_not_fit_is_refused(ops: Ops) -> None:
    weight = ops.prepare_linear(randn(5, 8), None)
    for wrong, words in (
        (randn(3, 8).double(), "dtype"),
        (randn(8, 3).t(), "not contiguous"),
        (randn(3, 9), r"shape \(3, 9\), must be \(3, 8\)"),
    ):
        with pytest.raises(AssertionError, match=words):
            ops.linear(wrong, weight)
    with pytest.raises(AssertionError, match="shape"):
        ops.prepare_linear(randn(5, 8), randn(4))
    with pytest.raises(AssertionError, match="empty weight"):
        ops.prepare_linear(randn(0, 8), None)


def test_a_sum_that_32_bits_could_not_hold_is_refused(int8_ops: Ops) -> None:
    with pytest.raises(AssertionError, match="do not fit into 32 bits"):
        int8_ops.prepare_linear(randn(1, INT8_DEPTH_MAX + 1), None)
