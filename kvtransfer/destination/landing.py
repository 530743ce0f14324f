"""The blocking half of a pull, on a worker thread: read blocks in bounded parts, and verify each.

A part is as much as the destination's budget of bytes in flight gives at that moment. Where not even one block fits,
its layers are read one after another, and verified together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from disaggregated.errors import ChecksumMismatch
from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import BlockSums, block_checksums, block_sums
from kvtransfer.deadline import Deadline
from kvtransfer.destination.in_flight import InFlight
from kvtransfer.destination.published import BlockBatch
from kvtransfer.staging import InPlace, LandingPlace
from kvtransfer.transport import BlockRead, PeerLink, ReadStop
from kvtransfer.transports.frames import RUNS_MAX


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lander:
    """Brings batches into `pool`. Has no more under way than `in_flight` grants it, whatever a batch holds."""

    link: PeerLink
    pool: memoryview | None
    """None: it is in a device's memory, and the transport sums up what it moves."""
    layout: KVLayout
    part_bytes: int
    """Of one read at most, whatever is granted."""
    in_flight: InFlight
    place: LandingPlace = InPlace()
    """Blocks of a batch's `into` are of the engine's pool; what they are read into, this decides."""
    make_sums: Callable[[int, KVLayout, int], BlockSums] = block_sums
    """Running checksums of so many blocks, of a layout, through so many layers, as the source made its own."""

    def land(
        self,
        batch: BlockBatch,
        *,
        stop: ReadStop,
        deadline: Deadline,
        verified: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """Blocks the calling thread. Terminal when it returns or raises; verified when it returns.

        `verified` is told how many bytes are, after each part.

        Raises what `PeerLink.read` raises, and ChecksumMismatch for bytes that are not those that were published.
        """
        block_bytes, source = self.layout.block_bytes * len(batch.layers), str(id(self.link))
        least = self.layout.block_bytes if self.place.is_final else block_bytes
        blocks_max = min(RUNS_MAX, self.place.part_blocks_max, max(1, self.part_bytes // block_bytes))
        begin = 0
        while begin < len(batch.source):
            most = min(blocks_max, len(batch.source) - begin) * block_bytes
            with self.in_flight.holding(source, least=least, most=most, stop=stop, deadline=deadline) as granted:
                part = batch.part(begin, begin + max(1, granted // block_bytes))
                with self.place.receiving(part.into, layers=part.layers, stop=stop, deadline=deadline) as into:
                    self._receive(dataclasses.replace(part, into=tuple(into)), granted, stop, deadline)
            begin += len(part.source)
            verified(len(part.source) * block_bytes)

    def _receive(self, part: BlockBatch, granted: int, stop: ReadStop, deadline: Deadline) -> None:
        sums = self.make_sums(len(part.source), self.layout, len(part.layers))
        for layers in self._layers(part.layers, granted // len(part.source)):
            read = BlockRead(
                lease_key=part.lease_key,
                epoch=part.epoch,
                source=part.source,
                into=part.into,
                layers=layers,
                sums=sums,
            )
            self.link.read(read, stop=stop, deadline=deadline)
        self._verify(part, sums, stop)

    def _layers(self, layers: range, granted_each: int) -> Iterator[range]:
        """All at once, unless even one block of every layer is more than may be in flight."""
        size = max(1, granted_each // self.layout.block_bytes)
        for first in range(0, len(layers), size):
            yield layers[first : first + size]

    def _verify(self, part: BlockBatch, sums: BlockSums, stop: ReadStop) -> None:
        """By what the transport saw pass into our memory, or by what is there when it saw nothing."""
        if sums.is_untouched:
            assert self.pool is not None, f"{self.link.transport} moved blocks of a device and summed up none"
            seen = block_checksums(self.pool, self.layout, part.into, part.layers, stop)
        else:
            seen = sums.values()
        for source, into, found, expected in zip(part.source, part.into, seen, part.checksums, strict=True):
            if found != expected:
                raise ChecksumMismatch(
                    f"block {source} of {self.link.transport} source landed in {into} with checksum {found:016x}, "
                    f"{expected:016x} was published"
                )
