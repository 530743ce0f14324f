"""Compiles the C kernels in `csrc/`, once for each compiler, instruction set and version of the sources.

That happens at first use, in a few seconds, or by `python -m disaggregated.engine.ops.native_build [ISA…]`. The library
goes into `$DISAGG_CACHE_DIR/native/` (by default `~/.cache/disaggregated/native/`), into a folder named after all that
decides what it contains: it never has to be invalidated, and versions and machines can share one cache. Nothing here
is required: without a compiler the engine runs on torch's own kernels.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from disaggregated.engine.ops.native_isa import INSTRUCTION_SETS, best_isa

SOURCES: Final = Path(__file__).parent / "csrc"
COMPILE_TIMEOUT_S: Final = 120.0
VERSION_TIMEOUT_S: Final = 10.0

COMMON_FLAGS: Final = (
    "-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"
)  # fmt: skip
"""No -ffast-math: it lets the compiler choose the order of sums."""


class NativeUnavailable(Exception):
    """No library for this machine; the message says why and what would help."""


def library(isa: str) -> Path:
    """The shared library for one instruction set, compiled now if it is not in the cache.

    Raises:
        NativeUnavailable: no compiler, an unwritable cache, or the sources do not compile.
    """
    compiler = find_compiler()
    flags = (*COMMON_FLAGS, *INSTRUCTION_SETS[isa].flags)
    path = cache_dir() / _fingerprint(compiler, flags) / f"kernels-{isa}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / ".lock"):
            if not path.exists():
                _compile(compiler, flags, path)
    except OSError as error:
        raise NativeUnavailable(
            f"{path.parent} is not writable ({error}); set DISAGG_CACHE_DIR to a folder that is"
        ) from error
    return path


def cache_dir() -> Path:
    root = os.environ.get("DISAGG_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "disaggregated") / "native"


def find_compiler() -> tuple[str, ...]:
    """The command of a C compiler: $CC if it is set, else the first of cc, gcc and clang."""
    chosen = os.environ.get("CC")
    for command in (chosen,) if chosen else ("cc", "gcc", "clang"):
        words = tuple(shlex.split(command))
        if words and shutil.which(words[0]):
            return words
    missing = f"$CC is {chosen!r}, which is not there" if chosen else "none of cc, gcc and clang is there"
    raise NativeUnavailable(f"no C compiler ({missing}); install one, e.g. `apt-get install gcc libc6-dev`")


def _fingerprint(compiler: tuple[str, ...], flags: tuple[str, ...]) -> str:
    """Of all that decides what the library contains."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    for word in (*compiler, _version(compiler), *flags, platform.machine(), platform.system()):
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:16]


def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"], VERSION_TIMEOUT_S)


def _compile(compiler: tuple[str, ...], flags: tuple[str, ...], path: Path) -> None:
    """Compile beside `path` and rename: whoever looks sees the whole library or none."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        compiled = Path(scratch) / path.name
        sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
        _run([*compiler, *flags, *sources, "-o", str(compiled), "-lm"], COMPILE_TIMEOUT_S)
        compiled.rename(path)


def _run(command: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{shlex.join(command)}: {error}") from error
    if done.returncode != 0:
        raise NativeUnavailable(f"{shlex.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Servers that start together compile once. Held for COMPILE_TIMEOUT_S at most; who dies lets go of it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
