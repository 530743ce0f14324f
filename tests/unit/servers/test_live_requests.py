"""Who is being served, and whether anybody new may come."""

from __future__ import annotations

import asyncio

import pytest

from disaggregated.engine.serving.live_requests import LiveRequests, request_id_of
from disaggregated.errors import AdmissionError, Draining


def test_a_request_gets_a_new_engine_id_each_time_it_comes() -> None:
    live = LiveRequests(num_requests_max=4)
    first, again = live.add("r~1"), live.add("r~1")
    assert first != again
    assert request_id_of(first) == request_id_of(again) == "r~1"


def test_one_more_than_the_bound_is_refused_and_may_go_elsewhere() -> None:
    live = LiveRequests(num_requests_max=2)
    first = live.add("a")
    live.add("b")
    with pytest.raises(AdmissionError, match="2 requests are here") as caught:
        live.add("c")
    assert caught.value.retryable
    live.discard(first)
    live.discard(first)
    live.add("c")
    assert len(live) == 2


async def test_draining_refuses_the_new_and_waits_for_the_old() -> None:
    live = LiveRequests(num_requests_max=2)
    engine_id = live.add("a")
    live.begin_draining()
    await asyncio.wait_for(live.wait_draining(), 20)
    with pytest.raises(Draining):
        live.add("b")
    idle = asyncio.ensure_future(live.wait_idle())
    await asyncio.sleep(0)
    assert not idle.done()
    live.discard(engine_id)
    await asyncio.wait_for(idle, 20)
