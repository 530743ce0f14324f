"""Whether a grammar can be compiled, found out before any server hears of it.

llguidance does it in about a millisecond, without a model's vocabulary and without torch; on a thread, because a long
grammar takes longer. What was found is remembered, so that a thousand requests with one schema check it once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from typing import Final

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar
from disaggregated.structured.grammar_text import to_llguidance

CHECK_TIMEOUT_S: Final = 5.0
VERDICTS_MAX: Final = 4096
_MESSAGE_CHARACTERS_MAX: Final = 500


class GrammarCheck:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        """What is wrong, "" where nothing is, by the digest of a grammar; the least recently used first."""

    async def __call__(self, grammar: Grammar, *, param: str) -> None:
        """
        Raises:
            InvalidRequest: names `param`, the client's field, and what is wrong with it.
        """
        key = hashlib.blake2b(f"{grammar.kind} {grammar.text}".encode(), digest_size=16).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = await self._find(grammar, param)
            self._verdicts[key] = verdict
            if len(self._verdicts) > VERDICTS_MAX:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        if verdict:
            raise InvalidRequest(f"{param} cannot be compiled: {verdict}", param=param)

    async def _find(self, grammar: Grammar, param: str) -> str:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await asyncio.to_thread(what_is_wrong, grammar)
        except TimeoutError as error:
            raise InvalidRequest(
                f"{param} is too complex: it took longer than {CHECK_TIMEOUT_S:g} s to compile", param=param
            ) from error


def what_is_wrong(grammar: Grammar) -> str:
    """In the library's words, on one line; "" when it can be compiled."""
    from llguidance import LLMatcher

    try:
        message = str(LLMatcher.validate_grammar(to_llguidance(grammar)))
    except ValueError as error:
        message = str(error)
    return " ".join(message.split())[:_MESSAGE_CHARACTERS_MAX]
