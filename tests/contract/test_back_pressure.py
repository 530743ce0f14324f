"""Slow ends: a bound on what is under way, whatever it is set to, and nobody else made to wait."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import grpc
import pytest

from disaggregated import rpc
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer import DestinationOptions, Region, TransferDestination, registry
from kvtransfer.destination.options import READERS_MAX
from kvtransfer.transport import OurEnd
from tests.support.counting_transport import CountingTransport, UnderWay
from tests.support.kv_endpoints import GatedEndpoint, make_endpoint
from tests.support.kv_pools import (
    EPOCH,
    SMALL,
    ServedSource,
    SomeTicket,
    blocks_of,
    destination,
    identity,
    regions,
    served_source,
)

TABLE = [7, 8, 9, 2, 30, 1]
LONG = dataclasses.replace(SMALL, num_blocks=256)
PROMISED_S = 2.0
"""Well above what a transfer takes here, and well below the time for which the slow ones are held."""


@contextlib.asynccontextmanager
async def counted(
    name: str, region: Region, max_tokens_in_buffer: int | None, layout: KVLayout = SMALL
) -> AsyncIterator[tuple[TransferDestination, UnderWay]]:
    under_way = UnderWay()
    transport = registry.load(name).make_transport(OurEnd(region=region, layout=layout, peer_id="generation-0"))
    made = TransferDestination(
        region,
        identity(layout),
        DestinationOptions(
            max_tokens_in_buffer=max_tokens_in_buffer, transports=[CountingTransport(transport, under_way)]
        ),
    )
    try:
        yield made, under_way
    finally:
        await made.close()


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 7, 16, 100, 0, None])
@pytest.mark.parametrize("in_layers", [False, True])
async def test_a_buffer_of_any_size_works_and_is_kept_to(
    transport_name: str, max_tokens: int | None, in_layers: bool
) -> None:
    """Three transfers at once: the bound is of all of them together."""
    tables = [list(range(first, first + 8)) for first in (0, 8, 16)]
    with regions(SMALL) as (pool, into):
        async with served_source(pool, SMALL) as served, counted(transport_name, into, max_tokens) as (landing, seen):
            for name, table in zip("abc", tables, strict=True):
                served.source.open(name, num_tokens=31)
                for num_layers in range(1, 3 * in_layers):
                    served.source.publish(name, table, 31, num_layers=num_layers)
                served.source.finish(name, table, 31, 1)
            async with asyncio.TaskGroup() as group:
                for name, table in zip("abc", tables, strict=True):
                    group.create_task(landing.pull(served.ticket(name), table, deadline_s=20))
            assert (blocks_of(into, SMALL, range(24)) == blocks_of(pool, SMALL, range(24))).all()
        if max_tokens:
            assert 0 < seen.high_water_bytes <= max(max_tokens * SMALL.token_bytes, SMALL.block_bytes)
            assert landing.high_water_bytes >= seen.high_water_bytes
        assert seen.num_bytes == 0


@pytest.mark.parametrize("max_tokens", [1, 5, 16, 40, None])
async def test_blocks_that_are_converted_are_within_the_bound_too(transport_name: str, max_tokens: int | None) -> None:
    """Ours are twice as long. What is under way lies in a staging region, a whole block of it at least."""
    ours = dataclasses.replace(SMALL, block_size=2 * SMALL.block_size, num_blocks=SMALL.num_blocks // 2)
    with regions(SMALL, 1) as (pool,), regions(ours, 1) as (into,):
        into.buffer[:] = bytes(into.nbytes)
        async with (
            served_source(pool, SMALL) as served,
            destination(into, ours, backend=transport_name, max_tokens_in_buffer=max_tokens) as landing,
        ):
            served.source.open("t", num_tokens=31)
            served.source.publish("t", list(range(8)), 31, num_layers=2)
            served.source.finish("t", list(range(8)), 31, 1)
            landed = await landing.pull(served.ticket("t"), [4, 1, 9, 3], deadline_s=20, num_tokens=31)
            assert landed.num_tokens == 31
            assert blocks_of(into, ours, [4, 1, 9, 3]).any(axis=(1, 2)).all()
            if max_tokens:
                one_block = SMALL.num_layers * SMALL.block_bytes
                assert 0 < landing.high_water_bytes <= max(max_tokens * SMALL.token_bytes, one_block)


@contextlib.asynccontextmanager
async def slow_and_fast(
    name: str, layout: KVLayout, into: Region, *, max_tokens_in_buffer: int | None = None
) -> AsyncIterator[tuple[ServedSource, GatedEndpoint, ServedSource, TransferDestination]]:
    """Two sources and one destination. The gated one lets nobody read until it is told to."""
    with regions(layout, 1) as (slow_pool,), regions(layout, 1) as (fast_pool,):
        gated = GatedEndpoint(make_endpoint(name, slow_pool, layout))
        async with (
            served_source(slow_pool, layout, endpoints=[gated]) as slow,
            served_source(fast_pool, layout) as fast,
            destination(
                into, layout, backend=name, progress_timeout_s=20, max_tokens_in_buffer=max_tokens_in_buffer
            ) as landing,
        ):
            yield slow, gated, fast, landing


@pytest.mark.parametrize("max_tokens", [None, 64])
async def test_a_slow_source_keeps_no_fast_one_waiting(transport_name: str, max_tokens: int | None) -> None:
    """Twice as many transfers as there are threads wait for the slow one."""
    count = 2 * READERS_MAX
    with regions(LONG) as (_, into):
        async with slow_and_fast(transport_name, LONG, into, max_tokens_in_buffer=max_tokens) as found:
            slow, gated, fast, landing = found
            gated.answers.clear()
            held = [
                asyncio.create_task(landing.pull(slow.offer(f"s{i}", [i], 4), [i], deadline_s=30)) for i in range(count)
            ]
            assert await asyncio.to_thread(gated.asked.wait, 10)
            for i in range(count, count + 8):
                async with asyncio.timeout(PROMISED_S):
                    await landing.pull(fast.offer(f"f{i}", [i], 4), [i], deadline_s=10)
            assert not any(task.done() for task in held)
            gated.answers.set()
            for task in held:
                await task
            everything = range(count)
            assert (blocks_of(into, LONG, everything) == blocks_of(slow.region, LONG, everything)).all()


async def test_a_slow_receiver_holds_up_no_other_and_what_waits_for_it_becomes_few(transport_name: str) -> None:
    """It follows and takes nothing, while its prompt is published block by block: a stream that is as long as that."""
    table = list(range(LONG.num_blocks))
    with regions(LONG) as (pool, into):
        async with served_source(pool, LONG) as served, destination(into, LONG, backend=transport_name) as landing:
            served.source.open("slow")
            async with rpc.open_channel(served.address) as channel:
                request = kv_pb2.FollowRequest(transfer_id="slow", epoch=EPOCH, peer_id="slow")
                following = kv_pb2_grpc.KVSourceStub(channel).Follow(request, timeout=30)
                served.source.publish("slow", table, 4)
                first = await following.read()
                assert isinstance(first, kv_pb2.Publication)
                assert list(first.block_ids) == [0]
                for num_tokens in range(8, 4 * LONG.num_blocks, 4):
                    assert served.source.publish("slow", table, num_tokens)
                async with asyncio.timeout(PROMISED_S):
                    await landing.pull(served.offer("fast", TABLE, 24), TABLE, deadline_s=10)
                served.source.finish("slow", table, 4 * LONG.num_blocks, 1)
                rest = [publication async for publication in limited(following)]
                assert [block for each in rest for block in each.block_ids] == table[1:]
                assert len(rest) < LONG.num_blocks / 4
                following.cancel()
            await served.wait_released("fast", "slow")


async def limited(
    following: grpc.aio.UnaryStreamCall[kv_pb2.FollowRequest, kv_pb2.Publication],
) -> AsyncIterator[kv_pb2.Publication]:
    """Up to the last publication: the stream itself ends with the lease."""
    async for publication in following:
        yield publication
        if publication.HasField("landing"):
            return


async def test_a_destination_that_stops_reading_keeps_no_reader_of_the_same_source_waiting(transport_name: str) -> None:
    """A follower that never reads a block holds its lease, and nothing else."""
    with regions(SMALL) as (pool, into):
        async with served_source(pool, SMALL) as served, destination(into, SMALL, backend=transport_name) as landing:
            async with rpc.open_channel(served.address) as channel:
                ticket: SomeTicket = served.offer("idle", TABLE, 24)
                request = kv_pb2.FollowRequest(transfer_id=ticket.transfer_id, epoch=EPOCH, peer_id="idle")
                following = kv_pb2_grpc.KVSourceStub(channel).Follow(request, timeout=30)
                publication = await following.read()
                assert isinstance(publication, kv_pb2.Publication)
                assert publication.HasField("landing")
                for number in range(20):
                    async with asyncio.timeout(PROMISED_S):
                        await landing.pull(served.offer(str(number), TABLE, 24), TABLE, deadline_s=10)
                assert [name for name, _, _ in served.source.ledger()] == ["idle"]
                following.cancel()
            await served.wait_released("idle", *map(str, range(20)))
