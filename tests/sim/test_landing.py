"""Between the first token and the second: when a context server's part is over, and what a late second token means."""

from __future__ import annotations

import asyncio

from disaggregated.errors import TransferTimeout
from disaggregated.v1 import control_pb2
from orchestrator.attempt import TRANSFER_TIMEOUT_S
from tests.support.dispatch_scene import scene
from tests.support.fake_cluster import FakeCluster, FakeServer, Pipe, Temper
from tests.support.virtual_time import run_in_virtual_time


class Crowded(FakeServer):
    """Its first request lands and then waits for its turn in the batch; a polite server says so."""

    is_polite = True
    waits_s = 3 * TRANSFER_TIMEOUT_S

    async def fill(self, key: tuple[str, int], link: Pipe, request: control_pb2.AdmitRequest) -> None:
        times = control_pb2.AdmissionTimes(transport="FAKE")
        due = len(request.token_ids) + 1
        self.landed = link, control_pb2.StreamDelta(stream_key=key[1], first_position=due, times=times)
        await super().fill(key, link, request)

    async def pull(self, ticket: control_pb2.TransferTicket) -> int:
        first_token = await super().pull(ticket)
        if self.is_polite:
            self.tell(*self.landed)
        if self.num_admissions == 1:
            await asyncio.sleep(self.waits_s)
        return first_token


def crowded(*, is_polite: bool) -> FakeCluster:
    cluster = FakeCluster(70, num_context=1, num_generation=1)
    cluster.servers["generation-0"] = server = Crowded(cluster, "generation", "generation-0")
    server.is_polite = is_polite
    return cluster


def test_a_sequence_that_has_landed_may_wait_for_its_turn_until_its_deadline() -> None:
    async def play() -> None:
        async with scene(crowded(is_polite=True)) as stage:
            _, story = await stage.serve(stage.request())
            assert len(story.attempts) == 1
            assert story.longest_gap_s > 2 * TRANSFER_TIMEOUT_S

    run_in_virtual_time(play())


def test_one_that_has_not_landed_by_then_goes_on_elsewhere() -> None:
    async def play() -> None:
        async with scene(crowded(is_polite=False)) as stage:
            _, story = await stage.serve(stage.request())
            assert len(story.attempts) == 2
            (failure,) = stage.observer.failures
            assert isinstance(failure, TransferTimeout)

    run_in_virtual_time(play())


class OneAtATime(FakeServer):
    """A context server with room for one request."""

    async def describe(self, pipe: Pipe) -> None:
        heard = Pipe()
        await super().describe(heard)
        description = await heard.read()
        description.max_batch_size = 1
        pipe.queue.put_nowait(description)


def test_a_context_server_is_free_again_when_its_blocks_have_landed_and_not_when_the_answer_is_over() -> None:
    async def play() -> None:
        cluster = FakeCluster(71, num_context=1, num_generation=1, temper=Temper(max_batch_size=8))
        cluster.servers["context-0"] = OneAtATime(cluster, "context", "context-0")
        async with scene(cluster) as stage:
            async with asyncio.TaskGroup() as group:
                for number in range(6):
                    group.create_task(stage.serve(stage.request(number, max_tokens=300)))
                await asyncio.sleep(1.0)
                assert len(cluster.servers["generation-0"].decoding) == 6
            await stage.check_nothing_left()

    run_in_virtual_time(play())
