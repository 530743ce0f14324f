"""Structured output in one process: what may be asked, and texts that match it, among others that need not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest

from disaggregated import LLM, GuidedDecodingParams, SamplingParams
from disaggregated.errors import InvalidRequest
from disaggregated.grammar import GrammarKind

MODEL = "smollm2-135m-instruct"


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=10)
    is_capital: bool


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "max_seq_len": 256}
    with LLM(MODEL, **options, kv_cache_config={"max_tokens": 2048}, guided_decoding_backend="llguidance") as llm:
        yield llm


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"json": {"type": "object"}}, GrammarKind.JSON_SCHEMA),
        ({"json": '{"type": "object"}'}, GrammarKind.JSON_SCHEMA),
        ({"json": City}, GrammarKind.JSON_SCHEMA),
        ({"json_object": True}, GrammarKind.JSON_OBJECT),
        ({"regex": "[a-c]+"}, GrammarKind.REGEX),
        ({"choice": ("a", "b")}, GrammarKind.CHOICE),
        ({"grammar": 'root ::= "a"'}, GrammarKind.EBNF),
        ({"grammar": 'start: "a"'}, GrammarKind.LARK),
    ],
)
def test_each_form_is_one_grammar(asked: dict[str, Any], kind: GrammarKind) -> None:
    assert GuidedDecodingParams(**asked).as_grammar().kind is kind


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "guided_decoding names 0 forms, it must name one"),
        ({"regex": "a", "json_object": True}, "guided_decoding names 2 forms, it must name one"),
        ({"json": int}, "json must be a JSON schema, an object"),
        ({"json": "{"}, "json is not valid JSON"),
        ({"regex": 5}, "regex must be a string, is a number"),
        ({"choice": ()}, "choice has 0 choices"),
    ],
)
def test_a_form_that_is_none_is_a_value_error_that_names_it(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        GuidedDecodingParams(**asked)


def test_sampling_takes_nothing_else_for_a_form() -> None:
    wrong: Any = {"json": {}}
    with pytest.raises(InvalidRequest, match="guided_decoding must be GuidedDecodingParams, is"):
        SamplingParams(guided_decoding=wrong)


def test_every_text_of_a_batch_has_the_form_that_was_asked_for_it(llm: LLM) -> None:
    forms: list[GuidedDecodingParams | None] = [
        GuidedDecodingParams(json=City),
        GuidedDecodingParams(regex="[A-Z][a-z]{3,8}, [0-9]{4}"),
        GuidedDecodingParams(choice=["Rome", "Oslo"]),
        None,
    ]
    params = [SamplingParams(guided_decoding=form, max_tokens=60, temperature=1.0, seed=3) for form in forms]
    city, dated, chosen, free = [output.outputs[0] for output in llm.generate(["A city: "] * 4, params)]
    assert City.model_validate_json(city.text)
    assert re.fullmatch("[A-Z][a-z]{3,8}, [0-9]{4}", dated.text)
    assert chosen.text in ("Rome", "Oslo")
    assert {city.finish_reason, dated.finish_reason, chosen.finish_reason} == {"stop"}
    (alone,) = llm.generate(["A city: "], params[3])
    assert alone.outputs[0].text == free.text


def test_a_form_that_cannot_be_compiled_is_told(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="unclosed group"):
        llm.generate("A city: ", SamplingParams(guided_decoding=GuidedDecodingParams(regex="(")))
    (output,) = llm.generate(["A city: "], SamplingParams(guided_decoding=GuidedDecodingParams(json_object=True)))
    assert json.dumps(output.outputs[0].text).startswith('"{')
