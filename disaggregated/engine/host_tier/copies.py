"""What has to be copied between the KV pool and the host tier, and who does it.

The books decide, and note one copy after the other; the copies are carried out later, before anything else touches the
pool. Because they are carried out in the order in which they were decided, a slot or a block may change hands several
times within a step: each copy still reads what was there when it was decided.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Direction(enum.Enum):
    OFFLOAD = "offload"
    """Pool to host."""
    ONBOARD = "onboard"
    """Host to pool."""


class BlockCopy(NamedTuple):
    """One block of all layers."""

    direction: Direction
    block_id: int
    """In the pool."""
    slot: int
    """In the host tier."""


class BlockCopier(Protocol):
    """Owned by the engine's thread."""

    @property
    def num_slots(self) -> int:
        """Places for a block of all layers."""

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Carry the copies out one after the other, after all earlier ones and before whatever the engine runs next.

        They may be under way when this returns, as long as that order holds: on a CUDA device the engine's stream
        keeps it.
        """

    def wait(self) -> None:
        """Return when every copy is done, also for those who do not follow the engine's order: a transfer may write
        into the blocks that were copied from."""
