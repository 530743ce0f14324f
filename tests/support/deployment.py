"""A whole deployment as an operator starts it: `python -m orchestrator -c FILE`, real servers, a real port."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import aiohttp
import yaml

READY: Final = re.compile(r"^READY orchestrator (\S+:\d+)")
ROOT: Final = pathlib.Path(__file__).parents[2]


def is_idle(ledger: Mapping[str, Any]) -> bool:
    """Nobody waits, runs or holds a block, a lease or a transfer."""
    held = any(server["entries"] or "error" in server for server in ledger["servers"])
    return not (held or ledger["queued"] or ledger["running"] or ledger["shares"])


class DeploymentFailed(Exception):
    """It did not start, or did not stop, as it should; the message carries its last words."""


class Deployment:
    """One running orchestrator with the servers it started. Made by `deployed()`."""

    def __init__(self, process: asyncio.subprocess.Process, started_s: float) -> None:
        self.process = process
        self.started_s = started_s
        self.url = ""
        self.listening_after_s = 0.0
        self.healthy_after_s = 0.0
        self.output: collections.deque[str] = collections.deque(maxlen=400)

    @property
    def api(self) -> str:
        """What an OpenAI client takes as `base_url`."""
        return f"{self.url}/v1"

    async def get_json(self, path: str) -> Any:
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def wait_listening(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.output.append(line.decode(errors="replace").rstrip())
            if match := READY.match(self.output[-1]):
                self.url = f"http://{match[1]}"
                self.listening_after_s = time.monotonic() - self.started_s
                return
        raise DeploymentFailed(f"exit code {await self.process.wait()}:\n{self.last_words()}")

    async def wait_healthy(self) -> None:
        """Until the first 200 of /health. The caller sets the deadline."""
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{self.url}/health") as answer:
                        if answer.status == 200:
                            self.healthy_after_s = time.monotonic() - self.started_s
                            return
                if self.process.returncode is not None:
                    raise DeploymentFailed(f"exit code {self.process.returncode}:\n{self.last_words()}")
                await asyncio.sleep(0.02)

    async def keep_reading(self) -> None:
        """Its output must be read all the time, or a full pipe would stop it."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.output.append(line.decode(errors="replace").rstrip())

    async def wait_idle(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """The ledger once nobody holds anything, or as it is after `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        while True:
            ledger: dict[str, Any] = await self.get_json("/ledger")
            if is_idle(ledger) or time.monotonic() > end_s:
                return ledger
            await asyncio.sleep(0.02)

    async def stop(self, timeout_s: float = 60.0) -> float:
        """Ctrl-C; seconds until it was gone."""
        begin_s = time.monotonic()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(self.process.wait(), timeout_s)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
                raise DeploymentFailed(f"still there {timeout_s} s after Ctrl-C:\n{self.last_words()}") from None
        return time.monotonic() - begin_s

    def last_words(self) -> str:
        return "\n".join(self.output)


@contextlib.asynccontextmanager
async def started(
    folder: pathlib.Path,
    document: Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = 200.0,
) -> AsyncIterator[Deployment]:
    """Write `document` as a disagg-config.yml into `folder`, start it, wait until it listens; Ctrl-C at the end."""
    path = folder / "disagg-config.yml"
    path.write_text(yaml.safe_dump({"hostname": "127.0.0.1", "port": 0, **document}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orchestrator", "-c", str(path),
        cwd=ROOT, env={**os.environ, **(environ or {})},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, limit=1 << 20,
    )  # fmt: skip
    deployment = Deployment(process, time.monotonic())
    try:
        async with asyncio.timeout(timeout_s):
            await deployment.wait_listening()
        async with asyncio.TaskGroup() as group:
            group.create_task(deployment.keep_reading())
            try:
                yield deployment
            finally:
                await deployment.stop()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def deployed(
    folder: pathlib.Path,
    document: Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = 200.0,
) -> AsyncIterator[Deployment]:
    """The same, and wait until it is healthy."""
    async with started(folder, document, environ=environ, timeout_s=timeout_s) as deployment:
        try:
            async with asyncio.timeout(timeout_s):
                await deployment.wait_healthy()
        except TimeoutError as error:
            raise DeploymentFailed(f"not healthy after {timeout_s} s:\n{deployment.last_words()}") from error
        yield deployment
