"""A TCP relay that damages what flows from the source to the destination, at a byte that the test names."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from kvtransfer.deadline import Deadline
from kvtransfer.transport import EndpointStatistics, Offer, ReadGate, SourceEndpoint


@dataclasses.dataclass(slots=True)
class Fault:
    """What happens at byte `at` of all that the source sends; None: nothing ever does."""

    at: int | None = None
    flip: bool = False
    """One bit of that byte."""
    cut: bool = False
    """The connection ends before that byte."""
    stall: bool = False
    """That byte and all later ones wait until `may_go_on`."""
    reached: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    may_go_on: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class FaultProxy:
    """Relays every connection to `host:port`; its own port is `port`."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._target: tuple[str, int] | None = None
        self._passed = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    def relay_to(self, host: str, port: int) -> None:
        self._target = (host, port)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self._fault.may_go_on.set()
        for task in tuple(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert self._target is not None
        self._tasks.add(task)
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        try:
            async with asyncio.TaskGroup() as group:
                forth = group.create_task(_pump(reader, upstream_writer))
                await self._damage(upstream_reader, writer)
                forth.cancel()
        except* OSError:
            pass  # Either side may go at any time.
        finally:
            writer.close()
            upstream_writer.close()
            self._tasks.discard(task)

    async def _damage(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self._fault
        while piece := await reader.read(65536):
            begin, self._passed = self._passed, self._passed + len(piece)
            if fault.at is not None and begin <= fault.at < self._passed:
                where = fault.at - begin
                writer.write(piece[:where])
                await writer.drain()
                fault.reached.set()
                if fault.cut:
                    return
                if fault.stall:
                    await fault.may_go_on.wait()
                damaged = bytearray(piece[where:])
                damaged[0] ^= fault.flip
                piece = bytes(damaged)
            writer.write(piece)
            await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    writer.close()


class ProxiedEndpoint:
    """A TCP endpoint whose offer leads through a proxy."""

    def __init__(self, endpoint: SourceEndpoint, proxy: FaultProxy) -> None:
        self._endpoint = endpoint
        self._proxy = proxy
        self.name = endpoint.name

    def start(self, gate: ReadGate) -> None:
        self._endpoint.start(gate)
        host, _, port = self._endpoint.describe().split()[0].rpartition(":")
        self._proxy.relay_to(host, int(port))

    def describe(self) -> Offer:
        secret = self._endpoint.describe().split()[1]
        return Offer(name=self.name, address=f"127.0.0.1:{self._proxy.port}/{secret.hex()}")

    def close(self, *, deadline: Deadline) -> None:
        self._endpoint.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._endpoint.statistics()


@contextlib.asynccontextmanager
async def proxied(endpoint: SourceEndpoint, fault: Fault) -> AsyncIterator[ProxiedEndpoint]:
    proxy = FaultProxy(fault)
    await proxy.start()
    try:
        yield ProxiedEndpoint(endpoint, proxy)
    finally:
        await proxy.close()
