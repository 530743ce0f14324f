"""Whole clusters in virtual time: whatever the servers do, each request has one outcome and the right tokens."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.dispatch_scene import Scene, scene
from tests.support.fake_cluster import FakeCluster, Temper
from tests.support.virtual_time import run_in_virtual_time


async def _misbehave(cluster: FakeCluster, until_s: float) -> None:
    """Crashes and freezes, one server at a time; everybody is well again at the end."""
    chance = cluster.random
    loop = asyncio.get_running_loop()
    while loop.time() < until_s:
        await asyncio.sleep(chance.uniform(0.1, 2.5))
        victim = chance.choice(list(cluster.servers.values()))
        if chance.random() < 0.5:
            victim.crash()
            await asyncio.sleep(chance.uniform(0.0, 1.5))
            victim.restart()
        else:
            victim.thawed.clear()
            await asyncio.sleep(chance.uniform(0.05, 3.0))
            victim.thawed.set()


async def _one_of_many(stage: Scene, number: int, outcomes: list[str]) -> None:
    chance = stage.cluster.random
    await asyncio.sleep(chance.uniform(0.0, 6.0))
    num_prompt = chance.choice([1, 15, 16, 17, 60, 300])
    logprobs = (None, 0, 2)[number % 3]
    request = stage.request(
        number, num_prompt=num_prompt, max_tokens=chance.choice([1, 2, 3, 20, 120]), logprobs=logprobs
    )
    work = asyncio.create_task(stage.serve(request))
    if chance.random() < 0.2:
        await asyncio.wait([work], timeout=chance.uniform(0.0, 1.0))
        work.cancel()
    await asyncio.wait([work])
    outcomes.append("cancelled" if work.cancelled() else "failed" if work.exception() else "finished")


async def _chaos(seed: int, num_requests: int) -> None:
    """The seed also draws the shape: 0 to 3 context servers, 1 to 3 generation servers, local prefill or none, and
    whether a step brings a sequence one token or several."""
    temper = Temper(refusal=0.05, damaged_transfer=0.03, max_batch_size=6, tokens_a_step_max=1 + seed % 2 * 4)
    cluster = FakeCluster(seed, num_context=seed % 4, num_generation=1 + seed % 3, temper=temper)
    outcomes: list[str] = []
    async with scene(cluster, max_local_prefill_length=(0, 0, 20)[seed % 5 % 3]) as stage:
        async with asyncio.TaskGroup() as group:
            group.create_task(_misbehave(cluster, until_s=8.0))
            for number in range(num_requests):
                group.create_task(_one_of_many(stage, number, outcomes))
        assert len(stage.observer.stories) == num_requests
        assert "failed" not in outcomes, [story.error for story in stage.observer.stories if story.error]
        await stage.check_nothing_left()


@pytest.mark.parametrize("first_seed", range(0, 100, 10))
def test_no_request_is_lost_whatever_the_servers_do(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 10):
        try:
            run_in_virtual_time(_chaos(seed, num_requests=12))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first_seed", range(1000, 21000, 1000))
def test_no_request_is_lost_in_twenty_thousand_seeds(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 1000):
        run_in_virtual_time(_chaos(seed, num_requests=12))
