"""The loads, each for one contender at a time. CPU is what its process used meanwhile, from /proc; never wall time."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import statistics
import time
from collections.abc import Sequence
from typing import Final

from benchmarks.router.client import Connection, Reply
from benchmarks.router.contenders import Contender
from benchmarks.router.mock_control import FIRST_ID, LAST_ID

STEP_S: Final = 0.01
SHORT_TOKENS: Final = 8
CLIENTS: Final = 64
RAMP_S: Final = 0.5
STREAM_TOKENS: Final = 1000
"""More than a stream gets to while it is measured; it is hung up then."""
CROWD_STEP_S: Final = 0.25
CROWD_TOKENS: Final = 24
SLOW_TOKENS: Final = 400_000
SLOW_RECEIVE_BYTES: Final = 4096
NOTICED_TIMEOUT_S: Final = 3.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    seconds: float
    num_first_tokens: int
    crowd: int
    slow_s: float
    num_disconnects: int


FULL: Final = Sizes(seconds=4.0, num_first_tokens=60, crowd=1000, slow_s=8.0, num_disconnects=16)
QUICK: Final = Sizes(seconds=1.0, num_first_tokens=10, crowd=50, slow_s=1.0, num_disconnects=4)


async def request_cost_us(contender: Contender, message: bytes, sizes: Sizes) -> float:
    """CPU a request, of clients that ask again as soon as they are answered."""
    await contender.mocks.ask("pace", STEP_S, 1)
    connections = [await Connection.open(contender.port) for _ in range(CLIENTS)]
    num_done = 0
    end_s = time.monotonic() + RAMP_S + sizes.seconds

    async def ask_on(connection: Connection) -> None:
        nonlocal num_done
        while time.monotonic() < end_s:
            reply = await connection.ask(message)
            assert reply.is_good, f"{contender.name}: status {reply.status}"
            num_done += 1

    async with asyncio.TaskGroup() as group:
        for connection in connections:
            group.create_task(ask_on(connection))
        await asyncio.sleep(RAMP_S)
        before, num_before = contender.cpu_s(), num_done
        await asyncio.sleep(end_s - time.monotonic())
        used_s, num_measured = contender.cpu_s() - before, num_done - num_before
    _hang_up(connections)
    return used_s / num_measured * 1e6


def short_prompt() -> list[int]:
    """As many token ids as the short question has."""
    return random.Random(0).choices(range(FIRST_ID, LAST_ID), k=40)


async def token_cost_us(contender: Contender, sizes: Sizes) -> float:
    """CPU a streamed token at 64 streams, once all of them run."""
    await contender.mocks.ask("pace", STEP_S, 1)
    connections = [await Connection.open(contender.port) for _ in range(CLIENTS)]
    message = contender.chat(STREAM_TOKENS, stream=True)
    for connection in connections:
        connection.begin(message)
    await asyncio.sleep(2 * RAMP_S)
    before, num_before = contender.cpu_s(), sum(connection.num_events_total for connection in connections)
    await asyncio.sleep(sizes.seconds)
    used_s = contender.cpu_s() - before
    num_tokens = sum(connection.num_events_total for connection in connections) - num_before
    assert all(connection.reply.status == 200 for connection in connections), f"{contender.name}: a stream failed"
    _hang_up(connections)
    await contender.mocks.ask("cancelled")
    return used_s / num_tokens * 1e6


async def first_token_s(contender: Contender, sizes: Sizes) -> float:
    """The median time to the first event, of one client that asks again and again; its servers answer at once."""
    await contender.mocks.ask("pace", 0.002, 1)
    connection = await Connection.open(contender.port)
    message = contender.chat(2, stream=True)
    replies = [await connection.ask(message) for _ in range(5 + sizes.num_first_tokens)]
    _hang_up([connection])
    return statistics.median(reply.ttft_s for reply in replies[5:])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    num_errors: int
    ttft_s: float
    """The median."""
    token_us: float
    """CPU, with what opening the streams cost."""
    grown_bytes: int


async def crowd(contender: Contender, sizes: Sizes) -> Crowd:
    """A thousand streams that all begin within half a second."""
    await contender.mocks.ask("pace", CROWD_STEP_S, 1)
    resident, before_s = contender.resident_bytes(), contender.cpu_s()
    message = contender.chat(CROWD_TOKENS, stream=True)
    connections: list[Connection] = []
    replies: list[asyncio.Future[Reply]] = []
    began_s = time.monotonic()
    for number in range(sizes.crowd):
        await asyncio.sleep(max(0.0, began_s + 0.5 * number / sizes.crowd - time.monotonic()))
        connections.append(await Connection.open(contender.port))
        replies.append(connections[-1].begin(message))
    await asyncio.sleep(CROWD_TOKENS * CROWD_STEP_S / 2)
    grown_bytes = contender.resident_bytes() - resident
    await asyncio.wait(replies, timeout=60.0)
    used_s = contender.cpu_s() - before_s
    _hang_up(connections)
    good = [connection.reply for connection in connections if connection.reply.is_good]
    return Crowd(
        num_errors=sizes.crowd - len(good),
        ttft_s=statistics.median(reply.ttft_s for reply in good),
        token_us=used_s / (len(good) * CROWD_TOKENS) * 1e6,
        grown_bytes=grown_bytes,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    grown_bytes: int
    noticed_s: float | None
    """From the client's hanging up to its request's end on the server; None: not noticed."""


async def slow_client(contender: Contender, sizes: Sizes) -> Slow:
    """A client that asks for a great many tokens and reads none of them."""
    await contender.mocks.ask("pace", 0.001, 20)
    resident = contender.resident_bytes()
    connection = await Connection.open(contender.port, receive_bytes=SLOW_RECEIVE_BYTES)
    connection.begin(contender.chat(SLOW_TOKENS, stream=True))
    await asyncio.sleep(0.05)
    connection.transport.pause_reading()
    await asyncio.sleep(sizes.slow_s)
    grown_bytes = contender.resident_bytes() - resident
    await contender.mocks.ask("cancelled")
    noticed = await _noticed_s(contender, [connection])
    return Slow(grown_bytes=grown_bytes, noticed_s=noticed[0] if noticed else None)


async def disconnects_s(contender: Contender, sizes: Sizes) -> Sequence[float]:
    """For streams that are hung up in the middle, one after the other: how soon each had ended on its server."""
    await contender.mocks.ask("pace", STEP_S, 1)
    message = contender.chat(STREAM_TOKENS, stream=True)
    connections = [await Connection.open(contender.port) for _ in range(sizes.num_disconnects)]
    for connection in connections:
        connection.begin(message)
    await asyncio.sleep(RAMP_S)
    await contender.mocks.ask("cancelled")
    return [seconds for connection in connections for seconds in await _noticed_s(contender, [connection])]


async def _noticed_s(contender: Contender, connections: Sequence[Connection]) -> Sequence[float]:
    """The first who notices counts: an HTTP mock is hung up by its router, one of ours is told."""
    hung_up_s = time.monotonic()
    for connection in connections:
        connection.transport.abort()
    while time.monotonic() - hung_up_s < NOTICED_TIMEOUT_S:
        if times_s := await contender.mocks.ask("cancelled"):
            return [min(times_s) - hung_up_s]
        await asyncio.sleep(0.02)
    return []


def _hang_up(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.transport.close()
