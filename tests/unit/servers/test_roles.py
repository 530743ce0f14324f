"""What only happens when things come in an unlucky order: the engine is held in a step while callers come and go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from context_server.role import ContextRole
from disaggregated.errors import AdmissionError, DisaggregatedError, InvalidRequest, ServerLost
from disaggregated.sampling_params import SamplingParams
from disaggregated.v1 import control_pb2
from generation_server.role import GenerationRole
from tests.support.fake_runner import oracle
from tests.support.server_client import ContextClient, GenerationClient
from tests.unit.servers.fake_servers import FakeServer, serving

FEW = SamplingParams(max_tokens=6)
PROMPT = list(range(1, 41))
"""Three chunks."""


@pytest_asyncio.fixture
async def generation_server() -> AsyncIterator[FakeServer]:
    async with serving("generation", GenerationRole) as server:
        yield server


@pytest_asyncio.fixture
async def generation(generation_server: FakeServer) -> AsyncIterator[GenerationClient]:
    async with GenerationClient(generation_server.address) as client:
        yield client
        generation_server.runner.go.set()
        if not generation_server.crashes:
            await client.wait_idle()
            await generation_server.check_integrity()
            assert len(generation_server.role.live_requests) == 0


@pytest_asyncio.fixture
async def context_server() -> AsyncIterator[FakeServer]:
    async with serving("context", ContextRole) as server:
        yield server


@pytest_asyncio.fixture
async def context(context_server: FakeServer) -> AsyncIterator[ContextClient]:
    async with ContextClient(context_server.address) as client:
        yield client
        await client.wait_idle()
        await context_server.check_integrity()
        assert len(context_server.role.live_requests) == 0


def somewhere(transfer_id: str = "t") -> control_pb2.TransferTicket:
    return control_pb2.TransferTicket(address="127.0.0.1:1", instance_id="context-0", epoch=1, transfer_id=transfer_id)


async def held_in_a_step(server: FakeServer, client: GenerationClient) -> int:
    """A request is computed, in a step that does not end; the key of that request."""
    server.runner.go.clear()
    key = await client.admit(PROMPT, SamplingParams(max_tokens=100))
    assert await asyncio.to_thread(server.runner.is_held.wait, 5)
    return key


async def test_tokens_are_those_of_the_oracle(generation: GenerationClient) -> None:
    completion = await generation.complete(PROMPT, FEW)
    assert (completion.token_ids, completion.finish_reason) == oracle(PROMPT, FEW, max_seq_len=200)


async def test_an_admission_whose_caller_gives_up_while_the_engine_is_busy_leaves_nothing(
    generation_server: FakeServer, generation: GenerationClient
) -> None:
    busy = await held_in_a_step(generation_server, generation)
    admitting = asyncio.ensure_future(generation.admit(PROMPT, FEW, source=somewhere()))
    await live(generation_server, 2)
    admitting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await admitting
    await live(generation_server, 1)
    assert await generation.cancel(busy) == 1
    generation_server.runner.go.set()


async def test_an_admission_whose_stream_breaks_while_the_engine_is_busy_is_refused(
    generation_server: FakeServer, generation: GenerationClient
) -> None:
    busy = await held_in_a_step(generation_server, generation)
    async with GenerationClient(generation_server.address) as other:
        admitting = asyncio.ensure_future(other.admit(PROMPT, FEW, source=somewhere()))
        await live(generation_server, 2)
        await other.hang_up()
        await no_caller(generation_server, other)
        generation_server.runner.go.set()
        with pytest.raises(AdmissionError):
            await admitting
        await generation.cancel(busy)


async def test_a_source_that_is_not_there_is_a_retryable_error_of_the_one_request(generation: GenerationClient) -> None:
    key = await generation.admit(PROMPT, FEW, source=somewhere())
    with pytest.raises(DisaggregatedError) as caught:
        await generation.completion(key)
    assert caught.value.retryable


async def test_a_stream_key_in_use_is_refused(generation_server: FakeServer, generation: GenerationClient) -> None:
    busy = await held_in_a_step(generation_server, generation)
    generation._keys = iter([busy])  # type: ignore[assignment]
    with pytest.raises(InvalidRequest, match="stream_key"):
        await generation.admit(PROMPT, FEW)
    assert await generation.cancel(busy) == 1
    generation_server.runner.go.set()


async def test_heartbeats_come_while_the_engine_computes_and_tell_how_long_it_does(
    generation_server: FakeServer, generation: GenerationClient
) -> None:
    busy = await held_in_a_step(generation_server, generation)
    ages = []
    async with contextlib.aclosing(generation.heartbeats()) as heartbeats:
        async for beat in heartbeats:
            ages.append(beat.step_age_s)
            if len(ages) == 6:
                break
    assert ages[-1] > 0.05
    assert ages[1:] == sorted(ages[1:])
    assert await generation.cancel(busy) == 1
    generation_server.runner.go.set()


async def test_a_crash_of_the_engine_is_told_to_the_process_and_to_who_waits(
    generation_server: FakeServer, generation: GenerationClient
) -> None:
    busy = await held_in_a_step(generation_server, generation)
    generation_server.runner.fails_with = RuntimeError("the device is on fire")
    admitting = asyncio.ensure_future(generation.admit(PROMPT, FEW, source=somewhere()))
    await live(generation_server, 2)
    generation_server.runner.go.set()
    with pytest.raises(ServerLost):
        await admitting
    assert [str(error) for error in generation_server.crashes] == ["the device is on fire"]
    assert busy


async def test_a_first_token_is_the_oracles_and_its_blocks_go_back_at_once(context: ContextClient) -> None:
    outcome = await context.first_token(PROMPT, FEW)
    assert [outcome.first_token] == oracle(PROMPT, FEW, max_seq_len=200)[0][:1]


async def test_a_prefill_cancelled_before_its_first_step_leaves_nothing(
    context_server: FakeServer, context: ContextClient
) -> None:
    context_server.runner.go.clear()
    prefill = asyncio.ensure_future(context.first_token(PROMPT, FEW, transfer_id="t"))
    await live(context_server, 1)
    prefill.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await prefill
    context_server.runner.go.set()
    await live(context_server, 0)


async def test_an_outcome_that_nobody_heard_frees_its_blocks_at_once(
    context_server: FakeServer, context: ContextClient
) -> None:
    """However late the caller leaves: before it has the first token, no one can go on from these blocks."""
    async with contextlib.aclosing(context.prefill([1, 2, 3], FEW, transfer_id="unheard")) as progress:
        starting = asyncio.ensure_future(anext(progress))
        await live(context_server, 1)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
    await asyncio.wait_for(live(context_server, 0), 1)


async def test_a_transfer_id_is_used_once(context: ContextClient) -> None:
    transfer_id = "once"
    async with contextlib.aclosing(context.prefill(PROMPT, FEW, transfer_id=transfer_id)) as progress:
        await anext(progress)
        with pytest.raises(DisaggregatedError, match="once"):
            await context.first_token(PROMPT, FEW, transfer_id=transfer_id)


async def live(server: FakeServer, count: int) -> None:
    """Until that many requests are in the server's books."""
    async with asyncio.timeout(20):
        while len(server.role.live_requests) != count:  # noqa: ASYNC110 - the books are not made for waiting on.
            await asyncio.sleep(0)


async def no_caller(server: FakeServer, client: GenerationClient) -> None:
    """Until the server has seen this client's stream break."""
    async with asyncio.timeout(20):
        with contextlib.suppress(AdmissionError):
            while True:
                await client.admit(PROMPT, FEW)
