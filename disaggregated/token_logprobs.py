"""How likely tokens were: what a client may ask to be told beside each token.

All of it is by the model's own logits, before temperature, penalties, biases and grammar. So it is a property of the
tokens alone, and the same whichever server computes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import overload

from disaggregated.errors import ServerLost
from disaggregated.v1 import control_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Of one token in its place: natural logarithms of probabilities."""

    logprob: float
    rank: int
    """How many tokens were at least as likely; 1: none was likelier."""
    top_token_ids: tuple[int, ...] = ()
    """The likeliest ones, the likeliest first, equals by their id; or those that the client asked for, in its order."""
    top_logprobs: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Told:
    """What comes beside tokens to whoever asked for it."""

    tokens: Sequence[TokenLogprob] = ()
    """One for each token that comes with it."""
    prompt: Sequence[TokenLogprob] = ()
    """Of the prompt's second token and those after it; once, with the first tokens."""


def to_proto(tokens: Sequence[TokenLogprob] | None) -> control_pb2.Logprobs | None:
    """None, which a message takes for an absent field, when nothing was asked for."""
    if not tokens:
        return None
    return control_pb2.Logprobs(
        logprobs=[token.logprob for token in tokens],
        ranks=[token.rank for token in tokens],
        num_top=len(tokens[0].top_token_ids),
        top_token_ids=[token_id for token in tokens for token_id in token.top_token_ids],
        top_logprobs=[logprob for token in tokens for logprob in token.top_logprobs],
    )


def from_proto(message: control_pb2.Logprobs) -> list[TokenLogprob]:
    """Raises ServerLost when its lists do not fit together: nothing that such a server says can be trusted."""
    return list(PackedLogprobs(message))


class PackedLogprobs(Sequence[TokenLogprob]):
    """A message's tokens, each unpacked when it is asked for: those of a long prompt are many."""

    def __init__(self, message: control_pb2.Logprobs) -> None:
        """Raises ServerLost when its lists do not fit together."""
        num, top = len(message.logprobs), message.num_top
        if not (len(message.ranks) == num and len(message.top_token_ids) == len(message.top_logprobs) == num * top):
            raise ServerLost(f"logprobs of {num} tokens came with {len(message.top_logprobs)} others, {top} for each")
        self._message = message

    def __len__(self) -> int:
        return len(self._message.logprobs)

    @overload
    def __getitem__(self, index: int) -> TokenLogprob: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprob]: ...
    def __getitem__(self, index: int | slice) -> TokenLogprob | list[TokenLogprob]:
        places = range(len(self))[index]
        return self._one(places) if isinstance(places, int) else [self._one(place) for place in places]

    def _one(self, place: int) -> TokenLogprob:
        message, top = self._message, self._message.num_top
        begin, end = place * top, (place + 1) * top
        return TokenLogprob(
            message.logprobs[place],
            message.ranks[place],
            tuple(message.top_token_ids[begin:end]),
            tuple(message.top_logprobs[begin:end]),
        )
