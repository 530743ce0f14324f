"""One system under test: its processes started, waited for, looked at, and gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import aiohttp
import psutil

STOP_TIMEOUT_S: Final = 20.0
LOOK_EVERY_S: Final = 0.25
"""A foreign server says in its own words when it is ready; all that they share is HTTP to ask."""
CPU_SECONDS_MIN: Final = 0.5
"""A thread that has computed for less than this while starting is none of the engine's workers."""


class SystemFailed(Exception):
    """It did not start, or died; the message ends with its last words."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One process of a system."""

    words: Sequence[str]
    health_url: str
    """Answers 200 once it can serve."""
    cores: tuple[int, ...]
    """Where its threads should compute; the process is started with this affinity."""
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_checked: bool = True
    """Whether its threads are looked at: not so where the system deals cores out to processes of its own."""


def free_port() -> int:
    """Another process could take it before the server does, which would then fail to start, and say so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.asynccontextmanager
async def running(commands: Sequence[Command], logs: Path, *, start_timeout_s: float) -> AsyncIterator[list[str]]:
    """All of `commands`, healthy; yields remarks about where their threads were found. `logs` is a folder.

    Raises:
        SystemFailed: one was not healthy within `start_timeout_s`, or ended before.
    """
    async with contextlib.AsyncExitStack() as stack:
        processes = [
            await stack.enter_async_context(_process(command, logs / f"{index}.log"))
            for index, command in enumerate(commands)
        ]
        async with asyncio.timeout(start_timeout_s), asyncio.TaskGroup() as group:
            for index, (command, process) in enumerate(zip(commands, processes, strict=True)):
                group.create_task(_wait_healthy(command, process, logs / f"{index}.log"))
        remarks = []
        for command, process in zip(commands, processes, strict=True):
            if command.is_checked:
                remarks += put_threads_right(process.pid, command.cores)
        yield remarks


@contextlib.asynccontextmanager
async def _process(command: Command, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """In a session of its own, so that what it starts is stopped with it."""
    taskset = ["taskset", "--cpu-list", ",".join(map(str, command.cores))]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *taskset, *command.words, env={**os.environ, **command.environ}, stdin=asyncio.subprocess.DEVNULL,
            stdout=output, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _wait_healthy(command: Command, process: asyncio.subprocess.Process, log: Path) -> None:
    timeout = aiohttp.ClientTimeout(total=5.0)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(command.health_url) as answer:
                    if answer.status == 200:
                        return
            if process.returncode is not None:
                raise SystemFailed(f"exit code {process.returncode}: {last_words(log)}")
            await asyncio.sleep(LOOK_EVERY_S)


def last_words(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").splitlines()[-6:])[-1500:]


# Where threads run. vLLM's CPU build has been seen to bind a worker to the other server's core.


@dataclasses.dataclass(frozen=True, slots=True)
class Thread:
    thread_id: int
    cpu_s: float
    cores: frozenset[int]


def threads_of(pid: int) -> list[Thread]:
    """Of the process and everything below it, the busiest first."""
    found = []
    for process in _family(pid):
        for thread in process.threads():
            with contextlib.suppress(OSError):
                cores = frozenset(os.sched_getaffinity(thread.id))
                found.append(Thread(thread.id, thread.user_time + thread.system_time, cores))
    return sorted(found, key=lambda thread: -thread.cpu_s)


def _family(pid: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)


def put_threads_right(pid: int, cores: tuple[int, ...]) -> list[str]:
    """Every thread on `cores`, and no two of the busiest bound to the same one while another is free; what had to be
    changed, in words."""
    remarks = []
    threads = threads_of(pid)
    for thread in threads:
        if not thread.cores <= set(cores):
            os.sched_setaffinity(thread.thread_id, cores)
            remarks.append(f"a thread was bound to {sorted(thread.cores)}, not to {list(cores)}")
    workers = [t for t in threads if len(t.cores) == 1 and t.cpu_s > CPU_SECONDS_MIN][: len(cores)]
    if len(workers) == len(cores) > 1 and len({t.cores for t in workers}) < len(cores):
        for thread, core in zip(workers, cores, strict=True):
            os.sched_setaffinity(thread.thread_id, [core])
        remarks.append(f"{len(workers)} workers were bound to fewer cores than that")
    return remarks


def now() -> str:
    return time.strftime("%H:%M:%S")
