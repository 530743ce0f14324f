"""Transfers from several ranks, or into other blocks: what streams, what is skipped, what fails, who is released."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

import pytest

from disaggregated.errors import ChecksumMismatch, LayoutMismatch, SourceFailed, TransferError
from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding
from tests.support.kv_instances import ContextRank, Instances, instances
from tests.support.kv_pools import SomeTicket, eventually, flip_bit
from tests.support.kv_shards import Floats, Ranks, fetch, model_kv, model_layout, store

SMALL, LARGE = model_layout(block_size=8), model_layout(block_size=32)
TWO_BY_TWO = Ranks(tensor=2, stages=(2, 4))


def whole(layout: KVLayout) -> list[KVHolding]:
    return [KVHolding.whole(layout)]


def byte_rows(rank: ContextRank, kv: Floats) -> int:
    """Bytes of all blocks of one layer of this rank, for a prompt."""
    return rank.num_blocks(kv.shape[3]) * rank.holding.layout.block_bytes


@pytest.mark.parametrize(("theirs", "ours"), [(SMALL, LARGE), (LARGE, SMALL)], ids=["8-32", "32-8"])
async def test_chunks_are_converted_while_later_ones_are_computed(
    theirs: KVLayout, ours: KVLayout, transport_name: str
) -> None:
    kv = model_kv(theirs, 75)
    async with instances(TWO_BY_TWO.holdings(theirs), whole(ours), backend=transport_name) as both:
        (generation,) = both.generation
        for rank in both.context:
            rank.served.source.open("t", num_tokens=75)
        tickets = [rank.served.ticket("t") for rank in both.context]
        pulling = asyncio.create_task(generation.pull(tickets, 75))
        for num_tokens in (32, 64, 75):
            for rank in both.context:
                store(rank.served.region.buffer, rank.holding, rank.table, kv[:, :, :, :num_tokens])
                assert rank.served.source.publish("t", rank.table, num_tokens)
            await eventually(functools.partial(has_come, both, kv[:, :, :, :num_tokens]))
        for rank in both.context:
            assert rank.served.source.finish("t", rank.table, 75, 7)
        assert (await pulling).first_token == 7
        generation.check_holds(kv)
        await both.released("t")


def has_come(both: Instances, kv: Floats) -> bool:
    (generation,) = both.generation
    found = fetch(generation.region.buffer, generation.holding, generation.table, kv.shape[3])
    return bool(found[-1].any(axis=(1, 2, 3)).all())


@pytest.mark.parametrize("skip", [0, 1, 2, 5])
@pytest.mark.parametrize("context_parallel", [1, 2])
async def test_what_is_here_already_is_neither_read_nor_touched(skip: int, context_parallel: int) -> None:
    """`skip_blocks` counts our blocks of 8; the source's have 32 tokens, of which some are then wanted in part."""
    kv = model_kv(LARGE, 45)
    source = Ranks(context=context_parallel, stripe_tokens=32).holdings(LARGE)
    async with instances(source, whole(SMALL)) as both:
        (generation,) = both.generation
        tickets = both.offer("t", kv)
        landed = await generation.pull(tickets, 45, skip_blocks=skip)
        found = fetch(generation.region.buffer, generation.holding, generation.table, 45)
        assert not found[: 8 * skip].any()
        assert found[8 * skip :].any(axis=(1, 2, 3, 4)).all()
        read = {0: 2, 1: 2, 2: 2, 5: 1}[skip]
        assert landed.num_bytes == read * LARGE.num_layers * LARGE.block_bytes
        await both.released("t")


@pytest.mark.parametrize("max_tokens", [1, 7, 40, 1000])
async def test_any_buffer_size_works(max_tokens: int, transport_name: str) -> None:
    kv = model_kv(LARGE, 90)
    sources, ours = TWO_BY_TWO.holdings(LARGE), Ranks(tensor=2).holdings(SMALL)
    async with instances(sources, ours, backend=transport_name, max_tokens_in_buffer=max_tokens) as both:
        await both.transfer("t", kv)
        for rank in both.generation:
            rank.check_holds(kv)


async def test_many_transfers_at_once_share_one_staging_region() -> None:
    layout = model_layout(num_blocks=64)
    prompts = [model_kv(layout, 20, seed=seed) for seed in range(8)]
    sources = Ranks(tensor=2).holdings(layout)
    async with instances(sources, whole(layout), max_tokens_in_buffer=16) as both:
        (generation,) = both.generation
        tables = [[8 * number + block for block in range(3)] for number in range(8)]
        async with asyncio.TaskGroup() as group:
            for number, (kv, table) in enumerate(zip(prompts, tables, strict=True)):
                tickets = offer_in(both, str(number), kv, table)
                group.create_task(generation.landing.pull(tickets, table, deadline_s=10))
        for kv, table in zip(prompts, tables, strict=True):
            generation.table = table
            generation.check_holds(kv)


def offer_in(both: Instances, transfer_id: str, kv: Floats, table: Sequence[int]) -> list[SomeTicket]:
    tickets = []
    for rank in both.context:
        store(rank.served.region.buffer, rank.holding, table, kv)
        tickets.append(rank.served.offer(transfer_id, table, kv.shape[3]))
    return tickets


# Only what is needed is read.


async def test_a_stage_reads_its_layers_alone_once_the_source_knows_of_it() -> None:
    """The first transfer was published before anybody had connected, as one: it is verified as one."""
    kv = model_kv(SMALL, 45)
    async with instances(whole(SMALL), Ranks(stages=(2, 4)).holdings(SMALL)) as both:
        (context,) = both.context
        row = byte_rows(context, kv)
        assert [landed.num_bytes for landed in await both.transfer("early", kv)] == [6 * row, 6 * row]
        assert [landed.num_bytes for landed in await both.transfer("later", kv)] == [2 * row, 4 * row]
        for rank in both.generation:
            rank.check_holds(kv)


async def test_ranks_that_hold_nothing_of_ours_are_not_read_and_are_released() -> None:
    kv = model_kv(SMALL, 45)
    ours = Ranks(tensor=2, stages=(2, 4)).holdings(SMALL)[3:]
    async with instances(TWO_BY_TWO.holdings(SMALL), ours) as both:
        (landed,) = await both.transfer("t", kv)
        assert landed.num_bytes == 4 * byte_rows(both.context[3], kv)
        read = [rank.served.source.statistics()["SHM"].bytes_total for rank in both.context]
        assert read == [0, 0, 0, landed.num_bytes]
        both.generation[0].check_holds(kv)


async def test_replicas_share_the_load_of_many_transfers() -> None:
    layout = model_layout(num_kv_heads=2)
    kv = model_kv(layout, 9)
    async with instances(Ranks(tensor=4).holdings(layout), whole(layout)) as both:
        for number in range(24):
            await both.transfer(str(number), kv)
        read = [rank.served.source.statistics()["SHM"].reads_total for rank in both.context]
        assert sum(read) == 2 * 24
        assert min(read) >= 5


# Failures, and who is released.


async def test_one_rank_that_fails_fails_the_whole_and_the_others_are_released() -> None:
    kv = model_kv(SMALL, 45)
    async with instances(TWO_BY_TWO.holdings(SMALL), whole(SMALL)) as both:
        (generation,) = both.generation
        tickets = both.offer("t", kv)[:3]
        broken = both.context[3].served
        broken.source.open("u")
        pulling = asyncio.create_task(generation.pull([*tickets, broken.ticket("u")], 45))
        await eventually(lambda: broken.source.num_followers)
        broken.source.fail("u", "out of memory")
        with pytest.raises(SourceFailed, match="context-3: out of memory"):
            await pulling
        for rank in both.context[:3]:
            await rank.served.wait_released("t")
        await broken.wait_released("u")


async def test_a_bit_that_flipped_in_one_rank_is_found_before_anything_of_it_is_converted() -> None:
    kv = model_kv(SMALL, 45)
    async with instances(Ranks(tensor=2).holdings(SMALL), whole(LARGE)) as both:
        (generation,), second = both.generation, both.context[1]
        tickets = both.offer("t", kv)
        flip_bit(second.served.region, second.holding.layout, layer=3, block_id=second.table[0])
        with pytest.raises(ChecksumMismatch, match=f"block {second.table[0]} of"):
            await generation.pull(tickets, 45)
        heads = fetch(generation.region.buffer, generation.holding, generation.table, 8)[:, :, :, 2:]
        assert not heads.any()
        await both.released("t")


async def test_ranks_that_leave_a_gap_are_refused_in_words_and_released() -> None:
    kv = model_kv(SMALL, 45)
    async with instances(TWO_BY_TWO.holdings(SMALL), whole(SMALL)) as both:
        (generation,) = both.generation
        tickets = both.offer("t", kv)
        with pytest.raises(LayoutMismatch, match="no source holds layers 0-1, KV heads 2-3"):
            await generation.pull([tickets[0], *tickets[2:]], 45)
        for rank in (both.context[0], *both.context[2:]):
            await rank.served.wait_released("t")


@pytest.mark.parametrize(("num_tokens", "first_token"), [(44, 42), (45, 43)])
async def test_ranks_that_speak_of_different_prompts_do_not_land(num_tokens: int, first_token: int) -> None:
    kv = model_kv(SMALL, 45)
    async with instances(Ranks(tensor=2).holdings(SMALL), whole(SMALL)) as both:
        (generation,), (first, second) = both.generation, both.context
        tickets = [first.served.offer("t", first.table, first.compute(kv))]
        second.compute(kv)
        tickets.append(second.served.offer("t", second.table, num_tokens, first_token=first_token))
        with pytest.raises(TransferError, match="context-"):
            await generation.pull(tickets, 45)
        await both.released("t")


async def test_a_prompt_that_is_cut_by_its_length_needs_it_told() -> None:
    kv = model_kv(SMALL, 45)
    async with instances(Ranks(context=2).holdings(SMALL), whole(SMALL)) as both:
        (generation,) = both.generation
        tickets = both.offer("t", kv)
        with pytest.raises(TransferError, match="its length, which was not told"):
            await generation.landing.pull(tickets, generation.table, deadline_s=20)
        await both.released("t")


async def test_more_tokens_than_blocks_were_reserved_for_are_refused() -> None:
    kv = model_kv(LARGE, 45)
    async with instances(whole(LARGE), whole(SMALL)) as both:
        (generation,) = both.generation
        tickets = both.offer("t", kv)
        with pytest.raises(TransferError, match="2 blocks were published, 1 are reserved"):
            await generation.landing.pull(tickets, generation.table[:4], deadline_s=20)
        await both.released("t")


# Several readers of one rank.


async def test_a_source_keeps_its_blocks_until_its_last_reader_has_landed() -> None:
    kv = model_kv(SMALL, 45)
    async with instances(whole(SMALL), Ranks(tensor=2).holdings(SMALL)) as both:
        (context,), (first, second) = both.context, both.generation
        tickets = both.offer("t", kv)
        await first.pull(tickets, 45)
        assert context.served.released.empty()
        assert len(context.served.source.ledger()) == 1
        await second.pull(tickets, 45)
        await both.released("t")
        for rank in both.generation:
            rank.check_holds(kv)


async def test_a_reader_that_never_comes_is_no_leak() -> None:
    kv = model_kv(SMALL, 45)
    async with instances(whole(SMALL), Ranks(tensor=2).holdings(SMALL), lease_s=0.4) as both:
        await both.generation[0].pull(both.offer("t", kv), 45)
        await both.released("t")
        assert both.context[0].served.source.ledger() == []


async def test_a_reader_that_gives_up_takes_nothing_from_the_other() -> None:
    kv = model_kv(SMALL, 45)
    async with instances(whole(SMALL), Ranks(tensor=2).holdings(SMALL)) as both:
        first, second = both.generation
        (ticket,) = tickets = both.offer("t", kv)
        first.landing.decline(ticket)
        await second.pull(tickets, 45)
        second.check_holds(kv)
        await both.released("t")
