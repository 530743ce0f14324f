"""Sits in a source's control plane: every message passes here, and may be changed, doubled, held or lost.

To the destination it is the source (same instance, same epoch); the offers that it passes on lead through data relays.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from disaggregated import rpc
from disaggregated.errors import PeerLost
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from tests.support.fault_lab.data_relay import DataRelay

Publications = AsyncIterator[kv_pb2.Publication]
Release = Callable[[kv_pb2.ReleaseRequest], Awaitable[kv_pb2.ReleaseReply]]


@dataclasses.dataclass(slots=True)
class ControlTampering:
    """What happens to messages; the defaults pass them on as they are."""

    publications: Callable[[Publications], Publications] = lambda stream: stream
    release: Callable[[Release, kv_pb2.ReleaseRequest], Awaitable[kv_pb2.ReleaseReply]] = lambda release, request: (
        release(request)
    )


class ControlRelay(kv_pb2_grpc.KVSourceServicer):
    def __init__(self, source_address: str, data: DataRelay) -> None:
        self.address = ""
        self.tampering = ControlTampering()
        self.num_publications = 0
        """That came from the source, since somebody set this to 0."""
        self.came = asyncio.Event()
        """Set when one more came."""
        self._source_address = source_address
        self.data = data
        self._channel: grpc.aio.Channel | None = None
        self._server = rpc.make_server()
        self._addresses: dict[str, str] = {}
        self._follows: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        await self.source_began()
        kv_pb2_grpc.add_KVSourceServicer_to_server(self, self._server)
        self.address = rpc.bind(self._server, "127.0.0.1", 0)
        await self._server.start()

    async def source_began(self) -> None:
        """The process at the source's address is a new one: a channel to the last one is of no use."""
        if self._channel is not None:
            await self._channel.close()
        self._channel = rpc.open_channel(self._source_address)
        self._source = kv_pb2_grpc.KVSourceStub(self._channel)

    async def close(self) -> None:
        await self._server.stop(grace=None)
        if self._channel is not None:
            await self._channel.close()

    def cut(self) -> None:
        """Every stream that is open now breaks, as if its connection had."""
        for follow in tuple(self._follows):
            follow.cancel()

    async def Connect(self, request: kv_pb2.ConnectRequest, call: Any) -> kv_pb2.ConnectReply:
        with rpc.errors_from(self._source_address):
            reply = await self._source.Connect(request, timeout=20)
        for offer in reply.offers:
            if offer.address not in self._addresses:
                self._addresses[offer.address] = self.data.stand_before(offer.address)
            offer.address = self._addresses[offer.address]
        return reply

    async def Follow(self, request: kv_pb2.FollowRequest, call: Any) -> Publications:
        task = asyncio.current_task()
        assert task is not None
        self._follows.add(task)
        follow = self._source.Follow(request, timeout=60)
        try:
            with rpc.errors_from(self._source_address):
                async for publication in self.tampering.publications(self._counted(aiter(follow))):
                    yield publication
        except asyncio.CancelledError:
            raise PeerLost("the lab has cut this stream") from None
        finally:
            self._follows.discard(task)
            follow.cancel()

    async def _counted(self, stream: Publications) -> Publications:
        async for publication in stream:
            self.num_publications += 1
            self.came.set()
            yield publication

    async def Release(self, request: kv_pb2.ReleaseRequest, call: Any) -> kv_pb2.ReleaseReply:
        return await self.tampering.release(self._release, request)

    async def Renew(self, request: kv_pb2.RenewRequest, call: Any) -> kv_pb2.RenewReply:
        with rpc.errors_from(self._source_address):
            return await self._source.Renew(request, timeout=20)

    async def Ping(self, request: kv_pb2.PingRequest, call: Any) -> kv_pb2.PingReply:
        with rpc.errors_from(self._source_address):
            return await self._source.Ping(request, timeout=20)

    async def _release(self, request: kv_pb2.ReleaseRequest) -> kv_pb2.ReleaseReply:
        with rpc.errors_from(self._source_address):
            return await self._source.Release(request, timeout=20)


@contextlib.asynccontextmanager
async def relays(
    source_address: str, is_of_chunk: Callable[[frozenset[int]], bool], *, carries_blocks: bool
) -> AsyncIterator[ControlRelay]:
    data = DataRelay(is_of_chunk=is_of_chunk, carries_blocks=carries_blocks)
    control = ControlRelay(source_address, data)
    await control.start()
    try:
        yield control
    finally:
        await control.close()
        await asyncio.to_thread(data.close)
