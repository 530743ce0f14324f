"""The KV pool of a CUDA engine as the transfer layer uses it: its blocks copied from another process's pool, and summed
up, on a stream beside the steps. See `kvtransfer/device_pool.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import numpy as np
import torch

from disaggregated.engine.upload import to_device
from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout

WORD_BYTES: Final = 8
_UNSIGNED: Final = 1 << 64

MoveAndSum = Callable[..., torch.Tensor]
"""See `kernels/blocks.py`."""


class Blocks(Protocol):
    """Of a pool at an address that kernels here can read."""

    @property
    def address(self) -> int: ...
    @property
    def layout(self) -> KVLayout: ...
    @property
    def ids(self) -> Sequence[int]: ...


class CudaPool:
    """Implements kvtransfer's `DevicePool`. Used from any thread.

    What is summed up must have been written by a step that has finished; what is copied is seen by every step launched
    after the call has returned. A call ends once its kernel has, whatever happens.
    """

    def __init__(self, pool_LBX: torch.Tensor, layout: KVLayout, move_and_sum: MoveAndSum) -> None:
        """`pool_LBX` is (layers, blocks, bytes of a block), the memory of `layout`, contiguous and kept by us."""
        assert pool_LBX.is_contiguous(), f"strides {pool_LBX.stride()}"
        assert pool_LBX.nbytes == layout.pool_bytes, f"{pool_LBX.nbytes} bytes, the layout says {layout.pool_bytes}"
        assert layout.block_bytes % WORD_BYTES == 0, f"blocks of {layout.block_bytes} bytes"
        self.layout = layout
        self._pool_LBX = pool_LBX
        self._device = pool_LBX.device
        self._move_and_sum = move_and_sum
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def address(self) -> int:
        return self._pool_LBX.data_ptr()

    @property
    def device(self) -> str:
        return f"{self._device.type}:{self._device.index or 0}"

    @property
    def device_index(self) -> int:
        return self._device.index or 0

    def checksums(self, block_ids: Sequence[int], layers: range) -> tuple[int, ...]:
        return self._launch(self.address, self.layout, block_ids, block_ids, layers, is_copy=False)

    def copy(self, source: Blocks, into: Sequence[int], layers: range) -> tuple[int, ...]:
        return self._launch(source.address, source.layout, source.ids, into, layers, is_copy=True)

    def warm_up(self, scratch_block: int) -> None:
        """Compile both kernels, by what they do to a block that is nobody's."""
        every, block = range(self.layout.num_layers), [scratch_block]
        for is_copy in (False, True):
            self._launch(self.address, self.layout, block, block, every, is_copy=is_copy)

    def _launch(
        self,
        address: int,
        layout: KVLayout,
        source: Sequence[int],
        into: Sequence[int],
        layers: range,
        *,
        is_copy: bool,
    ) -> tuple[int, ...]:
        """A kernel knows addresses alone: what is no block, or no layer, of either pool is found here."""
        assert layout.difference(self.layout) is None, f"blocks of another shape: {layout.difference(self.layout)}"
        assert len(source) == len(into), f"{len(source)} blocks into {len(into)}"
        if not source or not layers:
            return (0,) * len(source)
        assert 0 <= layers.start < layers.stop <= layout.num_layers, f"{layers} of {layout.num_layers}"
        ids = np.array([source, into], dtype=np.int64)
        for own, of in zip(ids, (layout, self.layout), strict=True):
            assert 0 <= own.min() <= own.max() < of.num_blocks, f"blocks {own.min()} to {own.max()} of {of.num_blocks}"
        try:
            with self._finishing():
                sums = self._move_and_sum(
                    (address, self.address),
                    to_device(ids, self._device),
                    layers,
                    (layout.layer_bytes // WORD_BYTES, self.layout.layer_bytes // WORD_BYTES),
                    layout.block_bytes // WORD_BYTES,
                    is_copy=is_copy,
                )
                host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=self._stream is not None)
                host.copy_(sums, non_blocking=True)
        except RuntimeError as error:  # What torch makes of every failure of a device.
            raise TransferError(f"{self.device} failed while it copied blocks: {error}") from error
        return tuple(value % _UNSIGNED for value in host.tolist())

    @contextlib.contextmanager
    def _finishing(self) -> Iterator[None]:
        """On our stream; what was launched inside is done on the way out, also when not all of it could be."""
        if self._stream is None:
            with torch.inference_mode():
                yield
            return
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                done.record(self._stream)
                done.synchronize()


def device_pool(pool_LBX: torch.Tensor, layout: KVLayout) -> CudaPool:
    """Its kernels are compiled when this returns. The last block is the one that no sequence owns."""
    from disaggregated.engine.cuda.kernels.blocks import move_and_sum  # It imports Triton.

    pool = CudaPool(pool_LBX, layout, move_and_sum)
    pool.warm_up(layout.num_blocks - 1)
    return pool
