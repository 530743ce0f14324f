"""What a grammar library has to do for us. A mask has a bit for each token id: 1 is allowed."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from disaggregated.engine.api import TokenMask
from disaggregated.grammar import Grammar

if TYPE_CHECKING:
    from disaggregated.engine.grammar.follower import GrammarFollower

Mask = TokenMask
"""(ceil(vocab_size / 32)); bit i % 32 of word i // 32 is token i."""


class Matcher(Protocol):
    """Where one text stands in a grammar. Used by one thread at a time. Each method may raise GrammarRefused when the
    text has become too complex to follow; nothing else can be done with it then."""

    def fill(self, mask: Mask) -> None:
        """Write which tokens may come next. End-of-text tokens are among them where the text may end, and only there:
        when nothing else can follow, they are all there is."""

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False: the grammar does not allow it, and nothing has changed."""

    def rollback(self, num_tokens: int) -> None:
        """Take the last accepted tokens back."""


class CompiledGrammar(Protocol):
    """Immutable, and shared by sequences. Used by any thread."""

    @property
    def num_bytes(self) -> int:
        """Of memory, roughly."""

    def matcher(self) -> Matcher:
        """A new one, at the beginning of the text."""


class Backend(Protocol):
    """A grammar library with a model's vocabulary loaded."""

    @property
    def name(self) -> str: ...

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Takes milliseconds, or seconds for a large grammar, mostly without the interpreter's lock.

        Raises:
            GrammarRefused: in the library's words.
        """


class Libraries(Protocol):
    """All backends of a server, as one. Used by one thread at a time."""

    def load(self) -> None:
        """What will be used, so that no request waits for it."""

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """By the best backend that takes it. Raises GrammarRefused."""


class Grammars(Protocol):
    """What an engine has grammars from."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, where its grammar lets it end."""

    def begin(self, grammar: Grammar) -> Future[GrammarFollower]:
        """A follower at the beginning of the text, when the grammar is compiled. Does not wait.

        Raises:
            QueueFull: too many wait already.
        """
