"""Clients beside each other, and clients that walk away: nobody's tokens change, and blocks come back."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from disaggregated import model_files
from disaggregated.text import Tokenizer
from tests.support.completions import complete
from tests.support.deployment import Deployment, is_idle
from tests.support.prompts import short_prompts

MODEL = "smollm2-135m-instruct"

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_six_streams_at_once_give_the_tokens_they_give_alone(deployment: Deployment) -> None:
    prompts = short_prompts(Tokenizer.load(model_files.resolve(MODEL).path), 6)
    async with aiohttp.ClientSession() as session:
        alone = [await complete(session, deployment.url, prompt.token_ids, max_tokens=32) for prompt in prompts]
        async with asyncio.TaskGroup() as group:
            together = [
                group.create_task(complete(session, deployment.url, prompt.token_ids, max_tokens=32))
                for prompt in prompts
            ]
    for before, task in zip(alone, together, strict=True):
        assert task.result().token_ids == before.token_ids


@pytest.mark.parametrize("num_chunks", [0, 1, 6])
async def test_the_blocks_of_a_client_that_leaves_are_back_soon(deployment: Deployment, num_chunks: int) -> None:
    name = f"leaves-after-{num_chunks}"
    await leave_after(deployment, num_chunks, name)
    assert is_idle(left := await deployment.wait_idle(timeout_s=20.0)), left
    assert (await deployment.get_json(f"/requests/{name}"))["outcome"] == "cancelled"


async def leave_after(deployment: Deployment, num_chunks: int, name: str) -> None:
    """Ask for much, read so many chunks, hang up. 0: hang up before the first token."""
    fields = {
        "model": MODEL,
        "prompt": list(range(2000 + num_chunks, 2900)),
        "max_tokens": 120,
        "ignore_eos": True,
        "stream": True,
    }
    async with aiohttp.ClientSession() as session:
        asking = session.post(f"{deployment.url}/v1/completions", json=fields, headers={"x-request-id": name})
        if num_chunks == 0:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asking, 0.3)
            return
        async with asking as answer:
            for _ in range(num_chunks):
                await answer.content.readuntil(b"\n\n")
