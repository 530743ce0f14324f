"""Reasoning and calls of a response are items of their own, in the order the model had them, and come back as such."""

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

PROPERTIES = {"city": {"type": "string"}}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": PROPERTIES}}
THOUGHT = "<think>\nHm, ü.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
REPLY = f"{THOUGHT}Let me see.\n{CALL}\n{CALL}"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door(temper=Temper(latency_s=0.0, step_s=0.0005), reasoning_parser="qwen3") as opened:
        yield opened


async def response_to(client: openai.AsyncOpenAI, reply: str, *, stream: bool = False, **fields: Any) -> Any:
    if not stream:
        return await client.responses.create(model="fake", input=says(reply), **fields)
    events = [
        event async for event in await client.responses.create(model="fake", input=says(reply), stream=True, **fields)
    ]
    return events[-1].response


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_words_and_calls_are_items_in_their_order(client: openai.AsyncOpenAI, stream: bool) -> None:
    response = await response_to(client, REPLY, stream=stream, tools=[WEATHER])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    thought, said, call, other = response.output
    assert thought.content[0].text == "Hm, ü."
    assert said.content[0].text.strip() == "Let me see."
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
    assert call.call_id != other.call_id
    assert response.status == "completed"


async def test_tokens_of_thoughts_are_counted(client: openai.AsyncOpenAI) -> None:
    """Each byte is a token here; what opens and closes the thought is not part of it."""
    response = await response_to(client, f"{THOUGHT}Yes.")
    details = response.usage.output_tokens_details
    assert len("Hm, ü.".encode()) <= details.reasoning_tokens <= len(THOUGHT.encode())
    messages: Any = [{"role": "user", "content": says(f"{THOUGHT}Yes.")}]
    chat = await client.chat.completions.create(model="fake", messages=messages)
    assert chat.usage is not None
    assert chat.usage.completion_tokens_details is not None
    assert chat.usage.completion_tokens_details.reasoning_tokens == details.reasoning_tokens
    assert (await response_to(client, "Yes.")).usage.output_tokens_details.reasoning_tokens == 0


async def test_the_output_comes_back_as_input_and_the_results_are_answers_to_its_calls(
    client: openai.AsyncOpenAI,
) -> None:
    first = await response_to(client, REPLY, tools=[WEATHER])
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in first.output
        if item.type == "function_call"
    ]
    said: Any = [*results, {"role": "user", "content": says("It is sunny.")}]
    chained = await client.responses.create(
        model="fake", input=said, previous_response_id=first.id, tools=[WEATHER], store=False
    )
    whole: Any = [
        {"role": "user", "content": says(REPLY)}, *(item.model_dump(exclude_none=True) for item in first.output), *said,
    ]  # fmt: skip
    stateless = await client.responses.create(model="fake", input=whole, tools=[WEATHER], store=False)
    assert chained.output_text == stateless.output_text == "It is sunny."
    assert chained.usage is not None
    assert stateless.usage is not None
    assert chained.usage.input_tokens == stateless.usage.input_tokens


async def test_a_call_that_must_be_made_is_made(client: openai.AsyncOpenAI) -> None:
    forced = '[{"name": "weather", "parameters": {"city": "Oslo"}}]'
    for choice in ("required", {"type": "allowed_tools", "mode": "required", "tools": [WEATHER]}):
        response = await response_to(client, forced, tools=[WEATHER], tool_choice=choice)
        (call,) = (item for item in response.output if item.type == "function_call")
        assert json.loads(call.arguments) == {"city": "Oslo"}
    assert response.tool_choice.type == "allowed_tools"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_cut_off_is_incomplete(client: openai.AsyncOpenAI, stream: bool) -> None:
    response = await response_to(client, CALL, stream=stream, tools=[WEATHER], max_output_tokens=50)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete"
