"""Work beside a task, with one promise: whoever awaits it goes on only when it has ended, whatever cancels him."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


async def run_to_end(
    executor: concurrent.futures.Executor, job: Callable[[], Result], *, stop: Callable[[], None]
) -> Result:
    """Run `job` on a thread. Cancelled, it calls `stop` and still waits, however often it is cancelled again.

    `stop` must make `job` end soon; that, and the job's own deadlines, bound the wait.
    """
    submitted = executor.submit(job)
    running = asyncio.wrap_future(submitted)

    def stop_or_forget() -> None:
        if not submitted.cancel():  # It had begun.
            stop()

    try:
        await to_the_end(lambda: asyncio.wait([running]), running.done, on_cancel=stop_or_forget)
    except asyncio.CancelledError:
        if not running.cancelled():
            running.exception()  # How it ended does not matter any more.
        raise
    return running.result()


async def to_the_end(
    wait: Callable[[], Awaitable[object]],
    has_ended: Callable[[], bool],
    *,
    on_cancel: Callable[[], None] = lambda: None,
) -> None:
    """Wait, through every cancellation of our own, each of which calls `on_cancel`. The last is raised at the end."""
    cancelled: asyncio.CancelledError | None = None
    while not has_ended():
        try:
            await wait()
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    if cancelled is not None:
        raise cancelled


async def cancelled_to_the_end(task: asyncio.Task[None]) -> None:
    """Cancel it and wait until it has ended, however it does."""
    task.cancel()
    await to_the_end(lambda: asyncio.wait([task]), task.done)


async def together(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All at once. The first that fails stops the others, and is raised once they have ended as well."""
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in running]
