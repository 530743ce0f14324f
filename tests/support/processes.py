"""One real server process in a test: started, waited for, watched, and gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

import psutil

ROOT: Final = pathlib.Path(__file__).parents[2]
READY: Final = re.compile(r"^READY (\w+) (\S+:\d+) (.*)$")
STOP_TIMEOUT_S: Final = 60.0
READY_TIMEOUT_S: Final = 200.0
"""Torch alone takes a second to load, and a quarter of a minute where six others compute on two cores."""


class ProcessFailed(AssertionError):
    """It did not start, or did not stop, as it should; the message carries everything it wrote."""


class ServerProcess:
    """A `python …` process. Made by `running()` or `spawned()`, which also end it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.role = ""
        self.address = ""
        self.ready_line = ""
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._reading: list[asyncio.Task[None]] = []
        self._spoke = asyncio.Condition()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def start_reading(self) -> None:
        """Its output is read all the time, or a full pipe would stop it."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        for stream, lines in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr)):
            self._reading.append(asyncio.create_task(self._read(stream, lines)))

    async def wait_ready(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                self.ready_line = await self.wait_line(READY)
        except TimeoutError as error:
            raise ProcessFailed(f"not ready after {timeout_s} s\n{self.words()}") from error
        match = READY.match(self.ready_line)
        assert match is not None
        self.role, self.address = match[1], match[2]

    async def wait_line(self, pattern: str | re.Pattern[str]) -> str:
        """The first line of its output, past or to come, in which `pattern` is found. The caller sets the deadline."""
        async with self._spoke:
            while True:
                for line in [*self.stdout, *self.stderr]:
                    if re.search(pattern, line):
                        return line
                if all(task.done() for task in self._reading):
                    raise ProcessFailed(
                        f"exit code {await self.process.wait()}, and never said {pattern}\n{self.words()}"
                    )
                await self._spoke.wait()

    async def wait_exit(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Its exit code, once all that it wrote is here."""
        try:
            async with asyncio.timeout(timeout_s):
                code = await self.process.wait()
                await asyncio.wait(self._reading)
        except TimeoutError as error:
            raise ProcessFailed(f"still there after {timeout_s} s\n{self.words()}") from error
        return code

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def words(self) -> str:
        return "\n".join(["--- stdout", *self.stdout, "--- stderr", *self.stderr])

    async def _read(self, stream: asyncio.StreamReader, lines: list[str]) -> None:
        try:
            async for line in stream:
                lines.append(line.decode(errors="replace").rstrip("\n"))
                async with self._spoke:
                    self._spoke.notify_all()
        finally:
            async with self._spoke:
                self._spoke.notify_all()


@contextlib.asynccontextmanager
async def spawned(*arguments: str, environ: Mapping[str, str] | None = None) -> AsyncIterator[ServerProcess]:
    """`python *arguments`, from the checkout. Killed at the end if it is still there; nobody waits for a ready line."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    server = ServerProcess(process)
    server.start_reading()
    try:
        yield server
    except Exception as error:
        error.add_note(f"{' '.join(arguments)}\n{server.words()}")
        raise
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await server.wait_exit()


@contextlib.asynccontextmanager
async def running(
    *arguments: str, environ: Mapping[str, str] | None = None, ready_timeout_s: float = READY_TIMEOUT_S
) -> AsyncIterator[ServerProcess]:
    """The same, ready to serve. Unless the test ends it itself, it gets SIGTERM and must exit with 0, childless."""
    async with all_running([arguments], environ=environ, ready_timeout_s=ready_timeout_s) as [server]:
        yield server


@contextlib.asynccontextmanager
async def all_running(
    commands: Sequence[Sequence[str]],
    *,
    environ: Mapping[str, str] | None = None,
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> AsyncIterator[list[ServerProcess]]:
    """Several at once: they start, and stop, side by side."""
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(spawned(*command, environ=environ)) for command in commands]
        for server in servers:
            await server.wait_ready(ready_timeout_s)
        yield servers
        left = [server for server in servers if server.process.returncode is None]
        children = [child for server in left for child in psutil.Process(server.pid).children(recursive=True)]
        for server in left:
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGTERM)
        for server in left:
            if code := await server.wait_exit():
                raise ProcessFailed(f"exit code {code} after SIGTERM\n{server.words()}")
        if orphans := [child for child in children if child.is_running()]:
            raise ProcessFailed(f"left behind: {orphans}")


def descendants(word: str, *, of: int | None = None) -> list[psutil.Process]:
    """Of this process, or of `of`: those that run, and have `word` in their command line."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # It has ended, and perhaps nobody has looked after it yet.
            if word in " ".join(child.cmdline()):
                found.append(child)
    return found
