"""An orchestrator's HTTP port, seen from outside: whatever comes is answered or closed, and costs nobody else anything.

No test here knows which library reads HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import psutil
import pytest

from tests.support import raw_http
from tests.support.deployment import Deployment, started
from tests.support.raw_http import GET, said, statuses

ANSWER_S: Final = 10.0
"""For what can be answered at once."""
STALL_S: Final = 90.0
"""After that a client who does not go on has been hung up on."""
GROWTH_BYTES_MAX: Final = 30 << 20
NUM_SLOW: Final = 500


@pytest.fixture
async def orchestrator(tmp_path: Any) -> AsyncIterator[Deployment]:
    servers = {
        f"{role}_servers": {"num_instances": 1, "urls": [f"127.0.0.1:{port}"]}
        for role, port in (("context", 1), ("generation", 2))
    }
    async with started(tmp_path, {"model": "smollm2-135m-instruct", **servers}) as deployment:
        yield deployment


def port_of(deployment: Deployment) -> int:
    return int(deployment.url.rpartition(":")[2])


async def check_others_are_served(port: int) -> None:
    answer = await said(port, GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), within_s=ANSWER_S)
    assert statuses(answer) == [200]


async def test_what_may_be_two_requests_or_is_too_large_is_refused_and_the_connection_closed(
    orchestrator: Deployment,
) -> None:
    port = port_of(orchestrator)
    process = psutil.Process(orchestrator.process.pid)
    await check_others_are_served(port)
    before = process.memory_info().rss
    for what, message in {**raw_http.SMUGGLED, **raw_http.TOO_LARGE}.items():
        answer = await said(port, message + GET, within_s=ANSWER_S)
        assert [status // 100 for status in statuses(answer)] in ([4], []), f"{what}: {answer[:200]!r}"
    pipelined = await said(
        port, 20 * GET + GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), within_s=ANSWER_S
    )
    assert statuses(pipelined) == [200] * 21, "requests that follow one another are answered in their order"
    await check_others_are_served(port)
    assert process.memory_info().rss < before + GROWTH_BYTES_MAX


async def test_requests_for_both_readers_on_one_connection_are_answered_in_their_order(
    orchestrator: Deployment,
) -> None:
    """Those to generate are for a model that is not here; the first that is not plain takes the others along."""
    port = port_of(orchestrator)
    plain = raw_http.HEAD + raw_http.LENGTH + b"\r\n" + raw_http.BODY
    chunked = raw_http.HEAD + raw_http.CHUNKED + b"\r\n" + raw_http.CHUNKS
    last = GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    for message, expected in ((3 * plain, "refused refused refused"), (plain + GET + plain, "refused served refused")):
        answer = await said(port, plain + 2 * message + chunked + last, within_s=ANSWER_S)
        assert served_or_refused(answer) == ["refused", *2 * expected.split(), "refused", "served"]
    closing = plain.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    assert served_or_refused(await said(port, plain + closing, within_s=ANSWER_S)) == ["refused", "refused"]


def served_or_refused(answer: bytes) -> list[str]:
    return ["served" if status == 200 else "refused" for status in statuses(answer)]


async def test_clients_who_stop_in_the_middle_keep_nobody_waiting_and_cost_next_to_nothing(
    orchestrator: Deployment,
) -> None:
    port = port_of(orchestrator)
    process = psutil.Process(orchestrator.process.pid)
    await check_others_are_served(port)
    before, descriptors = process.memory_info().rss, process.num_fds()
    stalled = list(raw_http.STALLED.values())
    writers = []
    for number in range(NUM_SLOW):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(stalled[number % len(stalled)])
        writers.append(writer)
    await check_others_are_served(port)
    assert process.memory_info().rss < before + GROWTH_BYTES_MAX
    for writer in writers:
        writer.transport.abort()
    async with asyncio.timeout(ANSWER_S):
        while process.num_fds() > descriptors + 2:
            await check_others_are_served(port)


@pytest.mark.soak
async def test_a_client_who_does_not_go_on_is_hung_up_on(orchestrator: Deployment) -> None:
    port = port_of(orchestrator)
    async with asyncio.TaskGroup() as group:
        for message in raw_http.STALLED.values():
            group.create_task(said(port, message, within_s=STALL_S))
