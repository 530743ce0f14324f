"""Whether a server that we started still lives. One that is gone is seen by its exit; one that hangs, by its silence.

Requests have left it long before, within `progress_timeout_s`. This is about its process, which holds cores and memory
and would never come back: a driver that does not return, a deadlock, somebody's SIGSTOP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Final

from disaggregated.errors import DisaggregatedError
from orchestrator.server_client import Connect
from orchestrator.silence import SilenceAlarm

HEARTBEATS_IN_LIMIT: Final = 6
DESCRIBE_TIMEOUT_S: Final = 5.0
RECONNECT_S: Final = 1.0


async def until_hung(connect: Connect, address: str, *, limit_s: float) -> str:
    """Of a server that has just said that it is ready: says how it hangs, once it does."""
    interval_s = limit_s / HEARTBEATS_IN_LIMIT
    loop = asyncio.get_running_loop()
    try:
        async with (
            asyncio.timeout(None) as patience,
            contextlib.aclosing(_step_ages(connect, address, interval_s=interval_s)) as ages,
        ):
            alarm = SilenceAlarm(lambda: patience.reschedule(loop.time()), limit_s=limit_s, second_chance_s=interval_s)
            with contextlib.closing(alarm):
                async for step_age_s in ages:
                    alarm.heard()
                    if step_age_s > limit_s:
                        return f"it has not ended a step for {step_age_s:.0f} s"
    except TimeoutError:
        return f"it was silent for {limit_s:g} s"
    raise AssertionError("heartbeats never end")


async def _step_ages(connect: Connect, address: str, *, interval_s: float) -> AsyncGenerator[float, None]:
    """How long its step has taken, as often as it says that; over as many connections as it takes."""
    while True:
        client = connect(address)
        try:
            await client.describe(timeout_s=DESCRIBE_TIMEOUT_S)
            async with contextlib.aclosing(client.watch(interval_s=interval_s)) as heartbeats:
                async for heartbeat in heartbeats:
                    yield heartbeat.step_age_s
        except DisaggregatedError:  # What matters is how long it says nothing.
            pass
        finally:
            await client.close()
        await asyncio.sleep(RECONNECT_S)
