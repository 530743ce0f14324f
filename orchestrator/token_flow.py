"""From what the two servers of an attempt tell to the sink of its run: in order, once, and each by the shortest way.

once, and whatever is told beside them    Arrival ──TokenOrder──▶ RequestRun.deliver
tokens that are due, and nothing else     ──────────────────────▶ RequestRun.deliver
one by one, while it decodes (in flow)    ──────────────────────▶ push_token
the same, where the sink has a terminal   a lane takes them before they come here (`orchestrator.fan_out`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

from disaggregated.errors import ServerLost
from disaggregated.request_life import Phase
from disaggregated.token_logprobs import Told
from orchestrator.fan_out import Lane, Terminal
from orchestrator.load import Share
from orchestrator.request_run import RequestRun
from orchestrator.story import AttemptStory
from orchestrator.token_order import Arrival, TokenOrder

# Looked up often: a name of this module costs less than one of an enum.
_TRANSFERRING: Final = Phase.TRANSFERRING
_DECODING: Final = Phase.DECODING

SETTLED_EVERY: Final = 32
"""Tokens, after which the books of a sequence in flow are brought up to date."""


class TokenFlow(ABC):
    """Of one attempt. Invariant: out of flow the books are up to date; in flow, up to `_settled_position`.

    With a lane, the first token that comes here again finds the position where the lane began.
    """

    __slots__ = (
        "_emitted", "_flow_position", "_generation_share", "_has_landed", "_is_over", "_lane", "_last_position",
        "_last_token_s", "_longest_gap_s", "_num_prompt_tokens", "_order", "_pause_position", "_push_token",
        "_settled_position", "run", "story",
    )  # fmt: skip

    def __init__(self, run: RequestRun, story: AttemptStory) -> None:
        self.run = run
        self.story = story
        self._num_prompt_tokens = len(run.request.token_ids) + len(run.emitted)
        """Of this attempt's prompt: what came of an earlier one is a part of it."""
        self._order = TokenOrder(self._num_prompt_tokens, run.sampling)
        self._generation_share: Share | None = None
        self._has_landed = False
        """The prompt's blocks are where it decodes."""
        self._is_over = False
        self._flow_position = -1
        """Of the token that is due, while tokens come one by one and nothing else does; -1: they do not."""
        self._pause_position = -1
        """In flow, the next token that is not like all others: the books are due before it, or it is the last one, or
        those after it may go by a lane."""
        self._lane: Lane | None = None
        """Once one was had, for as long as it is in flow; it may be shut."""
        self._settled_position = -1
        """Up to which the books are up to date."""
        self._last_position = len(run.request.token_ids) + run.request.sampling.max_tokens - 1
        self._last_token_s = self._longest_gap_s = 0.0
        self._emitted = run.emitted
        self._push_token = run.push_token

    def on_token(self, position: int, token_id: int, now_s: float) -> None:
        """The ways of most tokens are short: what one of them touches is here, and in its sink.

        Memory costs more than counting: a server's streams take turns, and each finds its books out of the cache. So
        those of the run, of the stories and of the shares are brought up to date now and then.
        """
        if position != self._flow_position or position == self._pause_position:
            self._on_other_token(position, token_id, now_s)
            return
        self._flow_position = position + 1
        if (gap_s := now_s - self._last_token_s) > self._longest_gap_s:
            self._longest_gap_s = gap_s
        self._last_token_s = now_s
        self._emitted.append(token_id)
        if not self._push_token(token_id):
            self.run.story.finish_reason = "stop"
            self._finish(now_s)

    def _on_other_token(self, position: int, token_id: int, now_s: float) -> None:
        """One before which the books are due, or the last one, or one that is not in flow."""
        if self._lane is not None:
            self._catch_up(self._lane)
        if position == self._flow_position != self._last_position:
            self._settle()
            self._pause_position = min(position + SETTLED_EVERY, self._last_position)
            self.on_token(position, token_id, now_s)
            if self._flow_position >= 0:
                self._use_lane(token_id)
            return
        if not self._has_landed:
            self._landed()
        self._came(position, (token_id,), "", now_s)

    def _enter_flow(self) -> None:
        """Its first tokens came, it decodes, and no server was lost since."""
        story = self.run.story
        position = self._flow_position = self._settled_position = self._order.position
        self._pause_position = min(position + SETTLED_EVERY, self._last_position)
        self._last_token_s, self._longest_gap_s = story.last_token_s, story.longest_gap_s
        self._use_lane()

    def _use_lane(self, token_id: int | None = None) -> None:
        """The next tokens go by a lane, if the sink has a terminal now. `token_id`: one that did not."""
        terminal = self.run.terminal()
        if terminal is None:
            return
        lane = self._lane
        if lane is None:
            lane = self._lane = self._open_lane(terminal)
            if lane is None:
                return
        if token_id is not None:
            lane.learn(token_id)
        self._pause_position = self._flow_position
        lane.go_on(self._flow_position, self._last_position, self._last_token_s, self._longest_gap_s)

    def _catch_up(self, lane: Lane) -> None:
        """With what it has delivered."""
        token_ids, last_token_s, longest_gap_s = lane.take()
        if token_ids:
            self._emitted.extend(token_ids)
            self._flow_position += len(token_ids)
            self._last_token_s, self._longest_gap_s = last_token_s, longest_gap_s

    def _settle(self) -> None:
        """Bring the books up to date."""
        num_tokens = self._flow_position - self._settled_position
        if not num_tokens:
            return
        self._settled_position = self._order.position = self._flow_position
        self.story.num_tokens += num_tokens
        if self._generation_share is not None:
            self._generation_share.grew(num_tokens)
        story = self.run.story
        story.num_tokens += num_tokens
        story.last_token_s, story.longest_gap_s = self._last_token_s, self._longest_gap_s

    def _leave_flow(self) -> None:
        if self._lane is not None:
            self._catch_up(self._lane)
            self._lane.close()
            self._lane = None
        self._settle()
        self._flow_position = -1

    def _came(self, position: int, token_ids: Sequence[int], finish_reason: str, now_s: float) -> None:
        """Tokens of which nothing else is told."""
        if self._flow_position >= 0:
            self._leave_flow()
        if self._is_over:
            return
        order = self._order
        if order.is_open and position == order.position:
            order.position += len(token_ids)
            self._deliver(token_ids, finish_reason, None, now_s)
        else:
            self._arrived(Arrival(position, token_ids, finish_reason), now_s)

    def _arrived(self, arrival: Arrival, now_s: float) -> None:
        if self._flow_position >= 0:
            self._leave_flow()
        if self._is_over:
            return
        try:
            due = self._order.arrive(arrival)
        except ServerLost as error:
            self.on_lost(error)
            return
        if due is not None:
            self._deliver(due.token_ids, due.finish_reason, due.told(), now_s)

    def _deliver(self, token_ids: Sequence[int], finish_reason: str, told: Told | None, now_s: float) -> None:
        life = self.run.life
        if life.phase is _TRANSFERRING:  # Its first token came before, so these are decoded ones.
            life.advance(_DECODING, now_s=now_s)
        if self.run.deliver(token_ids, finish_reason, told, now_s=now_s):
            self._finish(now_s)
            return
        if self._generation_share is not None:
            self._generation_share.grew(len(token_ids))
        self._delivered(now_s)

    @abstractmethod
    def _open_lane(self, terminal: Terminal) -> Lane | None:
        """On the link that its tokens come by; None: there is none to be had."""

    @abstractmethod
    def _landed(self) -> None:
        """The generation server has said so, for the first time."""

    @abstractmethod
    def _delivered(self, now_s: float) -> None:
        """Tokens reached the client, and more are to come."""

    @abstractmethod
    def _finish(self, now_s: float) -> None:
        """The client has all that it is to have."""

    @abstractmethod
    def on_lost(self, error: ServerLost) -> None:
        """The generation server is of no more use; it may be that what it tells makes no sense."""
