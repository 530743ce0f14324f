"""Items in a row become the messages that the model would have written."""

from __future__ import annotations

from typing import Any

import pytest

from disaggregated.errors import InvalidRequest
from orchestrator.api.fields import Fields
from orchestrator.api.responses.body import read_body
from orchestrator.api.responses.input_items import messages_of

USER: dict[str, Any] = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "42"}


def test_a_turn_of_the_assistant_is_one_message() -> None:
    assert messages_of([USER, THOUGHT, SAID, CALL, RESULT], "input") == [
        USER,
        {"role": "assistant", "reasoning_content": "Hm.", "content": "I look.", "tool_calls": [CHAT_CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]


def test_parallel_calls_are_in_one_message() -> None:
    second = {**CALL, "call_id": "c2"}
    (_, message) = messages_of([USER, CALL, second], "input")
    assert [call["id"] for call in message["tool_calls"]] == ["c1", "c2"]
    assert message["content"] is None


def test_two_turns_are_two_messages() -> None:
    messages = messages_of([USER, THOUGHT, SAID, THOUGHT, CALL], "input")
    assert [message["role"] for message in messages] == ["user", "assistant", "assistant"]
    assert len(messages_of([USER, SAID, SAID], "input")) == 3


def test_a_result_may_answer_a_call_of_the_response_before() -> None:
    before = messages_of([USER, CALL], "input")
    assert messages_of([RESULT], "input", before=before)[-1]["content"] == "42"
    with pytest.raises(InvalidRequest, match="there is no call 'c1' before it"):
        messages_of([RESULT], "input", before=[USER])


def test_what_was_said_before_is_not_changed() -> None:
    before = messages_of([USER, SAID], "input")
    copy = [dict(message) for message in before]
    messages_of([CALL], "input", before=before)
    assert before == copy


def test_parts_are_joined_and_a_summary_stands_for_lost_thoughts() -> None:
    parts = {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}
    assert messages_of([parts], "input") == [{"role": "user", "content": "a\nb"}]
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": "…"}
    assert messages_of([USER, summary], "input")[1]["reasoning_content"] == "Hm."
    assert messages_of([USER, {"type": "reasoning", "summary": []}], "input") == [USER]


def test_a_body_becomes_the_chat_that_means_the_same() -> None:
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    schema = {"type": "json_schema", "name": "answer", "schema": {"type": "object"}, "strict": True}
    fields = {
        "model": "m", "input": "x", "instructions": "i", "max_output_tokens": 5, "temperature": 0, "stream": True,
        "tools": [tool], "tool_choice": {"type": "function", "name": "f"}, "reasoning": {"effort": "low"},
        "text": {"format": schema}, "include": ["message.output_text.logprobs"], "top_logprobs": 2, "seed": 1,
    }  # fmt: skip
    assert read_body(Fields(fields), ()).chat == {
        "model": "m", "temperature": 0, "stream": True, "seed": 1, "max_completion_tokens": 5,
        "messages": [{"role": "system", "content": "i"}, USER],
        "response_format": {"type": "json_schema", "json_schema": {k: schema[k] for k in ("name", "schema", "strict")}},
        "reasoning_effort": "low",
        "tools": [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_only_the_allowed_tools_are_left() -> None:
    tools = [{"type": "function", "name": name} for name in "fgh"]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    chat = read_body(Fields({"input": "x", "tools": tools, "tool_choice": choice}), ()).chat
    assert chat["tool_choice"] == "required"
    assert [tool["function"]["name"] for tool in chat["tools"]] == ["g"]
