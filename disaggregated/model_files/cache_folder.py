"""The folder where fetched and converted models are kept, shared by every process of this user.

Whoever comes first does the work under a file lock; the others wait for it and find the result. A result appears by
one rename, so a reader never sees half of one, and a process killed in the middle leaves only a `.partial` that the
next one clears away. Finding a finished result takes no lock and writes nothing: a filled cache may be read-only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from disaggregated.errors import ModelUnavailable

Progress = Callable[[str], None]
"""Is told what is being done, one line each, when something takes longer than a reader's patience."""


def cache_folder() -> Path:
    """DISAGG_CACHE_DIR, else `disaggregated` in XDG_CACHE_HOME, else in ~/.cache. It need not exist yet."""
    if chosen := os.environ.get("DISAGG_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "disaggregated"


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns what the operating system says about a folder that cannot be written to into one sentence that helps."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free some space" if error.errno == errno.ENOSPC else "make it writable"
        raise ModelUnavailable(
            f"cannot write to the model cache {folder} ({reason}): {advice}, or set DISAGG_CACHE_DIR to another folder"
        ) from error


@contextlib.contextmanager
def locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file `path`, which is made if need be and left behind.

    There is no deadline here: the kernel takes the lock from a holder that dies, and the holder's own work is bounded.
    """
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another process is preparing {path.stem}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_in_one_step(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `target` if the block succeeds and vanishes if it does not.

    Call it under the lock. An older `target` is replaced.
    """
    partial = target.with_name(target.name + ".partial")
    with writing_to(target.parent):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def file_in_one_step(target: Path) -> Iterator[Path]:
    """Yields the path of a file to write; it becomes `target` if the block succeeds. Call it under the lock."""
    partial = target.with_name(target.name + ".partial")
    with writing_to(target.parent):
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
