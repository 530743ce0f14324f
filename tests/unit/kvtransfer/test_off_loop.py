import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator

import pytest

from kvtransfer.off_loop import run_to_end


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
