"""A prompt of four ranks, streamed by layers, converted into one pool with other blocks, and disturbed anywhere.

One run is one seed. Blocks that came back are marked by their next owner at once; a late write would show.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from disaggregated.errors import DisaggregatedError
from disaggregated.kv_shard import KVHolding
from kvtransfer.destination.pending import PendingTransfer
from tests.support.kv_instances import ContextRank, Instances, instances
from tests.support.kv_pools import SomeTicket, flip_bit
from tests.support.kv_shards import Ranks, model_kv, model_layout

NUM_TOKENS = 75
MARK = 0xA7
THEIRS, OURS = model_layout(block_size=8), model_layout(block_size=32)


class Turn:
    """One request: what its ranks publish, when, and what goes wrong."""

    def __init__(self, name: str, made: Instances, chance: random.Random) -> None:
        self._name = name
        self._made = made
        self._chance = chance
        self._kv = model_kv(THEIRS, NUM_TOKENS, seed=chance.randrange(1000))
        self._kind = chance.choice(["good", "good", "cancel", "fail", "damage", "late"])

    async def run(self) -> str:
        (ours,) = self._made.generation
        ours.region.buffer[:] = bytes([MARK]) * ours.region.nbytes
        tickets = self._open()
        deadline_s = 0.05 if self._kind == "late" else 10
        pending = ours.landing.start(tickets, ours.table, deadline_s=deadline_s, num_tokens=NUM_TOKENS)
        async with asyncio.TaskGroup() as group:
            for rank in self._made.context:
                group.create_task(self._prefill(rank))
            group.create_task(self._disturb(pending))
        outcome = await self._outcome(pending)
        await pending.quiet()
        if outcome != "landed":
            await self._check_nothing_lands_any_more()
        elif self._kind != "damage":  # What was damaged before it was published is what was published.
            ours.check_holds(self._kv)
        await pending.ended()
        for rank in self._made.context:
            rank.served.source.fail(self._name, "the request is over")
        await self._made.released(self._name)
        return outcome

    def _open(self) -> list[SomeTicket]:
        for rank in self._made.context:
            rank.compute(self._kv)
            rank.served.source.open(self._name, num_tokens=NUM_TOKENS)
        return [rank.served.ticket(self._name) for rank in self._made.context]

    async def _prefill(self, rank: ContextRank) -> None:
        source, chance = rank.served.source, self._chance
        for num_tokens in (32, NUM_TOKENS):
            for num_layers in range(1, rank.holding.layout.num_layers + 1):
                await self._wait_a_little()
                source.publish(self._name, rank.table, num_tokens, num_layers=num_layers)
        if self._kind == "fail" and chance.random() < 0.5:
            source.fail(self._name, "chaos")
        await self._wait_a_little()
        source.finish(self._name, rank.table, NUM_TOKENS, 7)

    async def _disturb(self, pending: PendingTransfer) -> None:
        await self._wait_a_little()
        rank = self._chance.choice(self._made.context)
        if self._kind == "cancel":
            pending.cancel()
        if self._kind == "fail":
            rank.served.source.fail(self._name, "chaos")
        if self._kind == "damage":
            flip_bit(rank.served.region, rank.holding.layout, layer=0, block_id=self._chance.choice(rank.table[:9]))

    async def _wait_a_little(self) -> None:
        for _ in range(self._chance.randint(0, 15)):
            await asyncio.sleep(0)

    async def _outcome(self, pending: PendingTransfer) -> str:
        try:
            landed = await pending.outcome()
        except DisaggregatedError as error:
            return type(error).__name__
        assert (landed.num_tokens, landed.first_token) == (NUM_TOKENS, 7)
        return "landed"

    async def _check_nothing_lands_any_more(self) -> None:
        (ours,) = self._made.generation
        ours.region.buffer[:] = bytes([MARK]) * ours.region.nbytes
        for _ in range(20):
            await asyncio.sleep(0)
        assert bytes(ours.region.buffer) == bytes([MARK]) * ours.region.nbytes, "a late write"


@pytest.mark.parametrize("seed", range(3))
async def test_disturbed_ranks_land_rightly_together_or_not_at_all(transport_name: str, seed: int) -> None:
    chance = random.Random(seed)
    ranks = Ranks(tensor=2, stages=(2, 4)).holdings(THEIRS)
    async with instances(ranks, [KVHolding.whole(OURS)], backend=transport_name, max_tokens_in_buffer=64) as made:
        outcomes = [await Turn(f"{turn}", made, chance).run() for turn in range(12)]
        for rank in made.context:
            assert rank.served.source.ledger() == []
            rank.served.source.check_integrity()
        assert made.generation[0].landing.quarantine().num_blocks == 0
    assert "landed" in outcomes
    assert len(set(outcomes)) > 1
