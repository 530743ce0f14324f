"""How the text of each kind of grammar is read: the same for whoever checks it and for every library that follows it.

JSON has one spelling here, `{"a": 1, "b": [1, 2]}`: a blank after each colon and comma, and none elsewhere. A model
that could write blanks wherever JSON allows them would sometimes never write anything else; and libraries that agree on
every byte can stand in for each other, also in the middle of a text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from disaggregated.grammar import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

SEPARATORS: Final = (", ", ": ")
_JSON_OPTIONS: Final[JsonCompileOptions] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
ANY_OBJECT: Final = '{"type": "object"}'
"""The schema that every JSON object has."""


def to_llguidance(grammar: Grammar) -> str:
    """In the form that llguidance's matcher takes. Raises ValueError for what is not even JSON, or not GBNF."""
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
