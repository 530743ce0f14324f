"""One server process that belongs to this orchestrator: started, read line by line, and never left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from disaggregated.config.server import ServerConfig
from disaggregated.config.server_cli import to_arguments
from disaggregated.parent_death import PARENT_PID

READY_LINE: Final = re.compile(r"^READY (?:context|generation) (\S+:\d+)\b")
MODULES: Final[Mapping[str, str]] = {"context": "context_server", "generation": "generation_server"}
"""What `python -m` runs for a role."""
_LINE_BYTES_MAX: Final = 16 << 10
_CODE_FOLDER: Final = str(Path(__file__).parents[1])


class ServerChild:
    """Owns one process. `last_words` are its latest lines, for the message when it cannot start."""

    def __init__(self, name: str, child: asyncio.subprocess.Process) -> None:
        self.name = name
        self.last_words: deque[str] = deque(maxlen=20)
        self._child = child

    @classmethod
    async def start(cls, name: str, module: str, config: ServerConfig, environ: Mapping[str, str]) -> ServerChild:
        return await cls.spawn(name, ["-m", module, *to_arguments(config)], environ)

    @classmethod
    async def spawn(
        cls,
        name: str,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        *,
        told: bytes = b"",
        pass_fds: Sequence[int] = (),
    ) -> ServerChild:
        """Our Python with `arguments`; `told` is what it reads on its standard input.

        The process has a session of its own, so that a Ctrl-C in the terminal reaches only the orchestrator.
        """
        folders = [_CODE_FOLDER, *filter(None, [environ.get("PYTHONPATH")])]
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.PIPE if told else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={
                **environ,
                "PYTHONPATH": os.pathsep.join(folders),
                PARENT_PID: str(os.getpid()),
                "PYTHONUNBUFFERED": "1",
            },
            start_new_session=True,
            pass_fds=pass_fds,
        )
        if child.stdin is not None:
            child.stdin.write(told)
            child.stdin.close()
        return cls(name, child)

    @property
    def pid(self) -> int:
        return self._child.pid

    async def next_line(self) -> str | None:
        """None when its output has ended. A line longer than a screenful comes in parts."""
        assert self._child.stdout is not None
        try:
            raw = await self._child.stdout.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            raw = error.partial
        except asyncio.LimitOverrunError:
            raw = await self._child.stdout.readexactly(_LINE_BYTES_MAX)
        if not raw:
            return None
        line = raw.decode(errors="replace").rstrip()
        self.last_words.append(line)
        return line

    async def wait(self) -> int:
        """Its exit code; negative for a signal."""
        return await self._child.wait()

    async def stop(self, *, timeout_s: float) -> None:
        """Gone when this returns, by itself within `timeout_s` or killed; also when the caller is cancelled."""
        self.terminate()
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait()
        except TimeoutError:
            pass
        finally:
            self.kill()
        await self.wait()

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._child.returncode is None:
            self._child.send_signal(number)
