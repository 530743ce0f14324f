"""Instances of several ranks: a source server for each context rank, a destination for each generation rank."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding
from kvtransfer import Landed, Region, TransferDestination
from kvtransfer.negotiate import Preference
from tests.support.kv_pools import ServedSource, SomeTicket, destination, served_source
from tests.support.kv_shards import Floats, expected, fetch, store, tokens_of


@dataclasses.dataclass(slots=True)
class ContextRank:
    holding: KVHolding
    served: ServedSource
    table: Sequence[int]

    def compute(self, kv: Floats) -> int:
        """The prompt's part of this rank is in its pool. Returns how many tokens that is."""
        return store(self.served.region.buffer, self.holding, self.table, kv)

    def num_blocks(self, num_tokens: int) -> int:
        return self.holding.layout.num_blocks_for(len(tokens_of(self.holding, num_tokens)))


@dataclasses.dataclass(slots=True)
class GenerationRank:
    holding: KVHolding
    region: Region
    landing: TransferDestination
    table: Sequence[int]

    async def pull(self, tickets: Sequence[SomeTicket], num_tokens: int, *, skip_blocks: int = 0) -> Landed:
        needed = self.holding.layout.num_blocks_for(len(tokens_of(self.holding, num_tokens)))
        return await self.landing.pull(
            tickets, self.table[:needed], deadline_s=10, skip_blocks=skip_blocks, num_tokens=num_tokens
        )

    def check_holds(self, kv: Floats) -> None:
        """Byte for byte what this rank would have computed itself, and nothing anywhere else."""
        num_tokens = kv.shape[3]
        found = fetch(self.region.buffer, self.holding, self.table, num_tokens)
        assert (found == expected(self.holding, kv)).all()


@dataclasses.dataclass(slots=True)
class Instances:
    context: list[ContextRank]
    generation: list[GenerationRank]

    def offer(self, transfer_id: str, kv: Floats) -> list[SomeTicket]:
        """Every context rank has computed its part and offers it to every generation rank."""
        readers = len(self.generation)
        return [
            rank.served.offer(transfer_id, rank.table, rank.compute(kv), num_readers=readers) for rank in self.context
        ]

    async def transfer(self, transfer_id: str, kv: Floats) -> list[Landed]:
        tickets = self.offer(transfer_id, kv)
        async with asyncio.TaskGroup() as group:
            pulls = [group.create_task(rank.pull(tickets, kv.shape[3])) for rank in self.generation]
        await self.released(transfer_id)
        return [pull.result() for pull in pulls]

    async def released(self, transfer_id: str) -> None:
        """On every rank, once."""
        for rank in self.context:
            await rank.served.wait_released(transfer_id)


@contextlib.asynccontextmanager
async def instances(
    source: Sequence[KVHolding],
    into: Sequence[KVHolding],
    *,
    backend: str = "SHM",
    max_tokens_in_buffer: int | None = None,
    lease_s: float = 30.0,
) -> AsyncIterator[Instances]:
    """Tables go backwards through the pools, so that no block keeps its number by chance."""
    async with contextlib.AsyncExitStack() as stack:
        made = Instances([], [])
        for number, holding in enumerate(source):
            region = stack.enter_context(Region.allocate(holding.layout.pool_bytes))
            served = await stack.enter_async_context(
                served_source(
                    region,
                    holding.layout,
                    preference=Preference(backend),
                    instance_id=f"context-{number}",
                    shard=holding.shard,
                    lease_s=lease_s,
                )
            )
            made.context.append(ContextRank(holding, served, _table(holding.layout)))
        for number, holding in enumerate(into):
            region = stack.enter_context(Region.allocate(holding.layout.pool_bytes))
            landing = await stack.enter_async_context(
                destination(
                    region,
                    holding.layout,
                    backend=backend,
                    instance_id=f"generation-{number}",
                    shard=holding.shard,
                    max_tokens_in_buffer=max_tokens_in_buffer,
                )
            )
            made.generation.append(GenerationRank(holding, region, landing, _table(holding.layout)[::2]))
        yield made


def _table(layout: KVLayout) -> list[int]:
    return list(reversed(range(layout.num_blocks)))
