"""Pools that lie in a device's memory: their blocks travel by way of a smaller region of host memory.

    device pool ── to_host ──▶ staging region ═════ any transport ════▶ staging region ── to_device ──▶ device pool
    (source)                   published, checksummed                   verified, then copied on         (destination)

Everything else stays as it is: transports, checksums and leases know only the staging regions, whose blocks they name.
A source keeps the staging blocks of a transfer until it is released; a destination keeps them for one part of it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from disaggregated.errors import TransferTimeout
from kvtransfer.deadline import Deadline
from kvtransfer.transport import ReadStop


class DeviceCopier(Protocol):
    """Copies whole blocks between a device's pool and a staging region. Called from any thread; blocks it."""

    def to_host(self, device_blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """`device_blocks[i]` is in staging block `host_blocks[i]` when this returns."""

    def to_device(self, host_blocks: Sequence[int], device_blocks: Sequence[int], layers: range | None = None) -> None:
        """`host_blocks[i]` is in the pool's block `device_blocks[i]`, for every later step, when this returns.

        Of `layers` alone; None: of all.
        """


class StagingBlocks:
    """The free blocks of a staging region. Used from any thread.

    Invariant: a block is free or was taken once; those who wait are served in the order in which they came.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = set(range(num_blocks))
        self._queue: list[object] = []
        self._changed = threading.Condition()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def try_take(self, count: int) -> list[int] | None:
        """`count` blocks, the lowest first so that runs are long; None when there are too few, or others wait."""
        with self._changed:
            return None if self._queue or count > len(self._free) else self._take(count)

    def take(self, count: int, *, stop: ReadStop, deadline: Deadline) -> list[int]:
        """Blocks the calling thread. Raises TransferTimeout, ReadStopped."""
        assert count <= self.num_blocks, f"{count} of {self.num_blocks} staging blocks"
        with stop.waking(self._wake), self._changed:
            ticket = object()
            self._queue.append(ticket)
            try:
                is_served = self._changed.wait_for(
                    lambda: stop.is_requested or (self._queue[0] is ticket and count <= len(self._free)),
                    deadline.left_s(),
                )
                stop.check()
                if not is_served:
                    raise TransferTimeout(f"no {count} of {self.num_blocks} staging blocks came free in time")
                return self._take(count)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def give_back(self, blocks: Sequence[int]) -> None:
        with self._changed:
            assert self._free.isdisjoint(blocks), "a staging block came back twice"
            self._free.update(blocks)
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _take(self, count: int) -> list[int]:
        taken = sorted(self._free)[:count]
        self._free.difference_update(taken)
        return taken


class LandingPlace(Protocol):
    """Where blocks are read to before they are the engine's."""

    @property
    def part_blocks_max(self) -> int:
        """Blocks that can be received in one part."""

    @property
    def is_final(self) -> bool:
        """What is read is where it stays. Elsewhere it lies in between until its block is verified, in all the layers
        that were published together: no less than that is under way at once."""

    def receiving(
        self, into: Sequence[int], *, layers: range, stop: ReadStop, deadline: Deadline
    ) -> contextlib.AbstractContextManager[Sequence[int]]:
        """Gives blocks of the region to read `layers` into and verify them in. When it is left without an error, `into`
        of the pool holds them; when it is left at all, nothing will be written any more."""


class InPlace:
    """The region is the pool."""

    part_blocks_max: Final = 1 << 30
    is_final: Final = True

    @contextlib.contextmanager
    def receiving(
        self, into: Sequence[int], *, layers: range, stop: ReadStop, deadline: Deadline
    ) -> Iterator[Sequence[int]]:
        yield into


class Staged:
    """The region is a staging region: verified blocks go on to the device before their part is over."""

    is_final: Final = False

    def __init__(self, blocks: StagingBlocks, copier: DeviceCopier) -> None:
        self._blocks = blocks
        self._copier = copier

    @property
    def part_blocks_max(self) -> int:
        return self._blocks.num_blocks

    @contextlib.contextmanager
    def receiving(
        self, into: Sequence[int], *, layers: range, stop: ReadStop, deadline: Deadline
    ) -> Iterator[Sequence[int]]:
        host_blocks = self._blocks.take(len(into), stop=stop, deadline=deadline)
        try:
            stop.check()
            yield host_blocks
            stop.check()
            self._copier.to_device(host_blocks, into, layers)
        finally:
            self._blocks.give_back(host_blocks)
