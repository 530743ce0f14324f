from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from disaggregated.errors import TransferTimeout
from kvtransfer.deadline import Deadline
from kvtransfer.destination.in_flight import KEEPS_ROOM_S, InFlight
from kvtransfer.transport import ReadStop, ReadStopped


def holding(
    in_flight: InFlight,
    source: str,
    *,
    least: int = 1,
    most: int = 1 << 30,
    stop: ReadStop | None = None,
    timeout_s: float = 10.0,
) -> contextlib.AbstractContextManager[int]:
    deadline = Deadline.after(timeout_s)
    return in_flight.holding(source, least=least, most=most, stop=stop or ReadStop(), deadline=deadline)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def test_each_gets_as_much_as_it_leaves_free() -> None:
    in_flight = InFlight(800)
    with holding(in_flight, "a") as one, holding(in_flight, "b") as two, holding(in_flight, "c") as three:
        assert (one, two, three) == (400, 200, 100)
        assert in_flight.num_bytes == 700
    assert in_flight.num_bytes == 0
    assert in_flight.high_water_bytes == 700


def test_nobody_gets_more_than_asked_for() -> None:
    with holding(InFlight(800), "a", least=3, most=7) as granted:
        assert granted == 7


def test_a_second_read_of_a_source_counts_with_its_first() -> None:
    in_flight = InFlight(800)
    with holding(in_flight, "a", most=200), holding(in_flight, "a") as more:
        assert more == 200  # 400 are its own then, and 400 are left.


@pytest.mark.parametrize("budget", [1, 5, 99, 100, 150])
def test_a_budget_smaller_than_one_read_lets_one_through_at_a_time(budget: int, threads: ThreadPoolExecutor) -> None:
    in_flight = InFlight(budget)
    inside, most_inside = 0, 0
    lock = threading.Lock()

    def read(source: str) -> int:
        nonlocal inside, most_inside
        with holding(in_flight, source, least=100) as granted:
            with lock:
                inside += 1
                most_inside = max(most_inside, inside)
            with lock:
                inside -= 1
            return granted

    assert set(threads.map(read, "abcabcabcabc")) == {100}
    assert most_inside == 1
    assert in_flight.high_water_bytes == 100


def test_a_source_that_holds_nothing_is_let_through_before_one_that_holds_much(threads: ThreadPoolExecutor) -> None:
    in_flight = InFlight(100)
    with holding(in_flight, "slow", least=40, most=50):
        kept = holding(in_flight, "slow", least=40, timeout_s=20)
        again = threads.submit(kept.__enter__)
        with holding(in_flight, "fast", least=40) as granted:
            assert granted == 40
        assert not again.done()
    assert again.result(timeout=10) == 50


def test_small_reads_do_not_keep_a_large_one_out_for_ever(threads: ThreadPoolExecutor) -> None:
    in_flight = InFlight(10)
    large, later = holding(in_flight, "b", least=10), holding(in_flight, "c", least=1, most=1)
    with holding(in_flight, "a", least=1, most=1):
        entered = threads.submit(large.__enter__)
        while in_flight.num_waiting < 1:
            time.sleep(0.001)
        entered_later = threads.submit(later.__enter__)
        while in_flight.num_waiting < 2:
            time.sleep(0.001)
        assert in_flight.num_bytes == 1, "one that came later was let through first"
    assert entered.result(timeout=10) == 10
    assert not entered_later.done()
    large.__exit__(None, None, None)
    assert entered_later.result(timeout=10) == 1
    later.__exit__(None, None, None)


def test_a_large_read_that_a_stuck_one_keeps_out_holds_up_nobody_else_for_long(threads: ThreadPoolExecutor) -> None:
    in_flight, stop = InFlight(10), ReadStop()
    with holding(in_flight, "stuck", least=1, most=1):
        kept = holding(in_flight, "b", least=10, stop=stop)
        large = threads.submit(kept.__enter__)
        while in_flight.num_waiting < 1:
            time.sleep(0.001)
        with holding(in_flight, "c", least=1, most=1, timeout_s=5 * KEEPS_ROOM_S) as granted:
            assert granted == 1
        stop.request()
        with pytest.raises(ReadStopped):
            large.result(timeout=10)


def test_who_waits_too_long_is_told(threads: ThreadPoolExecutor) -> None:
    in_flight = InFlight(10)
    with (
        holding(in_flight, "a", least=10),
        pytest.raises(TransferTimeout, match="no 10 of 10 bytes"),
        holding(in_flight, "b", least=10, timeout_s=0.01),
    ):
        pass
    with holding(in_flight, "b", least=10):
        assert in_flight.num_bytes == 10


def test_a_stop_ends_the_wait_at_once(threads: ThreadPoolExecutor) -> None:
    in_flight, stop = InFlight(10), ReadStop()
    with holding(in_flight, "a", least=10):
        kept = holding(in_flight, "b", least=10, stop=stop, timeout_s=60)
        waiting = threads.submit(kept.__enter__)
        stop.request()
        with pytest.raises(ReadStopped):
            waiting.result(timeout=10)
    with holding(in_flight, "b", least=10):
        pass


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_holds_and_everybody_is_served(seed: int, threads: ThreadPoolExecutor) -> None:
    chance = random.Random(seed)
    in_flight = InFlight(budget := chance.choice([1, 64, 100, 1000]))
    least = chance.choice([1, 50, 100])

    def read(source: int) -> int:
        with holding(in_flight, str(source % 3), least=least, most=least * chance.choice([1, 2, 1000])) as granted:
            assert in_flight.num_bytes <= max(budget, least)
            return granted

    assert all(granted >= least for granted in threads.map(read, range(200)))
    assert in_flight.num_bytes == 0
    assert in_flight.high_water_bytes <= max(budget, least)
