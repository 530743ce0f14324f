"""Reasoning of a bounded length with the real model, whose tags are several tokens, and its server killed within."""

from __future__ import annotations

import os
import pathlib
import signal
from typing import Any, Final

import openai

from tests.support.deployment import Deployment, deployed, is_idle

MODEL: Final = "smollm2-135m-instruct"
BUDGET: Final = 24
SECTION: Final = {"max_seq_len": 512, "kv_cache_config": {"max_tokens": 2048}}
DOCUMENT: Final = {
    "model": MODEL,
    "reasoning_parser": "qwen3",
    "context_servers": {**SECTION, "num_instances": 1},
    "generation_servers": {**SECTION, "num_instances": 2},
}
FIELDS: Final[dict[str, Any]] = {
    "model": MODEL,
    "messages": [
        {"role": "user", "content": "Is a whale a fish?"},
        {"role": "assistant", "content": "<think>\nLet me think about what a whale is. It", "prefix": True},
    ],
    "temperature": 0,
    "max_tokens": BUDGET + 24,
    "stream": True,
}

ALWAYS: Final = {"return_token_ids": True, "min_tokens": BUDGET + 16}
"""It would have nothing to say after what it thought."""


async def kill_whoever_generates(deployment: Deployment, request_id: str) -> None:
    story = await deployment.get_json(f"/requests/{request_id}")
    info = await deployment.get_json("/cluster_info")
    [pid] = [
        worker["pid"]
        for worker in info["current_workers"]["generation_servers"]
        if worker["worker_id"] == story["attempts"][0]["generation_instance"]
    ]
    os.kill(pid, signal.SIGKILL)


async def told(deployment: Deployment, client: openai.AsyncOpenAI, *, kills: bool = False, **extra: Any) -> list[Any]:
    """Reasoning, content, and the token ids of both."""
    reasoning, content, token_ids = "", "", list[int]()
    stream = await client.chat.completions.create(**FIELDS, extra_body={**ALWAYS, **extra})
    async for chunk in stream:
        [choice] = chunk.choices
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        content += choice.delta.content or ""
        token_ids += getattr(choice, "token_ids", None) or []
        if kills and len(token_ids) >= BUDGET // 2:
            kills = False
            await kill_whoever_generates(deployment, chunk.id.removeprefix("chatcmpl-"))
    return [reasoning, content, token_ids]


async def test_the_answer_follows_after_so_many_tokens_wherever_the_reply_goes_on(
    tmp_path: pathlib.Path,
) -> None:
    async with (
        deployed(tmp_path, DOCUMENT) as deployment,
        openai.AsyncOpenAI(base_url=deployment.api, api_key="none", max_retries=0) as client,
    ):
        free = await told(deployment, client)
        assert free[1] == "", "it reasons for longer than its budget if it is let"
        bounded = await told(deployment, client, thinking_token_budget=BUDGET)
        assert bounded[1] != "", (free, bounded)
        assert bounded[2][:BUDGET] == free[2][:BUDGET]
        assert free[0].startswith(bounded[0])
        assert await told(deployment, client, kills=True, thinking_token_budget=BUDGET) == bounded
        assert (await told(deployment, client, thinking_token_budget=0))[0] == ""
        assert is_idle(left := await deployment.wait_idle()), left
