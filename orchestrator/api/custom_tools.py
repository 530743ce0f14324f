"""Custom tools, whose input is any text, or a text of a grammar, as chats and responses list them.

A chat template knows functions only, so to the model each is a function with that text as its one argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import orjson

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.structured.lark_regex import NotRegular, regex_of_lark
from disaggregated.structured.readers import read_lark, read_regex
from orchestrator.api.fields import shown, wrong_type
from orchestrator.parsers.input_grammars import INPUT, InputGrammar

PARAMETERS: Final = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT]}


@dataclasses.dataclass(frozen=True, slots=True)
class CustomTool:
    description: str
    """With the grammar, so that the model knows what it is kept to."""
    whole: Grammar | None
    """Of its input."""

    def input(self) -> InputGrammar | None:
        """Takes milliseconds for a long grammar: on a thread."""
        if self.whole is None:
            return None
        if self.whole.kind is GrammarKind.REGEX:
            return InputGrammar(self.whole, self.whole.text)
        try:
            return InputGrammar(self.whole, regex_of_lark(self.whole.text))
        except NotRegular as error:
            return InputGrammar(self.whole, None, str(error))


def read_custom_tool(custom: Mapping[str, Any], where: str) -> CustomTool:
    """`custom` has `description` and `format`, whose grammar chats have in an object of its own, and responses beside
    the type.

    Raises:
        InvalidRequest: names the member that is wrong, and the limit.
    """
    description, wanted = custom.get("description") or "", custom.get("format") or {}
    if not isinstance(description, str):
        raise wrong_type(f"{where}.description", "a string", description)
    where = f"{where}.format"
    if not isinstance(wanted, dict):
        raise wrong_type(where, "an object", wanted)
    match wanted.get("type", "text"):
        case "text":
            return CustomTool(description, None)
        case "grammar":
            inner = wanted.get("grammar")
            if inner is not None and not isinstance(inner, dict):
                raise wrong_type(f"{where}.grammar", "an object", inner)
            grammar = _read_grammar(wanted if inner is None else inner, where if inner is None else f"{where}.grammar")
            return CustomTool(_told(description, grammar), grammar)
        case kind:
            raise InvalidRequest(f"{where}.type must be text or grammar, is {shown(kind)}", param=f"{where}.type")


def _read_grammar(wanted: Mapping[str, Any], where: str) -> Grammar:
    syntax = wanted.get("syntax")
    if syntax not in ("lark", "regex"):
        raise InvalidRequest(f"{where}.syntax must be lark or regex, is {shown(syntax)}", param=f"{where}.syntax")
    read = read_regex if syntax == "regex" else read_lark
    return read(wanted.get("definition"), f"{where}.definition")


def _told(description: str, grammar: Grammar) -> str:
    return f"{description}\nThe input follows this {grammar.kind} grammar:\n{grammar.text}".lstrip()


def custom_names(tools: object) -> frozenset[str]:
    """Of the custom tools in a list that nobody has checked yet."""
    listed = tools if isinstance(tools, list) else ()
    custom = (tool["custom"] for tool in listed if isinstance(tool, dict) and isinstance(tool.get("custom"), dict))
    return frozenset(name for one in custom if isinstance(name := one.get("name"), str))


def custom_arguments(text: str) -> str:
    """Of a custom tool that was called with this input, as the model wrote them."""
    return orjson.dumps({INPUT: text}).decode()


def custom_input(arguments: str) -> str:
    """The input in what the model wrote; all of that, where it is something else, or was cut off."""
    try:
        told = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    text = told.get(INPUT) if isinstance(told, dict) else None
    return text if isinstance(text, str) else arguments
