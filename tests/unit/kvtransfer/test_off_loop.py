import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator

import pytest

from kvtransfer.off_loop import cancelled_to_the_end, run_to_end, to_the_end, together
from tests.support.virtual_time import run_in_virtual_time


@pytest.fixture
def executor() -> Iterator[concurrent.futures.Executor]:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        yield threads


def never() -> None:
    raise AssertionError("stopped without a cancel")


async def test_a_result_and_an_error_come_back(executor: concurrent.futures.Executor) -> None:
    assert await run_to_end(executor, lambda: 5, stop=never) == 5

    def fails() -> None:
        raise ValueError("from the thread")

    with pytest.raises(ValueError, match="from the thread"):
        await run_to_end(executor, fails, stop=never)


async def test_a_cancelled_caller_goes_on_only_when_the_job_has_ended(executor: concurrent.futures.Executor) -> None:
    begun, may_end, ended, stops = threading.Event(), threading.Event(), threading.Event(), []

    def job() -> None:
        begun.set()
        may_end.wait(10)
        ended.set()

    waiting = asyncio.create_task(run_to_end(executor, job, stop=lambda: stops.append(1)))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(3):
        waiting.cancel()
        done, _ = await asyncio.wait([waiting], timeout=0.01)
        assert not done
    assert len(stops) == 3
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()


async def test_a_job_that_has_not_begun_never_begins_after_a_cancel(executor: concurrent.futures.Executor) -> None:
    begun, may_end, ran = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        may_end.wait(10)

    blocking = executor.submit(first)
    await asyncio.to_thread(begun.wait, 10)
    waiting = asyncio.create_task(run_to_end(executor, lambda: ran.append(1), stop=never))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    may_end.set()
    blocking.result(10)
    await run_to_end(executor, lambda: None, stop=never)
    assert ran == []


async def test_an_error_of_a_stopped_job_is_not_heard_of_again(executor: concurrent.futures.Executor) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        stopped.wait(10)
        raise ValueError("stopped")

    waiting = asyncio.create_task(run_to_end(executor, job, stop=stopped.set))
    await asyncio.to_thread(begun.wait, 10)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def _slow_to_end() -> None:
    try:
        await asyncio.sleep(1000)
    finally:
        await asyncio.sleep(5)


def test_a_wait_goes_on_through_cancellations_and_tells_of_each() -> None:
    async def play() -> None:
        ended, told = asyncio.Event(), list[int]()
        waiting = asyncio.create_task(to_the_end(ended.wait, ended.is_set, on_cancel=lambda: told.append(1)))
        for _ in range(3):
            await asyncio.sleep(1)
            waiting.cancel()
        await asyncio.sleep(1)
        assert (waiting.done(), len(told)) == (False, 3)
        ended.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run_in_virtual_time(play())


def test_who_ends_a_task_goes_on_when_it_has_ended_however_often_he_is_cancelled() -> None:
    async def play() -> None:
        task = asyncio.create_task(_slow_to_end())
        await asyncio.sleep(1)
        ending = asyncio.create_task(cancelled_to_the_end(task))
        await asyncio.sleep(1)
        ending.cancel()
        await asyncio.sleep(1)
        assert not ending.done()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert task.cancelled()

    run_in_virtual_time(play())


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_order_whoever_is_first(count: int) -> None:
    async def work(number: int) -> int:
        await asyncio.sleep(count - number)
        return number

    assert run_in_virtual_time(together([work(number) for number in range(count)])) == list(range(count))


def test_the_first_that_fails_stops_the_others_and_is_raised_when_they_have_ended() -> None:
    ended: list[str] = []

    async def slow() -> None:
        try:
            await _slow_to_end()
        finally:
            ended.append("slow")

    async def failing() -> None:
        await asyncio.sleep(1)
        raise ValueError("the first")

    async def play() -> None:
        with pytest.raises(ValueError, match="the first"):
            await together([slow(), failing(), slow()])
        assert ended == ["slow", "slow"]

    run_in_virtual_time(play())
