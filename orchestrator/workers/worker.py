"""One of several orchestrator processes: `python -m orchestrator.workers.worker`, started by the supervisor alone.

It listens once its model is loaded; which servers there are it is told as soon as it has said so.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator
from typing import Final

import uvloop
from aiohttp import web

from disaggregated import logs
from disaggregated.config.deployment import DeploymentConfig
from disaggregated.config.one_line import one_line_errors
from disaggregated.parent_death import die_with_parent
from orchestrator.admission.http_tls import front_door_tls
from orchestrator.app import DOOR, make_app
from orchestrator.http.port import PublicPort
from orchestrator.listening import address_of, listen
from orchestrator.run import CONNECTIONS_TIMEOUT_S, REQUESTS_TIMEOUT_S, freeze_start_up_objects, join_deployment
from orchestrator.served_model import ServedModel
from orchestrator.server_pools import ServerPools
from orchestrator.totals_log import totals_logged
from orchestrator.workers.asking import AskedSiblings
from orchestrator.workers.orders import SUPERVISOR_SOCKET, Orders
from orchestrator.workers.private_app import PrivateApp, RemoteScaler
from orchestrator.workers.shared_levels import SharedLevels

log = logs.get(__name__)

SCALE_TIMEOUT_S: Final = 3600.0
"""The launcher has a deadline of its own, which is shorter."""


def main() -> None:
    die_with_parent()
    orders = Orders.read(sys.stdin.buffer)
    logs.configure(f"orchestrator-{orders.index}", level=orders.config.log_level)
    join_deployment(orders.config)
    with one_line_errors(f"worker {orders.index}"):
        uvloop.run(_serve(orders))


async def _serve(orders: Orders) -> None:
    config = orders.config
    model = await asyncio.to_thread(ServedModel.load, config.model) if config.model else None
    scaler = RemoteScaler(orders.folder / SUPERVISOR_SOCKET, timeout_s=SCALE_TIMEOUT_S)
    with contextlib.closing(SharedLevels(orders.levels_fd)) as levels:
        app = make_app(
            config,
            ServerPools(config),
            model=model,
            scaler=scaler if _launches_some(config) else None,
            siblings=AskedSiblings(orders.index, orders.siblings),
            levels=levels,
        )
        asked_to_stop = _stop_signal()
        async with _answering(app, scaler, orders) as address:
            sys.stdout.write(f"READY worker {address}\n")
            sys.stdout.flush()
            async with totals_logged(app[DOOR].metrics.totals, config.metrics_log_interval_s):
                await asked_to_stop.wait()
            await app[DOOR].stop(timeout_s=REQUESTS_TIMEOUT_S)


@contextlib.asynccontextmanager
async def _answering(app: web.Application, scaler: RemoteScaler, orders: Orders) -> AsyncIterator[str]:
    """HTTP at the shared port, and to the supervisor and the siblings at our own socket."""
    config = orders.config
    public = PublicPort(app, app[DOOR], shutdown_timeout_s=CONNECTIONS_TIMEOUT_S)
    private = web.AppRunner(PrivateApp(app[DOOR], scaler).make(), access_log=None)
    await private.setup()
    try:
        path = orders.socket_of(orders.index)
        path.unlink(missing_ok=True)
        await web.UnixSite(private, path).start()
        with contextlib.closing(listen(config.hostname, config.port, shared=True)) as listener:
            await public.open(listener, tls=front_door_tls(config.door))
            freeze_start_up_objects()
            yield address_of(listener)
    finally:
        await public.close()
        await private.cleanup()


def _launches_some(config: DeploymentConfig) -> bool:
    return not (config.context.urls and config.generation.urls)


def _stop_signal() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


def reserve(hostname: str, port: int) -> socket.socket:
    """A socket with the port's number for our workers, which takes no connections itself.

    Raises PortTaken when somebody listens there; whoever comes later is refused once the first worker listens.
    """
    with contextlib.closing(listen(hostname, port)) as probe:
        port = probe.getsockname()[1]
    return listen(hostname, port, shared=True, accepts=False)


if __name__ == "__main__":
    main()
