"""The supervisor's crew with real worker processes, which have no front door and start at once."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.door import DoorConfig
from disaggregated.config.server import ServerConfig
from disaggregated.errors import ModelUnavailable
from orchestrator.workers import crew as crew_module
from orchestrator.workers.crew import Crew, orders_of
from orchestrator.workers.orders import Orders
from orchestrator.workers.shared_levels import make_levels_memory
from tests.support.processes import descendants

FAKE: Final = "tests.support.fake_worker"


def orders(folder: Path, levels_fd: int, model: str) -> Orders:
    pools = {
        role: PoolConfig(server=ServerConfig(model=model, role=role, host="127.0.0.1", port=0))
        for role in ("context", "generation")
    }
    config = DeploymentConfig(
        model=model, context=pools["context"], generation=pools["generation"], door=DoorConfig(num_workers=2)
    )
    return Orders(index=0, config=config, folder=folder, levels_fd=levels_fd)


def told(folder: Path, index: int) -> list[dict[str, Any]]:
    path = folder / f"told-{index}"
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def was_told(folder: Path, index: int, servers: list[list[str]]) -> bool:
    lines = told(folder, index)
    return bool(lines) and lines[-1]["servers"] == servers


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(100):
        while not condition():  # noqa: ASYNC110 - other processes tell us nothing
            await asyncio.sleep(0.02)


def pids() -> list[int]:
    return [child.pid for child in descendants(FAKE)]


@contextlib.asynccontextmanager
async def running(folder: Path, model: str = "well") -> AsyncIterator[Crew]:
    levels_fd = make_levels_memory()
    crew = Crew(orders_of(orders(folder, levels_fd, model)), dict(os.environ), module=FAKE, show=lambda _: None)
    work = asyncio.create_task(crew.run())
    try:
        async with asyncio.timeout(100):
            await crew.wait_ready()
        yield crew
    finally:
        work.cancel()
        await asyncio.wait([work])
        os.close(levels_fd)
    assert not pids(), "a worker was left behind"


async def test_every_worker_is_told_of_every_server_whenever_there_is_another(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        crew.describe = lambda: [{"name": "generation-0", "phase": "ready"}]
        crew.add("generation", "127.0.0.1:1")
        crew.add("context", "127.0.0.1:2")
        both = [["generation", "127.0.0.1:1"], ["context", "127.0.0.1:2"]]
        for index in range(2):
            await until(functools.partial(was_told, tmp_path, index, both))
            assert told(tmp_path, index)[-1]["processes"] == [{"name": "generation-0", "phase": "ready"}]
        await crew.remove("generation", "127.0.0.1:1")
        await until(functools.partial(was_told, tmp_path, 0, both[1:]))


async def test_a_worker_that_dies_is_started_again_and_told_everything_anew(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        crew.add("context", "127.0.0.1:2")
        await until(lambda: all(told(tmp_path, index) for index in range(2)))
        before = pids()
        for index in range(2):
            (tmp_path / f"told-{index}").unlink()
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: len(pids()) == 2 and pids() != before)
        await until(lambda: any(was_told(tmp_path, index, [["context", "127.0.0.1:2"]]) for index in range(2)))


async def test_what_a_server_still_has_when_it_is_drained_is_what_any_worker_hears(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        assert await crew.drain("context", "127.0.0.1:2", deadline_s=20.0) == 1, "worker 1 says one, worker 0 none"


async def test_workers_that_cannot_start_end_the_deployment_with_their_own_words(tmp_path: Path) -> None:
    levels_fd = make_levels_memory()
    try:
        crew = Crew(orders_of(orders(tmp_path, levels_fd, "crash")), dict(os.environ), module=FAKE, show=lambda _: None)
        async with asyncio.timeout(100):
            with pytest.raises(ModelUnavailable, match="it is a bad day"):
                await crew.run()
    finally:
        os.close(levels_fd)
    assert not pids()


async def test_a_worker_that_is_deaf_to_being_asked_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "STOP_TIMEOUT_S", 0.2)
    async with running(tmp_path, "stubborn"):
        assert len(pids()) == 2


async def test_all_are_killed_at_once_when_there_is_no_time(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        before = pids()
        crew.kill_all()
        await until(lambda: not set(before) & set(pids()))
