"""Scattered blocks as few contiguous runs: a pool hands out neighbours often, and each run is one copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from disaggregated.kv_layout import KVLayout


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Blocks `first … first + count - 1` of one pool."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


@dataclasses.dataclass(frozen=True, slots=True)
class RunPair:
    """`count` blocks that are neighbours on both sides."""

    source: int
    into: int
    count: int


def runs(block_ids: Sequence[int]) -> tuple[Run, ...]:
    """`block_ids` in order, adjacent ones joined."""
    if len(block_ids) == 1:  # What a small read asks for.
        return (Run(block_ids[0], 1),)
    return tuple(Run(pair.source, pair.count) for pair in run_pairs(block_ids, block_ids))


def block_ids_of(block_runs: Sequence[Run]) -> list[int]:
    """The blocks that were joined to these runs, in order."""
    return [block_id for run in block_runs for block_id in range(run.first, run.end)]


def run_pairs(source: Sequence[int], into: Sequence[int]) -> Iterator[RunPair]:
    """`source[i]` goes to `into[i]`; neighbours on both sides become one copy."""
    assert len(source) == len(into), f"{len(source)} blocks into {len(into)}"
    begin = 0
    for end in range(1, len(source) + 1):
        joined = end < len(source) and source[end] == source[end - 1] + 1 and into[end] == into[end - 1] + 1
        if not joined:
            yield RunPair(source[begin], into[begin], end - begin)
            begin = end


def views(pool: memoryview, layout: KVLayout, block_runs: Sequence[Run], layers: range) -> list[memoryview]:
    """The bytes of `block_runs` in each of `layers`, layer by layer: what goes over a wire, or comes from it."""
    found = []
    for layer in layers:
        for run in block_runs:
            begin = layout.offset(layer, run.first)
            found.append(pool[begin : begin + run.count * layout.block_bytes])
    return found
