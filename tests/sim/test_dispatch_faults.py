"""Servers that freeze, die or are not what they were, in virtual time: a request goes on elsewhere, or says why not."""

from __future__ import annotations

import asyncio

import pytest

from disaggregated.errors import DisaggregatedError, NoServerAvailable
from disaggregated.v1 import control_pb2
from tests.support.dispatch_scene import scene
from tests.support.fake_cluster import LEASE_S, FakeCluster, FakeServer, Pipe, Temper
from tests.support.virtual_time import run_in_virtual_time


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
