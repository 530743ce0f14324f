"""Copies of whole blocks between a pool on a device and a staging region of host memory; see `kvtransfer/staging.py`.

Blocks lie scattered on both sides. On the device they are gathered into one tensor, or scattered from it, by a kernel;
over the bus go runs of neighbours, one copy a layer and run. All of it is on a stream of its own, beside the steps.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch

from disaggregated.engine.upload import to_device
from disaggregated.kv_layout import KVLayout

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 64 << 20
"""Of the tensor on the device that a copy goes through."""


class DeviceBlockCopier:
    """Implements kvtransfer's `DeviceCopier`. Used from any thread.

    Both tensors are (layers, blocks, bytes of a block). What is copied to the host must have been written by a step
    that has finished; what is copied to the device is seen by every step launched after the call has returned.
    """

    def __init__(self, device_LBX: torch.Tensor, host_LBX: torch.Tensor) -> None:
        assert device_LBX.shape[::2] == host_LBX.shape[::2], f"{device_LBX.shape} and {host_LBX.shape}"
        words = torch.int64 if device_LBX.shape[2] % 8 == 0 else torch.uint8  # Gathered a word a thread.
        self._device_LBX = device_LBX.view(words)
        self._host_LBX = host_LBX.view(words)
        self._device = device_LBX.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        layers, _, block_words = self._device_LBX.shape
        self._piece_blocks = max(1, PIECE_BYTES // (layers * block_words * words.itemsize))

    def to_host(self, device_blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        assert len(device_blocks) == len(host_blocks), f"{len(device_blocks)} blocks into {len(host_blocks)}"
        for begin in range(0, len(host_blocks), self._piece_blocks):
            end = begin + self._piece_blocks
            with self._finishing():
                gathered = self._device_LBX.index_select(1, self._index(device_blocks[begin:end]))
                for place, first, count in _runs(host_blocks[begin:end]):
                    for host, found in zip(self._host_LBX, gathered, strict=True):
                        host[first : first + count].copy_(found[place : place + count], non_blocking=True)

    def to_device(self, host_blocks: Sequence[int], device_blocks: Sequence[int], layers: range | None = None) -> None:
        assert len(device_blocks) == len(host_blocks), f"{len(host_blocks)} blocks into {len(device_blocks)}"
        chosen_layers = slice(None) if layers is None else slice(layers.start, layers.stop)
        device_LBX, host_LBX = self._device_LBX[chosen_layers], self._host_LBX[chosen_layers]
        num_layers, _, block_words = device_LBX.shape
        for begin in range(0, len(host_blocks), self._piece_blocks):
            chosen, into = host_blocks[begin : begin + self._piece_blocks], device_blocks[begin:][: self._piece_blocks]
            with self._finishing():
                landed = device_LBX.new_empty(num_layers, len(chosen), block_words)
                for place, first, count in _runs(chosen):
                    for found, host in zip(landed, host_LBX, strict=True):
                        found[place : place + count].copy_(host[first : first + count], non_blocking=True)
                device_LBX.index_copy_(1, self._index(into), landed)

    def _index(self, blocks: Sequence[int]) -> torch.Tensor:
        return to_device(np.array(blocks, dtype=np.int64), self._device)

    @contextlib.contextmanager
    def _finishing(self) -> Iterator[None]:
        """On our stream; what was launched inside is done on the way out, also when not all of it could be."""
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(self._stream))
            try:
                yield
            finally:
                if self._stream is not None:
                    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                    done.record(self._stream)
                    done.synchronize()


def device_copier(device_LBX: torch.Tensor, memory: memoryview, layout: KVLayout) -> DeviceBlockCopier:
    """Between a device's pool and `memory`, a region of `layout` that is pinned from here on, where it can be."""
    host = torch.frombuffer(memory, dtype=torch.uint8, count=layout.pool_bytes)
    if device_LBX.device.type == "cuda":
        _pin(host)
    return DeviceBlockCopier(device_LBX, host.view(layout.num_layers, layout.num_blocks, layout.block_bytes))


def _pin(host: torch.Tensor) -> None:
    """Copies from memory that is not pinned are right too, but go through the driver's own, and are slow."""
    error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0)  # type: ignore[no-untyped-call]
    if int(error) != 0:
        log.warning("staging_not_pinned: cudaHostRegister says %s; transfers will be slow", error)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(index of the first, the first, how many) of each run of neighbours."""
    begin = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield begin, blocks[begin], i - begin
            begin = i
