"""What was worked out before, kept while there is room for it."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """Values of known size, together at most `size_max`: then those that were kept first are forgotten.

    Methods may be called from any thread. A look-up is one of a dictionary, and moves nothing: what is needed all the
    time is forgotten once in a while, and worked out again.
    """

    def __init__(self, size_max: int, *, entry_max: int) -> None:
        """`entry_max`: a larger value is not kept, because it would push out many others."""
        self._size_max = size_max
        self._entry_max = entry_max
        self._entries: dict[K, tuple[V, int]] = {}
        self._size = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def keep(self, key: K, value: V, *, size: int) -> None:
        if size > self._entry_max:
            return
        with self._lock:
            if key in self._entries:
                return  # Another thread was faster.
            self._entries[key] = value, size
            self._size += size
            while self._size > self._size_max:
                _, freed = self._entries.pop(next(iter(self._entries)))
                self._size -= freed
