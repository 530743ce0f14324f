"""Which blocks a server can be asked for, as its WatchBlocks stream tells. Pure; constant time a block.

A block is known by 62 bits of its hash, which is enough for a hint: two that are taken for each other cost one question
in vain, once in a very long while. They lie in one array of 8-byte words, an open-addressing table with linear probing
and deletion by shifting back (Knuth, The Art of Computer Programming 3, 6.4, algorithm R). So the memory of a server is
known to the byte, and bounded: when the table is full, further blocks are not taken in.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from disaggregated.block_hash import BlockHash
from disaggregated.v1 import control_pb2

SLOTS_MIN: Final = 1 << 10
SLOTS_MAX: Final = 1 << 20
"""8 MiB a server, for 700,000 blocks."""
_TIERS: Final = 0b11
"""The lowest bits of a word: in which tiers the block lies. The others are those of its hash."""
_HASH: Final = ~_TIERS


class BlockTable:
    """From the hash of a block to a set of tiers, which is never empty for one that is here.

    Invariant: at most two thirds of the slots are used; a word is reached from its own slot without meeting a free one.
    """

    def __init__(self, *, slots_max: int = SLOTS_MAX) -> None:
        """slots_max: a power of two."""
        assert slots_max & (slots_max - 1) == 0, f"{slots_max} slots are not a power of two"
        self._slots_max = slots_max
        self.clear()

    def __len__(self) -> int:
        return self._num_used

    @property
    def num_bytes(self) -> int:
        return len(self._words) * self._words.itemsize

    def clear(self) -> None:
        self._words = array("Q", bytes(8 * min(SLOTS_MIN, self._slots_max)))
        self._num_used = 0

    def __contains__(self, key: int) -> bool:
        words = self._words
        mask = len(words) - 1
        slot = (key >> 2) & mask
        while word := words[slot]:
            if word & _HASH == key:
                return True
            slot = (slot + 1) & mask
        return False

    def add(self, key: int, tier: int) -> bool:
        """False when there is no room for another block."""
        slot = self._find(key)
        if not self._words[slot]:
            if 3 * (self._num_used + 1) > 2 * len(self._words):
                if len(self._words) == self._slots_max:
                    return False
                self._grow()
                slot = self._find(key)
            self._words[slot] = key
            self._num_used += 1
        self._words[slot] |= 1 << tier
        return True

    def remove(self, key: int, tier: int) -> None:
        """It is gone from this tier; nothing happens when it was not known there."""
        slot = self._find(key)
        self._words[slot] &= ~(1 << tier)
        if self._words[slot] & _HASH and not self._words[slot] & _TIERS:
            self._close_up(slot)
            self._num_used -= 1

    def check_integrity(self) -> None:
        used = [word for word in self._words if word]
        assert len(used) == self._num_used, f"{self._num_used} counted, {len(used)} here"
        assert 3 * len(used) <= 2 * len(self._words), "the table is too full"
        for word in used:
            assert word & _TIERS, "a block that lies nowhere"
            assert self._words[self._find(word & _HASH)] == word, "a block that is not found"

    def _find(self, key: int) -> int:
        """Its slot, or the free one where it would go."""
        words = self._words
        mask = len(words) - 1
        slot = (key >> 2) & mask
        while (word := words[slot]) and word & _HASH != key:
            slot = (slot + 1) & mask
        return slot

    def _close_up(self, hole: int) -> None:
        """Free a slot, and move words back over it that would not be reached any more."""
        words = self._words
        mask = len(words) - 1
        slot = hole
        while True:
            words[hole] = 0
            while True:
                slot = (slot + 1) & mask
                if not words[slot]:
                    return
                home = (words[slot] >> 2) & mask
                if (slot - home) & mask >= (slot - hole) & mask:
                    break
            words[hole] = words[slot]
            hole = slot

    def _grow(self) -> None:
        old, self._words = self._words, array("Q", bytes(16 * len(self._words)))
        for word in old:
            if word:
                self._words[self._find(word & _HASH)] = word


class KnownBlocks:
    """Of one server, over one connection."""

    def __init__(self, *, slots_max: int = SLOTS_MAX) -> None:
        self._table = BlockTable(slots_max=slots_max)
        self._next_number = 0
        self.num_dropped = 0
        """Blocks for which there was no room."""
        self.num_blocks = 0
        """As `len`: asked of each server for each request."""
        self.is_followed = False
        """Its stream has begun: what is not known here is not there."""
        self._may_have_gaps = False

    def __len__(self) -> int:
        return self.num_blocks

    @property
    def num_bytes(self) -> int:
        return self._table.num_bytes

    def clear(self) -> None:
        """The stream has ended: what was known holds no longer, and a next one begins anew."""
        self._table.clear()
        self.num_blocks = self._next_number = 0
        self.is_followed = self._may_have_gaps = False

    def apply(self, message: control_pb2.BlockEvents) -> bool:
        """False when a message is missing before this one: nothing is known any more."""
        if message.first_number != self._next_number:
            self.clear()
            return False
        if message.cleared:
            self._table.clear()
            self._may_have_gaps = False
        for event in message.events:
            key = _key(int.from_bytes(event.block_hash[:8], "big"))
            if event.kind == control_pb2.BlockEvent.REMOVED:
                self._table.remove(key, event.tier)
            elif not self._table.add(key, event.tier):
                self.num_dropped += 1
                self._may_have_gaps = True
            elif event.tier != control_pb2.BlockEvent.DEVICE:
                self._may_have_gaps = True
        self.num_blocks = len(self._table)
        self._next_number += len(message.events)
        self.is_followed = True
        return True

    def num_held(self, hashes: Sequence[BlockHash], num_max: int | None = None) -> int:
        """How many of these blocks, from the first one on without a gap, the server holds. num_max: more don't matter.

        On a device no block outlives the one before it, so a few questions are enough for a long prompt; what two tiers
        hold together, or a table that was full, may have gaps, and is counted.
        """
        if not self.num_blocks or not hashes:
            return 0
        table = self._table
        end = len(hashes) if num_max is None or num_max > len(hashes) else num_max
        if end <= 0 or _key(hashes[0] >> 64) not in table:
            return 0
        if end == 1:
            return 1
        if not self._may_have_gaps:
            return bisect_left(range(end), 1, lo=1, key=lambda index: int(_key(hashes[index] >> 64) not in table))
        for index in range(1, end):
            if _key(hashes[index] >> 64) not in table:
                return index
        return end

    def check_integrity(self) -> None:
        self._table.check_integrity()
        assert self.num_blocks == len(self._table), f"{self.num_blocks} counted, {len(self._table)} in the table"


def _key(first_half: int) -> int:
    """Never 0, which stands for a free slot."""
    return (first_half & _HASH) or 1 << 2
