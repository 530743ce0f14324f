"""Numbers of one dtype as numbers of another, as the engine would have stored them itself.

    to a float dtype      x rounded to the nearest, ties to even           |error| ≤ u |x|     u: `UNIT_ROUNDOFF`
    to a quantised one    scale = max |x| / q_max over a token's key or value of one head, q = x / scale rounded
                          int8: |error| ≤ scale / 2        float8_e4m3fn: |error| ≤ max(2⁻⁴ |x|, 2⁻¹⁰ scale)
    from a quantised one  q * scale in float32, then as above

each bound but for the last bits of float32 arithmetic and for rows smaller than `SMALLEST`. Quantising is bit for bit
`disaggregated.engine.ops.quantise`: what cannot be quantised becomes zeros with the scale NaN.
float16 overflows to infinity.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvtransfer.native import library as native

Values = npt.NDArray[Any]
Scales = npt.NDArray[np.float32]

NUMPY_DTYPE: Final[Mapping[str, Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
UNIT_ROUNDOFF: Final = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float8_e4m3fn": 2.0**-4}
Q_MAX: Final = {"int8": np.float32(127), "float8_e4m3fn": np.float32(448)}
SMALLEST: Final = {"int8": np.float32(1e-36), "float8_e4m3fn": np.float32(1e-35)}
"""A row whose largest magnitude is below becomes zeros: its factor might overflow float32."""

_NATIVE: Final = {"float32": 0, "bfloat16": 1, "int8": 2, "float8_e4m3fn": 3}
"""As csrc/convert.c calls them."""
_NATIVE_ROW_MAX: Final = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Numbers:
    """`values` is (…, head_dim); `scales` (…) when the dtype is a quantised one."""

    dtype: str
    values: Values
    scales: Scales | None = None


def convert(numbers: Numbers, dtype: str) -> Numbers:
    """The same numbers in `dtype`, in memory of their own unless it is theirs already."""
    if numbers.dtype == dtype:
        return numbers
    return natively(numbers, dtype) or in_numpy(numbers, dtype)


def natively(numbers: Numbers, dtype: str) -> Numbers | None:
    """In one pass, by csrc/convert.c; None where that cannot: float16, or no library."""
    found = native.library()
    rows = numbers.values.shape[:-1]
    if found is None or not {numbers.dtype, dtype} <= _NATIVE.keys() or numbers.values.shape[-1] > _NATIVE_ROW_MAX:
        return None
    values = np.ascontiguousarray(numbers.values)
    scales = None if numbers.scales is None else np.ascontiguousarray(numbers.scales)
    converted = Numbers(
        dtype,
        np.empty(values.shape, NUMPY_DTYPE[dtype]),
        np.empty(rows, np.float32) if dtype in Q_MAX else None,
    )
    outcome = found.convert_rows(
        _NATIVE[numbers.dtype],
        _NATIVE[dtype],
        values.ctypes.data,
        None if scales is None else scales.ctypes.data,
        converted.values.ctypes.data,
        None if converted.scales is None else converted.scales.ctypes.data,
        math.prod(rows),
        values.shape[-1],
    )
    assert outcome == 0, f"{numbers.dtype} into {dtype}: {outcome}"
    return converted


def in_numpy(numbers: Numbers, dtype: str) -> Numbers:
    """The same bits, in several passes."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return quantised(as_float32(numbers), dtype) if dtype in Q_MAX else _as_float(numbers, dtype)


def as_float32(numbers: Numbers) -> npt.NDArray[np.float32]:
    widened = numbers.values.astype(np.float32)
    if numbers.scales is not None:
        widened *= numbers.scales[..., None]
    return widened


def quantised(x: npt.NDArray[np.float32], dtype: str) -> Numbers:
    """Each row of (…, head_dim) with one scale, which its largest magnitude decides."""
    limit, smallest = Q_MAX[dtype], SMALLEST[dtype]
    largest = np.abs(x).max(-1)
    is_usable = (largest >= smallest) & np.isfinite(largest)
    factor = np.where(is_usable, limit / largest, np.float32(0))
    scaled = np.where(is_usable[..., None], x * factor[..., None], np.float32(0))
    # A product may round to just above the limit, of which float8 would make a NaN.
    scaled = np.rint(scaled) if dtype == "int8" else np.clip(scaled, -limit, limit)
    without = np.where(largest < smallest, np.float32(0), np.float32(np.nan))
    scales = np.where(is_usable, largest / limit, without)
    return Numbers(dtype, scaled.astype(NUMPY_DTYPE[dtype]), scales)


def _as_float(numbers: Numbers, dtype: str) -> Numbers:
    """By way of float32, which holds every number of the others: one rounding, at the end."""
    return Numbers(dtype, as_float32(numbers).astype(NUMPY_DTYPE[dtype]))
