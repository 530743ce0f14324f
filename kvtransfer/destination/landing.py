"""The blocking half of a pull, on a worker thread: read blocks in bounded parts, and verify each where it lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

from disaggregated.errors import ChecksumMismatch, TransferError
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import kv_pb2
from kvtransfer.checksum import block_checksum
from kvtransfer.deadline import Deadline
from kvtransfer.staging import InPlace, LandingPlace
from kvtransfer.transport import BlockRead, PeerLink, ReadStop
from kvtransfer.transports.frames import RUNS_MAX


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockBatch:
    """Blocks to read in one go: `source[i]` of the peer's pool lands in our `into[i]` and must have `checksums[i]`."""

    lease_key: bytes
    epoch: int
    source: tuple[int, ...]
    into: tuple[int, ...]
    checksums: tuple[int, ...]

    def part(self, begin: int, end: int) -> Self:
        return dataclasses.replace(
            self,
            source=self.source[begin:end],
            into=self.into[begin:end],
            checksums=self.checksums[begin:end],
        )


class PublishedBlocks:
    """What a source has published of one transfer so far, checked before a byte of it is read.

    Invariant: publications continue each other without a gap, name blocks that exist, and fit our own table.
    """

    def __init__(self, *, epoch: int, source_layout: KVLayout, into: Sequence[int], skip_blocks: int) -> None:
        self._epoch = epoch
        self._source_layout = source_layout
        self._into = into
        self._skip_blocks = skip_blocks
        self._lease_key = b""
        self._source: list[int] = []
        self._checksums: list[int] = []
        self._num_taken = skip_blocks
        self.landing: kv_pb2.Landing | None = None

    def add(self, publication: kv_pb2.Publication) -> None:
        """Raises TransferError when the source contradicts itself or us."""
        if publication.epoch != self._epoch or self.landing is not None:
            raise TransferError(
                f"a publication of epoch {publication.epoch} {'after the last one' * bool(self.landing)}"
            )
        if publication.first_block != len(self._source) or len(publication.block_ids) != len(publication.checksums):
            raise TransferError(
                f"block {publication.first_block} with {len(publication.block_ids)} ids and "
                f"{len(publication.checksums)} checksums was published after {len(self._source)} blocks"
            )
        if any(block_id >= self._source_layout.num_blocks for block_id in publication.block_ids):
            raise TransferError(f"a published block is not in a pool of {self._source_layout.num_blocks}")
        self._lease_key = publication.lease_key or self._lease_key
        self._source.extend(publication.block_ids)
        self._checksums.extend(publication.checksums)
        if len(self._source) > len(self._into):
            raise TransferError(f"{len(self._source)} blocks were published, {len(self._into)} are reserved here")
        if publication.HasField("landing"):
            self._finish(publication.landing)

    def take(self) -> BlockBatch | None:
        """What was published since the last take, less what we hold already; None when that is nothing."""
        begin, end = self._num_taken, len(self._source)
        if begin >= end:
            return None
        self._num_taken = end
        return BlockBatch(
            lease_key=self._lease_key,
            epoch=self._epoch,
            source=tuple(self._source[begin:end]),
            into=tuple(self._into[begin:end]),
            checksums=tuple(self._checksums[begin:end]),
        )

    def _finish(self, landing: kv_pb2.Landing) -> None:
        expected = self._source_layout.num_blocks_for(landing.num_tokens)
        if not landing.num_blocks == len(self._source) == expected:
            raise TransferError(
                f"{landing.num_tokens} tokens are {expected} blocks, the source counts {landing.num_blocks} "
                f"and has published {len(self._source)}"
            )
        if self._skip_blocks > landing.num_blocks:
            raise TransferError(f"{self._skip_blocks} blocks are said to be here, the prompt has {landing.num_blocks}")
        self.landing = landing


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lander:
    """Brings batches into `pool`. Holds no more than `part_bytes` in flight, whatever a batch holds."""

    link: PeerLink
    pool: memoryview
    layout: KVLayout
    part_bytes: int
    place: LandingPlace = InPlace()
    """Blocks of a batch's `into` are of the engine's pool; what they are read into, this decides."""

    def land(self, batch: BlockBatch, *, stop: ReadStop, deadline: Deadline) -> None:
        """Blocks the calling thread. Terminal when it returns or raises; verified when it returns.

        Raises what `PeerLink.read` raises, and ChecksumMismatch for bytes that are not those that were published.
        """
        for part in self._parts(batch):
            with self.place.receiving(part.into, stop=stop, deadline=deadline) as into:
                self._receive(dataclasses.replace(part, into=tuple(into)), stop, deadline)

    def _receive(self, part: BlockBatch, stop: ReadStop, deadline: Deadline) -> None:
        for layers in self._layers():
            read = BlockRead(
                lease_key=part.lease_key, epoch=part.epoch, source=part.source, into=part.into, layers=layers
            )
            self.link.read(read, stop=stop, deadline=deadline)
        self._verify(part, stop)

    def _parts(self, batch: BlockBatch) -> Iterator[BlockBatch]:
        whole_block_bytes = self.layout.block_bytes * self.layout.num_layers
        size = max(1, min(RUNS_MAX, self.place.part_blocks_max, self.part_bytes // whole_block_bytes))
        for begin in range(0, len(batch.source), size):
            yield batch.part(begin, begin + size)

    def _layers(self) -> Iterator[range]:
        """All at once, unless even one block of every layer is more than may be in flight."""
        size = max(1, self.part_bytes // self.layout.block_bytes)
        for first in range(0, self.layout.num_layers, size):
            yield range(first, min(first + size, self.layout.num_layers))

    def _verify(self, part: BlockBatch, stop: ReadStop) -> None:
        for source, into, expected in zip(part.source, part.into, part.checksums, strict=True):
            stop.check()
            found = block_checksum(self.pool, self.layout, into)
            if found != expected:
                raise ChecksumMismatch(
                    f"block {source} of {self.link.transport} source landed in {into} with checksum {found:016x}, "
                    f"{expected:016x} was published"
                )
