"""A source and a destination in one process, with a real gRPC control plane between them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator

from kvtransfer import Region, TransferDestination
from tests.support.kv_pools import (
    EPOCH,
    SMALL,
    ServedSource,
    blocks_of,
    destination,
    regions,
    served_source,
)

TABLE = [7, 8, 9, 2, 30, 1]
"""The source's block table of a prompt of up to 24 tokens."""
INTO = [20, 3, 4, 5, 11, 10, 17]
"""Ours, one block longer."""


@dataclasses.dataclass
class Both:
    source: ServedSource
    into: Region
    destination: TransferDestination

    def check_landed(self, count: int, *, skip: int = 0) -> None:
        wanted = blocks_of(self.source.region, SMALL, TABLE[skip:count])
        assert (blocks_of(self.into, SMALL, INTO[skip:count]) == wanted).all()
        others = sorted(set(range(SMALL.num_blocks)) - set(INTO[skip:count]))
        assert not blocks_of(self.into, SMALL, others).any()


@contextlib.asynccontextmanager
async def connected(name: str, *, lease_s: float = 30.0) -> AsyncIterator[Both]:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL, lease_s=lease_s) as source,
            destination(into, SMALL, backend=name) as landing,
        ):
            yield Both(source, into, landing)


@dataclasses.dataclass(frozen=True)
class ServedTicket:
    address: str
    transfer_id: str = "t"
    instance_id: str = "context-0"
    epoch: int = EPOCH
