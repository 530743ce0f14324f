"""A sequence and its grammar: begun when it comes, attached when it is compiled, and then told what came before."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from concurrent.futures import Future
from typing import Final

from disaggregated.engine.grammar.api import Grammars
from disaggregated.engine.grammar.follower import GrammarFollower
from disaggregated.engine.sequence import Phase, Sequence
from disaggregated.errors import DisaggregatedError, GrammarBroken, InvalidRequest

MAY_SAMPLE: Final = frozenset({Phase.WAITING, Phase.RUNNING, Phase.RESERVED, Phase.LANDED})
"""Phases of a sequence that is not over: in any other one nobody waits for its grammar."""


def begin(grammars: Grammars | None, sequence: Sequence) -> Future[GrammarFollower] | None:
    """None: any text will do. Until the grammar is attached, nothing of the sequence is sampled.

    Raises:
        InvalidRequest: this engine follows no grammars.
        QueueFull: too many wait to be compiled.
    """
    grammar = sequence.sampling.grammar
    if grammar is None:
        return None
    if grammars is None:
        raise InvalidRequest("grammar: this server follows none", param="grammar")
    beginning = grammars.begin(grammar)
    sequence.stop_token_ids |= grammars.eos_token_ids
    sequence.awaits_grammar = True
    return beginning


def attach(sequence: Sequence, beginning: Future[GrammarFollower]) -> Exception | None:
    """`beginning` is done. What the sequence fails with, if it does."""
    sequence.awaits_grammar = False
    error = beginning.exception()
    if error is not None:
        return error if isinstance(error, Exception) else DisaggregatedError(f"{type(error).__name__}: {error}")
    sequence.grammar = beginning.result()
    if not sequence.grammar.follow(sequence.emitted):
        broken = GrammarBroken("what was generated so far does not match the grammar as it is read here")
        return sequence.grammar.problem or broken
    return None


def broken_by(sequence: Sequence, token_ids: AnySequence[int]) -> Exception | None:
    """Goes on by tokens that were sampled; what the sequence fails with, if one of them is not allowed."""
    if sequence.grammar is None or sequence.grammar.follow(token_ids):
        return None
    nothing = InvalidRequest("of the tokens that are allowed, none goes on with the grammar", param="logit_bias")
    return sequence.grammar.problem or nothing
