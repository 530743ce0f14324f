"""Custom tools, whose input is a text of a grammar: what a reply may be, so that every call's input is one.

To the model such a tool is a function with the text as its one argument, and how it calls is its own. In a JSON string
a grammar library can follow a regular expression; between tags too, as part of one that ends with the tag. A grammar
that is none can be followed where the whole reply is the input: when the client names the tool that has to be called.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final

import orjson

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.structured.grammar_text import SEPARATORS
from orchestrator.parsers.call_ids import NewCallId
from orchestrator.parsers.deltas import CallArguments, CallStart, Delta, ReplyParser
from orchestrator.parsers.framed_calls import CallFrame, Schemas

INPUT: Final = "input"
"""The argument that is the text."""
_FREE: Final = (r"start: (begun call)* TEXT", r"TEXT: /(.|\n)*/")
_ONE_SPELLING: Final = {"item_separator": SEPARATORS[0], "key_separator": SEPARATORS[1], "whitespace_flexible": False}


@dataclasses.dataclass(frozen=True, slots=True)
class InputGrammar:
    whole: Grammar
    """As the client wrote it."""
    regex: str | None
    """The same as a regular expression, without anchors."""
    why_not: str = ""
    """There is none."""

    def alone(self) -> Grammar:
        """Of a reply that is nothing else. As an expression it is followed here as it is within calls."""
        return self.whole if self.regex is None else Grammar(GrammarKind.REGEX, self.regex)

    def schema(self) -> dict[str, Any]:
        """Of the arguments."""
        text = {"type": "string"} if self.regex is None else {"type": "string", "pattern": f"^(?:{self.regex})$"}
        return {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TagFrame:
    """Calls whose one argument stands between tags as it is."""

    begin: str
    """Comes before every call."""
    name: tuple[str, str]
    """What its name stands between."""
    input_begin: str
    input_end: str
    """The tag that no input can have in it."""
    call_end: str
    """What comes after that."""


class InputCall(ReplyParser):
    """All text is the input of one call, whose arguments are told as JSON."""

    def __init__(self, name: str, new_id: NewCallId) -> None:
        self._name = name
        self._new_id = new_id
        self._is_started = False

    def push(self, text: str) -> list[Delta]:
        return [*self._start(), CallArguments(0, json.dumps(text, ensure_ascii=False)[1:-1])]

    def finish(self) -> list[Delta]:
        return [*self._start(), CallArguments(0, '"}')]

    def _start(self) -> list[Delta]:
        if self._is_started:
            return []
        self._is_started = True
        return [CallStart(0, self._new_id(), self._name), CallArguments(0, f'{{"{INPUT}": "')]


def check_regular(inputs: Mapping[str, InputGrammar]) -> None:
    """
    Raises:
        InvalidRequest: names the tool whose grammar cannot be followed within a call.
    """
    for name, grammar in inputs.items():
        if grammar.regex is None:
            raise InvalidRequest(
                f"tools: the grammar of {name!r} cannot be enforced within a call, where it has to be one that can be "
                f"written as a regular expression: {grammar.why_not}. Name the tool in tool_choice, or leave its "
                "format out",
                param="tools",
            )


def free_or_calls(
    schemas: Schemas, inputs: Mapping[str, InputGrammar], frame: CallFrame, tags: TagFrame | None
) -> Grammar | None:
    """Any text, with calls in it in the model's own way; None where that way leaves no place for a grammar. The
    arguments of other tools stay free."""
    if tags is not None:
        return _tagged_calls(schemas, inputs, tags)
    if not (frame.begin and frame.end):
        return None
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": inputs[name].schema() if name in inputs else {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in schemas
    ]
    call = orjson.dumps({"anyOf": calls, "x-guidance": _ONE_SPELLING}).decode()
    return _lark(frame.begin[0], f'"\\n"? one "\\n"? {_quoted(frame.end[0])}', f"one: %json {call}")


def _lark(begin: str, call: str, *rules: str) -> Grammar:
    text = "\n".join([*_FREE, f"begun[lazy]: TEXT {_quoted(begin)}", f"call: {call}", *rules])
    return Grammar(GrammarKind.LARK, text)


def _tagged_calls(schemas: Schemas, inputs: Mapping[str, InputGrammar], tags: TagFrame) -> Grammar:
    """An input and what ends it are one expression: where its text could be the end's, only that can tell."""
    calls, rules = [], [f"TWICE: /(?s:.*){_slashed(tags.input_end)}(?s:.*){_slashed(tags.input_end)}(?s:.*)/"]
    for index, name in enumerate(schemas):
        call = _quoted(name.join(tags.name))
        if name in inputs:
            call += f" {_quoted(tags.input_begin)} input_{index}"
            end = _literal(f"\n{tags.input_end}{tags.call_end}")
            rules.append(f"input_{index}[lazy]: INPUT_{index}")
            rules.append(f"INPUT_{index}: /{_slashed(f'(?:{inputs[name].regex}){end}')}/ & ~TWICE")
        calls.append(call)
    return _lark(tags.begin, f"({' | '.join(calls)})", *rules)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _literal(text: str) -> str:
    return text.replace("\n", "\\n")


def _slashed(pattern: str) -> str:
    """A slash would end it."""
    return pattern.replace("\\/", "/").replace("/", "\\/")
