from __future__ import annotations

from typing import Any

import pytest

from disaggregated.errors import DisaggregatedError, Overloaded, QueueFull
from disaggregated.request_life import Phase, RequestLife
from disaggregated.sampling_params import SamplingParams
from orchestrator.admission.tenant_turns import Waiting
from orchestrator.admission.ticket import Objectives, Ticket
from orchestrator.admission.waiting_room import Visitor, WaitingRoom
from orchestrator.request_run import TokenRequest
from orchestrator.story import AttemptStory, RequestStory


class Room:
    """A waiting room with a clock in our hands, before servers that take a request of 100 tokens each second."""

    def __init__(self, depth_max: int = 100, **limits: Any) -> None:
        self.now_s = 0.0
        self.turned_away: list[tuple[str, DisaggregatedError]] = []
        self._visitors: dict[str, Visitor] = {}
        self.room: WaitingRoom[str] = WaitingRoom(depth_max, turn_away=self._turn_away, **limits)

    def _turn_away(self, item: str, error: DisaggregatedError) -> None:
        self.turned_away.append((item, error))

    def enter(self, item: str, *, timeout_s: float = 1000.0, is_idle: bool = False, **ticket: Any) -> Waiting[str]:
        visitor = self.visitor(timeout_s=timeout_s, **ticket)
        waiting = self.room.enter(item, visitor, now_s=self.now_s, is_idle=is_idle)
        self._visitors[item] = visitor
        return waiting

    def visitor(self, *, timeout_s: float = 1000.0, num_prompt: int = 99, **ticket: Any) -> Visitor:
        return TokenRequest(
            request_id="r", token_ids=[1] * num_prompt, sampling=SamplingParams(max_tokens=1), arrived_s=self.now_s,
            deadline_s=self.now_s + timeout_s, ticket=Ticket(**ticket),
        )  # fmt: skip

    def serve(self, *, story: RequestStory | None = None) -> str | None:
        """A second later there is room for one."""
        self.now_s += 1.0
        first = self.room.first(now_s=self.now_s)
        if first is None:
            return None
        self.room.take(first, now_s=self.now_s)
        if story is not None:
            self.room.over(self._visitors[first.item], first.cost, story)
        return first.item

    def warmed_up(self) -> Room:
        for number in range(10):
            self.enter(f"warm-{number}")
        while self.serve(story=ended(num_tokens=1, ttft_s=0.5)) is not None:
            pass
        return self


def ended(*, num_tokens: int, ttft_s: float, phase: Phase = Phase.FINISHED) -> RequestStory:
    life = RequestLife("r", now_s=0.0)
    life.phase = phase
    story = RequestStory(life=life, arrived_s=0.0, num_prompt_tokens=99)
    story.attempts.append(AttemptStory(context_instance="c", generation_instance="g", began_s=0.0))
    story.tokens_came(num_tokens, now_s=ttft_s)
    story.finish_reason = "length"
    return story


def test_whoever_would_be_served_too_late_is_refused_as_it_comes_and_told_by_how_much() -> None:
    room = Room().warmed_up()
    for number in range(10):
        room.enter(f"w{number}")
    room.enter("patient", timeout_s=11.0)
    with pytest.raises(Overloaded, match="1100 tokens stand before it") as caught:
        room.enter("hasty", timeout_s=8.0)
    assert caught.value.retry_after_s == 4, "three seconds too late, and half a second until its only token"


def test_those_who_are_sent_away_are_not_told_to_come_back_at_the_same_moment() -> None:
    room = Room().warmed_up()
    for number in range(10):
        room.enter(f"w{number}")
    hints = []
    for _ in range(4):
        with pytest.raises(Overloaded) as caught:
            room.enter("hasty", timeout_s=8.0)
        hints.append(caught.value.retry_after_s)
    assert hints == [3, 4, 5, 6]


def test_while_nothing_else_runs_nobody_is_refused_whatever_the_estimates_say() -> None:
    room = Room().warmed_up()
    room.enter("alone", timeout_s=0.1, is_idle=True)
    assert len(room.room.queue) == 1


def test_whoever_becomes_too_late_in_the_queue_is_told_when_it_is() -> None:
    room = Room().warmed_up()
    room.enter("first")
    room.enter("second", timeout_s=2.0, objectives=Objectives(ttft_s=1.6))
    assert room.serve() == "first"
    room.now_s += 0.2
    assert room.room.first(now_s=room.now_s) is None
    ((item, error),) = room.turned_away
    assert (item, type(error)) == ("second", Overloaded)
    assert error.retry_after_s is not None


def test_a_full_room_is_full_before_anything_is_spent_on_a_newcomer() -> None:
    room = Room(depth_max=2)
    room.enter("a", tenant="t")
    room.enter("b", tenant="t")
    with pytest.raises(QueueFull) as caught:
        room.room.check_room("t", priority=0, now_s=room.now_s)
    assert caught.value.retry_after_s is not None
    room.room.check_room("other", priority=0, now_s=room.now_s)
    room.enter("c", tenant="other")
    assert [(item, type(error)) for item, error in room.turned_away] == [("b", QueueFull)]


def test_requests_that_failed_for_want_of_time_are_learnt_from_and_cancelled_ones_are_not() -> None:
    room = Room().warmed_up()
    before_s = room.room.times.ttft_s(99)
    for phase in (Phase.CANCELLED, Phase.FAILED):
        for number in range(40):
            room.enter(f"{number}")
        for _ in range(40):
            room.serve(story=ended(num_tokens=1, ttft_s=9.0, phase=phase))
        is_learnt = room.room.times.ttft_s(99) > before_s
        assert is_learnt == (phase is Phase.FAILED)


# Whoever comes while nobody waits.


def test_while_nobody_waits_a_request_passes_and_leaves_nothing_behind() -> None:
    room = Room().warmed_up()
    visitor = room.visitor()
    assert room.room.may_pass(visitor, now_s=room.now_s, is_idle=False)
    cost = room.room.passed(visitor, now_s=room.now_s)
    assert cost == 100
    room.room.queue.check_integrity()
    assert len(room.room.queue) == 0
    room.room.over(visitor, cost, ended(num_tokens=500, ttft_s=0.5))
    assert room.room.times.num_tokens(1000) == 1, "one answer does not change what is usual"


def test_nobody_passes_while_somebody_waits() -> None:
    room = Room()
    assert room.room.may_pass(room.visitor(), now_s=0.0, is_idle=False)
    room.enter("first")
    assert not room.room.may_pass(room.visitor(), now_s=0.0, is_idle=False)


def test_whoever_cannot_be_in_time_does_not_pass_unless_nothing_else_runs() -> None:
    room = Room().warmed_up()
    hasty = room.visitor(timeout_s=0.1)
    assert room.room.may_pass(hasty, now_s=room.now_s, is_idle=True)
    with pytest.raises(Overloaded, match="0 tokens stand before it") as caught:
        room.room.may_pass(hasty, now_s=room.now_s, is_idle=False)
    assert caught.value.retry_after_s is not None


def test_whoever_passed_and_was_lost_goes_before_all_that_wait_the_earlier_comer_first() -> None:
    room = Room()
    early = room.visitor()
    room.now_s = 1.0
    late = room.visitor()
    room.enter("waiting")
    room.room.come_back("late", late, 100, now_s=2.0)
    room.room.come_back("early", early, 100, now_s=3.0)
    room.room.queue.check_integrity()
    taken = []
    while (first := room.room.first(now_s=3.0)) is not None:
        room.room.take(first, now_s=3.0)
        taken.append(first.item)
    assert taken == ["early", "late", "waiting"]


def test_what_passed_and_cost_more_is_made_up_for_while_others_wait() -> None:
    room = Room()
    greedy = room.visitor(tenant="greedy")
    cost = room.room.passed(greedy, now_s=0.0)
    for number in range(30):
        room.enter(f"other-{number}", tenant="other")
    room.room.over(greedy, cost, ended(num_tokens=2000, ttft_s=0.5))
    room.enter("greedy", tenant="greedy")
    order = [room.serve() for _ in range(31)]
    assert order.index("greedy") > 15
