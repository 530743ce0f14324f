"""The launcher with real processes: servers without an engine, which start at once, in pools that only take notes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import psutil
import pytest

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.errors import DisaggregatedError, InvalidRequest, ModelUnavailable
from orchestrator.launch_plan import LaunchLimits
from orchestrator.launcher import Launcher
from tests.support.processes import descendants

FAKES: Final = {"context": "tests.support.fake_server", "generation": "tests.support.fake_server"}
LIMITS: Final = LaunchLimits(
    start_timeout_s=60, drain_timeout_s=5, stop_timeout_s=1, backoff_first_s=0.05, hung_timeout_s=0
)
"""Servers without an engine answer no calls."""
ROOT: Final = Path(__file__).parents[2]


class NotingPools:
    """What a launcher did to the pools, in order; `until` waits for it to have come to something."""

    def __init__(self) -> None:
        self.servers: dict[str, list[str]] = {"context": [], "generation": []}
        self.drained: list[str] = []
        self.num_joined = 0
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, role: str, address: str) -> None:
        self.servers[role].append(address)
        self.num_joined += 1
        task = asyncio.create_task(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, role: str, address: str, *, deadline_s: float) -> int:
        assert address in self.servers[role]
        self.drained.append(address)
        return 0

    async def remove(self, role: str, address: str) -> None:
        self.servers[role].remove(address)
        await self._notify()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(100), self._changed:
            await self._changed.wait_for(condition)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def deployment(model: str = "well", *, context: int = 1, generation: int = 1) -> DeploymentConfig:
    def pool(role: str, count: int) -> PoolConfig:
        return PoolConfig(num_instances=count, server=ServerConfig(model=model, role=role, host="127.0.0.1", port=0))

    return DeploymentConfig(context=pool("context", context), generation=pool("generation", generation))


@contextlib.asynccontextmanager
async def launched(config: DeploymentConfig, pools: NotingPools) -> AsyncIterator[Launcher]:
    launcher = Launcher(config, pools, limits=LIMITS, modules=FAKES, show=lambda _: None)
    stop = asyncio.Event()
    async with asyncio.timeout(150), asyncio.TaskGroup() as group:
        group.create_task(launcher.run(stop))
        try:
            yield launcher
        finally:
            stop.set()
    assert launcher.describe() == []
    assert descendants("fake_server") == []


def pid_of(launcher: Launcher, name: str) -> int:
    pids = [server["pid"] for server in launcher.describe() if server["name"] == name]
    assert isinstance(pids[0], int)
    return pids[0]


async def test_every_server_of_the_deployment_joins_its_pool() -> None:
    pools = NotingPools()
    async with launched(deployment(context=2), pools) as launcher:
        await pools.until(lambda: pools.num_joined == 3)
        assert {server["name"] for server in launcher.describe()} == {"context-0", "context-1", "generation-0"}
        assert {server["phase"] for server in launcher.describe()} == {"ready"}


async def test_a_killed_server_leaves_its_pool_and_comes_back() -> None:
    pools = NotingPools()
    async with launched(deployment(), pools) as launcher:
        await pools.until(lambda: pools.num_joined == 2)
        before = list(pools.servers["generation"])
        os.kill(pid_of(launcher, "generation-0"), signal.SIGKILL)
        await pools.until(lambda: pools.num_joined == 3)
        await pools.until(lambda: len(pools.servers["generation"]) == 1)
        assert pools.servers["generation"] != before
        described = {str(server["name"]): server for server in launcher.describe()}["generation-0"]
        assert (described["restarts"], described["last_exit"]) == (1, "signal 9")


async def test_scaling_up_and_down_ends_with_exactly_so_many_servers() -> None:
    pools = NotingPools()
    async with launched(deployment(), pools) as launcher:
        await pools.until(lambda: pools.num_joined == 2)
        await launcher.scale("generation", 3)
        assert len(pools.servers["generation"]) == 3
        await launcher.scale("generation", 1)
        await launcher.scale("context", 0)
        assert len(pools.drained) == 3
        assert [str(server["name"]) for server in launcher.describe()] == ["generation-0"]


async def test_the_later_of_two_scale_calls_wins_and_the_earlier_one_is_told() -> None:
    pools = NotingPools()
    async with launched(deployment(), pools) as launcher:
        await pools.until(lambda: pools.num_joined == 2)
        earlier = asyncio.create_task(launcher.scale("context", 3))
        later = asyncio.create_task(launcher.scale("context", 2))
        await later
        with pytest.raises(DisaggregatedError, match="2 servers are wanted by now, no longer 3"):
            await earlier


@pytest.mark.parametrize(
    ("role", "count", "message"),
    [
        ("prefill", 1, "there is no role prefill; the roles are context and generation"),
        ("generation", 0, "generation: must be between 1 and 256, is 0"),
        ("context", -1, "context: must be between 0 and 256, is -1"),
        ("context", 257, "context: must be between 0 and 256, is 257"),
    ],
)
async def test_a_count_that_cannot_be_is_refused(role: str, count: int, message: str) -> None:
    async with launched(deployment(), NotingPools()) as launcher:
        with pytest.raises(InvalidRequest, match=message):
            await launcher.scale(role, count)


async def test_servers_for_whose_pools_there_is_no_memory_are_refused_before_one_is_started() -> None:
    config = deployment()
    huge = KVCacheConfig(cpu_memory_budget_bytes=1 << 50)
    server = dataclasses.replace(config.context.server, device="cpu", kv_cache_config=huge)
    config = dataclasses.replace(config, context=dataclasses.replace(config.context, server=server))
    async with launched(config, NotingPools()) as launcher:
        await launcher.wait_until(lambda: launcher.plan.wanted("context") == 1)
        with pytest.raises(InvalidRequest, match=r"^context: 2 more would take .* GiB for their KV pools alone, and "):
            await launcher.scale("context", 3)
        assert launcher.plan.wanted("context") == 1


async def test_servers_with_urls_are_nobodys_to_scale() -> None:
    server = ServerConfig(model="", role="context")
    pool = PoolConfig(urls=("localhost:1",), server=server)
    launcher = Launcher(DeploymentConfig(context=pool, generation=pool), NotingPools(), modules=FAKES)
    assert not launcher.has_work
    with pytest.raises(InvalidRequest, match="have urls and are run by somebody else"):
        await launcher.scale("context", 2)


async def test_a_deployment_that_cannot_start_ends_with_its_servers_own_words_and_exit_code() -> None:
    pools = NotingPools()
    launcher = Launcher(deployment("damaged"), pools, limits=LIMITS, modules=FAKES, show=lambda _: None)
    with pytest.raises(ModelUnavailable, match=r"^context server: model\.safetensors is damaged$"):
        await launcher.run(asyncio.Event())
    assert descendants("fake_server") == []


async def test_a_server_that_crashes_at_every_start_is_tried_again_and_again_visibly() -> None:
    shown: list[str] = []
    config = deployment("crash", context=0)
    launcher = Launcher(config, NotingPools(), limits=LIMITS, modules=FAKES, show=shown.append)
    stop = asyncio.Event()
    async with asyncio.timeout(150), asyncio.TaskGroup() as group:
        group.create_task(launcher.run(stop))
        await launcher.wait_until(lambda: any(server["restarts"] == 2 for server in launcher.describe()))
        described = launcher.describe()[0]
        assert described["last_exit"] == "exit code 1"
        stop.set()
    assert shown.count("generation-0 | it is a bad day") >= 2


async def test_scaling_to_servers_that_crash_at_every_start_is_told_in_their_words() -> None:
    launcher = Launcher(deployment("crash"), NotingPools(), limits=LIMITS, modules=FAKES, show=lambda _: None)
    stop = asyncio.Event()
    async with asyncio.timeout(150), asyncio.TaskGroup() as group:
        group.create_task(launcher.run(stop))
        with pytest.raises(DisaggregatedError, match=r"^context-\d cannot start: exit code 1: it is a bad day$"):
            await launcher.scale("context", 2)
        await launcher.scale("context", 0)  # Nobody is told any more of those that are not wanted.
        stop.set()


async def test_a_server_deaf_to_sigterm_is_killed() -> None:
    pools = NotingPools()
    async with launched(deployment("stubborn"), pools):
        await pools.until(lambda: pools.num_joined == 2)


async def test_a_server_can_be_stopped_while_it_starts() -> None:
    async with launched(deployment("silent"), NotingPools()) as launcher:
        await launcher.wait_until(lambda: len(launcher.plan.instances) == 2)


async def test_a_line_longer_than_any_buffer_does_not_stop_a_server() -> None:
    pools = NotingPools()
    async with launched(deployment("chatty"), pools):
        await pools.until(lambda: pools.num_joined == 2)


LAUNCH_AND_BE_KILLED: Final = """
import asyncio, os, signal, sys
from tests.system.test_launcher import FAKES, LIMITS, NotingPools, deployment
from orchestrator.launcher import Launcher

async def main() -> None:
    pools = NotingPools()
    launcher = Launcher(deployment(), pools, limits=LIMITS, modules=FAKES, show=lambda _: None)
    async with asyncio.TaskGroup() as group:
        group.create_task(launcher.run(asyncio.Event()))
        await pools.until(lambda: pools.num_joined == 2)
        print(*[server["pid"] for server in launcher.describe()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_servers_die_with_an_orchestrator_that_is_killed() -> None:
    launching = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LAUNCH_AND_BE_KILLED, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(launching.communicate(), 150)
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    left = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(left, timeout=20)
    assert alive == []
