"""The C functions of `csrc/`, compiled at first use and called through ctypes.

Without a C compiler there is no library, one log line says so, and every token takes the way through Python.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import c_char_p, c_double, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final

from disaggregated import logs, native_build
from disaggregated.native_build import NativeUnavailable

log = logs.get(__name__)

SOURCES: Final = Path(__file__).parent / "csrc"
VARIABLE: Final = "DISAGG_FAN_OUT"
"""`none`: no native code."""

# As csrc/fan_out.c has them.
PENDING_MAX: Final = 128
EVENT_MAX: Final = 8192

_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "make_spellings": (c_void_p, []),
    "free_spellings": (None, [c_void_p]),
    "learn": (c_int64, [c_void_p, c_int64, c_char_p, c_int64]),
    "learn_all": (c_int64, [c_void_p, c_void_p, c_void_p, c_char_p, c_int64]),
    "make_fan_out": (c_void_p, []),
    "free_fan_out": (None, [c_void_p]),
    "open_lane": (
        c_void_p,
        [c_void_p, c_uint64, c_int64, c_void_p, c_char_p, c_int64, c_char_p, c_int64, c_int64],
    ),
    "close_lane": (None, [c_void_p, c_void_p]),
    "go_on": (None, [c_void_p, c_int64, c_int64, c_double, c_double]),
    "shut": (None, [c_void_p]),
    "take_tokens": (c_int64, [c_void_p, c_void_p, c_void_p]),
    "take_rest": (c_int64, [c_void_p, c_void_p]),
    "deliver": (c_int64, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_double, c_void_p]),
}
"""Return type and arguments of each function; csrc/ says what they mean."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """None, with the reason logged, when this machine has none."""
    if os.environ.get(VARIABLE) == "none":
        return None
    try:
        return opened()
    except NativeUnavailable as error:
        log.warning("fan_out_unavailable", reason=str(error))
        return None


def opened() -> ctypes.CDLL:
    """Raises NativeUnavailable."""
    path = native_build.compiled(SOURCES, "fan_out", native_build.COMMON_FLAGS)
    return native_build.loaded(path, _SIGNATURES)
