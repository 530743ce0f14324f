"""Messages of gpt-oss: reasoning, calls and what is said, however the reply was cut."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers

from disaggregated.config.parser_names import REASONING_PARSER, TOOL_PARSER
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.text import ChatTemplate, Tokenizer
from orchestrator.parsers import CallArguments, CallStart, Content, Delta, Reasoning
from orchestrator.parsers.choose import Wanted, plan_reply
from orchestrator.parsers.formats import TOOL_FORMATS, ReplyFormats
from orchestrator.parsers.harmony import MARKERS, HarmonyMessages
from tests.unit.parsers.pieces import fixed_id, one_reading, parsed
from tests.unit.text.tiny_tokenizers import byte_level

THOUGHT = "<|channel|>analysis<|message|>They ask <b>.<|end|>"
CALL = '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}'
FINAL = "<|start|>assistant<|channel|>final<|message|>Sunny."
SCHEMAS = {"weather": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALLED = [CallStart(0, "id", "weather"), CallArguments(0, '{"city": "Rome"}')]


def read(text: str, **options: Any) -> list[Delta]:
    return one_reading(lambda: HarmonyMessages(fixed_id, **options), text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THOUGHT + FINAL, [Reasoning("They ask <b>."), Content("Sunny.")]),
        (THOUGHT + FINAL + "<|return|>", [Reasoning("They ask <b>."), Content("Sunny.")]),
        (THOUGHT + CALL, [Reasoning("They ask <b>."), *CALLED]),
        (THOUGHT + CALL + "<|call|>", [Reasoning("They ask <b>."), *CALLED]),
        (' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}', CALLED),
        (
            f"<|channel|>commentary<|message|>I look.<|end|>{CALL}<|call|>{CALL}",
            [
                Content("I look."), *CALLED, CallStart(1, "id", "weather"), CallArguments(1, '{"city": "Rome"}'),
            ],
        ),
        ("<|channel|>final<|message|>Hi", [Content("Hi")]),
        ("Without a header < at all", [Content("Without a header < at all")]),
        ("<|channel|>analysis<|message|>cut", [Reasoning("cut")]),
        ("<|channel|>anal", []),
        ("", []),
    ],
)  # fmt: skip
def test_messages_are_read_however_the_reply_was_cut(text: str, expected: list[Delta]) -> None:
    assert read(text) == expected


def test_reasoning_may_stay_in_the_text_or_be_left_out() -> None:
    assert read(THOUGHT + FINAL, separates_reasoning=False) == [Content("They ask <b>.Sunny.")]
    assert read(THOUGHT + FINAL, shows_reasoning=False) == [Content("Sunny.")]


def tokenizer() -> Tokenizer:
    backend: tokenizers.Tokenizer = byte_level()
    backend.add_special_tokens(list(MARKERS))
    return Tokenizer(backend, chat_template=ChatTemplate("<|channel|>final<|message|>", {}), eos_token_ids=())


def test_the_template_shows_it_and_every_reply_is_read() -> None:
    formats = ReplyFormats.choose("auto", "auto", tokenizer())
    assert formats.tools is TOOL_FORMATS["harmony"]
    assert len(formats.shown) == len(MARKERS)
    plan = plan_reply(Wanted(), formats, "<|start|>assistant")
    assert plan.make_parser is not None
    assert one_reading(plan.make_parser, THOUGHT + FINAL) == [Reasoning("They ask <b>."), Content("Sunny.")]
    assert (TOOL_PARSER.check("gpt_oss"), REASONING_PARSER.check("gpt_oss")) == ("harmony", "none")


def test_a_grammar_begins_with_the_final_message() -> None:
    text = tokenizer()
    formats = ReplyFormats.choose("auto", "auto", text)
    header = tuple(text.encode("<|channel|>final<|message|>", add_special_tokens=False))
    plan = plan_reply(Wanted(grammar=Grammar(GrammarKind.JSON_OBJECT)), formats, "")
    assert plan.grammar is not None
    assert plan.grammar.starts_after == header


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted(schemas=SCHEMAS, must_call=True, name="weather"), '{"city": "Rome"}'),
        (Wanted(schemas=SCHEMAS, must_call=True), '[{"name": "weather", "parameters": {"city": "Rome"}}]'),
    ],
)
def test_a_call_that_must_be_made_is_the_final_message(wanted: Wanted, said: str) -> None:
    plan = plan_reply(wanted, ReplyFormats.choose("harmony", "auto", tokenizer()), "")
    assert plan.make_parser is not None
    deltas = parsed(plan.make_parser(), list(f"{THOUGHT}<|start|>assistant<|channel|>final<|message|>{said}"))
    (thought, call, arguments) = [delta if not isinstance(delta, CallStart) else delta.name for delta in deltas]
    assert (thought, call, arguments) == (Reasoning("They ask <b>."), "weather", CallArguments(0, '{"city": "Rome"}'))
