"""One sequence on its way through the servers: what was asked, what has been generated so far, and who gets it.

This is all that survives the loss of a server. An attempt is thrown away with its server; the run makes the next one
from the prompt, the tokens that the client already has, and the sampling that is left.
"""

from __future__ import annotations

import asyncio
import functools
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from disaggregated.block_hash import BlockHash
from disaggregated.errors import DisaggregatedError
from disaggregated.request_life import Phase, RequestLife
from disaggregated.sampling_params import SamplingParams
from disaggregated.token_logprobs import Told
from orchestrator.admission.tenant_turns import Waiting
from orchestrator.admission.ticket import Settle, Ticket
from orchestrator.fan_out import Terminal
from orchestrator.routing.placement import NotYet
from orchestrator.story import RequestStory

if TYPE_CHECKING:
    from orchestrator.attempt import Attempt


class TokenSink(Protocol):
    """Where the tokens of one sequence go. Called on the event loop, in order; must not block."""

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        """Take the next tokens; `finish_reason` is "", or says that these are the last. False: no more are wanted.

        `told`: where the request asks for logprobs, those of `token_ids`.

        A sink may have a `push_token(token_id) -> bool`, too: the same for one token that is not the last and of which
        nothing else is told, as nearly every token is.
        """


class TokenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. Times are on the orchestrator's monotonic clock."""

    request_id: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    arrived_s: float
    deadline_s: float
    priority: int = 0
    """A lower one is served earlier."""
    cache_salt: str = ""
    """Its prompt is found in caches only by requests with the same one."""
    session: str = ""
    """Of the conversation it belongs to, for routers that keep one where it is; "": nobody says."""
    context_session: str = ""
    """The same for the context server, which may be another conversation's: an agent's that sent this one."""
    ticket: Ticket = Ticket()
    """Whose it is, and what was asked for in its headers."""
    may_end_anywhere: bool = False
    """Its sink may want no more after any token, as with stop strings: so several that come at once are given to it one
    by one, and which are counted does not depend on how many came together."""


RequestOver = Callable[[RequestStory, "DisaggregatedError | None"], None]
"""Called once on the event loop, perhaps in the middle of what a server brings for others; must not raise. The error
says why it came to nothing; None: `TokenSink` has all of it."""


class RequestRun:
    """Invariant: `emitted` is exactly what `sink` was given, and position `len(prompt) + len(emitted)` is due next."""

    __slots__ = (
        "attempt", "avoid", "block_hashes", "cost", "emitted", "hashing", "life", "not_yet",
        "num_losses_in_a_row", "num_transfer_failures", "over", "push_token", "request", "settle", "sink",
        "story", "terminal", "waiting",
    )  # fmt: skip

    def __init__(
        self, request: TokenRequest, sink: TokenSink, over: RequestOver, settle: Settle, *, now_s: float
    ) -> None:
        """`settle` is told what it took in the end."""
        self.request = request
        self.sink = sink
        self.over = over
        self.settle = settle
        self.emitted: array[int] = array("I")
        """Four bytes a token, which a client that does not read may make many of."""
        self.push_token: Callable[[int], bool] = getattr(sink, "push_token", None) or functools.partial(_push_one, sink)
        """Gives `sink` one token of `emitted` that is not the last, and of which nothing else is told."""
        self.terminal: Callable[[], Terminal | None] = _no_terminal
        """Where such tokens may go without the sink, if they may now."""
        self.life = RequestLife(request.request_id, now_s=now_s)
        self.story = RequestStory(
            life=self.life,
            arrived_s=request.arrived_s,
            num_prompt_tokens=len(request.token_ids),
            tenant=request.ticket.tenant,
            objectives=request.ticket.objectives,
        )
        self.waiting: Waiting[RequestRun] | None = None
        """Its place in the queue, also once that was taken; None: it never had one."""
        self.cost = 0
        """Tokens that it was expected to take when it was dispatched; 0: it was not yet."""
        self.attempt: Attempt | None = None
        self.hashing: asyncio.Task[None] | None = None
        """Of a prompt so long that its blocks are hashed on a thread."""
        self.not_yet: NotYet | None = None
        """Why the queue could not place it when it last tried."""
        self.block_hashes: Sequence[BlockHash] = ()
        """Of the prompt's full blocks, where somebody wants to know them."""
        self.avoid: frozenset[str] = frozenset()
        self.num_losses_in_a_row = 0
        """Since the last token."""
        self.num_transfer_failures = 0

    @property
    def token_ids(self) -> Sequence[int]:
        """The prompt of the next attempt."""
        return [*self.request.token_ids, *self.emitted] if self.emitted else self.request.token_ids

    @property
    def num_tokens_left(self) -> int:
        return self.request.sampling.max_tokens - len(self.emitted)

    @property
    def sampling(self) -> SamplingParams:
        """What is left to do."""
        return self.request.sampling.after(len(self.emitted)) if self.emitted else self.request.sampling

    def deliver(self, token_ids: Sequence[int], finish_reason: str, told: Told | None, *, now_s: float) -> bool:
        """Give the tokens that are due to the client; whether the request is over."""
        if len(token_ids) > 1 and self.request.may_end_anywhere:
            return self._deliver_each(token_ids, finish_reason, told, now_s)
        if token_ids:
            self.emitted.extend(token_ids)
            self.story.tokens_came(len(token_ids), now_s=now_s)
            self.num_losses_in_a_row = 0
        if not finish_reason and len(self.emitted) >= self.request.sampling.max_tokens:
            finish_reason = "length"
        is_wanted = self.sink.push(token_ids, finish_reason, told)
        if not is_wanted and not finish_reason:
            finish_reason = "stop"
        self.story.finish_reason = finish_reason
        return bool(finish_reason)

    def _deliver_each(self, token_ids: Sequence[int], finish_reason: str, told: Told | None, now_s: float) -> bool:
        last = len(token_ids) - 1
        for index, token in enumerate(token_ids):
            reason = finish_reason if index == last else ""
            if self.deliver((token,), reason, _told_of_one(told, index), now_s=now_s):
                return True
        return False

    def end(self, phase: Phase, error: DisaggregatedError | None, *, now_s: float) -> None:
        if not self.life.is_over:
            self.life.advance(phase, now_s=now_s)
        self.story.error = "" if error is None else f"{type(error).__name__}: {error}"


def _no_terminal() -> None:
    """Nobody has set another one."""


def _push_one(sink: TokenSink, token_id: int) -> bool:
    return sink.push((token_id,), "")


def _told_of_one(told: Told | None, index: int) -> Told | None:
    """Of several tokens that came together: what is told of the prompt goes with the first."""
    if told is None:
        return None
    return Told(told.tokens[index : index + 1], told.prompt if index == 0 else ())
