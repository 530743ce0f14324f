"""Whoever stops a request, and whenever: no token of it comes any more, and every block comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from disaggregated.errors import (
    AdmissionError,
    DeadlineExceeded,
    LeaseExpired,
    PoolExhausted,
    ServerLost,
    SourceFailed,
    TransferError,
    TransferTimeout,
)
from disaggregated.sampling_params import SamplingParams
from tests.support.server_client import GenerationClient
from tests.support.servers import Pair, random_prompt, server_pair, write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = SamplingParams(max_tokens=2000)
FEW = SamplingParams(max_tokens=4)
PROMPT = random_prompt(2000)
"""32 chunks."""
LEASE_S = 8.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    model = write_model(tmp_path_factory.mktemp("model"), slow=True)
    no_reuse = "--kv-cache-config.enable-block-reuse=false"
    async with server_pair(model, no_reuse, context_flags=[f"--cache-transceiver-config.lease-s={LEASE_S}"]) as pair:
        yield pair


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _every_block_comes_back(pair: Pair) -> AsyncIterator[None]:
    yield
    await pair.wait_idle()


async def test_a_prefill_whose_caller_leaves_stops_computing(pair: Pair) -> None:
    before = (await pair.context.wait_idle()).step
    async with contextlib.aclosing(pair.context.prefill(PROMPT, FEW)) as progress:
        await anext(progress)
    idle = await pair.context.wait_idle()
    assert idle.step - before < 2000 / 64


async def test_a_prefill_that_is_cancelled_fails_its_transfer(pair: Pair) -> None:
    prefill = pair.context.prefill(PROMPT, FEW, transfer_id="left-early")
    async with contextlib.aclosing(prefill) as progress:
        key = await pair.generation.admit(PROMPT, FEW, source=pair.context.ticket("left-early"))
        await anext(progress)
    with pytest.raises(SourceFailed) as caught:
        await pair.generation.completion(key)
    assert caught.value.retryable


async def test_a_prefill_whose_blocks_nobody_wants_any_more_stops(pair: Pair) -> None:
    async with contextlib.aclosing(pair.context.prefill(PROMPT, FEW, transfer_id="unwanted")) as progress:
        key = await pair.generation.admit(PROMPT, FEW, source=pair.context.ticket("unwanted"))
        await anext(progress)
        assert await pair.generation.cancel(key) == 1
        with pytest.raises(LeaseExpired):
            _ = [message async for message in progress]


async def test_a_request_can_be_cancelled_before_its_prefill_was_sent(pair: Pair) -> None:
    key = await pair.generation.admit(PROMPT, FEW, source=pair.context.ticket("never-sent"))
    assert await pair.generation.cancel(key) == 1
    assert not pair.generation.has_news(key)


async def test_a_request_can_be_cancelled_while_it_decodes(pair: Pair) -> None:
    key = await pair.generation.admit(PROMPT[:20], LONG)
    await pair.generation.delta(key)
    assert await pair.generation.cancel(key) == 1
    idle = await pair.generation.wait_idle()
    assert idle.generation_tokens_total < 2000


async def test_cancelling_what_has_finished_does_nothing(pair: Pair) -> None:
    key = await pair.generation.admit(PROMPT[:20], FEW)
    await pair.generation.completion(key)
    assert await pair.generation.cancel(key, key + 1000) == 0


async def test_a_stream_key_can_be_used_again_once_its_request_is_over(pair: Pair) -> None:
    first = await pair.generation.complete(PROMPT[:20], FEW)
    assert (await pair.generation.complete(PROMPT[:20], FEW)).token_ids == first.token_ids


async def test_a_broken_stream_cancels_its_requests(pair: Pair) -> None:
    async with GenerationClient(pair.generation.address) as other:
        decoding = await other.admit(PROMPT[:20], LONG)
        await other.admit(PROMPT, FEW, source=pair.context.ticket("not-yet"))
        await other.delta(decoding)
        await other.hang_up()
        await pair.generation.wait_idle()
        with pytest.raises(AdmissionError, match="no Generate stream"):
            await other.admit(PROMPT[:20], FEW)


async def test_a_second_stream_of_an_orchestrator_takes_the_place_of_the_first(pair: Pair) -> None:
    async with GenerationClient(pair.generation.address) as first:
        key = await first.admit(PROMPT[:20], LONG)
        await first.delta(key)
        second = GenerationClient(pair.generation.address)
        second.orchestrator_id = first.orchestrator_id
        async with second:
            with pytest.raises(ServerLost):
                await first.completion(key)
            await pair.generation.wait_idle()
            assert len((await second.complete(PROMPT[:20], FEW)).token_ids) == 4


async def test_blocks_that_never_land_are_given_up_at_the_deadline(pair: Pair) -> None:
    source = pair.context.ticket("nobody-prefills")
    key = await pair.generation.admit(PROMPT, FEW, source=source, deadline_s=0.1)
    with pytest.raises(TransferTimeout):
        await pair.generation.completion(key)


async def test_a_local_prefill_ends_at_its_deadline(pair: Pair) -> None:
    key = await pair.generation.admit(PROMPT, FEW, deadline_s=0.02)
    with pytest.raises(DeadlineExceeded):
        await pair.generation.completion(key)


async def test_a_prefill_ends_at_its_deadline(pair: Pair) -> None:
    with pytest.raises(DeadlineExceeded):
        _ = [message async for message in pair.context.prefill(PROMPT, FEW, deadline_s=0.02)]


async def test_a_lease_that_nobody_follows_runs_out(pair: Pair) -> None:
    outcome = await pair.context.first_token(PROMPT[:100], FEW, transfer_id="forgotten")
    assert outcome.finish_reason == ""
    assert [entry.owner for entry in await pair.context.ledger() if entry.kind == "transfer"] == ["forgotten"]
    await pair.context.wait_idle(timeout_s=LEASE_S + 5)
    key = await pair.generation.admit(PROMPT[:100], FEW, source=pair.context.ticket("forgotten"))
    with pytest.raises(LeaseExpired):
        await pair.generation.completion(key)


async def finish_prefill(pair: Pair, transfer_id: str) -> None:
    await pair.context.first_token(PROMPT[:100], FEW, transfer_id=transfer_id)
    assert [entry.owner for entry in await pair.context.ledger() if entry.kind == "transfer"] == [transfer_id]


async def test_a_finished_prefill_can_be_aborted_once(pair: Pair) -> None:
    await finish_prefill(pair, "given-up")
    assert await pair.context.abort("given-up", "unheard-of") == 1
    await pair.context.wait_idle(timeout_s=LEASE_S / 2)
    assert await pair.context.abort("given-up") == 0
    key = await pair.generation.admit(PROMPT[:100], FEW, source=pair.context.ticket("given-up"))
    with pytest.raises(SourceFailed, match="nobody wants these blocks"):
        await pair.generation.completion(key)


async def test_a_running_prefill_can_be_aborted(pair: Pair) -> None:
    before = (await pair.context.wait_idle()).step
    async with contextlib.aclosing(pair.context.prefill(PROMPT, FEW, transfer_id="half-way")) as progress:
        await anext(progress)
        assert await pair.context.abort("half-way", reason="a test says so") == 1
        with pytest.raises(LeaseExpired):
            _ = [message async for message in progress]
    assert (await pair.context.wait_idle(timeout_s=LEASE_S / 2)).step - before < 2000 / 64


async def test_an_aborted_transfer_that_has_not_begun_never_does(pair: Pair) -> None:
    assert await pair.context.abort("too-early") == 0
    with pytest.raises(TransferError, match="an id is used once"):
        await pair.context.first_token(PROMPT[:100], FEW, transfer_id="too-early")


async def test_a_refused_admission_gives_the_finished_prefill_back(pair: Pair) -> None:
    await finish_prefill(pair, "refused")
    keys = [await pair.generation.admit(PROMPT, FEW, source=pair.context.ticket(f"room-{n}")) for n in range(4)]
    with pytest.raises(PoolExhausted):
        await pair.generation.admit(PROMPT, FEW, source=pair.context.ticket("refused"))
    await pair.context.wait_idle(timeout_s=LEASE_S / 2)
    assert await pair.generation.cancel(*keys) == 4


async def test_an_admission_without_a_stream_gives_the_finished_prefill_back(pair: Pair) -> None:
    await finish_prefill(pair, "no-stream")
    async with GenerationClient(pair.generation.address) as other:
        other.orchestrator_id = "somebody-else"
        with pytest.raises(AdmissionError, match="no Generate stream"):
            await other.admit(PROMPT[:100], FEW, source=pair.context.ticket("no-stream"))
    await pair.context.wait_idle(timeout_s=LEASE_S / 2)


async def test_blocks_of_another_prompt_are_not_decoded_from(pair: Pair) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(pair.context.first_token(PROMPT[:90], FEW, transfer_id="shorter"))
        admitted = group.create_task(pair.generation.admit(PROMPT[:100], FEW, source=pair.context.ticket("shorter")))
    with pytest.raises(TransferError, match="90 tokens landed"):
        await pair.generation.completion(admitted.result())


async def test_a_full_pool_refuses_at_once_and_takes_the_next_when_there_is_room(pair: Pair) -> None:
    keys = [await pair.generation.admit(PROMPT, FEW, source=pair.context.ticket(f"fill-{n}")) for n in range(4)]
    with pytest.raises(PoolExhausted):
        await pair.generation.admit(PROMPT, FEW, source=pair.context.ticket("too-much"))
    assert await pair.generation.cancel(*keys) == 4
    await pair.generation.wait_idle()
    assert len((await pair.generation.complete(PROMPT[:40], FEW)).token_ids) == 4
