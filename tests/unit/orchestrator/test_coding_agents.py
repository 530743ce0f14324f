"""What coding agents send is answered, or refused by the name of what does not exist here."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.support.agent_bodies import ACCEPTED, CODEX, REFUSED
from tests.support.front_door import Door, front_door
from tests.support.script import says

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATCH = "*** Begin Patch\n*** Update File: a.py\n"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door(num_tokens_max=8192) as opened:
        yield opened


@pytest.mark.parametrize("agent", ACCEPTED)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_agent_is_answered(door: Door, agent: str, stream: bool) -> None:
    path, body = ACCEPTED[agent]
    if not stream:
        body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    async with door.http.post(door.url + path, json=body) as answer:
        text = await answer.text()
    assert answer.status == 200, text
    assert '"error"' not in text or '"error":null' in text


@pytest.mark.parametrize("agent", REFUSED)
async def test_what_cannot_be_answered_is_refused_by_its_name(door: Door, agent: str) -> None:
    path, body, param = REFUSED[agent]
    status, answer = await door.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer


async def test_a_search_that_nobody_could_run_is_left_out_and_named(door: Door) -> None:
    async with door.http.post(f"{door.url}/v1/responses", json={**CODEX, "my_own": 1}) as answer:
        await answer.read()
    assert answer.headers["x-disagg-ignored"] == "my_own,tools[2].web_search"


def calling(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tool", "said", "told"),
    [
        (
            {"type": "namespace", "name": "agents", "tools": [{"type": "function", "name": "close"}]},
            calling("agents.close", {"path": "x"}),
            {"type": "function_call", "namespace": "agents", "name": "close", "arguments": '{"path": "x"}'},
        ),
        (
            {"type": "custom", "name": "apply_patch"},
            calling("apply_patch", {"input": PATCH}),
            {"type": "custom_tool_call", "name": "apply_patch", "input": PATCH},
        ),
        (
            {"type": "custom", "name": "apply_patch"},
            calling("apply_patch", {"patch": "x"}),
            {"type": "custom_tool_call", "name": "apply_patch", "input": '{"patch": "x"}'},
        ),
        (
            {"type": "namespace", "name": "a", "description": "", "tools": [{"type": "custom", "name": "b"}]},
            calling("a.b", {"input": "ü"}),
            {"type": "custom_tool_call", "namespace": "a", "name": "b", "input": "ü"},
        ),
    ],
)
async def test_a_call_is_told_in_the_words_of_its_tool(
    client: openai.AsyncOpenAI, tool: Any, said: str, told: dict[str, str], stream: bool
) -> None:
    fields: dict[str, Any] = {"model": "fake", "input": says(said), "tools": [tool], "store": False}
    deltas = ""
    if stream:
        events = [event async for event in await client.responses.create(**fields, stream=True)]
        response = events[-1].response
        deltas = "".join(event.delta for event in events if event.type.endswith((".delta",)))
        done = next(event for event in events if event.type == "response.output_item.done")
        assert done.item == response.output[0]
    else:
        response = await client.responses.create(**fields)
    (call,) = response.output
    seen = {name: value for name, value in call.model_dump().items() if name in told}
    assert seen == told
    assert deltas in ("", told.get("input", told.get("arguments")))
    assert not stream or deltas
    answer: Any = {"type": f"{told['type']}_output", "call_id": call.call_id, "output": "done"}
    history: Any = [{"role": "user", "content": "x"}, call.model_dump(exclude_none=True), answer]
    again = await client.responses.create(**{**fields, "input": [*history, {"role": "user", "content": says("Good.")}]})
    assert again.output_text == "Good."
