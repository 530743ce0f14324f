"""Numbers in another dtype: as the engine stores them, and within the bounds that are documented."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from disaggregated.engine.ops.quantise import quantise_rows
from disaggregated.kv_layout import DTYPE_BYTES, QUANTISED
from kvtransfer.conversion.values import (
    NUMPY_DTYPE,
    Q_MAX,
    SMALLEST,
    UNIT_ROUNDOFF,
    Numbers,
    as_float32,
    convert,
    in_numpy,
    natively,
)
from kvtransfer.native import library as native

Floats = npt.NDArray[np.float32]
SLACK = 1 + 2.0**-20
"""For the last bits of float32 arithmetic."""
FLOATS = sorted(set(DTYPE_BYTES) - QUANTISED)


def rows(largest: float = 2.0**60) -> st.SearchStrategy[Floats]:
    numbers = st.floats(-largest, largest, width=32, allow_subnormal=False)
    return arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=numbers)


def exact(x: Floats) -> Numbers:
    return Numbers("float32", x)


def test_every_dtype_of_a_layout_has_a_numpy_one_of_its_size() -> None:
    assert {name: dtype.itemsize for name, dtype in NUMPY_DTYPE.items()} == dict(DTYPE_BYTES)
    assert set(Q_MAX) == set(QUANTISED)


@pytest.mark.parametrize("dtype", sorted(QUANTISED))
@given(x=arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(width=32)))
def test_quantising_gives_the_engines_bits(dtype: str, x: Floats) -> None:
    ours = convert(exact(x), dtype)
    theirs, scales = quantise_rows(torch.from_numpy(x.copy()), getattr(torch, dtype))
    assert ours.scales is not None
    assert (ours.values.view(np.uint8) == theirs.view(torch.uint8).numpy()).all()
    np.testing.assert_array_equal(ours.scales, scales.numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(x=arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_nan=False)))
def test_rounding_gives_the_engines_bits(dtype: str, x: Floats) -> None:
    theirs = torch.from_numpy(x.copy()).to(getattr(torch, dtype)).view(torch.int16).numpy()
    assert (convert(exact(x), dtype).values.view(np.int16) == theirs).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(x=rows(largest=60_000))
def test_a_rounded_number_is_off_by_the_unit_roundoff_at_most(dtype: str, x: Floats) -> None:
    error = np.abs(as_float32(convert(exact(x), dtype)).astype(np.float64) - x)
    smallest_half = 2.0**-25 if dtype == "float16" else 0  # Half of float16's smallest number.
    assert (error <= UNIT_ROUNDOFF[dtype] * np.abs(x.astype(np.float64)) + smallest_half).all()


@given(rows())
def test_int8_is_off_by_half_a_step_at_most(x: Floats) -> None:
    numbers = convert(exact(x), "int8")
    assert numbers.scales is not None
    error = np.abs(as_float32(numbers).astype(np.float64) - x)
    assert (error <= numbers.scales[:, None].astype(np.float64) / 2 * SLACK * (1 + 2.0**-12) + SMALLEST["int8"]).all()


@given(rows())
def test_fp8_is_off_by_a_sixteenth_or_half_its_smallest_step_at_most(x: Floats) -> None:
    numbers = convert(exact(x), "float8_e4m3fn")
    assert numbers.scales is not None
    error, scales = np.abs(as_float32(numbers).astype(np.float64) - x), numbers.scales[:, None].astype(np.float64)
    bound = np.maximum(UNIT_ROUNDOFF["float8_e4m3fn"] * np.abs(x), 2.0**-10 * scales)
    assert (error <= bound * SLACK + SMALLEST["float8_e4m3fn"]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@given(x=rows(largest=60_000))
def test_a_float_dtype_comes_back_from_float32_as_it_was(dtype: str, x: Floats) -> None:
    stored = convert(exact(x), dtype)
    back = convert(convert(stored, "float32"), dtype)
    assert (back.values.view(np.uint8) == stored.values.view(np.uint8)).all()


@pytest.mark.parametrize("dtype", sorted(QUANTISED))
@given(x=rows())
def test_quantising_what_was_quantised_changes_no_number_by_more_than_the_arithmetic(dtype: str, x: Floats) -> None:
    once = convert(exact(x), dtype)
    again = convert(convert(once, "float32"), dtype)
    assert once.scales is not None
    assert again.scales is not None
    np.testing.assert_allclose(again.scales, once.scales, rtol=2.0**-22)
    difference = np.abs(again.values.astype(np.float32) - once.values.astype(np.float32))
    assert (difference <= np.abs(once.values.astype(np.float32)) / 8).all()


def test_a_row_that_cannot_be_quantised_says_so_in_its_scale() -> None:
    x = np.array([[1.0, np.nan], [np.inf, 1.0], [0.0, 1e-38]], np.float32)
    for dtype in QUANTISED:
        numbers = convert(exact(x), dtype)
        assert numbers.scales is not None
        assert np.isnan(numbers.scales[:2]).all()
        assert numbers.scales[2] == 0
        assert not numbers.values.astype(np.float32).any()


def test_a_number_beyond_float16_becomes_infinite_as_in_the_engine() -> None:
    assert np.isinf(convert(exact(np.array([70_000.0], np.float32)), "float16").values).all()


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_the_same_dtype_is_the_same_memory(dtype: str) -> None:
    numbers: Any = convert(exact(np.ones((2, 3), np.float32)), dtype)
    assert convert(numbers, dtype) is numbers


NATIVE = ["float32", "bfloat16", "int8", "float8_e4m3fn"]


@pytest.mark.parametrize("into", NATIVE)
@pytest.mark.parametrize("dtype", NATIVE)
@given(bits=arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(64)), elements=st.integers(0, 255)))
def test_native_code_gives_the_bits_of_numpy(dtype: str, into: str, bits: npt.NDArray[np.uint8]) -> None:
    """For any bytes at all: also numbers that are none, and the smallest ones."""
    if dtype == into:
        return
    scales = np.linspace(0.5, 3, len(bits), dtype=np.float32) if dtype in QUANTISED else None
    numbers = Numbers(dtype, bits.view(NUMPY_DTYPE[dtype]), scales)
    ours, theirs = natively(numbers, into), in_numpy(numbers, into)
    assert ours is not None, "no native library"
    np.testing.assert_array_equal(ours.values.astype(np.float32), theirs.values.astype(np.float32))
    if ours.scales is not None and theirs.scales is not None:
        np.testing.assert_array_equal(ours.scales, theirs.scales)


def test_every_float8_is_read_as_numpy_reads_it() -> None:
    every = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPE["float8_e4m3fn"])[None]
    numbers = Numbers("float8_e4m3fn", every, np.ones(1, np.float32))
    ours = natively(numbers, "float32")
    assert ours is not None
    np.testing.assert_array_equal(ours.values, every.astype(np.float32))


def test_float16_and_machines_without_a_compiler_have_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    x = exact(np.linspace(-3, 3, 8, dtype=np.float32)[None])
    assert natively(x, "float16") is None
    monkeypatch.setattr(native, "library", lambda: None)
    assert natively(x, "int8") is None
    assert convert(x, "int8").values.tolist() == in_numpy(x, "int8").values.tolist()
