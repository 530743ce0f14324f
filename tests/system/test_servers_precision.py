"""Quantised weights and KV entries through real servers: the tokens of one process, however the halves are split."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from disaggregated.errors import FingerprintMismatch
from disaggregated.sampling_params import SamplingParams
from tests.support.server_client import ContextClient, GenerationClient, complete_disaggregated
from tests.support.servers import generation_server, random_prompt, server_pair, write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.95, seed=7)
"""Random weights say little greedily; sampling shows any difference in the logits at once."""
MODES = {
    "int8": ["--dtype=int8"],
    "int8, float32 KV": ["--quant-config.quant-algo=INT8", "--kv-cache-dtype=float32"],
    "int8 KV": ["--kv-cache-config.dtype=int8"],
    "float16 KV": ["--kv-cache-config.dtype=float16"],
}
Servers = tuple[ContextClient, GenerationClient, GenerationClient]


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=list(MODES))
async def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """A context server, a generation server, and one process that does everything with nothing cached."""
    model, flags = write_model(tmp_path_factory.mktemp("model")), MODES[request.param]
    async with (
        server_pair(model, *flags) as pair,
        generation_server(model, *flags, "--kv-cache-config.enable-block-reuse=false") as (_, oracle),
    ):
        yield pair.context, pair.generation, oracle
        await pair.wait_idle()


@pytest.mark.parametrize("num_tokens", [1, 16, 65, 700])
async def test_tokens_equal_those_of_one_process(servers: Servers, num_tokens: int) -> None:
    context, generation, oracle = servers
    prompt = random_prompt(num_tokens)
    expected = await oracle.complete(prompt, SAMPLED)
    assert (await complete_disaggregated(context, generation, prompt, SAMPLED)).token_ids == expected.token_ids


async def test_tokens_are_the_same_among_many_others_and_with_cached_blocks(servers: Servers) -> None:
    context, generation, oracle = servers
    prompts = [random_prompt(20 + 37 * number, seed=1) for number in range(8)]
    for _ in range(2):
        async with asyncio.TaskGroup() as group:
            running_ones = [
                group.create_task(complete_disaggregated(context, generation, prompt, SAMPLED)) for prompt in prompts
            ]
        for prompt, task in zip(prompts, running_ones, strict=True):
            assert task.result().token_ids == (await oracle.complete(prompt, SAMPLED)).token_ids


async def test_quantised_blocks_travel_with_their_scales(servers: Servers) -> None:
    context, generation, _ = servers
    layout = generation.description.layout
    completion = await complete_disaggregated(context, generation, random_prompt(200, seed=2), SAMPLED)
    assert completion.times is not None
    values = 2 * layout.num_kv_heads * layout.block_size * layout.head_dim
    bytes_of_block = {
        "float32": 4 * values,
        "float16": 2 * values,
        "int8": values + 4 * (values // layout.head_dim),
    }[layout.dtype]
    assert completion.times.transfer_bytes == -(-200 // layout.block_size) * layout.num_layers * bytes_of_block


async def test_servers_of_unlike_precision_exchange_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = write_model(tmp_path_factory.mktemp("unlike"))
    async with server_pair(model, context_flags=["--dtype=int8", "--kv-cache-dtype=float32"]) as pair:
        with pytest.raises(FingerprintMismatch):
            await complete_disaggregated(pair.context, pair.generation, random_prompt(40), SAMPLED)
        await pair.wait_idle()
