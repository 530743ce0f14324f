"""Tiny models of families that keep KV in ways of their own, through a context and a generation server: windows and two
kinds of layers, experts, latents in blocks with one plane, and the transformers library's code. Its own tokens are the
oracle.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from disaggregated.sampling_params import SamplingParams
from tests.support.server_client import complete_disaggregated
from tests.support.servers import server_pair
from tests.unit.engine.runners import random_prompt
from tests.unit.engine.tiny_models import VOCAB_SIZE, WINDOW, write_model

NUM_TOKENS = 16
GREEDY = SamplingParams(max_tokens=NUM_TOKENS)


@pytest.mark.parametrize(
    ("family", "model_impl"),
    [("gemma3", "auto"), ("qwen3-moe", "auto"), ("deepseek-v3", "auto"), ("phi3", "transformers")],
)
async def test_disaggregated_tokens_of_a_family_are_those_of_transformers(
    tmp_path: Path, family: str, model_impl: str
) -> None:
    tiny = write_model(family, tmp_path)
    prompts = [random_prompt(length, length, VOCAB_SIZE) for length in (3 * WINDOW, 17, WINDOW + 5)]
    flags = ("--load-format=auto", f"--model-impl={model_impl}", "--max-num-tokens=80")
    async with server_pair(tmp_path, *flags) as pair:
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(complete_disaggregated(pair.context, pair.generation, prompt, GREEDY))
                for prompt in prompts
            ]
        await pair.wait_idle()
    for prompt, task in zip(prompts, running, strict=True):
        assert task.result().token_ids == tiny.greedy(prompt, NUM_TOKENS)
