"""A transfer source whose pool lies in a device's memory, and that destinations on the same host read there.

                          ┌─ StagedSource     by way of pinned host memory, over any transport
    engine ─▶ DeviceSource┤
                          └─ TransferSource   of the pool itself, over CUDA IPC

A destination learns in Connect which of the two it will read, and says so when it follows. Until then nobody knows
which of them a transfer wants: it is open in both, its news wait, and no block is copied or summed up. With the first
Follow it ends in the other one. A Follow comes with the Prefill, so news rarely wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final

import grpc

from disaggregated.errors import DisaggregatedError
from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer.device_pool import SharedPool
from kvtransfer.negotiate import Preference
from kvtransfer.pool_identity import PoolIdentity
from kvtransfer.region import Region
from kvtransfer.source.options import SourceOptions
from kvtransfer.source.publisher import News, Publisher
from kvtransfer.source.service import KVSourceService
from kvtransfer.source.staged_source import StagedSource
from kvtransfer.source.transfer_source import TransferSource
from kvtransfer.staging import DeviceCopier
from kvtransfer.transport import EndpointStatistics
from kvtransfer.transports import cuda_ipc
from kvtransfer.transports.unix_port import host_key

_OTHER_WAY: Final = "its destination reads it the other way"


class Way(enum.Enum):
    HOST = "by host memory"
    DEVICE = "from the device's pool"


@dataclasses.dataclass(slots=True)
class _Transfer:
    held: set[Way] = dataclasses.field(default_factory=lambda: set(Way))
    """Where it has not been released yet."""
    way: Way | None = None
    """That it is read, once it is known."""
    news: News | None = None
    """While it is not."""


class DeviceSource:
    """Has the methods of `StagedSource`.

    Invariant: a transfer is held by both sources until its way is known, then by that one; its blocks go back when none
    holds it.
    """

    def __init__(
        self,
        region: Region,
        identity: PoolIdentity,
        copier: DeviceCopier,
        shared: SharedPool,
        *,
        on_released: Callable[[str], None],
        on_crash: Callable[[BaseException], None],
        options: SourceOptions = SourceOptions(),
    ) -> None:
        """`region` and `identity` are of the staging region; `options` are those of both ways."""
        self._on_released = on_released
        pool = shared.pool
        self._host = StagedSource(
            region,
            identity,
            copier,
            on_released=lambda name: self._released(Way.HOST, name),
            on_crash=on_crash,
            options=options,
        )
        self._direct = TransferSource(
            None,
            dataclasses.replace(identity, holding=KVHolding.whole(pool.layout), device=pool.device),
            on_released=lambda name: self._released(Way.DEVICE, name),
            options=dataclasses.replace(
                options,
                preference=Preference(),
                endpoints=[cuda_ipc.CudaIpcEndpoint(shared, epoch=identity.epoch)],
            ),
            checksums=pool.checksums,
        )
        self._device = pool.device
        self._publisher = Publisher(self._direct, on_crash=on_crash)
        self._service = _Service(self, self._host.service, self._direct.service, pool.layout)
        self._lock = threading.Lock()
        self._transfers: dict[str, _Transfer] = {}
        self._followed: dict[str, Way] = {}
        """Transfers that somebody waits for, opened or not."""

    def add_to(self, server: grpc.aio.Server) -> None:
        kv_pb2_grpc.add_KVSourceServicer_to_server(self._service, server)

    async def start(self) -> None:
        await self._host.start()
        try:
            await self._direct.start()
        except BaseException:
            await self._host.close()
            raise
        self._publisher.start()

    async def close(self, *, deadline_s: float = 5.0) -> None:
        """End every transfer, then every connection and thread. Idempotent."""
        await self._direct.close(deadline_s=deadline_s)
        await self._host.close(deadline_s=deadline_s)
        await asyncio.to_thread(self._publisher.close, deadline_s=deadline_s)

    def open(self, transfer_id: str, *, num_tokens: int, num_readers: int = 1) -> None:
        """On the event loop. Several readers all come the same way.

        Raises TransferError when the id was used before, or the prompt is larger than the staging region.
        """
        self._host.open(transfer_id, num_tokens=num_tokens, num_readers=num_readers)
        try:
            self._direct.open(transfer_id, num_tokens=num_tokens, num_readers=num_readers)
        except BaseException:
            self._host.fail(transfer_id, "it could not be opened")
            raise
        with self._lock:
            self._transfers[transfer_id] = _Transfer()
            way = self._followed.get(transfer_id)
        if way is not None:
            self._choose(transfer_id, way)

    def publish(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int) -> bool:
        """As StagedSource.publish."""
        return self.leave(transfer_id, News(block_ids=tuple(block_ids), num_tokens=num_tokens))

    def finish(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int, first_token: int) -> bool:
        """As StagedSource.finish."""
        news = News(block_ids=tuple(block_ids), num_tokens=num_tokens, first_token=first_token)
        return self.leave(transfer_id, news)

    def leave(self, transfer_id: str, news: News) -> bool:
        with self._lock:  # So that no older news overtakes these.
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                return False
            transfer.news = news
            if transfer.way is not None:
                self._pass_on(transfer_id, transfer)
            return True

    def fail(self, transfer_id: str, reason: str) -> bool:
        return any([self._host.fail(transfer_id, reason), self._direct.fail(transfer_id, reason)])

    def why_unwanted(self, transfer_id: str) -> DisaggregatedError:
        """While it is told to have been released, or before."""
        read_directly = self.way(transfer_id) is Way.DEVICE
        return (self._direct if read_directly else self._host).why_unwanted(transfer_id)

    def ledger(self) -> list[tuple[str, int, float]]:
        """Once each, also while it is open in both."""
        entries = {entry[0]: entry for entry in self._host.ledger()}
        entries.update({entry[0]: entry for entry in self._direct.ledger()})
        return list(entries.values())

    def statistics(self) -> dict[str, EndpointStatistics]:
        direct = {f"{name} ({self._device})": found for name, found in self._direct.statistics().items()}
        return {**self._host.statistics(), **direct}

    def check_integrity(self) -> None:
        self._host.check_integrity()
        self._direct.check_integrity()
        with self._lock:
            for transfer_id, transfer in self._transfers.items():
                assert transfer.held, f"{transfer_id} is held by nobody and was not given back"
                assert transfer.way is None or transfer.news is None, f"{transfer_id}: news wait for what is known"

    def way(self, transfer_id: str) -> Way | None:
        """None while nobody has followed it, and when it is over."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            return self._followed.get(transfer_id) if transfer is None else transfer.way

    @contextlib.contextmanager
    def followed(self, transfer_id: str, way: Way) -> Iterator[None]:
        """On the event loop, around a Follow: it may come before the transfer is opened."""
        with self._lock:
            first = self._followed.setdefault(transfer_id, way)
        self._choose(transfer_id, first)
        try:
            yield
        finally:
            with self._lock:
                self._followed.pop(transfer_id, None)

    def _choose(self, transfer_id: str, way: Way) -> None:
        """The first one who follows decides."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.way is not None:
                return
            transfer.way = way
            self._pass_on(transfer_id, transfer)
        (self._direct if way is Way.HOST else self._host).fail(transfer_id, _OTHER_WAY)

    def _pass_on(self, transfer_id: str, transfer: _Transfer) -> None:
        news, transfer.news = transfer.news, None
        if news is not None:
            (self._publisher if transfer.way is Way.DEVICE else self._host).leave(transfer_id, news)

    def _released(self, way: Way, transfer_id: str) -> None:
        """On the event loop, once for each source."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None:  # It was never opened in both.
                return
            transfer.held.discard(way)
            is_over = not transfer.held
        if is_over:
            self._on_released(transfer_id)
            with self._lock:
                del self._transfers[transfer_id]


class _Service(kv_pb2_grpc.KVSourceServicer):
    """Passes each call on to the source that it means."""

    def __init__(
        self, owner: DeviceSource, host: KVSourceService, direct: KVSourceService, device_layout: KVLayout
    ) -> None:
        self._owner = owner
        self._services = {Way.HOST: host, Way.DEVICE: direct}
        self._holding = KVHolding.whole(device_layout)

    async def Connect(self, request: kv_pb2.ConnectRequest, call: Any) -> kv_pb2.ConnectReply:
        if not self._fits(request):
            return await self._services[Way.HOST].Connect(request, call)
        reply = await self._services[Way.DEVICE].Connect(request, call)
        reply.in_device_memory = True
        return reply

    def _fits(self, request: kv_pb2.ConnectRequest) -> bool:
        """Blocks of one shape, on one host: nothing is converted on the way. Raises LayoutMismatch for no layout."""
        if not request.opens_device_memory or cuda_ipc.NAME not in request.transports:
            return False
        theirs = KVHolding.from_proto(request.layout, request.shard if request.HasField("shard") else None)
        return bool(request.host_key) and request.host_key == host_key() and theirs.is_like(self._holding)

    async def Follow(self, request: kv_pb2.FollowRequest, call: Any) -> AsyncIterator[kv_pb2.Publication]:
        way = Way.DEVICE if request.in_device_memory else Way.HOST
        with self._owner.followed(request.transfer_id, way):
            async with contextlib.aclosing(self._services[way].Follow(request, call)) as publications:
                async for publication in publications:
                    yield publication

    async def Release(self, request: kv_pb2.ReleaseRequest, call: Any) -> kv_pb2.ReleaseReply:
        """Who gives up before anybody has followed means the transfer, however it would have been read."""
        way = self._owner.way(request.transfer_id)
        if way is not None:
            return await self._services[way].Release(request, call)
        replies = [await service.Release(request, call) for service in self._services.values()]
        return kv_pb2.ReleaseReply(lease_was_valid=any(reply.lease_was_valid for reply in replies))

    async def Renew(self, request: kv_pb2.RenewRequest, call: Any) -> kv_pb2.RenewReply:
        return await self._services[self._owner.way(request.transfer_id) or Way.HOST].Renew(request, call)

    async def Ping(self, request: kv_pb2.PingRequest, call: Any) -> kv_pb2.PingReply:
        return await self._services[Way.HOST].Ping(request, call)
