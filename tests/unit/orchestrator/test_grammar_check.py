"""A grammar is checked before any server hears of it: once, beside the event loop, within a time."""

from __future__ import annotations

import threading

import pytest

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from orchestrator import grammar_check
from orchestrator.grammar_check import GrammarCheck

GOOD = [
    Grammar(GrammarKind.JSON_OBJECT),
    Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object", "properties": {"a": {"enum": ["x"]}}}'),
    Grammar(GrammarKind.REGEX, "[a-z]{1,1000}"),
    Grammar(GrammarKind.CHOICE, '["a", "\\"b"]'),
    Grammar(GrammarKind.EBNF, 'root ::= "a" b\nb ::= [0-9]+'),
    Grammar(GrammarKind.LARK, 'start: "<x>" %json {"type": "integer"} "</x>"'),
]
BAD = [
    (Grammar(GrammarKind.REGEX, "("), "unclosed group"),
    (Grammar(GrammarKind.REGEX, "(?=a)b"), "look-around"),
    (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "thing"}'), "thing"),
    (Grammar(GrammarKind.JSON_SCHEMA, '{"uniqueItems": true, "type": "array"}'), "uniqueItems"),
    (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#/nowhere"}'), "nowhere"),
    (Grammar(GrammarKind.EBNF, "root ::= nothing"), "nothing"),
    (Grammar(GrammarKind.LARK, "start: nothing"), "nothing"),
]


@pytest.mark.parametrize("grammar", GOOD, ids=str)
async def test_what_can_be_compiled_passes(grammar: Grammar) -> None:
    await GrammarCheck()(grammar, param="guided_json")


@pytest.mark.parametrize(("grammar", "words"), BAD, ids=str)
async def test_what_cannot_is_told_by_its_field_each_time(grammar: Grammar, words: str) -> None:
    check = GrammarCheck()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"^response_format cannot be compiled: ") as caught:
            await check(grammar, param="response_format")
        assert caught.value.param == "response_format"
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


async def test_keywords_that_are_not_enforced_may_be_left_out_where_they_are_wishes() -> None:
    lenient = '{"uniqueItems": true, "type": "array", "x-guidance": {"lenient": true}}'
    await GrammarCheck()(Grammar(GrammarKind.JSON_SCHEMA, lenient), param="response_format")


async def test_one_grammar_is_checked_once_and_verdicts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def what_is_wrong(grammar: Grammar) -> str:
        checked.append(grammar.text)
        return ""

    monkeypatch.setattr(grammar_check, "what_is_wrong", what_is_wrong)
    monkeypatch.setattr(grammar_check, "VERDICTS_MAX", 2)
    check = GrammarCheck()
    for text in ("a", "a", "b", "a", "c", "a", "b"):
        await check(Grammar(GrammarKind.REGEX, text), param="guided_regex")
    assert checked == ["a", "b", "c", "b"]


async def test_a_check_that_takes_too_long_is_the_clients_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()
    monkeypatch.setattr(grammar_check, "what_is_wrong", lambda grammar: str(is_over.wait(10.0)))
    monkeypatch.setattr(grammar_check, "CHECK_TIMEOUT_S", 0.01)
    try:
        with pytest.raises(InvalidRequest, match=r"guided_regex is too complex: it took longer than 0.01 s"):
            await GrammarCheck()(Grammar(GrammarKind.REGEX, "a"), param="guided_regex")
    finally:
        is_over.set()
