"""Hostile bytes at every port of real servers: refused, bounded, and of no consequence for anybody else.

After each storm the processes are as large as before, hold as many descriptors and threads, no block and no lease, and
give the same tokens to a well-formed request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import AsyncIterator
from typing import Any, Final

import psutil
import pytest

from disaggregated import rpc
from disaggregated.sampling_params import SamplingParams
from disaggregated.security.membership import NOBODY
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer.transport import Offer
from kvtransfer.transports.unix_port import host_key
from tests.support import hostile, hostile_wire
from tests.support.front_door import front_door
from tests.support.kv_pools import eventually
from tests.support.loop_cpu import LoopCpu, frozen_garbage
from tests.support.server_client import ServerClient, complete_disaggregated
from tests.support.servers import Pair, random_prompt, server_pair, write_model

PROMPT: Final = random_prompt(100)
SAMPLING: Final = SamplingParams(max_tokens=8)
GROWTH_BYTES_MAX: Final = 48 << 20
"""Of a process, after a storm that follows a first one: allocators keep some of what they had."""
SETTLE_S: Final = 20.0
BLOCKED_MAX_S: Final = 0.05
"""Of the loop on which every stream waits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Storm:
    """How many messages go to each kind of port."""

    calls: int
    """gRPC, to each of two servers, of strangers and of members."""
    frames: int
    """To each of two endpoints."""
    raw: int
    """To each of two gRPC ports, and to the orchestrator's."""
    framed: int
    """To each of two ports for calls in frames."""


SMALL_STORM: Final = Storm(calls=700, frames=300, raw=150, framed=120)
LARGE_STORM: Final = Storm(calls=27_000, frames=16_000, raw=5_000, framed=10_000)
"""121,000 messages in all."""


@contextlib.asynccontextmanager
async def followed_lease(pair: Pair) -> AsyncIterator[tuple[list[Offer], bytes]]:
    """The context server's endpoints, and the key of a lease that a member called "hostile" follows."""
    description = pair.context.description
    transfer_id = f"storm-{os.urandom(4).hex()}"
    await pair.context.first_token(PROMPT, SAMPLING, transfer_id=transfer_id)
    async with rpc.open_channel(pair.context.address) as channel:
        stub = kv_pb2_grpc.KVSourceStub(channel)
        connect = kv_pb2.ConnectRequest(
            peer_id="hostile",
            fingerprint=description.fingerprint,
            layout=description.layout,
            transports=["SHM", "TCP"],
            host_key=host_key(),
        )
        reply = await stub.Connect(connect, timeout=5)
        offers = [Offer(name=offer.name, address=offer.address, host_key=offer.host_key) for offer in reply.offers]
        follow = stub.Follow(
            kv_pb2.FollowRequest(transfer_id=transfer_id, epoch=description.epoch, peer_id="hostile"), timeout=3600
        )
        publication: Any = await follow.read()
        yield [offer for offer in offers if offer.name in ("SHM", "TCP")], publication.lease_key
        follow.cancel()


def likely(server: ServerClient, other: ServerClient) -> dict[str, list[Any]]:
    """Values with which a message gets past the first check."""
    described = server.description
    return {
        "epoch": [described.epoch],
        "fingerprint": [described.fingerprint],
        "layout": [described.layout],
        "instance_id": [other.description.instance_id],
        "address": ["", "nonsense", "127.0.0.1:1", other.address],
        "transfer_id": ["", "a", "b", "c"],
        "request_id": ["a", "b"],
        "orchestrator_id": ["storm", "other"],
        "peer_id": ["hostile", "generation-0"],
        "token_ids": [3, 4, 5, 500, 501],
        "deadline_s": [0.0, 0.01, 0.1],
        "interval_s": [0.0, 0.01],
        "max_tokens": [1, 2, 5],
        "temperature": [0.0, 1.0],
        "transports": ["SHM", "TCP"],
        "dtype": ["float32"],
        "lease_key": [b"k" * 16],
        "block_hashes": [b"h" * 16, b"h" * 160],
    }


async def rage(pair: Pair, storm: Storm, seed: int) -> None:
    """One storm over every port of both servers, side by side."""
    async with contextlib.AsyncExitStack() as stack:
        offers, key = await stack.enter_async_context(followed_lease(pair))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        epoch = pair.context.description.epoch
        for number, offer in enumerate(offers):
            group.create_task(asyncio.to_thread(hostile.say_frames, offer, key, epoch, storm.frames, seed + number))
        for server, other in ((pair.context, pair.generation), (pair.generation, pair.context)):
            host, _, port = server.address.rpartition(":")
            wire_port = server.description.wire_port
            stack.enter_context(await asyncio.to_thread(hostile_wire.open_calls_and_read_nothing, host, wire_port))
            raw = hostile.BEGINNINGS["grpc"]
            group.create_task(asyncio.to_thread(hostile.say_raw, host, int(port), raw, storm.raw, seed))
            stranger = await stack.enter_async_context(rpc.open_channel(server.address, membership=NOBODY))
            member = await stack.enter_async_context(rpc.open_channel(server.address))
            values = likely(server, other)
            wire = host, wire_port, storm.framed, seed, values
            group.create_task(asyncio.to_thread(hostile_wire.say_calls, *wire))
            await hostile.call_strangely([stranger, member], storm.calls, seed, values)


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    rss: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Size:
        process = psutil.Process(pid)
        return cls(rss=process.memory_info().rss, descriptors=process.num_fds(), threads=process.num_threads())


async def check_untouched(pair: Pair, before: dict[int, Size], tokens: list[int]) -> None:
    await pair.wait_idle()
    found = await complete_disaggregated(pair.context, pair.generation, PROMPT, SAMPLING)
    assert found.token_ids == tokens
    await pair.wait_idle()
    for pid, size in before.items():
        await eventually(functools.partial(_is_back, pid, size), within_s=SETTLE_S)
        assert Size.of(pid).rss < size.rss + GROWTH_BYTES_MAX


def _is_back(pid: int, before: Size) -> bool:
    now = Size.of(pid)
    return now.descriptors <= before.descriptors + 4 and now.threads <= before.threads + 4


async def survive(folder: Any, storms: list[Storm]) -> None:
    async with server_pair(write_model(folder)) as pair:
        tokens = (await complete_disaggregated(pair.context, pair.generation, PROMPT, SAMPLING)).token_ids
        await rage(pair, SMALL_STORM, seed=1)
        await pair.wait_idle()
        before = {process.pid: Size.of(process.pid) for process in (pair.context_process, pair.generation_process)}
        for seed, storm in enumerate(storms, start=2):
            await rage(pair, storm, seed)
            await check_untouched(pair, before, tokens)


async def survive_http(storm: Storm) -> None:
    """The orchestrator's own port; what its API makes of well-formed requests is tested elsewhere."""
    async with front_door() as door:
        body = {"model": "fake", "prompt": "hello", "max_tokens": 4, "temperature": 0, "seed": 1}
        before = await door.post("/v1/completions", body)
        host, port = door.url.removeprefix("http://").split(":")
        descriptors = len(os.listdir("/proc/self/fd"))
        with frozen_garbage(), LoopCpu() as loop_cpu:
            async with asyncio.TaskGroup() as group:
                for seed in range(2):
                    raw = hostile.BEGINNINGS["http"]
                    group.create_task(asyncio.to_thread(hostile.say_raw, host, int(port), raw, storm.raw // 2, seed))
        assert loop_cpu.longest_s < BLOCKED_MAX_S
        await door.wait_idle()
        after = await door.post("/v1/completions", body)
        assert (after[0], after[1]["choices"]) == (before[0], before[1]["choices"]) == (200, before[1]["choices"])
        gc.collect()
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 4)


async def test_servers_survive_a_storm_of_hostile_bytes(tmp_path: Any) -> None:
    await survive(tmp_path, [SMALL_STORM])


async def test_the_front_door_survives_a_storm_of_hostile_bytes() -> None:
    await survive_http(SMALL_STORM)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_servers_survive_a_hundred_thousand_hostile_messages(tmp_path: Any) -> None:
    await survive(tmp_path, [LARGE_STORM])


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_the_front_door_survives_thousands_of_hostile_messages() -> None:
    await survive_http(LARGE_STORM)
