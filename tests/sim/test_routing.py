"""Whole clusters in virtual time: what each way of routing does to the time that clients wait, and what it foresaw."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
from collections import Counter
from typing import Any

import pytest

from disaggregated.config.deployment import PoolConfig, RouterConfig
from disaggregated.config.server import ServerConfig
from disaggregated.sampling_params import SamplingParams
from orchestrator.request_run import TokenRequest
from orchestrator.routing.scorecard import cached_verdict
from orchestrator.story import RequestStory
from tests.support.dispatch_scene import Scene, scene
from tests.support.fake_cluster import FakeCluster, Temper
from tests.support.virtual_time import run_in_virtual_time

TEMPER = Temper(prefill_token_s=0.0005, step_s=0.01, max_batch_size=16, cache_blocks=250, prefills_in_turn=True)
NUM_TURNS = 4
FIRST_TURN, LATER_TURN, ANSWER = 400, 60, 20


def routed(cluster: FakeCluster, context: str, generation: str = "least_ttft", **args: Any) -> dict[str, PoolConfig]:
    """Both sections. Blocks are not brought back, so that what is cached is what was routed there."""
    transceiver = dataclasses.replace(ServerConfig(model="", role="").cache_transceiver_config, pull_back=False)
    return {
        role: PoolConfig(
            num_instances=len(cluster.of(role)),
            urls=tuple(server.address for server in cluster.of(role)),
            router=RouterConfig(type=kind, args=args),
            server=ServerConfig(model="fake", role=role, cache_transceiver_config=transceiver),
        )
        for role, kind in (("context", context), ("generation", generation))
    }


class Chats:
    """Conversations of several turns, each with pauses of its own, all at once."""

    def __init__(self, stage: Scene) -> None:
        self._stage = stage
        self._numbers = itertools.count()
        self.stories: list[RequestStory] = []

    async def play(self, count: int) -> None:
        async with asyncio.TaskGroup() as group:
            for chat in range(count):
                group.create_task(self._play(chat))

    async def _play(self, chat: int) -> None:
        dice = self._stage.cluster.random
        tokens = [(chat * 1009 + position * position) % 997 for position in range(FIRST_TURN)]
        await asyncio.sleep(dice.uniform(0.0, 4.0))
        for turn in range(NUM_TURNS):
            answer = await self.ask(tokens, session=f"chat-{chat}")
            tokens = [*tokens, *answer, *((chat * 31 + turn * 7 + position) % 991 for position in range(LATER_TURN))]
            await asyncio.sleep(dice.uniform(0.5, 4.0))

    async def ask(self, tokens: list[int], *, session: str = "", max_tokens: int = ANSWER) -> list[int]:
        now_s = asyncio.get_running_loop().time()
        number = next(self._numbers)
        request = TokenRequest(
            request_id=f"r{number}",
            token_ids=tokens,
            sampling=SamplingParams(max_tokens=max_tokens, seed=number),
            arrived_s=now_s,
            deadline_s=now_s + 600.0,
            session=session,
            context_session=session,
        )
        client, story = await self._stage.serve(request)
        self.stories.append(story)
        return client.tokens

    @property
    def hit(self) -> float:
        return sum(story.num_cached_tokens for story in self.stories) / sum(s.num_prompt_tokens for s in self.stories)

    @property
    def ttft_s(self) -> float:
        return statistics.mean(story.ttft_s or 0.0 for story in self.stories)

    def verdicts(self) -> Counter[str]:
        return Counter(cached_verdict(attempt) for story in self.stories for attempt in story.attempts)


def played(context: str, generation: str = "least_ttft", *, seed: int = 5, num_chats: int = 12, **args: Any) -> Chats:
    """The same trace, whatever the routing."""

    async def play() -> Chats:
        cluster = FakeCluster(seed, num_context=2, num_generation=2, temper=TEMPER)
        async with scene(cluster, **routed(cluster, context, generation, **args)) as stage:
            chats = Chats(stage)
            await chats.play(num_chats)
            await stage.check_nothing_left()
            return chats

    return run_in_virtual_time(play())


@pytest.mark.parametrize(
    ("router", "hit", "ttft"), [("least_ttft", 1.8, 0.6), ("kv_cache_aware", 1.5, 0.7), ("conversation", 1.5, 0.7)]
)
def test_chats_stay_where_their_blocks_are(router: str, hit: float, ttft: float) -> None:
    """Two caches that hold all chats between them, and not each of them twice."""
    turns, kept = played("round_robin"), played(router)
    assert kept.hit > hit * turns.hit, (kept.hit, turns.hit)
    assert kept.ttft_s < ttft * turns.ttft_s, (kept.ttft_s, turns.ttft_s)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_cached_is_foreseen_for_nearly_every_request(seed: int) -> None:
    verdicts = played("least_ttft", seed=seed).verdicts()
    assert verdicts.total() == 12 * NUM_TURNS
    assert verdicts["exact"] >= 0.99 * verdicts.total(), verdicts


def test_the_estimate_of_the_first_token_is_near_the_truth() -> None:
    chats = played("least_ttft")
    ratios = []
    for story in chats.stories[12:]:
        (attempt,) = story.attempts
        assert attempt.decision.ttft_s is not None
        assert attempt.first_token_s is not None
        ratios.append((attempt.first_token_s - attempt.began_s) / attempt.decision.ttft_s)
    assert 0.7 < statistics.median(ratios) < 1.5, sorted(ratios)


def test_a_slow_context_server_gets_fewer_prompts_and_clients_wait_less() -> None:
    async def play(router: str) -> tuple[float, Counter[str]]:
        cluster = FakeCluster(3, num_context=2, num_generation=1, temper=dataclasses.replace(TEMPER, cache_blocks=0))
        cluster.servers["context-0"].slowness = 4.0
        async with scene(cluster, **routed(cluster, router)) as stage:
            chats = Chats(stage)
            for number in range(40):
                tokens = [(number * 77 + position) % 997 for position in range(200)]
                await chats.ask(tokens, max_tokens=2)
            places = Counter(story.attempts[0].context_instance for story in chats.stories)
            return chats.ttft_s, places

    turns_s, _ = run_in_virtual_time(play("round_robin"))
    least_s, places = run_in_virtual_time(play("least_ttft"))
    assert least_s < 0.6 * turns_s
    assert 1 <= places["context-0"] <= 4, "it is tried until its speed is known"


def test_a_server_whose_first_prompt_took_long_is_not_left_idle_for_ever() -> None:
    """One client at a time: no queue says that the other server is there."""

    async def play() -> None:
        cluster = FakeCluster(9, num_context=2, num_generation=1, temper=TEMPER)
        cold = cluster.servers["context-0"]
        async with scene(cluster, **routed(cluster, "least_ttft")) as stage:
            chats = Chats(stage)
            cold.slowness = 2.0
            await chats.ask([1] * 200, max_tokens=2)
            cold.slowness = 1.0
            for number in range(24):
                await chats.ask([(number * 77 + position) % 997 for position in range(200)], max_tokens=2)
                await asyncio.sleep(5.0)
            places = Counter(story.attempts[0].context_instance for story in chats.stories)
            assert chats.stories[0].attempts[0].context_instance == "context-0"
            assert places["context-0"] >= 8, places

    run_in_virtual_time(play())


def test_of_a_burst_each_server_gets_what_it_can_do() -> None:
    async def play() -> None:
        cluster = FakeCluster(4, num_context=3, num_generation=2, temper=dataclasses.replace(TEMPER, cache_blocks=0))
        async with scene(cluster, **routed(cluster, "least_ttft")) as stage:
            chats = Chats(stage)
            async with asyncio.TaskGroup() as group:
                for number in range(30):
                    tokens = [(number * 13 + position) % 997 for position in range(100)]
                    group.create_task(chats.ask(tokens, max_tokens=40))
            prefilled = Counter(story.attempts[0].context_instance for story in chats.stories)
            decoded = Counter(story.attempts[0].generation_instance for story in chats.stories)
            assert all(8 <= count <= 12 for count in prefilled.values()), prefilled
            assert all(12 <= count <= 18 for count in decoded.values()), decoded

    run_in_virtual_time(play())


def test_a_conversation_that_names_itself_stays_though_its_prompts_have_nothing_in_common() -> None:
    async def play() -> None:
        cluster = FakeCluster(6, num_context=3, num_generation=3, temper=TEMPER)
        async with scene(cluster, **routed(cluster, "conversation", "conversation")) as stage:
            chats = Chats(stage)
            for turn, session in itertools.product(range(5), "abc"):
                tokens = [(turn * 333 + ord(session) * 7 + position) % 997 for position in range(50)]
                await chats.ask(tokens, session=session, max_tokens=3)
            for offset in range(3):
                stories = chats.stories[offset::3]
                assert len({story.attempts[0].context_instance for story in stories}) == 1
                assert len({story.attempts[0].generation_instance for story in stories}) == 1

    run_in_virtual_time(play())


def test_turns_of_a_session_meet_on_one_server_though_each_comes_to_another_orchestrator() -> None:
    async def play() -> None:
        cluster = FakeCluster(10, num_context=3, num_generation=3, temper=TEMPER)
        settings = routed(cluster, "conversation", "conversation")
        async with scene(cluster, **settings) as one, scene(cluster, **settings) as two:
            workers = [Chats(one), Chats(two)]
            for turn, session in itertools.product(range(4), "abcd"):
                tokens = [(turn * 333 + ord(session) * 7 + position) % 997 for position in range(50)]
                await workers[turn % 2].ask(tokens, session=session, max_tokens=3)
            for offset in range(4):
                stories = [*workers[0].stories[offset::4], *workers[1].stories[offset::4]]
                assert len({story.attempts[0].context_instance for story in stories}) == 1
                assert len({story.attempts[0].generation_instance for story in stories}) == 1

    run_in_virtual_time(play())


def test_a_tenth_of_the_traffic_goes_to_the_new_servers() -> None:
    async def play() -> None:
        cluster = FakeCluster(7, num_context=1, num_generation=3, temper=TEMPER)
        weights = {"generation-0": 45.0, "generation-1": 45.0, "generation-2": 10.0}
        async with scene(cluster, **routed(cluster, "least_ttft", "weighted", weights=weights)) as stage:
            chats = Chats(stage)
            for number in range(40):
                await chats.ask([number, *range(20)], max_tokens=2)
            decoded = Counter(story.attempts[0].generation_instance for story in chats.stories)
            assert decoded == {"generation-0": 18, "generation-1": 18, "generation-2": 4}

    run_in_virtual_time(play())


def test_two_orchestrators_see_each_others_load() -> None:
    """What one has sent somewhere the other one hears from the servers, and goes elsewhere."""

    async def play() -> None:
        cluster = FakeCluster(8, num_context=0, num_generation=2, temper=TEMPER)
        settings = routed(cluster, "least_ttft")
        async with scene(cluster, **settings) as one, scene(cluster, **settings) as two:
            mine, theirs = Chats(one), Chats(two)
            async with asyncio.TaskGroup() as group:
                for _ in range(7):
                    group.create_task(mine.ask(list(range(40)), max_tokens=200))
                await asyncio.sleep(1.0)
                loads = {server.instance_id: server.num_requests for server in two.pools}
                assert sorted(loads.values()) == [3, 4], "seven that are not its own"
                await theirs.ask(list(range(900, 940)), max_tokens=2)
            (attempt,) = theirs.stories[0].attempts
            assert attempt.generation_instance == min(loads, key=lambda name: loads[name])

    run_in_virtual_time(play())
