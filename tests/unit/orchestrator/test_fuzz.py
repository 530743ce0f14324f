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
NUM_ATTEMPTS: Final = 4
SUSPECTS_MAX: Final = 16
"""Bodies that are asked for again, alone."""
ALONE_S: Final = 120.0
"""For all of them."""
ANSWER_S: Final = 10.0
"""For one answer, whatever else is asked at the same time: no body costs more than that."""
ERROR_BYTES_MAX: Final = 2000
"""Of an answer that refuses: what a client wrote is quoted in part."""
TOLD_EVERY: Final = 2000


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 1000), *(pytest.param(seed, 20_000, marks=pytest.mark.soak) for seed in (2, 3, 4))]
)
@pytest.mark.timeout(900)
async def test_every_answer_is_good_or_names_the_field(seed: int, count: int) -> None:
    storm = Storm()
    drawn = probes(seed, count)
    longest_s = 0.0
    began_s = time.monotonic()
    async with front_door(num_tokens_max=96, num_generation=2) as door:
        while batch := list(itertools.islice(drawn, BATCH)):  # Drawn beforehand: that takes time too.
            longest_s = max(longest_s, await storm.shortest_stretch_s(door, batch))
            if storm.num_asked % TOLD_EVERY == 0:
                took_s = time.monotonic() - began_s
                tell(f"{storm.num_asked} bodies in {took_s:.0f} s, the slowest in {storm.slowest_s:.2f} s")
        blocking = await blocking_alone(door, storm.wall.suspects[:SUSPECTS_MAX])
        await door.wait_idle()
    wall, answers, wrong = storm.wall, storm.answers, storm.wrong
    tell(
        f"{count} bodies of seed {seed}: the loop computed for {1e3 * longest_s:.0f} ms at once "
        f"({storm.num_again} batches of {BATCH} were asked again), and was late by the clock for "
        f"{1e3 * wall.longest_s:.0f} ms; beside {len(wall.suspects)} bodies it was for {1e3 * BLOCKED_MAX_S:.0f} ms"
    )
    assert not blocking
    assert not wrong, f"{len(wrong)} of {count}: {[(p.path, p.body[:300], s, b[:300]) for p, s, b in wrong[:4]]}"
    assert answers[200] > count / 20, answers
    assert answers[400] > count / 5, answers
    assert longest_s < BLOCKED_MAX_S


class Storm:
    """Asks for bodies, several at a time, and keeps what is to be told of the answers."""

    def __init__(self) -> None:
        self.answers: collections.Counter[int] = collections.Counter()
        self.wrong: list[tuple[Probe, int, bytes]] = []
        self.wall = LoopWall[Probe](BLOCKED_MAX_S)
        self.num_asked = self.num_again = 0
        self.slowest_s = 0.0

    async def shortest_stretch_s(self, door: Door, batch: list[Probe]) -> float:
        """The longest that the loop computed at once. A batch is asked again where that is too long: the kernel counts
        what it does for others, too, but what a batch costs by itself it costs each time."""
        self.num_asked += len(batch)
        longest_s = await self._ask_all(door, batch)
        for _ in range(NUM_ATTEMPTS - 1):
            if longest_s < BLOCKED_MAX_S:
                break
            self.num_again += 1
            longest_s = min(longest_s, await self._ask_all(door, batch))
        return longest_s

    async def _ask_all(self, door: Door, batch: list[Probe]) -> float:
        waiting = iter(batch)
        with frozen_garbage(), LoopCpu() as loop_cpu, self.wall:
            async with asyncio.TaskGroup() as group:
                for _ in range(CONCURRENCY):
                    group.create_task(self._ask(door, waiting))
        return loop_cpu.longest_s

    async def _ask(self, door: Door, waiting: Iterator[Probe]) -> None:
        for probe in waiting:
            asked_s = time.monotonic()
            with self.wall.asking(probe):
                status, kind, body = await answer_to(door, probe)
            self.slowest_s = max(self.slowest_s, time.monotonic() - asked_s)
            self.answers[status] += 1
            if not is_sound(status, kind, body):
                self.wrong.append((probe, status, body))


def tell(line: str) -> None:
    sys.stdout.write(f"\n{line}")
    sys.stdout.flush()


async def answer_to(door: Door, probe: Probe) -> tuple[int, str, bytes]:
    try:
        async with (
            asyncio.timeout(ANSWER_S),
            door.http.post(door.url + probe.path, data=io.BytesIO(probe.body)) as answer,
        ):
            return answer.status, answer.content_type, await answer.read()
    except TimeoutError as error:
        shown = f"{probe.path}: {len(probe.body)} bytes, {probe.body[:300]!r}"
        raise AssertionError(f"no answer in {ANSWER_S:g} s to {shown}") from error


async def blocking_alone(door: Door, suspects: list[Probe]) -> list[tuple[Probe, float]]:
    """Those that make the loop late each time that they are asked for, with nothing beside them, and by how much."""
    found = []
    end_s = asyncio.get_running_loop().time() + ALONE_S
    for probe in suspects:

        async def ask(probe: Probe = probe) -> None:
            await answer_to(door, probe)

        with frozen_garbage():
            async with asyncio.timeout_at(end_s):
                lag_s = await shortest_lag_s(ask, BLOCKED_MAX_S)
        if lag_s >= BLOCKED_MAX_S:
            found.append((probe, lag_s))
    return found


def is_sound(status: int, content_type: str, body: bytes) -> bool:
    if status == 200:
        return b'"internal_error"' not in body
    if not 400 <= status < 500 or content_type != "application/json":
        return False
    if len(body) > ERROR_BYTES_MAX:
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
