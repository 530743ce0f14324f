import dataclasses

import pytest

from disaggregated.errors import ChecksumMismatch, TransferError
from disaggregated.v1 import kv_pb2
from kvtransfer.checksum import block_checksums
from kvtransfer.deadline import Deadline
from kvtransfer.destination.landing import BlockBatch, Lander, PublishedBlocks
from kvtransfer.region import Region
from kvtransfer.transport import BlockRead, LinkCounters, ReadStop, ReadStopped
from tests.support.kv_pools import SMALL, blocks_of, flip_bit, regions

INTO = list(range(20, 28))


def published(skip_blocks: int = 0) -> PublishedBlocks:
    return PublishedBlocks(epoch=7, source_layout=SMALL, into=INTO, skip_blocks=skip_blocks)


def publication(
    first: int, *block_ids: int, landing: tuple[int, int] | None = None, **fields: int
) -> kv_pb2.Publication:
    message = kv_pb2.Publication(
        epoch=fields.get("epoch", 7), first_block=first, block_ids=block_ids, checksums=block_ids, lease_key=b"k"
    )
    if landing:
        message.landing.CopyFrom(kv_pb2.Landing(num_tokens=landing[0], num_blocks=landing[1], first_token=1))
    return message


def test_what_was_published_is_taken_once_and_in_order() -> None:
    blocks = published()
    assert blocks.take() is None
    blocks.add(publication(0, 3, 4))
    blocks.add(publication(2, 9))
    batch = blocks.take()
    assert batch is not None
    assert (batch.source, batch.into, batch.checksums) == ((3, 4, 9), (20, 21, 22), (3, 4, 9))
    assert blocks.take() is None
    blocks.add(publication(3, 1, landing=(14, 4)))
    batch = blocks.take()
    assert batch is not None
    assert (batch.source, batch.into) == ((1,), (23,))


@pytest.mark.parametrize(("skip", "expected"), [(0, (3, 4, 9)), (1, (4, 9)), (2, (9,)), (3, None)])
def test_blocks_that_are_here_already_are_left_out(skip: int, expected: tuple[int, ...] | None) -> None:
    blocks = published(skip_blocks=skip)
    blocks.add(publication(0, 3, 4, 9, landing=(12, 3)))
    batch = blocks.take()
    assert (batch.source if batch else None) == expected


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (publication(1, 5), "after 0 blocks"),
        (publication(0, 5, epoch=6), "epoch 6"),
        (publication(0, 32), "not in a pool of 32"),
        (publication(0, *range(9)), "9 blocks were published, 8 are reserved"),
        (publication(0, 5, landing=(5, 1)), "5 tokens are 2 blocks"),
        (publication(0, 5, landing=(4, 2)), "source counts 2"),
        (kv_pb2.Publication(epoch=7, block_ids=[1, 2], checksums=[1]), "2 ids and 1 checksums"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(wrong: kv_pb2.Publication, sentence: str) -> None:
    with pytest.raises(TransferError, match=sentence):
        published().add(wrong)


def test_nothing_comes_after_the_last_publication() -> None:
    blocks = published()
    blocks.add(publication(0, 5, landing=(4, 1)))
    with pytest.raises(TransferError, match="after the last one"):
        blocks.add(publication(1, 6))


def test_more_blocks_than_the_prompt_has_cannot_be_here_already() -> None:
    with pytest.raises(TransferError, match="3 blocks are said to be here"):
        published(skip_blocks=3).add(publication(0, 5, landing=(4, 1)))


@dataclasses.dataclass
class CopyingLink:
    """A PeerLink within one process, which remembers what it was asked for."""

    source: Region
    into: Region
    reads: list[BlockRead] = dataclasses.field(default_factory=list)
    transport: str = "COPY"

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


def batch_of(source: Region) -> BlockBatch:
    checksums = block_checksums(source.buffer, SMALL, WANTED)
    return BlockBatch(lease_key=b"k", epoch=7, source=WANTED, into=LANDS_IN, checksums=checksums)


def land(batch: BlockBatch, link: CopyingLink, *, part_bytes: int = 1 << 20, stop: ReadStop | None = None) -> None:
    lander = Lander(link=link, pool=link.into.buffer, layout=SMALL, part_bytes=part_bytes)
    lander.land(batch, stop=stop or ReadStop(), deadline=Deadline.after(5))


@pytest.mark.parametrize("part_bytes", [1, 512, 513, 1536, 2000, 4096, 1 << 20])
def test_any_buffer_size_lands_the_same_bytes_and_is_kept_to(part_bytes: int) -> None:
    with regions(SMALL) as (source, into):
        link = CopyingLink(source, into)
        land(batch_of(source), link, part_bytes=part_bytes)
        assert (blocks_of(into, SMALL, LANDS_IN) == blocks_of(source, SMALL, WANTED)).all()
        least = SMALL.block_bytes
        assert all(len(read.source) * len(read.layers) * least <= max(least, part_bytes) for read in link.reads)


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
