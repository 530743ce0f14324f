from __future__ import annotations

import asyncio
import time

from orchestrator.loop_lag import LoopLag
from tests.support.front_door import front_door, until


async def test_a_blocked_loop_is_seen_as_lag() -> None:
    seen: list[float] = []
    lag = LoopLag(seen.append, interval_s=0.001)
    lag.start()
    await until(lambda: len(seen) > 1)
    time.sleep(0.05)  # noqa: ASYNC251 - this is the blocking that is to be seen
    await until(lambda: lag.longest_s > 0.04)
    lag.stop()
    assert max(seen) == lag.longest_s >= 0.045


async def test_a_stopped_watch_sees_nothing_more() -> None:
    seen: list[float] = []
    lag = LoopLag(seen.append, interval_s=0.001)
    lag.start()
    lag.stop()
    await asyncio.sleep(0.005)
    assert seen == []


async def test_the_lag_of_the_orchestrator_is_a_metric() -> None:
    async with front_door() as door:
        await until(lambda: b"disagg_event_loop_lag_seconds_count 0.0" not in door.door.metrics.render())
        assert b'disagg_event_loop_lag_seconds_bucket{le="0.05"}' in door.door.metrics.render()
