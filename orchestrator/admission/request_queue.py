"""The one place where requests wait. Pure: no clock, no I/O.

who was begun already     before everybody else of its priority: a stream that its client is reading stands still
priority                  a lower number first
tenant                    in turns, by tokens (tenant_turns.py)
arrival                   within one tenant

A request that comes back because its server was lost is never refused: it was admitted once. A newcomer is refused when
the queue is full, unless somebody else has many more in it: then that one's last request makes way. So a flood of one
tenant's never shuts the others out.

Most requests come when nobody waits, and are dispatched at once. For them there are no lines and no turns: whoever is
alone stands in no line until a second one comes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import Final, Generic

from disaggregated.errors import QueueFull
from orchestrator.admission.tenant_turns import QUANTUM_TOKENS, Item, TenantTurns, Waiting

_DEBTORS_MAX: Final = 4096
"""Tenants who owe tokens and do not wait now; of more the oldest debt is forgiven."""


class RequestQueue(Generic[Item]):
    """Invariant: `len(queue)` is the number of places that are not gone, and at most `depth_max` except for what was
    put back; `num_waiting_of` counts the same, by tenant. Whoever is alone in it stands in no line, and nobody owes
    anything while the queue was empty.
    """

    def __init__(self, depth_max: int, *, tenant_depth_max: int = 0) -> None:
        """tenant_depth_max: of one tenant; 0: as many as there is room for."""
        self.depth_max = depth_max
        self.tenant_depth_max = tenant_depth_max or depth_max
        self._alone: Waiting[Item] | None = None
        self._alone_has_turn = False
        self._turns: dict[int, TenantTurns[Item]] = {}
        self._returned: list[tuple[int, float, int, Waiting[Item]]] = []
        """By priority and by when they first came."""
        self._by_start: list[tuple[float, int, Waiting[Item]]] = []
        self._counts: Counter[str] = Counter()
        self._debts: dict[tuple[int, str], float] = {}
        self._arrivals = itertools.count()
        self.length = 0
        """As `len`: asked for each request."""
        self._num_tokens = 0

    def __len__(self) -> int:
        return self.length

    def num_waiting_of(self, tenant: str) -> int:
        self._line_up()
        return self._counts[tenant]

    @property
    def num_tenants(self) -> int:
        self._line_up()
        return len(self._counts)

    @property
    def num_tokens(self) -> int:
        """That all who wait are expected to cost."""
        return self._num_tokens

    # In.

    def put(self, newcomer: Waiting[Item]) -> None:
        """Stand at the end of the tenant's line. Ask `who_makes_way()` before.

        Raises:
            QueueFull: too many wait already, of this tenant or in all.
        """
        tenant = newcomer.tenant
        if self.length >= self.depth_max:
            raise QueueFull(f"{self.length} requests are waiting, the limit is {self.depth_max}")
        if not self.length:
            newcomer.arrival = next(self._arrivals)
            self._alone, self._alone_has_turn = newcomer, False
            self.length, self._num_tokens = 1, newcomer.cost
            return
        self._line_up()
        if self._counts[tenant] >= self.tenant_depth_max:
            raise QueueFull(f"{self._counts[tenant]} of your requests wait already, that is the limit")
        newcomer.arrival = next(self._arrivals)
        self._stand_in_line(newcomer)

    def _line_up(self) -> None:
        """Whoever was alone until now, and was said to be the first, has its turn and keeps it."""
        if self._alone is None:
            return
        alone, self._alone = self._alone, None
        self.length = self._num_tokens = 0
        self._stand_in_line(alone)
        if self._alone_has_turn:
            self._turns[alone.priority].first()

    def _stand_in_line(self, newcomer: Waiting[Item]) -> None:
        turns = self._turns.get(newcomer.priority)
        if turns is None:
            turns = self._turns[newcomer.priority] = TenantTurns()
        turns.push(newcomer, debt=self._debts.pop((newcomer.priority, newcomer.tenant), 0.0))
        self._entered(newcomer)

    def put_back(self, again: Waiting[Item]) -> None:
        """A request whose dispatch came to nothing waits again, before all that have not begun; it is paid for."""
        assert again.returned_of_s is not None, "nobody knows when it came"
        self._line_up()
        again.arrival = next(self._arrivals)
        heapq.heappush(self._returned, (again.priority, again.returned_of_s, again.arrival, again))
        self._entered(again)

    def _entered(self, waiting: Waiting[Item]) -> None:
        heapq.heappush(self._by_start, (waiting.start_by_s, waiting.arrival, waiting))
        self.length += 1
        self._num_tokens += waiting.cost
        self._counts[waiting.tenant] += 1

    def who_makes_way(self, tenant: str, *, priority: int) -> Waiting[Item] | None:
        """For a newcomer of `tenant`, when the queue is full: the last one of whoever has most in it, if that tenant
        keeps more than the newcomer's has even so, and it has no better priority. The caller removes and tells it."""
        if self.length < self.depth_max or not self.length:
            return None
        self._line_up()
        longest, count = self._counts.most_common(1)[0]
        if count <= self._counts[tenant] + 1:
            return None
        worst = max((each for each, turns in self._turns.items() if longest in turns.lines), default=None)
        if worst is None or worst < priority:
            return None
        return self._turns[worst].lines[longest].last()

    # Out.

    def first(self) -> Waiting[Item] | None:
        """Who is served next; it stays. Look at `late()` before."""
        if self._alone is not None or not self.length:
            self._alone_has_turn = True
            return self._alone
        while self._returned and self._returned[0][3].is_gone:
            heapq.heappop(self._returned)
        best = min(self._turns, default=None)
        if self._returned and (best is None or self._returned[0][0] <= best):
            return self._returned[0][3]
        if best is None:
            return None
        return self._turns[best].first()

    def late(self, *, now_s: float) -> list[Waiting[Item]]:
        """Those for whom it is too late to be started. They wait no longer; the caller tells them."""
        alone = self._alone
        if alone is not None:
            if alone.start_by_s > now_s:
                return []
            self.remove(alone)
            return [alone]
        late = []
        while self._by_start and (self._by_start[0][0] <= now_s or self._by_start[0][2].is_gone):
            waiting = heapq.heappop(self._by_start)[2]
            if not waiting.is_gone:
                self.remove(waiting)
                late.append(waiting)
        return late

    def take(self, waiting: Waiting[Item]) -> None:
        """The first one is being dispatched, and its tenant pays what it is expected to cost."""
        if waiting.returned_of_s is None and waiting is not self._alone:
            self._turns[waiting.priority].lines[waiting.tenant].deficit -= waiting.cost
        self.remove(waiting)

    def remove(self, waiting: Waiting[Item]) -> None:
        """It no longer waits. Idempotent."""
        if waiting.is_gone:
            return
        waiting.is_gone = True
        if waiting is self._alone:
            self._alone, self.length, self._num_tokens = None, 0, 0
            return
        self.length -= 1
        self._num_tokens -= waiting.cost
        self._counts[waiting.tenant] -= 1
        if not self._counts[waiting.tenant]:
            del self._counts[waiting.tenant]
        if waiting.returned_of_s is None:
            self._left_its_line(waiting)
        if not self.length:
            self._debts.clear()  # Nobody was kept waiting by whoever took more than was thought.
        if len(self._by_start) > 2 * self.length + 64:
            self._by_start = [entry for entry in self._by_start if not entry[2].is_gone]
            heapq.heapify(self._by_start)

    def _left_its_line(self, waiting: Waiting[Item]) -> None:
        turns = self._turns[waiting.priority]
        self._owes(waiting.priority, waiting.tenant, turns.left(waiting))
        if not len(turns):
            del self._turns[waiting.priority]

    # Afterwards.

    def settle(self, tenant: str, priority: int, *, more: int) -> None:
        """What was taken has cost so many tokens more in the end than was paid; fewer, if negative."""
        turns = self._turns.get(priority)
        line = turns.lines.get(tenant) if turns is not None else None
        if line is not None:
            line.deficit -= more
        elif self.length:
            self._owes(priority, tenant, more)

    def _owes(self, priority: int, tenant: str, tokens: float) -> None:
        debt = self._debts.pop((priority, tenant), 0.0) + tokens
        if debt > 0.0:
            self._debts[priority, tenant] = debt
        if len(self._debts) > _DEBTORS_MAX:
            del self._debts[next(iter(self._debts))]

    def tokens_ahead(self, tenant: str, *, priority: int) -> int:
        """Tokens that are served before a newcomer of `tenant` is: all of better priorities, and of its own priority
        as much of every tenant as of its own."""
        self._line_up()
        ahead = sum(each.cost for *_, each in self._returned if not each.is_gone)
        for each, turns in self._turns.items():
            if each > priority:
                continue
            own = turns.lines.get(tenant)
            limit = (own.tokens_waiting if own else 0) + QUANTUM_TOKENS
            ahead += sum(line.tokens_waiting if each < priority else min(line.tokens_waiting, limit) for line in turns)
        return ahead

    def check_integrity(self) -> None:
        if self._alone is not None:
            assert not self._alone.is_gone, "who is gone is thought to be alone here"
            assert (self.length, self._num_tokens) == (1, self._alone.cost), "whoever is alone is miscounted"
            assert not any((self._turns, self._counts, self._debts)), "whoever is alone is not"
            return
        for turns in self._turns.values():
            assert len(turns), "a priority without lines"
            turns.check_integrity()
        returned = [each for *_, each in self._returned if not each.is_gone]
        in_lines = sum(line.num_waiting for turns in self._turns.values() for line in turns)
        assert self.length == in_lines + len(returned), "a place is lost"
        in_tokens = sum(line.tokens_waiting for turns in self._turns.values() for line in turns)
        assert self._num_tokens == in_tokens + sum(each.cost for each in returned), "tokens are miscounted"
        assert self.length == self._counts.total(), "a tenant's places are miscounted"
        assert self.length == len({id(each) for *_, each in self._by_start if not each.is_gone}), "one has no deadline"
