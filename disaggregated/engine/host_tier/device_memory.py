"""The host tier of a pool on a device: host memory, pinned where it can be, and copies on the engine's own stream.

What the engine's thread enqueues runs in order, copies and steps alike, so a copy needs no event of its own: it comes
after the step that wrote its block, and before the step that reads or overwrites it. The host never looks at a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disaggregated import logs
from disaggregated.engine.host_tier.copies import BlockCopy, Direction
from disaggregated.errors import NotEnoughMemory

log = logs.get(__name__)


class StreamBlockCopier:
    """Implements `BlockCopier`. Owned by the engine's thread, on whose current stream everything is enqueued.

    A block of all layers is gathered on the device into one tensor and crosses the bus in one piece.
    """

    def __init__(self, pool_LBX: torch.Tensor, num_slots: int) -> None:
        """
        pool_LBX: the whole pool on its device, (num_layers, num_blocks, block_bytes) bytes.

        Raises:
            NotEnoughMemory: the host has no room for the slots.
        """
        num_layers, _, block_bytes = pool_LBX.shape
        self._pool_LBX = pool_LBX
        try:
            # Not torch's own pinned memory, which comes in powers of two.
            self._slots_SLX = torch.empty(num_slots, num_layers, block_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise NotEnoughMemory(
                f"no {num_slots * num_layers * block_bytes:,} bytes for kv_cache_config.host_cache_size: {error}"
            ) from error
        if pool_LBX.device.type == "cuda":
            _pin(self._slots_SLX)

    @property
    def num_slots(self) -> int:
        return len(self._slots_SLX)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        with torch.inference_mode():
            for direction, block_id, slot in copies:
                if direction is Direction.OFFLOAD:
                    self._slots_SLX[slot].copy_(self._pool_LBX[:, block_id].contiguous(), non_blocking=True)
                else:
                    landed = self._slots_SLX[slot].to(self._pool_LBX.device, non_blocking=True)
                    self._pool_LBX[:, block_id].copy_(landed)

    def wait(self) -> None:
        if self._pool_LBX.device.type == "cuda":
            torch.cuda.current_stream(self._pool_LBX.device).synchronize()


def _pin(host: torch.Tensor) -> None:
    """Copies from memory that is not pinned are right too, but each waits for the device, and is slow."""
    error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0)  # type: ignore[no-untyped-call]
    if int(error) != 0:
        log.warning("host_tier_not_pinned", cuda_error=int(error), bytes=host.numel())
