"""The books of staging regions, and copies between them and a device, of which a CPU tensor takes the part."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.engine.cuda import staging as cuda_staging
from disaggregated.engine.cuda.staging import DeviceBlockCopier
from disaggregated.engine.serving.staged_pool import STAGING_BYTES, staging_layout
from disaggregated.errors import TransferTimeout
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.staging import Staged, StagingBlocks
from kvtransfer.transport import ReadStop, ReadStopped

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32", num_blocks=100)


def test_staging_blocks_are_taken_once_and_come_back() -> None:
    blocks = StagingBlocks(4)
    first = blocks.take(3, stop=ReadStop(), deadline=Deadline.after(1))
    assert first == [0, 1, 2]
    assert blocks.try_take(2) is None
    blocks.give_back(first)
    assert blocks.try_take(4) == [0, 1, 2, 3]
    with pytest.raises(AssertionError, match="came back twice"):
        StagingBlocks(2).give_back([0])


def test_who_waits_too_long_for_staging_blocks_is_told_so() -> None:
    blocks = StagingBlocks(2)
    blocks.take(1, stop=ReadStop(), deadline=Deadline.after(1))
    with pytest.raises(TransferTimeout, match="no 2 of 2 staging blocks"):
        blocks.take(2, stop=ReadStop(), deadline=Deadline.after(0.01))
    assert blocks.try_take(1) == [1], "nobody waits any more"


def test_a_large_wish_is_not_passed_by_small_ones() -> None:
    blocks = StagingBlocks(3)
    held = blocks.take(2, stop=ReadStop(), deadline=Deadline.after(1))
    taken: list[list[int]] = []
    waiting = threading.Thread(
        target=lambda: taken.append(blocks.take(3, stop=ReadStop(), deadline=Deadline.after(10)))
    )
    waiting.start()
    while blocks.try_take(1) is not None:  # Until the other one stands in the queue.
        blocks.give_back([2])
    blocks.give_back(held)
    waiting.join(10)
    assert taken == [[0, 1, 2]]


class Recorder:
    """A copier that only remembers."""

    def __init__(self) -> None:
        self.copied: list[tuple[list[int], list[int]]] = []

    def to_host(self, device_blocks: object, host_blocks: object) -> None:
        raise AssertionError("a destination copies to the device only")

    def to_device(self, host_blocks: object, device_blocks: object, layers: range | None = None) -> None:
        self.copied.append((list(host_blocks), list(device_blocks)))  # type: ignore[call-overload]


def test_only_what_was_verified_goes_on_to_the_device() -> None:
    blocks, recorder = StagingBlocks(4), Recorder()
    place = Staged(blocks, recorder)
    with place.receiving([7, 9], layers=range(1), stop=ReadStop(), deadline=Deadline.after(1)) as into:
        assert list(into) == [0, 1]
    with (
        pytest.raises(ValueError, match="broken"),
        place.receiving([8], layers=range(1), stop=ReadStop(), deadline=Deadline.after(1)),
    ):
        raise ValueError("broken")
    stop = ReadStop()
    with pytest.raises(ReadStopped), place.receiving([8], layers=range(1), stop=stop, deadline=Deadline.after(1)):
        stop.request()
    assert recorder.copied == [([0, 1], [7, 9])]
    assert blocks.num_free == 4


@given(
    st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=6),
    st.randoms(use_true_random=False),
    st.sampled_from([24, 25]),
)
def test_blocks_go_to_the_host_and_back_whatever_their_order(
    device_blocks: list[int], chance: object, block_bytes: int
) -> None:
    device = torch.randint(0, 256, (3, 10, block_bytes), dtype=torch.uint8)
    host = torch.zeros(3, 6, block_bytes, dtype=torch.uint8)
    copier = DeviceBlockCopier(device.clone(), host)
    host_blocks = chance.sample(range(6), len(device_blocks))  # type: ignore[attr-defined]
    copier.to_host(device_blocks, host_blocks)
    assert torch.equal(host[:, host_blocks], device[:, device_blocks])
    other = torch.zeros_like(device)
    DeviceBlockCopier(other, host).to_device(host_blocks, device_blocks)
    assert torch.equal(other[:, device_blocks], device[:, device_blocks])
    rest = sorted(set(range(10)) - set(device_blocks))
    assert not other[:, rest].any()


def test_only_the_layers_that_were_read_go_on_to_the_device() -> None:
    device, host = torch.zeros(4, 10, 16, dtype=torch.uint8), torch.randint(1, 256, (4, 6, 16), dtype=torch.uint8)
    DeviceBlockCopier(device, host).to_device([5, 0, 1], [2, 9, 7], range(1, 3))
    assert torch.equal(device[1:3][:, [2, 9, 7]], host[1:3][:, [5, 0, 1]])
    assert not device[0].any()
    assert not device[3].any()


def test_a_stop_ends_the_wait_for_staging_blocks_at_once() -> None:
    blocks, stop = StagingBlocks(1), ReadStop()
    blocks.take(1, stop=ReadStop(), deadline=Deadline.after(20))
    threading.Timer(0, stop.request).start()
    with pytest.raises(ReadStopped):
        blocks.take(1, stop=stop, deadline=Deadline.after(60))


def test_a_long_copy_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_staging, "PIECE_BYTES", 2 * 3 * 16)
    device, host = torch.randint(0, 256, (3, 10, 16), dtype=torch.uint8), torch.zeros(3, 10, 16, dtype=torch.uint8)
    copier = DeviceBlockCopier(device, host)
    copier.to_host([9, 1, 2, 3, 4], [0, 1, 2, 8, 3])
    assert torch.equal(host[:, [0, 1, 2, 8, 3]], device[:, [9, 1, 2, 3, 4]])


def test_a_staging_region_holds_a_longest_prompt_within_a_quarter_of_the_host() -> None:
    one_block = LAYOUT.num_layers * LAYOUT.block_bytes
    large = dataclasses.replace(LAYOUT, num_blocks=10 * STAGING_BYTES // one_block)
    assert staging_layout(LAYOUT, max_seq_len=64, host_bytes=1 << 40).num_blocks == 100
    assert staging_layout(large, max_seq_len=64, host_bytes=1 << 40).pool_bytes == STAGING_BYTES
    long = 8 * STAGING_BYTES // one_block * 4
    assert staging_layout(large, max_seq_len=long, host_bytes=1 << 50).num_blocks == long // 4
    assert staging_layout(large, max_seq_len=long, host_bytes=4 * 10 * one_block).num_blocks == 10
    assert staging_layout(large, max_seq_len=long, host_bytes=0).num_blocks == 1
