"""One orchestrator process from its first port to its last child: what `disaggregated -c FILE` does.

The port is taken first, then the servers are started, then HTTP answers (503 until a request can be served). On Ctrl-C
the order is reversed: nothing new is accepted, requests under way may end, the servers are stopped. A second one kills.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Final

import uvloop

from disaggregated import logs
from disaggregated.config.deployment import DeploymentConfig
from disaggregated.config.one_line import EXIT_INTERRUPTED
from disaggregated.security import membership
from disaggregated.security.secret import ClusterSecret
from orchestrator.admission.http_tls import front_door_tls
from orchestrator.app import DOOR, make_app
from orchestrator.http.port import PublicPort
from orchestrator.launcher import Launcher, limits_of
from orchestrator.listening import address_of, listen
from orchestrator.served_model import ServedModel
from orchestrator.server_pools import ServerPools
from orchestrator.start_checks import check_start
from orchestrator.totals_log import totals_logged

log = logs.get(__name__)

REQUESTS_TIMEOUT_S: Final = 2.5
"""For the requests under way at Ctrl-C; the rest are told that the orchestrator is stopping."""
CONNECTIONS_TIMEOUT_S: Final = 0.25
"""For clients to take their last bytes."""
SERVERS_TIMEOUT_S: Final = 1.5
"""For the servers after that, before they are killed."""
ALLOCATIONS_BETWEEN_COLLECTIONS: Final = 20_000
"""Objects; a request makes some hundred, and frees nearly all of them."""


OnListening = Callable[[str], object]
"""Told the address, "host:port", once HTTP answers there."""


def run(config: DeploymentConfig, *, on_listening: OnListening = lambda address: None) -> int:
    """Serves until SIGINT or SIGTERM. Raises StartupError when it cannot start; nothing is left running then."""
    otherwise = check_start(config)
    logs.configure("orchestrator", level=config.log_level)
    for note in config.notes:
        log.info("config_note", note=note)
    for note in otherwise:
        log.warning("config_note", note=note)
    join_deployment(config)
    if config.door.num_workers > 1:
        from orchestrator.workers.supervisor import run_workers  # which serves in the same way, and needs this module

        run_workers(config, on_listening)
        return 0
    with contextlib.closing(listen(config.hostname, config.port)) as listener:
        uvloop.run(_serve(config, listener, on_listening))
    return 0


def join_deployment(config: DeploymentConfig) -> None:
    """Become a member of the deployment; of a new one, with a secret of its own, where we start every server.

    Servers that run already have the secret that their operator gave them, or none: those we cannot give one.
    Raises ConfigError when the secret or a certificate that was named cannot be used.
    """
    security = config.security
    ours = membership.join_as_told(
        secret_file=security.cluster_secret_file, key=security.internal_request_auth_key, tls=security.tls
    )
    if not ours.secret.is_open:
        return
    if config.context.urls or config.generation.urls:
        log.warning("cluster_secret_missing", so="calls to the servers are not authenticated; docs/security.md")
    else:
        membership.join(dataclasses.replace(ours, secret=ClusterSecret.random()))


async def _serve(config: DeploymentConfig, listener: socket.socket, on_listening: OnListening) -> None:
    pools = ServerPools(config)
    launcher = Launcher(config, pools, limits=limits_of(config, stop_timeout_s=SERVERS_TIMEOUT_S))
    asked_to_stop, requests_gone = asyncio.Event(), asyncio.Event()
    with signals(asked_to_stop, launcher.kill_all):
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(launcher.run(requests_gone))
                await _answer(config, listener, pools, launcher, asked_to_stop, on_listening=on_listening)
                requests_gone.set()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures


async def _answer(
    config: DeploymentConfig,
    listener: socket.socket,
    pools: ServerPools,
    launcher: Launcher,
    asked_to_stop: asyncio.Event,
    *,
    on_listening: OnListening,
) -> None:
    """HTTP from here until `asked_to_stop`, and then for as long as requests need, within REQUESTS_TIMEOUT_S."""
    model = await asyncio.to_thread(ServedModel.load, config.model) if config.model and launcher.has_work else None
    app = make_app(config, pools, model=model, scaler=launcher)
    port = PublicPort(app, app[DOOR], shutdown_timeout_s=CONNECTIONS_TIMEOUT_S)
    try:
        await port.open(listener, tls=front_door_tls(config.door))
        freeze_start_up_objects()
        sys.stdout.write(f"READY orchestrator {address_of(listener)} model={config.model or 'of its servers'}\n")
        sys.stdout.flush()
        on_listening(address_of(listener))
        async with totals_logged(app[DOOR].metrics.totals, config.metrics_log_interval_s):
            await asked_to_stop.wait()
        log.info("stopping", requests_timeout_s=REQUESTS_TIMEOUT_S)
        await app[DOOR].stop(timeout_s=REQUESTS_TIMEOUT_S)
    finally:
        await port.close()


def freeze_start_up_objects() -> None:
    """What lives as long as the process need not be looked at by every collection; and as what a request leaves is
    freed without one, they need not be as many as Python thinks."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS_BETWEEN_COLLECTIONS)


@contextlib.contextmanager
def signals(asked_to_stop: asyncio.Event, kill_all: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks to stop; the second one kills what we started and ends at once."""

    def heard() -> None:
        if asked_to_stop.is_set():
            kill_all()
            os._exit(EXIT_INTERRUPTED)
        asked_to_stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heard)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
