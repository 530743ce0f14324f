"""SHM between two pools in GPU memory: one GPU, or two of one host that can read each other. A read is one kernel.

    source                                            destination
    its allocation's handle (cudaIpcMemHandle_t), ──▶ cudaIpcOpenMemHandle, once a link
      in the tail of a signed WELCOME
    READ asks, BLOCKS says "go ahead"             ──▶ one kernel on a stream of our own: every block and layer of the
                                                      read, stored and summed up; then the stream is waited for

One kernel, because blocks lie scattered: a prompt of 2,000 tokens is thousands of pieces of some KiB, a copy each for
the driver, and none of them would be verified. The kernel sums up the very registers that it stores.

*When `read` has ended, nothing of it can land:* the kernel is ours, on our device, and `DevicePool.copy` ends after it
has, whatever happened. Nothing of the source's runs on our behalf. A stop is looked at before each kernel.

*A source that dies:* its control socket breaks, so no further read begins. A mapping that was opened keeps the memory
in all drivers we know of, but CUDA promises nothing about it. What a running kernel then reads fails its checksum, or
is what was published; and nothing is admitted before the source has confirmed the lease after the last read. The
mapping is closed with the link, as soon as the source is found to be lost.
"""

from __future__ import annotations

import struct
import threading
from typing import Final

from disaggregated import logs
from disaggregated.errors import TransferError
from kvtransfer.checksum import PoolBlocks
from kvtransfer.deadline import Deadline
from kvtransfer.device_pool import DeviceMapper, DevicePool, DeviceSums, Exported, Mapped, SharedPool, why_not_shared
from kvtransfer.transport import (
    BlockRead,
    Offer,
    OurEnd,
    PeerLink,
    ReadStop,
    SourceIdentity,
)
from kvtransfer.transports import unix_port
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, MalformedFrame
from kvtransfer.transports.handed_pool import HandedPool
from kvtransfer.transports.link import FramedLink
from kvtransfer.transports.listener import Greeting
from kvtransfer.transports.meeting import Introduction

log = logs.get(__name__)

NAME: Final = "SHM"
"""What is configured, offered and counted: how SHM's one copy is made is not for an operator to choose."""
HANDLE_BYTES: Final = 64
"""CUDA_IPC_HANDLE_SIZE"""
OTHERWISE: Final = "blocks travel by host memory"
_TAIL: Final = struct.Struct(f"<{HANDLE_BYTES}sQQ")


def share(pool: DevicePool, mapper: DeviceMapper) -> SharedPool | None:
    """None, and a line in the log, where this pool's memory cannot be shared: its blocks travel by the host then."""
    try:
        if reason := why_not_shared(pool.layout):
            raise TransferError(reason)
        exported = mapper.export(pool.address, pool.layout.pool_bytes)
    except TransferError as error:
        log.warning("device_pool_not_shared", device=pool.device, reason=str(error), so=OTHERWISE)
        return None
    return SharedPool(pool, mapper, exported)


class CudaIpcEndpoint(HandedPool):
    """Hands the pool's handle to peers."""

    def __init__(self, shared: SharedPool, *, epoch: int) -> None:
        """The pool must stay allocated until every process that was handed its handle has let go of it, or ended."""
        self._exported = shared.exported
        super().__init__(NAME, shared.pool.layout, epoch=epoch)

    def greeting(self, connection: FrameSocket, hello: Hello) -> Greeting:
        return Greeting(tail=pack_exported(self._exported))


class CudaIpcTransport:
    """Maps a source's pool and copies out of it into ours."""

    name = NAME

    def __init__(self, us: OurEnd, shared: SharedPool) -> None:
        """`us` tells who we are; the pool that blocks land in is `shared`'s."""
        self._us = us
        self._shared = shared

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        dialler = _CudaIpcDialler(offer, source, self._us, self._shared)
        link = FramedLink(dialler, transport=self.name, block_bytes=self._shared.pool.layout.block_bytes)
        try:
            link.open(deadline=deadline)
        except BaseException:
            link.close(deadline=Deadline.after(0.0))  # Nothing reads through it.
            raise
        return link


class _CudaIpcDialler:
    """The first connection brings the mapping, which all reads share.

    Invariant: the mapping is opened at most once, and closed once, after the last read.
    """

    def __init__(self, offer: Offer, source: SourceIdentity, us: OurEnd, shared: SharedPool) -> None:
        self._introduction = Introduction(offer, source, us)
        self._source = source
        self._progress_timeout_s = us.progress_timeout_s
        self._shared = shared
        self._mapping_lock = threading.Lock()
        self._mapped: Mapped | None = None

    def dial(self, *, deadline: Deadline) -> FrameSocket:
        place, limit_s = self._introduction.place, self._progress_timeout_s
        connection = unix_port.dial(place, progress_timeout_s=limit_s, deadline=deadline)
        try:
            welcome = self._introduction.meet(connection)
            self._map(unpack_exported(welcome.tail))
        except BaseException:
            connection.close()
            raise
        return connection

    def num_bytes_sent(self, read: BlockRead) -> int:
        return 0

    def land(self, connection: FrameSocket, read: BlockRead, *, stop: ReadStop) -> None:
        assert self._mapped is not None, "a read before the first connection"
        pool = self._shared.pool
        sums = DeviceSums(pool, len(read.source)) if read.sums is None else read.sums
        sums.copy(
            PoolBlocks(self._mapped.address, self._source.layout, read.source),
            PoolBlocks(pool.address, pool.layout, read.into),
            read.layers,
            stop,
        )

    def close(self) -> None:
        """A driver that refuses has at most an address range too many until we end; it does not keep a link open."""
        if self._mapped is None:
            return
        mapped, self._mapped = self._mapped, None
        try:
            self._shared.mapper.close(mapped)
        except TransferError as error:
            log.warning("device_pool_not_unmapped", source=self._source.instance_id, reason=str(error))

    def _map(self, exported: Exported) -> None:
        """Two reads may dial at once. Raises TransferError for a pool that is not the one that Connect told about."""
        if exported.nbytes != (expected := self._source.layout.pool_bytes):
            raise TransferError(f"the source's device pool is {exported.nbytes} bytes, its layout says {expected}")
        with self._mapping_lock:
            if self._mapped is None:
                self._mapped = self._shared.mapper.open(exported)


def pack_exported(exported: Exported) -> bytes:
    return _TAIL.pack(exported.handle, exported.offset, exported.nbytes)


def unpack_exported(tail: bytes) -> Exported:
    """Raises MalformedFrame."""
    if len(tail) != _TAIL.size:
        raise MalformedFrame(f"a WELCOME with a tail of {len(tail)} bytes where a device pool's has {_TAIL.size}")
    return Exported(*_TAIL.unpack(tail))
