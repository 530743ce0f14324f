"""A prompt that several ranks hold: what becomes of the others when one is slow, dies, or fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest

from disaggregated.errors import PeerLost, RequestCancelled, SourceFailed, TransferTimeout
from disaggregated.kv_shard import KVHolding
from kvtransfer.source.endpoints import SourceEndpoints
from kvtransfer.transport import Offer
from tests.support.kv_instances import Instances, instances
from tests.support.kv_pools import eventually
from tests.support.kv_shards import Ranks, model_kv, model_layout

NUM_TOKENS = 24
MODEL = model_layout()
KV = model_kv(MODEL, NUM_TOKENS)


@pytest.fixture
async def two_stages() -> AsyncIterator[Instances]:
    async with instances(Ranks(stages=(2, 4)).holdings(MODEL), [KVHolding.whole(MODEL)]) as made:
        yield made


def connected_to(made: Instances) -> set[str]:
    return {peer.peer_id for peer in made.generation[0].landing.statistics()}


class SlowToConnect:
    """Holds up the last rank's answer to Connect until it may come."""

    def __init__(self, patch: pytest.MonkeyPatch, made: Instances) -> None:
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        slow = made.context[-1].served.source._service._endpoints
        offers = SourceEndpoints.offers

        def slowly(endpoints: SourceEndpoints, speakable: Sequence[str]) -> list[Offer]:
            if endpoints is slow:
                self.is_asked.set()
                assert self.may_answer.wait(20), "the test forgot to let it answer"
            return offers(endpoints, speakable)

        patch.setattr(SourceEndpoints, "offers", slowly)


async def test_a_rank_that_dies_while_another_still_connects_is_a_lost_peer(
    two_stages: Instances, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowToConnect(monkeypatch, two_stages)
    tickets = two_stages.offer("t", KV)
    pulling = asyncio.create_task(two_stages.generation[0].pull(tickets, NUM_TOKENS))
    try:
        await eventually(lambda: slow.is_asked.is_set() and "context-0" in connected_to(two_stages))
        await two_stages.context[0].served.server.stop(grace=None)
        with pytest.raises(PeerLost):
            await pulling
    finally:
        slow.may_answer.set()


async def test_ranks_are_connected_to_at_once(two_stages: Instances, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow one first: the other does not wait for it."""
    slow = SlowToConnect(monkeypatch, two_stages)
    tickets = two_stages.offer("t", KV)
    pulling = asyncio.create_task(two_stages.generation[0].pull(tickets[::-1], NUM_TOKENS))
    await eventually(lambda: slow.is_asked.is_set() and connected_to(two_stages) == {"context-0"})
    slow.may_answer.set()
    await pulling
    two_stages.generation[0].check_holds(KV)


async def test_a_rank_that_dies_costs_the_other_nothing(two_stages: Instances) -> None:
    await two_stages.transfer("before", KV)
    for rank in two_stages.context:
        rank.compute(KV)
        rank.served.source.open("t")
    tickets = [rank.served.ticket("t") for rank in two_stages.context]
    pulling = asyncio.create_task(two_stages.generation[0].pull(tickets, NUM_TOKENS))
    await eventually(lambda: all(rank.served.source.num_followers for rank in two_stages.context))
    await two_stages.context[0].served.server.stop(grace=None)
    with pytest.raises(PeerLost):
        await pulling
    (other,) = two_stages.generation[0].landing.statistics()
    assert (other.peer_id, other.failures_total) == ("context-1", 0)
    await two_stages.context[1].served.wait_released("t")


async def test_a_rank_whose_prefill_fails_is_the_one_that_is_blamed(two_stages: Instances) -> None:
    tickets = [rank.served.ticket("t") for rank in two_stages.context]
    for rank in two_stages.context:
        rank.served.source.open("t")
    pulling = asyncio.create_task(two_stages.generation[0].pull(tickets, NUM_TOKENS))
    await eventually(lambda: all(rank.served.source.num_followers for rank in two_stages.context))
    two_stages.context[1].served.source.fail("t", "out of memory")
    with pytest.raises(SourceFailed, match="context-1: out of memory"):
        await pulling
    failures = {peer.peer_id: peer.failures_total for peer in two_stages.generation[0].landing.statistics()}
    assert failures == {"context-0": 0, "context-1": 1}
    await two_stages.released("t")


@pytest.mark.parametrize("by", ["cancel", "deadline"])
async def test_what_we_gave_up_ourselves_is_nobodys_fault(two_stages: Instances, by: str) -> None:
    for rank in two_stages.context:
        rank.served.source.open("t")
    tickets = [rank.served.ticket("t") for rank in two_stages.context]
    ours = two_stages.generation[0]
    pending = ours.landing.start(tickets, ours.table, deadline_s=3 if by == "deadline" else 20, num_tokens=NUM_TOKENS)
    await eventually(lambda: all(rank.served.source.num_followers for rank in two_stages.context))
    if by == "cancel":
        pending.cancel()
    with pytest.raises((RequestCancelled, TransferTimeout)):
        await pending.outcome()
    await pending.ended()
    assert {peer.peer_id: peer.failures_total for peer in ours.landing.statistics()} == {"context-0": 0, "context-1": 0}
    await two_stages.released("t")
