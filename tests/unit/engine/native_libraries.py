"""The native kernels of every instruction set that this CPU runs, each loaded once for all tests of a process."""

from __future__ import annotations

import functools
from typing import Final

import pytest

from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.native_isa import runnable_isas

ISAS: Final = tuple(isa for isa in runnable_isas() if not isa.endswith("vnni"))
"""VNNI makes a difference to linears alone, which have tests of their own."""

needs_kernels = pytest.mark.skipif(native.load(1) is None, reason="no native kernels here: no C compiler")


@functools.cache
def loaded(isa: str, num_threads: int = 1) -> Ops:
    ops = native.load(num_threads, isa)
    assert ops is not None
    return ops
