"""MPI: two processes that one `mpirun` has launched, over whatever network their MPI drives.

Control stays on a socket, which tells of a dead peer at once where MPI tells late or never; `packed.py` has the course
of a read. Blocks are packed: a message for each costs twice the time, and MPI's derived datatypes three times.
"""

from __future__ import annotations

from typing import Final

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.transport import DestinationTransport, OurEnd, SourceEndpoint
from kvtransfer.transports import mpi_world
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.mpi_thread import Message
from kvtransfer.transports.mpi_world import MpiWorld
from kvtransfer.transports.packed import PackedEndpoint, PackedTransport, Packing
from kvtransfer.transports.transit import Doorbell, Transit

NAME: Final = "MPI"
PACKING: Final = Packing(chunk_bytes=1 << 20, in_flight=4, buffers_max=64)
_TAG_BYTES: Final = 8


def missing() -> str | None:
    return mpi_world.missing()


def make_endpoint(region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
    mpi_world.our_world().begin()
    return PackedEndpoint(NAME, region, layout, epoch=epoch, host=host, make_lane=SourceLane, packing=PACKING)


def make_transport(us: OurEnd) -> DestinationTransport:
    mpi_world.our_world().begin()
    return PackedTransport(NAME, us, make_lane=DestinationLane, packing=PACKING)


class _MpiLane:
    """Messages between us and one rank under one tag. Its transits ring one bell."""

    def __init__(self, our_host: str) -> None:
        """MPI finds its own ways between hosts. Raises TransferError when it is known not to work."""
        self._world: MpiWorld = mpi_world.our_world()
        self._world.check()
        self._bell = Doorbell()
        self._transits: list[Transit] = []
        self._peer = -1
        self._tag = -1

    def send(self, message: memoryview) -> Transit:
        return self._post(message, is_send=True)

    def receive(self, message: memoryview) -> Transit:
        return self._post(message, is_send=False)

    def hear(self, connection: FrameSocket) -> None:
        """What is under way has a thread of its own."""

    def close(self) -> bool:
        self._transits = [transit for transit in self._transits if not transit.is_done]
        self._world.thread.abandon(self._transits)
        self._bell.close()
        return not self._transits

    def _post(self, buffer: memoryview, *, is_send: bool) -> Transit:
        assert self._peer >= 0, "a message before the lane was connected"
        transit = Transit(self._bell, library=NAME)
        self._transits = [*(each for each in self._transits if not each.is_done), transit]
        self._world.thread.post(
            Message(buffer=buffer, is_send=is_send, peer=self._peer, tag=self._tag, transit=transit)
        )
        return transit


class SourceLane(_MpiLane):
    def address(self, *, deadline: Deadline) -> bytes:
        """Waits until this process is in its world. Raises TransferError."""
        self._world.join(deadline=deadline)
        return self._world.ours.pack()

    def connect(self, peer: bytes, *, deadline: Deadline) -> None:
        """Sends the first message, which proves to the destination that messages come through."""
        self._world.join(deadline=deadline)
        if len(peer) <= _TAG_BYTES:
            raise TransferError("the peer told no MPI address")
        self._peer = self._world.rank_of(peer[:-_TAG_BYTES])
        self._tag = self._world.check_tag(int.from_bytes(peer[-_TAG_BYTES:], "little"))
        self.send(memoryview(self._world.ours.pack()))


class DestinationLane(_MpiLane):
    """Chooses the tag: a message of a broken connection is not taken for one of a later one."""

    def address(self, *, deadline: Deadline) -> bytes:
        """Waits until this process is in its world. Raises TransferError."""
        self._world.join(deadline=deadline)
        self._tag = self._world.fresh_tag()
        return self._world.ours.pack() + self._tag.to_bytes(_TAG_BYTES, "little")

    def connect(self, peer: bytes, *, deadline: Deadline) -> None:
        """Waits for the first message."""
        self._peer = self._world.rank_of(peer)
        greeting = bytearray(len(peer))
        self.receive(memoryview(greeting)).wait_alone(deadline)
        if greeting != peer:
            raise TransferError(f"rank {self._peer} of our MPI world is not the source: two worlds have one name")
