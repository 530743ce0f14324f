"""Blocks through a connection, straight from pool to pool: by native code, or by Python's sockets without it.

They lie on the wire layer by layer, within a layer in the order that was asked for.
"""

from __future__ import annotations

from kvtransfer.checksum import BlockSums, NativeSums, PlainSums, PoolBlocks, native_order
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
    connection: FrameSocket, into: PoolBlocks, layers: range, sums: BlockSums | None, *, stop: ReadStop
) -> None:
    """Fill `into`, and sum it up behind the kernel, while it is hot in the cache. No byte lands after it has ended.

    Raises PeerLost, TransferTimeout; without native code ReadStopped, too.
    """
    native = library()
    if native is None or isinstance(sums, PlainSums):
        connection.receive_into(_views(into, layers))
        if sums is not None:
            sums.take(into, layers, stop)
        return
    assert sums is None or isinstance(sums, NativeSums), f"checksums of another kind: {sums}"
    order = native_order(into, None, layers) if sums is None else sums.order(into, None, layers)
    address = None if sums is None else sums.address()

    def receive(fd: int, deadline_s: float) -> int:
        return int(native.receive_blocks(fd, order.buffer_info()[0], address, deadline_s))

    connection.move(receive, what="bytes of a peer")


def _views(blocks: PoolBlocks, layers: range) -> list[memoryview]:
    pool = memory_at(blocks.address, blocks.layout.pool_bytes)
    return views(pool, blocks.layout, runs(blocks.ids), layers)
