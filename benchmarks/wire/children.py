"""Processes of a contender: each answers one line of JSON with one line of JSON, and ends with its input.

Everything else that a library prints goes to its standard error, and from there to a file that is shown when it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

ANSWER_TIMEOUT_S: Final = 120.0
ROOT: Final = pathlib.Path(__file__).parents[2]


class ChildFailed(RuntimeError):
    """With the end of what it wrote to its standard error."""


@dataclasses.dataclass(slots=True)
class Child:
    """Commands are answered in order."""

    running: asyncio.subprocess.Process
    errors: pathlib.Path

    @property
    def pid(self) -> int:
        return self.running.pid

    async def ask(self, *command: Any) -> Any:
        assert self.running.stdin is not None
        self.running.stdin.write(json.dumps(command).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> Any:
        assert self.running.stdout is not None
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await self.running.stdout.readline()
        if not line:
            raise ChildFailed(self.errors.read_text(errors="replace")[-2000:])
        return json.loads(line)


@contextlib.asynccontextmanager
async def child(
    *command: str | pathlib.Path, python: str | pathlib.Path = sys.executable, environ: Mapping[str, str] | None = None
) -> AsyncIterator[Child]:
    """`python *command`, from the repository's root; killed when the block is left."""
    with tempfile.NamedTemporaryFile(suffix=".log") as errors:
        running = await asyncio.create_subprocess_exec(
            *map(str, (python, *command)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
            env={**os.environ, **(environ or {})},
        )
        try:
            yield Child(running, pathlib.Path(errors.name))
        finally:
            if running.returncode is None:
                running.kill()
            await running.wait()


def obey(commands: Mapping[str, Callable[..., Any]], answers: int) -> None:
    """A child's main loop. `answers` is the descriptor that its standard output had when it began."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        say(answers, commands[name](*arguments))


def say(answers: int, value: Any) -> None:
    os.write(answers, json.dumps(value).encode() + b"\n")


def keep_standard_output() -> int:
    """The descriptor for answers; whatever a library prints goes to standard error from here on."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers
