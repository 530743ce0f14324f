"""Counts in a stream: none, at its end (OpenAI's `include_usage`), and with every event (`continuous_usage_stats`)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Final

import openai
import pytest
import pytest_asyncio

from orchestrator.api.responses.shape import ResponsesShape
from tests.support.fake_cluster import Temper
from tests.support.front_door import Door, front_door
from tests.support.script import says

CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
USER: Final = [{"role": "user", "content": "Hi"}]
TOOL: Final = {"type": "function", "function": {"name": "weather"}}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    temper = Temper(latency_s=0.0, step_s=0.001, prefill_token_s=0.0, tokens_a_step_max=3)
    async with front_door(temper=temper) as opened:
        yield opened


async def events_of(door: Door, path: str, options: Any, **fields: Any) -> list[Any]:
    prompt = {"messages": USER} if path == CHAT else {"prompt": "hello"}
    body = {"model": "fake", "max_tokens": 9, "seed": 4, "stream": True, "stream_options": options, **prompt, **fields}
    async with door.http.post(door.url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        *lines, done, _ = (await answer.text()).split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_obfuscation": True}])
async def test_who_does_not_ask_is_not_told(door: Door, path: str, options: Any) -> None:
    assert not any("usage" in event for event in await events_of(door, path, options))


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": False}])
async def test_at_the_end_the_others_say_null(door: Door, path: str, options: Any) -> None:
    *others, last = await events_of(door, path, options)
    assert [event["usage"] for event in others] == [None] * len(others)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}, {"stop": ["zz"]}, {"max_tokens": 1}, {"n": 3}], ids=str)
async def test_every_event_tells_the_counts_so_far(door: Door, path: str, fields: dict[str, Any]) -> None:
    if path == CHAT and "logprobs" in fields:
        fields = {"logprobs": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *others, last = await events_of(door, path, options, **fields)
    total = 0
    for index in range(fields.get("n", 1)):
        own = [event["usage"] for event in others if event["choices"][0]["index"] == index]
        counts = [usage["completion_tokens"] for usage in own]
        assert counts == sorted(counts)
        assert counts[0] >= 1
        assert {usage["prompt_tokens"] for usage in own} == {last["usage"]["prompt_tokens"]}
        assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in own)
        total += counts[-1]
    assert total == last["usage"]["completion_tokens"]
    assert last["choices"] == []


async def test_they_come_also_without_an_event_at_the_end(door: Door) -> None:
    events = await events_of(door, CHAT, {"continuous_usage_stats": True})
    assert all(event["choices"] and event["usage"]["completion_tokens"] for event in events)


@pytest.mark.parametrize("tools", [{}, {"tools": [TOOL]}], ids=["plain", "tools"])
async def test_the_text_is_the_same(door: Door, tools: dict[str, Any]) -> None:
    def text(events: list[Any]) -> str:
        return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])

    messages = [{"role": "user", "content": says("Ünïcode, 漢字 and more.")}]
    told = [
        text(await events_of(door, CHAT, options, messages=messages, max_tokens=80, **tools))
        for options in (None, {"continuous_usage_stats": True})
    ]
    assert told == ["Ünïcode, 漢字 and more."] * 2


async def test_the_stock_client_reads_them(door: Door) -> None:
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client:
        options: Any = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
        messages: Any = USER
        stream = await client.chat.completions.create(
            model="fake", messages=messages, max_tokens=5, stream=True, stream_options=options
        )
        counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None]
    assert counts[-1] == counts[-2] >= counts[0] >= 1


@pytest.mark.parametrize("name", ["include_usage", "continuous_usage_stats", "include_obfuscation"])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_option_of_another_type_is_named(door: Door, path: str, name: str) -> None:
    body = {"model": "fake", "messages": USER, "prompt": "x", "stream": True, "stream_options": {name: 1}}
    status, answer = await door.post(path, body)
    assert (status, answer["error"]["message"]) == (400, f"stream_options.{name} must be true or false, is a number")


async def test_responses_check_theirs_too(door: Door) -> None:
    body = {"model": "fake", "input": "x", "stream": True, "stream_options": {"include_obfuscation": 1}}
    status, answer = await door.post("/v1/responses", body)
    assert (status, answer["error"]["param"]) == (400, "stream_options.include_obfuscation")


async def test_a_response_is_counted_at_its_end() -> None:
    shape = ResponsesShape({"id": "resp"}, keep=lambda _: None)
    shape.count(1, 2)
    assert b'"usage":null' in shape.opening(0)
