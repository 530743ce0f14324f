"""Five times too much over real HTTP: the goodput stays, and who is refused is told when to come back."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.support.fake_cluster import Temper
from tests.support.front_door import Door, front_door

TEXT: Final = "/v1/completions"
TEMPER: Final = Temper(latency_s=0.0, step_s=0.02, prefill_token_s=0.0, max_batch_size=8)
TIMEOUT_S: Final = 1.5
CAPACITY: Final = 18.0
"""Requests a second: eight rows, twenty steps each of twenty milliseconds and a little more."""


@dataclasses.dataclass
class Tally:
    statuses: Counter[int] = dataclasses.field(default_factory=Counter)
    good: int = 0
    without_hint: int = 0


async def storm(door: Door, rate: float, seconds: float, chance: random.Random) -> Tally:
    """An open loop: clients come when they come."""
    tally = Tally()
    headers = {"x-request-timeout": str(TIMEOUT_S)}

    async def ask(number: int) -> None:
        body: dict[str, Any] = {
            "model": "fake", "prompt": f"hello {number}", "max_tokens": chance.choice([10, 20, 30]), "ignore_eos": True,
        }  # fmt: skip
        began_s = time.monotonic()
        async with door.http.post(door.url + TEXT, json=body, headers=headers) as answer:
            await answer.read()
        tally.statuses[answer.status] += 1
        tally.good += answer.status == 200 and time.monotonic() - began_s <= TIMEOUT_S
        tally.without_hint += answer.status in (429, 503) and "Retry-After" not in answer.headers

    end_s = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        number = 0
        while time.monotonic() < end_s:
            group.create_task(ask(number))
            number += 1
            await asyncio.sleep(chance.expovariate(rate))
    return tally


@pytest.mark.soak
async def test_five_times_too_much_leaves_nine_tenths_of_the_best_goodput(
    record_property: Callable[[str, object], None],
) -> None:
    chance = random.Random(3)
    seconds = 10.0
    async with front_door(temper=TEMPER) as door:
        best = 0.0
        for load in (0.8, 1.0, 1.2):
            best = max(best, (await storm(door, load * CAPACITY, seconds, chance)).good / seconds)
        tally = await storm(door, 5 * CAPACITY, seconds, chance)
        await door.wait_idle()
    goodput = tally.good / seconds
    record_property("best_goodput", best)
    record_property("goodput", goodput)
    assert goodput >= 0.9 * best
    assert tally.without_hint == 0
    assert set(tally.statuses) <= {200, 429, 503, 504}
