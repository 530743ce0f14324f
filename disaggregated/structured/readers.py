"""Values that ask for structured output: each one checked by its name, and made into a grammar."""

from __future__ import annotations

from typing import Any, Final

import orjson

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.structured.json_schema import schema_text
from disaggregated.structured.json_type import wrong_type

TEXT_BYTES_MAX: Final = 64 << 10
"""Of a regular expression or a grammar, and of all choices together."""
GBNF_BYTES_MAX: Final = 16 << 10
"""It is checked by a program in Python."""
CHOICES_MAX: Final = 1024


def read_json_object(value: Any, name: str) -> Grammar | None:
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false", value)
    return Grammar(GrammarKind.JSON_OBJECT) if value else None


def read_json_schema(value: Any, name: str) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, schema_text(value, name))


def read_regex(value: Any, name: str) -> Grammar:
    """Always of the whole text, so anchors say nothing."""
    text = _text(value, name).removeprefix("^")
    if text.endswith("$") and (len(text) - len(text[:-1].rstrip("\\"))) % 2:
        text = text[:-1]
    return Grammar(GrammarKind.REGEX, text)


def read_choice(value: Any, name: str) -> Grammar:
    if not isinstance(value, list):
        raise wrong_type(name, "an array of strings", value)
    if not 1 <= len(value) <= CHOICES_MAX:
        raise InvalidRequest(f"{name} has {len(value)} choices, it must have 1 to {CHOICES_MAX}", param=name)
    if not all(isinstance(choice, str) for choice in value):
        raise wrong_type(name, "an array of strings", value)
    if not all(value):
        raise InvalidRequest(f"{name}: a choice must not be empty", param=name)
    return Grammar(GrammarKind.CHOICE, _text(orjson.dumps(value).decode(), name))


def read_grammar(value: Any, name: str) -> Grammar:
    if isinstance(value, str) and "::=" in value:
        return Grammar(GrammarKind.EBNF, _text(value, name, num_bytes_max=GBNF_BYTES_MAX))
    return read_lark(value, name)


def read_lark(value: Any, name: str) -> Grammar:
    return Grammar(GrammarKind.LARK, _text(value, name))


def _text(value: Any, name: str, *, num_bytes_max: int = TEXT_BYTES_MAX) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    if not value:
        raise InvalidRequest(f"{name} must not be empty", param=name)
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} has half of a surrogate pair", param=name) from error
    if num_bytes > num_bytes_max:
        raise InvalidRequest(f"{name} has {num_bytes} bytes, the limit is {num_bytes_max}", param=name)
    return value
