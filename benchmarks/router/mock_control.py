"""How a benchmark drives a process of mock servers: lines of JSON on its standard input, one answer each.

["pace", step_s, tokens_per_step]     how fast they generate from now on
["cancelled"]                         when requests were cancelled, on the machine's monotonic clock, since last asked
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from typing import Any, Final, Protocol

FIRST_ID, LAST_ID = 1000, 5000
"""Ordinary tokens in SmolLM2's vocabulary: no control tokens, no single bytes; as many as a text has, not all."""
STEP_S: Final = 0.01


class Stepping(Protocol):
    def step(self, num_tokens: int) -> None:
        """Every sequence that runs gets so many tokens more."""


class Control:
    """The step rate of this process's mocks, and what they have noticed."""

    def __init__(self) -> None:
        self.step_s = STEP_S
        self.tokens_per_step = 1
        self._cancelled_s: list[float] = []
        self._tokens = itertools.cycle(random.Random(0).choices(range(FIRST_ID, LAST_ID), k=100_003))

    def next_token(self) -> int:
        return next(self._tokens)

    def cancelled(self) -> None:
        self._cancelled_s.append(time.monotonic())

    async def run_steps(self, servers: list[Stepping]) -> None:
        """Steps at fixed times; a late one does not delay those after it."""
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + self.step_s, time.monotonic() - self.step_s)
            await asyncio.sleep(due_s - time.monotonic())
            for server in servers:
                server.step(self.tokens_per_step)

    async def obey(self, ready: Any) -> None:
        """Say `ready`, then answer commands until the input ends."""
        loop = asyncio.get_running_loop()
        commands = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        _say(ready)
        while line := await commands.readline():
            name, *arguments = json.loads(line)
            _say(self._answer(name, arguments))

    def _answer(self, name: str, arguments: list[Any]) -> Any:
        match name, arguments:
            case "pace", [step_s, tokens_per_step]:
                self.step_s, self.tokens_per_step = step_s, tokens_per_step
                return None
            case "cancelled", []:
                times_s, self._cancelled_s = self._cancelled_s, []
                return times_s
        raise ValueError(f"unknown command {name}")


async def until_told(control: Control, ready: Any, servers: list[Stepping]) -> None:
    """The life of a mock process once its servers listen."""
    async with asyncio.TaskGroup() as group:
        stepping = group.create_task(control.run_steps(servers))
        await control.obey(ready)
        stepping.cancel()


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
