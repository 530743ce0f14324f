from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter

import pytest

from disaggregated.errors import QueueFull
from orchestrator.admission.request_queue import RequestQueue
from orchestrator.admission.tenant_turns import QUANTUM_TOKENS, Item, Waiting


def put(
    queue: RequestQueue[str],
    item: str,
    *,
    tenant: str = "",
    priority: int = 0,
    cost: int = 1,
    start_by_s: float = 100.0,
) -> Waiting[str]:
    waiting = Waiting(item=item, tenant=tenant, priority=priority, cost=cost, since_s=0.0, start_by_s=start_by_s)
    queue.put(waiting)
    return waiting


def put_back(queue: RequestQueue[Item], taken: Waiting[Item]) -> Waiting[Item]:
    """Its dispatch came to nothing."""
    again = dataclasses.replace(taken, is_gone=False, since_s=1.0, returned_of_s=float(taken.arrival))
    queue.put_back(again)
    return again


def settle(queue: RequestQueue[Item], taken: Waiting[Item], *, num_tokens: int) -> None:
    queue.settle(taken.tenant, taken.priority, more=num_tokens - taken.cost)


def drained(queue: RequestQueue[str]) -> str:
    order = ""
    while (first := queue.first()) is not None:
        assert queue.first() is first, "asking again changes nothing"
        queue.take(first)
        queue.check_integrity()
        order += first.item
    return order


def test_priority_goes_first_and_then_arrival() -> None:
    queue: RequestQueue[str] = RequestQueue(10)
    for item, priority in zip("abcde", (0, 5, 0, -1, 5), strict=True):
        put(queue, item, priority=priority)
    assert drained(queue) == "dacbe"


def test_tenants_take_turns_by_tokens_and_not_by_requests() -> None:
    queue: RequestQueue[str] = RequestQueue(100)
    for _ in range(4):
        put(queue, "L", tenant="long", cost=2 * QUANTUM_TOKENS)
    for _ in range(16):
        put(queue, "s", tenant="short", cost=QUANTUM_TOKENS // 2)
    order = drained(queue)
    assert order.count("s", 0, order.index("L", order.index("L") + 1)) == pytest.approx(6, abs=2)
    assert order.rindex("L") > 15, "the long ones are spread among the short ones"


def test_a_flood_of_one_tenants_does_not_keep_another_waiting() -> None:
    queue: RequestQueue[str] = RequestQueue(1000)
    for _ in range(500):
        put(queue, "f", tenant="flood", cost=100)
    put(queue, "x", tenant="other", cost=100)
    assert drained(queue).index("x") <= QUANTUM_TOKENS // 100 + 1


def test_a_tenant_of_twice_the_weight_is_served_twice_the_tokens() -> None:
    queue: RequestQueue[str] = RequestQueue(1000)
    for item, weight in (("h", 2.0), ("l", 1.0)):
        for _ in range(300):
            each = Waiting(item=item, tenant=item, weight=weight, cost=500, since_s=0.0, start_by_s=1.0)
            queue.put(each)
    counts = Counter(drained(queue)[:300])
    assert counts["h"] == pytest.approx(200, abs=10)


def test_a_prompt_of_a_million_tokens_is_chosen_at_once_and_not_after_a_million_turns() -> None:
    queue: RequestQueue[str] = RequestQueue(10)
    put(queue, "a", tenant="a", cost=10**9)
    put(queue, "b", tenant="b", cost=10**9 + 1)
    assert drained(queue) == "ab"


def test_a_full_queue_refuses_the_newcomer_and_says_the_limit() -> None:
    queue: RequestQueue[str] = RequestQueue(2)
    put(queue, "a")
    put(queue, "b")
    assert queue.who_makes_way("", priority=-9) is None
    with pytest.raises(QueueFull, match="2 requests are waiting, the limit is 2"):
        put(queue, "c", priority=-9)
    assert drained(queue) == "ab"


def test_one_tenants_limit_is_told_to_it_alone() -> None:
    queue: RequestQueue[str] = RequestQueue(10, tenant_depth_max=2)
    put(queue, "a", tenant="t")
    put(queue, "b", tenant="t")
    with pytest.raises(QueueFull, match="2 of your requests wait already"):
        put(queue, "c", tenant="t")
    put(queue, "d", tenant="u")
    assert queue.num_waiting_of("t") == 2


def test_in_a_full_queue_the_last_of_whoever_has_most_makes_way_for_somebody_with_less() -> None:
    queue: RequestQueue[str] = RequestQueue(4)
    for item in "abcd":
        put(queue, item, tenant="flood")
    loser = queue.who_makes_way("other", priority=0)
    assert loser is not None
    assert loser.item == "d"
    queue.remove(loser)
    put(queue, "x", tenant="other")
    assert queue.who_makes_way("other", priority=0) is not None, "three to one"
    assert queue.who_makes_way("flood", priority=0) is None, "it would take its own place"
    queue.remove(queue.who_makes_way("other", priority=0) or loser)
    put(queue, "y", tenant="other")
    assert queue.who_makes_way("other", priority=0) is None, "two to two"
    assert sorted(drained(queue)) == ["a", "b", "x", "y"]


def test_nobody_of_a_better_priority_makes_way() -> None:
    queue: RequestQueue[str] = RequestQueue(3)
    for item in "abc":
        put(queue, item, tenant="flood", priority=-1)
    assert queue.who_makes_way("other", priority=0) is None
    assert queue.who_makes_way("other", priority=-1) is not None


def test_what_is_put_back_goes_before_all_that_have_not_begun_and_is_never_refused() -> None:
    queue: RequestQueue[str] = RequestQueue(2)
    first = put(queue, "a", tenant="t")
    queue.take(first)
    put(queue, "b", tenant="u")
    put(queue, "c", tenant="v")
    put_back(queue, first)
    assert len(queue) == 3
    assert drained(queue) == "abc"


def test_of_two_that_were_put_back_the_earlier_arrival_goes_first() -> None:
    queue: RequestQueue[str] = RequestQueue(4)
    taken = [put(queue, item) for item in "ab"]
    for each in taken:
        queue.take(each)
    for each in reversed(taken):
        put_back(queue, each)
    assert drained(queue) == "ab"


def test_whoever_is_late_is_named_once_and_never_started() -> None:
    queue: RequestQueue[str] = RequestQueue(10)
    put(queue, "a", start_by_s=1.0)
    put(queue, "b", start_by_s=9.0)
    assert queue.late(now_s=0.9) == []
    assert [late.item for late in queue.late(now_s=1.0)] == ["a"]
    assert queue.late(now_s=1.0) == []
    assert drained(queue) == "b"
    assert len(queue) == 0


def test_who_leaves_before_his_turn_is_skipped_and_may_leave_twice() -> None:
    queue: RequestQueue[str] = RequestQueue(10)
    entries = [put(queue, item) for item in "abc"]
    queue.remove(entries[1])
    queue.remove(entries[1])
    queue.check_integrity()
    assert drained(queue) == "ac"


def test_those_who_left_do_not_pile_up() -> None:
    queue: RequestQueue[str] = RequestQueue(10)
    put(queue, "x")
    for number in range(10_000):
        queue.remove(put(queue, "y", tenant=str(number), priority=number))
    assert len(queue._by_start) < 200
    assert len(queue._turns) == 1
    assert len(queue._debts) == 0
    assert queue.num_tenants == 1


def test_a_tenant_whose_answers_were_longer_than_thought_makes_up_for_it() -> None:
    queue: RequestQueue[str] = RequestQueue(100)
    for item in "ab":
        for _ in range(20):
            put(queue, item, tenant=item, cost=QUANTUM_TOKENS)
    first = queue.first()
    assert first is not None
    queue.take(first)
    settle(queue, first, num_tokens=6 * QUANTUM_TOKENS)
    order = drained(queue)[:6]
    assert order.count(first.item) <= 1, "the other one is served meanwhile"


def test_a_debt_outlives_the_line_and_ends_when_nobody_waits() -> None:
    queue: RequestQueue[str] = RequestQueue(100)
    greedy = put(queue, "g", tenant="greedy", cost=1)
    for _ in range(30):
        put(queue, "o", tenant="other", cost=QUANTUM_TOKENS)
    while (first := queue.first()) is not greedy:
        assert first is not None
        queue.take(first)
    queue.take(greedy)
    settle(queue, greedy, num_tokens=8 * QUANTUM_TOKENS)
    put(queue, "g", tenant="greedy", cost=1)
    assert drained(queue).index("g") >= 7
    put(queue, "z", tenant="other")
    put(queue, "g", tenant="greedy", cost=1)
    assert drained(queue) == "zg"


def test_what_a_newcomer_has_to_wait_for_is_no_more_than_its_share() -> None:
    queue: RequestQueue[str] = RequestQueue(1000)
    for _ in range(100):
        put(queue, "f", tenant="flood", cost=1000)
    put(queue, "p", tenant="first", cost=70, priority=-1)
    assert queue.tokens_ahead("flood", priority=0) == 100_070
    assert queue.tokens_ahead("other", priority=0) == QUANTUM_TOKENS + 70
    assert queue.tokens_ahead("other", priority=-1) == 70
    assert queue.num_tokens == 100_070


@pytest.mark.parametrize("seed", range(60))
def test_no_entry_is_lost_or_served_twice(seed: int) -> None:
    chance = random.Random(seed)
    queue: RequestQueue[int] = RequestQueue(20)
    waiting: dict[int, Waiting[int]] = {}
    for number in range(300):
        match chance.randrange(5):
            case 0 | 1 if len(queue) < 20:
                waiting[number] = each = Waiting(
                    item=number, tenant=chance.choice("abc"), priority=chance.randrange(3), since_s=0.0,
                    cost=chance.choice([1, 100, 5000]), start_by_s=number + chance.choice([5, 1e9]),
                )  # fmt: skip
                queue.put(each)
            case 2 if waiting:
                queue.remove(waiting.pop(chance.choice(list(waiting))))
            case 3 if (first := queue.first()) is not None:
                queue.take(first)
                assert first.priority == min(each.priority for each in waiting.values())
                gone = waiting.pop(first.item)
                if chance.random() < 0.3:
                    waiting[first.item] = put_back(queue, gone)
                else:
                    settle(queue, gone, num_tokens=chance.choice([1, 100, 20_000]))
            case 4:
                for late in queue.late(now_s=number):
                    assert waiting.pop(late.item).start_by_s <= number
        queue.check_integrity()
        assert len(queue) == len(waiting)


@pytest.mark.parametrize("seed", range(40))
def test_two_who_both_wait_are_never_served_a_turn_and_a_request_apart(seed: int) -> None:
    """Deficit round robin's own bound, for whatever lengths and weights."""
    chance = random.Random(seed)
    queue: RequestQueue[str] = RequestQueue(10_000)
    weights = {tenant: chance.choice([0.5, 1.0, 3.0]) for tenant in "abc"}
    cost_max = chance.choice([10, 3000, 50_000])
    for tenant, weight in weights.items():
        for _ in range(400):
            cost = chance.randint(1, cost_max)
            queue.put(Waiting(item=tenant, tenant=tenant, weight=weight, cost=cost, since_s=0.0, start_by_s=math.inf))
    served = dict.fromkeys(weights, 0)
    while all(queue.num_waiting_of(tenant) for tenant in weights):
        first = queue.first()
        assert first is not None
        queue.take(first)
        served[first.tenant] += first.cost
        shares = [served[tenant] / weight for tenant, weight in weights.items()]
        assert max(shares) - min(shares) <= 2 * QUANTUM_TOKENS + cost_max * (1 / min(weights.values()) + 1)


@pytest.mark.parametrize("seed", range(60))
def test_whoever_is_alone_is_served_as_if_it_stood_in_a_line(seed: int) -> None:
    """Two queues live through the same, and in one of them everybody is made to stand in line at once."""
    chance = random.Random(seed)
    queues: list[RequestQueue[int]] = [RequestQueue(6), RequestQueue(6)]
    waiting: list[dict[int, Waiting[int]]] = [{}, {}]
    for number in range(200):
        what, tenant, priority = chance.randrange(4), chance.choice("abc"), chance.randrange(2)
        cost, comes_back = chance.choice([1, 100, 5000]), chance.random() < 0.2
        firsts = [queue.first() for queue in queues] if chance.random() < 0.7 or what == 3 else [None, None]
        assert len({first and first.item for first in firsts}) == 1
        for queue, there, first in zip(queues, waiting, firsts, strict=True):
            if what < 2 and len(queue) < 6:
                there[number] = put_one = Waiting(
                    item=number, tenant=tenant, priority=priority, since_s=0.0, cost=cost, start_by_s=number + 40.0
                )
                queue.put(put_one)
            elif what == 2:
                assert all(there.pop(late.item) for late in queue.late(now_s=number))
            elif first is not None:
                queue.take(first)
                gone = there.pop(first.item)
                if comes_back:
                    there[first.item] = put_back(queue, gone)
                else:
                    settle(queue, gone, num_tokens=3 * cost)
        queues[1].num_waiting_of(tenant)
        assert waiting[0].keys() == waiting[1].keys()
        assert len(queues[0]) == len(queues[1])
        assert queues[0].num_tokens == queues[1].num_tokens
        for queue in queues:
            queue.check_integrity()
