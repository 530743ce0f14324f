"""What is measured, and how: contenders take turns within one run, so that a ratio compares minutes that are alike."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Sequence
from typing import Protocol

import psutil


class Contender(Protocol):
    """One way to move all blocks of a layout. Ready: connected, its memory touched."""

    @property
    def name(self) -> str: ...

    def pids(self) -> Sequence[int]:
        """Of every process that works for it, ours among them when it does."""

    async def prepare(self) -> None:
        """What comes before each transfer and is none of it: publishing, checksums of the source."""

    async def transfer(self) -> float:
        """Move all blocks once; seconds from the first block asked for to the last one there."""


@dataclasses.dataclass(slots=True)
class Samples:
    """One contender's transfers, in order."""

    name: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_s: list[float] = dataclasses.field(default_factory=list)
    """Of all its processes, in each transfer."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def gigabytes_per_s(self, num_bytes: int) -> float:
        return num_bytes / 1e9 / self.median_s

    def cpu_per_gigabyte(self, num_bytes: int) -> float:
        return statistics.median(self.cpu_s) / (num_bytes / 1e9)


async def take_turns(contenders: Sequence[Contender], num_rounds: int) -> dict[str, Samples]:
    """`num_rounds` transfers of each, one round after another; the round before them warms pages and connections up.

    Each round goes through them the other way round: who comes first has the memory as the last one left it.
    """
    found = {each.name: Samples(each.name) for each in contenders}
    for number in range(num_rounds + 1):
        for each in contenders if number % 2 else reversed(contenders):
            await each.prepare()
            before_s = cpu_seconds(each.pids())
            took_s = await each.transfer()
            used_s = cpu_seconds(each.pids()) - before_s
            if number > 0:
                found[each.name].seconds.append(took_s)
                found[each.name].cpu_s.append(used_s)
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of these processes so far; the kernel counts in hundredths of a second."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)


def ourselves() -> int:
    return os.getpid()
