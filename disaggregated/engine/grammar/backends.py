"""Which library follows a grammar: the same one on every server that has the same ones installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from disaggregated.engine.grammar.api import Backend, CompiledGrammar
from disaggregated.engine.grammar.vocabulary import Vocabulary
from disaggregated.errors import ConfigError, GrammarRefused
from disaggregated.grammar import Grammar, GrammarKind

_STRUCTURE: Final = frozenset({GrammarKind.JSON_OBJECT, GrammarKind.JSON_SCHEMA, GrammarKind.EBNF})
"""What XGrammar is the faster library for: its masks cost a tenth. What is nearly a regular expression compiles in a
thousandth of its time in llguidance."""
NAMES: Final = ("auto", "xgrammar", "llguidance")


class Backends:
    """Each library is loaded when it is first needed, which takes a second or two. Used by one thread at a time."""

    def __init__(self, preference: str, vocabulary: Vocabulary) -> None:
        """
        preference: one of NAMES; auto is xgrammar, where it is installed, for what it is the better one.

        Raises:
            ConfigError: the library that is asked for is not installed.
        """
        assert preference in NAMES, f"{preference} is none of {NAMES}"
        self._vocabulary = vocabulary
        self.preference = preference
        self._loaded: dict[str, Backend] = {}
        self._has_xgrammar = importlib.util.find_spec("xgrammar") is not None
        if preference == "xgrammar" and not self._has_xgrammar:
            raise ConfigError("guided_decoding_backend: no xgrammar here: pip install 'disaggregated[xgrammar]'")

    def load(self) -> None:
        """Load what is asked for now, so that no request waits for it."""
        self._backend(self._order(GrammarKind.JSON_SCHEMA)[0])

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """By the best library that takes it. Raises GrammarRefused, in the words of the last one that was asked."""
        *first, last = self._order(grammar.kind)
        for name in first:
            try:
                return self._backend(name).compile(grammar)
            except GrammarRefused:
                continue
        return self._backend(last).compile(grammar)

    def _order(self, kind: GrammarKind) -> Sequence[str]:
        wants_xgrammar = self.preference == "xgrammar" or (self.preference == "auto" and kind in _STRUCTURE)
        return ("xgrammar", "llguidance") if wants_xgrammar and self._has_xgrammar else ("llguidance",)

    def _backend(self, name: str) -> Backend:
        if name not in self._loaded:
            self._loaded[name] = _LOAD[name](self._vocabulary)
        return self._loaded[name]


def _load_xgrammar(vocabulary: Vocabulary) -> Backend:
    from disaggregated.engine.grammar.xgrammar_backend import XGrammarBackend

    return XGrammarBackend(vocabulary)


def _load_llguidance(vocabulary: Vocabulary) -> Backend:
    from disaggregated.engine.grammar.llguidance_backend import LLGuidanceBackend

    return LLGuidanceBackend(vocabulary)


_LOAD: Final[Mapping[str, Callable[[Vocabulary], Backend]]] = {
    "xgrammar": _load_xgrammar,
    "llguidance": _load_llguidance,
}
