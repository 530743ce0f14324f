"""Real servers with less KV memory than their load wants: blocks go to the host tier and come back, and all is told."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from disaggregated.sampling_params import SamplingParams
from tests.support.block_replica import BlockReplica, Follower, following
from tests.support.server_client import GenerationClient, ServerClient, complete_disaggregated
from tests.support.servers import VOCAB_SIZE, Pair, generation_server, server_pair, write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.95, seed=7)
SMALL = ("--kv-cache-config.max-tokens=512", "--kv-cache-config.host-cache-size=4000000")
"""32 blocks, and a host tier of about eight times as many."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with server_pair(write_model(tmp_path_factory.mktemp("model")), *SMALL) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def oracle(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GenerationClient]:
    """A server that has room for everything and keeps nothing."""
    model = write_model(tmp_path_factory.mktemp("oracle"))
    async with generation_server(model, "--kv-cache-config.enable-block-reuse=false") as (_, client):
        yield client


def prompts(count: int, seed: int) -> list[list[int]]:
    """Of up to 250 tokens; some share a beginning, also with those of another seed."""
    draw = random.Random(seed)
    stems = [[random.Random(stem).randrange(3, VOCAB_SIZE) for _ in range(200)] for stem in range(4)]
    return [
        draw.choice(stems)[: draw.randrange(200)]
        + [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randrange(1, 50))]
        for _ in range(count)
    ]


async def settled(follower: Follower, client: ServerClient) -> BlockReplica:
    """What the follower knows, once it is what a newcomer is told."""
    newcomer = BlockReplica()
    async with contextlib.aclosing(client.block_events()) as messages:
        newcomer.apply(await anext(messages))
    await follower.settle(newcomer.blocks.keys())
    assert follower.replica.blocks == newcomer.blocks
    return newcomer


async def test_tokens_stay_the_same_and_both_servers_tell_what_can_be_found_there(
    pair: Pair, oracle: GenerationClient
) -> None:
    async with following(pair.context) as of_context, following(pair.generation) as of_generation:
        for seed in range(3):
            batch = prompts(6, seed)
            for prompt in batch:
                completion = await complete_disaggregated(pair.context, pair.generation, prompt, SAMPLED)
                assert completion.token_ids == (await oracle.complete(prompt, SAMPLED)).token_ids
        await pair.wait_idle()
        for follower, client in ((of_context, pair.context), (of_generation, pair.generation)):
            known = await settled(follower, client)
            known.check_chains()
            assert {tier for _, tier in known.blocks} == {0, 1}
            assert follower.replica.num_times_cleared == 1
    for client in (pair.context, pair.generation):
        beat = await client.wait_idle()
        assert beat.offloaded_blocks_total > 0
        assert beat.onboarded_blocks_total > 0
        assert beat.num_host_slots_claimed == 0


async def test_sequences_that_do_not_fit_together_are_swapped_and_get_the_tokens_that_they_get_alone(
    pair: Pair, oracle: GenerationClient
) -> None:
    long = SamplingParams(max_tokens=150, temperature=1.0, seed=3)
    batch = [prompt[:60] for prompt in prompts(8, seed=11)]
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(pair.generation.complete(prompt, long)) for prompt in batch]
    beat = await pair.generation.wait_idle()
    assert beat.preemptions_total >= beat.swapped_sequences_total > 0
    for prompt, task in zip(batch, running, strict=True):
        assert task.result().token_ids == (await oracle.complete(prompt, long)).token_ids
