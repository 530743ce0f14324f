"""Whole clusters in virtual time: whatever the servers do, each request has one outcome and the right tokens."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.server import ServerConfig
from disaggregated.errors import DeadlineExceeded, DisaggregatedError, NoServerAvailable, QueueFull
from disaggregated.request_life import Phase
from disaggregated.sampling_params import SamplingParams
from disaggregated.token_logprobs import Told
from disaggregated.v1 import control_pb2
from orchestrator.dispatch import Dispatcher
from orchestrator.request_run import TokenRequest
from orchestrator.server import Standing
from orchestrator.server_pools import ServerPools
from orchestrator.story import RequestStory
from tests.support.fake_cluster import LEASE_S, FakeCluster, FakeServer, Pipe, Temper
from tests.support.token_hash import oracle, told_of
from tests.support.virtual_time import run_in_virtual_time


class Client:
    """Takes tokens, and checks each against the oracle as it comes."""

    def __init__(self, request: TokenRequest, *, wants: int | None = None) -> None:
        self.expected, self.expected_reason = oracle(request.token_ids, request.sampling)
        self.wants = wants
        self.logprobs = request.sampling.logprobs
        self.tokens: list[int] = []
        self.reason = ""

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        assert not self.reason, "tokens after the end"
        if self.logprobs is not None and token_ids:
            assert told is not None, "tokens without logprobs"
            assert list(told.tokens) == [told_of(token, self.logprobs) for token in token_ids]
        self.tokens += token_ids
        assert self.tokens == self.expected[: len(self.tokens)], "a token differs from the undisturbed run"
        self.reason = finish_reason
        return self.wants is None or len(self.tokens) < self.wants


class Observer:
    def __init__(self) -> None:
        self.failures: list[DisaggregatedError] = []
        self.stories: list[RequestStory] = []

    def attempt_failed(self, error: DisaggregatedError, *, goes_on: bool) -> None:
        self.failures.append(error)

    def request_ended(self, story: RequestStory) -> None:
        story.life.check_integrity()
        self.stories.append(story)


@dataclasses.dataclass
class Scene:
    cluster: FakeCluster
    pools: ServerPools
    dispatcher: Dispatcher
    observer: Observer

    def request(
        self, number: int = 0, *, num_prompt: int = 40, timeout_s: float = 180.0, **sampling: Any
    ) -> TokenRequest:
        now_s = asyncio.get_running_loop().time()
        prompt = [(number * 31 + position) % 997 for position in range(num_prompt)]
        params = SamplingParams(**{"max_tokens": 20, "seed": number, **sampling})
        return TokenRequest(
            request_id=f"r{number}", token_ids=prompt, sampling=params, arrived_s=now_s, deadline_s=now_s + timeout_s
        )

    async def serve(self, request: TokenRequest) -> tuple[Client, RequestStory]:
        client = Client(request)
        story = await self.dispatcher.run(request, client)
        assert client.tokens == client.expected
        assert client.reason == client.expected_reason
        return client, story

    async def ready(self, num_servers: int) -> None:
        while sum(server.is_ready for server in self.pools) < num_servers:  # noqa: ASYNC110 - time is virtual
            await asyncio.sleep(0.05)

    async def check_nothing_left(self) -> None:
        self.dispatcher.check_idle()
        await asyncio.sleep(LEASE_S + 15.0)
        for server in self.cluster.servers.values():
            assert not server.admitted, f"{server.address} still holds {server.admitted}"
            assert not server.decoding
            assert not server.transfers, f"{server.address} still offers {list(server.transfers)}"


def config(cluster: FakeCluster, **fields: object) -> DeploymentConfig:
    pools = {
        role: PoolConfig(
            num_instances=len(cluster.of(role)),
            urls=tuple(server.address for server in cluster.of(role)),
            server=ServerConfig(model="fake", role=role),
        )
        for role in ("context", "generation")
    }
    return DeploymentConfig(**{**pools, **fields})  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def scene(cluster: FakeCluster, **fields: object) -> AsyncIterator[Scene]:
    clock = asyncio.get_running_loop().time
    settings = config(cluster, **fields)
    crashes: list[BaseException] = []
    pools = ServerPools(settings, connect=cluster.connect, clock=clock, on_crash=crashes.append)
    observer = Observer()
    dispatcher = Dispatcher(settings, pools, observer=observer, clock=clock)
    pools.start()
    try:
        stage = Scene(cluster, pools, dispatcher, observer)
        await stage.ready(sum(server.is_alive for server in cluster.servers.values()))
        yield stage
    finally:
        await pools.close()
        await cluster.close()
    assert not crashes, crashes


def test_a_request_goes_through_both_servers_and_comes_back_in_order() -> None:
    async def play() -> None:
        async with scene(FakeCluster(1, num_context=1, num_generation=1)) as stage:
            _, story = await stage.serve(stage.request())
            assert [phase for _, phase in story.life.story] == [
                Phase.QUEUED, Phase.PREFILLING, Phase.TRANSFERRING, Phase.DECODING, Phase.FINISHED
            ]  # fmt: skip
            assert story.attempts[0].transport == "FAKE"
            assert sum(story.ttft_parts().values()) == pytest.approx(story.ttft_s)
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_one_token_never_reaches_a_generation_server() -> None:
    async def play() -> None:
        cluster = FakeCluster(2, num_context=1, num_generation=1)
        async with scene(cluster) as stage:
            client, story = await stage.serve(stage.request(max_tokens=1))
            assert client.reason == "length"
            assert story.attempts[0].generation_instance == ""
            assert cluster.servers["generation-0"].num_admissions == 0
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_first_token_that_ends_the_sequence_cancels_the_admission() -> None:
    async def play() -> None:
        async with scene(FakeCluster(3, num_context=1, num_generation=1)) as stage:
            request = stage.request()
            first = oracle(request.token_ids, request.sampling)[0][0]
            sampling = request.sampling.but(stop_token_ids=frozenset({first}))
            client, _ = await stage.serve(dataclasses.replace(request, sampling=sampling))
            assert (client.tokens, client.reason) == ([first], "stop")
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_client_that_has_enough_stops_its_servers() -> None:
    async def play() -> None:
        async with scene(FakeCluster(4, num_context=1, num_generation=1)) as stage:
            request = stage.request(max_tokens=500)
            client = Client(request, wants=7)
            story = await stage.dispatcher.run(request, client)
            assert story.finish_reason == "stop"
            assert len(client.tokens) == 7
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_without_a_context_server_the_generation_server_prefills() -> None:
    async def play() -> None:
        async with scene(FakeCluster(5, num_context=0, num_generation=1)) as stage:
            _, story = await stage.serve(stage.request())
            assert story.attempts[0].context_instance == ""
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_prompt_with_little_left_to_compute_is_prefilled_where_it_decodes() -> None:
    async def play() -> None:
        cluster = FakeCluster(6, num_context=1, num_generation=2, temper=Temper(cache_blocks=200))
        context = cluster.servers["context-0"]
        async with scene(cluster, max_local_prefill_length=30) as stage:
            await stage.serve(stage.request(num_prompt=30))
            assert context.num_prefills == 0
            _, story = await stage.serve(stage.request(1, num_prompt=310))
            assert context.num_prefills == 1
            holder = story.attempts[0].generation_instance
            for _ in range(3):
                _, story = await stage.serve(stage.request(1, num_prompt=330))
                assert story.attempts[0].generation_instance == holder, "19 of its blocks are there"
                assert re.search("prefilled there: (26|10) uncached tokens", story.attempts[0].why)
            assert context.num_prefills == 1

    run_in_virtual_time(play())


@pytest.mark.parametrize("balances", [False, True])
def test_a_burst_of_prompts_is_shared_with_an_idle_generation_server_where_that_is_wanted(balances: bool) -> None:
    """Eight prompts at once, each half a second of work for one server: the first tokens come sooner, and all right."""

    async def play() -> None:
        cluster = FakeCluster(60, num_context=1, num_generation=1, temper=Temper(prefill_token_s=0.01))
        async with scene(cluster, balance_prefill=balances) as stage:
            requests = [stage.request(number, num_prompt=60) for number in range(8)]
            served = await asyncio.gather(*map(stage.serve, requests))
            stories = [story for _, story in served]
            is_local = [not story.attempts[0].context_instance for story in stories]
            assert any(is_local) == balances
            assert not all(is_local), "the context server has its share"
            first_tokens_s = sorted(story.ttft_s or 0.0 for story in stories)
            assert (first_tokens_s[4] < 1.2) == balances, first_tokens_s
            for story, was_local in zip(stories, is_local, strict=True):
                assert ("prefilled there: least of 2" in story.attempts[0].why) == was_local
            for server in stage.pools:
                assert not server.num_decoding
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_without_a_generation_server_a_request_waits_and_then_says_why_it_failed() -> None:
    async def play() -> None:
        cluster = FakeCluster(7, num_context=1, num_generation=1)
        cluster.servers["generation-0"].crash()
        async with scene(cluster) as stage:
            with pytest.raises(NoServerAvailable, match="no generation server is ready"):
                await stage.serve(stage.request(timeout_s=5.0))
            late = asyncio.create_task(stage.serve(stage.request(1)))
            await asyncio.sleep(3.0)
            cluster.servers["generation-0"].restart()
            await late
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_queue_that_is_full_refuses_and_a_deadline_in_the_queue_is_told() -> None:
    async def play() -> None:
        cluster = FakeCluster(8, num_context=0, num_generation=1, temper=Temper(max_batch_size=1))
        async with scene(cluster, queue_depth_max=1) as stage:
            running = asyncio.create_task(stage.serve(stage.request(0, max_tokens=1000)))
            await asyncio.sleep(0.1)
            waiting = asyncio.create_task(stage.serve(stage.request(1, timeout_s=2.0)))
            await asyncio.sleep(0.1)
            with pytest.raises(QueueFull, match="1 requests are waiting, the limit is 1"):
                await stage.serve(stage.request(2))
            with pytest.raises(DeadlineExceeded, match="in the queue: all 1 generation servers are full"):
                await waiting
            await running
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_frozen_generation_server_costs_a_pause_and_not_a_request() -> None:
    async def play() -> None:
        cluster = FakeCluster(9, num_context=1, num_generation=2)
        async with scene(cluster) as stage:
            work = asyncio.create_task(stage.serve(stage.request(max_tokens=100)))
            await asyncio.sleep(0.5)
            victim = next(server for server in cluster.of("generation") if server.admitted)
            victim.thawed.clear()
            _, story = await work
            assert story.longest_gap_s < 1.5
            assert len(story.attempts) == 2
            assert story.attempts[1].generation_instance != victim.address
            victim.thawed.set()
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_prompt_whose_generation_server_is_lost_before_it_landed_does_not_wait_for_its_lease() -> None:
    async def play() -> None:
        cluster = FakeCluster(8, num_context=1, num_generation=1)
        context, generation = cluster.servers["context-0"], cluster.servers["generation-0"]
        async with scene(cluster) as stage:
            running = asyncio.create_task(stage.serve(stage.request()))
            while not context.prefills:  # noqa: ASYNC110 - time is virtual
                await asyncio.sleep(0.001)
            [transfer_id] = context.prefills
            generation.thawed.clear()
            while transfer_id in context.prefills:  # noqa: ASYNC110 - time is virtual
                await asyncio.sleep(0.01)
            assert asyncio.get_running_loop().time() < LEASE_S
            generation.thawed.set()
            await running
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_server_with_other_weights_is_refused_in_words() -> None:
    async def play() -> None:
        cluster = FakeCluster(10, num_context=1, num_generation=1)
        async with scene(cluster) as stage:
            odd = cluster.servers["context-0"]
            odd.crash()
            odd.fingerprint = "weights-2"
            odd.restart()
            await asyncio.sleep(5.0)
            refused = next(server for server in stage.pools if server.address == "context-0")
            assert "fingerprint weights-2 here and weights-1 there" in refused.reason
            _, story = await stage.serve(stage.request())
            assert story.attempts[0].context_instance == ""

    run_in_virtual_time(play())


def test_a_request_that_kills_every_server_comes_to_an_end() -> None:
    async def play() -> None:
        cluster = FakeCluster(11, num_context=0, num_generation=1)
        async with scene(cluster) as stage:
            work = asyncio.create_task(stage.serve(stage.request(num_prompt=4000)))
            while not work.done():
                server = cluster.servers["generation-0"]
                if server.admitted:
                    server.crash()
                    server.restart()
                await asyncio.sleep(0.01)
            with pytest.raises(DisaggregatedError, match="lost generation-0"):
                await work
            assert len(stage.observer.stories[0].attempts) == 9

    run_in_virtual_time(play())


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


@pytest.mark.parametrize("first_seed", range(0, 200, 10))
def test_no_request_is_lost_whatever_the_servers_do(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 10):
        try:
            run_in_virtual_time(_chaos(seed, num_requests=12))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def test_several_tokens_of_one_step_reach_the_client_together_and_go_on_elsewhere_at_the_next_position() -> None:
    async def play() -> None:
        temper = Temper(tokens_a_step_max=6)
        cluster = FakeCluster(9, num_context=1, num_generation=2, temper=temper)
        async with scene(cluster) as stage:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(stage.serve(stage.request(n, max_tokens=200))) for n in range(4)]
                await asyncio.sleep(0.2)
                next(server for server in cluster.of("generation") if server.decoding).crash()
            for client, story in (task.result() for task in running):
                assert len(client.tokens) == story.num_tokens
            assert any(len(story.attempts) > 1 for story in stage.observer.stories)

    run_in_virtual_time(play())


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first_seed", range(1000, 21000, 1000))
def test_no_request_is_lost_in_twenty_thousand_seeds(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 1000):
        run_in_virtual_time(_chaos(seed, num_requests=12))


def test_a_request_that_is_cancelled_as_the_queue_is_served_is_passed_over() -> None:
    async def play() -> None:
        cluster = FakeCluster(60, num_context=1, num_generation=1)
        async with scene(cluster) as stage:
            gone = asyncio.create_task(stage.dispatcher.run(stage.request(1), Client(stage.request(1))))
            (server,) = (server for server in stage.pools if server.role == "generation")
            server.standing = Standing.CONNECTING
            await asyncio.sleep(0.01)
            assert len(stage.dispatcher.queue) == 1
            gone.cancel()
            server.standing = Standing.READY
            stage.dispatcher.serve_queue()  # A heartbeat of the same moment, before the cancelled one has run.
            await asyncio.wait([gone])
            assert gone.cancelled()
            await stage.serve(stage.request(2))
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_context_server_that_is_lost_with_the_first_token_is_missed_though_its_blocks_have_landed() -> None:
    class Mute(FakeServer):
        async def prefill(self, pipe: Pipe, request: control_pb2.PrefillRequest) -> None:
            heard = Pipe()
            await super().prefill(heard if self.epoch == 1 else pipe, request)

    async def play() -> None:
        cluster = FakeCluster(61, num_context=1, num_generation=1)
        cluster.servers["context-0"] = context = Mute(cluster, "context", "context-0")
        async with scene(cluster) as stage:
            serving = asyncio.create_task(stage.serve(stage.request(timeout_s=60.0, max_tokens=200)))
            await asyncio.sleep(0.5)
            assert cluster.servers["generation-0"].decoding
            context.crash()
            context.restart()
            _, story = await serving
            assert len(story.attempts) == 2
            await stage.check_nothing_left()

    run_in_virtual_time(play())
