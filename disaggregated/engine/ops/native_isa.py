"""The instruction sets that the C kernels can be compiled for, and which of them this CPU has.

AVX2, AVX-512 and NEON give the same bits in float32, and in int8 all do (see csrc/vector.h and csrc/quantize.c), so a
sequence may move between machines that chose differently.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any, Final

import torch

X86: Final = frozenset({"x86_64", "AMD64"})
ARM64: Final = frozenset({"aarch64", "arm64"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSet:
    flags: tuple[str, ...]
    """For GCC and clang."""
    machines: frozenset[str] | None = None
    """Values of `platform.machine()`; None: any."""
    needs: frozenset[str] = frozenset()
    """Names of `torch.cpu.get_capabilities()`."""


_AVX2_FLAGS: Final = ("-mavx2", "-mfma", "-mf16c")
_AVX512_FLAGS: Final = (
    "-DVECTOR_BYTES=64", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2_FLAGS,
    "-mprefer-vector-width=512",
)  # fmt: skip
_AVX512_NEEDS: Final = frozenset({"avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"})

INSTRUCTION_SETS: Final[Mapping[str, InstructionSet]] = {
    "avx512vnni": InstructionSet(
        flags=(*_AVX512_FLAGS, "-mavx512vnni"), machines=X86, needs=_AVX512_NEEDS | {"avx512_vnni"}
    ),
    "avx512": InstructionSet(flags=_AVX512_FLAGS, machines=X86, needs=_AVX512_NEEDS),
    "avx2vnni": InstructionSet(
        flags=("-DVECTOR_BYTES=32", *_AVX2_FLAGS, "-mavxvnni"), machines=X86, needs=frozenset({"avx2", "avx_vnni"})
    ),
    "avx2": InstructionSet(flags=("-DVECTOR_BYTES=32", *_AVX2_FLAGS), machines=X86, needs=frozenset({"avx2", "fma3"})),
    "dotprod": InstructionSet(
        flags=("-DVECTOR_BYTES=16", "-march=armv8.2-a+dotprod"), machines=ARM64, needs=frozenset({"dot"})
    ),
    "baseline": InstructionSet(flags=("-DVECTOR_BYTES=16",)),
}
"""Best first. The baseline is what every CPU of an architecture has: SSE2 on x86-64, NEON on arm64."""


def runnable_isas() -> tuple[str, ...]:
    """Names of `INSTRUCTION_SETS` that this CPU can run, best first."""
    machine, present = platform.machine(), _capabilities()
    return tuple(
        name
        for name, isa in INSTRUCTION_SETS.items()
        if (isa.machines is None or machine in isa.machines) and isa.needs <= present
    )


def best_isa() -> str:
    return runnable_isas()[0]


def _capabilities() -> frozenset[str]:
    listed: Mapping[str, Any] | None = getattr(torch.cpu, "get_capabilities", dict)()
    if listed:
        return frozenset(name for name, value in listed.items() if value is True)
    # An older torch knows three levels.
    level = torch.backends.cpu.get_cpu_capability()
    avx2 = {"avx2", "fma3"} if level in {"AVX2", "AVX512"} else set()
    return frozenset(avx2 | (_AVX512_NEEDS if level == "AVX512" else set()))
