"""Pools in a device's memory, whose part a CPU tensor takes here: their blocks travel through staging regions."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest
import torch

from disaggregated import rpc
from disaggregated.engine.cuda.staging import DeviceBlockCopier
from disaggregated.errors import SourceFailed, TransferError
from kvtransfer import DestinationOptions, Preference, Region, StagedSource, TransferDestination
from tests.support.kv_pools import (
    EPOCH,
    SMALL,
    SomeTicket,
    blocks_of,
    eventually,
    identity,
    regions,
    served_source,
)

STAGING = dataclasses.replace(SMALL, num_blocks=8)
"""A quarter of the pool."""


class Device:
    """A pool of noise, or of zeroes, and a staging region beside it."""

    def __init__(self, stack: contextlib.ExitStack, *, seed: int | None) -> None:
        size = (SMALL.num_layers, SMALL.num_blocks, SMALL.block_bytes)
        self.pool = torch.zeros(size, dtype=torch.uint8)
        if seed is not None:
            self.pool.random_(0, 256, generator=torch.Generator().manual_seed(seed))
        self.region = stack.enter_context(Region.allocate(STAGING.pool_bytes))
        host = torch.frombuffer(self.region.buffer, dtype=torch.uint8, count=STAGING.pool_bytes)
        self.copier = DeviceBlockCopier(self.pool, host.view(STAGING.num_layers, STAGING.num_blocks, -1))


@dataclasses.dataclass(slots=True)
class Pair:
    context: Device
    generation: Device
    source: StagedSource
    destination: TransferDestination
    address: str
    released: asyncio.Queue[str]
    crashes: list[BaseException]

    def ticket(self, transfer_id: str) -> SomeTicket:
        return SomeTicket(self.address, transfer_id)

    def assert_landed(self, source: list[int], into: list[int]) -> None:
        assert torch.equal(self.generation.pool[:, into], self.context.pool[:, source])

    async def wait_released(self, *transfer_ids: str) -> None:
        async with asyncio.timeout(10):
            assert sorted([await self.released.get() for _ in transfer_ids]) == sorted(transfer_ids)
        self.source.check_integrity()


@contextlib.asynccontextmanager
async def staged_pair(*, backend: str = "DEFAULT", max_tokens_in_buffer: int | None = None) -> AsyncIterator[Pair]:
    released: asyncio.Queue[str] = asyncio.Queue()
    crashes: list[BaseException] = []
    with contextlib.ExitStack() as stack:
        context, generation = Device(stack, seed=1), Device(stack, seed=None)
        source = StagedSource(
            context.region,
            identity(STAGING, "context-0", epoch=EPOCH),
            context.copier,
            on_released=released.put_nowait,
            on_crash=crashes.append,
        )
        server = rpc.make_server()
        source.add_to(server)
        address = rpc.bind(server, "127.0.0.1", 0)
        await source.start()
        await server.start()
        destination = TransferDestination(
            generation.region,
            identity(STAGING),
            DestinationOptions(preference=Preference(backend), max_tokens_in_buffer=max_tokens_in_buffer),
            copier=generation.copier,
        )
        try:
            yield Pair(context, generation, source, destination, address, released, crashes)
        finally:
            await destination.close()
            await source.close()
            await server.stop(grace=None)
        assert not crashes


@pytest.mark.parametrize("backend", ["SHM", "TCP"])
async def test_blocks_of_a_device_land_in_another_device(backend: str) -> None:
    async with staged_pair(backend=backend) as pair:
        table, into = [30, 2, 31, 7, 8], [5, 4, 20, 21, 22]
        pair.source.open("t", num_tokens=18)
        pulling = asyncio.create_task(pair.destination.pull(pair.ticket("t"), into, deadline_s=10))
        assert pair.source.publish("t", table[:2], 8)
        assert pair.source.finish("t", table, 18, 42)
        landed = await pulling
        assert (landed.first_token, landed.num_tokens) == (42, 18)
        pair.assert_landed(table, into)
        await pair.wait_released("t")


async def test_a_last_block_that_is_not_full_is_published_with_its_last_token() -> None:
    """The prompt's last chunk is told before its first token is; the staging thread may come in between."""
    async with staged_pair() as pair:
        pair.source.open("t", num_tokens=18)
        assert pair.source.publish("t", [30, 2, 31, 7, 8], 18)
        await eventually(lambda: pair.crashes or pair.source.ledger()[0][1] == 5)
        assert pair.source.finish("t", [30, 2, 31, 7, 8], 18, 42)
        await pair.destination.pull(pair.ticket("t"), [5, 4, 20, 21, 22], deadline_s=10)
        pair.assert_landed([30, 2, 31, 7, 8], [5, 4, 20, 21, 22])
        await pair.wait_released("t")


async def test_blocks_that_are_here_already_are_neither_read_nor_touched() -> None:
    async with staged_pair() as pair:
        pair.source.open("t", num_tokens=16)
        assert pair.source.finish("t", [1, 2, 3, 4], 16, 0)
        await pair.destination.pull(pair.ticket("t"), [9, 8, 7, 6], skip_blocks=2, deadline_s=10)
        pair.assert_landed([3, 4], [7, 6])
        assert not pair.generation.pool[:, [9, 8]].any()
        await pair.wait_released("t")


async def test_a_staging_region_is_used_again_and_again() -> None:
    async with staged_pair(max_tokens_in_buffer=4) as pair:  # One block.
        names = [f"t{i}" for i in range(6)]
        tables = [[(5 * i + j) % 32 for j in range(5)] for i in range(6)]
        for name, table in zip(names, tables, strict=True):  # Five blocks each; eight can be staged.
            pair.source.open(name, num_tokens=20)
            assert pair.source.finish(name, table, 20, 1)
        async with asyncio.TaskGroup() as group:
            for i, name in enumerate(names):
                into = [5 * i + j for j in range(5)]
                group.create_task(pair.destination.pull(pair.ticket(name), into, deadline_s=20))
        for i, table in enumerate(tables):
            pair.assert_landed(table, [5 * i + j for j in range(5)])
        await pair.wait_released(*names)
        assert pair.destination.high_water_bytes == SMALL.num_layers * SMALL.block_bytes


@pytest.mark.parametrize("max_tokens", [1, 9, None])
async def test_layers_that_a_source_publishes_one_by_one_land_in_a_device(max_tokens: int | None) -> None:
    """Each group of layers goes through the staging region alone, and overwrites no other in the device's pool."""
    with contextlib.ExitStack() as stack:
        generation = Device(stack, seed=None)
        (pool,) = stack.enter_context(regions(SMALL, 1))
        async with served_source(pool, SMALL) as served:
            landing = TransferDestination(
                generation.region,
                identity(STAGING),
                DestinationOptions(max_tokens_in_buffer=max_tokens),
                copier=generation.copier,
            )
            served.source.open("t", num_tokens=18)
            for num_layers in range(1, SMALL.num_layers):
                served.source.publish("t", list(range(5)), 18, num_layers=num_layers)
            served.source.finish("t", list(range(5)), 18, 1)
            await landing.pull(served.ticket("t"), [9, 8, 3, 4, 0], deadline_s=20)
            await landing.close()
        expected = torch.from_numpy(blocks_of(pool, SMALL, range(5)))
        assert torch.equal(generation.pool[:, [9, 8, 3, 4, 0]], expected)


async def test_a_prompt_larger_than_the_staging_region_is_refused() -> None:
    async with staged_pair() as pair:
        with pytest.raises(TransferError, match="a prompt of 33 tokens has 9 blocks; 8 can be staged"):
            pair.source.open("t", num_tokens=33)
        pair.source.check_integrity()


async def test_a_failed_transfer_gives_its_staging_blocks_to_the_next() -> None:
    async with staged_pair() as pair:
        pair.source.open("bad", num_tokens=32)
        pair.source.open("good", num_tokens=32)
        table = list(range(8))
        assert pair.source.publish("bad", table, 32)
        assert pair.source.finish("good", table, 32, 3)
        pulling = asyncio.create_task(pair.destination.pull(pair.ticket("good"), table, deadline_s=10))
        pair.source.fail("bad", "stopped")
        await pulling
        pair.assert_landed(table, table)
        with pytest.raises(SourceFailed):
            await pair.destination.pull(pair.ticket("bad"), list(range(8, 16)), deadline_s=10)
        await pair.wait_released("bad", "good")


async def test_what_was_never_opened_or_is_over_is_told_so() -> None:
    async with staged_pair() as pair:
        assert not pair.source.publish("nobody", [1], 4)
        pair.source.open("t", num_tokens=4)
        pair.source.fail("t", "stopped")
        await pair.wait_released("t")
        assert not pair.source.finish("t", [1], 4, 0)
