"""Keeping in touch: joining, losing, coming back, draining and leaving, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.server import ServerConfig
from disaggregated.errors import InvalidRequest, Unauthenticated
from orchestrator.load import Share
from orchestrator.server import Role, Server, Standing
from orchestrator.server_pools import BACKOFF_S_MAX, STEP_LIMIT_FACTOR, ServerPools
from tests.support.fake_cluster import FakeCluster, FakeServer, Pipe
from tests.support.virtual_time import run_in_virtual_time

Play = Callable[[FakeCluster, ServerPools], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def pools_of(cluster: FakeCluster) -> AsyncIterator[ServerPools]:
    empty = PoolConfig(num_instances=1, server=ServerConfig(model="", role="context"))
    crashes: list[BaseException] = []
    pools = ServerPools(
        DeploymentConfig(context=empty, generation=empty),
        connect=cluster.connect,
        clock=asyncio.get_running_loop().time,
        on_crash=crashes.append,
    )
    for server in cluster.servers.values():
        pools.add(server.role, server.address)
    pools.start()
    try:
        yield pools
    finally:
        await pools.close()
        await cluster.close()
    assert not crashes


def played(play: Play, *, num_context: int = 0, num_generation: int = 1) -> None:
    async def work() -> None:
        cluster = FakeCluster(0, num_context=num_context, num_generation=num_generation)
        async with pools_of(cluster) as pools:
            await asyncio.sleep(1.0)
            await play(cluster, pools)

    run_in_virtual_time(work())


def only(pools: ServerPools) -> Server:
    (server,) = pools
    return server


def told_of_loss(server: Server) -> list[str]:
    told: list[str] = []
    server.take(1, Share(1, 0, 1, on_lost=lambda error: told.append(str(error))))
    return told


def test_a_server_that_answers_joins() -> None:
    async def play(cluster: FakeCluster, pools: ServerPools) -> None:
        assert [server.instance_id for server in pools.ready(Role.GENERATION)] == ["generation-0"]
        assert await pools.first_model() == "fake"
        assert pools.num_tokens_max == 4096

    played(play)


def test_a_server_that_is_added_while_running_joins_and_adding_it_twice_changes_nothing() -> None:
    async def play(cluster: FakeCluster, pools: ServerPools) -> None:
        cluster.servers["generation-9"] = FakeServer(cluster, "generation", "generation-9")
        pools.add("generation", "generation-9")
        pools.add("generation", "generation-9")
        await asyncio.sleep(1.0)
        assert len(pools.ready(Role.GENERATION)) == 2

    played(play)


def test_a_crash_is_noticed_at_once_and_the_restarted_server_comes_back() -> None:
    async def play(cluster: FakeCluster, pools: ServerPools) -> None:
        told = told_of_loss(only(pools))
        cluster.servers["generation-0"].crash()
        await asyncio.sleep(0.01)
        assert told == ["lost generation-0"]
        assert only(pools).standing is Standing.LOST
        only(pools).give_back(1, makes_room=True)
        cluster.servers["generation-0"].restart()
        await asyncio.sleep(BACKOFF_S_MAX + 1.0)
        assert only(pools).is_ready
        assert only(pools).description.epoch == 2

    played(play)


def test_a_frozen_server_is_lost_after_the_progress_timeout_and_comes_back_when_it_thaws() -> None:
    async def play(cluster: FakeCluster, pools: ServerPools) -> None:
        told = told_of_loss(only(pools))
        cluster.servers["generation-0"].thawed.clear()
        await asyncio.sleep(0.7)
        assert only(pools).is_ready
        await asyncio.sleep(0.4)
        assert told == ["generation-0 was silent for 1 s"]
        only(pools).give_back(1, makes_room=True)
        cluster.servers["generation-0"].thawed.set()
        await asyncio.sleep(10.0)
        assert only(pools).is_ready

    played(play)


def test_a_server_whose_step_never_ends_is_lost_although_its_heart_beats() -> None:
    async def play(cluster: FakeCluster, pools: ServerPools) -> None:
        told = told_of_loss(only(pools))
        cluster.servers["generation-0"].step_age_s = STEP_LIMIT_FACTOR - 1.0
        await asyncio.sleep(1.0)
        assert told == []
        cluster.servers["generation-0"].step_age_s = STEP_LIMIT_FACTOR + 0.5
        await asyncio.sleep(1.0)
        assert told == ["generation-0 has not ended a step for 30.5 s"]
        only(pools).give_back(1, makes_room=True)

    played(play)


def test_a_draining_server_takes_nothing_new_and_is_not_lost() -> None:
    async def play(cluster: FakeCluster, pools: ServerPools) -> None:
        assert await pools.drain("generation", "generation-0", deadline_s=1.0) == 0
        await asyncio.sleep(2.0)
        assert only(pools).standing is Standing.DRAINING
        assert pools.ready(Role.GENERATION) == []
        assert only(pools).num_times_lost == 0

    played(play)


def test_a_removed_server_is_forgotten_and_its_requests_are_told() -> None:
    async def play(cluster: FakeCluster, pools: ServerPools) -> None:
        server = only(pools)
        told = told_of_loss(server)
        await pools.remove("generation", "generation-0")
        assert list(pools) == []
        assert told == ["generation-0 was removed"]
        with pytest.raises(InvalidRequest, match="there is no generation server at generation-0"):
            await pools.remove("generation", "generation-0")

    played(play)


def test_whoever_disagrees_is_refused_until_it_agrees() -> None:
    async def play(cluster: FakeCluster, pools: ServerPools) -> None:
        odd = FakeServer(cluster, "generation", "generation-9")
        odd.fingerprint = "weights-2"
        cluster.servers["generation-9"] = odd
        pools.add("generation", "generation-9")
        await asyncio.sleep(1.0)
        (refused,) = [server for server in pools if server.standing is Standing.REFUSED]
        assert "weights-2 here and weights-1 there" in refused.reason
        odd.fingerprint = "weights-1"
        await asyncio.sleep(BACKOFF_S_MAX + 1.0)
        assert len(pools.ready(Role.GENERATION)) == 2

    played(play)


class Stranger(FakeServer):
    """A server of another cluster, until somebody gives it our secret."""

    refuses = True

    async def describe(self, pipe: Pipe) -> None:
        if self.refuses:
            pipe.queue.put_nowait(Unauthenticated("it has another cluster secret than we"))
        else:
            await super().describe(pipe)


def test_a_server_of_another_cluster_is_named_in_the_log_once_and_joins_when_it_is_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def play(cluster: FakeCluster, pools: ServerPools) -> None:
        strange = Stranger(cluster, "generation", "generation-9")
        cluster.servers["generation-9"] = strange
        pools.add("generation", "generation-9")
        await asyncio.sleep(60.0)
        (connecting,) = [server for server in pools if server.standing is Standing.CONNECTING]
        assert connecting.reason == "it has another cluster secret than we"
        assert caplog.text.count("server_not_of_this_cluster") == 1
        strange.refuses = False
        await asyncio.sleep(BACKOFF_S_MAX + 1.0)
        assert len(pools.ready(Role.GENERATION)) == 2

    played(play)


def test_a_server_that_is_not_there_yet_is_called_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        cluster = FakeCluster(0, num_context=0, num_generation=1)
        cluster.servers["generation-0"].crash()
        async with pools_of(cluster) as pools:
            await asyncio.sleep(60.0)
            assert only(pools).standing is Standing.CONNECTING
            assert only(pools).num_times_lost == 0
            assert "refuses connections" in only(pools).reason
            assert caplog.text.count("server_not_reached") == 1
            cluster.servers["generation-0"].restart()
            await asyncio.sleep(BACKOFF_S_MAX + 1.0)
            assert only(pools).is_ready

    run_in_virtual_time(work())
