"""Structural tags: what is between tags matches, and all else is free."""

from __future__ import annotations

import json
from typing import Any, Final

import llguidance
import pytest

from disaggregated.errors import InvalidRequest
from disaggregated.structured.grammar_text import to_llguidance
from disaggregated.structured.structural_tag import TAGS_MAX, TEXT_BYTES_MAX, read_structural_tag

SCHEMA: Final = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OF_SCHEMA: Final = {"type": "json_schema", "json_schema": SCHEMA}
OLDER: Final = {
    "structures": [
        {"begin": "<f=x>", "schema": SCHEMA, "end": "</f>"},
        {"begin": "<f=y>", "schema": {"type": "string"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
TAG: Final = {"begin": "<t>", "content": {"type": "regex", "pattern": "[a-c/]+"}, "end": ["</t>", ";"]}


def matches(value: Any, text: str) -> bool:
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), to_llguidance(read_structural_tag(value, "response_format"))
    )
    assert not matcher.is_error(), matcher.get_error()
    taken: int = matcher.try_consume_tokens(list(text.encode()))
    return taken == len(text.encode()) and matcher.is_accepting()


def formatted(kind: str, **members: Any) -> dict[str, Any]:
    return {"format": {"type": kind, **members}}


TRIGGERED: Final = formatted("triggered_tags", triggers=["<t", "«"], tags=[TAG, {**TAG, "begin": "«é"}])
THINKING: Final = formatted(
    "sequence",
    elements=[
        {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
        {"type": "or", "elements": [OF_SCHEMA, {"type": "const_string", "value": "no"}]},
    ],
)


@pytest.mark.parametrize(
    ("value", "good", "bad"),
    [
        (OLDER, ["", "a < b", 'so <f=x>{"a": 1}</f>, <f=y>"z"</f>.'], ["<f=z>", '<f=x>"z"</f>', '<f=x>{"a": 1}']),
        (json.dumps(OLDER), ["", '<f=y>"z"</f>'], ["<f=y>1</f>"]),
        (TRIGGERED, ["free", "x <t>ab/</t> y «éc; z", "<t>a;"], ["<to", "<t>d;", "«x", "<t>a"]),
        (formatted("triggered_tags", **{**TRIGGERED["format"], "at_least_one": True}), ["x <t>a;"], ["x", ""]),
        (formatted("triggered_tags", **{**TRIGGERED["format"], "stop_after_first": True}), ["x <t>a;"], ["<t>a; x"]),
        (THINKING, ['<think>a < b\n</think>{"a": 1}', "<think></think>no"], ['{"a": 1}', "<think></think>yes"]),
        (formatted("tags_with_separator", separator=", ", tags=[TAG]), ["", "<t>a;, <t>b</t>"], ["<t>a;<t>b;", ", "]),
        (formatted("optional", content={"type": "const_string", "value": "x"}), ["", "x"], ["xx"]),
        (formatted("plus", content={"type": "const_string", "value": "x"}), ["x", "xx"], ["", "y"]),
        (formatted("star", content={"type": "const_string", "value": '"\\n'}), ["", '"\\n' * 2], ['"']),
        (formatted("json_schema", json_schema=True), ["[1, 2]", '{"a": null}'], ["[1,2]", "x"]),
    ],
)
def test_what_stands_between_tags_matches_and_the_rest_is_free(value: Any, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not matches(value, text)] == []
    assert [text for text in bad if matches(value, text)] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "must be an object, is a number"),
        ("{", "is not valid JSON"),
        ({}, "structures must be an array"),
        ({"structures": [5], "triggers": ["<"]}, r"structures\[0\] must be an object"),
        ({**OLDER, "triggers": ["{"]}, r"tags\[0\].begin begins with no trigger"),
        ({**OLDER, "triggers": []}, "triggers must be a string or an array of strings"),
        ({**OLDER, "structures": []}, f"structures has 0 entries, it must have 1 to {TAGS_MAX}"),
        (formatted("token", token=5), "format.type must be one of const_string, .* is 'token'"),
        (formatted("tag", begin="<", content={"type": "any_text"}), "format.end must be a string"),
        (formatted("tag", begin="<", content=None, end=">"), "format.content must be an object"),
        (formatted("regex", pattern=5), "format.pattern must be a string"),
        (formatted("const_string", value="\ud800"), "half of a surrogate pair"),
        (formatted("json_schema", json_schema=[]), "json_schema must be a JSON schema"),
        (formatted("const_string", value="x" * TEXT_BYTES_MAX), f"the limit is {TEXT_BYTES_MAX}"),
    ],
)
def test_what_is_wrong_is_told_by_its_place(value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^response_format.*{message}") as caught:
        read_structural_tag(value, "response_format")
    assert str(caught.value.param).startswith("response_format")


def test_it_may_not_be_nested_for_ever() -> None:
    value: Any = {"type": "any_text"}
    for _ in range(60):
        value = {"type": "plus", "content": value}
    with pytest.raises(InvalidRequest, match="nested deeper than 48 levels"):
        read_structural_tag({"format": value}, "response_format")
