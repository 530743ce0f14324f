"""UCX: whatever network UCX finds (InfiniBand, RoCE, TCP), through `ucxx`. Blocks travel packed into large messages.

Python's UCX has tags, not memory access, and each message costs microseconds: so a source packs the blocks of a read
into staging buffers, in turns, and a destination unpacks them (`packed.py`). Between the two staging buffers a lane of
UCX's carries them (`ucx_lane.py`).
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Final

from disaggregated.kv_layout import KVLayout
from kvtransfer.region import Region
from kvtransfer.transport import DestinationTransport, OurEnd, SourceEndpoint
from kvtransfer.transports.control_port import is_loopback
from kvtransfer.transports.packed import PackedEndpoint, PackedTransport, Packing
from kvtransfer.transports.ucx_lane import UcxLane

NAME: Final = "UCX"
PACKING: Final = Packing(chunk_bytes=2 << 20, in_flight=4, buffers_max=32)


def missing() -> str | None:
    if sys.platform != "linux":
        return "needs Linux"
    if "nixl_cu12" in sys.modules:
        return "cannot be in one process with NIXL, which brings a UCX of its own"
    if importlib.util.find_spec("ucxx") is None:
        return "needs the ucxx package: pip install 'disaggregated[ucx]'"
    return None


def make_endpoint(region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
    return PackedEndpoint(NAME, region, layout, epoch=epoch, host=host, make_lane=_lane, packing=PACKING)


def make_transport(us: OurEnd) -> DestinationTransport:
    return PackedTransport(NAME, us, make_lane=_lane, packing=PACKING)


def _lane(our_host: str) -> UcxLane:
    """Opens no other network device than loopback's for a peer that is on this machine."""
    return UcxLane(loopback_only=is_loopback(our_host))
