"""The C functions of `csrc/`, compiled at first use and called through ctypes, which lets go of the interpreter lock.

Without a C compiler there is no library, one log line says so, and checksums take a second pass over the bytes.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, Final

from disaggregated import logs, native_build
from disaggregated.native_build import NativeUnavailable

log = logs.get(__name__)

SOURCES: Final = Path(__file__).parent / "csrc"
ISAS: Final = ("plain", "avx2", "avx512")
"""In the order of `choose_isa` in csrc/blocks.c. One library holds them all; the CPU decides."""
CHECKSUM_WORDS: Final = 32
"""Of one running checksum, `checksum` in csrc/xxh3.h: 64 bits each, all 0 at first."""
TAKEN_WORD: Final = 9
"""Where it counts the bytes that have come."""
VALUE_WORD: Final = 10
"""Where its value is, once all have."""
VARIABLE: Final = "DISAGG_TRANSFER_ISA"
"""One of ISAS, or `none` for no native code at all."""


class Outcome(enum.IntEnum):
    """What a function says; a negative number is an errno."""

    DONE = 0
    STOPPED = 1
    UNSOUND = 2
    CLOSED = 3
    LATE = 4


_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "choose_isa": (c_int64, [c_int64]),
    "checksum_bytes": (c_int64, []),
    "take_blocks": (c_int64, [c_void_p, c_void_p, c_void_p]),
    "receive_blocks": (c_int64, [c_int, c_void_p, c_void_p, c_double]),
    "send_blocks": (c_int64, [c_int, c_void_p, c_double]),
    "put_blocks": (c_int64, [c_void_p, c_void_p, c_int64, c_void_p, c_int64]),
    "look_out": (c_int64, [c_int, c_double]),
    "convert_rows": (c_int64, [c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64]),
}
"""Return type and arguments of each function; csrc/ says what they mean."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """None, with the reason logged, when this machine has none."""
    chosen = os.environ.get(VARIABLE, ISAS[-1])
    if chosen == "none":
        return None
    try:
        return opened(chosen)
    except NativeUnavailable as error:
        log.warning("kv_native_copy_unavailable", reason=str(error))
        return None


def opened(isa: str = ISAS[-1]) -> ctypes.CDLL:
    """The library, using `isa` or the best below it that this CPU has. Raises NativeUnavailable."""
    if isa not in ISAS:
        raise NativeUnavailable(f"{VARIABLE}: {isa} is none of none, {', '.join(ISAS)}")
    path = native_build.compiled(SOURCES, "kvtransfer", native_build.COMMON_FLAGS)
    found = native_build.loaded(path, _SIGNATURES)
    assert found.checksum_bytes() == 8 * CHECKSUM_WORDS, "library.py and csrc/xxh3.h disagree"
    found.choose_isa(ISAS.index(isa))
    return found
