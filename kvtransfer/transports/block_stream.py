"""Blocks through a connection, straight from pool to pool: by native code, or by Python's sockets without it.

They lie on the wire layer by layer, within a layer in the order that was asked for.
"""

from __future__ import annotations

import array

from kvtransfer.checksum import BlockSums, NativeSums, PlainSums, PoolBlocks, native_order
from kvtransfer.native.library import Outcome, library
from kvtransfer.region import address_of, copy_bytes, memory_at
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


class ArrivingBlocks:
    """Blocks that come in messages, each of which is put where it belongs, and summed up on the way.

    The caller keeps the pool mapped. Without native code `sums` are left alone: whoever made them looks at our memory.
    """

    def __init__(self, into: PoolBlocks, layers: range, sums: BlockSums | None) -> None:
        self._native = library()
        self._position = 0
        self._pending: list[memoryview] = []
        self._order: array.array[int] | None = None
        self._sums = sums if isinstance(sums, NativeSums) else None
        if self._native is None:
            self._pending = _views(into, layers)
        elif self._sums is not None:
            self._order = self._sums.order(into, None, layers)
        else:
            self._order = native_order(into, None, layers)

    def put(self, message: memoryview) -> None:
        """`message` is what comes after those before it; it is not used any more when this returns."""
        if self._native is None or self._order is None:
            self._put_slowly(message)
            return
        address = None if self._sums is None else self._sums.address()
        order = self._order.buffer_info()[0]
        outcome = self._native.put_blocks(order, address, self._position, address_of(message), len(message))
        assert outcome == Outcome.DONE, "more bytes than there are blocks, or a block that is not there"
        self._position += len(message)

    def _put_slowly(self, message: memoryview) -> None:
        while message:
            into = self._pending[0]
            size = min(len(into), len(message))
            copy_bytes(address_of(into), address_of(message), size)
            message = message[size:]
            self._pending[0] = into[size:]
            if not self._pending[0]:
                del self._pending[0]


def _views(blocks: PoolBlocks, layers: range) -> list[memoryview]:
    pool = memory_at(blocks.address, blocks.layout.pool_bytes)
    return views(pool, blocks.layout, runs(blocks.ids), layers)
