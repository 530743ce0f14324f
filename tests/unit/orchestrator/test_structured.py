"""Every way to ask for structured output becomes one grammar, or an error that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.structured.json_schema import BYTES_MAX, schema_text
from disaggregated.structured.readers import CHOICES_MAX, GBNF_BYTES_MAX, TEXT_BYTES_MAX
from orchestrator.api.fields import Fields
from orchestrator.api.structured import grammar_field, grammar_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED = {**SCHEMA, "additionalProperties": False}
LENIENT = {**CLOSED, "x-guidance": {"lenient": True}}
GBNF = 'root ::= "a" | "b"'
LARK = 'start: "a" | "b"'


def json_schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": value}}


NONE: list[dict[str, Any]] = [
    {},
    {"response_format": None},
    {"response_format": {"type": "text"}},
    {"guided_json_object": False},
    {"guided_json": None, "guided_regex": None},
    {"structured_outputs": {}},
    {"structured_outputs": {"json": None, "disable_any_whitespace": True}},
    {"guided_decoding": {"json_object": False}},
]
ASKED: list[tuple[dict[str, Any], GrammarKind, Any]] = [
    ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_OBJECT, None),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, GrammarKind.JSON_SCHEMA, CLOSED),
    ({"response_format": {"type": "json", "schema": SCHEMA}}, GrammarKind.JSON_SCHEMA, CLOSED),
    (json_schema({"schema": SCHEMA, "strict": True}), GrammarKind.JSON_SCHEMA, CLOSED),
    (json_schema({"name": "x", "schema": SCHEMA}), GrammarKind.JSON_SCHEMA, LENIENT),
    ({"response_format": {"type": "regex", "regex": "[ab]"}}, GrammarKind.REGEX, "[ab]"),
    ({"response_format": {"type": "ebnf", "ebnf": GBNF}}, GrammarKind.EBNF, GBNF),
    ({"guided_json": SCHEMA}, GrammarKind.JSON_SCHEMA, CLOSED),
    ({"guided_json": json.dumps(SCHEMA)}, GrammarKind.JSON_SCHEMA, CLOSED),
    ({"guided_json": {}}, GrammarKind.JSON_SCHEMA, {}),
    ({"guided_json_object": True}, GrammarKind.JSON_OBJECT, None),
    ({"guided_regex": "^a|b$"}, GrammarKind.REGEX, "a|b"),
    ({"guided_regex": r"a\$"}, GrammarKind.REGEX, r"a\$"),
    ({"guided_regex": r"a\\$"}, GrammarKind.REGEX, r"a\\"),
    ({"guided_choice": ["yes", "nö"]}, GrammarKind.CHOICE, ["yes", "nö"]),
    ({"guided_grammar": GBNF}, GrammarKind.EBNF, GBNF),
    ({"guided_grammar": LARK}, GrammarKind.LARK, LARK),
    ({"structured_outputs": {"json": SCHEMA}}, GrammarKind.JSON_SCHEMA, CLOSED),
    ({"structured_outputs": {"regex": "a"}}, GrammarKind.REGEX, "a"),
    ({"structured_outputs": {"choice": ["a"], "json": None}}, GrammarKind.CHOICE, ["a"]),
    ({"structured_outputs": {"grammar": LARK}}, GrammarKind.LARK, LARK),
    ({"structured_outputs": {"json_object": True}}, GrammarKind.JSON_OBJECT, None),
    ({"guided_decoding": {"json": SCHEMA}}, GrammarKind.JSON_SCHEMA, CLOSED),
]  # fmt: skip
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"response_format": "json"}, "response_format must be an object, is a string"),
    ({"response_format": {}}, "response_format.type must be text, json_object, json_schema, structural_tag, regex"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.structures must be an array"),
    ({"response_format": {"type": "tag"}}, "response_format.type must be"),
    ({"response_format": {"type": ["json"]}}, "response_format.type must be"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
    (json_schema([]), "json_schema must be an object, is an array"),
    (json_schema({"name": "x"}), "json_schema.schema is missing"),
    (json_schema({"schema": {}, "strict": "yes"}), "strict must be true or false"),
    ({"guided_json": "{"}, "guided_json is not valid JSON"),
    ({"guided_json": "[]"}, "guided_json must be a JSON schema, an object, is an array"),
    ({"guided_json": 5}, "guided_json must be a JSON schema, an object, is a number"),
    ({"guided_json_object": "true"}, "guided_json_object must be true or false, is a string"),
    ({"guided_regex": 5}, "guided_regex must be a string, is a number"),
    ({"guided_regex": ""}, "guided_regex must not be empty"),
    ({"guided_regex": "\ud800"}, "guided_regex has half of a surrogate pair"),
    ({"guided_regex": "a" * (TEXT_BYTES_MAX + 1)}, f"has {TEXT_BYTES_MAX + 1} bytes, the limit is {TEXT_BYTES_MAX}"),
    ({"guided_grammar": "root ::= " + "a" * GBNF_BYTES_MAX}, f"bytes, the limit is {GBNF_BYTES_MAX}"),
    ({"guided_choice": "yes"}, "guided_choice must be an array of strings, is a string"),
    ({"guided_choice": ["yes", 1]}, "guided_choice must be an array of strings"),
    ({"guided_choice": []}, f"guided_choice has 0 choices, it must have 1 to {CHOICES_MAX}"),
    ({"guided_choice": ["a"] * 2000}, f"guided_choice has 2000 choices, it must have 1 to {CHOICES_MAX}"),
    ({"guided_choice": ["a", ""]}, "guided_choice: a choice must not be empty"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag is not valid JSON"),
    ({"structured_outputs": {"json_objects": True}}, "structured_outputs.json_objects is not supported"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.json and structured_outputs.regex both"),
    ({"structured_outputs": {"choice": 1}}, "structured_outputs.choice must be an array of strings, is a number"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format and guided_regex both say"),
]  # fmt: skip


@pytest.mark.parametrize("body", NONE, ids=json.dumps)
def test_what_asks_for_nothing_is_no_grammar(body: dict[str, Any]) -> None:
    assert grammar_of(Fields(body)) is None


@pytest.mark.parametrize(("body", "kind", "meaning"), ASKED, ids=lambda value: str(value)[:60])
def test_each_way_to_ask_becomes_one_grammar(body: dict[str, Any], kind: GrammarKind, meaning: Any) -> None:
    grammar = grammar_of(Fields(body))
    assert isinstance(grammar, Grammar)
    assert grammar.kind is kind
    if kind in (GrammarKind.JSON_SCHEMA, GrammarKind.CHOICE):
        assert json.loads(grammar.text) == meaning
    elif kind is not GrammarKind.JSON_OBJECT:
        assert grammar.text == meaning
    assert grammar_field(Fields({"guided_json": None, **body})) == next(iter(body))
    assert Grammar.from_proto(grammar.to_proto()) == grammar


@pytest.mark.parametrize(("body", "words"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_told_by_the_fields_name(body: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammar_of(Fields(body))
    assert words in str(caught.value)
    assert caught.value.param is not None
    assert caught.value.param.partition(".")[0] in body


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_a_schema_that_is_too_deep_or_too_large_is_refused_with_the_limit() -> None:
    schema_text(nested(20), "guided_json")
    with pytest.raises(InvalidRequest, match="guided_json is nested deeper than 48 levels"):
        schema_text(nested(30), "guided_json")
    with pytest.raises(InvalidRequest, match=f"the limit is {BYTES_MAX}"):
        schema_text({"enum": ["x" * 100] * 2000}, "guided_json")


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {}}, {"properties": {}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        ({"properties": {}, "additionalProperties": True}, {"properties": {}, "additionalProperties": True}),
        ({"properties": {}, "patternProperties": {}}, {"properties": {}, "patternProperties": {}}),
        ({"allOf": [{"properties": {}}, {"properties": {}}]}, {"allOf": [{"properties": {}}, {"properties": {}}]}),
        ({"enum": [{"properties": {}}]}, {"enum": [{"properties": {}}]}),
        (
            {"properties": {"properties": {"type": "string"}}},
            {"properties": {"properties": {"type": "string"}}, "additionalProperties": False},
        ),
        (
            {"anyOf": [{"properties": {}}], "$defs": {"x": {"properties": {}}}},
            {
                "anyOf": [{"properties": {}, "additionalProperties": False}],
                "$defs": {"x": {"properties": {}, "additionalProperties": False}},
            },
        ),
        ({"items": {"properties": {}}}, {"items": {"properties": {}, "additionalProperties": False}}),
    ],
)  # fmt: skip
def test_an_object_is_closed_unless_it_says_otherwise_or_is_a_part(schema: Any, closed: Any) -> None:
    assert json.loads(schema_text(schema, "guided_json")) == closed


def test_properties_keep_their_order() -> None:
    names = [f"name{index}" for index in range(20, 0, -1)]
    text = schema_text({"properties": {name: {} for name in names}}, "guided_json")
    assert list(json.loads(text)["properties"]) == names
