"""A server that hangs is told from one that was away for a moment, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from orchestrator.hung_server import HEARTBEATS_IN_LIMIT, RECONNECT_S, until_hung
from tests.support.fake_cluster import FakeClient, FakeCluster, FakeServer
from tests.support.virtual_time import VirtualTimeLoop, run_in_virtual_time

LIMIT_S = 60.0
INTERVAL_S = LIMIT_S / HEARTBEATS_IN_LIMIT


def guarded(happens: Callable[[FakeServer, asyncio.Task[str]], Awaitable[None]]) -> None:
    """`happens` while a server is watched, which has spoken by then."""

    async def play() -> None:
        server = FakeCluster(3, num_context=0, num_generation=1).servers["generation-0"]
        watching = asyncio.create_task(until_hung(lambda _: FakeClient(server), server.address, limit_s=LIMIT_S))
        await asyncio.sleep(1.0)
        try:
            await happens(server, watching)
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    run_in_virtual_time(play())


def test_a_frozen_server_hangs_once_it_was_silent_for_the_limit() -> None:
    async def freeze(server: FakeServer, watching: asyncio.Task[str]) -> None:
        server.thawed.clear()
        _, pending = await asyncio.wait([watching], timeout=LIMIT_S - INTERVAL_S)
        assert pending, "it may have spoken just before"
        assert await watching == "it was silent for 60 s"

    guarded(freeze)


def test_a_server_that_was_away_for_less_than_that_does_not() -> None:
    async def nap(server: FakeServer, watching: asyncio.Task[str]) -> None:
        for _ in range(5):
            server.thawed.clear()
            await asyncio.sleep(LIMIT_S - 2 * INTERVAL_S)
            server.thawed.set()
            await asyncio.sleep(2 * INTERVAL_S)
        assert not watching.done()

    guarded(nap)


def test_a_lost_connection_is_made_again() -> None:
    async def restart(server: FakeServer, watching: asyncio.Task[str]) -> None:
        for _ in range(20):
            server.crash()
            await asyncio.sleep(5 * RECONNECT_S)
            server.restart()
            await asyncio.sleep(INTERVAL_S)
        assert not watching.done()

    guarded(restart)


def test_a_step_that_does_not_end_is_a_hang_although_the_server_speaks() -> None:
    async def stick(server: FakeServer, watching: asyncio.Task[str]) -> None:
        server.step_age_s = LIMIT_S - 1.0
        await asyncio.sleep(2 * LIMIT_S)
        assert not watching.done()
        server.step_age_s = LIMIT_S + 1.0
        assert await watching == "it has not ended a step for 61 s"

    guarded(stick)


def test_when_it_is_we_who_were_away_it_gets_another_chance() -> None:
    async def starve(server: FakeServer, watching: asyncio.Task[str]) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.sleep_through(10 * LIMIT_S)
        await asyncio.sleep(3 * INTERVAL_S)
        assert not watching.done()

    guarded(starve)


def test_a_server_that_cannot_be_reached_at_all_hangs_too() -> None:
    """It has said that it is ready."""

    async def play() -> None:
        server = FakeCluster(3, num_context=0, num_generation=1).servers["generation-0"]
        server.crash()
        assert (
            await until_hung(lambda _: FakeClient(server), server.address, limit_s=LIMIT_S) == "it was silent for 60 s"
        )

    run_in_virtual_time(play())
