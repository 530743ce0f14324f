"""The public port: connections of our own before an aiohttp application, and the end of both.

The application answers whatever a connection does not read itself. Its life is the port's: it is set up before the
first client is accepted, and cleaned up when the last one has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Final

from aiohttp import web

from orchestrator.api import bodies
from orchestrator.front_door import FrontDoor
from orchestrator.http.connection import Connection, WholeRequest
from orchestrator.http.edge import refuse, serve
from orchestrator.http.exchange import Rest
from orchestrator.http.other_reader import OtherReader
from orchestrator.listening import BACKLOG

SHUTDOWN_TIMEOUT_S: Final = 60.0
"""For requests under way when the port is closed; whoever closes it may be less patient."""
KEEPALIVE_S: Final = 60.0
"""A connection on which no whole head of a request has come for so long is closed."""
LOOKS_A_DEADLINE: Final = 16
"""All connections are looked at together, so many times in the shortest deadline: no request has a timer."""


class PublicPort:
    """Implements `Served`. Every one of its tasks works for a request under way on one of its connections."""

    def __init__(
        self, app: web.Application, door: FrontDoor, *, shutdown_timeout_s: float = SHUTDOWN_TIMEOUT_S
    ) -> None:
        """A client that hangs up cancels what is done for it here, and with it the work on every server."""
        self.outbox = door.outbox
        self.body_bytes_max = door.config.door.body_bytes_max
        self._door = door
        self._timeout_s = shutdown_timeout_s
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            shutdown_timeout=shutdown_timeout_s,
        )
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_emptied = asyncio.Event()
        """No connection is left; cleared whenever one comes."""
        self._listening: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Where it is open."""
        assert self._listening is not None, "it is not open"
        host, port, *_ = self._listening.sockets[0].getsockname()
        return host, port

    async def open(self, listener: socket.socket, *, tls: ssl.SSLContext | None = None) -> None:
        """Start the application and take clients."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(
            lambda: Connection(self, loop), sock=listener, ssl=tls, backlog=BACKLOG
        )
        self._look_later()

    async def close(self) -> None:
        """Take nobody any more, let those under way have their answers for a while, and end the application."""
        if self._listening is not None:
            self._listening.close()
            await asyncio.sleep(0)  # For who was accepted just now.
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._connections):
            connection.close_when_answered()
        await self._wait_gone()
        for connection in list(self._connections):
            connection.give_up()
        await self._wait_gone()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._timeout_s)
        await self._runner.cleanup()

    async def _wait_gone(self) -> None:
        if self._connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await self._has_emptied.wait()

    # What connections ask for.

    def came(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._has_emptied.clear()

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._has_emptied.set()

    def make_other(self) -> asyncio.Protocol:
        assert self._runner.server is not None, "it is not open"
        return OtherReader(self._runner.server, keepalive_s=KEEPALIVE_S)

    def serve(self, exchange: WholeRequest) -> None:
        rest = serve(self._door, exchange)
        if rest is not None:
            task = asyncio.get_running_loop().create_task(_finish(exchange, rest))
            exchange.on_gone = task.cancel
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def refuse(self, exchange: WholeRequest, error: Exception) -> None:
        refuse(self._door, exchange, error)

    # Deadlines.

    def _look_later(self) -> None:
        every_s = min(KEEPALIVE_S, bodies.BODY_TIMEOUT_S) / LOOKS_A_DEADLINE
        self._sweep = asyncio.get_running_loop().call_later(every_s, self._look)

    def _look(self) -> None:
        """Who has waited too long for a request, or for the rest of one, waits no longer."""
        now_s = asyncio.get_running_loop().time()
        for connection in [each for each in self._connections if each.is_waiting]:
            waited_s = connection.waited_s(now_s)
            if connection.waits_for_body and waited_s > bodies.BODY_TIMEOUT_S:
                connection.body_is_late(web.HTTPRequestTimeout())
            elif not connection.waits_for_body and waited_s > KEEPALIVE_S:
                connection.give_up()
        self._look_later()


async def _finish(exchange: WholeRequest, rest: Rest) -> None:
    try:
        await rest()
    except Exception as error:  # noqa: BLE001 - the process's edge: whoever gets it logs what is no error of a request
        exchange.refuse(error)
