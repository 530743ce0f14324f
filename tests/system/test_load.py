"""Thirty-two people at once: nobody gets an error, everybody gets the tokens they would get alone, nothing is left."""

from __future__ import annotations

import asyncio
import pathlib
import time
from typing import Final

import aiohttp
import pytest

from benchmarks import report
from disaggregated import model_files
from disaggregated.text import Tokenizer
from tests.support.completions import Completion, complete
from tests.support.deployment import Deployment, deployed, is_idle
from tests.support.prompts import Prompt, short_prompts

MODEL: Final = "smollm2-135m-instruct"
NUM_NEW: Final = 32


async def run_load(deployment: Deployment, prompts: list[Prompt], seconds: float) -> tuple[list[Completion], list[str]]:
    """Each prompt first alone, then all at once again and again; the streams and the names of those that differ."""
    alone: dict[str, list[int]] = {}
    seen: list[Completion] = []
    wrong: list[str] = []
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        for prompt in prompts:
            completion = await complete(session, deployment.url, prompt.token_ids, max_tokens=NUM_NEW)
            alone[prompt.name] = completion.token_ids
        end_s = time.monotonic() + seconds

        async def chat(prompt: Prompt) -> None:
            while True:
                completion = await complete(session, deployment.url, prompt.token_ids, max_tokens=NUM_NEW)
                seen.append(completion)
                if completion.token_ids != alone[prompt.name]:
                    wrong.append(prompt.name)
                if time.monotonic() > end_s:
                    return

        async with asyncio.TaskGroup() as group:
            for prompt in prompts:
                group.create_task(chat(prompt))
    return seen, wrong


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_thirty_two_streams_for_two_minutes(tmp_path: pathlib.Path) -> None:
    section = {"num_instances": 1, "max_num_tokens": 256}
    document = {"model": MODEL, "context_servers": section, "generation_servers": section}
    prompts = short_prompts(Tokenizer.load(model_files.resolve(MODEL).path), 32)
    async with deployed(tmp_path, document) as deployment:
        seen, wrong = await run_load(deployment, prompts, seconds=120)
        left = await deployment.wait_idle()
    tokens = sum(len(completion.token_ids) for completion in seen)
    gaps = [gap for completion in seen for gap in completion.gaps_s]
    empty = is_idle(left)
    report.write(
        "load",
        "32 concurrent streams for two minutes",
        [
            report.Row(what="streams finished", seen=f"{len(seen)} ({tokens} tokens)"),
            report.Row(what="errors", seen="0", bar="0", holds=True),
            report.Row(what="streams whose tokens differ from their single run", seen=str(len(wrong)), bar="0",
                       holds=not wrong),
            report.Row(what="ledger entries when idle", seen="0" if empty else str(left), bar="0", holds=empty),
            report.Row(what="time to first token", seen=report.spread([c.ttft_s for c in seen], "s")),
            report.Row(what="inter-token latency", seen=report.spread(gaps, "ms", scale=1e3)),
        ],
    )  # fmt: skip
    assert not wrong
    assert empty, left
