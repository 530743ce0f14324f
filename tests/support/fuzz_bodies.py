"""Bodies that are nearly right: good ones for each endpoint, each with a few mutations drawn from a seed."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
_FUNCTION: Final[dict[str, Any]] = {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}
_TOOL: Final[dict[str, Any]] = {"type": "function", "function": _FUNCTION}
_CALL: Final[dict[str, Any]] = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
}
_PATCH: Final = """
start: line+ end?
line: /[a-z]*/ LF | "<" LINE ">" -> tag
end: "end"i
LINE: /./~1..3
%import common.LF
"""
_CUSTOM: Final[dict[str, Any]] = {
    "type": "custom",
    "custom": {
        "name": "patch",
        "description": "Edits.",
        "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": _PATCH}},
    },
}
_CUSTOM_CALL: Final[dict[str, Any]] = {"id": "c3", "type": "custom", "custom": {"name": "patch", "input": "a\n"}}
_USER: Final[dict[str, Any]] = {"role": "user", "content": "Hi"}
_SAMPLING: Final[dict[str, Any]] = {
    "model": "fake", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"5": 1.5},
    "stop": ["zz"], "stop_token_ids": [7], "min_tokens": 1, "ignore_eos": True, "bad_words": ["bad"], "user": "me",
    "priority": 1, "n": 2, "stream": True, "cache_salt": "s", "truncate_prompt_tokens": 90, "truncation_side": "right",
    "stream_options": {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False},
}  # fmt: skip

GOOD: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("/v1/chat/completions", {"model": "fake", "messages": [_USER], "max_tokens": 2}),
    ("/v1/chat/completions", {**_SAMPLING, "messages": [_USER], "logprobs": True, "top_logprobs": 2}),
    (
        "/v1/chat/completions",
        {
            "model": "fake", "messages": [_USER], "max_tokens": 2, "logprobs": True, "logprob_token_ids": [3, 99],
            "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 3},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "fake", "max_tokens": 2, "tools": [_TOOL], "tool_choice": "auto", "parallel_tool_calls": True,
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}, _USER,
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            ],
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "fake", "max_tokens": 2, "messages": [_USER],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
            "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low", "metadata": {"a": "b"},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "fake", "max_tokens": 2, "continue_final_message": True, "add_generation_prompt": False,
            "messages": [_USER, {"role": "assistant", "content": [{"type": "text", "text": "Well, "}]}],
            "echo": True, "return_prompt_text": True, "return_token_ids": True, "add_special_tokens": False,
            "stream": True,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "fake", "max_tokens": 2, "tool_choice": "auto", "tools": [_TOOL, _CUSTOM],
            "messages": [
                _USER, {"role": "assistant", "tool_calls": [_CUSTOM_CALL]},
                {"role": "tool", "tool_call_id": "c3", "content": "done"},
                {"role": "assistant", "content": "So", "prefix": True},
            ],
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "fake", "max_tokens": 2, "tool_choice": {"type": "custom", "custom": {"name": "patch"}},
            "tools": [_CUSTOM], "messages": [_USER],
        },
    ),
    ("/v1/completions", {**_SAMPLING, "prompt": "Hello", "logprobs": 2, "echo": True}),
    ("/v1/completions", {"model": "fake", "prompt": [[1, 2], [3]], "max_tokens": 2, "return_token_ids": True}),
    ("/v1/completions", {"model": "fake", "prompt": ["a", "b"], "max_tokens": 1, "guided_choice": ["a", "b"]}),
    ("/v1/completions", {"model": "fake", "prompt": "x", "max_tokens": 2, "guided_regex": "[ab]+"}),
    ("/v1/completions", {"model": "fake", "prompt": "x", "max_tokens": 2, "prompt_logprobs": 1}),
    ("/v1/responses", {"model": "fake", "input": "Hi", "max_output_tokens": 2, "instructions": "i", "stream": True}),
    (
        "/v1/responses",
        {
            "model": "fake", "max_output_tokens": 2, "store": True, "metadata": {"a": "b"}, "tool_choice": "auto",
            "tools": [{"type": "function", **_FUNCTION}], "text": {"format": {"type": "text"}, "verbosity": "low"},
            "reasoning": {"effort": "low"}, "include": ["message.output_text.logprobs"], "top_logprobs": 1,
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            ],
        },
    ),
    (
        "/v1/responses",
        {
            "model": "fake", "max_output_tokens": 2, "store": False, "client_metadata": {"a": "b"},
            "truncation": "auto",
            "tools": [
                {"type": "namespace", "name": "agents", "tools": [{"type": "function", **_FUNCTION}]},
                {
                    "type": "custom", "name": "patch",
                    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x" /y+/'},
                },
                {"type": "web_search", "external_web_access": False},
            ],
            "input": [
                {"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi"},
                {"type": "function_call", "call_id": "c1", "namespace": "agents", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sunny"}]},
                {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "x"},
                {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
            ],
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "fake", "max_tokens": 2, "messages": [_USER],
            "response_format": {
                "type": "structural_tag",
                "format": {
                    "type": "triggered_tags", "triggers": ["<f="], "at_least_one": True,
                    "tags": [{"begin": "<f=x>", "content": {"type": "any_text"}, "end": "</f>"}],
                },
            },
        },
    ),
    ("/v1/responses/input_tokens", {"model": "fake", "input": "Hi", "truncation": "auto"}),
    ("/tokenize", {"model": "fake", "prompt": "Hi", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": [_USER], "add_generation_prompt": False, "tools": [_TOOL]}),
    ("/tokenize", {"messages": [{"role": "assistant", "content": "So"}], "continue_final_message": True}),
    ("/detokenize", {"model": "fake", "tokens": [1, 2, 3], "skip_special_tokens": True}),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    path: str
    body: bytes


def probes(seed: int, count: int) -> Iterator[Probe]:
    """The same ones for the same seed."""
    for number in range(count):
        draw = random.Random(f"{seed}:{number}")
        path, good = draw.choice(GOOD)
        body = copy.deepcopy(good)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            _mutate(body, draw)
        encoded = json.dumps(body).encode()
        yield Probe(path, _damaged(encoded, draw) if draw.random() < 0.1 else encoded)


def _mutate(body: dict[str, Any], draw: random.Random) -> None:
    places = list(_places(body))
    if not places or draw.random() < 0.05:
        body[draw.choice(_NAMES)] = _odd(draw)
        return
    holder, key = draw.choice(places)
    match draw.randrange(6):
        case 0 | 1 | 2:
            holder[key] = _odd(draw)
        case 3:
            del holder[key]
        case 4:
            other, other_key = draw.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
        case _:
            if isinstance(holder, list):
                holder.extend([copy.deepcopy(holder[key])] * draw.choice((1, 3, 200)))
            else:
                holder[draw.choice(_NAMES)] = holder[key]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every member of every object and array in it."""
    for key, member in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(member, (dict, list)):
            yield from _places(member)


def _nested(depth: int, opener: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = opener(value)
    return value


def _doubling(num_rules: int) -> str:
    """A grammar that is as long as it may be when it is written out, and longer."""
    rules = [f"r{number}: r{number + 1} r{number + 1}?" for number in range(num_rules)]
    return "\n".join(["start: r0", *rules, f'r{num_rules}: "x"'])


_NAMES: Final = (*sorted({name for _, good in GOOD for name in good}), "wizardry", "", "suffix", "best_of", "functions")
_ODD: Final[tuple[Callable[[random.Random], Any], ...]] = (
    lambda draw: None,
    lambda draw: draw.choice((True, False)),
    lambda draw: draw.choice((0, -1, 1, 2**31, 2**53, -(2**63), 2**64 - 1, 1e308, -0.0, 0.5, 1e-300)),
    lambda draw: draw.choice(("", " ", "x", "null", "auto", "none", "required", "\x00", "\ud7ff", "🦊", "x" * 5000)),
    lambda draw: "ab " * draw.randrange(20_000),
    lambda draw: draw.choice(([], {}, [[]], [{}], {"type": "x"}, {"": ""}, [None], ["x"], [1, "x"])),
    lambda draw: [draw.randrange(300) for _ in range(draw.choice((2, 60, 20_000)))],
    lambda draw: _nested(draw.choice((3, 100, 200)), lambda value: [value]),
    lambda draw: _nested(draw.choice((3, 100, 200)), lambda value: {"properties": {"a": value}}),
    lambda draw: {str(number): number for number in range(draw.choice((3, 2000)))},
    lambda draw: draw.choice(('start: "a" start | "b"', "start: (a", 'start: "a"~9..2', _doubling(40), _doubling(400))),
    lambda draw: draw.choice((r"(a+)+$", "[", "a{1,99999}", "(?=a)", r"\p{L}", "(?P<x>a)")),
    lambda draw: draw.choice(({"type": "json_object"}, {"type": "json_schema"}, {"type": "function", "name": "f"})),
)


def _odd(draw: random.Random) -> Any:
    return draw.choice(_ODD)(draw)


def _damaged(body: bytes, draw: random.Random) -> bytes:
    """No JSON any more, mostly; or JSON that few writers write."""
    at = draw.randrange(len(body))
    match draw.randrange(6):
        case 0:
            return body[:at]
        case 1:
            return body[:at] + bytes([draw.randrange(256)]) + body[at + 1 :]
        case 2:
            return body[:-1] + b',"x":' + b"[" * 900 + b"]" * 900 + b"}"
        case 3:
            return body.replace(b"3", b"1e999")
        case 4:
            return body.replace(b'"Hi"', b'"\\ud800"')
        case _:
            return body[:-1] + b',"model":"fake","model":["fake"]}'
