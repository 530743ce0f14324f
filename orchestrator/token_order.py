"""Puts what two servers tell about one sequence into one line of tokens.

The first token comes from the context server, the others from the generation server, over two connections: the second
token may well be here before the first. Nothing reaches the client out of order, twice, or with one missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from disaggregated.errors import ServerLost
from disaggregated.sampling_params import SamplingParams
from disaggregated.token_logprobs import PackedLogprobs, TokenLogprob, Told
from disaggregated.v1 import control_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens of one sequence; `first_position` is the index, prompt included, of `token_ids[0]`."""

    first_position: int
    token_ids: Sequence[int]
    finish_reason: str = ""
    logprobs: control_pb2.Logprobs | None = None
    """Of `token_ids`, where they were asked for."""
    prompt_logprobs: control_pb2.Logprobs | None = None

    def told(self) -> Told | None:
        """None when nothing was asked for."""
        if self.logprobs is None and self.prompt_logprobs is None:
            return None
        return Told(_all_of(self.logprobs), _all_of(self.prompt_logprobs))


def arrival_of(delta: control_pb2.StreamDelta) -> Arrival:
    return Arrival(
        delta.first_position,
        delta.token_ids,
        delta.finish_reason,
        delta.logprobs if delta.HasField("logprobs") else None,
        delta.prompt_logprobs if delta.HasField("prompt_logprobs") else None,
    )


def _all_of(message: control_pb2.Logprobs | None) -> Sequence[TokenLogprob]:
    return () if message is None else PackedLogprobs(message)


class TokenOrder:
    """Invariant: everything before `position` has been given out; everything held lies after it."""

    __slots__ = ("_early", "_first", "_is_plain", "_num_prompt_told", "_tells", "is_open", "position")

    def __init__(self, position: int, asked: SamplingParams | None = None) -> None:
        """`asked`: says which logprobs have to come; None: none have to."""
        self.position = position
        """Of the token that is due next."""
        self._num_prompt_told = 0 if asked is None or asked.prompt_logprobs is None else position - 1
        """Tokens of the prompt whose logprobs come with the first token."""
        self._first = position
        self._tells = asked is not None and asked.logprobs is not None
        self._is_plain = not (self._tells or self._num_prompt_told)
        self._early: Arrival | None = None
        self.is_open = self._is_plain
        """Nothing is held, and nothing has to be told beside tokens: those that are due may go straight through, and
        whoever lets them moves `position` on. All others have to `arrive()`."""

    def arrive(self, arrival: Arrival) -> Arrival | None:
        """What can be given out now, or None while the token that is due has not come.

        Raises:
            ServerLost: the sender skips or repeats a token; nothing it says can be trusted any more.
        """
        self._check_told(arrival)
        if self._early is not None and arrival.first_position > self.position:
            arrival = _joined(self._early, arrival)
        if arrival.first_position > self.position:
            self._early, self.is_open = arrival, False
            return None
        if arrival.first_position < self.position:
            raise _broken(self.position, arrival.first_position)
        if self._early is not None:
            if not arrival.finish_reason:  # Else both servers know that this token ends it, and the other was faster.
                arrival = _joined(arrival, self._early)
            self._early, self.is_open = None, self._is_plain
        self.position += len(arrival.token_ids)
        return arrival

    def _check_told(self, arrival: Arrival) -> None:
        if self._tells or arrival.logprobs is not None:
            _check_count(arrival.logprobs, len(arrival.token_ids), "tokens")
        if arrival.first_position == self._first and (self._num_prompt_told or arrival.prompt_logprobs is not None):
            _check_count(arrival.prompt_logprobs, self._num_prompt_told, "tokens of the prompt")


def _joined(earlier: Arrival, later: Arrival) -> Arrival:
    due = earlier.first_position + len(earlier.token_ids)
    if earlier.finish_reason or later.first_position != due:
        raise _broken(due, later.first_position)
    return Arrival(
        earlier.first_position,
        [*earlier.token_ids, *later.token_ids],
        later.finish_reason,
        _joined_logprobs(earlier.logprobs, later.logprobs),
        earlier.prompt_logprobs,
    )


def _joined_logprobs(
    earlier: control_pb2.Logprobs | None, later: control_pb2.Logprobs | None
) -> control_pb2.Logprobs | None:
    if earlier is None or later is None:
        return earlier
    both = control_pb2.Logprobs()
    both.MergeFrom(earlier)
    both.MergeFrom(later)
    return both


def _check_count(message: control_pb2.Logprobs | None, num_wanted: int, what: str) -> None:
    num_told = len(_all_of(message))
    if num_told != num_wanted:
        raise ServerLost(f"logprobs of {num_told} tokens came with {num_wanted} {what}")


def _broken(due: int, came: int) -> ServerLost:
    return ServerLost(f"the token at position {due} was due, and a server sent the one at {came}")
