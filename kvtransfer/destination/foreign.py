"""Staging regions for sources whose pools are unlike ours.

A transport lands blocks as they are. So the blocks of such a source are read into a region of its own shape, verified
there, and only then converted into our pool, by our own process:

    source's pool ═══ any transport ═══▶ staging region ── Executor ──▶ our pool
                                         verified here      other ranks, other block size, other dtype

Sources of one shape share a region. It holds what one transfer may have in flight, whatever a prompt's length.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding
from kvtransfer.conversion.executor import Executor, PoolView
from kvtransfer.conversion.planner import Piece
from kvtransfer.conversion.tokens import Segment, TokenPlan
from kvtransfer.deadline import Deadline
from kvtransfer.destination.our_pool import OurPool
from kvtransfer.destination.our_transports import OurTransports
from kvtransfer.region import Region
from kvtransfer.staging import StagingBlocks
from kvtransfer.transport import ReadStop

SHAPES_MAX: Final = 16
"""Of pools unlike ours that we talk to. A pipeline of that many stages, each with layers of its own."""
_PARTS: Final = 4
"""A transfer takes so large a share of its region at a time: others read meanwhile, and a part fits into caches."""


class StagingRegion:
    """Shared by all sources of one shape. Its memory is taken from the system as it is first used."""

    def __init__(self, layout: KVLayout, ours: OurTransports) -> None:
        """`layout` is a source's, with as many blocks as are to be staged."""
        self.layout = layout
        self.region = Region.allocate(layout.pool_bytes)
        self.blocks = StagingBlocks(layout.num_blocks)
        self.view = PoolView(self.region.buffer, layout)
        self.transports = OurTransports(
            dataclasses.replace(ours.us, region=self.region, layout=layout), ours.preference
        )


class ForeignPools:
    """Lives on one event loop. Regions stay until `close`: a source that comes back finds its own."""

    def __init__(self, ours: KVHolding, transports: OurTransports, *, part_tokens: int) -> None:
        """`part_tokens` of a source, at most and but for one block at least, are staged at a time."""
        self._ours = ours
        self._transports = transports
        self._part_tokens = part_tokens
        self._regions: dict[KVLayout, StagingRegion] = {}

    def staging_for(self, source: KVHolding) -> StagingRegion | None:
        """None for a source whose blocks are ours, byte for byte. Raises TransferError for one shape too many."""
        if source.is_like(self._ours):
            return None
        num_blocks = max(1, self._part_tokens // source.layout.block_size)
        layout = dataclasses.replace(source.layout, num_blocks=num_blocks)
        if layout not in self._regions:
            if len(self._regions) >= SHAPES_MAX:
                raise TransferError(f"pools of {SHAPES_MAX} other shapes are converted already")
            self._regions[layout] = StagingRegion(layout, self._transports)
        return self._regions[layout]

    def close(self) -> None:
        """The caller has ended its pulls, and every link into these regions is closed."""
        for staging in self._regions.values():
            staging.region.close()
        self._regions.clear()


class Converting:
    """A `LandingPlace`: verified blocks are converted into our pool before their part is over.

    What is landed is named by its number among the source's blocks of the prompt, not by a block of ours.
    """

    is_final: Final = False

    def __init__(
        self, staging: StagingRegion, ours: OurPool, pieces: Sequence[Piece], tokens: TokenPlan, table: Sequence[int]
    ) -> None:
        self._blocks = staging.blocks
        self._ours = ours
        self._executor = Executor(staging.view, ours.view, pieces)
        self._tokens = tokens
        self._table = table

    @property
    def part_blocks_max(self) -> int:
        return max(1, self._blocks.num_blocks // _PARTS)

    @contextlib.contextmanager
    def receiving(
        self, into: Sequence[int], *, layers: range, stop: ReadStop, deadline: Deadline
    ) -> Iterator[Sequence[int]]:
        staged = self._blocks.take(len(into), stop=stop, deadline=deadline)
        try:
            stop.check()
            yield staged
            segments = [
                (block, segment)
                for block, number in zip(staged, into, strict=True)
                for segment in self._tokens.segments(number)
            ]
            touched = list(dict.fromkeys(segment.into_block for _, segment in segments))
            for begin in range(0, len(touched), self._ours.blocks_max):
                chosen = touched[begin : begin + self._ours.blocks_max]
                blocks = [self._table[number] for number in chosen]
                with self._ours.writing(blocks, stop=stop, deadline=deadline) as places:
                    self._convert(segments, dict(zip(chosen, places, strict=True)), layers, stop)
        finally:
            self._blocks.give_back(staged)

    def _convert(
        self, segments: Sequence[tuple[int, Segment]], places: Mapping[int, int], layers: range, stop: ReadStop
    ) -> None:
        for block, segment in segments:
            if segment.into_block in places:
                stop.check()
                self._executor.convert(block, segment, places[segment.into_block], layers)
