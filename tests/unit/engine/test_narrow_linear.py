"""Weights that are held in fewer bits than float32: never at the price of one, and only where nothing is lost.

"Dense" is the same table with weights that stay float32. Between the two nothing may differ, not even a zero's sign.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QuantType
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.native_isa import runnable_isas
from disaggregated.engine.ops.native_linear import GROUP, PackedLinear
from disaggregated.model_files import resolve
from tests.unit.engine.runners import last_logits, make_runner, random_prompt

ISAS = runnable_isas()
FUSED_ISAS = [isa for isa in ISAS if isa != "baseline"]
shapes = st.tuples(st.integers(1, 200), st.integers(1, 30).map(lambda groups: groups * GROUP), st.integers(0, 1000))
"""Columns, depth, and the seed of all numbers."""
thorough = settings(max_examples=20)
pytestmark = pytest.mark.skipif(native.load(1) is None, reason="no native kernels here: no C compiler")

Make = Callable[[torch.Generator, int, int], torch.Tensor]


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def from_gguf(kind: QuantType) -> Make:
    """Quantised and dequantised by the package of GGUF's own authors."""

    def make(generator: torch.Generator, num_columns: int, depth: int) -> torch.Tensor:
        weight = torch.randn(num_columns, depth, generator=generator).mul_(0.05).numpy()
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind))

    return make


def searched_scales(generator: torch.Generator, num_columns: int, depth: int) -> torch.Tensor:
    """As quantisers make them that look for the best scale: any code is a group's largest, and any its lowest."""
    groups = (num_columns, depth // GROUP, 1)
    scale = torch.rand(groups, generator=generator).mul_(0.1).half().float()
    minimum = torch.randn(groups, generator=generator).mul_(0.5).half().float()
    lowest = torch.randint(0, 6, groups, generator=generator)
    codes = torch.randint(0, 10, (num_columns, depth // GROUP, GROUP), generator=generator) + lowest
    return (codes.double() * scale + minimum).float().view(num_columns, depth)


def rounded_to(dtype: torch.dtype) -> Make:
    return lambda generator, num_columns, depth: torch.randn(num_columns, depth, generator=generator).to(dtype).float()


MAKERS: Final[dict[str, tuple[Make, str, float]]] = {
    "Q4_0": (from_gguf(QuantType.Q4_0), "4 bits and scales", 4.5),
    "Q4_1": (from_gguf(QuantType.Q4_1), "4 bits, scales and minima", 5.0),
    "Q5_0": (from_gguf(QuantType.Q5_0), "8 bits and scales", 8.5),
    "Q8_0": (from_gguf(QuantType.Q8_0), "8 bits and scales", 8.5),
    "searched": (searched_scales, "4 bits, scales and minima", 5.0),
    "bfloat16": (rounded_to(torch.bfloat16), "bfloat16", 16.0),
    "float16": (rounded_to(torch.float16), "float16", 16.0),
    "float32": (rounded_to(torch.float32), "float32", 32.0),
}
"""Where weights come from → how they are made, how they are then held, and in how many bits a number."""


@functools.cache
def loaded(isa: str, num_threads: int = 1, *, narrow: bool = True) -> Ops:
    ops = native.load(num_threads, isa, may_be_narrow=narrow)
    assert ops is not None
    return ops


def made(source: str, num_columns: int, depth: int, seed: int = 0) -> torch.Tensor:
    return MAKERS[source][0](torch.Generator().manual_seed(seed), num_columns, depth)


def packed(isa: str, weight: torch.Tensor, bias: torch.Tensor | None = None, *, narrow: bool = True) -> PackedLinear:
    prepared = loaded(isa, narrow=narrow).prepare_linear(weight, bias)
    assert isinstance(prepared, PackedLinear)
    return prepared


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def assert_as_dense(isa: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
    narrow = packed(isa, weight, bias)
    expected = loaded(isa).linear(x, packed(isa, weight, bias, narrow=False))
    assert same_bits(loaded(isa).linear(x, narrow), expected), narrow.form
    return narrow


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("source", MAKERS)
@given(num_rows=st.integers(1, 40), shape=shapes, with_bias=st.booleans())
@thorough
def test_a_weight_is_held_narrowly_and_multiplied_to_the_same_bits(
    isa: str, source: str, num_rows: int, shape: tuple[int, int, int], with_bias: bool
) -> None:
    num_columns, depth, seed = shape
    bias = randn(num_columns, seed=seed + 1) if with_bias else None
    weight = made(source, num_columns, depth, seed)
    narrow = assert_as_dense(isa, randn(num_rows, depth, seed=seed + 2), weight, bias)
    assert narrow.form == MAKERS[source][1]


@pytest.mark.parametrize("num_rows", [41, 49, 96, 300, 700])
@pytest.mark.parametrize("source", ["Q4_1", "Q8_0"])
def test_many_rows_and_a_deep_weight_give_the_same_bits(isa: str, source: str, num_rows: int) -> None:
    """More than one block of rows and of depth, and depths that are no multiple of either."""
    for depth in (1504, 3136):
        assert_as_dense(isa, randn(num_rows, depth), made(source, 100, depth), randn(100, seed=1))


@pytest.mark.parametrize("source", MAKERS)
def test_threads_share_a_narrow_weight(isa: str, source: str) -> None:
    weight, x = packed(isa, made(source, 1000, 320)), randn(9, 320)
    assert same_bits(loaded(isa, 3).linear(x, weight), loaded(isa).linear(x, weight))


@pytest.mark.parametrize("source", MAKERS)
def test_instruction_sets_agree(source: str) -> None:
    weight, x = made(source, 130, 640), randn(7, 640)
    first, *others = (loaded(isa).linear(x, packed(isa, weight)) for isa in FUSED_ISAS)
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("source", MAKERS)
def test_a_number_takes_the_bits_of_its_form(isa: str, source: str) -> None:
    weight = packed(isa, made(source, 480, 1024))
    assert weight.num_bytes * 8 / (480 * 1024) == pytest.approx(MAKERS[source][2], rel=0.01)


@pytest.mark.parametrize("source", [source for source in MAKERS if source != "float32"])
@given(column=st.integers(0, 69), place=st.integers(0, 95), bit=st.integers(0, 2))
@thorough
def test_one_bit_that_does_not_fit_makes_a_weight_dense(source: str, column: int, place: int, bit: int) -> None:
    weight = made(source, 70, 96)
    weight.view(torch.int32)[column, place] ^= 1 << bit
    assert assert_as_dense(ISAS[0], randn(3, 96), weight, None).form == "float32"


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("source", [*MAKERS])
def test_a_weight_that_is_not_finite_is_not_lost(isa: str, source: str, wrong: float) -> None:
    """Bfloat16 has them, too."""
    weight = made(source, 40, 64)
    weight[17, 33] = wrong
    prepared = packed(isa, weight)
    assert prepared.form == ("bfloat16" if source == "bfloat16" else "float32")
    out = loaded(isa).linear(randn(2, 64), prepared)
    assert not out[:, 17].isfinite().any()
    assert out[:, :17].isfinite().all()


@pytest.mark.parametrize("source", ["Q4_0", "Q8_0", "bfloat16", "float16"])
def test_a_zero_keeps_its_sign(isa: str, source: str) -> None:
    """A product with -0 added to -0 stays -0; with +0 it would not. Q4_0 has negative scales, and so negative zeros."""
    weight = made(source, 64, 64)
    weight[5], weight[6, 32:] = 0.0, -0.0
    assert source != "Q4_0" or ((weight == 0) & weight.signbit()).sum() > 64
    one_each = torch.eye(64)
    assert_as_dense(isa, one_each, weight, torch.full((64,), -0.0))


@pytest.mark.parametrize("magnitude", [2.0**-23, 2.0**-16, 1.0, 500.0])
@pytest.mark.parametrize("source", ["Q4_1", "Q8_0"])
def test_scales_may_be_tiny_or_large(isa: str, source: str, magnitude: float) -> None:
    """Down to subnormal halves, and to those that became 0: what they leave is held, too."""
    kind = QuantType[source]
    weight = randn(50, 96).mul_(magnitude).numpy()
    held = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind))
    assert np.isfinite(held.numpy()).all()
    assert assert_as_dense(isa, randn(4, 96, seed=1), held, None).form in (
        MAKERS[source][1], "4 bits and scales", "float16"
    )  # fmt: skip


def test_rows_that_are_all_one_number_are_held(isa: str) -> None:
    weight = torch.full((20, 64), 0.25)
    weight[3] = 0.0
    weight[4] = -2.5
    assert assert_as_dense(isa, randn(3, 64), weight, randn(20)).form == "4 bits and scales"


def test_a_merged_weight_takes_the_narrowest_form_that_has_all_parts(isa: str) -> None:
    four, eight, half, whole = (made(source, 24, 128) for source in ("Q4_0", "Q8_0", "bfloat16", "float32"))
    x = randn(5, 128)
    assert assert_as_dense(isa, x, torch.cat([four, eight]), None).form == "8 bits and scales"
    assert assert_as_dense(isa, x, torch.cat([half, half]), None).form == "bfloat16"
    assert assert_as_dense(isa, x, torch.cat([eight, half]), None).form == "float32"
    assert assert_as_dense(isa, x, torch.cat([four, whole]), None).form == "float32"


@pytest.mark.parametrize("depth", [1, 31, 33, 500])
def test_a_depth_of_broken_groups_stays_dense(isa: str, depth: int) -> None:
    assert assert_as_dense(isa, randn(3, depth), randn(9, depth).bfloat16().float(), None).form == "float32"


def test_a_table_keeps_books_of_what_its_linears_take() -> None:
    ops = native.load(1)
    assert ops is not None
    assert ops.linear_bytes == {}
    first, second = (ops.prepare_linear(made(source, 48, 64), None).num_bytes for source in ("Q8_0", "float32"))
    ops.prepare_linear(made("Q8_0", 48, 64), None)
    assert ops.linear_bytes == {"8 bits and scales": 2 * first, "float32": second}


def test_an_int8_table_quantises_whatever_the_weight_was() -> None:
    ops = native.load(1, quantization="int8")
    assert ops is not None
    weight = made("Q4_1", 48, 64)
    assert ops.prepare_linear(weight, None).form == "int8"
    assert ops.prepare_linear(weight, None, exact=True).form == "4 bits, scales and minima"


def test_a_variable_keeps_weights_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_DENSE_WEIGHTS", "1")
    ops = native.load(1)
    assert ops is not None
    assert ops.prepare_linear(made("Q4_1", 48, 64), None).form == "float32"


def test_the_bundled_model_computes_the_same_bits_from_a_fifth_of_the_bytes() -> None:
    path = resolve("smollm2-135m-instruct").path
    prompt = random_prompt(40, 1, 49152)
    logits: dict[bool, torch.Tensor] = {}
    for narrow in (True, False):
        ops = native.load(1, may_be_narrow=narrow)
        assert ops is not None
        logits[narrow] = last_logits(make_runner(path, ops=ops), prompt, [33, 1, 6], 0)
        if narrow:
            assert set(ops.linear_bytes) == {"4 bits, scales and minima", "8 bits and scales"}
            assert sum(ops.linear_bytes.values()) < 538e6 / 5
        else:
            assert set(ops.linear_bytes) == {"float32"}
    assert same_bits(logits[True], logits[False])
