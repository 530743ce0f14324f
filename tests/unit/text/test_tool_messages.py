"""Tools in a prompt: as the template has them, or in plain text where it knows of none."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from disaggregated.errors import InvalidRequest
from disaggregated.text import ChatTemplate
from disaggregated.text.chat_messages import template_messages

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {"a": "ü"}}}]
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "x", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "sunny"}]},
]


def test_a_template_without_tools_is_told_of_them_in_the_system_message() -> None:
    rendered = ChatTemplate(PLAIN, {}).render(HISTORY, tools=TOOLS)
    system, user, assistant, result = rendered.removeprefix("[").split("\n[user]")[0], *rendered.split("[")[-3:]
    assert system.startswith("system]You may call functions")
    assert json.dumps(TOOLS[0]["function"], ensure_ascii=False) in rendered
    assert user == "user]Weather?"
    assert assistant == 'assistant]<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call>'
    assert result == "user]<tool_response>\nsunny\n</tool_response>"


def test_a_system_message_that_is_there_keeps_its_words() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HISTORY]
    rendered = ChatTemplate(PLAIN, {}).render(messages, tools=TOOLS)
    assert rendered.startswith("[system]Be brief.\n\nYou may call functions")
    assert rendered.count("[system]") == 1


def test_a_template_that_knows_tools_gets_them_untouched() -> None:
    template = ChatTemplate("{{ tools | tojson }}{{ messages[1].tool_calls[0].function.arguments.a }}", {})
    assert template.render(HISTORY, tools=TOOLS) == f"{json.dumps(TOOLS, ensure_ascii=False)}1"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "content": "x", "tool_calls": [], "function_call": None, "refusal": None},
            {"role": "assistant", "content": "x"},
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
            },
        ),
        ({"role": "function", "name": "f", "content": "x"}, {"role": "tool", "name": "f", "content": "x"}),
        ({"role": "tool", "content": None, "tool_call_id": "x"}, {"role": "tool", "content": "", "tool_call_id": "x"}),
        (
            {"role": "assistant", "content": "x", "reasoning": "hm"},
            {"role": "assistant", "content": "x", "reasoning_content": "hm"},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": "no"},
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            {"role": "user", "content": "x"},
        ),
    ],
)
def test_what_clients_send_becomes_what_templates_know(message: dict[str, Any], shown: dict[str, Any]) -> None:
    assert template_messages([message]) == [shown]


def test_a_strangers_template_that_does_not_end_is_stopped() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    began_s = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"takes longer than 0\.05 s"):
        ChatTemplate(source, {}).render([], timeout_s=0.05)
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("source", ["{{ 'x' * 10000000000 }}", "{{ 9 ** 9 ** 9 }}", "{{ [1] * 10000000000 }}"])
def test_a_template_cannot_fill_the_memory(source: str) -> None:
    with pytest.raises(InvalidRequest, match="is not for that much"):
        ChatTemplate(source, {}).render([])


def test_a_template_may_still_multiply() -> None:
    assert ChatTemplate("{{ 6 * 7 }}{{ '-' * 3 }}", {}).render([]) == "42---"


def test_a_strangers_template_in_time_is_rendered() -> None:
    assert ChatTemplate(PLAIN, {}).render([{"role": "user", "content": "x"}], timeout_s=5.0) == "[user]x"
