"""Conversion into a device's memory, whose part a CPU tensor takes: blocks are read, written in part, put back."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch

from disaggregated.engine.cuda.staging import DeviceBlockCopier
from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding
from kvtransfer import DestinationOptions, Region, TransferDestination
from kvtransfer.negotiate import Preference
from tests.support.kv_instances import instances
from tests.support.kv_pools import identity
from tests.support.kv_shards import Ranks, expected, fetch, model_kv, model_layout

OURS = model_layout(block_size=16)
TABLE = [9, 2, 17, 4, 0, 11]


def pool_bytes(pool: torch.Tensor) -> memoryview:
    return pool.numpy().data.cast("B")


@pytest.mark.parametrize("num_staged", [1, 2, 6])
@pytest.mark.parametrize(
    ("source", "theirs"),
    [
        (Ranks(tensor=2, stages=(2, 4)), model_layout(block_size=8)),
        (Ranks(tensor=4), model_layout(block_size=64)),
        (Ranks(context=2, stripe_tokens=4), model_layout(block_size=8)),
    ],
    ids=str,
)
async def test_parts_of_a_block_come_together_in_a_devices_memory(
    source: Ranks, theirs: KVLayout, num_staged: int
) -> None:
    kv = model_kv(theirs, 90)
    staging = dataclasses.replace(OURS, num_blocks=num_staged)
    pool = torch.zeros((OURS.num_layers, OURS.num_blocks, OURS.block_bytes), dtype=torch.uint8)
    async with instances(source.holdings(theirs), []) as both:
        with Region.allocate(staging.pool_bytes) as region:
            host = torch.frombuffer(region.buffer, dtype=torch.uint8, count=staging.pool_bytes)
            landing = TransferDestination(
                region,
                identity(staging),
                DestinationOptions(preference=Preference("SHM")),
                copier=DeviceBlockCopier(pool, host.view(staging.num_layers, staging.num_blocks, -1)),
            )
            try:
                tickets = [rank.served.offer("t", rank.table, rank.compute(kv), num_readers=1) for rank in both.context]
                async with asyncio.timeout(20):
                    await landing.pull(tickets, TABLE, deadline_s=10, num_tokens=90)
                await both.released("t")
            finally:
                await landing.close()
            del host
    ours = KVHolding.whole(OURS)
    assert (fetch(pool_bytes(pool), ours, TABLE, 90) == expected(ours, kv)).all()
    others = sorted(set(range(OURS.num_blocks)) - set(TABLE))
    assert not pool[:, others].any()
