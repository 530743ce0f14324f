"""UCX: whatever network UCX finds (InfiniBand, RoCE, TCP), through `ucxx`. Blocks travel packed into large messages.

Python's UCX has tags, not memory access, and each message costs microseconds: so a source packs the blocks of a read
into staging buffers, in turns, and a destination unpacks them (`packed.py`). Between the two staging buffers a lane of
UCX's carries them (`ucx_lane.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Final

from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.transport import DestinationTransport, Offer, OurEnd, PeerLink, SourceEndpoint, SourceIdentity
from kvtransfer.transports.control_port import is_loopback
from kvtransfer.transports.packed import PackedEndpoint, PackedTransport, Packing
from kvtransfer.transports.ucx_lane import UcxLane

NAME: Final = "UCX"
PACKING: Final = Packing(chunk_bytes=4 << 20, in_flight=2, buffers_max=16)


def missing() -> str | None:
    if sys.platform != "linux":
        return "needs Linux"
    if "nixl_cu12" in sys.modules:
        return "cannot be in one process with NIXL, which brings a UCX of its own"
    if importlib.util.find_spec("ucxx") is None:
        return "needs the ucxx package: pip install 'disaggregated[ucx]'"
    return None


def make_endpoint(region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
    make_lane = functools.partial(UcxLane, loopback_only=is_loopback(host))
    return PackedEndpoint(NAME, region, layout, epoch=epoch, host=host, make_lane=make_lane, packing=PACKING)


def make_transport(us: OurEnd) -> DestinationTransport:
    return UcxTransport(us)


class UcxTransport:
    """Opens no other network device than loopback's for a source that is on this machine."""

    name = NAME

    def __init__(self, us: OurEnd) -> None:
        self._us = us

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        place, _ = offer.split()
        make_lane = functools.partial(UcxLane, loopback_only=is_loopback(place.rpartition(":")[0]))
        packed = PackedTransport(NAME, self._us, make_lane=make_lane, packing=PACKING)
        return packed.connect(offer, source, deadline=deadline)
