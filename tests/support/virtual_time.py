"""An event loop whose clock jumps: waiting takes no time, and a run is the same each time it is made."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(AssertionError):
    """Every task waits for another one, and no timer is set: without virtual time this would hang."""


class _JumpingSelector(selectors.DefaultSelector):
    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise Deadlock("nothing will ever happen again")
        if not ready and timeout is not None:
            self.now_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def sleep_through(self, seconds: float) -> None:
        """Time passes and nothing of this process runs, as when it is stopped or starved."""
        self._jumping.now_s += seconds


def run_in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end. What it leaves behind, a task or an exception that nobody looked at, fails the test."""
    unheard: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.get_loop().set_exception_handler(lambda _, problem: unheard.append(problem))
        result = runner.run(_alone(work))
    assert not unheard, f"nobody looked at: {unheard}"
    return result


async def _alone(work: Coroutine[Any, Any, T]) -> T:
    result = await work
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks were left behind: {[task.get_name() for task in left]}"
    return result
