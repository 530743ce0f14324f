"""Which library follows a grammar: the same one on every server that is configured alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from disaggregated.engine.grammar.api import Backend, CompiledGrammar
from disaggregated.engine.grammar.vocabulary import Vocabulary
from disaggregated.errors import ConfigError, GrammarRefused
from disaggregated.grammar import Grammar

_TRIED: Final[Mapping[str, Sequence[str]]] = {
    "auto": ("llguidance",),
    "llguidance": ("llguidance",),
    "xgrammar": ("xgrammar", "llguidance"),
}
"""llguidance takes every grammar, compiles it a hundred times faster, and is loaded in a tenth of the time and memory;
masks of both take some hundredths of a millisecond."""
NAMES: Final = ("auto", "xgrammar", "llguidance")


class Backends:
    """Used by one thread at a time."""

    def __init__(self, preference: str, vocabulary: Vocabulary) -> None:
        """
        preference: one of NAMES.

        Raises:
            ConfigError: the library that is asked for is not installed.
        """
        assert preference in NAMES, f"{preference} is none of {NAMES}"
        self._vocabulary = vocabulary
        self.preference = preference
        self._loaded: dict[str, Backend] = {}
        if preference == "xgrammar" and importlib.util.find_spec("xgrammar") is None:
            raise ConfigError("guided_decoding_backend: no xgrammar here: pip install 'disaggregated[xgrammar]'")

    def load(self) -> None:
        """All that will be used, so that no request waits for it. It takes tenths of a second, with XGrammar seconds,
        and much of that the interpreter's lock, so nobody's tokens should come meanwhile."""
        for name in _TRIED[self.preference]:
            self._backend(name)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """By the first library that takes it. Raises GrammarRefused, in the words of the last one that was asked."""
        *first, last = _TRIED[self.preference]
        for name in first:
            try:
                return self._backend(name).compile(grammar)
            except GrammarRefused:
                continue
        return self._backend(last).compile(grammar)

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
