"""Compiles a folder of C into a shared library, once for each compiler, flags and version of the sources.

The library goes into `$DISAGG_CACHE_DIR/native/` (by default `~/.cache/disaggregated/native/`), into a folder named
after all that decides what it contains: it never has to be invalidated, and versions and machines can share one cache.
Nothing here is required: whoever has C kernels has another way, too, and takes it on NativeUnavailable.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

COMPILE_TIMEOUT_S: Final = 120.0
VERSION_TIMEOUT_S: Final = 10.0

COMMON_FLAGS: Final = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")


class NativeUnavailable(Exception):
    """No library for this machine; the message says why and what would help."""


def compiled(sources: Path, name: str, flags: tuple[str, ...]) -> Path:
    """`name`.so, made of every .c in `sources`; compiled now if it is not in the cache.

    Raises:
        NativeUnavailable: no compiler, an unwritable cache, or the sources do not compile.
    """
    compiler = find_compiler()
    path = cache_dir() / _fingerprint(compiler, flags, sources) / f"{name}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / ".lock"):
            if not path.exists():
                _compile(compiler, flags, sources, path)
    except OSError as error:
        raise NativeUnavailable(
            f"{path.parent} is not writable ({error}); set DISAGG_CACHE_DIR to a folder that is"
        ) from error
    return path


def loaded(path: Path, signatures: Mapping[str, tuple[Any, list[Any]]]) -> ctypes.CDLL:
    """`signatures`: return type and arguments of each function. Raises NativeUnavailable when the file is not a library
    of this machine."""
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path}: {error}; delete it to have it compiled again") from error
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


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


def _fingerprint(compiler: tuple[str, ...], flags: tuple[str, ...], sources: Path) -> str:
    """Of all that decides what the library contains."""
    digest = hashlib.sha256()
    for source in sorted(sources.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    for word in (*compiler, _version(compiler), *flags, platform.machine(), platform.system()):
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:16]


def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"], VERSION_TIMEOUT_S)


def _compile(compiler: tuple[str, ...], flags: tuple[str, ...], sources: Path, path: Path) -> None:
    """Compile beside `path` and rename: whoever looks sees the whole library or none."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        files = [str(source) for source in sorted(sources.glob("*.c"))]
        _run([*compiler, *flags, *files, "-o", str(made), "-lm"], COMPILE_TIMEOUT_S)
        made.rename(path)


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
