"""Blocks of a read as chunks: both ends cut at the same bytes, and what is packed is what is unpacked."""

from __future__ import annotations

import concurrent.futures
import threading

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.errors import TransferTimeout
from kvtransfer.checksum import PoolBlocks, block_checksums, block_sums
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.runs import runs
from kvtransfer.transports import block_stream
from kvtransfer.transports.block_stream import ArrivingBlocks
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


@given(
    blocks=st.tuples(BLOCKS, BLOCKS, st.integers(1, SMALL.num_blocks)),
    chunk_bytes=st.integers(64, 4096),
    layers=st.sampled_from((range(SMALL.num_layers), range(1, SMALL.num_layers))),
    is_summed=st.booleans(),
    is_native=st.booleans(),
)
def test_what_one_end_packs_the_other_puts_in_its_place(
    blocks: tuple[list[int], list[int], int], chunk_bytes: int, layers: range, is_summed: bool, is_native: bool
) -> None:
    source, into, count = blocks
    with Region.allocate(SMALL.pool_bytes) as one, Region.allocate(SMALL.pool_bytes) as other:
        fill(one, seed=1)
        buffer = StagingBuffer(chunk_bytes)
        sums = block_sums(count, SMALL, len(layers)) if is_summed else None
        with pytest.MonkeyPatch.context() as patched:
            if not is_native:
                patched.setattr(block_stream, "library", lambda: None)
            arriving = ArrivingBlocks(PoolBlocks(other.base_address, SMALL, into[:count]), layers, sums)
        for packed in chunks(spans(SMALL, runs(source[:count]), layers), chunk_bytes):
            arriving.put(buffer.gather(packed, one.base_address))
        left_out = [layer for layer in range(SMALL.num_layers) if layer not in layers]
        theirs, ours = (
            region_array(region)[list(layers)][:, ids[:count]] for region, ids in ((one, source), (other, into))
        )
        assert (ours == theirs).all()
        assert not region_array(other)[left_out].any()
        assert not blocks_of(other, SMALL, into[count:]).any()
        if sums is not None and not sums.is_untouched:
            assert sums.values() == block_checksums(one.buffer, SMALL, source[:count], layers)


def region_array(region: Region) -> npt.NDArray[np.uint8]:
    return np.frombuffer(region.buffer, np.uint8).reshape(SMALL.num_layers, SMALL.num_blocks, SMALL.block_bytes)


@pytest.mark.parametrize("num_bytes", [1, SMALL.block_bytes + 1])
def test_more_bytes_than_there_are_blocks_touch_nothing(num_bytes: int) -> None:
    with Region.allocate(SMALL.pool_bytes) as pool:
        arriving = ArrivingBlocks(PoolBlocks(pool.base_address, SMALL, [1]), range(1), None)
        message = memoryview(bytearray(b"x" * (SMALL.block_bytes + 1)))
        if num_bytes == 1:
            arriving.put(message[: SMALL.block_bytes])
        with pytest.raises(AssertionError, match="more bytes than there are blocks"):
            arriving.put(message[:num_bytes])
        assert not blocks_of(pool, SMALL, [0, 2]).any()


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
        assert begins.wait(20)
        staging.give_back(taken)
        assert waiting.result(10) == taken[::-1] or set(waiting.result()) == set(taken)


def test_a_lost_buffer_is_never_handed_out_again_and_another_takes_its_place() -> None:
    staging = StagingBuffers(1, 64)
    lost = staging.take(1, deadline=Deadline.after(1))
    staging.lose(lost)
    assert staging.num_lost == 1
    assert staging.take(1, deadline=Deadline.after(1))[0] is not lost[0]
