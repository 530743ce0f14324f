"""How the text of each kind of grammar is read: the same for whoever checks it and for every library that follows it.

JSON has one spelling here, `{"a": 1, "b": [1, 2]}`: a blank after each colon and comma, and none elsewhere. A model
that could write blanks wherever JSON allows them would sometimes never write anything else; and libraries that agree on
every byte can stand in for each other, also in the middle of a text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import orjson

from disaggregated.grammar import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

SEPARATORS: Final = (", ", ": ")
_JSON_OPTIONS: Final[JsonCompileOptions] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
ANY_OBJECT: Final = '{"type": "object"}'
"""The schema that every JSON object has."""
_ANY_SPELLING: Final = {"name": "whole", "lark_grammar": '%llguidance {"no_forcing": true}\nstart: @text'}


def to_llguidance(grammar: Grammar) -> str:
    """In the form that llguidance's matcher takes. Raises ValueError for what is not even JSON, or not GBNF.

    The model spells the text with whatever tokens it likes, also where the text has to be just this one: llguidance
    would insist on the tokenizer's own spelling there, which costs it five times as long and no other library does.
    """
    source = _source(grammar)
    one = orjson.loads(source)["grammars"][0] if source.startswith("{") else {"lark_grammar": source}
    return orjson.dumps({"grammars": [_ANY_SPELLING, {**one, "name": "text"}]}).decode()


def _source(grammar: Grammar) -> str:
    from llguidance import LLMatcher, grammar_from  # A tenth of a second, for those who need it.

    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema(ANY_OBJECT, defaults=_JSON_OPTIONS)
        case GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(grammar.text, defaults=_JSON_OPTIONS)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.text)
        case GrammarKind.CHOICE:
            return LLMatcher.grammar_from_lark(f"start: {_alternatives(grammar.text)}")
        case GrammarKind.EBNF:
            return grammar_from("gbnf", grammar.text)
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(grammar.text)


def choice_to_gbnf(text: str) -> str:
    return f"root ::= {_alternatives(text)}"


def _alternatives(text: str) -> str:
    choices = json.loads(text)
    return " | ".join(json.dumps(choice) for choice in choices)
