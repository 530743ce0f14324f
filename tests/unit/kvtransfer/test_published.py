import itertools
import random
from collections.abc import Iterator

import pytest

from disaggregated.errors import TransferError
from disaggregated.v1 import kv_pb2
from kvtransfer.destination.published import PublishedBlocks
from tests.support.kv_pools import SMALL

INTO = list(range(20, 28))


def published(skip_blocks: int = 0) -> PublishedBlocks:
    return PublishedBlocks(epoch=7, source_layout=SMALL, into=INTO, skip_blocks=skip_blocks)


def publication(
    first: int, *block_ids: int, layers: range = range(0), landing: tuple[int, int] | None = None, epoch: int = 7
) -> kv_pb2.Publication:
    message = kv_pb2.Publication(
        epoch=epoch,
        first_block=first,
        block_ids=block_ids,
        checksums=[block_id + 100 * layers.start for block_id in block_ids],
        lease_key=b"k" * 16,
        first_layer=layers.start,
        num_layers=len(layers),
    )
    if landing:
        message.landing.CopyFrom(kv_pb2.Landing(num_tokens=landing[0], num_blocks=landing[1], first_token=1))
    return message


def test_what_was_published_is_taken_once_and_in_order() -> None:
    blocks = published()
    assert blocks.take() == []
    blocks.add(publication(0, 3, 4))
    blocks.add(publication(2, 9))
    (batch,) = blocks.take()
    assert (batch.source, batch.into, batch.checksums) == ((3, 4, 9), (20, 21, 22), (3, 4, 9))
    assert batch.layers == range(SMALL.num_layers)
    assert blocks.take() == []
    blocks.add(publication(3, 1, landing=(14, 4)))
    (batch,) = blocks.take()
    assert (batch.source, batch.into) == ((1,), (23,))


@pytest.mark.parametrize(("skip", "expected"), [(0, (3, 4, 9)), (1, (4, 9)), (2, (9,)), (3, None)])
def test_blocks_that_are_here_already_are_left_out(skip: int, expected: tuple[int, ...] | None) -> None:
    blocks = published(skip_blocks=skip)
    blocks.add(publication(0, 3, 4, 9, landing=(12, 3)))
    assert [batch.source for batch in blocks.take()] == ([expected] if expected else [])


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


def test_layers_of_the_same_blocks_come_by_and_by() -> None:
    blocks = published()
    blocks.add(publication(0, 3, 4))
    blocks.add(publication(2, 9, 8, layers=range(1)))
    blocks.add(publication(2, 9, 8, layers=range(1, 3)))
    blocks.add(publication(4, 7, landing=(17, 5)))
    seen = [(batch.source, batch.into, batch.layers, batch.checksums) for batch in blocks.take()]
    assert seen == [
        ((3, 4), (20, 21), range(3), (3, 4)),
        ((9, 8), (22, 23), range(1), (9, 8)),
        ((9, 8), (22, 23), range(1, 3), (109, 108)),
        ((7,), (24,), range(3), (7,)),
    ]


def test_blocks_that_are_here_are_left_out_of_each_of_their_layers() -> None:
    blocks = published(skip_blocks=3)
    blocks.add(publication(0, 3, 4, layers=range(2)))
    blocks.add(publication(0, 3, 4, layers=range(2, 3)))
    blocks.add(publication(2, 9, 8, layers=range(2)))
    blocks.add(publication(2, 9, 8, layers=range(2, 3)))
    assert [(batch.source, batch.into, batch.checksums) for batch in blocks.take()] == [
        ((8,), (23,), (8,)),
        ((8,), (23,), (208,)),
    ]


def test_the_landing_may_come_without_blocks() -> None:
    blocks = published()
    blocks.add(publication(0, 3, layers=range(2)))
    blocks.add(publication(0, 3, layers=range(2, 3)))
    assert len(blocks.take()) == 2
    blocks.add(publication(1, landing=(4, 1)))
    assert blocks.take() == []
    assert blocks.landing is not None


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (publication(2, 6, 5, layers=range(1, 2)), r"layers of blocks \(6, 5\) were published after those of \(5, 6\)"),
        (publication(2, 5, layers=range(1, 2)), "layers of blocks"),
        (publication(2, 5, 6, 7, layers=range(1, 3)), "layers of blocks"),
        (publication(4, 7, layers=range(1, 3)), "block 4 with 1 ids"),
        (publication(2, 5, 6, layers=range(1)), "layers 0 to 1 of 3 were published after 1"),
        (publication(2, 5, 6, layers=range(2, 3)), "layers 2 to 3 of 3 were published after 1"),
        (publication(2, 5, 6, layers=range(1, 4)), "layers 1 to 4 of 3"),
        (publication(2, 5, 6), "layers 0 to 3 of 3 were published after 1"),
        (publication(2, landing=(8, 2)), "layers 0 to 3 of 3 were published after 1"),
        (publication(2, 5, 6, layers=range(1, 2), landing=(16, 4)), "some layers of 2"),
        (
            kv_pb2.Publication(epoch=7, first_block=2, block_ids=[5, 6], checksums=[5, 6], first_layer=1),
            "layers 1 to 1",
        ),
    ],
)
def test_layers_that_do_not_continue_those_before_are_refused(wrong: kv_pb2.Publication, sentence: str) -> None:
    blocks = published()
    blocks.add(publication(0, 3, 4))
    blocks.add(publication(2, 5, 6, layers=range(1)))
    with pytest.raises(TransferError, match=sentence):
        blocks.add(wrong)


def test_some_layers_of_no_block_are_refused() -> None:
    with pytest.raises(TransferError, match="some layers of no block"):
        published().add(publication(0, layers=range(1)))


def split_publications(chance: random.Random, num_blocks: int) -> Iterator[kv_pb2.Publication]:
    """A source's whole table, in blocks and layers as they may come."""
    begin = 0
    while begin < num_blocks:
        end = chance.randrange(begin, num_blocks) + 1
        bounds = sorted({0, SMALL.num_layers, *chance.choices(range(SMALL.num_layers), k=2)})
        for first, last in itertools.pairwise(bounds):
            yield publication(begin, *range(begin, end), layers=range(first, last))
        begin = end
    yield publication(num_blocks, landing=(num_blocks * SMALL.block_size, num_blocks))


@pytest.mark.parametrize("seed", range(40))
def test_however_it_is_published_every_layer_of_every_missing_block_is_taken_once(seed: int) -> None:
    chance = random.Random(seed)
    num_blocks = chance.randrange(1, 9)
    skip = chance.randrange(num_blocks + 1)
    blocks = published(skip_blocks=skip)
    taken: list[tuple[int, int, int]] = []
    for each in split_publications(chance, num_blocks):
        blocks.add(each)
        if chance.random() < 0.5 or blocks.landing is not None:
            for batch in blocks.take():
                pairs = zip(batch.source, batch.into, strict=True)
                taken += [(layer, source, into) for source, into in pairs for layer in batch.layers]
    wanted = [(layer, i, INTO[i]) for i in range(skip, num_blocks) for layer in range(SMALL.num_layers)]
    assert sorted(taken) == sorted(wanted)
