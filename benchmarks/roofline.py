"""What this machine can do at most, measured with kernels that do nothing else, and how near to it an op comes.

The bars are read from DRAM by several streams at a time, and multiply-adds from registers to registers, in the
instruction set that the ops are compiled for (`csrc/roofline.c`): no product of matrices reaches them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char, c_float, c_int, c_int64, c_void_p
from typing import Final, Literal

from disaggregated.engine.ops.native_build import library
from disaggregated.engine.ops.native_linear import FLOAT32, INT8

READ_BYTES: Final = 256 << 20
"""Larger than any cache."""
NUM_UNITS: Final = 20
ROUND_S: Final = 0.05
NUM_ROUNDS: Final = 7

Call = Callable[[], object]
Arithmetic = Literal["float32", "int8"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one size. `ours` and `theirs` do the same work."""

    name: str
    ours: Call
    theirs: Call
    num_bytes: float = 0.0
    """That must come from DRAM."""
    num_operations: float = 0.0
    """Multiplications and additions."""
    arithmetic: Arithmetic = "float32"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    bytes_per_s: float
    operations_per_s: dict[Arithmetic, float]

    def seconds(self, case: Case) -> float:
        """The least time that `case` can take here."""
        return max(self.seconds_of_memory(case), case.num_operations / self.operations_per_s[case.arithmetic])

    def seconds_of_memory(self, case: Case) -> float:
        return case.num_bytes / self.bytes_per_s

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e9:.0f} G {kind} operations/s" for kind, rate in self.operations_per_s.items())
        return f"DRAM {self.bytes_per_s / 1e9:.1f} GB/s, {rates}"


def measure(isa: str, num_threads: int) -> Roofline:
    kernels = ctypes.CDLL(str(library(isa)))
    kernels.roofline_read.argtypes = [c_void_p, c_void_p, c_int64, c_void_p]
    kernels.roofline_read.restype = None
    kernels.roofline_multiply.argtypes = [c_void_p, c_int64, c_int64, c_void_p]
    kernels.roofline_multiply.restype = c_int64
    memory, sink = _large_pages(READ_BYTES), (c_float * num_threads)()
    with _team(kernels, num_threads) as team:

        def multiply(kind: int) -> int:
            count: int = kernels.roofline_multiply(team, kind, NUM_UNITS, sink)
            return count

        calls: list[Call] = [
            lambda: kernels.roofline_read(team, memory, READ_BYTES, sink),
            lambda: multiply(FLOAT32),
            lambda: multiply(INT8),
        ]
        read_s, float32_s, int8_s = seconds_each(calls)
        return Roofline(
            bytes_per_s=READ_BYTES / read_s,
            operations_per_s={"float32": 2 * multiply(FLOAT32) / float32_s, "int8": 2 * multiply(INT8) / int8_s},
        )


def _large_pages(num_bytes: int) -> ctypes.Array[c_char]:
    """Memory as packed weights have it: with small pages, TLB misses would make the bar too low."""
    memory = mmap.mmap(-1, num_bytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(b"\1" * num_bytes)
    return (c_char * num_bytes).from_buffer(memory)


@contextmanager
def _team(kernels: ctypes.CDLL, num_threads: int) -> Iterator[int]:
    kernels.team_start.argtypes, kernels.team_start.restype = [c_int], c_void_p
    kernels.team_stop.argtypes, kernels.team_stop.restype = [c_void_p], None
    team = kernels.team_start(num_threads)
    try:
        yield team
    finally:
        kernels.team_stop(team)


def seconds_each(calls: Sequence[Call]) -> list[float]:
    """Median seconds of each, taken in turns so that a noisy neighbour hits all of them."""
    rounds: list[list[float]] = [[] for _ in calls]
    repeats = [max(1, int(ROUND_S / _seconds(call, 1))) for call in calls]
    for _, (call, repeat, seen) in itertools.product(range(NUM_ROUNDS), zip(calls, repeats, rounds, strict=True)):
        seen.append(_seconds(call, repeat))
    return [statistics.median(seen) for seen in rounds]


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
