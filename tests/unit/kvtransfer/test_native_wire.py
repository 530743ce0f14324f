"""Blocks through a socket by native code: whatever the shape, the alignment of the pool and the pieces that arrive."""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.kv_layout import KVLayout
from kvtransfer.checksum import NativeSums, PoolBlocks, native_order
from kvtransfer.native import library
from kvtransfer.native.library import ISAS, Outcome

if library.library() is None:
    pytest.skip("no native code here", allow_module_level=True)

BUFFERED_BYTES = 4 << 20
"""From here on a read goes by way of a buffer."""
ALIGNMENT = 64
thorough = settings(max_examples=25)


@pytest.fixture(params=ISAS, scope="module")
def native(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    found = library.opened(request.param)
    if ISAS[found.choose_isa(ISAS.index(request.param))] != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    yield found
    found.choose_isa(len(ISAS) - 1)


def layout_of(block_values: int, num_layers: int, num_blocks: int) -> KVLayout:
    """A block of one layer is 8 * `block_values` bytes."""
    return KVLayout(
        num_layers=num_layers,
        num_kv_heads=1,
        head_dim=block_values,
        block_size=1,
        dtype="float32",
        num_blocks=num_blocks,
    )


class Pool:
    """Zeroes at a chosen distance from an aligned address."""

    def __init__(self, layout: KVLayout, *, off: int) -> None:
        self.layout = layout
        self._memory = np.zeros(layout.pool_bytes + 2 * ALIGNMENT, np.uint8)
        begin = -self._memory.ctypes.data % ALIGNMENT + off
        self.bytes = self._memory[begin : begin + layout.pool_bytes]
        self.blocks = self.bytes.reshape(layout.num_layers, layout.num_blocks, layout.block_bytes)

    def of(self, ids: Sequence[int]) -> PoolBlocks:
        return PoolBlocks(self.bytes.ctypes.data, self.layout, ids)


def feed(sock: socket.socket, wire: bytes, pieces: random.Random | None) -> threading.Thread:
    def run() -> None:
        at = 0
        with contextlib.suppress(BrokenPipeError):  # The receiver may have heard enough.
            while at < len(wire):
                size = len(wire) if pieces is None else pieces.choice((1, 63, 64, 4097, 100_000, 700_001))
                sock.sendall(wire[at : at + size])
                at += size
            sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def receive(native: Any, pool: Pool, ids: Sequence[int], wire: bytes, pieces: random.Random | None) -> Any:
    """The outcome, and the running checksums."""
    layout = pool.layout
    sums = NativeSums(native, len(ids), layout.num_layers * layout.block_bytes)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        feeding = feed(theirs, wire, pieces)
        order = sums.order(pool.of(ids), None, range(layout.num_layers))
        outcome = native.receive_blocks(ours.fileno(), order.buffer_info()[0], sums.address(), math.inf)
        feeding.join(10)
    return outcome, sums


@given(
    shape=st.tuples(st.sampled_from((250, 256, 1000, 8192)), st.integers(1, 3)),
    is_buffered=st.booleans(),
    off=st.sampled_from((0, 8, 32, 40)),
    seed=st.integers(0, 2**32),
)
@thorough
def test_blocks_land_where_they_belong_and_are_summed_up(
    native: Any, shape: tuple[int, int], is_buffered: bool, off: int, seed: int
) -> None:
    (block_values, num_layers), dice = shape, random.Random(seed)
    row_bytes = 8 * block_values * num_layers
    count = BUFFERED_BYTES // row_bytes + 1 if is_buffered else max(1, 100_000 // row_bytes)
    pool = Pool(layout_of(block_values, num_layers, count + 3), off=off)
    ids = dice.sample(range(count + 3), count)
    wire = np.frombuffer(dice.randbytes(row_bytes * count), np.uint8)
    outcome, sums = receive(native, pool, ids, wire.tobytes(), dice)
    assert outcome == Outcome.DONE
    sent = wire.reshape(num_layers, count, 8 * block_values)
    assert (pool.blocks[:, ids] == sent).all()
    others = sorted(set(range(count + 3)) - set(ids))
    assert not pool.blocks[:, others].any()
    for number, value in enumerate(sums.values()):
        assert value == xxhash.xxh3_64_intdigest(sent[:, number].tobytes())


@pytest.mark.parametrize("num_bytes", [512, BUFFERED_BYTES])
@pytest.mark.parametrize("missing_bytes", [1, 64])
def test_a_sender_that_ends_early_is_told_of(native: Any, num_bytes: int, missing_bytes: int) -> None:
    pool = Pool(layout_of(64, 1, num_bytes // 512), off=0)
    wire = b"x" * (num_bytes - missing_bytes)
    outcome, _ = receive(native, pool, range(num_bytes // 512), wire, None)
    assert outcome == Outcome.CLOSED
    assert pool.bytes.tobytes() == wire + bytes(missing_bytes)


@pytest.mark.parametrize("num_bytes", [512, BUFFERED_BYTES])
def test_a_deadline_that_has_passed_ends_it_after_one_call(native: Any, num_bytes: int) -> None:
    pool = Pool(layout_of(64, 1, num_bytes // 512), off=0)
    sums = NativeSums(native, num_bytes // 512, 512)
    order = sums.order(pool.of(range(num_bytes // 512)), None, range(1))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        feeding = feed(theirs, b"x" * num_bytes, None)
        assert native.receive_blocks(ours.fileno(), order.buffer_info()[0], sums.address(), 0.0) == Outcome.LATE
        ours.shutdown(socket.SHUT_RDWR)
        feeding.join(10)
    assert not feeding.is_alive()
    landed = pool.bytes.tobytes().rstrip(b"\0")
    assert landed
    assert not landed.strip(b"x")


def test_a_block_that_is_not_there_is_refused_before_a_byte_is_taken(native: Any) -> None:
    pool = Pool(layout_of(64, 1, 4), off=0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x" * 512)
        order = native_order(pool.of([4]), None, range(1), length=512)
        sums = NativeSums(native, 1, 512)
        outcome = native.receive_blocks(ours.fileno(), order.buffer_info()[0], sums.address(), math.inf)
        assert outcome == Outcome.UNSOUND
        assert ours.recv(1000) == b"x" * 512


def test_a_look_out_sees_what_comes_and_who_goes_and_gives_up_in_time(native: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            begin_s = time.monotonic()
            assert native.look_out(ours.fileno(), 0.02) == 0
            assert 0.02 <= time.monotonic() - begin_s < 5
            coming = threading.Timer(0.02, theirs.send, [b"x"])
            coming.start()
            assert native.look_out(ours.fileno(), 10.0) == 1
            coming.join()
            assert ours.recv(2) == b"x", "it only looks"
        assert native.look_out(ours.fileno(), 10.0) == 1
