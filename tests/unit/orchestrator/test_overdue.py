"""Many waits of one length, and one timer for all of them; in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from orchestrator.overdue import SLACK_S, Overdue
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


def test_what_is_due_before_others_is_told_in_its_time_whatever_came_or_comes() -> None:
    async def scene(overdue: Overdue[str], late: list[tuple[str, float]]) -> None:
        overdue.expect("long", 100.0)
        overdue.expect("short", 2.0)
        overdue.expect("shorter", 1.0)
        overdue.expect("gone", 3.0)
        assert {name for name in ("long", "short", "gone") if name in overdue} == {"long", "short", "gone"}
        assert overdue.came("gone")
        assert not overdue.came("gone")
        await asyncio.sleep(50.0)
        assert overdue.came("long"), "it is not due yet"
        overdue.expect("soon", 5.0)
        await asyncio.sleep(200.0)
        assert not any(name in overdue for name in ("long", "short", "shorter", "gone", "soon"))

    assert play(scene) == [("shorter", 1.0), ("short", 2.0), ("soon", 55.0)]


def test_a_close_ends_the_waits_that_are_out_of_line_too() -> None:
    async def scene(overdue: Overdue[str], late: list[tuple[str, float]]) -> None:
        overdue.expect("long", 100.0)
        overdue.expect("short", 2.0)
        overdue.close()
        await asyncio.sleep(200.0)
        assert not late

    assert play(scene) == []


@pytest.mark.parametrize("seed", range(40))
def test_everybody_who_does_not_come_is_told_once_and_hardly_late(seed: int) -> None:
    chance = random.Random(seed)
    due: dict[str, float] = {}

    async def scene(overdue: Overdue[str], _: list[tuple[str, float]]) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for number in range(60):
            after_s = chance.choice((10.0, 10.0 - chance.random() / 200, chance.uniform(0.1, 30.0)))
            overdue.expect(str(number), after_s)
            due[str(number)] = loop.time() - began_s + after_s
            await asyncio.sleep(chance.choice((0.0, 0.003, chance.random())))
            if chance.random() < 0.4:
                came = str(chance.randrange(number + 1))
                if overdue.came(came):
                    del due[came]
        await asyncio.sleep(100.0)

    told = play(scene)
    assert {name for name, _ in told} == due.keys()
    assert len(told) == len(due)
    assert all(due[name] - 1e-5 <= when_s <= due[name] + SLACK_S + 1e-5 for name, when_s in told)
