"""A read that does not end, in a server: its request is told at once, its blocks are counted, and come back later."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from context_server.role import ContextRole
from disaggregated.errors import LeaseExpired
from disaggregated.sampling_params import SamplingParams
from disaggregated.v1 import control_pb2
from generation_server.role import GenerationRole
from kvtransfer import QuarantineLimits, configured
from kvtransfer.transport import OurEnd
from kvtransfer.transports import shm
from tests.support.kv_pools import eventually
from tests.support.server_client import ContextClient, GenerationClient
from tests.support.stuck_transport import StuckTransport
from tests.unit.servers.fake_servers import FakeServer, serving

FEW = SamplingParams(max_tokens=6)
PROMPT = list(range(1, 41))
NUM_BLOCKS = 10
"""Of four tokens."""


Scene = tuple[StuckTransport, ContextClient, GenerationClient, FakeServer]


async def heartbeat(
    client: GenerationClient, holds: Callable[[control_pb2.Heartbeat], object]
) -> control_pb2.Heartbeat:
    async with asyncio.timeout(20), contextlib.aclosing(client.heartbeats()) as beats:
        async for beat in beats:
            if holds(beat):
                return beat
    raise AssertionError("the heartbeats ended")


@pytest_asyncio.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    """A transfer whose read has begun and does not end, under the stream key 1."""
    stuck: list[StuckTransport] = []

    def make_transport(us: OurEnd) -> StuckTransport:
        stuck.append(StuckTransport(shm.ShmTransport(us)))
        return stuck[-1]

    def limits(num_blocks: int) -> QuarantineLimits:
        return QuarantineLimits(num_blocks=num_blocks, stuck_after_s=0.2)

    monkeypatch.setattr(shm, "make_transport", make_transport)
    monkeypatch.setattr(configured, "QuarantineLimits", limits)
    async with (
        serving("context", ContextRole) as context_server,
        serving("generation", GenerationRole) as generation_server,
        ContextClient(context_server.address) as context,
        GenerationClient(generation_server.address) as generation,
    ):
        assert await generation.admit(PROMPT, FEW, source=context.ticket("t")) == 1
        await context.first_token(PROMPT, FEW, transfer_id="t")
        await eventually(lambda: stuck and stuck[0].links and stuck[0].links[0].is_reading.is_set())
        try:
            yield stuck[0], context, generation, generation_server
        finally:
            stuck[0].may_return.set()
        await generation.wait_idle()
        await context.wait_idle()
        await generation_server.check_integrity()
        assert len(generation_server.role.live_requests) == 0


async def test_a_read_that_does_not_end_holds_up_its_blocks_and_nobody(scene: Scene) -> None:
    stuck, context, generation, server = scene
    assert await context.abort("t", reason="a test says so") == 1
    with pytest.raises(LeaseExpired):  # The last publication has come, so it is the next renewal that finds out.
        await generation.completion(1)
    await context.wait_idle()
    beat = await heartbeat(generation, lambda beat: beat.unhealthy)
    assert "has not ended" in beat.unhealthy
    assert beat.num_blocks_quarantined == NUM_BLOCKS
    assert "transfer" in {entry.kind for entry in await generation.ledger()}
    assert len(server.role.live_requests) == 1
    assert len((await generation.complete(PROMPT, FEW)).token_ids) == 6  # Others are served.
    stuck.may_return.set()
    await generation.wait_idle()
    assert not (await heartbeat(generation, lambda _: True)).unhealthy


async def test_a_cancelled_request_stays_in_the_books_until_its_blocks_are_back(scene: Scene) -> None:
    stuck, context, generation, server = scene
    assert await generation.cancel(1) == 1
    await context.wait_idle()
    beat = await heartbeat(generation, lambda beat: beat.num_blocks_quarantined)
    assert beat.num_blocks_quarantined == NUM_BLOCKS
    assert len(server.role.live_requests) == 1
    stuck.may_return.set()
    await generation.wait_idle()
    assert not generation.has_news(1)


async def test_an_orchestrator_that_hangs_up_does_not_free_what_can_be_written_into(scene: Scene) -> None:
    stuck, context, generation, server = scene
    await generation.hang_up()
    await context.wait_idle()
    async with GenerationClient(server.address) as other:
        beat = await heartbeat(other, lambda beat: beat.num_blocks_quarantined)
        assert beat.num_blocks_free == beat.num_blocks - NUM_BLOCKS
        stuck.may_return.set()
        await other.wait_idle()
