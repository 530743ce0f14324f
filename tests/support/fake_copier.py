"""A host tier that remembers what it was given, beside the pool of a `FakeModelRunner`."""

from __future__ import annotations

from collections.abc import Sequence

from disaggregated.engine.host_tier.copies import BlockCopy, Direction
from tests.support.fake_runner import FakeModelRunner, Slot


class FakeBlockCopier:
    """Implements `BlockCopier`."""

    def __init__(self, runner: FakeModelRunner, num_slots: int) -> None:
        self.num_slots = num_slots
        self.blocks: list[list[Slot | None] | None] = [None] * num_slots
        self.num_waits = 0
        self._runner = runner

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        size = self._runner.block_size
        for direction, block_id, slot in copies:
            here = slice(block_id * size, (block_id + 1) * size)
            if direction is Direction.OFFLOAD:
                self.blocks[slot] = self._runner.slots[here]
            else:
                kept = self.blocks[slot]
                assert kept is not None, f"slot {slot} is read before anything was written into it"
                self._runner.slots[here] = kept

    def wait(self) -> None:
        self.num_waits += 1
