"""Pools on one GPU, whose part an array takes here: blocks go from pool to pool, or by host memory where they must."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest
import torch

from disaggregated import rpc
from disaggregated.engine.cuda.staging import DeviceBlockCopier
from disaggregated.errors import ChecksumMismatch, LeaseExpired, SourceFailed, TransferError
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer import DestinationOptions, Preference, Region, SourceOptions, TransferDestination
from kvtransfer.destination.peer import PeerStatistics
from kvtransfer.device_pool import SharedPool
from kvtransfer.source.device_source import DeviceSource, Way
from kvtransfer.transports import cuda_ipc
from tests.support.fake_gpu import FakeDevicePool, FakeMapper
from tests.support.kv_pools import EPOCH, FINGERPRINT, SMALL, SomeTicket, eventually, identity

STAGING = dataclasses.replace(SMALL, num_blocks=8)
"""A quarter of the pool."""


class Device:
    """A pool on a GPU, how other processes map it, and a staging region beside it."""

    def __init__(self, stack: contextlib.ExitStack, layout: KVLayout, *, seed: int | None) -> None:
        self.pool = FakeDevicePool(layout, seed=seed)
        self.mapper = FakeMapper()
        shared = cuda_ipc.share(self.pool, self.mapper)
        assert shared is not None
        self.shared: SharedPool = shared
        self.staging = dataclasses.replace(layout, num_blocks=STAGING.num_blocks)
        self.region = stack.enter_context(Region.allocate(self.staging.pool_bytes))
        host = torch.frombuffer(self.region.buffer, dtype=torch.uint8, count=self.staging.pool_bytes)
        blocks = torch.from_numpy(self.pool.blocks_LBX)
        self.copier = DeviceBlockCopier(blocks, host.view(layout.num_layers, STAGING.num_blocks, -1))


@dataclasses.dataclass(slots=True)
class Pair:
    context: Device
    generation: Device
    source: DeviceSource
    destination: TransferDestination
    address: str
    released: asyncio.Queue[str]
    reasons: dict[str, str]
    """Why nobody wants it, as the server hears it when a transfer is over."""
    crashes: list[BaseException]

    def ticket(self, transfer_id: str) -> SomeTicket:
        return SomeTicket(self.address, transfer_id)

    def offer(self, transfer_id: str, table: list[int]) -> SomeTicket:
        """A transfer whose prefill is over already."""
        num_tokens = SMALL.block_size * len(table)
        self.source.open(transfer_id, num_tokens=num_tokens)
        assert self.source.finish(transfer_id, table, num_tokens, 42)
        return self.ticket(transfer_id)

    def assert_landed(self, source: list[int], into: list[int]) -> None:
        assert np.array_equal(self.generation.pool.blocks_LBX[:, into], self.context.pool.blocks_LBX[:, source])

    @property
    def link(self) -> PeerStatistics:
        (link,) = self.destination.statistics()
        return link

    async def wait_released(self, *transfer_ids: str) -> None:
        async with asyncio.timeout(10):
            assert sorted([await self.released.get() for _ in transfer_ids]) == sorted(transfer_ids)
        assert self.released.empty()
        self.source.check_integrity()


@contextlib.asynccontextmanager
async def device_pair(
    *,
    backend: str = "DEFAULT",
    source_backend: str = "DEFAULT",
    layout: KVLayout = SMALL,
    is_shared: bool = True,
    max_tokens_in_buffer: int | None = None,
    lease_s: float = 30.0,
) -> AsyncIterator[Pair]:
    released: asyncio.Queue[str] = asyncio.Queue()
    reasons: dict[str, str] = {}
    crashes: list[BaseException] = []

    def over(transfer_id: str) -> None:
        reasons[transfer_id] = str(source.why_unwanted(transfer_id))
        released.put_nowait(transfer_id)

    with contextlib.ExitStack() as stack:
        context, generation = Device(stack, SMALL, seed=1), Device(stack, layout, seed=None)
        source = DeviceSource(
            context.region,
            dataclasses.replace(identity(STAGING, "context-0", epoch=EPOCH), device="cuda:0"),
            context.copier,
            context.shared,
            on_released=over,
            on_crash=crashes.append,
            options=SourceOptions(lease_s=lease_s, preference=Preference(source_backend)),
        )
        server = rpc.make_server()
        source.add_to(server)
        address = rpc.bind(server, "127.0.0.1", 0)
        await source.start()
        await server.start()
        destination = TransferDestination(
            generation.region,
            dataclasses.replace(identity(generation.staging), device="cuda:0"),
            DestinationOptions(preference=Preference(backend), max_tokens_in_buffer=max_tokens_in_buffer),
            copier=generation.copier,
            device_pool=generation.shared if is_shared else None,
        )
        try:
            yield Pair(context, generation, source, destination, address, released, reasons, crashes)
        finally:
            await destination.close()
            await source.close()
            await server.stop(grace=None)
        assert not crashes
        assert generation.mapper.num_mapped == 0, "a source's pool is still mapped"


async def test_blocks_go_from_pool_to_pool() -> None:
    async with device_pair() as pair:
        table, into = [30, 2, 31, 7, 8], [5, 4, 20, 21, 22]
        pair.source.open("t", num_tokens=18)
        pulling = asyncio.create_task(pair.destination.pull(pair.ticket("t"), into, deadline_s=10))
        assert pair.source.publish("t", table[:2], 8)
        assert pair.source.finish("t", table, 18, 42)
        landed = await pulling
        assert (landed.first_token, landed.num_tokens, landed.transport) == (42, 18, "SHM")
        pair.assert_landed(table, into)
        await pair.wait_released("t")
        assert (pair.link.transport, pair.link.devices) == ("SHM", "cuda:0 -> cuda:0")
        assert not any(pair.context.region.buffer), "nothing was staged"
        told = pair.source.statistics()
        assert (told["SHM (cuda:0)"].bytes_total, told["SHM"].bytes_total) == (landed.num_bytes, 0)


async def test_who_follows_before_the_prefill_finds_its_blocks_on_the_device() -> None:
    async with device_pair() as pair:
        pulling = asyncio.create_task(pair.destination.pull(pair.ticket("t"), [9, 8], deadline_s=10))
        await eventually(lambda: pair.source.way("t") is Way.DEVICE)
        pair.offer("t", [1, 2])
        await pulling
        pair.assert_landed([1, 2], [9, 8])
        await pair.wait_released("t")


async def test_who_follows_after_the_prefill_does_so_too() -> None:
    async with device_pair() as pair:
        ticket = pair.offer("t", [1, 2])
        pair.source.check_integrity()
        assert pair.source.way("t") is None
        assert [entry[0] for entry in pair.source.ledger()] == ["t"]
        await pair.destination.pull(ticket, [9, 8], deadline_s=10)
        pair.assert_landed([1, 2], [9, 8])
        await pair.wait_released("t")
        assert not pair.source.ledger()


async def test_what_is_here_already_is_neither_read_nor_touched() -> None:
    async with device_pair() as pair:
        await pair.destination.pull(pair.offer("t", [1, 2, 3, 4]), [9, 8, 7, 6], skip_blocks=2, deadline_s=10)
        pair.assert_landed([3, 4], [7, 6])
        assert not pair.generation.pool.blocks_LBX[:, [9, 8]].any()
        await pair.wait_released("t")


@pytest.mark.parametrize("max_tokens", [1, 9, None])
async def test_any_budget_moves_any_prompt(max_tokens: int | None) -> None:
    """With room for one layer of a block at a time, a block's layers are summed up together."""
    async with device_pair(max_tokens_in_buffer=max_tokens) as pair:
        table, into = [30, 2, 31, 7, 8], [5, 4, 20, 21, 22]
        await pair.destination.pull(pair.offer("t", table), into, deadline_s=10)
        pair.assert_landed(table, into)
        await pair.wait_released("t")
        assert pair.generation.pool.num_copies == {1: 15, 9: 5, None: 1}[max_tokens]


@pytest.mark.parametrize("backend", ["TCP", "DEFAULT"])
async def test_a_destination_that_cannot_map_reads_staged_blocks(backend: str) -> None:
    """TCP was asked for, or its own pool cannot be shared."""
    async with device_pair(backend=backend, is_shared=backend == "TCP") as pair:
        await pair.destination.pull(pair.offer("t", [1, 2]), [9, 8], deadline_s=10)
        pair.assert_landed([1, 2], [9, 8])
        await pair.wait_released("t")
        assert pair.link.devices == "cuda:0 -> host -> cuda:0"
        assert (pair.context.pool.num_copies, pair.generation.pool.num_copies) == (0, 0)


async def test_memory_that_cannot_be_mapped_is_said_and_gone_around() -> None:
    async with device_pair() as pair:
        pair.generation.mapper.refuses = "cudaIpcOpenMemHandle: cudaErrorPeerAccessUnsupported"
        await pair.destination.pull(pair.offer("t", [1, 2]), [9, 8], deadline_s=10)
        pair.assert_landed([1, 2], [9, 8])
        await pair.wait_released("t")
        assert pair.link.devices == "cuda:0 -> host -> cuda:0"
        assert "cudaErrorPeerAccessUnsupported" in pair.link.why
        assert pair.link.fallbacks == 1


async def test_pools_of_unlike_blocks_are_converted_by_way_of_the_host() -> None:
    longer = dataclasses.replace(SMALL, block_size=8)
    async with device_pair(layout=longer) as pair:
        await pair.destination.pull(pair.offer("t", [1, 2]), [9], deadline_s=10, num_tokens=8)
        await pair.wait_released("t")
        assert pair.link.devices == "cuda:0 -> host -> cuda:0"
        assert pair.generation.pool.blocks_LBX[:, 9].any()


async def test_two_destinations_read_two_ways_at_once() -> None:
    async with device_pair() as pair:
        with contextlib.ExitStack() as stack:
            far = Device(stack, SMALL, seed=None)
            staged = TransferDestination(
                far.region,
                identity(STAGING, "generation-1"),
                DestinationOptions(preference=Preference("TCP")),
                copier=far.copier,
            )
            near, away = pair.offer("near", [1, 2]), pair.offer("away", [3, 4])
            async with asyncio.TaskGroup() as group:
                group.create_task(pair.destination.pull(near, [9, 8], deadline_s=10))
                group.create_task(staged.pull(away, [7, 6], deadline_s=10))
            pair.assert_landed([1, 2], [9, 8])
            assert np.array_equal(far.pool.blocks_LBX[:, [7, 6]], pair.context.pool.blocks_LBX[:, [3, 4]])
            await pair.wait_released("near", "away")
            await staged.close()


async def test_damage_on_the_way_is_found_before_a_block_is_used() -> None:
    async with device_pair() as pair:
        ticket = pair.offer("t", [1, 2, 3])

        def damage() -> None:
            pair.context.pool.blocks_LBX[1, 2, 77] ^= 0x10

        pair.generation.pool.before_copy = damage
        with pytest.raises(ChecksumMismatch, match="block 2 of SHM source landed in 8"):
            await pair.destination.pull(ticket, [9, 8, 7], deadline_s=10)
        await pair.wait_released("t")


async def test_blocks_given_back_while_they_are_read_are_no_damage() -> None:
    async with device_pair() as pair:
        ticket = pair.offer("t", [1, 2, 3])

        def reuse() -> None:
            pair.source.fail("t", "given back")
            pair.context.pool.blocks_LBX[:, 2] ^= 0xFF

        pair.generation.pool.before_copy = reuse
        with pytest.raises((LeaseExpired, SourceFailed)):
            await pair.destination.pull(ticket, [9, 8, 7], deadline_s=10)
        await pair.wait_released("t")


async def test_a_cancelled_pull_ends_only_after_its_kernel() -> None:
    """The blocks are lent until then: no byte lands in them after the pull has ended."""
    launched, may_end = threading.Event(), threading.Event()
    async with device_pair(max_tokens_in_buffer=4) as pair:  # One block a part.
        ticket = pair.offer("t", [1, 2, 3])

        def hold() -> None:
            launched.set()
            assert may_end.wait(20)

        pair.generation.pool.before_copy = hold
        pulling = asyncio.create_task(pair.destination.pull(ticket, [9, 8, 7], deadline_s=20))
        assert await asyncio.to_thread(launched.wait, 10)
        pulling.cancel()
        await asyncio.sleep(0)
        assert not pulling.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        assert not pair.generation.pool.blocks_LBX[:, [8, 7]].any(), "a stop is looked at before each kernel"
        await pair.wait_released("t")


async def test_a_prefill_that_fails_before_anybody_follows_is_told_to_who_comes() -> None:
    async with device_pair() as pair:
        pair.source.open("t", num_tokens=8)
        assert pair.source.fail("t", "stopped")
        await pair.wait_released("t")
        with pytest.raises(SourceFailed, match="stopped"):
            await pair.destination.pull(pair.ticket("t"), [9, 8], deadline_s=10)
        assert not pair.source.publish("t", [1], 4)


async def test_a_transfer_that_is_declined_before_it_is_followed_is_over_in_both() -> None:
    async with device_pair() as pair:
        pair.source.open("t", num_tokens=8)
        pair.destination.decline(pair.ticket("t"), TransferError("no room"))
        await pair.wait_released("t")
        assert not pair.source.ledger()


async def test_a_lease_that_nobody_follows_runs_out_once() -> None:
    async with device_pair(lease_s=0.05) as pair:
        pair.offer("t", [1, 2])
        await pair.wait_released("t")
        assert not pair.source.ledger()


async def test_the_reason_why_nobody_wants_it_is_that_of_the_way_it_was_read() -> None:
    async with device_pair() as pair:
        ticket = pair.offer("t", [1, 2])
        await pair.destination.pull(ticket, [9, 8], deadline_s=10)
        await pair.wait_released("t")
        assert pair.reasons["t"].endswith("landed")


async def test_an_id_is_used_once_whichever_way_it_was_read() -> None:
    async with device_pair() as pair:
        await pair.destination.pull(pair.offer("t", [1]), [9], deadline_s=10)
        await pair.wait_released("t")
        with pytest.raises(TransferError, match="an id is used once"):
            pair.source.open("t", num_tokens=4)
        pair.source.check_integrity()


async def test_who_claims_another_host_is_not_offered_the_device() -> None:
    async with device_pair() as pair:
        channel = rpc.open_channel(pair.address)
        stub = kv_pb2_grpc.KVSourceStub(channel)
        request = kv_pb2.ConnectRequest(
            peer_id="far",
            fingerprint=FINGERPRINT,
            layout=SMALL.to_proto(),
            transports=["SHM", "TCP"],
            host_key="elsewhere",
            opens_device_memory=True,
        )
        reply = await stub.Connect(request, timeout=20)
        assert not reply.in_device_memory
        assert KVLayout.from_proto(reply.layout) == STAGING
        await channel.close()


async def test_a_mapping_is_closed_when_its_source_is_gone() -> None:
    async with device_pair() as pair:
        await pair.destination.pull(pair.offer("t", [1]), [9], deadline_s=10)
        assert pair.generation.mapper.num_mapped == 1
        await pair.wait_released("t")
        await pair.destination.close()
        assert pair.generation.mapper.num_mapped == 0


def test_a_pool_that_cannot_be_exported_is_not_shared() -> None:
    pool, mapper = FakeDevicePool(SMALL, seed=None), FakeMapper()
    mapper.refuses = "cudaIpcGetMemHandle: cudaErrorInvalidValue"
    assert cuda_ipc.share(pool, mapper) is None
