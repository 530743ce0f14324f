"""Prefill in one process and decode in another give the tokens of one process, whatever carries the blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from disaggregated.errors import InvalidRequest, PromptTooLong
from disaggregated.sampling_params import SamplingParams
from tests.support.server_client import ContextClient, GenerationClient, complete_disaggregated
from tests.support.servers import generation_server, random_prompt, server_pair, write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

Servers = tuple[ContextClient, GenerationClient]

SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.95, seed=7)
"""Random weights say little greedily; sampling shows any difference in the logits at once."""


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["SHM", "TCP"])
async def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """Every layer is published as soon as it is computed, which by default no model as small as this is."""
    model = write_model(tmp_path_factory.mktemp("model"))
    flags = (f"--cache-transceiver-config.backend={request.param}", "--cache-transceiver-config.layer-group-bytes=1")
    async with server_pair(model, *flags) as pair:
        yield pair.context, pair.generation
        await pair.wait_idle()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def oracle(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GenerationClient]:
    """One process that does everything, with nothing cached."""
    model = write_model(tmp_path_factory.mktemp("oracle"))
    async with generation_server(model, "--kv-cache-config.enable-block-reuse=false") as (_, client):
        yield client


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 64, 65, 300, 1000])
async def test_tokens_equal_those_of_one_process(servers: Servers, oracle: GenerationClient, num_tokens: int) -> None:
    prompt = random_prompt(num_tokens)
    expected = await oracle.complete(prompt, SAMPLED)
    completion = await complete_disaggregated(*servers, prompt, SAMPLED)
    assert completion.token_ids == expected.token_ids
    assert completion.finish_reason == expected.finish_reason


async def test_tokens_are_the_same_among_many_others(servers: Servers, oracle: GenerationClient) -> None:
    prompts = [random_prompt(20 + 37 * number, seed=1) for number in range(8)]
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(complete_disaggregated(*servers, prompt, SAMPLED)) for prompt in prompts]
    for prompt, task in zip(prompts, running, strict=True):
        assert task.result().token_ids == (await oracle.complete(prompt, SAMPLED)).token_ids


async def test_a_step_is_one_message_however_many_sequences_it_has(servers: Servers) -> None:
    _, generation = servers
    before = generation.num_batches
    keys = [await generation.admit(random_prompt(8, seed), SamplingParams(max_tokens=200)) for seed in range(8)]
    completions = [await generation.completion(key) for key in keys]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    assert generation.num_batches - before < num_tokens / 2


async def test_the_times_say_what_travelled_and_how(servers: Servers) -> None:
    context, generation = servers
    prompt = random_prompt(200, seed=2)
    completion = await complete_disaggregated(context, generation, prompt, SAMPLED)
    times, layout = completion.times, generation.description.layout
    assert times is not None
    block_bytes = 2 * 4 * layout.num_layers * layout.num_kv_heads * layout.head_dim * layout.block_size
    assert times.transfer_bytes == -(-200 // layout.block_size) * block_bytes
    assert times.transport == generation.description.transports[0]
    assert times.exposed_s > 0
    assert times.transfer_s > 0
    assert times.num_publications > 0
    assert times.hidden_bytes <= times.transfer_bytes
    assert times.landed_to_step_s > 0
    assert times.compute_s == times.queue_s == 0


async def test_only_blocks_that_are_not_here_travel(servers: Servers) -> None:
    prompt = random_prompt(160, seed=3)
    first = await complete_disaggregated(*servers, prompt, SAMPLED)
    again = await complete_disaggregated(*servers, prompt, SAMPLED)
    longer = await complete_disaggregated(*servers, prompt + random_prompt(20), SAMPLED)
    assert again.token_ids == first.token_ids
    assert first.times is not None
    assert again.times is not None
    assert longer.times is not None
    assert again.times.transfer_bytes == 0
    assert again.times.num_cached_tokens == 160
    assert 0 < longer.times.transfer_bytes < first.times.transfer_bytes


async def test_a_local_prefill_tells_its_times(servers: Servers) -> None:
    completion = await servers[1].complete(random_prompt(300, seed=4), SAMPLED)
    assert completion.first_position == 300
    assert completion.times is not None
    assert completion.times.compute_s > 0
    assert completion.times.queue_s >= 0
    assert completion.times.transport == ""


async def test_progress_is_told_chunk_by_chunk_and_the_outcome_last(servers: Servers) -> None:
    context, _ = servers
    messages = [message async for message in context.prefill(random_prompt(400, seed=5), SAMPLED)]
    computed = [message.num_computed_tokens for message in messages]
    assert computed == sorted(computed)
    assert computed[-1] == 400
    assert [message.HasField("outcome") for message in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].outcome.compute_s > 0


async def test_a_first_token_that_is_the_last_ends_both_halves(servers: Servers) -> None:
    context, generation = servers
    prompt = random_prompt(100, seed=6)
    first_token = (await context.first_token(prompt, SAMPLED)).first_token
    stopping = SamplingParams(
        max_tokens=24, temperature=1.0, top_p=0.95, seed=7, stop_token_ids=frozenset({first_token})
    )
    outcome = await context.first_token(prompt, stopping, transfer_id="stops")
    assert (outcome.first_token, outcome.finish_reason) == (first_token, "stop")
    rest = await generation.completion(await generation.admit(prompt, stopping, source=context.ticket("stops")))
    assert (rest.token_ids, rest.finish_reason, rest.first_position) == ([], "stop", 101)


async def test_one_token_is_all_that_max_tokens_1_gives(servers: Servers) -> None:
    context, generation = servers
    prompt, one = random_prompt(50, seed=8), SamplingParams(max_tokens=1)
    assert (await context.first_token(prompt, one)).finish_reason == "length"
    assert len((await generation.complete(prompt, one)).token_ids) == 1


@pytest.mark.parametrize(("num_tokens", "error"), [(0, InvalidRequest), (4096, PromptTooLong)])
async def test_a_bad_prompt_is_refused_by_both_and_costs_nothing(
    servers: Servers, num_tokens: int, error: type[Exception]
) -> None:
    context, generation = servers
    prompt = random_prompt(num_tokens)
    with pytest.raises(error):
        await context.first_token(prompt, SAMPLED, transfer_id=f"bad-{num_tokens}")
    with pytest.raises(error):
        await generation.complete(prompt, SAMPLED)
    with pytest.raises(error):
        await generation.admit(prompt, SAMPLED, source=context.ticket("nobody"))
    await generation.wait_idle()
    await context.wait_idle()


async def test_what_waits_is_in_the_ledger_and_then_is_not(servers: Servers) -> None:
    context, generation = servers
    key = await generation.admit(random_prompt(32, seed=9), SAMPLED, request_id="waits", source=context.ticket("late"))
    entries = {(entry.kind, entry.owner, entry.count) for entry in await generation.ledger()}
    assert ("transfer", "waits", 2) in entries
    assert len(entries) == 2, f"the blocks and their transfer, not {entries}"
    assert await generation.cancel(key) == 1
    await generation.wait_idle()
