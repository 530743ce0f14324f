"""Mistakes in a Responses body are told by the names that a Responses client knows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.front_door import Door, front_door

PATH = "/v1/responses"
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}

Case = tuple[dict[str, Any], str | None, str]
"""Fields beside the model; param and a part of the message of the answer."""

CASES: list[Case] = [
    ({}, "input", "input is missing"),
    ({"input": 5}, "input", "input must be a string or an array of items, is a number"),
    ({"input": []}, "input", "input is empty"),
    ({"input": ["x"]}, "input[0]", "input[0] must be an object, is a string"),
    ({"input": [{"role": "king", "content": "x"}]}, "input[0].role", "input[0].role must be one of"),
    ({"input": [{"role": "user"}]}, "input[0].content", "input[0].content is missing"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "must be a string or an array of parts"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "'input_image'"),
    ({"input": [{"role": "user", "content": [{"type": ["text"]}]}]}, "input[0].content[0]", "must be text"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "is missing"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "is not supported here"),
    ({"input": [{"type": {"a": "b" * 999}}]}, "input[0].type", "bbb...bbb"),
    ({"input": [{**CALL, "name": None}]}, "input[0].name", "input[0].name is missing"),
    ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments", "must be a string, is an object"),
    (
        {"input": [{"type": "function_call_output", "call_id": "c2", "output": "x"}]},
        "input[0].call_id",
        "there is no call 'c2' before it",
    ),
    ({"input": [CALL, {"type": "function_call_output", "call_id": "c1"}]}, "input[1].output", "is missing"),
    ({"input": "x", "instructions": 5}, "instructions", "instructions must be a string"),
    ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "must be at least 1, is 0"),
    ({"input": "x", "max_tokens": 5}, "max_tokens", "use max_output_tokens"),
    ({"input": "x", "messages": []}, "messages", "messages is not a field of responses; use input"),
    ({"input": "x", "background": True}, "background", "background is not supported here; only false is"),
    ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format", "text.format.schema is missing"),
    ({"input": "x", "conversation": "c"}, "conversation", "is not supported here"),
    ({"input": "x", "prompt": {"id": "p"}}, "prompt", "is not supported here"),
    ({"input": "x", "truncation": "middle"}, "truncation", "must be disabled or auto, is 'middle'"),
    ({"input": "x" * 2000, "truncation": "auto"}, "input", "the prompt has 2017 tokens"),
    ({"input": "x", "n": 2}, "n", "is not supported here"),
    ({"input": "x", "previous_response_id": 5}, "previous_response_id", "must be a string"),
    ({"input": "x", "previous_response_id": "resp_0"}, "previous_response_id", "there is no response 'resp_0'"),
    ({"input": "x", "store": "yes"}, "store", "must be true or false"),
    ({"input": "x", "metadata": {"a": 5}}, "metadata.a", "metadata.a must be a string"),
    ({"input": "x", "metadata": {str(n): "" for n in range(17)}}, "metadata", "the limit is 16"),
    ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type", "must be text, json_object or"),
    ({"input": "x", "text": {"format": 5}}, "text.format", "text.format must be an object"),
    ({"input": "x", "text": {"verbosity": "loud"}}, "text.verbosity", "must be low, medium or high"),
    ({"input": "x", "reasoning": {"effort": 5}}, "reasoning.effort", "reasoning.effort must be a string"),
    ({"input": "x", "include": "all"}, "include", "must be an array of strings"),
    ({"input": "x", "include": [["x"]]}, "include", "include: there is no ['x']"),
    ({"input": "x", "top_logprobs": 21}, "top_logprobs", "must be at most 20"),
    ({"input": "x", "tools": {}}, "tools", "tools must be an array of tools"),
    ({"input": "x", "tools": [5]}, "tools[0]", "must be an object"),
    (
        {"input": "x", "tools": [{"type": "file_search"}]},
        "tools[0].type",
        "must be function, custom or namespace, is 'file_search'",
    ),
    ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name", "is missing"),
    ({"input": "x", "tools": [TOOL], "tool_choice": 5}, "tool_choice", "must be a string or an object"),
    ({"input": "x", "tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice", "is 'mcp'"),
    ({"input": "x", "tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "mode must be"),
    (
        {"input": "x", "tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": ["g"]}},
        "tool_choice",
        "there is no tool 'g'",
    ),
    ({"input": "x", "temperature": 3}, "temperature", "must be at most 2.0"),
    ({"input": "x", "stream": "yes"}, "stream", "must be true or false"),
    ({"input": "x" * 2000}, "input", "the limit is 1023"),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door() as opened:
        yield opened


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[2][:30]}")
async def test_a_mistake_is_told_by_field_and_limit(door: Door, case: Case) -> None:
    fields, param, message = case
    status, answer = await door.post(PATH, {"model": "fake", **fields})
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert message in answer["error"]["message"]


@pytest.mark.asyncio(loop_scope="module")
async def test_an_unknown_model_and_an_unknown_response_are_not_found(door: Door) -> None:
    status, answer = await door.post(PATH, {"model": "gpt-9", "input": "x"})
    assert (status, answer["error"]["param"]) == (404, "model")
    status, answer = await door.get(f"{PATH}/resp_0")
    assert (status, answer["error"]["code"]) == (404, "response_not_found")
