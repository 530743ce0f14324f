"""WatchBlocks over real gRPC: a reader knows exactly what can be found, however much comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from context_server.role import ContextRole
from disaggregated.engine import block_feed
from disaggregated.errors import AdmissionError, InvalidRequest
from disaggregated.sampling_params import SamplingParams
from generation_server.role import GenerationRole
from tests.support.block_replica import BlockReplica, Place, following
from tests.support.fake_runner import VOCAB_SIZE
from tests.support.server_client import ContextClient, GenerationClient
from tests.unit.servers.fake_servers import FakeServer, serving

FEW = SamplingParams(max_tokens=4)


async def findable(server: FakeServer) -> set[Place]:
    snapshot = await asyncio.wrap_future(server.role.engine.block_snapshot())
    return {(label.block_hash.to_bytes(16, "big"), int(tier)) for label, tier in snapshot.blocks}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Some share a beginning, of a random length."""
    draw = random.Random(seed)
    stems = [[random.Random(stem).randrange(VOCAB_SIZE) for _ in range(60)] for stem in range(5)]
    return [
        draw.choice(stems)[: draw.randrange(61)] + [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(1, 40))]
        for _ in range(count)
    ]


async def test_a_reader_of_a_generation_server_knows_what_can_be_found_there_in_both_tiers() -> None:
    async with (
        serving("generation", GenerationRole, enable_block_reuse=True, num_host_slots=20) as server,
        GenerationClient(server.address) as client,
    ):
        async with following(client) as follower:
            for group in range(6):
                batch = prompts(8, seed=group)
                async with asyncio.TaskGroup() as tasks:
                    for prompt in batch:
                        tasks.create_task(client.complete(prompt, FEW))
            await follower.settle(await findable(server))
            async with following(client) as latecomer:
                await latecomer.settle(await findable(server))
        early, late = follower.replica, latecomer.replica
        early.check_chains()
        assert {tier for _, tier in early.blocks} == {0, 1}
        assert early.num_times_cleared == late.num_times_cleared == 1
        assert early.num_events > 2 * late.num_events  # Much was evicted meanwhile.
        assert early.blocks == late.blocks
        beat = await client.wait_idle()
        assert 0 < beat.num_host_slots_used <= beat.num_host_slots == 20
        assert beat.offloaded_blocks_total > 0
        assert beat.onboarded_blocks_total > 0
        await server.check_integrity()


async def test_a_reader_of_a_context_server_knows_what_can_be_found_there() -> None:
    async with (
        serving("context", ContextRole, enable_block_reuse=True) as server,
        ContextClient(server.address) as client,
    ):
        async with following(client) as follower:
            for number, prompt in enumerate(prompts(20)):
                await client.first_token(prompt, FEW, request_id=f"prompt-{number}")
            await follower.settle(await findable(server))
        follower.replica.check_chains()
        assert {tier for _, tier in follower.replica.blocks} == {0}
        await client.wait_idle()


async def test_when_a_step_changes_more_than_is_kept_the_reader_gets_everything_anew() -> None:
    async with (
        serving("context", ContextRole, enable_block_reuse=True, event_buffer_max_size=2) as server,
        ContextClient(server.address) as client,
    ):
        async with following(client) as follower:
            for number, prompt in enumerate(prompts(10)):
                await client.first_token(prompt, FEW, request_id=f"prompt-{number}")
            await follower.settle(await findable(server))
        assert follower.replica.num_times_cleared > 1


async def test_an_empty_cache_is_told_at_once() -> None:
    async with (
        serving("context", ContextRole) as server,
        ContextClient(server.address) as client,
        contextlib.aclosing(client.block_events()) as messages,
    ):
        message = await anext(messages)
        assert (message.first_number, message.cleared, list(message.events)) == (0, True, [])


async def test_a_server_that_keeps_no_events_says_which_key_is_missing() -> None:
    async with (
        serving("context", ContextRole, event_buffer_max_size=0) as server,
        ContextClient(server.address) as client,
    ):
        with pytest.raises(InvalidRequest, match="event_buffer_max_size is 0"):
            await anext(client.block_events())


async def test_the_number_of_readers_is_bounded_and_one_that_leaves_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_feed, "NUM_WATCHERS_MAX", 1)
    async with serving("context", ContextRole) as server, ContextClient(server.address) as client:
        first = client.block_events()
        await anext(first)
        with pytest.raises(AdmissionError, match="1 watch the blocks"):
            await anext(client.block_events())
        await first.aclose()
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(AdmissionError):
                    assert (await anext(client.block_events())).cleared
                    return


async def test_streams_end_when_the_server_stops() -> None:
    replica = BlockReplica()
    async with serving("context", ContextRole) as server:
        client = ContextClient(server.address)
        messages = client.block_events()
        replica.apply(await anext(messages))
    assert [message async for message in messages] == []
    await client.__aexit__()
