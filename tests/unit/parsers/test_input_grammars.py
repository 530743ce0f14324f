"""A custom tool's input is one of its grammar, whatever the model's own way of calling is, or the tool is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, Final

import pytest

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.structured.lark_regex import regex_of_lark
from orchestrator.parsers import CallArguments, CallStart, Delta
from orchestrator.parsers.choose import ReplyPlan, Wanted, plan_reply
from orchestrator.parsers.formats import TEXT_ONLY, TOOL_FORMATS, ReplyFormats
from orchestrator.parsers.input_grammars import InputGrammar
from tests.support.followed import EXPRESSION_GRAMMAR, NO_PATCHES, PATCH, PATCH_GRAMMAR, is_followed
from tests.unit.parsers.pieces import cuts, parsed

REGULAR: Final = InputGrammar(Grammar(GrammarKind.LARK, PATCH_GRAMMAR), regex_of_lark(PATCH_GRAMMAR))
RECURSIVE: Final = InputGrammar(Grammar(GrammarKind.LARK, EXPRESSION_GRAMMAR), None, "expr is recursive")
dumped: Final = functools.partial(json.dumps, ensure_ascii=False)
WEATHER: Final[dict[str, Any]] = {"type": "object", "properties": {"city": {"type": "string"}}}


def _json_call(begin: str, end: str) -> Callable[[str, dict[str, Any]], str]:
    return lambda name, arguments: f"{begin}\n{dumped({'name': name, 'arguments': arguments})}\n{end}"


def _qwen(name: str, arguments: dict[str, Any]) -> str:
    said = "".join(f"\n<parameter={key}>\n{value}\n</parameter>" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>{said}\n</function>\n</tool_call>"


def _glm(name: str, arguments: dict[str, Any]) -> str:
    said = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>\n{value}\n</arg_value>\n" for key, value in arguments.items()
    )
    return f"<tool_call>{name}\n{said}</tool_call>"


def _minimax(name: str, arguments: dict[str, Any]) -> str:
    said = "".join(f'<parameter name="{key}">\n{value}\n</parameter>\n' for key, value in arguments.items())
    return f'<minimax:tool_call>\n<invoke name="{name}">\n{said}</invoke>\n</minimax:tool_call>'


WAYS: Final[dict[str, Callable[[str, dict[str, Any]], str]]] = {
    "hermes": _json_call("<tool_call>", "</tool_call>"),
    "minimax": _json_call("<tool_calls>", "</tool_calls>"),
    "qwen3_coder": _qwen,
    "glm45": _glm,
    "minimax_m2": _minimax,
}


def planned(way: str, inputs: dict[str, InputGrammar], **wanted: Any) -> ReplyPlan:
    schemas = {**{name: grammar.schema() for name, grammar in inputs.items()}, "weather": WEATHER}
    if name := wanted.get("name"):
        schemas = {name: schemas[name]}
    formats = ReplyFormats(tools=TOOL_FORMATS[way], reasoning=None)
    return plan_reply(Wanted(schemas=schemas, inputs=inputs, **wanted), formats, "")


def allows(plan: ReplyPlan, reply: str) -> bool:
    assert plan.grammar is not None
    return is_followed(plan.grammar, reply)


def read(plan: ReplyPlan, reply: str) -> list[Delta]:
    """However it is cut."""
    assert plan.make_parser is not None
    readings = [[_without_id(delta) for delta in parsed(plan.make_parser(), pieces)] for pieces in cuts(reply)]
    assert all(reading == readings[0] for reading in readings)
    return readings[0]


def _without_id(delta: Delta) -> Delta:
    return dataclasses.replace(delta, call_id="") if isinstance(delta, CallStart) else delta


def inputs_of(deltas: list[Delta]) -> list[str]:
    return [json.loads(delta.text)["input"] for delta in deltas if isinstance(delta, CallArguments)]


@pytest.mark.parametrize("way", WAYS)
def test_a_call_s_input_is_one_of_the_grammar(way: str) -> None:
    plan, call = planned(way, {"patch": REGULAR}), WAYS[way]
    reply = f"I will.\n{call('patch', {'input': PATCH})}"
    assert allows(plan, reply)
    assert inputs_of(read(plan, reply)) == [PATCH]
    for other in NO_PATCHES:
        assert not allows(plan, call("patch", {"input": other})), other
    assert not allows(plan, call("patch", {"output": PATCH}))


@pytest.mark.parametrize("way", WAYS)
def test_all_else_stays_free(way: str) -> None:
    plan, call = planned(way, {"patch": REGULAR}), WAYS[way]
    for reply in ("", "No tools.\n\n", call("weather", {"city": "Oslo"}), "<b>{" + call("weather", {"x": 5}) + "</b>"):
        assert allows(plan, reply), reply
    assert allows(plan, f"{call('patch', {'input': PATCH})}\n{call('weather', {})}\n{call('patch', {'input': PATCH})}")


@pytest.mark.parametrize("way", WAYS)
def test_two_tools_have_each_their_own(way: str) -> None:
    date = InputGrammar(Grammar(GrammarKind.REGEX, r"\d{4}-\d\d"), r"\d{4}-\d\d")
    plan, call = planned(way, {"pat": date, "patch": REGULAR}), WAYS[way]
    assert allows(plan, call("pat", {"input": "2026-11"}) + call("patch", {"input": PATCH}))
    assert not allows(plan, call("pat", {"input": PATCH}))
    assert not allows(plan, call("patch", {"input": "2026-11"}))


@pytest.mark.parametrize("way", ["qwen3_coder", "glm45", "minimax_m2"])
def test_an_input_between_tags_ends_at_the_first_end(way: str) -> None:
    anything = InputGrammar(Grammar(GrammarKind.REGEX, r"(.|\n)*"), r"(.|\n)*")
    plan, call = planned(way, {"patch": anything}), WAYS[way]
    frame = TOOL_FORMATS[way].tags
    assert frame is not None
    for text in ("", "x", "\n", "a\n\nb\n", "<x>", "<", frame.input_begin, "/"):
        reply = call("patch", {"input": text}) + " and more"
        assert allows(plan, reply), text
        assert inputs_of(read(plan, reply)) == [text]
    assert not allows(plan, call("patch", {"input": f"a{frame.input_end}b"}))


@pytest.mark.parametrize("grammar", [REGULAR, RECURSIVE], ids=["regular", "recursive"])
@pytest.mark.parametrize("way", [*WAYS, "mistral", "harmony", "pythonic"])
def test_a_named_tool_s_reply_is_its_input(way: str, grammar: InputGrammar) -> None:
    good, bad = (PATCH, "x") if grammar is REGULAR else ("(1+(2*30))", "(1+2")
    plan = planned(way, {"tool": grammar}, must_call=True, name="tool")
    assert allows(plan, good)
    assert not allows(plan, bad)
    start, arguments = read(plan, good)
    assert isinstance(start, CallStart)
    assert start.name == "tool"
    assert inputs_of([arguments]) == [good]


def test_a_named_tool_s_empty_input_is_a_call_too() -> None:
    plan = planned("hermes", {"tool": REGULAR}, must_call=True, name="tool")
    assert plan.make_parser is not None
    assert inputs_of(parsed(plan.make_parser(), [])) == [""]


@pytest.mark.parametrize("way", [*WAYS, "mistral", "llama3_json"])
def test_a_call_that_must_be_made_keeps_to_the_grammar_too(way: str) -> None:
    plan = planned(way, {"patch": REGULAR}, must_call=True)
    assert allows(plan, dumped([{"name": "patch", "parameters": {"input": PATCH}}]))
    assert allows(plan, dumped([{"name": "weather", "parameters": {"city": "Oslo"}}]))
    assert not allows(plan, dumped([{"name": "patch", "parameters": {"input": "x"}}]))


def test_json_or_a_call_keeps_to_both() -> None:
    plan = planned("hermes", {"patch": REGULAR}, grammar=Grammar(GrammarKind.JSON_OBJECT))
    assert allows(plan, '{"a": 1}')
    assert allows(plan, WAYS["hermes"]("patch", {"input": PATCH}))
    assert not allows(plan, WAYS["hermes"]("patch", {"input": "x"}))


@pytest.mark.parametrize("wanted", [{}, {"must_call": True}], ids=["auto", "required"])
def test_a_recursive_grammar_within_a_call_is_refused_by_the_tool_s_name(wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"grammar of 'sum' cannot be enforced .*expr is recursive") as refused:
        planned("hermes", {"sum": RECURSIVE}, **wanted)
    assert refused.value.param == "tools"


@pytest.mark.parametrize(
    "way", ["mistral", "llama3_json", "granite", "deepseek_v3", "kimi_k2", "pythonic", "lfm2", "harmony"]
)
def test_ways_of_calling_without_a_place_for_a_grammar_say_so(way: str) -> None:
    with pytest.raises(InvalidRequest, match="'patch' cannot be enforced within this model's own way of calling"):
        planned(way, {"patch": REGULAR})
    assert planned(way, {}).grammar is None


def test_special_tokens_are_no_text_to_a_grammar() -> None:
    formats = ReplyFormats(tools=TOOL_FORMATS["hermes"], reasoning=None, calls_are_text=False)
    with pytest.raises(InvalidRequest, match="this model's own way of calling"):
        plan_reply(Wanted(schemas={"patch": {}}, inputs={"patch": REGULAR}), formats, "")


def test_where_calls_stay_text_nothing_is_kept_to_a_grammar() -> None:
    assert plan_reply(Wanted(schemas={"patch": {}}, inputs={"patch": REGULAR}), TEXT_ONLY, "") == ReplyPlan()
