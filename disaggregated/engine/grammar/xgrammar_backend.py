"""Grammars by XGrammar: compiles for tens of milliseconds, because it looks at the whole vocabulary then, and fills a
mask in two microseconds afterwards.

It passes over keywords of a schema that it does not know. So only schemas of keywords that it is known to enforce are
compiled here; the others are refused, and another library takes them.
"""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
import xgrammar

from disaggregated.engine.grammar.api import Mask
from disaggregated.engine.grammar.vocabulary import Vocabulary
from disaggregated.errors import GrammarRefused
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.structured.grammar_text import ANY_OBJECT, SEPARATORS, choice_to_gbnf

ENFORCED: Final = frozenset(
    {
        "type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems",
        "enum", "const", "anyOf", "$ref", "$defs", "definitions", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum",
    }
)  # fmt: skip
"""Not the lengths and patterns of strings: they are enforced too, but take it seconds to compile."""
TEXT_CHARACTERS_MAX: Final = 8 << 10
"""An object of some hundred optional properties takes it a second, and one of a thousand minutes."""
REMARKS: Final = frozenset({"title", "description", "default", "example", "examples", "$schema", "$id", "$comment"})
"""Keywords that say nothing about which values there are."""


class XGrammarBackend:
    """Implements `Backend`."""

    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = xgrammar.TokenizerInfo(
            vocabulary.read().tokens[: vocabulary.vocab_size],
            xgrammar.VocabType.RAW,
            vocab_size=vocabulary.vocab_size,
            stop_token_ids=list(vocabulary.eos_token_ids),
        )
        self._compiler = xgrammar.GrammarCompiler(self._tokenizer, max_threads=1, cache_enabled=False)

    def compile(self, grammar: Grammar) -> XGrammarGrammar:
        try:
            return XGrammarGrammar(self._compile(grammar))
        except (RuntimeError, ValueError) as error:  # What the library says of any text that it cannot read.
            raise GrammarRefused(f"grammar: {_last_line(error)}", param="grammar") from error

    def _compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        match grammar.kind:
            case GrammarKind.JSON_OBJECT:
                return self._compile_schema(ANY_OBJECT)
            case _ if len(grammar.text) > TEXT_CHARACTERS_MAX:
                raise GrammarRefused(
                    f"grammar: {len(grammar.text)} characters, XGrammar is given {TEXT_CHARACTERS_MAX}", param="grammar"
                )
            case GrammarKind.JSON_SCHEMA:
                if odd := unenforced(json.loads(grammar.text)):
                    raise GrammarRefused(f"grammar: XGrammar does not enforce {odd}", param="grammar")
                return self._compile_schema(grammar.text)
            case GrammarKind.REGEX:
                return self._compiler.compile_regex(grammar.text)
            case GrammarKind.CHOICE:
                return self._compiler.compile_grammar(choice_to_gbnf(grammar.text))
            case GrammarKind.EBNF:
                return self._compiler.compile_grammar(grammar.text)
            case GrammarKind.LARK:
                raise GrammarRefused("grammar: the Lark dialect is llguidance's", param="grammar")

    def _compile_schema(self, schema: str) -> xgrammar.CompiledGrammar:
        return self._compiler.compile_json_schema(
            schema, any_whitespace=False, separators=SEPARATORS, strict_mode=False
        )


class XGrammarGrammar:
    """Implements `CompiledGrammar`."""

    def __init__(self, compiled: xgrammar.CompiledGrammar) -> None:
        self._compiled = compiled

    @property
    def num_bytes(self) -> int:
        return int(self._compiled.memory_size_bytes)

    def matcher(self) -> XGrammarMatcher:
        return XGrammarMatcher(xgrammar.GrammarMatcher(self._compiled))


class XGrammarMatcher:
    """Implements `Matcher`."""

    def __init__(self, matcher: xgrammar.GrammarMatcher) -> None:
        self._matcher = matcher

    def fill(self, mask: Mask) -> None:
        self._matcher.fill_next_token_bitmask(mask[np.newaxis])

    def accept(self, token_id: int) -> bool:
        return bool(self._matcher.accept_token(token_id))

    def rollback(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)


def unenforced(schema: Any) -> str:
    """The first keyword in a schema that has a meaning and is not in ENFORCED, or that a value of is not; else ""."""
    open_ones = [schema]
    while open_ones:
        node = open_ones.pop()
        if not isinstance(node, dict):
            continue
        for keyword, value in node.items():
            if keyword in {"properties", "$defs", "definitions"} and isinstance(value, dict):
                open_ones.extend(value.values())
            elif keyword in {"anyOf", "prefixItems"} and isinstance(value, list):
                open_ones.extend(value)
            elif keyword in {"items", "additionalProperties"}:
                open_ones.append(value)
            elif keyword not in ENFORCED and keyword not in REMARKS:
                return str(keyword)
        if "$ref" in node and not node.keys() <= {"$ref", "$defs", "definitions"} | REMARKS:
            return "keywords beside a $ref"
        if "anyOf" in node and not node.keys() <= {"anyOf", "$defs", "definitions"} | REMARKS:
            return "keywords beside an anyOf"
    return ""


def _last_line(error: Exception) -> str:
    """Without the time and the place in the library's source, which come first."""
    return str(error).strip().rpartition(": ")[2].splitlines()[0][:500] if str(error).strip() else repr(error)
