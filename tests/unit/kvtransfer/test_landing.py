import dataclasses

import pytest

from disaggregated.errors import ChecksumMismatch
from kvtransfer.checksum import block_checksums
from kvtransfer.deadline import Deadline
from kvtransfer.destination.in_flight import InFlight
from kvtransfer.destination.landing import Lander
from kvtransfer.destination.published import BlockBatch
from kvtransfer.region import Region
from kvtransfer.transport import BlockRead, LinkCounters, ReadStop, ReadStopped
from tests.support.kv_pools import SMALL, blocks_of, flip_bit, regions


@dataclasses.dataclass
class CopyingLink:
    """A PeerLink within one process, which remembers what it was asked for."""

    source: Region
    into: Region
    reads: list[BlockRead] = dataclasses.field(default_factory=list)
    transport: str = "COPY"
    can_stop: bool = True

    def read(self, read: BlockRead, *, stop: ReadStop, deadline: Deadline) -> None:
        stop.check()
        self.reads.append(read)
        for layer in read.layers:
            for source, into in zip(read.source, read.into, strict=True):
                begin, end = SMALL.offset(layer, source), SMALL.offset(layer, into)
                size = SMALL.block_bytes
                self.into.buffer[end : end + size] = self.source.buffer[begin : begin + size]

    def drain(self, *, deadline: Deadline) -> None: ...

    def close(self, *, deadline: Deadline) -> None: ...

    def statistics(self) -> LinkCounters:
        return LinkCounters()


WANTED = (5, 6, 7, 1, 30)
LANDS_IN = (2, 3, 9, 8, 31)


def batch_of(source: Region, layers: range = range(SMALL.num_layers)) -> BlockBatch:
    checksums = block_checksums(source.buffer, SMALL, WANTED, layers)
    return BlockBatch(lease_key=b"k", epoch=7, source=WANTED, into=LANDS_IN, checksums=checksums, layers=layers)


def land(batch: BlockBatch, link: CopyingLink, *, budget: int = 1 << 20, stop: ReadStop | None = None) -> None:
    lander = Lander(link=link, pool=link.into.buffer, layout=SMALL, part_bytes=1 << 20, in_flight=InFlight(budget))
    lander.land(batch, stop=stop or ReadStop(), deadline=Deadline.after(20))


@pytest.mark.parametrize("budget", [1, 512, 513, 1536, 2000, 4096, 1 << 20])
def test_any_buffer_size_lands_the_same_bytes_and_is_kept_to(budget: int) -> None:
    with regions(SMALL) as (source, into):
        link = CopyingLink(source, into)
        land(batch_of(source), link, budget=budget)
        assert (blocks_of(into, SMALL, LANDS_IN) == blocks_of(source, SMALL, WANTED)).all()
        least = SMALL.block_bytes
        assert all(len(read.source) * len(read.layers) * least <= max(least, budget) for read in link.reads)


@pytest.mark.parametrize("layer", range(SMALL.num_layers))
def test_a_block_that_changed_after_it_was_published_does_not_land(layer: int) -> None:
    with regions(SMALL) as (source, into):
        batch = batch_of(source)
        flip_bit(source, SMALL, layer=layer, block_id=1)
        with pytest.raises(ChecksumMismatch, match="block 1 of COPY source landed in 8"):
            land(batch, CopyingLink(source, into))


def test_a_stop_is_heeded_before_the_first_byte() -> None:
    stop = ReadStop()
    stop.request()
    with regions(SMALL) as (source, into):
        with pytest.raises(ReadStopped):
            land(batch_of(source), CopyingLink(source, into), stop=stop)
        assert not blocks_of(into, SMALL, LANDS_IN).any()


@pytest.mark.parametrize("budget", [1, 1024, 1 << 20])
def test_only_the_layers_of_a_batch_are_read_and_verified(budget: int) -> None:
    with regions(SMALL) as (source, into):
        batch = batch_of(source, range(1, 3))
        flip_bit(source, SMALL, layer=0, block_id=WANTED[0])  # Its source may still write what it did not publish.
        link = CopyingLink(source, into)
        land(batch, link, budget=budget)
        assert (blocks_of(into, SMALL, LANDS_IN)[1:] == blocks_of(source, SMALL, WANTED)[1:]).all()
        assert not blocks_of(into, SMALL, LANDS_IN)[0].any()
        assert {layer for read in link.reads for layer in read.layers} == {1, 2}


def test_a_change_in_the_last_layer_of_a_batch_is_seen() -> None:
    with regions(SMALL) as (source, into):
        batch = batch_of(source, range(1, 3))
        flip_bit(source, SMALL, layer=2, block_id=WANTED[-1])
        with pytest.raises(ChecksumMismatch, match=f"block {WANTED[-1]} of COPY source"):
            land(batch, CopyingLink(source, into))
