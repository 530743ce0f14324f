"""NCCL: torch.distributed between two processes, by gloo: what is sent lies in host memory, wherever the pool does.

Each connection has a process group of its own, of two ranks, which is made from a private store and never touches
torch's default group. `packed.py` has the course of a read. Torch is imported when an endpoint or a transport is made:
a server has it by then, and a first request would wait seconds for it.
"""

from __future__ import annotations

import importlib.util
from typing import Final

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.region import Region
from kvtransfer.transport import DestinationTransport, OurEnd, SourceEndpoint
from kvtransfer.transports.packed import MakeLane, PackedEndpoint, PackedTransport, Packing

NAME: Final = "NCCL"
PACKING: Final = Packing(chunk_bytes=4 << 20, in_flight=2, buffers_max=16)


def missing() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "needs the torch package: pip install 'disaggregated[nccl]'"
    return None


def make_endpoint(region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
    return PackedEndpoint(NAME, region, layout, epoch=epoch, host=host, make_lane=_lanes_of_rank(0), packing=PACKING)


def make_transport(us: OurEnd) -> DestinationTransport:
    return PackedTransport(NAME, us, make_lane=_lanes_of_rank(1), packing=PACKING)


def _lanes_of_rank(rank: int) -> MakeLane:
    """Raises TransferError when torch has no gloo, or cannot be loaded."""
    try:
        from kvtransfer.transports.nccl_lane import GlooLane
    except (ImportError, OSError) as error:
        raise TransferError(f"NCCL: torch.distributed cannot be loaded: {error}") from error
    return lambda our_host: GlooLane(our_host, rank=rank)
