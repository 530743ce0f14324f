"""Servers of one model that store KV unlike: other blocks, other dtypes. What one computed, the other converts."""

from __future__ import annotations

import asyncio
import pathlib

import pytest

from disaggregated.sampling_params import SamplingParams
from tests.support.server_client import complete_disaggregated
from tests.support.servers import generation_server, random_prompt, server_pair, write_model

SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.95, seed=7)
"""Random weights say little greedily; sampling shows any difference in the logits at once."""
LENGTHS = [1, 16, 17, 65, 700]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("model"))


def blocks(size: int) -> str:
    return f"--kv-cache-config.tokens-per-block={size}"


def kv(dtype: str) -> str:
    return f"--kv-cache-config.dtype={dtype}"


@pytest.mark.parametrize(("context_size", "generation_size"), [(64, 16), (8, 32)])
async def test_blocks_of_other_sizes_give_the_tokens_of_one_process(
    model: pathlib.Path, context_size: int, generation_size: int
) -> None:
    sizes = {"context_flags": [blocks(context_size)], "generation_flags": [blocks(generation_size)]}
    async with server_pair(model, **sizes) as pair, generation_server(model) as (_, oracle):
        for num_tokens in LENGTHS:
            prompt = random_prompt(num_tokens)
            expected = (await oracle.complete(prompt, SAMPLED)).token_ids
            for _ in range(2):  # With nothing cached, and with what the generation server has by then.
                found = await complete_disaggregated(pair.context, pair.generation, prompt, SAMPLED)
                assert found.token_ids == expected
        await pair.wait_idle()


async def test_kv_that_is_rounded_as_it_travels_gives_the_same_tokens_each_time(
    model: pathlib.Path,
) -> None:
    """Attention saw float32 here and sees bfloat16 there, which no one process does: there is no other oracle."""
    flags = {"context_flags": [kv("float32"), blocks(32)], "generation_flags": [kv("bfloat16"), blocks(16)]}
    async with server_pair(model, **flags) as pair:
        assert pair.context.description.layout.dtype == "float32"
        assert pair.generation.description.layout.dtype == "bfloat16"
        prompts = [random_prompt(num_tokens, seed=3) for num_tokens in LENGTHS]
        first = [await complete_disaggregated(pair.context, pair.generation, prompt, SAMPLED) for prompt in prompts]
        async with asyncio.TaskGroup() as group:
            again = [
                group.create_task(complete_disaggregated(pair.context, pair.generation, prompt, SAMPLED))
                for prompt in prompts
            ]
        for before, task in zip(first, again, strict=True):
            assert task.result().token_ids == before.token_ids
            assert len(before.token_ids) == SAMPLED.max_tokens
        await pair.wait_idle()


@pytest.mark.parametrize(("context_dtype", "generation_dtype"), [("bfloat16", "float32")])
async def test_kv_that_only_becomes_wider_gives_the_tokens_of_a_process_that_read_it_so(
    model: pathlib.Path, context_dtype: str, generation_dtype: str
) -> None:
    """Widening is exact, so the first tokens are those of one process that stores its KV as the context server does:
    they follow from the prompt's KV alone."""
    flags = {"context_flags": [kv(context_dtype)], "generation_flags": [kv(generation_dtype)]}
    sampling = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.95, seed=11)
    async with server_pair(model, **flags) as pair, generation_server(model, kv(context_dtype)) as (_, oracle):
        for num_tokens in LENGTHS:
            prompt = random_prompt(num_tokens, seed=5)
            expected = (await oracle.complete(prompt, sampling)).token_ids
            found = await complete_disaggregated(pair.context, pair.generation, prompt, sampling)
            assert found.token_ids[0] == expected[0]
        await pair.wait_idle()
