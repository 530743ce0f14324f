"""What a model says becomes content, reasoning and calls, whole or streamed, with the stock client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.support.fake_cluster import Temper
from tests.support.front_door import Door, front_door
from tests.support.script import says

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "São Paulo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
FORCED = '[{"name": "weather", "parameters": {"city": "Oslo"}}]'


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    temper = Temper(latency_s=0.0, step_s=0.0005, prefill_token_s=0.0, tokens_a_step_max=3)
    async with front_door(temper=temper, reasoning_parser="qwen3", max_retries=3) as opened:
        yield opened


async def told(client: openai.AsyncOpenAI, reply: str, *, stream: bool, **fields: Any) -> dict[str, Any]:
    """One choice: its message and finish reason, put together from a stream as clients do it."""
    messages: Any = [{"role": "user", "content": says(reply)}]
    answer: Any = await client.chat.completions.create(model="fake", messages=messages, stream=stream, **fields)
    if not stream:
        choice = answer.choices[0]
        message = choice.message.model_dump(exclude_none=True)
        return {"finish_reason": choice.finish_reason, "content": "", **message}
    joined: dict[str, Any] = {"content": ""}
    async for chunk in answer:
        choice = chunk.choices[0]
        joined["finish_reason"] = choice.finish_reason
        for name, value in choice.delta.model_dump(exclude_none=True).items():
            _join(joined, name, value)
    return joined


def _join(joined: dict[str, Any], name: str, value: Any) -> None:
    if name == "tool_calls":
        calls = joined.setdefault(name, [])
        for delta in value:
            if delta["index"] == len(calls):
                calls.append({key: part for key, part in delta.items() if key != "index"})
            else:
                calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    elif name == "function_call":
        call = joined.setdefault(name, {"arguments": ""})
        call["name"] = value.get("name", call.get("name"))
        call["arguments"] += value["arguments"]
    else:
        joined[name] = value if name == "role" else joined.get(name, "") + value


def functions(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", ())
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_are_told_apart_from_the_text_before_them(client: openai.AsyncOpenAI, stream: bool) -> None:
    message = await told(client, CALLS, stream=stream, tools=[WEATHER, TIME])
    assert message["content"] == "Let me see."
    assert message["finish_reason"] == "tool_calls"
    assert functions(message) == [("weather", {"city": "São Paulo"}), ("time", {})]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(call["type"] == "function" for call in message["tool_calls"])


@pytest.mark.parametrize("stream", [False, True])
async def test_without_tools_the_same_reply_is_text(client: openai.AsyncOpenAI, stream: bool) -> None:
    for fields in ({}, {"tools": [WEATHER, TIME], "tool_choice": "none"}):
        message = await told(client, CALLS, stream=stream, **fields)
        assert (message["content"], message["finish_reason"]) == (CALLS, "stop")
        assert "tool_calls" not in message


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_at_most_ends_the_reply_and_frees_the_servers(
    client: openai.AsyncOpenAI, door: Door, stream: bool
) -> None:
    message = await told(client, CALLS, stream=stream, tools=[WEATHER, TIME], parallel_tool_calls=False)
    assert functions(message) == [("weather", {"city": "São Paulo"})]
    assert message["finish_reason"] == "tool_calls"
    await door.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_a_field_of_its_own(client: openai.AsyncOpenAI, stream: bool) -> None:
    reply = f"<think>\nHm, ü.\n</think>\n\n{CALLS}"
    message = await told(client, reply, stream=stream, tools=[WEATHER, TIME])
    assert message["reasoning_content"] == "Hm, ü."
    assert message["content"] == "Let me see."
    assert len(message["tool_calls"]) == 2
    hidden = await told(client, reply, stream=stream, extra_body={"include_reasoning": False})
    assert (hidden["content"], "reasoning_content" in hidden) == (CALLS, False)
    plain = await told(client, reply, stream=stream, extra_body={"separate_reasoning": False})
    assert (plain["content"], "reasoning_content" in plain) == (reply, False)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_must_be_made_is_made_and_its_text_is_not_shown(
    client: openai.AsyncOpenAI, stream: bool
) -> None:
    message = await told(client, FORCED, stream=stream, tools=[WEATHER, TIME], tool_choice="required")
    assert (message["content"], message["finish_reason"]) == ("", "tool_calls")
    assert functions(message) == [("weather", {"city": "Oslo"})]
    named: Any = {"type": "function", "function": {"name": "weather"}}
    message = await told(client, '{"city": "Oslo"}', stream=stream, tools=[WEATHER, TIME], tool_choice=named)
    assert functions(message) == [("weather", {"city": "Oslo"})]
    assert message["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 2, 12, 30])
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_reply_cut_anywhere_is_an_answer(
    client: openai.AsyncOpenAI, stream: bool, max_tokens: int, choice: Any
) -> None:
    reply = CALLS if choice == "auto" else FORCED
    message = await told(client, reply, stream=stream, tools=[WEATHER, TIME], tool_choice=choice, max_tokens=max_tokens)
    assert message["finish_reason"] == "length"
    assert message["content"] in CALLS if choice == "auto" else message["content"] == ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, {"tools": [TIME]}, {"tools": [TIME], "tool_choice": "required"}])
async def test_a_model_that_says_nothing_has_answered(
    client: openai.AsyncOpenAI, stream: bool, fields: dict[str, Any]
) -> None:
    message = await told(client, "", stream=stream, **fields)
    assert (message["content"], message["finish_reason"]) == ("", "stop")
    assert "tool_calls" not in message


@pytest.mark.parametrize("stream", [False, True])
async def test_the_api_before_tools_gets_one_function_call(client: openai.AsyncOpenAI, stream: bool) -> None:
    message = await told(client, CALLS, stream=stream, functions=[WEATHER["function"], TIME["function"]])
    assert message["function_call"] == {"name": "weather", "arguments": '{"city": "São Paulo"}'}
    assert message["finish_reason"] == "function_call"
    assert "tool_calls" not in message


async def test_a_stop_string_within_a_call_ends_it(client: openai.AsyncOpenAI) -> None:
    message = await told(client, CALLS, stream=False, tools=[WEATHER, TIME], stop=["Paulo"])
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "São '
    assert message["finish_reason"] == "tool_calls"


async def test_each_of_several_replies_has_calls_of_its_own(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": says(CALLS)}]
    answer = await client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER, TIME], n=3)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or ()]
    assert len(set(ids)) == 6


async def test_a_history_with_calls_and_results_is_taken(client: openai.AsyncOpenAI) -> None:
    call: Any = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages: Any = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        {"role": "assistant", "content": "Sunny.", "tool_calls": []},
        {"role": "user", "name": "me", "content": says("Thanks.")},
    ]
    answer = await client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "Thanks."
    assert answer.choices[0].finish_reason == "stop"


AGENTS: list[dict[str, Any]] = [
    {"tools": None, "tool_choice": "auto", "functions": None, "function_call": None, "parallel_tool_calls": None},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
    {"thinking": {"type": "enabled", "budget_tokens": 1024}, "reasoning": {"effort": "low"}},
    {"reasoning_effort": "none", "enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}},
    {"extra_body": {"provider": "x"}, "metadata": {"user_id": "x"}, "stream_options": {"include_usage": True}},
    {"tools": [{**WEATHER, "cache_control": {"type": "ephemeral"}}], "tool_choice": "any", "max_tokens": 1},
    {"tools": [{"type": "function", "name": "flat", "description": None, "parameters": None, "strict": None}]},
    {
        "tools": [WEATHER, TIME],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]},
        },
    },
]


@pytest.mark.parametrize("fields", AGENTS)
async def test_odd_fields_of_coding_agents_are_taken(door: Door, fields: dict[str, Any]) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": says("Hi.")}], "stream": True, **fields}
    async with door.http.post(f"{door.url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        assert "x-disagg-ignored" not in answer.headers
        assert (await answer.text()).endswith("data: [DONE]\n\n")


async def test_a_long_chat_is_rendered_beside_the_event_loop(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "word " * 4000}]
    with pytest.raises(openai.BadRequestError, match=r"the prompt has \d+ tokens, the limit is 1023"):
        await client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER])


async def test_a_template_that_comes_with_a_request_is_run_where_that_is_allowed() -> None:
    async with front_door(allow_request_chat_template=True) as door:
        body = {"model": "fake", "messages": [{"role": "user", "content": says("Yes.")}], "max_tokens": 9}
        chat = f"{door.url}/v1/chat/completions"
        good = {**body, "chat_template": "{{ messages[0].content }}[assistant]"}
        async with door.http.post(chat, json=good) as answer:
            assert (await answer.json())["choices"][0]["message"]["content"] == "Yes."
        bad = {
            "{% if": "the chat template is damaged",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "longer than 1 s",
            "x" * 70_000: "the limit is 65536",
        }
        for template, message in bad.items():
            async with door.http.post(chat, json={**body, "chat_template": template}) as answer:
                assert answer.status == 400
                assert message in (await answer.json())["error"]["message"]


async def test_a_killed_server_costs_no_character_of_a_call() -> None:
    temper = Temper(latency_s=0.0, step_s=0.002, prefill_token_s=0.0)
    async with (
        front_door(num_generation=2, temper=temper) as door,
        openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client,
    ):
        messages: Any = [{"role": "user", "content": says(CALLS)}]
        stream: Any = await client.chat.completions.create(
            model="fake", messages=messages, tools=[WEATHER, TIME], stream=True
        )
        joined: dict[str, Any] = {"content": ""}
        num_chunks = 0
        async for chunk in stream:
            num_chunks += 1
            if num_chunks == 20:
                next(server for server in door.cluster.of("generation") if server.decoding).crash()
            for name, value in chunk.choices[0].delta.model_dump(exclude_none=True).items():
                _join(joined, name, value)
        assert num_chunks > 30
        assert functions(joined) == [("weather", {"city": "São Paulo"}), ("time", {})]
