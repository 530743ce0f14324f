"""The harness that measures the front door: its client reads what servers send, and its verdicts say what was seen."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from benchmarks.router.client import Connection, request
from benchmarks.router.contenders import OURS, SGLANG
from benchmarks.router.mock_control import Control
from benchmarks.router.mock_http import MockServer
from benchmarks.router.verdicts import rows
from tests.support.front_door import until


@contextlib.asynccontextmanager
async def connected(*, decodes: bool = True) -> AsyncIterator[tuple[Control, MockServer, Connection]]:
    control = Control()
    control.step_s = 0.001
    server = MockServer(control, decodes=decodes)
    connection = await Connection.open(await server.listen())
    stepping = asyncio.create_task(control.run_steps([server]))
    try:
        yield control, server, connection
    finally:
        stepping.cancel()
        connection.transport.close()
        server.close()
        await asyncio.wait([stepping])


def chat(num_tokens: int, *, stream: bool) -> bytes:
    return request("/v1/chat/completions", {"messages": [], "max_tokens": num_tokens, "stream": stream})


async def test_a_stream_has_an_event_for_each_token_and_one_for_its_end() -> None:
    async with connected() as (_, _, connection):
        reply = await connection.ask(chat(20, stream=True))
        assert reply.is_good
        assert reply.num_events == 21
        assert 0.0 < reply.ttft_s <= reply.ended_s - reply.began_s


async def test_answers_follow_each_other_on_one_connection() -> None:
    async with connected() as (_, _, connection):
        replies = [await connection.ask(chat(3, stream=stream)) for stream in (False, True, False)]
        assert [reply.is_good for reply in replies] == [True] * 3


async def test_a_prefill_is_answered_at_once_and_whole() -> None:
    async with connected(decodes=False) as (_, _, connection):
        reply = await connection.ask(chat(100, stream=True))
        assert reply.is_good
        assert reply.first_event_s is None


async def test_a_stream_that_is_hung_up_is_told_as_cancelled() -> None:
    async with connected() as (control, server, connection):
        connection.begin(chat(1_000_000, stream=True))
        await until(lambda: connection.num_events_total > 0)
        connection.transport.abort()
        await until(lambda: not server.running)
        assert len(control._answer("cancelled", [])) == 1
        assert control._answer("cancelled", []) == []


@pytest.mark.parametrize(("ours", "holds"), [(120.0, True), (300.0, False)])
def test_a_verdict_compares_with_what_was_measured_in_the_same_run(ours: float, holds: bool) -> None:
    measured = {(OURS, "request_us"): ours, (SGLANG, "request_us"): 200.0, (OURS, "request_ids_us"): 130.0}
    plain, of_ids = rows(measured, [OURS, SGLANG])
    assert plain.holds is holds
    assert f"{ours / 200.0:.2f} ×" in plain.seen
    assert of_ids.holds is True, "what others cannot be asked for is compared with their plain request"


def test_a_figure_that_nobody_has_is_left_out() -> None:
    assert rows({}, [OURS]) == []
