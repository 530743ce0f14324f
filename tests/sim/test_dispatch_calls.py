"""A request that is begun by a call and tells its end by one, with no task of its own; in virtual time."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from disaggregated.errors import DeadlineExceeded, DisaggregatedError, Draining
from disaggregated.request_life import Phase
from orchestrator.dispatch import HASHED_AT_ONCE_MAX
from orchestrator.story import RequestStory
from tests.support.dispatch_scene import Client, Scene, scene
from tests.support.fake_cluster import FakeCluster
from tests.support.virtual_time import run_in_virtual_time

Endings = list[tuple[RequestStory, DisaggregatedError | None]]


def begin(stage: Scene, number: int, endings: Endings, **fields: int) -> Client:
    request = stage.request(number, **fields)
    client = Client(request)
    stage.dispatcher.begin(request, client, lambda story, error: endings.append((story, error)))
    return client


def test_each_request_that_is_begun_tells_its_end_once() -> None:
    async def play() -> None:
        async with scene(FakeCluster(3, num_context=2, num_generation=2)) as stage:
            endings: Endings = []
            clients = [begin(stage, number, endings) for number in range(12)]
            assert stage.dispatcher.stories.num_running == 12
            await asyncio.sleep(60.0)
            assert len(endings) == 12
            for story, error in endings:
                assert error is None
                assert story.life.phase is Phase.FINISHED
            assert all(client.tokens == client.expected for client in clients)
            await stage.check_nothing_left()

    run_in_virtual_time(play())


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1, 0.4])
def test_a_request_that_is_cancelled_says_nothing_more_and_leaves_nothing(after_s: float) -> None:
    async def play() -> None:
        async with scene(FakeCluster(4, num_context=1, num_generation=1)) as stage:
            endings: Endings = []
            request = stage.request(max_tokens=400)
            run = stage.dispatcher.begin(request, Client(request), lambda story, error: endings.append((story, error)))
            await asyncio.sleep(after_s)
            stage.dispatcher.cancel(run)
            stage.dispatcher.cancel(run)
            assert run.life.phase is Phase.CANCELLED
            await asyncio.sleep(30.0)
            assert not endings
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_long_prompt_that_is_cancelled_while_it_is_hashed_never_enters() -> None:
    async def play() -> None:
        async with scene(FakeCluster(5, num_context=1, num_generation=1)) as stage:
            endings: Endings = []
            request = stage.request(num_prompt=HASHED_AT_ONCE_MAX + 1)
            run = stage.dispatcher.begin(request, Client(request), lambda story, error: endings.append((story, error)))
            assert run.hashing is not None
            stage.dispatcher.cancel(run)
            await asyncio.wait([run.hashing])
            assert run.hashing.cancelled()
            assert run.waiting is None
            await stage.check_nothing_left()
            assert not endings

    run_in_virtual_time(play())


def test_a_deadline_is_told_to_whoever_waits_in_the_queue_and_to_whoever_runs() -> None:
    async def play() -> None:
        cluster = FakeCluster(6, num_context=1, num_generation=1)
        async with scene(cluster) as stage:
            endings: Endings = []
            begin(stage, 0, endings, max_tokens=2000, timeout_s=2)
            await asyncio.sleep(2.5)
            [(story, error)] = endings
            assert isinstance(error, DeadlineExceeded)
            assert story.num_tokens > 0
            assert f"{story.num_tokens} tokens were generated" in str(error)
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_an_orchestrator_that_stops_tells_those_under_way_and_begins_nothing_more() -> None:
    async def play() -> None:
        async with scene(FakeCluster(8, num_context=1, num_generation=1)) as stage:
            endings: Endings = []
            for number in range(3):
                begin(stage, number, endings, max_tokens=4000)
            await asyncio.sleep(0.5)
            await stage.dispatcher.stop(timeout_s=1.0)
            assert [type(error) for _, error in endings] == [Draining] * 3
            with pytest.raises(Draining):
                begin(stage, 9, endings)
            assert len(endings) == 3
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_whoever_cancels_another_as_it_hears_of_its_own_end_disturbs_nobody() -> None:
    """`over` is called in the middle of a step's message, of which other requests are told after it."""

    async def play() -> None:
        async with scene(FakeCluster(9, num_context=1, num_generation=1)) as stage:
            endings: Endings = []
            doomed = stage.request(1, max_tokens=400)
            run = stage.dispatcher.begin(doomed, Client(doomed), lambda story, error: endings.append((story, error)))

            def over(story: RequestStory, error: DisaggregatedError | None) -> None:
                endings.append((story, error))
                stage.dispatcher.cancel(run)

            killer = stage.request(0, max_tokens=10)
            stage.dispatcher.begin(killer, Client(killer), over)
            bystander = begin(stage, 2, endings, max_tokens=60)
            await asyncio.sleep(60.0)
            assert [error for _, error in endings] == [None, None]
            assert bystander.tokens == bystander.expected
            await stage.check_nothing_left()

    run_in_virtual_time(play())


def test_a_request_that_is_over_is_freed_without_a_garbage_collection() -> None:
    """A thousand of them a second would otherwise be kept until the collector comes, and be looked at by it."""

    async def play() -> None:
        async with scene(FakeCluster(10, num_context=1, num_generation=1)) as stage:
            endings: Endings = []
            request = stage.request(3)
            sink = Client(request)
            remembered = weakref.ref(sink)
            stage.dispatcher.begin(request, sink, lambda story, error: endings.append((story, error)))
            del sink
            gc.disable()
            try:
                await asyncio.sleep(30.0)
                assert [error for _, error in endings] == [None]
                assert remembered() is None
            finally:
                gc.enable()

    run_in_virtual_time(play())
