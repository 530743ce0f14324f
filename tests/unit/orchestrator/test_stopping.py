"""An orchestrator that stops: what its clients and its load balancer see."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from tests.support.fake_cluster import Temper
from tests.support.front_door import Door, front_door, until
from tests.unit.orchestrator.test_app import TEXT, body, read_events, stream

SLOW = Temper(latency_s=0.0, step_s=0.05, prefill_token_s=0.0)


async def begun(door: Door, num_requests: int = 1) -> None:
    await until(lambda: door.door.dispatcher.stories.num_running == num_requests)


async def test_requests_under_way_may_end_and_new_ones_are_refused() -> None:
    async with front_door(temper=SLOW) as door:
        asking = asyncio.create_task(stream(door, max_tokens=4))
        await begun(door)
        stopping = asyncio.create_task(door.door.stop(timeout_s=20))
        await asyncio.sleep(0)
        status, answer = await door.post("/v1/completions", body(max_tokens=1))
        assert status == 503
        assert answer["error"]["message"] == "the orchestrator is stopping"
        assert (await door.get("/health"))[0] == 503
        await stopping
        assert "error" not in (await asking)[-1]


async def test_a_stream_that_does_not_end_in_time_ends_with_an_error_event() -> None:
    async with front_door(temper=SLOW) as door:
        async with door.http.post(door.url + TEXT, json=body(stream=True, max_tokens=1000)) as answer:
            await answer.content.readuntil(b"\n\n")
            await door.door.stop(timeout_s=0.2)
            events = await read_events(answer)
        assert events[-1]["error"]["message"] == "the orchestrator is stopping"
        await door.wait_idle()


async def test_an_answer_that_is_not_streamed_becomes_a_503() -> None:
    async with front_door(temper=SLOW) as door:
        asking = asyncio.create_task(door.post("/v1/completions", body(max_tokens=1000)))
        await begun(door)
        await door.door.stop(timeout_s=0.1)
        status, answer = await asking
        assert (status, answer["error"]["message"]) == (503, "the orchestrator is stopping")


async def test_an_idle_orchestrator_stops_at_once() -> None:
    async with front_door() as door:
        async with asyncio.timeout(20):
            await door.door.stop(timeout_s=60)


class CrashLooping:
    """One local generation server that never comes up."""

    async def scale(self, role: str, count: int) -> None: ...

    def describe(self) -> Sequence[Mapping[str, object]]:
        return [{"name": "generation-0", "role": "generation", "phase": "waiting", "last_exit": "signal 9"}]


async def test_health_names_the_local_process_that_crashes_again_and_again() -> None:
    async with front_door(num_generation=0, scaler=CrashLooping(), is_awaited=False) as door:
        status, answer = await door.get("/health")
        assert status == 503
        assert "generation-0 is waiting, the last one ended with signal 9" in answer["error"]["message"]
