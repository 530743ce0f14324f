"""The queue with what is known about its pace: who may come in, who must be told that it is too late. Pure.

A request that would be served too late is refused as it comes, when that can be foreseen, and at the latest when its
last moment to be started has passed: work that nobody waits for any more would be taken from those who still do. That
is what keeps the goodput at its peak when many times more is asked for than can be done. While the servers have nothing
to do nobody is refused, whatever the estimates say: they come from busier times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Generic, Protocol

from disaggregated.errors import DisaggregatedError, Overloaded, QueueFull
from disaggregated.request_life import Phase
from disaggregated.sampling_params import SamplingParams
from orchestrator.admission.pace import RETRY_AFTER_S_MAX, QueuePace, ServiceTimes, whole_seconds
from orchestrator.admission.request_queue import RequestQueue
from orchestrator.admission.tenant_turns import Item, Waiting
from orchestrator.admission.ticket import Ticket
from orchestrator.story import RequestStory

_IN_TIME: Final = "it would be served too late"


_DONE: Final = (Phase.FINISHED, Phase.FAILED)


class Visitor(Protocol):
    """A request that asks to be served; nothing of it changes. Times are on the orchestrator's monotonic clock."""

    @property
    def ticket(self) -> Ticket: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def priority(self) -> int: ...
    @property
    def arrived_s(self) -> float: ...
    @property
    def deadline_s(self) -> float: ...


class WaitingRoom(Generic[Item]):
    """Whoever comes while nobody waits may pass, if there are servers for it, and leaves nothing behind here."""

    def __init__(
        self, depth_max: int, *, tenant_depth_max: int = 0, turn_away: Callable[[Item, DisaggregatedError], None]
    ) -> None:
        """`turn_away` is told who no longer waits, and why: somebody else's turn was more due, or it is too late."""
        self.queue: RequestQueue[Item] = RequestQueue(depth_max, tenant_depth_max=tenant_depth_max)
        self.pace = QueuePace()
        self.times = ServiceTimes()
        self._turn_away = turn_away
        self._promised_s = 0.0
        """Until then those who were told to come back, if they do, keep the servers busy."""

    def may_pass(self, visitor: Visitor, *, now_s: float, is_idle: bool) -> bool:
        """Nobody waits: it may be tried at once, and `passed()` or has to `enter()`. is_idle: nothing else runs.

        Raises:
            Overloaded: it would be served too late.
        """
        if self.queue.length:
            return False
        if not is_idle and self._start_by_s(visitor) < now_s:
            self._check_in_time(visitor, now_s)
        return True

    def passed(self, visitor: Visitor, *, now_s: float) -> int:
        """It is being dispatched. Returns the tokens that it is expected to cost."""
        cost = self._cost(visitor)
        self.pace.departed(cost=cost, since_s=now_s, now_s=now_s)
        return cost

    def _cost(self, visitor: Visitor) -> int:
        return len(visitor.token_ids) + self.times.num_tokens(visitor.sampling.max_tokens) or 1

    def enter(self, item: Item, visitor: Visitor, *, now_s: float, is_idle: bool) -> Waiting[Item]:
        """is_idle: nothing else runs or waits.

        Raises:
            QueueFull: no room.
            Overloaded: by the pace of late it would be served too late.
        """
        if not is_idle:
            self._check_in_time(visitor, now_s)
        ticket = visitor.ticket
        waiting = Waiting(
            item=item,
            tenant=ticket.tenant,
            weight=ticket.weight,
            priority=visitor.priority,
            cost=self._cost(visitor),
            since_s=now_s,
            start_by_s=visitor.deadline_s if is_idle else self._start_by_s(visitor),
        )
        loser = self.queue.who_makes_way(ticket.tenant, priority=visitor.priority)
        if loser is not None:
            self.queue.remove(loser)
        try:
            self.queue.put(waiting)
        except QueueFull as error:
            error.retry_after_s = self.retry_after_s(now_s=now_s)
            raise
        if loser is not None:
            self._turn_away(loser.item, self._made_way(now_s))
        return waiting

    def check_room(self, tenant: str, *, priority: int, now_s: float) -> None:
        """Before anything is spent on a newcomer. Raises QueueFull when `enter()` would."""
        num_waiting = self.queue.length
        if num_waiting >= self.queue.depth_max and self.queue.who_makes_way(tenant, priority=priority) is None:
            error = QueueFull(f"{num_waiting} requests are waiting, the limit is {self.queue.depth_max}")
            error.retry_after_s = self.retry_after_s(now_s=now_s)
            raise error

    def _start_by_s(self, visitor: Visitor) -> float:
        num_prompt, times = len(visitor.token_ids), self.times
        start_by_s = visitor.deadline_s - times.total_s(num_prompt, visitor.sampling.max_tokens)
        if (ttft_s := visitor.ticket.objectives.ttft_s) is None:
            return start_by_s
        return min(start_by_s, visitor.arrived_s + ttft_s - times.ttft_s(num_prompt))

    def _check_in_time(self, visitor: Visitor, now_s: float) -> None:
        queue = self.queue
        ahead = queue.tokens_ahead(visitor.ticket.tenant, priority=visitor.priority) if queue.length else 0
        wait_s = self.pace.wait_s(ahead, now_s=now_s) or 0.0
        late_s = now_s + wait_s - self._start_by_s(visitor)
        if late_s > 0.0:
            words = f"{_IN_TIME}: {ahead} tokens stand before it, which takes about {wait_s:.1f} s"
            raise Overloaded(words, retry_after_s=self._come_back_in_s(late_s, self._cost(visitor), now_s))

    def _come_back_in_s(self, late_s: float, cost: int, now_s: float) -> int:
        """After all whom we have sent away before it: they come back as well, and would be in one another's way."""
        free_s = min(max(self._promised_s, now_s + late_s), now_s + RETRY_AFTER_S_MAX)
        self._promised_s = free_s + (self.pace.wait_s(cost, now_s=now_s) or 0.0)
        return whole_seconds(free_s - now_s)

    def _made_way(self, now_s: float) -> QueueFull:
        error = QueueFull("the queue is full, and most of what waits in it is yours")
        error.retry_after_s = self.retry_after_s(now_s=now_s)
        return error

    def come_back(self, item: Item, visitor: Visitor, cost: int, *, now_s: float) -> Waiting[Item]:
        """Its dispatch came to nothing: it waits again, before all that have not begun; it has paid the cost."""
        waiting = Waiting(
            item=item,
            tenant=visitor.ticket.tenant,
            weight=visitor.ticket.weight,
            priority=visitor.priority,
            cost=cost,
            since_s=now_s,
            start_by_s=visitor.deadline_s,
            returned_of_s=visitor.arrived_s,
        )
        self.queue.put_back(waiting)
        return waiting

    def first(self, *, now_s: float) -> Waiting[Item] | None:
        """Who is served next; whoever is too late by now was told."""
        if not self.queue.length:
            return None
        for late in self.queue.late(now_s=now_s):
            words = f"{_IN_TIME}: waited {now_s - late.since_s:.1f} s in the queue"
            self._turn_away(late.item, Overloaded(words, retry_after_s=self.retry_after_s(now_s=now_s)))
        return self.queue.first()

    def take(self, waiting: Waiting[Item], *, now_s: float) -> None:
        """The first one is being dispatched."""
        self.queue.take(waiting)
        self.pace.departed(cost=waiting.cost, since_s=waiting.since_s, now_s=now_s)

    def over(self, visitor: Visitor, cost: int, story: RequestStory) -> None:
        """It has ended, in whatever way. cost: that it had when it was dispatched; 0: it never was."""
        attempts = story.attempts
        if not cost or not attempts:
            return
        if self.queue.length:
            num_tokens = story.num_prompt_tokens - story.num_cached_tokens + story.num_tokens
            self.queue.settle(visitor.ticket.tenant, visitor.priority, more=num_tokens - cost)
        first_token_s = story.first_token_s
        if first_token_s is None or len(attempts) > 1 or story.life.phase not in _DONE:
            return  # Those that ran out of time count as well, or only short ones would.
        self.times.ended(
            num_prompt=story.num_prompt_tokens,
            num_tokens=story.num_tokens,
            ttft_s=first_token_s - attempts[0].began_s,
            tpot_s=story.tpot_s,
        )

    def retry_after_s(self, *, now_s: float) -> int:
        """Whole seconds until all who wait now are served; at least 1."""
        return self.pace.retry_after_s(self.queue.num_tokens, now_s=now_s)
