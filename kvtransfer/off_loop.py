"""Blocking work beside the event loop, with one promise: whoever awaited it goes on only when it has ended."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def run_to_end(
    executor: concurrent.futures.Executor, job: Callable[[], Result], *, stop: Callable[[], None]
) -> Result:
    """Run `job` on a thread. Cancelled, it calls `stop` and still waits, however often it is cancelled again.

    `stop` must make `job` end soon; that, and the job's own deadlines, bound the wait.
    """
    submitted = executor.submit(job)
    running = asyncio.wrap_future(submitted)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
            if not submitted.cancel():  # It had begun.
                stop()
    if cancelled is not None:
        if not running.cancelled():
            running.exception()  # How it ended does not matter any more.
        raise cancelled
    return running.result()
