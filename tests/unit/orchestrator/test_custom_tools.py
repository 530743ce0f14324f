"""Custom tools of chats and responses: told to the model as functions, and to the client as what they are."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Final

import openai
import pytest
import pytest_asyncio

from disaggregated.errors import InvalidRequest
from orchestrator.api.custom_tools import custom_arguments, custom_input, custom_names, read_custom_tool
from orchestrator.api.fields import Fields
from orchestrator.api.tools import read_tools
from tests.support.followed import EXPRESSION_GRAMMAR, PATCH, PATCH_GRAMMAR
from tests.support.front_door import Door, front_door
from tests.support.script import says

CHAT: Final = "/v1/chat/completions"
RESPONSES: Final = "/v1/responses"
LARK: Final = {"syntax": "lark", "definition": PATCH_GRAMMAR}
DATE: Final = {"syntax": "regex", "definition": r"^\d{4}-\d\d$"}
RECURSIVE: Final = {"syntax": "lark", "definition": EXPRESSION_GRAMMAR}
SAYS: Final = f'Now.\n<tool_call>\n{{"name": "patch", "arguments": {json.dumps({"input": PATCH})}}}\n</tool_call>'

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door(num_tokens_max=8192) as opened:
        yield opened


def of_chat(grammar: Any = LARK, name: str = "patch") -> dict[str, Any]:
    wanted = {"format": {"type": "grammar", "grammar": grammar}} if grammar else {}
    return {"type": "custom", "custom": {"name": name, "description": "Edits files.", **wanted}}


def of_responses(grammar: Any = LARK, name: str = "patch") -> dict[str, Any]:
    wanted = {"format": {"type": "grammar", **grammar}} if grammar else {}
    return {"type": "custom", "name": name, "description": "Edits files.", **wanted}


def body(path: str, said: str = "Hi", grammar: Any = LARK, **fields: Any) -> dict[str, Any]:
    if path == CHAT:
        own: dict[str, Any] = {"messages": [{"role": "user", "content": says(said)}], "tools": [of_chat(grammar)]}
    else:
        own = {"input": says(said), "tools": [of_responses(grammar)], "store": False}
    return {"model": "fake", **own, **fields}


@pytest.mark.parametrize("grammar", [None, LARK, DATE], ids=["text", "lark", "regex"])
async def test_a_chat_s_call_is_told_as_a_custom_one(client: openai.AsyncOpenAI, grammar: Any) -> None:
    fields: Any = body(CHAT, SAYS, grammar)
    answer = await client.chat.completions.create(**fields)
    (call,) = answer.choices[0].message.tool_calls or [None]
    assert call is not None
    assert call.type == "custom"
    assert (call.custom.name, call.custom.input) == ("patch", PATCH)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content == "Now."


async def test_a_stream_tells_its_name_at_once_and_its_input_as_a_whole(client: openai.AsyncOpenAI) -> None:
    weather = {"type": "function", "function": {"name": "weather"}}
    said = SAYS + '<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>'
    fields: Any = body(CHAT, said, None, stream=True)
    fields["tools"].append(weather)
    chunks = [chunk.choices[0] async for chunk in await client.chat.completions.create(**fields)]
    calls = [call.model_dump(exclude_none=True) for chunk in chunks for call in chunk.delta.tool_calls or ()]
    first = next(call for call in calls if call["index"] == 0)
    assert (first["type"], first["custom"]) == ("custom", {"name": "patch", "input": ""})
    assert [call["custom"] for call in calls if call["index"] == 0][1:] == [{"input": PATCH}]
    arguments = [call["function"]["arguments"] for call in calls if call["index"] == 1]
    assert json.loads("".join(arguments)) == {"a": 1}
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Now."


async def test_a_call_comes_back_in_the_next_turn_as_the_model_wrote_it(door: Door) -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": PATCH}}
    function = {"name": "patch", "arguments": custom_arguments(PATCH)}
    counts = []
    for one in (call, {"id": "c", "type": "function", "function": function}):
        turns = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [one]},
            {"role": "tool", "tool_call_id": "c", "content": "done"},
        ]
        status, counted = await door.post("/tokenize", {"messages": turns, "tools": [of_chat()]})
        assert status == 200, counted
        counts.append(counted["tokens"])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("choice", [{"type": "custom", "custom": {"name": "patch"}}, "required"])
async def test_a_chat_s_forced_call_is_told_so_too(client: openai.AsyncOpenAI, choice: Any) -> None:
    said = PATCH if choice != "required" else json.dumps([{"name": "patch", "parameters": {"input": PATCH}}])
    fields: Any = body(CHAT, said, tool_choice=choice)
    answer = await client.chat.completions.create(**fields)
    (call,) = answer.choices[0].message.tool_calls or [None]
    assert call is not None
    assert call.type == "custom"
    assert call.custom.input == PATCH


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("grammar", [LARK, RECURSIVE], ids=["regular", "recursive"])
async def test_a_response_s_named_call_is_nothing_but_its_input(
    client: openai.AsyncOpenAI, grammar: Any, stream: bool
) -> None:
    said = PATCH if grammar is LARK else "(1+2)"
    fields: Any = body(RESPONSES, said, grammar, tool_choice={"type": "custom", "name": "patch"})
    told: Any = await client.responses.create(**fields, stream=stream)
    if stream:
        events = [event async for event in told]
        told = events[-1].response
    (item,) = told.output
    assert (item.type, item.name, item.input) == ("custom_tool_call", "patch", said)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_grammar_that_no_call_can_be_kept_to_is_refused(door: Door, path: str, choice: str) -> None:
    status, answer = await door.post(path, body(path, "x", RECURSIVE, tool_choice=choice))
    assert (status, answer["error"]["param"]) == (400, "tools")
    assert "the grammar of 'patch' cannot be enforced within a call" in answer["error"]["message"]
    assert "expr is recursive" in answer["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
async def test_an_expression_that_nobody_can_read_is_refused_before_any_server_hears_of_it(
    door: Door, path: str
) -> None:
    status, answer = await door.post(path, body(path, "x", {"syntax": "regex", "definition": "(a"}))
    assert (status, answer["error"]["param"]) == (400, "tools")
    assert "tools cannot be compiled" in answer["error"]["message"]


CASES: Final[list[tuple[dict[str, Any], str, str]]] = [
    ({"format": 5}, "format", "must be an object"),
    ({"format": {"type": "xml"}}, "format.type", "must be text or grammar, is 'xml'"),
    ({"format": {"type": "grammar"}}, "format.syntax", "must be lark or regex, is None"),
    ({"format": {"type": "grammar", "grammar": 5}}, "format.grammar", "must be an object"),
    ({"format": {"type": "grammar", "grammar": {"syntax": "x"}}}, "format.grammar.syntax", "must be lark or regex"),
    ({"format": {"type": "grammar", "syntax": "lark"}}, "format.definition", "must be a string, is null"),
    ({"format": {"type": "grammar", "syntax": "regex", "definition": ""}}, "format.definition", "must not be empty"),
    (
        {"format": {"type": "grammar", "syntax": "lark", "definition": "x" * 70_000}},
        "format.definition",
        "has 70000 bytes, the limit is 65536",
    ),
    ({"description": 5}, "description", "must be a string"),
]


@pytest.mark.parametrize(("custom", "member", "message"), CASES, ids=[case[1] + case[2][:12] for case in CASES])
async def test_what_is_wrong_with_a_tool_is_told_by_its_place(
    door: Door, custom: dict[str, Any], member: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        read_custom_tool(custom, "tools[0]")
    assert refused.value.param == f"tools[0].{member}"
    tool = {"type": "custom", "name": "x", **custom}
    _, answer = await door.post(RESPONSES, {"model": "fake", "input": "x", "tools": [tool]})
    assert answer["error"]["param"] == f"tools[0].{member}"
    tool = {"type": "custom", "custom": {"name": "x", **custom}}
    _, answer = await door.post(
        CHAT, {"model": "fake", "messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    )
    assert answer["error"]["param"] == f"tools[0].custom.{member}"


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "custom"}, "tools[0].custom"),
        ({"type": "custom", "custom": {}}, "tools[0].custom.name"),
        ({"type": "custom", "custom": {"name": "a b"}}, "tools[0].custom.name"),
    ],
)
async def test_a_chat_s_custom_tool_has_a_name(tool: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_tools(Fields({"tools": [tool]}))
    assert refused.value.param == param


@pytest.mark.parametrize("custom", [None, {}, {"name": "x"}, {"name": "x", "input": 5}])
async def test_a_custom_call_of_an_earlier_turn_is_checked(door: Door, custom: Any) -> None:
    message = {"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": custom}]}
    status, answer = await door.post(CHAT, {"model": "fake", "messages": [message]})
    assert status == 400
    assert answer["error"]["param"].startswith("messages[0].tool_calls[0].custom")


async def test_the_model_is_told_of_the_grammar_and_kept_to_it() -> None:
    use = read_tools(Fields({"tools": [of_chat(), of_chat(DATE, "date"), of_chat(None, "free")]}))
    assert use is not None
    told = {tool["function"]["name"]: tool["function"] for tool in use.tools}
    assert told["patch"]["description"].endswith(f"The input follows this lark grammar:\n{PATCH_GRAMMAR}")
    assert told["free"]["description"] == "Edits files."
    assert all(one["parameters"]["properties"] == {"input": {"type": "string"}} for one in told.values())
    assert use.schemas["date"]["properties"]["input"]["pattern"] == r"^(?:\d{4}-\d\d)$"
    assert set(use.inputs) == {"patch", "date"}


@pytest.mark.parametrize("tools", [None, 5, [5], [{"custom": 5}], [{"custom": {}}], [{"custom": {"name": 5}}]])
async def test_names_are_looked_for_in_whatever_a_client_sends(tools: Any) -> None:
    assert custom_names(tools) == frozenset()
    assert custom_names([of_chat()]) == {"patch"}


@pytest.mark.parametrize("arguments", ["", "{", '{"input": 5}', '{"patch": "x"}', "[]", '"x"'])
async def test_what_is_no_input_is_given_on_as_it_is(arguments: str) -> None:
    assert custom_input(arguments) == arguments
    assert custom_input(custom_arguments(arguments)) == arguments
