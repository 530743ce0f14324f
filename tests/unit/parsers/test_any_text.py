"""Whatever a model writes, every parser takes it, reads the same from any cut of it, and loses no plain text."""

from __future__ import annotations

import json
import random

import pytest

from orchestrator.parsers import CallArguments, CallStart, Content, ReplyParser, calls_of, content_of
from orchestrator.parsers.formats import TOOL_FORMATS
from orchestrator.parsers.framed_calls import CallFrame
from orchestrator.parsers.json_calls import JsonCalls
from orchestrator.parsers.reasoning import REASONING, ReasoningParser
from tests.unit.parsers.pieces import fixed_id, one_reading

SCHEMAS = {"f": {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}}, "g": {}}
JSON_BITS = [
    "{", "}", "[", "]", '"', "\\", ":", ",", ";", " ", "\n", '"name"', '"arguments"', '"parameters"', '"function"',
    '"f"', "null", "3", '{"name": "f", "arguments": {"a": "x"}}', '{"name": "g"', '"\\ud800"', "ü", "word",
]  # fmt: skip
TAG_BITS = ["<", ">", "<function=", "f>", "<parameter=", "a>", "n>", "</parameter>", "</function>", "<tool_call>", "f"]
TAG_BITS += ["<arg_key>a</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>", "(", ")", "'", "=", "f(a='x')"]


def text_of(name: str, seed: int) -> str:
    chosen = random.Random(f"{name} {seed}")
    markers = [*TOOL_FORMATS[name].markers] or ["<|python_tag|>"]
    bits = [*JSON_BITS, *TAG_BITS, *markers * 6, *(marker[: len(marker) // 2] for marker in markers)]
    return "".join(chosen.choices(bits, k=chosen.randint(1, 25)))


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_any_mixture_of_markers_and_json_is_read_the_same_from_any_cut(name: str) -> None:
    for seed in range(25):
        deltas = one_reading(lambda: TOOL_FORMATS[name].make(SCHEMAS, fixed_id), text_of(name, seed))
        starts = [delta.index for delta in deltas if type(delta) is CallStart]
        assert starts == list(range(len(starts)))
        assert all(delta.index < len(starts) for delta in deltas if type(delta) is CallArguments)
        assert all(call.name is not None for call in calls_of(deltas))


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_text_without_a_call_comes_out_as_it_went_in(name: str) -> None:
    bits = ["word", " ", "\n", ".", "ü", "<", "[", "{", "|", "`", "“", "tool", "(", "x="]
    for seed in range(25):
        text = "".join(random.Random(seed).choices(bits, k=40))
        assert one_reading(lambda: TOOL_FORMATS[name].make(SCHEMAS, fixed_id), text) == [Content(text)]


def test_forced_calls_of_any_arguments_come_back_as_they_were() -> None:
    for seed in range(25):
        chosen = random.Random(seed)
        arguments = [{"a": chosen.choice(["", '"', "}{", "\\", "</x>", "ü\n"]) * 2, "n": seed} for _ in range(3)]
        reply = json.dumps([{"name": "f", "parameters": each} for each in arguments], ensure_ascii=seed % 2 == 0)
        deltas = one_reading(lambda: JsonCalls(CallFrame(), SCHEMAS, fixed_id, is_forced=True), reply)
        assert [json.loads(call.arguments) for call in calls_of(deltas)] == arguments
        assert content_of(deltas) == ""


@pytest.mark.parametrize("begins_within", [True, False])
@pytest.mark.parametrize("name", REASONING)
def test_reasoning_of_any_text_is_read_the_same_from_any_cut(name: str, begins_within: bool) -> None:
    tags = REASONING[name]
    bits = [tags.begin, tags.end, tags.begin[:4], tags.end[:5], " ", "\n", "word", "<tool_call>", JSON_BITS[-5]]

    def make() -> ReplyParser:
        then = TOOL_FORMATS["hermes"].make(SCHEMAS, fixed_id)
        return ReasoningParser(tags, begins_within=begins_within, then=then)

    for seed in range(15):
        one_reading(make, "".join(random.Random(seed).choices(bits, k=12)))
