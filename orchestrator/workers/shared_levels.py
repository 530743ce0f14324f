"""The quotas' levels of all workers, in one piece of memory: a key's minute is the same minute wherever it asks.

A table with open addressing: a row holds the hash of a bucket's name, its amount and the moment it was true. A lock of
the kernel's on the memory's file keeps two workers from changing a row at a time; it goes with the process that holds
it. A worker that is stopped while it holds the lock must not stop the others: after some milliseconds they change the
row without it, at the worst losing one charge.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import time
from typing import Final

from orchestrator.admission.quotas import Change, Level

_ROW: Final = struct.Struct("<Qdd")
_NUM_ROWS: Final = 32_768
"""Two for each key that a file may hold, and room to spare."""
_LOCK_TIMEOUT_S: Final = 0.005
"""The event loop waits for it. Whoever holds the lock is done in microseconds, unless it is stopped or starved."""
_PROBES_MAX: Final = 256
"""After so many rows of others, a bucket shares the row it came to first; that is as unlikely as it is harmless."""


def make_levels_memory() -> int:
    """A descriptor that children inherit by name; the caller closes it."""
    fd = os.memfd_create("disagg-quotas", 0)
    os.ftruncate(fd, _ROW.size * _NUM_ROWS)
    return fd


class SharedLevels:
    """`Levels` in the memory behind `fd`, which stays open as long as this is used."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._memory = mmap.mmap(fd, _ROW.size * _NUM_ROWS)

    def update(self, name: str, change: Change) -> Level:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little") | 1
        is_locked = self._lock()
        try:
            offset = self._row_of(key)
            found, amount, at_s = _ROW.unpack_from(self._memory, offset)
            level = change(Level(amount, at_s) if found else None)
            _ROW.pack_into(self._memory, offset, key, level.amount, level.at_s)
            return level
        finally:
            if is_locked:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _row_of(self, key: int) -> int:
        first = key % _NUM_ROWS
        for probe in range(_PROBES_MAX):
            offset = (first + probe) % _NUM_ROWS * _ROW.size
            (found,) = struct.unpack_from("<Q", self._memory, offset)
            if found in (0, key):
                return offset
        return first * _ROW.size

    def _lock(self) -> bool:
        deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    return False
                os.sched_yield()
            else:
                return True

    def close(self) -> None:
        self._memory.close()
