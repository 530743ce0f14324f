"""A device that works on its own: it does what it is given in that order, and as late as a test likes.

So whatever frees a block while a launched step still writes into it, or copies one before it is written, shows as a
wrong token, or as KV where none should be.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

from disaggregated.engine.api import PLACEHOLDER, ScheduledSequence, TokenMask
from disaggregated.engine.host_tier.copies import BlockCopy, Direction
from tests.support.fake_runner import FakeModelRunner, Slot


class FakeDevice(FakeModelRunner):
    """Implements `OverlappingRunner`, and as any runner may be told to execute() at once."""

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_tokens: int = 10**9, max_batch_size: int = 10**9
    ) -> None:
        super().__init__(
            num_blocks=num_blocks, block_size=block_size, max_num_tokens=max_num_tokens, max_batch_size=max_batch_size
        )
        self.is_late: Callable[[], bool] = lambda: True
        """Asked for each thing given: whether it is left until somebody waits for it."""
        self.num_launched = 0
        self._unfinished: list[Launched] = []
        self._work: deque[Callable[[], object]] = deque()

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        self.catch_up()
        return super().execute(batch)

    def launch(self, batch: Sequence[ScheduledSequence]) -> Launched:
        assert len(self._unfinished) < 2, "three steps are under way"
        rows = [dataclasses.replace(row, block_table=tuple(row.block_table), masks=_made(row)) for row in batch]
        step = Launched(self, rows, self._unfinished[-1] if self._unfinished else None)
        self.num_launched += 1
        self._unfinished.append(step)
        self.give(step.compute)
        return step

    def give(self, work: Callable[[], object]) -> None:
        self._work.append(work)
        if not self.is_late():
            self.catch_up()

    def catch_up(self) -> None:
        while self._work:
            self._work.popleft()()

    def compute(self, rows: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        return super().execute(rows)

    def finished(self, step: Launched) -> None:
        assert self._unfinished[0] is step, "steps are finished out of order"
        del self._unfinished[0]
        while step.sampled is None:
            self._work.popleft()()


class Launched:
    """Implements `PendingStep`."""

    def __init__(self, device: FakeDevice, rows: list[ScheduledSequence], before: Launched | None) -> None:
        self._device = device
        self._rows = rows
        self._before = before
        self.sampled: Sequence[Sequence[int]] | None = None

    def compute(self) -> None:
        self.sampled = self._device.compute([self._resolved(row) for row in self._rows])
        self._before = None

    def tokens(self) -> Sequence[Sequence[int]]:
        self._device.finished(self)
        assert self.sampled is not None
        return self.sampled

    def _resolved(self, row: ScheduledSequence) -> ScheduledSequence:
        if row.previous_row is None:
            return row
        assert list(row.token_ids) == [PLACEHOLDER], f"{row} waits for a token that it has"
        assert self._before is not None, f"{row} waits for no step"
        assert self._before.sampled is not None, f"{row} waits for a step that was not done first"
        (token_id,) = self._before.sampled[row.previous_row]
        return dataclasses.replace(row, token_ids=[token_id], previous_row=None)


class FakeHostMemory:
    """Implements `BlockCopier` on the device's own queue."""

    def __init__(self, device: FakeDevice, *, num_slots: int) -> None:
        self.num_slots = num_slots
        self._device = device
        self._kept: list[list[Slot | None]] = [[] for _ in range(num_slots)]

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        self._device.give(lambda: self._carry_out(copies))

    def wait(self) -> None:
        self._device.catch_up()

    def _carry_out(self, copies: Sequence[BlockCopy]) -> None:
        size, slots = self._device.block_size, self._device.slots
        for direction, block_id, slot in copies:
            here = slice(block_id * size, (block_id + 1) * size)
            if direction is Direction.OFFLOAD:
                self._kept[slot] = slots[here]
            else:
                assert len(self._kept[slot]) == size, f"slot {slot} of the host tier was never written"
                slots[here] = self._kept[slot]


def _made(row: ScheduledSequence) -> Callable[[], Sequence[TokenMask | None]] | None:
    """A real device is given the masks with its work, however late it does it."""
    if row.masks is None:
        return None
    masks = row.masks()
    return lambda: masks
