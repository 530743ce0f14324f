"""Which server a conversation lives on: by its name, or by how its prompts begin. Bounded, and forgotten with time."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from disaggregated.block_hash import BlockHash


class SessionTable:
    """From a session's name to an instance, for `ttl_s` after its last request.

    Invariant: at most `sessions_max` entries, the one used last at the end. When full, the one that was not used for
    longest is forgotten.
    """

    def __init__(self, *, sessions_max: int, ttl_s: float) -> None:
        self._sessions_max = sessions_max
        self._ttl_s = ttl_s
        self._entries: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, session: str, *, now_s: float) -> str | None:
        """Its instance; None for a new session, or one that nobody has used for too long."""
        found = self._entries.get(session)
        if found is None:
            return None
        instance_id, expires_s = found
        if expires_s <= now_s:
            del self._entries[session]
            return None
        return instance_id

    def bind(self, session: str, instance_id: str, *, now_s: float) -> None:
        self._forget_old(now_s)
        self._entries[session] = (instance_id, now_s + self._ttl_s)
        self._entries.move_to_end(session)
        if len(self._entries) > self._sessions_max:
            self._entries.popitem(last=False)

    def _forget_old(self, now_s: float) -> None:
        """In constant time a call, on average: they stand in the order in which they expire."""
        while self._entries and next(iter(self._entries.values()))[1] <= now_s:
            self._entries.popitem(last=False)


class BeginningTable:
    """From the beginnings of prompts to the instance that each was last sent to; a block's hash stands for all of the
    prompt up to its end.

    Invariant: at most `blocks_max` entries; where the end of a beginning is known, so is every block before it.
    """

    def __init__(self, *, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._entries: OrderedDict[BlockHash, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def deepest(self, hashes: Sequence[BlockHash]) -> tuple[int, str]:
        """How many of these blocks have been seen, from the first on, and where the last of them was sent."""
        depth = bisect_left(range(len(hashes)), 1, key=lambda index: int(hashes[index] not in self._entries))
        return (depth, self._entries[hashes[depth - 1]]) if depth else (0, "")

    def sent(self, hashes: Sequence[BlockHash], instance_id: str) -> None:
        """Of a prompt with more blocks than fit, only the beginning is kept."""
        for block_hash in reversed(hashes[: self._blocks_max]):  # A beginning is used later than its end, so it stays.
            self._entries[block_hash] = instance_id
            self._entries.move_to_end(block_hash)
        while len(self._entries) > self._blocks_max:
            self._entries.popitem(last=False)
