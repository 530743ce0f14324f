from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait

import pytest

from kvtransfer.destination.readers import FairReaders

NUM_THREADS = 8


@pytest.fixture
def readers() -> Iterator[FairReaders]:
    made = FairReaders(NUM_THREADS, thread_name_prefix="kv-readers")
    yield made
    made.shutdown()


class Reads:
    """Jobs of one source, which run until they are let go."""

    def __init__(self, readers: FairReaders, source: str) -> None:
        self.readers = readers
        self.source = source
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)

    def start(self, count: int) -> list[Future[str]]:
        executor = self.readers.of(self.source)
        return [executor.submit(self._read) for _ in range(count)]

    def _read(self) -> str:
        self.begun.release()
        assert self.go.wait(20), "the test forgot to let its reads go"
        return self.source

    @property
    def num_running(self) -> int:
        return self.readers.num_running(self.source)


def test_a_source_alone_gets_half_of_the_threads_and_the_next_always_finds_one(readers: FairReaders) -> None:
    slow, fast = Reads(readers, "slow"), Reads(readers, "fast")
    fast.go.set()
    futures = slow.start(20)
    assert slow.num_running == NUM_THREADS // 2
    assert readers.num_waiting("slow") == 20 - NUM_THREADS // 2
    for _ in range(50):
        assert fast.start(1)[0].result(timeout=10) == "fast"
    slow.go.set()
    assert not wait(futures, timeout=10).not_done


def test_every_source_gets_a_share_while_threads_are_left(readers: FairReaders) -> None:
    sources = [Reads(readers, str(number)) for number in range(4)]
    for source in sources:
        source.start(10)
    assert [source.num_running for source in sources] == [4, 2, 1, 1]
    for source in sources:
        source.go.set()


def test_sources_that_wait_are_served_in_turn() -> None:
    readers = FairReaders(2, thread_name_prefix="kv-readers")
    order: list[str] = []
    held = Reads(readers, "held")
    held.start(1)
    first = Reads(readers, "first")
    first.start(1)

    def note(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    futures = [readers.submit(name, note(name)) for name in ("a", "a", "a", "b", "b", "c")]
    assert not order  # Both threads are taken.
    held.go.set()
    assert not wait(futures, timeout=10).not_done
    assert order == ["a", "b", "c", "a", "b", "a"]
    first.go.set()
    readers.shutdown()


def test_a_job_that_is_cancelled_before_its_turn_never_runs_and_is_forgotten(readers: FairReaders) -> None:
    slow = Reads(readers, "slow")
    slow.start(4)
    waiting = slow.start(3)
    assert all(future.cancel() for future in waiting)
    assert readers.num_waiting("slow") == 0
    slow.go.set()
    assert readers.submit("slow", lambda: "last").result(timeout=10) == "last"
    assert slow.begun.acquire(timeout=10)
    assert sum(slow.begun.acquire(blocking=False) for _ in range(7)) == 3


def test_what_a_job_raises_is_raised_where_it_is_awaited(readers: FairReaders) -> None:
    def fail() -> None:
        raise ValueError("of the job")

    with pytest.raises(ValueError, match="of the job"):
        readers.of("a").submit(fail).result(timeout=10)
    assert readers.submit("a", lambda: 1).result(timeout=10) == 1
    assert readers.num_running("b") == 0


def test_at_the_end_what_waits_is_cancelled_and_what_runs_is_waited_for() -> None:
    readers = FairReaders(2, thread_name_prefix="kv-readers")
    slow = Reads(readers, "slow")
    running, waiting = slow.start(2)
    threading.Timer(0, slow.go.set).start()
    readers.shutdown()
    assert running.result(timeout=0) == "slow"
    assert waiting.cancelled() or waiting.result(timeout=0) == "slow"
    readers.shutdown()


def test_no_job_is_lost_when_many_threads_submit_and_cancel_at_once() -> None:
    readers = FairReaders(3, thread_name_prefix="kv-readers")
    ran: list[int] = []
    futures: list[Future[None]] = []
    lock = threading.Lock()

    def submit(seed: int) -> None:
        for number in range(100):
            future = readers.submit(str((seed + number) % 5), lambda number=number: ran.append(number))  # type: ignore[misc]
            if number % 7 == seed:
                future.cancel()
            with lock:
                futures.append(future)

    threads = [threading.Thread(target=submit, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wait(futures, timeout=10).not_done
    assert len(ran) == sum(not future.cancelled() for future in futures)
    readers.shutdown()
    assert all(readers.num_running(str(source)) == 0 == readers.num_waiting(str(source)) for source in range(5))
