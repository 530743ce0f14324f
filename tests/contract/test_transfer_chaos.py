"""Many transfers at once, most of them disturbed: nothing wrong ever lands, nothing lands late, nothing is lost.

One run is one seed. Blocks that a pull has given back are marked by their next owner at once; a late write would show.
"""

import asyncio
import contextlib
import random
from collections.abc import Sequence

import numpy as np
import pytest

from disaggregated.errors import TransferError
from kvtransfer import Region, TransferDestination
from tests.support.kv_pools import SMALL, ServedSource, blocks_of, destination, eventually, fill, regions, served_source

TRANSFER_BLOCKS = 4
OWNERS = SMALL.num_blocks // TRANSFER_BLOCKS
"""Transfers at once: each has its own blocks on both sides, and reuses them for its next."""
MARK = 0xA7


class Owner:
    """One request after another in the same blocks, each disturbed in its own way."""

    def __init__(
        self, number: int, seed: int, source: ServedSource, into: Region, landing: TransferDestination
    ) -> None:
        self._name = f"{number}"
        self._chance = random.Random(f"{seed}/{number}")
        self._source = source
        self._into = into
        self._landing = landing
        self._blocks = list(range(number * TRANSFER_BLOCKS, (number + 1) * TRANSFER_BLOCKS))
        self.outcomes: list[str] = []

    async def run(self, count: int) -> None:
        for turn in range(count):
            self._mark()
            await asyncio.sleep(0)
            self._check_mark()
            self.outcomes.append(await self._transfer(f"{self._name}.{turn}"))

    async def _transfer(self, transfer_id: str) -> str:
        chance = self._chance
        kind = chance.choice(["good", "good", "cancel", "fail", "damage"])
        table = chance.sample(self._blocks, TRANSFER_BLOCKS)
        into = chance.sample(self._blocks, TRANSFER_BLOCKS)
        self._source.source.open(transfer_id)
        ticket = self._source.ticket(transfer_id)
        pulling = asyncio.create_task(self._landing.pull(ticket, into, deadline_s=10))
        self._source.source.publish(transfer_id, table, chance.randint(0, 16))
        if kind == "damage":
            self._damage(table)
        for _ in range(chance.randint(0, 20)):
            await asyncio.sleep(0)
        if kind == "cancel":
            pulling.cancel()
        if kind == "fail":
            self._source.source.fail(transfer_id, "chaos")
        self._source.source.finish(transfer_id, table, 13, 1)
        if kind == "damage":
            self._damage(table)
        with contextlib.suppress(TransferError, asyncio.CancelledError):
            await pulling
            landed, published = blocks_of(self._into, SMALL, into), blocks_of(self._source.region, SMALL, table)
            assert kind == "damage" or (landed == published).all(), f"{transfer_id} landed wrongly"
            return "landed"
        self._source.source.fail(transfer_id, "its destination is gone")  # As the orchestrator does.
        return kind

    def _damage(self, table: Sequence[int]) -> None:
        block_id = self._chance.choice(table)
        layer = self._chance.randrange(SMALL.num_layers)
        self._source.region.buffer[SMALL.offset(layer, block_id) + 5] ^= 1

    def _mark(self) -> None:
        pool = np.frombuffer(self._into.buffer, dtype=np.uint8).reshape(SMALL.num_layers, SMALL.num_blocks, -1)
        pool[:, self._blocks] = MARK

    def _check_mark(self) -> None:
        assert (blocks_of(self._into, SMALL, self._blocks) == MARK).all(), "a late write"


async def chaos(name: str, seed: int, *, turns: int) -> list[str]:
    with regions(SMALL) as (pool, into):
        fill(pool, seed=1)
        async with served_source(pool, SMALL) as source, destination(into, SMALL, backend=name) as landing:
            owners = [Owner(number, seed, source, into, landing) for number in range(OWNERS)]
            async with asyncio.TaskGroup() as group:
                for owner in owners:
                    group.create_task(owner.run(turns))
            await source.wait_released(*(f"{owner}.{turn}" for owner in range(OWNERS) for turn in range(turns)))
            assert source.source.ledger() == []
            await eventually(lambda: source.source.num_followers == 0)
            statistics = landing.statistics()
            assert len(statistics) == 1
            assert statistics[0].transfers_total == sum(owner.outcomes.count("landed") for owner in owners)
    return [outcome for owner in owners for outcome in owner.outcomes]


@pytest.mark.parametrize("seed", range(3))
async def test_disturbed_transfers_land_rightly_or_not_at_all(transport_name: str, seed: int) -> None:
    outcomes = await chaos(transport_name, seed, turns=8)
    assert {"landed", "cancel", "fail", "damage"} <= set(outcomes)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 120))
async def test_disturbed_transfers_land_rightly_or_not_at_all_for_long(transport_name: str, seed: int) -> None:
    await chaos(transport_name, seed, turns=200)
