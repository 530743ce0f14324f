"""Many times more is asked for than can be done: what is served is served in time, and who is refused is told truly.

Arrivals are an open loop, drawn from the seed: clients do not wait for one another, and do not go away because it is
slow. A request counts as good when its last token came within the time that its client gave it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
from collections import Counter
from typing import Final

import msgspec
import pytest

from disaggregated.errors import AdmissionError, DisaggregatedError, Overloaded, QueueFull
from orchestrator.admission.ticket import Objectives, Ticket
from orchestrator.request_run import TokenRequest
from tests.support.dispatch_scene import Client, Scene, scene
from tests.support.fake_cluster import FakeCluster, Temper
from tests.support.virtual_time import run_in_virtual_time

SECONDS: Final = 8.0
TIMEOUT_S: Final = 1.0
CAPACITY: Final = 30.0
"""Requests a second that the cluster below can do, about."""


@dataclasses.dataclass
class Tally:
    good: int = 0
    begun_in_vain: int = 0
    """Dispatched, and not finished in time."""
    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    without_hint: int = 0
    """Refused for the load, and not told when to come back."""
    asked: Counter[str] = dataclasses.field(default_factory=Counter)
    by_tenant: Counter[str] = dataclasses.field(default_factory=Counter)
    tokens: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def goodput(self) -> float:
        return self.good / SECONDS


async def ask(stage: Scene, number: int, tally: Tally, chance: random.Random, ticket: Ticket) -> None:
    num_prompt, max_tokens = chance.choice([20, 40, 90]), chance.choice([10, 20, 30])
    request = stage.request(number, num_prompt=num_prompt, timeout_s=TIMEOUT_S, max_tokens=max_tokens)
    request = msgspec.structs.replace(request, ticket=ticket)
    try:
        await stage.dispatcher.run(request, Client(request))
        tally.good += 1
        tally.by_tenant[ticket.tenant] += 1
        tally.tokens[ticket.tenant] += num_prompt + max_tokens
    except DisaggregatedError as error:
        tally.refused[type(error).__name__] += 1
        tally.without_hint += isinstance(error, AdmissionError) and not error.retry_after_s
        story = stage.observer.stories[-1]
        tally.begun_in_vain += bool(story.attempts)


async def storm(seed: int, rate: float, *, tenants: dict[str, float] | None = None) -> Tally:
    """rate: requests a second; tenants: each one's part of them."""
    chance = random.Random(seed)
    cluster = FakeCluster(seed, num_context=1, num_generation=1, temper=Temper(max_batch_size=8))
    tally = Tally()
    shares = tenants or {"": 1.0}
    async with scene(cluster) as stage:
        loop = asyncio.get_running_loop()
        end_s, number = loop.time() + SECONDS, 0
        async with asyncio.TaskGroup() as group:
            while loop.time() < end_s:
                tenant = chance.choices(list(shares), list(shares.values()))[0]
                tally.asked[tenant] += 1
                group.create_task(ask(stage, number, tally, chance, Ticket(tenant=tenant)))
                number += 1
                await asyncio.sleep(chance.expovariate(rate))
        await stage.check_nothing_left()
    return tally


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 30))])
def test_five_times_too_much_leaves_nine_tenths_of_the_best_goodput(seed: int) -> None:
    best = max(run_in_virtual_time(storm(seed, rate * CAPACITY)).goodput for rate in (0.8, 1.0, 1.2))
    tally = run_in_virtual_time(storm(seed, 5 * CAPACITY))
    assert tally.goodput >= 0.9 * best, tally
    assert tally.without_hint == 0
    assert tally.begun_in_vain <= 0.1 * tally.good, "work that nobody waited for any more"


def test_a_flood_costs_a_small_tenant_nothing() -> None:
    tally = run_in_virtual_time(storm(7, 5 * CAPACITY, tenants={"flood": 0.95, "small": 0.05}))
    assert tally.by_tenant["small"] >= 0.95 * tally.asked["small"], tally
    assert tally.by_tenant["flood"] >= 0.6 * CAPACITY * SECONDS, "what the small one leaves is the flood's"


def test_two_tenants_who_both_ask_for_too_much_get_as_many_tokens_each() -> None:
    tally = run_in_virtual_time(storm(8, 6 * CAPACITY, tenants={"many": 0.75, "fewer": 0.25}))
    assert tally.tokens["many"] == pytest.approx(tally.tokens["fewer"], rel=0.15), tally


async def come_back_as_told(stage: Scene, number: int, tries: list[int]) -> None:
    for num_tries in range(1, 30):
        request = stage.request(number, timeout_s=2 * TIMEOUT_S)
        try:
            await stage.dispatcher.run(request, Client(request))
        except AdmissionError as error:
            await asyncio.sleep(error.retry_after_s or math.inf)
        else:
            tries.append(num_tries)
            return
    raise AssertionError("it was sent away again and again")


def test_clients_who_come_back_when_they_are_told_to_are_served_in_a_few_tries() -> None:
    async def play() -> list[int]:
        cluster = FakeCluster(5, num_context=1, num_generation=1, temper=Temper(max_batch_size=8))
        tries: list[int] = []
        async with scene(cluster) as stage:
            async with asyncio.TaskGroup() as warm_up:
                for number in range(16):
                    warm_up.create_task(stage.serve(stage.request(number)))
            async with asyncio.TaskGroup() as group:
                for number in range(400):
                    group.create_task(come_back_as_told(stage, number, tries))
            await stage.check_nothing_left()
        return tries

    tries = run_in_virtual_time(play())
    assert len(tries) == 400
    assert sum(tries) / len(tries) <= 2.5, sorted(tries)


def test_a_first_token_that_cannot_come_in_time_is_not_waited_for() -> None:
    async def play() -> None:
        cluster = FakeCluster(6, num_context=1, num_generation=1, temper=Temper(max_batch_size=2))
        async with scene(cluster) as stage:
            for number in range(16):
                await stage.serve(stage.request(number))
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(stage.serve(stage.request(n, max_tokens=100))) for n in range(6)]
                await asyncio.sleep(0.1)
                ticket = Ticket(objectives=Objectives(ttft_s=0.5))
                request = msgspec.structs.replace(stage.request(99), ticket=ticket)
                began_s = asyncio.get_running_loop().time()
                with pytest.raises(Overloaded, match="it would be served too late"):
                    await stage.dispatcher.run(request, Client(request))
                assert asyncio.get_running_loop().time() - began_s <= 0.8, "it is told about when it is too late"
            assert all(task.result()[0].reason for task in running)
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_in_a_full_queue_the_last_of_the_flood_makes_way_for_another_tenant() -> None:
    async def play() -> None:
        cluster = FakeCluster(7, num_context=1, num_generation=1, temper=Temper(max_batch_size=1))
        async with scene(cluster, queue_depth_max=4) as stage:

            def of(tenant: str, number: int) -> TokenRequest:
                return msgspec.structs.replace(stage.request(number), ticket=Ticket(tenant=tenant))

            tasks = []
            for number in range(5):
                request = of("flood", number)
                tasks.append(asyncio.create_task(stage.dispatcher.run(request, Client(request))))
                await asyncio.sleep(0.01)
            request = of("other", 9)
            await stage.dispatcher.run(request, Client(request))
            await asyncio.wait(tasks)
            errors = [task.exception() for task in tasks]
            assert [type(error) for error in errors] == [type(None)] * 4 + [QueueFull]
            assert isinstance(errors[4], QueueFull)
            assert errors[4].retry_after_s is not None
            await stage.check_nothing_left()

    run_in_virtual_time(play())
