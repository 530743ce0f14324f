"""Blocks through a connection, straight from pool to pool: by native code, or by Python's sockets without it.

They lie on the wire layer by layer, within a layer in the order that was asked for.
"""

from __future__ import annotations

from kvtransfer.checksum import BlockSums, NativeSums, PoolBlocks, native_order
from kvtransfer.native.library import library
from kvtransfer.region import memory_at
from kvtransfer.runs import runs, views
from kvtransfer.transport import ReadStop
from kvtransfer.transports.frame_socket import FrameSocket


def send_blocks(connection: FrameSocket, source: PoolBlocks, layers: range) -> None:
    """Raises PeerLost, TransferTimeout."""
    native = library()
    if native is None:
        connection.send_views(_views(source, layers))
        return
    order = native_order(source, None, layers)

    def send(fd: int, deadline_s: float) -> int:
        return int(native.send_blocks(fd, order.buffer_info()[0], deadline_s))

    connection.move(send, what="a peer to take its blocks")


def receive_blocks(
    connection: FrameSocket, into: PoolBlocks, layers: range, sums: BlockSums, *, stop: ReadStop
) -> None:
    """Fill `into` and sum it up: behind the kernel, while it is hot in the cache. No byte lands after it has ended.

    Raises PeerLost, TransferTimeout; without native code ReadStopped, too.
    """
    native = library()
    if native is None or not isinstance(sums, NativeSums):
        connection.receive_into(_views(into, layers))
        sums.take(into, layers, stop)
        return
    order = sums.order(into, None, layers)

    def receive(fd: int, deadline_s: float) -> int:
        return int(native.receive_blocks(fd, order.buffer_info()[0], sums.address(), deadline_s))

    connection.move(receive, what="bytes of a peer")


def _views(blocks: PoolBlocks, layers: range) -> list[memoryview]:
    pool = memory_at(blocks.address, blocks.layout.pool_bytes)
    return views(pool, blocks.layout, runs(blocks.ids), layers)
