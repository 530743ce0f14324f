"""Each family's way of calling tools is read, however the reply was cut; what only looks like a call stays text."""

from __future__ import annotations

import json

import pytest

from orchestrator.parsers import CallArguments, CallStart, Content, Delta, calls_of, content_of
from orchestrator.parsers.formats import TOOL_FORMATS
from orchestrator.parsers.marked_calls import DEEPSEEK, KIMI
from tests.unit.parsers.pieces import fixed_id, one_reading

SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"type": ["string", "null"]},
            "hourly": {"type": "boolean"},
        },
    },
    "time": {"type": "object", "properties": {}},
}
ARGUMENTS = '{"city": "São }{ \\"Paulo\\" <tool>", "days": 3}'
CALLED = {"city": 'São }{ "Paulo" <tool>', "days": 3}


def read(name: str, text: str) -> list[Delta]:
    return one_reading(lambda: TOOL_FORMATS[name].make(SCHEMAS, fixed_id), text)


def deepseek(*calls: str) -> str:
    inner = "\n".join(f"{DEEPSEEK.call_begin}{call}{DEEPSEEK.call_end}" for call in calls)
    return f"{DEEPSEEK.section_begin}{inner}{DEEPSEEK.section_end}"


TWO_CALLS = {
    "hermes": (
        f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    ),
    "hermes, in one pair of tags": (
        f'<tool_call>[{{"arguments": {ARGUMENTS}, "name": "weather"}}, {{"name": "time"}}]</tool_call>'
    ),
    "hermes, arguments within a string": (
        f'<tool_call>{{"name": "weather", "arguments": {json.dumps(ARGUMENTS)}}}</tool_call>'
        '<tool_call>{"name": "time", "arguments": null}</tool_call>'
    ),
    "llama3_json": f'{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "time", "parameters": {{}}}}',
    "llama3_json, as OpenAI writes it": (
        f'[{{"type": "function", "function": {{"name": "weather", "parameters": {ARGUMENTS}}}}},'
        ' {"type": "function", "function": {"name": "time", "arguments": {}}}]'
    ),
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "time", "arguments": {{}}}}]',
    "mistral": f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "time", "arguments": {{}}}}]',
    "mistral, newer": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]time[ARGS]{{}}",
    "mistral, with ids": f"[TOOL_CALLS]weather[CALL_ID]id[ARGS]{ARGUMENTS}[TOOL_CALLS]time[CALL_ID]id[ARGS]{{}}",
    "deepseek_v3": deepseek(
        f"function{DEEPSEEK.name_end}weather\n```json\n{ARGUMENTS}\n```",
        f"function{DEEPSEEK.name_end}time\n```json\n{{}}\n```",
    ),
    "deepseek_v3, newer": deepseek(f"weather{DEEPSEEK.name_end}{ARGUMENTS}", f"time{DEEPSEEK.name_end}{{}}"),
    "pythonic": "[weather(city='São }{ \"Paulo\" <tool>', days=3), time()]",
    "llama4_pythonic": "<|python_start|>[weather(city='São }{ \"Paulo\" <tool>', days=3), time()]<|python_end|>",
    "lfm2": "<|tool_call_start|>[weather(city='São }{ \"Paulo\" <tool>', days=3), time()]<|tool_call_end|>",
    "qwen3_coder": (
        '<tool_call>\n<function=weather>\n<parameter=city>\nSão }{ "Paulo" <tool>\n</parameter>\n<parameter=days>\n3\n'
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>"
    ),
    "qwen3_coder, without tags": (
        '<function=weather><parameter=city>São }{ "Paulo" <tool></parameter><parameter=days>3</parameter></function>'
        "<function=time></function>"
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">São }{ "Paulo" <tool></parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="time">\n</invoke>\n</minimax:tool_call>'
    ),
    "minimax": (
        f'<tool_calls>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n{{"name": "time", "arguments": {{}}}}\n'
        "</tool_calls>"
    ),
    "glm45": (
        '<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>São }{ "Paulo" <tool></arg_value>\n'
        "<arg_key>days</arg_key><arg_value>3</arg_value>\n</tool_call>\n<tool_call>time</tool_call>"
    ),
}


@pytest.mark.parametrize("case", TWO_CALLS)
def test_two_calls_are_read_however_the_reply_was_cut(case: str) -> None:
    deltas = read(case.partition(",")[0], TWO_CALLS[case])
    calls = calls_of(deltas)
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", CALLED), ("time", {})]
    assert [call.call_id for call in calls] == ["id", "id"]
    assert content_of(deltas) == ""


@pytest.mark.parametrize("case", [case for case in TWO_CALLS if not case.startswith(("llama3", "pythonic"))])
def test_text_around_calls_stays_without_the_space_between(case: str) -> None:
    deltas = read(case.partition(",")[0], f"I'll look.\n\n{TWO_CALLS[case]}\n That is all.\n")
    assert deltas[0] == Content("I'll look.")
    assert deltas[-1] == Content("That is all.\n")
    assert len(calls_of(deltas)) == 2


def test_kimi_names_calls_in_their_ids_and_finds_them_again() -> None:
    call = f"{KIMI.call_begin}functions.weather:0{KIMI.name_end}{ARGUMENTS}{KIMI.call_end}"
    deltas = read("kimi_k2", f"{KIMI.section_begin}{call}{KIMI.section_end}")
    assert deltas == [CallStart(0, "functions.weather:0", "weather"), CallArguments(0, ARGUMENTS)]


NO_CALLS = [
    ("hermes", "Just text, with < and <tool and {braces}."),
    ("hermes", "<tool_call> is how I would call."),
    ("hermes", "so: \n<tool_call> [1, 2] </tool_call>"),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>\n{"na'),
    ("hermes", "the end is <tool_ca"),
    ("llama3_json", '{"name": "Bob", "parameters": {"age": 3}}'),
    ("llama3_json", ' [1, {"name": 2}]'),
    ("llama3_json", "{"),
    ("llama3_json", 'Hello {"name": "weather", "parameters": {}}'),
    ("mistral", "[TOOL_CALLS]weather"),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("deepseek_v3", f"{DEEPSEEK.section_begin} nothing"),
    ("deepseek_v3", f"{DEEPSEEK.call_begin}weather"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[open('x')]"),
    ("pythonic", "[weather(**x)]"),
    ("pythonic", "[weather(city=open)]"),
    ("pythonic", "[weather(city="),
    ("pythonic", "Look: [weather()]"),
    ("qwen3_coder", "<tool_call>weather"),
    ("glm45", "<tool_call>\n</tool_call>"),
    ("minimax_m2", "<minimax:tool_call>weather"),
    ("minimax", "<tool_calls>\n</tool_calls>"),
]


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_what_only_looks_like_a_call_is_text_to_the_last_character(name: str, text: str) -> None:
    assert read(name, text) == [Content(text)]


CUT_SHORT = [
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Os', '{"city": "Os'),
    ("hermes", '<tool_call>{"name": "weather"', ""),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": ', '{"city": '),
    ("deepseek_v3", f'{DEEPSEEK.call_begin}weather{DEEPSEEK.name_end}{{"city', '{"city'),
    ("qwen3_coder", "<function=weather><parameter=city>\nOs", '{"city": "Os'),
    ("qwen3_coder", "<function=weather><parameter=days>\n1", '{"days": '),
]


@pytest.mark.parametrize(("name", "text", "arguments"), CUT_SHORT)
def test_of_a_call_that_is_cut_short_all_that_came_is_told(name: str, text: str, arguments: str) -> None:
    (call,) = calls_of(deltas := read(name, text))
    assert (call.name, call.arguments) == ("weather", arguments)
    assert content_of(deltas) == ""


def test_text_that_is_no_unicode_stays_as_the_model_spelled_it() -> None:
    assert read("hermes", text := r'<tool_call>{"name": "\ud800"}</tool_call>') == [Content(text)]
    (call,) = calls_of(read("hermes", r'<tool_call>{"name": "time", "arguments": "\ud800"}</tool_call>'))
    assert call.arguments == r'"\ud800"'


def test_a_bracket_that_was_forgotten_does_not_swallow_what_follows() -> None:
    deltas = read("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"</tool_call> Done.')
    assert deltas == [CallStart(0, "id", "weather"), CallArguments(0, '{"city": "Oslo"'), Content("Done.")]


def test_tagged_values_become_what_the_schema_says() -> None:
    text = (
        "<function=weather><parameter=city>\n42\n</parameter><parameter=days>42</parameter>"
        "<parameter=units>null</parameter><parameter=hourly>True</parameter><parameter=other>a\nb</parameter></function>"
    )
    (call,) = calls_of(read("qwen3_coder", text))
    assert json.loads(call.arguments) == {"city": "42", "days": 42, "units": None, "hourly": True, "other": "a\nb"}


def test_long_text_in_a_tag_is_given_on_as_it_comes() -> None:
    parser = TOOL_FORMATS["qwen3_coder"].make(SCHEMAS, fixed_id)
    parser.push("<function=weather><parameter=city>\n")
    assert parser.push('line "1"\nline 2') == [CallArguments(0, 'line \\"1\\"\\nline 2')]


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "deepseek_v3"])
def test_arguments_are_given_on_character_by_character(name: str) -> None:
    text = TWO_CALLS[name]
    parser = TOOL_FORMATS[name].make(SCHEMAS, fixed_id)
    came = [delta.text for piece in text for delta in parser.push(piece) if isinstance(delta, CallArguments)]
    assert "".join(came[: len(ARGUMENTS)]) == ARGUMENTS
    assert max(map(len, came)) == 1
