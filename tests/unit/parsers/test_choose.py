"""A request's wishes and the model's ways make one plan."""

from __future__ import annotations

import dataclasses
import json

import llguidance
import pytest

from disaggregated.config.parser_names import REASONING_PARSER, REASONING_PARSERS, TOOL_PARSER, TOOL_PARSERS
from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.thinking_budget import ThinkingBudget
from orchestrator.parsers import CallArguments, CallStart, Content, Reasoning
from orchestrator.parsers.choose import ReplyPlan, Wanted, plan_reply
from orchestrator.parsers.forced_calls import calls_schema
from orchestrator.parsers.formats import TEXT_ONLY, TOOL_FORMATS, ReplyFormats
from orchestrator.parsers.reasoning import REASONING
from tests.unit.parsers.pieces import parsed

SCHEMAS = {"weather": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}, "time": {}}
HERMES = ReplyFormats(tools=TOOL_FORMATS["hermes"], reasoning=None, shown=frozenset({7}))
THINKING = ReplyFormats(
    tools=TOOL_FORMATS["hermes"],
    reasoning=REASONING["qwen3"],
    shown=frozenset({7, 8}),
    reasoning_end=(8,),
    thinking_begin=(6,),
    thinking_end=(8,),
)
OPEN = "<|im_start|>assistant\n<think>\n"


def matches(value: object, schema: str) -> bool:
    """What a server's grammar says of a reply that is this value as JSON."""
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_json_schema(schema)
    )
    reply = list(json.dumps(value).encode())
    taken = matcher.try_consume_tokens(reply)
    assert not matcher.get_error()
    return taken == len(reply) and matcher.is_accepting()


def read(plan: ReplyPlan, text: str) -> list[object]:
    assert plan.make_parser is not None
    found = parsed(plan.make_parser(), [text])
    return [delta.name if isinstance(delta, CallStart) else delta for delta in found]


def test_every_name_of_the_configuration_has_a_parser() -> None:
    assert set(TOOL_PARSERS) == set(TOOL_FORMATS)
    assert set(REASONING_PARSERS) == set(REASONING)
    for name in ("qwen3", "llama4-pythonic", "DeepSeek_V31", "kimi", "GLM45"):
        assert TOOL_PARSER.check(name) in TOOL_FORMATS
    for name in ("deepseek-r1", "qwen3", "nano-v3"):
        assert REASONING_PARSER.check(name) in REASONING


def test_without_tools_and_reasoning_text_goes_past_all_parsers() -> None:
    assert plan_reply(Wanted(), HERMES, "") == ReplyPlan()
    assert plan_reply(Wanted(schemas=SCHEMAS), TEXT_ONLY, "") == ReplyPlan()


def test_what_may_be_called_is_looked_for_in_the_models_way() -> None:
    plan = plan_reply(Wanted(schemas=SCHEMAS), HERMES, "")
    assert plan.grammar is None
    assert plan.shown == {7}
    text = 'Yes. <tool_call>{"name": "time"}</tool_call><tool_call>{"name": "weather"}</tool_call>'
    assert read(plan, text) == [Content("Yes."), "time", CallArguments(0, "{}"), "weather", CallArguments(1, "{}")]


def test_one_call_at_most_ends_the_reply_where_the_second_begins() -> None:
    plan = plan_reply(Wanted(schemas=SCHEMAS, is_parallel=False), HERMES, "")
    assert plan.may_end_anywhere
    assert plan.make_parser is not None
    parser = plan.make_parser()
    enough = []
    for text in ('<tool_call>{"name": "time"}</tool_call><tool_call>', '{"name": "weather"}</tool_call>'):
        parser.push(text)
        enough.append(parser.has_enough)
    assert enough == [False, True]
    assert parser.push(" and more") == parser.finish() == []


def test_a_call_that_must_be_made_is_a_list_that_the_grammar_demands() -> None:
    plan = plan_reply(Wanted(schemas=SCHEMAS, must_call=True, is_parallel=False), HERMES, "")
    assert plan.grammar is not None
    schema = plan.grammar.text
    time = {"name": "time", "parameters": {}}
    for right in ([{"name": "weather", "parameters": {"city": "Oslo"}}], [time]):
        assert matches(right, schema)
    for wrong in ([], [{"name": "weather", "parameters": {}}], [{"name": "rain", "parameters": {}}], [time, time]):
        assert not matches(wrong, schema)
    reply = '[{"name": "weather", "parameters": {"city": "Oslo"}}]'
    assert read(plan, reply) == ["weather", CallArguments(0, '{"city": "Oslo"}')]


@pytest.mark.parametrize("text", ["[", '[{"na', '[{"name": "weath', ""])
def test_a_call_that_is_cut_off_before_it_is_one_is_no_content(text: str) -> None:
    assert read(plan_reply(Wanted(schemas=SCHEMAS, must_call=True), HERMES, ""), text) == []


def test_a_tool_that_is_named_writes_only_its_arguments() -> None:
    plan = plan_reply(Wanted(schemas=SCHEMAS, must_call=True, name="weather"), HERMES, "")
    assert plan.grammar == Grammar(GrammarKind.JSON_SCHEMA, plan.grammar.text if plan.grammar else "")
    assert plan.grammar is not None
    assert json.loads(plan.grammar.text) == {**SCHEMAS["weather"], "x-guidance": {"lenient": True}}
    strict = plan_reply(Wanted(schemas=SCHEMAS, must_call=True, name="weather", is_strict=True), HERMES, "")
    assert strict.grammar is not None
    assert json.loads(strict.grammar.text) == SCHEMAS["weather"]
    assert read(plan, '{"city": ') == ["weather", CallArguments(0, '{"city": ')]


def test_schemas_keep_their_references_among_others() -> None:
    tree = {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"id": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
                "required": ["id"],
            }
        },
    }
    self = {"type": "object", "properties": {"again": {"$ref": "#"}, "leaf": {"type": "null"}}, "required": ["leaf"]}
    schema = json.dumps(calls_schema({"tree": tree, "self": self, "time": {}}, is_parallel=True))
    assert matches([{"name": "time", "parameters": {}}], schema)
    assert not matches([{"name": "tree", "parameters": {"root": {"next": {}}}}], schema)
    assert matches([{"name": "tree", "parameters": {"root": {"id": 1, "next": {"id": 2}}}}], schema)
    assert not matches([{"name": "self", "parameters": {"again": {}, "leaf": None}}], schema)
    assert matches([{"name": "self", "parameters": {"again": {"leaf": None}, "leaf": None}}], schema)


def follows(reply: str, grammar: Grammar) -> bool:
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_lark(grammar.text))
    taken = matcher.try_consume_tokens(list(reply.encode()))
    assert not matcher.get_error()
    return taken == len(reply.encode()) and matcher.is_accepting()


@pytest.mark.parametrize("is_parallel", [True, False])
def test_where_json_is_asked_for_a_call_may_come_in_its_place(is_parallel: bool) -> None:
    answer = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    asked = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(answer))
    plan = plan_reply(Wanted(schemas=SCHEMAS, grammar=asked, is_parallel=is_parallel), HERMES, "")
    assert plan.grammar is not None
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert follows('{"ok": true}', plan.grammar)
    assert follows(call, plan.grammar)
    assert follows(f"{call}\n{call}", plan.grammar) is is_parallel
    for wrong in ("Hello", "{}", call.replace("weather", "rain"), call.replace("city", "town")):
        assert not follows(wrong, plan.grammar)
    assert read(plan, call) == ["weather", CallArguments(0, '{"city": "Oslo"}')]
    assert read(plan, '{"ok": true}') == [Content('{"ok": true}')]


def test_where_calls_cannot_be_told_from_the_answer_the_answers_grammar_stays() -> None:
    for asked, tools in (
        (Grammar(GrammarKind.REGEX, "[ab]+"), "hermes"),
        (Grammar(GrammarKind.JSON_OBJECT), "llama3_json"),
    ):
        formats = ReplyFormats(tools=TOOL_FORMATS[tools], reasoning=None)
        assert plan_reply(Wanted(schemas=SCHEMAS, grammar=asked), formats, "").grammar == asked


def test_a_grammar_waits_for_the_end_of_reasoning_that_the_prompt_opened() -> None:
    asked = Grammar(GrammarKind.JSON_OBJECT)
    open_plan = plan_reply(Wanted(grammar=asked), THINKING, OPEN)
    assert open_plan.grammar == Grammar(GrammarKind.JSON_OBJECT, starts_after=(8,))
    assert read(open_plan, "Hm.</think>{}") == [Reasoning("Hm."), Content("{}")]
    assert plan_reply(Wanted(grammar=asked), THINKING, "<|im_start|>assistant\n").grammar == asked


def test_without_a_token_that_ends_reasoning_a_grammar_holds_at_once() -> None:
    formats = ReplyFormats(tools=None, reasoning=REASONING["qwen3"])
    plan = plan_reply(Wanted(grammar=Grammar(GrammarKind.JSON_OBJECT)), formats, OPEN)
    assert plan.grammar == Grammar(GrammarKind.JSON_OBJECT)
    assert read(plan, "{}") == [Content("{}")]


def test_a_budget_of_reasoning_knows_whether_the_prompt_opened_it() -> None:
    for tail, is_open in ((OPEN, True), ("<|im_start|>assistant\n", False)):
        plan = plan_reply(Wanted(thinking_tokens_max=5), THINKING, tail)
        assert plan.thinking == ThinkingBudget(5, begin=(6,), end=(8,), is_open=is_open)
    left_open = plan_reply(Wanted(thinking_tokens_max=5), THINKING, "", continued="<think>Well")
    assert left_open.thinking is not None
    assert left_open.thinking.is_open
    assert plan_reply(Wanted(), THINKING, OPEN).thinking is None


def test_a_reply_that_is_kept_to_a_grammar_from_its_first_token_has_no_reasoning_to_bound() -> None:
    wanted = Wanted(thinking_tokens_max=5, grammar=Grammar(GrammarKind.JSON_OBJECT))
    assert plan_reply(wanted, THINKING, "").thinking is None
    assert plan_reply(wanted, THINKING, OPEN).thinking is not None, "here the grammar waits for its end"


@pytest.mark.parametrize("formats", [HERMES, dataclasses.replace(THINKING, tools=TOOL_FORMATS["harmony"])])
def test_reasoning_that_does_not_stand_between_tags_cannot_be_bounded(formats: ReplyFormats) -> None:
    with pytest.raises(InvalidRequest, match="no tag that ends its reasoning") as caught:
        plan_reply(Wanted(thinking_tokens_max=0), formats, OPEN)
    assert caught.value.param == "thinking_token_budget"


def test_a_forced_call_comes_behind_the_reasoning_even_where_that_is_not_wanted_apart() -> None:
    wanted = Wanted(schemas=SCHEMAS, must_call=True, name="time", separates_reasoning=False)
    assert read(plan_reply(wanted, THINKING, OPEN), "Hm.</think>\n{}") == [
        Reasoning("Hm."), "time", CallArguments(0, "{}")
    ]  # fmt: skip


def test_reasoning_is_part_of_the_content_where_the_client_wants_it_so() -> None:
    assert plan_reply(Wanted(separates_reasoning=False), THINKING, OPEN) == ReplyPlan()
