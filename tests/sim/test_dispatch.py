"""The way of a request through fake servers in virtual time: where it is sent, and where it waits or is refused."""

from __future__ import annotations

import asyncio
import re

import msgspec
import pytest

from disaggregated.errors import DeadlineExceeded, QueueFull
from disaggregated.request_life import Phase
from orchestrator.server import Standing
from tests.support.dispatch_scene import Client, scene
from tests.support.fake_cluster import FakeCluster, Temper
from tests.support.token_hash import oracle
from tests.support.virtual_time import run_in_virtual_time


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
            client, _ = await stage.serve(msgspec.structs.replace(request, sampling=sampling))
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
