"""Servers die or freeze in mid-stream: streams go on with the same tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import signal
from collections.abc import Mapping
from typing import Any, Final

import aiohttp
import pytest

from tests.support.completions import complete
from tests.support.deployment import Deployment, deployed

SEEDED: Final = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
PROMPTS: Final = [list(range(1000 + 37 * number, 1000 + 37 * number + 150)) for number in range(3)]
NUM_NEW: Final = 40


def document(**counts: int) -> dict[str, Any]:
    section = {"max_num_tokens": 64, "max_seq_len": 2048, "kv_cache_config": {"max_tokens": 8192}}
    return {
        "model": "smollm2-135m-instruct",
        "context_servers": {**section, "num_instances": counts.get("context", 1)},
        "generation_servers": {**section, "num_instances": counts.get("generation", 1)},
    }


async def pids(deployment: Deployment, role: str) -> list[int]:
    """Of the servers that can be given work."""
    info = await deployment.get_json("/cluster_info")
    return [w["pid"] for w in info["current_workers"][f"{role}_servers"] if w["standing"] == "ready"]


async def wait_servers(deployment: Deployment, role: str, count: int) -> None:
    async with asyncio.timeout(200):
        while len(await pids(deployment, role)) < count:  # noqa: ASYNC110  another process decides
            await asyncio.sleep(0.05)


ASKING_MUCH: Final = {
    **SEEDED, "frequency_penalty": 0.4, "repetition_penalty": 1.1, "logit_bias": {"30": 1.5}, "min_tokens": 20,
    "bad_words": ["the"], "logprobs": 2, "guided_regex": "([A-Z][a-z]{0,9}[ ,.]){5,90}!",
}  # fmt: skip


SAMPLINGS: Final[tuple[Mapping[str, Any], ...]] = ({"temperature": 0}, ASKING_MUCH)


async def all_of(deployment: Deployment) -> list[tuple[list[int], list[float | None]]]:
    """The tokens of each prompt in each way, and how likely they were if that is asked for, all asked for at once."""
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        asked = [
            group.create_task(complete(session, deployment.url, prompt, max_tokens=NUM_NEW, **sampling))
            for sampling in SAMPLINGS
            for prompt in PROMPTS
        ]
    return [(one.result().token_ids, one.result().logprobs) for one in asked]


async def tokens_flow(deployment: Deployment) -> None:
    """Until a generation server has sent tokens; the metric has no way to wait."""
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{deployment.url}/cluster_info") as answer:
                workers = (await answer.json())["current_workers"]["generation_servers"]
            if any(worker["requests"] for worker in workers):
                return
            await asyncio.sleep(0.01)


@dataclasses.dataclass(frozen=True)
class Blow:
    role: str
    number: signal.Signals
    after_tokens: int
    """Of the first stream; 0: as soon as its servers have it."""


BLOWS: Final = [
    Blow("generation", signal.SIGKILL, 5),
    Blow("generation", signal.SIGSTOP, 5),
    Blow("context", signal.SIGKILL, 0),
    Blow("context", signal.SIGSTOP, 0),
]


@pytest.mark.timeout(600)
async def test_streams_go_on_with_the_same_tokens_whatever_befalls_a_server(tmp_path: pathlib.Path) -> None:
    async with deployed(tmp_path, document(context=1, generation=2)) as deployment:
        wanted = await all_of(deployment)
        for blow in BLOWS:
            victim = (await pids(deployment, blow.role))[0]
            asking = asyncio.create_task(all_of(deployment))
            await tokens_flow(deployment)
            os.kill(victim, blow.number)
            try:
                assert await asking == wanted, f"after {blow}"
            finally:
                if blow.number is signal.SIGSTOP:
                    os.kill(victim, signal.SIGCONT)
            await wait_servers(deployment, blow.role, 2 if blow.role == "generation" else 1)
