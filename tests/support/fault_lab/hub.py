"""Where the lab talks to its actors: it listens, they dial, and every call has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvtransfer.transports import mpirun
from tests.support.fault_lab.actor import LINE_BYTES_MAX

CALL_TIMEOUT_S: Final = 15.0
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 5.0
ROOT: Final = Path(__file__).parents[3]


class ActorLost(Exception):
    """It was killed, or has hung up."""


class Actor:
    """One process, as the lab sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, told: Mapping[str, Any]) -> None:
        self.told = told
        self.pid: int = told["pid"]
        self._writer = writer
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._listening = asyncio.create_task(self._listen(reader))

    async def call(self, command: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps([number, command, *arguments]).encode() + b"\n")
        if self._listening.done():
            raise ActorLost(command)
        async with asyncio.timeout(timeout_s):
            return await answer

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def close(self) -> None:
        self._listening.cancel()
        self._writer.close()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                number, answer, mistake = json.loads(line)
                waiting = self._answers.pop(number)
                if waiting.done():
                    continue
                if mistake:
                    waiting.set_exception(AssertionError(mistake))
                else:
                    waiting.set_result(answer)
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(ActorLost("it hung up"))
                waiting.exception()  # Whoever waits hears it; if nobody does, that is no news.


async def ended(child: asyncio.subprocess.Process) -> None:
    """SIGTERM first: an mpirun that is killed leaves behind what it has started."""
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()


class Hub:
    """Starts actors and finds out which connection is whose."""

    def __init__(self) -> None:
        self._arrived: dict[str, asyncio.Future[Actor]] = {}
        self._children: list[asyncio.subprocess.Process] = []
        self._server: asyncio.Server | None = None
        self._port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=LINE_BYTES_MAX)
        self._port = self._server.sockets[0].getsockname()[1]

    def command(self, name: str, settings: Mapping[str, Any]) -> list[str]:
        """What starts an actor of that name."""
        self._arrived[name] = asyncio.get_running_loop().create_future()
        module = "tests.support.fault_lab.actor"
        return [sys.executable, "-m", module, str(self._port), name, json.dumps(settings)]

    async def run(self, command: Sequence[str]) -> asyncio.subprocess.Process:
        environ = {**os.environ, **mpirun.LOOPBACK_ONLY}
        child = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, cwd=ROOT, env=environ)
        self._children.append(child)
        return child

    async def actor(self, name: str) -> Actor:
        async with asyncio.timeout(START_TIMEOUT_S):
            return await self._arrived[name]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for child in self._children:
            if child.returncode is None:
                await ended(child)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told = json.loads(await reader.readline())
        self._arrived[told["name"]].set_result(Actor(reader, writer, told))


@contextlib.asynccontextmanager
async def hub() -> AsyncIterator[Hub]:
    made = Hub()
    await made.start()
    try:
        yield made
    finally:
        await made.close()
