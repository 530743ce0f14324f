"""Many waits of one length, and one timer for all of them; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from orchestrator.overdue import Overdue
from tests.support.virtual_time import run_in_virtual_time

Play = Callable[[Overdue[str], list[tuple[str, float]]], Awaitable[None]]


def play(scene: Play) -> list[tuple[str, float]]:
    """Who was late, and when that was noticed. Everything waits for 10 s."""
    late: list[tuple[str, float]] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        overdue: Overdue[str] = Overdue(10.0, lambda name: late.append((name, round(loop.time() - begin_s, 6))))
        await scene(overdue, late)
        overdue.close()

    run_in_virtual_time(work())
    return late


def test_each_is_late_at_its_own_time_and_what_came_is_not() -> None:
    async def scene(overdue: Overdue[str], _: list[tuple[str, float]]) -> None:
        for name in ("a", "b", "c", "d"):
            overdue.expect(name)
            await asyncio.sleep(3.0)
        assert overdue.came("c")
        assert not overdue.came("c")
        await asyncio.sleep(60.0)
        assert not any(name in overdue for name in "abcd")

    assert play(scene) == [("a", 10.0), ("b", 13.0), ("d", 19.0)]


def test_what_is_awaited_again_has_its_whole_time_again() -> None:
    async def scene(overdue: Overdue[str], _: list[tuple[str, float]]) -> None:
        overdue.expect("a")
        await asyncio.sleep(9.0)
        assert overdue.came("a")
        overdue.expect("a")
        await asyncio.sleep(60.0)

    assert play(scene) == [("a", 19.0)]


def test_one_that_is_late_may_end_the_wait_for_another() -> None:
    async def work() -> list[str]:
        late: list[str] = []

        def told(name: str) -> None:
            late.append(name)
            overdue.came("b")

        overdue: Overdue[str] = Overdue(10.0, told)
        overdue.expect("a")
        overdue.expect("b")
        await asyncio.sleep(30.0)
        return late

    assert run_in_virtual_time(work()) == ["a"]


def test_after_the_close_nobody_is_late_and_it_may_be_used_again() -> None:
    async def scene(overdue: Overdue[str], late: list[tuple[str, float]]) -> None:
        overdue.expect("a")
        overdue.close()
        await asyncio.sleep(20.0)
        assert not late
        overdue.expect("b")
        await asyncio.sleep(20.0)

    assert play(scene) == [("b", 30.0)]
