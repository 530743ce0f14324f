"""Blocks of a read as chunks: both ends cut at the same bytes, and what is packed is what is unpacked."""

from __future__ import annotations

import concurrent.futures
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.errors import TransferTimeout
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.runs import runs
from kvtransfer.transports.packing import Span, StagingBuffer, StagingBuffers, chunks, spans
from tests.support.kv_pools import SMALL, blocks_of, fill

BLOCKS = st.permutations(range(SMALL.num_blocks))


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 40))
def test_chunks_hold_every_byte_in_order_and_all_but_the_last_are_full(sizes: list[int], chunk_bytes: int) -> None:
    whole = [Span(1000 * number, size) for number, size in enumerate(sizes)]
    parts = list(chunks(whole, chunk_bytes))
    assert all(sum(span.size for span in part) == chunk_bytes for part in parts[:-1])
    assert all(0 < sum(span.size for span in part) <= chunk_bytes for part in parts[-1:])
    seen = [byte for part in parts for span in part for byte in range(span.offset, span.offset + span.size)]
    assert seen == [byte for span in whole for byte in range(span.offset, span.offset + span.size)]


@given(BLOCKS, BLOCKS, st.integers(1, SMALL.num_blocks), st.integers(64, 4096))
def test_what_one_end_packs_the_other_unpacks(source: list[int], into: list[int], count: int, chunk_bytes: int) -> None:
    layers = range(SMALL.num_layers)
    with Region.allocate(SMALL.pool_bytes) as one, Region.allocate(SMALL.pool_bytes) as other:
        fill(one, seed=1)
        there = chunks(spans(SMALL, runs(source[:count]), layers), chunk_bytes)
        here = chunks(spans(SMALL, runs(into[:count]), layers), chunk_bytes)
        buffer = StagingBuffer(chunk_bytes)
        for packed, unpacked in zip(there, here, strict=True):
            message = buffer.gather(packed, one.base_address)
            assert len(message) == sum(span.size for span in unpacked)
            buffer.scatter(unpacked, other.base_address)
        assert (blocks_of(other, SMALL, into[:count]) == blocks_of(one, SMALL, source[:count])).all()
        assert not blocks_of(other, SMALL, into[count:]).any()


def test_a_staging_buffer_is_used_again() -> None:
    staging = StagingBuffers(2, 64)
    one = staging.take(1, deadline=Deadline.after(1))
    staging.give_back(one)
    both = staging.take(2, deadline=Deadline.after(1))
    assert one[0] in both


def test_who_finds_no_buffer_waits_for_one_within_his_deadline() -> None:
    staging = StagingBuffers(2, 64)
    taken = staging.take(2, deadline=Deadline.after(1))
    with pytest.raises(TransferTimeout, match="1 of 2 staging buffers"):
        staging.take(1, deadline=Deadline.after(0.01))
    begins = threading.Event()

    def wait() -> list[StagingBuffer]:
        begins.set()
        return staging.take(2, deadline=Deadline.after(10))

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait)
        assert begins.wait(5)
        staging.give_back(taken)
        assert waiting.result(10) == taken[::-1] or set(waiting.result()) == set(taken)


def test_a_lost_buffer_is_never_handed_out_again_and_another_takes_its_place() -> None:
    staging = StagingBuffers(1, 64)
    lost = staging.take(1, deadline=Deadline.after(1))
    staging.lose(lost)
    assert staging.num_lost == 1
    assert staging.take(1, deadline=Deadline.after(1))[0] is not lost[0]
