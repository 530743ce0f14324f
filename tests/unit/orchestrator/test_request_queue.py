from __future__ import annotations

import random

import pytest

from disaggregated.errors import QueueFull
from orchestrator.request_queue import RETRY_AFTER_S_MAX, RequestQueue, Waiting


def put(queue: RequestQueue[str], item: str, *, priority: int = 0, deadline_s: float = 100.0) -> Waiting[str]:
    return queue.put(item, priority=priority, deadline_s=deadline_s)


def drained(queue: RequestQueue[str], now_s: float = 0.0) -> str:
    order = ""
    while (first := queue.first(now_s=now_s)) is not None:
        queue.take(first, now_s=now_s)
        queue.check_integrity()
        order += first.item
    return order


def test_priority_goes_first_and_then_arrival() -> None:
    queue: RequestQueue[str] = RequestQueue(10)
    for item, priority in zip("abcde", (0, 5, 0, -1, 5), strict=True):
        put(queue, item, priority=priority)
    assert drained(queue) == "dacbe"


def test_a_full_queue_refuses_the_newcomer_and_says_the_limit() -> None:
    queue: RequestQueue[str] = RequestQueue(2)
    put(queue, "a")
    put(queue, "b")
    with pytest.raises(QueueFull, match="2 requests are waiting, the limit is 2"):
        put(queue, "c", priority=-9)
    assert drained(queue) == "ab"


def test_what_is_put_back_keeps_its_place_and_is_never_refused() -> None:
    queue: RequestQueue[str] = RequestQueue(2)
    first = put(queue, "a")
    queue.take(first, now_s=0.0)
    put(queue, "b")
    put(queue, "c")
    queue.put_back(first)
    assert len(queue) == 3
    assert drained(queue) == "abc"


def test_nothing_past_its_deadline_is_started() -> None:
    queue: RequestQueue[str] = RequestQueue(10)
    put(queue, "a", deadline_s=1.0)
    put(queue, "b", deadline_s=9.0)
    assert drained(queue, now_s=1.0) == "b"
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
    for _ in range(10_000):
        queue.remove(put(queue, "y"))
    assert len(queue._heap) < 200


def test_retry_after_follows_the_pace_of_late() -> None:
    queue: RequestQueue[str] = RequestQueue(1000)
    assert queue.retry_after_s(now_s=0.0) == 1
    for second in range(10):
        queue.take(put(queue, "x"), now_s=float(second))
    for _ in range(30):
        put(queue, "y")
    assert queue.retry_after_s(now_s=10.0) == 30
    assert queue.retry_after_s(now_s=10_000.0) == RETRY_AFTER_S_MAX


@pytest.mark.parametrize("seed", range(50))
def test_no_entry_is_lost_or_served_twice(seed: int) -> None:
    chance = random.Random(seed)
    queue: RequestQueue[int] = RequestQueue(20)
    waiting: dict[int, Waiting[int]] = {}
    taken: list[Waiting[int]] = []
    for number in range(300):
        match chance.randrange(4):
            case 0 | 1 if len(queue) < 20:
                waiting[number] = queue.put(number, priority=chance.randrange(3), deadline_s=1e9)
            case 2 if waiting:
                queue.remove(waiting.pop(chance.choice(list(waiting))))
            case 3 if (first := queue.first(now_s=0.0)) is not None:
                queue.take(first, now_s=0.0)
                best = min(waiting.values())
                assert first is best
                taken.append(waiting.pop(first.item))
                if chance.random() < 0.3:
                    again = queue.put_back(taken.pop())
                    waiting[again.item] = again
        queue.check_integrity()
        assert len(queue) == len(waiting)
