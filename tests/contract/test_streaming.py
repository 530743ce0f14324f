"""KV that travels while it is computed: layers of a chunk, one group after the other, over every transport."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from disaggregated.errors import ChecksumMismatch, SourceFailed, TransferError
from kvtransfer import Landed, Region
from kvtransfer.source.lease import Chunk
from tests.support.kv_endpoints import connected_pair
from tests.support.kv_pools import (
    SMALL,
    ServedSource,
    blocks_of,
    destination,
    eventually,
    flip_bit,
    regions,
    served_source,
)
from tests.support.kv_transfers import INTO, TABLE


@contextlib.asynccontextmanager
async def pulling(
    name: str, num_tokens: int, *, into: list[int] = INTO, skip_blocks: int = 0
) -> AsyncIterator[tuple[ServedSource, Region, asyncio.Task[Landed]]]:
    """A transfer that is open, and a pull that follows it."""
    with regions(SMALL) as (pool, landing_pool):
        async with (
            served_source(pool, SMALL) as served,
            destination(landing_pool, SMALL, backend=name) as landing,
        ):
            served.source.open("t", num_tokens=num_tokens)
            pull = landing.pull(served.ticket("t"), into, deadline_s=10, skip_blocks=skip_blocks)
            yield served, landing_pool, asyncio.create_task(pull)


def landed_layers(into: Region, block_ids: list[int]) -> list[bool]:
    """Of each layer, whether it is here in all of these blocks; noise is never all zeroes."""
    return [bool(layer.any(axis=1).all()) for layer in blocks_of(into, SMALL, block_ids)]


def check_landed(served: ServedSource, into: Region, count: int) -> None:
    assert (blocks_of(into, SMALL, INTO[:count]) == blocks_of(served.region, SMALL, TABLE[:count])).all()


async def test_layers_land_while_later_ones_are_not_even_computed(transport_name: str) -> None:
    async with pulling(transport_name, 16) as (served, into, task):
        for num_layers in (1, 2):
            assert served.source.publish("t", TABLE, 16, num_layers=num_layers)
            await eventually(lambda: landed_layers(into, INTO[:4])[num_layers - 1])  # noqa: B023
            flip_bit(served.region, SMALL, layer=num_layers, block_id=TABLE[0])  # Still written: nobody reads it.
            assert landed_layers(into, INTO[:4])[num_layers:] == [False] * (SMALL.num_layers - num_layers)
        assert served.source.publish("t", TABLE, 16)
        await eventually(lambda: all(landed_layers(into, INTO[:4])))
        assert not task.done()
        assert served.source.finish("t", TABLE, 16, 5)
        landed = await task
        check_landed(served, into, 4)
        assert landed.num_publications == 4
        one_layer = 4 * SMALL.block_bytes
        assert landed.num_bytes == 3 * one_layer
        assert 2 * one_layer <= landed.hidden_bytes <= 3 * one_layer  # The third one may be summed up just now.
        await served.wait_released("t")


async def test_chunks_of_any_size_in_layers_of_any_number_land_whole(transport_name: str) -> None:
    for seed in range(5):
        chance = random.Random(seed)
        num_tokens = chance.randrange(1, 25)
        async with pulling(transport_name, num_tokens) as (served, into, task):
            computed = 0
            while computed < num_tokens:
                after = chance.randrange(computed, num_tokens) + 1
                for num_layers in range(1, SMALL.num_layers):
                    if chance.random() < 0.6:
                        assert served.source.publish("t", TABLE, after, num_layers=num_layers)
                computed = after
                if computed < num_tokens:
                    assert served.source.publish("t", TABLE, computed)
            assert served.source.finish("t", TABLE, num_tokens, 5)
            await task
            check_landed(served, into, SMALL.num_blocks_for(num_tokens))
            await served.wait_released("t")


async def test_the_last_block_of_a_prompt_need_not_be_full(transport_name: str) -> None:
    async with pulling(transport_name, 7) as (served, into, task):
        served.source.publish("t", TABLE, 7, num_layers=2)
        await eventually(lambda: all(landed_layers(into, INTO[:2])[:2]))
        served.source.finish("t", TABLE, 7, 5)
        await task
        check_landed(served, into, 2)


async def test_blocks_that_are_here_already_do_not_travel_in_any_layer(transport_name: str) -> None:
    async with pulling(transport_name, 16, skip_blocks=3) as (served, into, task):
        served.source.publish("t", TABLE, 16, num_layers=1)
        served.source.finish("t", TABLE, 16, 5)
        landed = await task
        assert landed.num_bytes == SMALL.num_layers * SMALL.block_bytes
        assert not blocks_of(into, SMALL, INTO[:3]).any()


async def test_a_prefill_that_fails_between_two_layers_fails_the_pull(transport_name: str) -> None:
    async with pulling(transport_name, 16) as (served, _, task):
        served.source.publish("t", TABLE, 16, num_layers=2)
        served.source.fail("t", "out of luck")
        with pytest.raises(SourceFailed, match="out of luck"):
            await task
        await served.wait_released("t")
        assert not served.source.publish("t", TABLE, 16)


async def test_a_layer_that_changes_after_it_was_published_does_not_land(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with served_source(pool, SMALL) as served, destination(into, SMALL, backend=transport_name) as landing:
            served.source.open("t", num_tokens=16)
            served.source.publish("t", TABLE, 16, num_layers=2)
            flip_bit(pool, SMALL, layer=1, block_id=TABLE[3])
            served.source.finish("t", TABLE, 16, 5)
            with pytest.raises(ChecksumMismatch, match=f"block {TABLE[3]} "):
                await landing.pull(served.ticket("t"), INTO, deadline_s=10)


def test_a_source_refuses_to_let_a_layer_be_read_that_is_not_published(transport_name: str) -> None:
    with connected_pair(transport_name, readable=[4]) as pair:
        first = Chunk(first_block=1, block_ids=(9, 11), checksums=(9, 11), num_tokens=1, layers=range(2))
        pair.gate.book.publish("t", first, None, now_s=0.0)
        pair.read(pair.order([4], [20]))
        pair.read(pair.order([9, 11], [21, 22], layers=range(2)))
        for layers in (range(3), range(2, 3), range(1, 3)):
            with pytest.raises(TransferError, match="not published by t"):
                pair.read(pair.order([9, 11], [21, 22], layers=layers))
        assert (blocks_of(pair.into, SMALL, [21, 22])[:2] == blocks_of(pair.source, SMALL, [9, 11])[:2]).all()
        assert not blocks_of(pair.into, SMALL, [21, 22])[2].any()
