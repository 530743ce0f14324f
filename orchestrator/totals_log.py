"""`metrics_log_interval_s`: a line of totals in the log every so often, for deployments that nobody scrapes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

from disaggregated import logs

log = logs.get(__name__)


@contextlib.asynccontextmanager
async def totals_logged(read: Callable[[], Mapping[str, float]], interval_s: float) -> AsyncIterator[None]:
    """While inside, `read()` goes to the log every `interval_s`; 0: never."""
    if interval_s == 0:
        yield
        return
    writing = asyncio.create_task(_write(read, interval_s))
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.wait([writing])


async def _write(read: Callable[[], Mapping[str, float]], interval_s: float) -> None:
    while True:
        await asyncio.sleep(interval_s)
        log.info("totals", **read())
