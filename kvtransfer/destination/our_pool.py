"""Blocks of our own pool, to be written in part: a source's block is rarely one of ours when it is converted.

On a CPU the pool is memory like any other. In a device's memory a block is read into the staging region, written there,
and brought back; several sources may have parts of one block, so one at a time does that.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from kvtransfer.conversion.executor import PoolView
from kvtransfer.deadline import Deadline
from kvtransfer.staging import DeviceCopier, StagingBlocks
from kvtransfer.transport import ReadStop


class OurPool(Protocol):
    @property
    def view(self) -> PoolView:
        """Of the memory in which blocks are written."""

    @property
    def blocks_max(self) -> int:
        """That can be written at once."""

    def writing(
        self, blocks: Sequence[int], *, stop: ReadStop, deadline: Deadline
    ) -> contextlib.AbstractContextManager[Sequence[int]]:
        """Gives where in `view` these blocks are, each with what it holds. The pool has what was written there once it
        is left without an error."""


class HostPool:
    """The memory is the pool."""

    blocks_max = 1 << 30

    def __init__(self, view: PoolView) -> None:
        self.view = view

    @contextlib.contextmanager
    def writing(self, blocks: Sequence[int], *, stop: ReadStop, deadline: Deadline) -> Iterator[Sequence[int]]:
        yield blocks


class DevicePool:
    """Thread-safe. Shares `staging` with blocks that travel as they are."""

    def __init__(self, view: PoolView, staging: StagingBlocks, copier: DeviceCopier) -> None:
        """`view` is of the staging region."""
        self.view = view
        self.blocks_max = max(1, staging.num_blocks // 2)
        self._staging = staging
        self._copier = copier
        self._one_at_a_time = threading.Lock()

    @contextlib.contextmanager
    def writing(self, blocks: Sequence[int], *, stop: ReadStop, deadline: Deadline) -> Iterator[Sequence[int]]:
        staged = self._staging.take(len(blocks), stop=stop, deadline=deadline)
        try:
            with self._one_at_a_time:  # For as long as two copies take.
                stop.check()
                self._copier.to_host(blocks, staged)
                yield staged
                self._copier.to_device(staged, blocks)
        finally:
            self._staging.give_back(staged)
