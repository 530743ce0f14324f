"""What a block of the cache stands for, and the news about it: which blocks became findable, which are gone.

A router that knows which server holds which beginning of a prompt sends the next one there. So every change is noted,
in order and numbered. The log between two steps is bounded: when it overflows it forgets, the numbers show the gap,
and whoever follows asks for everything once more.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from disaggregated.block_hash import BlockHash

_FIRST_PRIVATE: Final = 1 << 128
"""Content hashes have 128 bits: a key from here on is nobody's content hash."""


class Tier(enum.IntEnum):
    """Where a block lies. The numbers are those of the protocol."""

    DEVICE = 0
    HOST = 1


class BlockLabel(NamedTuple):
    """What a full block holds: the tokens that its hash stands for, after those of its parent."""

    block_hash: BlockHash
    parent: BlockHash | None
    """The block just before it; None for the first of a sequence."""
    depth: int
    """Blocks before it in its sequence."""

    @property
    def is_private(self) -> bool:
        """Found by one sequence alone, which was swapped out: not by its content, and no news to anybody."""
        return self.block_hash >= _FIRST_PRIVATE


def private_label(number: int, depth: int) -> BlockLabel:
    """A label that no content has. Two with the same number are the same."""
    return BlockLabel(BlockHash(_FIRST_PRIVATE + number), None, depth)


class BlockEvent(NamedTuple):
    label: BlockLabel
    tier: Tier
    is_added: bool
    """False: it is gone from that tier. It may still be in the other one."""


class BlockEventBatch(NamedTuple):
    """What happened in a step."""

    first_number: int
    """Of `events[0]`. One that is larger than the number after the batch before says that some were lost."""
    events: tuple[BlockEvent, ...]

    @property
    def next_number(self) -> int:
        return self.first_number + len(self.events)


class BlockSnapshot(NamedTuple):
    """Every findable block, between two steps."""

    next_number: int
    """Of the first event that is not in here yet."""
    blocks: tuple[tuple[BlockLabel, Tier], ...]


class BlockEventLog:
    """What has changed since the last drain(). Constant time an event; not thread-safe.

    Invariant: it holds the latest events without a gap, at most `num_events_max` of them; `next_number` counts all
    that ever were.
    """

    def __init__(self, num_events_max: int) -> None:
        """num_events_max: 0 keeps nothing, for an engine that nobody follows."""
        self.num_events_max = num_events_max
        self.next_number = 0
        self._events: list[BlockEvent] = []

    def note(self, label: BlockLabel, tier: Tier, *, is_added: bool) -> None:
        if label.is_private or not self.num_events_max:
            return
        if len(self._events) == self.num_events_max:
            self._events.clear()
        self._events.append(BlockEvent(label, tier, is_added))
        self.next_number += 1

    def drain(self) -> BlockEventBatch:
        """What there is; it is the caller's then. Maybe empty."""
        events = tuple(self._events)
        self._events.clear()
        return BlockEventBatch(self.next_number - len(events), events)
