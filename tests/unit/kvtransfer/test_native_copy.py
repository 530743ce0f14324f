"""The native copy and its checksums, against memcpy and the xxhash package, for each instruction set of this CPU."""

from __future__ import annotations

import array
import ctypes
import random
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.native_build import NativeUnavailable
from kvtransfer.checksum import NativeSums
from kvtransfer.native import library
from kvtransfer.native.library import ISAS, Outcome

if library.library() is None:
    pytest.skip("no native code here", allow_module_level=True)

Noise = npt.NDArray[np.uint8]
DONE, STOPPED, UNSOUND = Outcome.DONE, Outcome.STOPPED, Outcome.UNSOUND
LENGTH = 10
"""Where an order says how long the whole input of each checksum is."""
PIECES = (1, 7, 32, 63, 64, 65, 128, 1000, 1023, 1024, 1025, 4096)
thorough = settings(max_examples=100)


def chosen(isa: str) -> ctypes.CDLL:
    found = library.opened(isa)
    if ISAS[found.choose_isa(ISAS.index(isa))] != isa:
        pytest.skip(f"this CPU has no {isa}")
    return found


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The library, using one of its inner loops until the test is over."""
    found = chosen(request.param)
    yield found
    found.choose_isa(len(ISAS) - 1)


class Sums:
    """Running checksums, driven as C has them: blocks of any number of bytes."""

    def __init__(self, native: ctypes.CDLL, count: int, length: int) -> None:
        self._native = native
        self._sums = NativeSums(native, count, length)
        self._length = length
        self.values = self._sums.values

    def take(self, order: array.array[int], *, is_stopped: bool = False) -> int:
        stop = ctypes.c_int32(is_stopped)
        order[LENGTH] = self._length
        address = self._sums.address()
        return int(self._native.take_blocks(order.buffer_info()[0], address, ctypes.addressof(stop)))


def order_of(
    source: Noise,
    into: Noise | None = None,
    *,
    ids: Sequence[int] = (0,),
    into_ids: Sequence[int] = (0,),
    begin: int = 0,
    block_bytes: int,
    **fields: int,
) -> array.array[int]:
    """Blocks of `source` from byte `begin` on, into the same places of `into`; one layer of one block by default."""
    num_blocks = fields.get("num_blocks", 1)
    to = 0 if into is None else into.ctypes.data + begin
    order = array.array("q", (source.ctypes.data + begin, num_blocks, to, num_blocks, len(ids), block_bytes))
    order.extend((fields.get("pool_layers", 1), fields.get("first_layer", 0), fields.get("num_layers", 1)))
    order.extend((fields.get("past_cache", 0), 0, *ids, *into_ids))
    return order


def noise(num_bytes: int, seed: int = 1) -> Noise:
    """Its first byte lies on a page: numpy alone promises less than a streaming store needs."""
    page = 4096
    room = np.random.default_rng(seed).integers(0, 256, num_bytes + page, dtype=np.uint8)
    begin = -room.ctypes.data % page
    return room[begin : begin + num_bytes]


@pytest.mark.parametrize("isa", ISAS)
@thorough
@given(seed=st.integers(0, 1 << 32), length=st.integers(241, 9000), offset=st.integers(0, 70), copies=st.booleans())
def test_an_input_in_any_pieces_has_the_checksum_that_the_package_computes(
    isa: str, seed: int, length: int, offset: int, copies: bool
) -> None:
    native, chance = chosen(isa), random.Random(seed)
    source = noise(offset + length, seed)
    into = np.zeros_like(source)
    sums = Sums(native, 1, length)
    begin = offset
    while begin < offset + length:
        size = min(offset + length - begin, chance.choice((*PIECES, length)))
        assert sums.take(order_of(source, into if copies else None, begin=begin, block_bytes=size)) == DONE
        begin += size
    assert sums.values() == (xxhash.xxh3_64_intdigest(source[offset:].tobytes()),)
    assert not copies or (into[offset:] == source[offset:]).all()
    assert not into[:offset].any()


@pytest.mark.parametrize("length", [*range(241, 261), *range(1020, 1030), 2048, 2049, 65536, 49152 * 30, 131072 * 32])
def test_each_length_in_one_piece_has_the_checksum_that_the_package_computes(native: ctypes.CDLL, length: int) -> None:
    source = noise(length)
    sums = Sums(native, 1, length)
    assert sums.take(order_of(source, block_bytes=length)) == DONE
    assert sums.values() == (xxhash.xxh3_64_intdigest(source.tobytes()),)


@pytest.mark.parametrize("past_cache", [0, 1])
@pytest.mark.parametrize("block_bytes", [64, 96, 129, 512, 1024, 1500, 49152])
@pytest.mark.parametrize("layers", [range(3), range(1, 3), range(2, 3)])
def test_scattered_blocks_are_copied_whole_and_nothing_else_is_touched(
    native: ctypes.CDLL, past_cache: int, block_bytes: int, layers: range
) -> None:
    num_blocks, ids, into_ids = 7, (6, 0, 3), (1, 2, 5)
    shape = (3, num_blocks, block_bytes)
    source, into = noise(3 * num_blocks * block_bytes), np.zeros_like(noise(3 * num_blocks * block_bytes))
    length = len(layers) * block_bytes
    sums = Sums(native, len(ids), max(length, 241))
    order = order_of(
        source, into, ids=ids, into_ids=into_ids, block_bytes=block_bytes, num_blocks=num_blocks, pool_layers=3,
        first_layer=layers.start, num_layers=len(layers), past_cache=past_cache,
    )  # fmt: skip
    assert sums.take(order) == DONE
    had, got = source.reshape(shape), into.reshape(shape)
    wanted = np.zeros_like(got)
    wanted[layers.start : layers.stop, into_ids] = had[layers.start : layers.stop, ids]
    assert (got == wanted).all()
    if length > 240:
        blocks = [np.ascontiguousarray(had[layers.start : layers.stop, block]) for block in ids]
        assert sums.values() == tuple(xxhash.xxh3_64_intdigest(block.tobytes()) for block in blocks)


@pytest.mark.parametrize(
    "fields",
    [
        {"ids": (4,)},
        {"ids": (-1,)},
        {"into_ids": (4,)},
        {"into_ids": (-1,)},
        {"first_layer": 1, "num_layers": 2},
        {"first_layer": -1},
        {"num_layers": 3},
        {"block_bytes": 0},
    ],
)
def test_a_block_or_layer_that_is_not_there_is_refused_before_a_byte_is_touched(
    native: ctypes.CDLL, fields: dict[str, int]
) -> None:
    source = noise(2 * 4 * 512)
    into = np.zeros_like(source)
    asked = {"block_bytes": 512, "num_blocks": 4, "pool_layers": 2, "ids": (1,), "into_ids": (1,), **fields}
    assert Sums(native, 1, 1024).take(order_of(source, into, **asked)) == UNSOUND  # type: ignore[arg-type]
    assert not into.any()


def test_a_stop_is_looked_at_every_megabyte(native: ctypes.CDLL) -> None:
    block_bytes, num_blocks = 64 << 10, 64
    source = noise(block_bytes * num_blocks)
    into = np.zeros_like(source)
    ids = range(num_blocks)
    order = order_of(source, into, ids=ids, into_ids=ids, block_bytes=block_bytes, num_blocks=num_blocks)
    assert Sums(native, num_blocks, block_bytes).take(order, is_stopped=True) == STOPPED
    num_copied = into.reshape(num_blocks, -1).any(axis=1).sum()
    assert 1 <= num_copied <= 17


def test_checksums_of_which_bytes_are_missing_have_no_value(native: ctypes.CDLL) -> None:
    source = noise(1024)
    sums = Sums(native, 1, 1024)
    sums.take(order_of(source, block_bytes=1023))
    with pytest.raises(AssertionError, match=r"\[1023\] of 1024 bytes have come"):
        sums.values()


def test_an_unknown_instruction_set_is_refused_in_words() -> None:
    with pytest.raises(NativeUnavailable, match="DISAGG_TRANSFER_ISA: sve2 is none of none, plain, avx2, avx512"):
        library.opened("sve2")
