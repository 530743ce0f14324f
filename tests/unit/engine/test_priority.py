"""Who goes first, and why nobody waits for ever."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from disaggregated.engine.api import EngineRequest, RequestKind
from disaggregated.engine.ranked_queue import RankedQueue
from disaggregated.engine.sequence import PRIORITY_STEP_S, Sequence
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.engine_driver import EngineDriver


def started(driver: EngineDriver) -> list[str]:
    """Request ids in the order of their first rows."""
    return list(dict.fromkeys(row[0] for batch in driver.runner.batches for row in batch))


def test_a_lower_priority_value_starts_first_and_equals_start_as_they_came() -> None:
    driver = EngineDriver(max_batch_size=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)):
        driver.submit(name, [1, 2], max_tokens=2, priority=priority)
    driver.run()
    assert started(driver) == ["d", "b", "e", "a", "c"]
    assert all(driver.tokens[name] == driver.alone(name) for name in "abcde")


def test_a_better_prompt_is_computed_before_one_that_is_under_way() -> None:
    driver = EngineDriver(max_num_tokens=8)
    driver.submit("long", range(30), max_tokens=1)
    driver.step()
    driver.submit("urgent", range(40, 46), max_tokens=1, priority=-1)
    driver.submit("patient", range(50, 56), max_tokens=1, priority=1)
    driver.step()
    assert driver.rows == [("urgent", 0, 6), ("long", 8, 2)]
    driver.run()
    assert started(driver) == ["long", "urgent", "patient"]


def test_nobody_who_runs_is_stopped_for_a_better_one_that_comes() -> None:
    driver = EngineDriver(max_batch_size=1)
    driver.submit("running", [1], max_tokens=5)
    driver.step()
    driver.submit("urgent", [2], max_tokens=1, priority=-5)
    driver.run()
    assert driver.engine.statistics().preemptions_total == 0
    assert [row[0] for batch in driver.runner.batches for row in batch] == [*["running"] * 5, "urgent"]


def test_when_blocks_run_out_the_worst_priority_is_preempted_not_the_youngest() -> None:
    driver = EngineDriver(num_blocks=6, block_size=2, max_num_tokens=8, enable_block_reuse=False)
    driver.submit("unimportant", [1, 2], max_tokens=9, priority=1)
    driver.submit("important", [3, 4], max_tokens=9)
    driver.run()
    assert driver.engine.statistics().preemptions_total > 0
    rows = [row for batch in driver.runner.batches for row in batch if row[0] == "important"]
    assert rows == [("important", 0, 2), *(("important", position, 1) for position in range(2, 10))]
    assert driver.tokens["unimportant"] == driver.alone("unimportant")


def test_a_step_of_priority_is_worth_a_fixed_time_of_waiting() -> None:
    now_s = 0.0
    driver = EngineDriver(max_batch_size=1, clock=lambda: now_s)
    driver.submit("busy", [9], max_tokens=3)
    driver.step()
    driver.submit("patient", [1], max_tokens=1, priority=1)
    now_s = PRIORITY_STEP_S - 1
    driver.submit("in time", [2], max_tokens=1)
    now_s = PRIORITY_STEP_S + 1
    driver.submit("too late", [3], max_tokens=1)
    driver.run()
    assert started(driver) == ["busy", "in time", "patient", "too late"]


def test_a_stream_of_urgent_requests_does_not_keep_one_waiting_for_ever() -> None:
    now_s = 0.0
    driver = EngineDriver(max_batch_size=1, clock=lambda: now_s)
    driver.submit("patient", [1], max_tokens=1, priority=3)
    for number in range(200):
        driver.submit(f"urgent-{number}", [2], max_tokens=1)
        now_s += 1.0
        driver.step()
        if "patient" in driver.finish_reasons:
            break
    assert 3 * PRIORITY_STEP_S - 2 <= now_s <= 3 * PRIORITY_STEP_S + 2


def test_a_new_head_of_the_queue_is_tried_though_the_old_one_found_no_room() -> None:
    driver = EngineDriver(num_blocks=4, block_size=4, max_num_tokens=16)
    reservation = driver.reserve("remote", range(8))
    driver.submit("large", range(12), max_tokens=1)
    driver.step()
    assert driver.step() == []
    driver.submit("small", [1, 2], max_tokens=1, priority=-1)
    driver.step()
    assert driver.tokens["small"] == driver.alone("small")
    driver.land(reservation)
    driver.run()
    assert driver.tokens["large"] == driver.alone("large")


def sequence_of(arrival: int, priority: int) -> Sequence:
    request = EngineRequest(
        request_id=f"r{arrival}",
        kind=RequestKind.FULL,
        token_ids=[1],
        sampling=SamplingParams(max_tokens=1),
        priority=priority,
    )
    return Sequence(request, arrival=arrival, num_tokens_max=9, arrived_s=float(arrival))


@given(st.lists(st.tuples(st.booleans(), st.integers(-2, 2)), max_size=40), st.integers(0, 99))
def test_the_queue_is_always_sorted_whoever_comes_and_leaves(moves: list[tuple[bool, int]], seed: int) -> None:
    draw, queue = random.Random(seed), RankedQueue()
    model: list[Sequence] = []
    for arrival, (comes, priority) in enumerate(moves):
        if comes or not model:
            model.append(sequence_of(arrival, priority))
            queue.add(model[-1])
        else:
            queue.remove(model.pop(draw.randrange(len(model))))
        model.sort(key=lambda sequence: sequence.rank)
        queue.check_integrity()
        assert list(queue) == model
        assert list(reversed(queue)) == model[::-1]
        assert queue.first is (model[0] if model else None)
    stranger = sequence_of(10_000, 0)
    queue.discard(stranger)
    assert stranger not in queue
    assert len(queue) == len(model)
