from __future__ import annotations

import pytest

from orchestrator.admission.pace import (
    RETRY_AFTER_S_MAX,
    RETRY_AFTER_S_UNKNOWN,
    QueuePace,
    ServiceTimes,
    whole_seconds,
)


def test_the_pace_is_that_of_the_time_in_which_somebody_waited() -> None:
    pace = QueuePace()
    for second in range(10):
        pace.departed(cost=100, since_s=second - 5.0, now_s=float(second))
    for second in range(1000, 1010):
        pace.departed(cost=100, since_s=second - 5.0, now_s=float(second))
    assert pace.wait_s(1000, now_s=1009.0) == pytest.approx((10 * 1.0 + 8 + 2 * 5.0) / 20 * 10, rel=0.2)


def test_what_was_placed_as_it_came_says_nothing_about_the_pace() -> None:
    pace = QueuePace()
    for second in range(100):
        pace.departed(cost=100, since_s=float(second), now_s=float(second))
    assert pace.wait_s(100, now_s=100.0) is None
    assert pace.retry_after_s(100, now_s=100.0) == RETRY_AFTER_S_UNKNOWN


def test_one_short_request_that_waited_for_a_server_to_come_back_is_no_pace() -> None:
    pace = QueuePace()
    for second in range(7):
        pace.departed(cost=1, since_s=0.0, now_s=3.0 + second)
        assert pace.wait_s(400, now_s=3.0 + second) is None
    pace.departed(cost=400, since_s=0.0, now_s=10.5)
    assert pace.wait_s(400, now_s=10.5) == pytest.approx(400 * 10.5 / 407)


def test_with_nobody_ahead_there_is_nothing_to_wait_for() -> None:
    pace = QueuePace()
    assert pace.wait_s(0, now_s=0.0) == 0.0
    assert pace.retry_after_s(0, now_s=0.0) == 1


def test_a_standstill_makes_the_wait_longer_while_it_lasts() -> None:
    pace = QueuePace()
    for second in range(1, 11):
        pace.departed(cost=100, since_s=0.0, now_s=float(second))
    waits_s = [pace.wait_s(100, now_s=now_s) for now_s in (10.0, 11.0, 20.0, 40.0)]
    assert waits_s[0] == waits_s[1] == pytest.approx(1.0)
    assert waits_s[2] == pytest.approx(1.9)
    assert waits_s[3] == pytest.approx(3.9)


def test_retry_after_is_rounded_up_and_never_longer_than_a_client_waits() -> None:
    assert [whole_seconds(each) for each in (0.0, 0.2, 1.0, 1.01, 1e9)] == [1, 1, 1, 2, RETRY_AFTER_S_MAX]


def test_nothing_is_foretold_from_a_few_requests() -> None:
    times = ServiceTimes()
    for _ in range(7):
        times.ended(num_prompt=10, num_tokens=10, ttft_s=1.0, tpot_s=0.1)
    assert (times.ttft_s(10), times.total_s(10, 100)) == (0.0, 0.0)
    times.ended(num_prompt=10, num_tokens=10, ttft_s=1.0, tpot_s=0.1)
    assert times.ttft_s(10) == 1.0
    assert times.total_s(10, 100) == pytest.approx(1.9), "answers have ten tokens, not a hundred"
    assert times.total_s(10, 3) == pytest.approx(1.2)


def test_a_longer_prompt_is_thought_to_take_longer_and_a_shorter_one_is_not_promised_more() -> None:
    times = ServiceTimes()
    for _ in range(8):
        times.ended(num_prompt=100, num_tokens=1, ttft_s=0.5, tpot_s=None)
    assert times.ttft_s(1000) == pytest.approx(5.0)
    assert times.ttft_s(1) == pytest.approx(0.5)
    assert times.num_tokens(2**31 - 1) == 1


def test_estimates_are_careful_but_do_not_follow_one_that_was_stuck() -> None:
    times = ServiceTimes()
    for number in range(64):
        times.ended(num_prompt=10, num_tokens=2, ttft_s=100.0 if number == 5 else 0.01 * number, tpot_s=0.1)
    assert 0.5 < times.ttft_s(10) < 0.64
