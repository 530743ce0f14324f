"""Compiles the kernels in `csrc/` for one instruction set: at first use, in a few seconds, or ahead of time by

python -m disaggregated.engine.ops.native_build [ISA…]

Nothing here is required: without a compiler the engine runs on torch's own kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from disaggregated import native_build
from disaggregated.engine.ops.native_isa import INSTRUCTION_SETS, best_isa
from disaggregated.native_build import NativeUnavailable

SOURCES: Final = Path(__file__).parent / "csrc"

FLAGS: Final = (*native_build.COMMON_FLAGS, "-fno-math-errno", "-ffp-contract=fast")
"""No -ffast-math: it lets the compiler choose the order of sums."""


def library(isa: str) -> Path:
    """The shared library for one instruction set. Raises NativeUnavailable."""
    return native_build.compiled(SOURCES, f"kernels-{isa}", (*FLAGS, *INSTRUCTION_SETS[isa].flags))


def main() -> int:
    isas = sys.argv[1:] or [best_isa()]
    for isa in isas:
        if isa not in INSTRUCTION_SETS:
            print(f"unknown instruction set {isa}; there are {', '.join(INSTRUCTION_SETS)}", file=sys.stderr)  # noqa: T201
            return 2
        try:
            print(library(isa))  # noqa: T201
        except NativeUnavailable as error:
            print(f"no native kernels: {error}", file=sys.stderr)  # noqa: T201
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
