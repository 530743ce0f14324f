"""A transfer that is named by the hashes of its blocks: opened by its reader, and from there on like any other."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

import pytest

from disaggregated import rpc
from disaggregated.block_hash import BlockHash, to_bytes
from disaggregated.errors import QueueFull, TransferError
from kvtransfer import Preference, Region, SourceOptions, TransferSource
from tests.support.kv_pools import (
    EPOCH,
    SMALL,
    SomeTicket,
    blocks_of,
    destination,
    eventually,
    has_landed,
    identity,
    regions,
)

HASHES = [BlockHash(1000 + number) for number in range(10)]


@dataclasses.dataclass(slots=True)
class Lender:
    """Holds what it was told to hold, and lends it block by block as an engine's cache would."""

    region: Region
    held: dict[BlockHash, int]
    source: TransferSource = dataclasses.field(init=False)
    address: str = ""
    released: list[str] = dataclasses.field(default_factory=list)
    refuses: bool = False
    may_go_on: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    is_asked: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    async def lend(self, transfer_id: str, hashes: Sequence[BlockHash]) -> None:
        self.source.open(transfer_id)
        self.is_asked.set()
        try:
            await self.may_go_on.wait()
            if self.refuses:
                raise QueueFull("the engine has too much to do")
            block_ids = []
            for block_hash in hashes:
                if block_hash not in self.held:
                    break
                block_ids.append(self.held[block_hash])
            self.source.finish(transfer_id, block_ids, len(block_ids) * SMALL.block_size, 0)
        except BaseException:
            self.source.fail(transfer_id, "the blocks could not be lent")
            raise

    def ticket(self, transfer_id: str = "t") -> SomeTicket:
        return SomeTicket(self.address, transfer_id)


@contextlib.asynccontextmanager
async def lending(
    transport: str, region: Region, held: Sequence[BlockHash], *, lends: bool = True
) -> AsyncIterator[Lender]:
    """Block i of `held` lies in block 20 + i of the pool."""
    lender = Lender(region, {each: 20 + i for i, each in enumerate(held)})
    source = lender.source = TransferSource(
        region,
        identity(SMALL, "context-0", epoch=EPOCH),
        on_released=lender.released.append,
        options=SourceOptions(preference=Preference(transport), lend=lender.lend if lends else None),
    )
    lender.may_go_on.set()
    server = rpc.make_server()
    source.add_to(server)
    lender.address = rpc.bind(server, "127.0.0.1", 0)
    await source.start()
    await server.start()
    try:
        yield lender
        source.check_integrity()
    finally:
        await source.close()
        await server.stop(grace=None)


async def test_what_is_held_lands_where_it_was_asked_for_and_is_released(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with lending(transport_name, pool, HASHES[:4]) as lender, destination(into, SMALL) as ours:
            landed = await ours.pull(lender.ticket(), [3, 1, 2, 0], deadline_s=20, block_hashes=to_bytes(HASHES[:4]))
            assert landed.num_tokens == 4 * SMALL.block_size
            assert landed.num_bytes == 4 * SMALL.block_bytes * SMALL.num_layers
            assert (blocks_of(into, SMALL, [3, 1, 2, 0]) == blocks_of(pool, SMALL, [20, 21, 22, 23])).all()
            await eventually(lambda: lender.released == ["t"])


async def test_of_blocks_that_are_held_in_part_the_beginning_lands(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        held = [*HASHES[:2], *HASHES[3:6]]
        async with lending(transport_name, pool, held) as lender, destination(into, SMALL) as ours:
            landed = await ours.pull(lender.ticket(), range(6), deadline_s=20, block_hashes=to_bytes(HASHES[:6]))
            assert landed.num_tokens == 2 * SMALL.block_size
            assert not any(has_landed(into, SMALL, block) for block in range(2, 6))


async def test_nothing_held_is_a_transfer_of_nothing(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with lending(transport_name, pool, []) as lender, destination(into, SMALL) as ours:
            landed = await ours.pull(lender.ticket(), range(6), deadline_s=20, block_hashes=to_bytes(HASHES[:6]))
            assert (landed.num_tokens, landed.num_bytes) == (0, 0)
            await eventually(lambda: lender.released == ["t"])


async def test_a_source_that_lends_nothing_says_so(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with lending(transport_name, pool, [], lends=False) as lender, destination(into, SMALL) as ours:
            with pytest.raises(TransferError, match="lends no blocks"):
                await ours.pull(lender.ticket(), range(6), deadline_s=20, block_hashes=to_bytes(HASHES[:6]))


async def test_a_stranger_who_asks_under_anothers_name_ends_nothing_of_theirs(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with lending(transport_name, pool, HASHES[:2]) as lender, destination(into, SMALL) as ours:
            lender.may_go_on.clear()
            asked = ours.start(lender.ticket(), range(2), deadline_s=20, block_hashes=to_bytes(HASHES[:2]))
            await eventually(lender.source.ledger)
            async with destination(into, SMALL, instance_id="a stranger") as stranger:
                with pytest.raises(TransferError, match="an id is used once"):
                    await stranger.pull(lender.ticket(), range(2), deadline_s=20, block_hashes=to_bytes(HASHES[:2]))
            lender.may_go_on.set()
            landed = await asked.outcome()
            assert landed.num_tokens == 2 * SMALL.block_size
            await asked.ended()


async def test_hashes_that_are_cut_short_are_refused(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with lending(transport_name, pool, HASHES) as lender, destination(into, SMALL) as ours:
            with pytest.raises(TransferError, match="whole number"):
                await ours.pull(lender.ticket(), range(6), deadline_s=20, block_hashes=to_bytes(HASHES[:6])[:-1])
            assert not lender.is_asked.is_set()


async def test_a_lender_that_refuses_ends_the_transfer(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with lending(transport_name, pool, HASHES) as lender, destination(into, SMALL) as ours:
            lender.refuses = True
            with pytest.raises(TransferError, match="too much to do"):
                await ours.pull(lender.ticket(), range(6), deadline_s=20, block_hashes=to_bytes(HASHES[:6]))
            await eventually(lambda: lender.released == ["t"])


async def test_a_reader_that_leaves_while_it_is_looked_for_leaves_nothing_behind(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with lending(transport_name, pool, HASHES) as lender, destination(into, SMALL) as ours:
            lender.may_go_on.clear()
            pulling = asyncio.create_task(
                ours.pull(lender.ticket(), range(6), deadline_s=20, block_hashes=to_bytes(HASHES[:6]))
            )
            await lender.is_asked.wait()
            pulling.cancel()
            with pytest.raises((asyncio.CancelledError, TransferError)):
                await pulling
            await eventually(lambda: lender.released == ["t"])
            assert not any(has_landed(into, SMALL, block) for block in range(6))


async def test_one_id_is_lent_under_once(transport_name: str) -> None:
    with regions(SMALL) as (pool, into):
        async with lending(transport_name, pool, HASHES) as lender, destination(into, SMALL) as ours:
            await ours.pull(lender.ticket(), range(6), deadline_s=20, block_hashes=to_bytes(HASHES[:6]))
            with pytest.raises(TransferError, match="used once"):
                await ours.pull(lender.ticket(), range(6), deadline_s=20, block_hashes=to_bytes(HASHES[:6]))
