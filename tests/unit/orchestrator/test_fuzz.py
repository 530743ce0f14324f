"""Bodies that are nearly right, over all endpoints: every answer is 2xx, or a 4xx that names the field."""

from __future__ import annotations

import asyncio
import collections
import io
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import orjson
import pytest

from disaggregated.errors import InvalidRequest
from orchestrator.api.fields import NESTING_MAX, Fields
from tests.support.front_door import Door, front_door
from tests.support.fuzz_bodies import GOOD, Probe, probes
from tests.support.loop_cpu import LoopCpu, frozen_garbage
from tests.support.loop_wall import LoopWall, shortest_lag_s

CONCURRENCY: Final = 8
BATCH: Final = 500
BLOCKED_MAX_S: Final = 0.05
SUSPECTS_MAX: Final = 16
"""Bodies that are asked for again, alone."""


@pytest.mark.parametrize(("seed", "count"), [(1, 1000), pytest.param(2, 20_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(3600)
async def test_every_answer_is_good_or_names_the_field(seed: int, count: int) -> None:
    answers: collections.Counter[int] = collections.Counter()
    wrong: list[tuple[Probe, int, bytes]] = []
    drawn = probes(seed, count)
    longest_s = 0.0
    wall = LoopWall[Probe](BLOCKED_MAX_S)

    async def ask(door: Door, waiting: Iterator[Probe]) -> None:
        for probe in waiting:
            with wall.asking(probe):
                status, kind, body = await answer_to(door, probe)
            answers[status] += 1
            if not is_sound(status, kind, body):
                wrong.append((probe, status, body))

    async with front_door(num_tokens_max=96, num_generation=2) as door:
        while batch := list(itertools.islice(drawn, BATCH)):  # Drawn beforehand: that takes time too.
            waiting = iter(batch)
            with frozen_garbage(), LoopCpu() as loop_cpu, wall:
                async with asyncio.TaskGroup() as group:
                    for _ in range(CONCURRENCY):
                        group.create_task(ask(door, waiting))
            longest_s = max(longest_s, loop_cpu.longest_s)
        blocking = await blocking_alone(door, wall.suspects[:SUSPECTS_MAX])
        await door.wait_idle()
    sys.stdout.write(
        f"\n{count} bodies: the loop computed for {1e3 * longest_s:.0f} ms at once, and was late by the clock for "
        f"{1e3 * wall.longest_s:.0f} ms; beside {len(wall.suspects)} bodies it was for {1e3 * BLOCKED_MAX_S:.0f} ms\n"
    )
    assert not blocking
    assert not wrong, f"{len(wrong)} of {count}: {[(p.path, p.body[:300], s, b[:300]) for p, s, b in wrong[:4]]}"
    assert answers[200] > count / 20, answers
    assert answers[400] > count / 5, answers
    assert longest_s < BLOCKED_MAX_S


async def answer_to(door: Door, probe: Probe) -> tuple[int, str, bytes]:
    async with door.http.post(door.url + probe.path, data=io.BytesIO(probe.body)) as answer:
        return answer.status, answer.content_type, await answer.read()


async def blocking_alone(door: Door, suspects: list[Probe]) -> list[tuple[Probe, float]]:
    """Those that make the loop late each time that they are asked for, with nothing beside them, and by how much."""
    found = []
    for probe in suspects:

        async def ask(probe: Probe = probe) -> None:
            await answer_to(door, probe)

        with frozen_garbage():
            lag_s = await shortest_lag_s(ask, BLOCKED_MAX_S)
        if lag_s >= BLOCKED_MAX_S:
            found.append((probe, lag_s))
    return found


def is_sound(status: int, content_type: str, body: bytes) -> bool:
    if status == 200:
        return b'"internal_error"' not in body
    if not 400 <= status < 500 or content_type != "application/json":
        return False
    error: dict[str, Any] = orjson.loads(body)["error"]
    names_nothing = error["message"].startswith("the body ")
    return set(error) >= {"message", "type", "param", "code"} and (names_nothing or bool(error["param"]))


async def test_the_bodies_that_are_mutated_are_good() -> None:
    async with front_door(num_tokens_max=1024) as door:
        for path, body in GOOD:
            async with door.http.post(door.url + path, json=body) as answer:
                assert answer.status == 200, (path, body, await answer.text())


def test_the_same_seed_draws_the_same_bodies() -> None:
    assert list(probes(5, 50)) == list(probes(5, 50))
    assert list(probes(5, 50)) != list(probes(6, 50))


@pytest.mark.parametrize("opener", ["[", '{"a":'])
def test_bodies_are_nested_up_to_the_limit_and_no_deeper(opener: str) -> None:
    closer = "]" if opener == "[" else "}"

    def nested(depth: int) -> bytes:
        return ('{"x":' + opener * (depth - 1) + "0" + closer * (depth - 1) + "}").encode()

    Fields.parse(nested(NESTING_MAX))
    with pytest.raises(InvalidRequest, match="nested deeper than 128 levels"):
        Fields.parse(nested(NESTING_MAX + 1))


def test_a_long_body_may_have_more_brackets_than_levels() -> None:
    assert len(Fields.parse(b'{"x":[' + b"[]," * 5000 + b"[]]}").values["x"]) == 5001


async def test_a_body_that_holds_up_the_loop_each_time_is_found_whatever_else_the_machine_does() -> None:
    async def blocks() -> None:
        await asyncio.sleep(0.02)
        end_s = time.thread_time() + 2 * BLOCKED_MAX_S
        while time.thread_time() < end_s:
            pass
        await asyncio.sleep(0.02)

    async def waits() -> None:
        await asyncio.sleep(0.02)

    with LoopWall[str](BLOCKED_MAX_S) as wall, wall.asking("beside"):
        with wall.asking("blocks"):
            await blocks()
        await waits()
    assert set(wall.suspects) >= {"beside"}
    assert await shortest_lag_s(blocks, BLOCKED_MAX_S) >= BLOCKED_MAX_S
    assert await shortest_lag_s(waits, BLOCKED_MAX_S) < BLOCKED_MAX_S
