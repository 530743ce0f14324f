"""What a chat's fields are read as, before any server hears of it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from disaggregated.errors import InvalidRequest
from orchestrator.api.chat import is_small
from orchestrator.api.fields import Fields
from orchestrator.api.tools import read_tools
from orchestrator.parsers import Content, Delta, Reasoning
from orchestrator.parsers.formats import TEXT_ONLY, ReplyFormats
from orchestrator.parsers.reasoning import REASONING
from tests.support.byte_model import byte_model
from tests.support.loop_cpu import LoopCpu, frozen_garbage
from tests.support.read_chat import read_chat
from tests.unit.parsers.pieces import parsed

VARIABLES = "{{ enable_thinking }}|{{ thinking }}|{{ reasoning_effort }}"
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}


async def prompt_of(template: str, **fields: Any) -> str:
    body = Fields({"messages": [{"role": "user", "content": "x"}], "chat_template": template, **fields})
    chat = await read_chat(body, byte_model(), TEXT_ONLY, grammar=None, allows_template=True)
    return byte_model().tokenizer.decode(chat.token_ids)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "||"),
        ({"enable_thinking": False}, "False|False|"),
        ({"thinking": {"type": "enabled"}}, "True|True|"),
        ({"thinking": {"type": "disabled"}}, "False|False|"),
        ({"thinking": {"type": "adaptive"}, "reasoning_effort": "none"}, "False|False|"),
        ({"thinking": True}, "True|True|"),
        ({"thinking": True, "enable_thinking": False}, "False|False|"),
        ({"reasoning_effort": "none"}, "False|False|"),
        ({"reasoning_effort": "high"}, "||high"),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, "False|True|"),
    ],
)
async def test_every_way_to_say_how_to_think_reaches_the_template(fields: dict[str, Any], shown: str) -> None:
    assert await prompt_of(VARIABLES + "[assistant]", **fields) == f"{shown}[assistant]"


@pytest.mark.parametrize(
    ("content", "template", "deltas"),
    [
        ("x", "{{ messages[0].content }}[assistant]<think>\n", [Reasoning("hm")]),
        ("x", "{{ messages[0].content }}[assistant]<think>\n\n</think>\n", [Content("hm")]),
        ("x<think>", "[assistant]{{ messages[0].content }}", [Reasoning("hm")]),
    ],
)
async def test_reasoning_that_the_prompt_opens_is_found_in_the_reply(
    content: str, template: str, deltas: list[Delta]
) -> None:
    formats = ReplyFormats(tools=None, reasoning=REASONING["qwen3"])
    body = Fields({"messages": [{"role": "user", "content": content}], "chat_template": template})
    chat = await read_chat(body, byte_model(), formats, grammar=None, allows_template=True)
    assert chat.plan.make_parser is not None
    assert parsed(chat.plan.make_parser(), ["hm"]) == deltas


@pytest.mark.parametrize(
    ("choice", "must_call", "name", "schemas"),
    [
        (None, False, "", {"weather", "time"}),
        ("auto", False, "", {"weather", "time"}),
        ("required", True, "", {"weather", "time"}),
        ("any", True, "", {"weather", "time"}),
        ({"type": "function", "function": {"name": "time"}}, True, "time", {"time"}),
        ({"type": "function", "name": "time"}, True, "time", {"time"}),
        ({"type": "tool", "name": "time"}, True, "time", {"time"}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]},
            True,
            "",
            {"time"},
        ),
    ],
)
def test_a_choice_says_what_may_and_what_must_be_called(
    choice: Any, must_call: bool, name: str, schemas: set[str]
) -> None:
    use = read_tools(Fields({"tools": [TOOL, {"type": "function", "name": "time"}], "tool_choice": choice}))
    assert use is not None
    assert (use.must_call, use.name, set(use.schemas)) == (must_call, name, schemas)
    assert [tool["function"]["name"] for tool in use.tools] == ["weather", "time"]


def test_no_choice_no_tools() -> None:
    assert read_tools(Fields({"tools": [TOOL], "tool_choice": "none"})) is None
    assert read_tools(Fields({"tools": [], "tool_choice": "auto"})) is None
    assert read_tools(Fields({})) is None


def test_functions_are_tools_of_which_one_is_called() -> None:
    use = read_tools(Fields({"functions": [FUNCTION], "function_call": {"name": "weather"}}))
    assert use is not None
    assert (use.is_legacy, use.is_parallel, use.must_call, use.name) == (True, False, True, "weather")


def test_a_schema_is_closed_only_where_a_grammar_needs_it() -> None:
    free = read_tools(Fields({"tools": [TOOL]}))
    forced = read_tools(Fields({"tools": [TOOL], "tool_choice": "required"}))
    beside_json = read_tools(Fields({"tools": [TOOL]}), has_grammar=True)
    assert beside_json is not None
    assert beside_json.schemas["weather"]["additionalProperties"] is False
    assert free is not None
    assert forced is not None
    assert free.schemas["weather"] == FUNCTION["parameters"]
    assert forced.schemas["weather"]["additionalProperties"] is False


async def test_tools_whose_grammar_is_too_large_are_refused_before_any_server_hears_of_it() -> None:
    many = {f"p{index}": {"type": "string", "description": "x" * 100} for index in range(400)}
    tools = [
        {"type": "function", "function": {"name": f"f{index}", "parameters": {"type": "object", "properties": many}}}
        for index in range(6)
    ]
    body = Fields({"messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": "required"})
    with pytest.raises(InvalidRequest, match="the limit is 262144") as refused:
        await read_chat(body, byte_model(num_tokens_max=1 << 20), TEXT_ONLY, grammar=None, allows_template=False)
    assert refused.value.param == "tools"


def test_what_is_small_is_found_out_in_a_moment() -> None:
    assert is_small([{"role": "user", "content": "x" * 1900}], 2000)
    assert not is_small([{"role": "user", "content": "x" * 2000}], 2000)
    wide = [["x"] * 1_000_000, {str(index): None for index in range(100_000)}, [[]] * 100_000]
    began_s = time.thread_time()
    assert not any(is_small(value, 2000) for value in wide)
    assert time.thread_time() - began_s < 0.05


async def test_a_chat_of_many_parts_does_not_hold_up_the_event_loop() -> None:
    body = Fields({"messages": [{"role": "user", "content": ["x"] * 60_000}]})
    began_s = time.process_time()
    with frozen_garbage(), LoopCpu() as loop_cpu:
        chat = await read_chat(body, byte_model(num_tokens_max=1 << 17), TEXT_ONLY, grammar=None, allows_template=False)
    took_s = time.process_time() - began_s
    assert len(chat.token_ids) > 60_000
    assert loop_cpu.longest_s < took_s / 4, f"{loop_cpu.longest_s:.3f} s of {took_s:.3f} s"
