"""What brings blocks of a source into our pool: at once where we can write it, else by way of a staging region."""

from __future__ import annotations

from typing import Final

from disaggregated.kv_layout import KVLayout
from kvtransfer.conversion.executor import PoolView
from kvtransfer.destination.in_flight import InFlight
from kvtransfer.destination.landing import Lander
from kvtransfer.destination.options import PART_BYTES
from kvtransfer.destination.our_pool import DevicePool, HostPool, OurPool
from kvtransfer.destination.peer import SourcePeer
from kvtransfer.device_pool import DeviceSums, SharedPool
from kvtransfer.region import Region
from kvtransfer.staging import DeviceCopier, InPlace, LandingPlace, Staged, StagingBlocks

DEVICE_PART_BYTES: Final = 256 << 20
"""Of one read on a device at most: a tenth of a millisecond for its memory, beside which asking for it is dear."""


class Landers:
    """Makes a lander for each pull. All of them share one budget of bytes in flight."""

    def __init__(
        self,
        region: Region,
        layout: KVLayout,
        in_flight: InFlight,
        *,
        copier: DeviceCopier | None = None,
        shared: SharedPool | None = None,
    ) -> None:
        """With a `copier`, region and layout are of a staging region; `shared` is the device's pool behind it."""
        self._region = region
        self._layout = layout
        self._in_flight = in_flight
        self._shared = shared
        view = PoolView(region.buffer, layout)
        self._place: LandingPlace = InPlace()
        self.pool: OurPool = HostPool(view)
        """For blocks that are converted on their way."""
        if copier is not None:
            staging = StagingBlocks(layout.num_blocks)
            self._place = Staged(staging, copier)
            self.pool = DevicePool(view, staging, copier)

    @property
    def high_water_bytes(self) -> int:
        """The most that was under way at once since the start."""
        return self._in_flight.high_water_bytes

    def of(self, peer: SourcePeer) -> Lander:
        """For blocks that are ours as they are."""
        return self._on_device(peer) if peer.in_device_memory else self._in_region(peer)

    def _in_region(self, peer: SourcePeer) -> Lander:
        return Lander(
            link=peer.link,
            pool=self._region.buffer,
            layout=self._layout,
            part_bytes=PART_BYTES,
            in_flight=self._in_flight,
            place=self._place,
        )

    def _on_device(self, peer: SourcePeer) -> Lander:
        assert self._shared is not None, "a link into no device"
        pool = self._shared.pool
        return Lander(
            link=peer.link,
            pool=None,
            layout=pool.layout,
            part_bytes=DEVICE_PART_BYTES,
            in_flight=self._in_flight,
            make_sums=lambda count, layout, num_layers: DeviceSums(pool, count),
        )
