"""`disaggregated -c FILE` with `num_workers` above 1: starts servers and workers, and answers no client itself."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvloop
from aiohttp import web

from disaggregated import logs
from disaggregated.config.deployment import DeploymentConfig
from disaggregated.errors import StartupError
from disaggregated.security import membership
from orchestrator.api.error_body import json_response
from orchestrator.launcher import Launcher, limits_of
from orchestrator.listening import address_of
from orchestrator.run import SERVERS_TIMEOUT_S, OnListening, signals
from orchestrator.workers.crew import Crew, orders_of
from orchestrator.workers.orders import SUPERVISOR_SOCKET, Orders
from orchestrator.workers.private_app import errors_answered
from orchestrator.workers.shared_levels import make_levels_memory
from orchestrator.workers.worker import reserve

log = logs.get(__name__)


def run_workers(config: DeploymentConfig, on_listening: OnListening) -> None:
    """Serves until SIGINT or SIGTERM. The process is a member of its deployment already.

    Raises StartupError when it cannot start; nothing is left running then.
    """
    levels_fd = make_levels_memory()
    try:
        with (
            contextlib.closing(reserve(config.hostname, config.port)) as port,
            tempfile.TemporaryDirectory(prefix="disagg-", ignore_cleanup_errors=True) as folder,
        ):
            config = dataclasses.replace(config, port=port.getsockname()[1])
            first = Orders(index=0, config=config, folder=Path(folder), levels_fd=levels_fd)
            uvloop.run(_supervise(first, address_of(port), on_listening))
    finally:
        os.close(levels_fd)


async def _supervise(first: Orders, address: str, on_listening: OnListening) -> None:
    config = first.config
    environ = {**os.environ, **membership.of_this_process().secret.for_child()}
    crew = Crew(orders_of(first), environ)
    launcher = Launcher(config, crew, limits=limits_of(config, stop_timeout_s=SERVERS_TIMEOUT_S))
    crew.describe = launcher.describe
    asked_to_stop, requests_gone = asyncio.Event(), asyncio.Event()

    def kill_all() -> None:
        crew.kill_all()
        launcher.kill_all()

    with signals(asked_to_stop, kill_all):
        try:
            async with asyncio.TaskGroup() as group, _scaling(launcher, first.folder / SUPERVISOR_SOCKET):
                group.create_task(launcher.run(requests_gone))
                following = group.create_task(_follow(launcher, crew.changed))
                working = group.create_task(crew.run())
                await _ready(crew, config.server_start_timeout_s)
                sys.stdout.write(f"READY orchestrator {address} model={config.model or 'of its servers'}\n")
                sys.stdout.flush()
                on_listening(address)
                await asked_to_stop.wait()
                log.info("stopping", workers=config.door.num_workers)
                for task in (working, following):
                    task.cancel()
                await asyncio.wait([working, following])
                requests_gone.set()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        finally:
            kill_all()


async def _ready(crew: Crew, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await crew.wait_ready()
    except TimeoutError as error:
        raise StartupError(f"the workers were not ready after {timeout_s:g} s") from error


async def _follow(launcher: Launcher, changed: Callable[[], None]) -> None:
    """Tell the workers of every process that has another phase than before."""
    known: list[tuple[object, ...]] = []

    def is_new() -> bool:
        return _phases(launcher) != known

    while True:
        await launcher.wait_until(is_new)
        known[:] = _phases(launcher)
        changed()


def _phases(launcher: Launcher) -> list[tuple[object, ...]]:
    return [(each["name"], each["phase"], each["pid"], each["last_exit"]) for each in launcher.describe()]


@contextlib.asynccontextmanager
async def _scaling(launcher: Launcher, path: Path) -> AsyncIterator[None]:
    """Workers pass on here what clients ask of the launcher."""

    async def scale(http: web.Request) -> web.Response:
        body = await http.json()
        await launcher.scale(body["role"], body["count"])
        return json_response({})

    app = web.Application(middlewares=[errors_answered])
    app.router.add_post("/scale", scale)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.UnixSite(runner, path).start()
        yield
    finally:
        await runner.cleanup()
