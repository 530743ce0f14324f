"""What the orchestrator says to one server, over gRPC or, in tests, to a fake that speaks the same Protocol.

Every error that comes out of here is one of `errors.py`; `ServerLost` is a connection that broke or a process that is
gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import grpc

from disaggregated import rpc
from disaggregated.v1 import control_pb2, control_pb2_grpc

Call = TypeVar("Call", bound="grpc.aio.Call")


class ServerClient(Protocol):
    """One connection to one server process. A lost server gets a new client; a client never comes back to life."""

    async def describe(self, *, timeout_s: float) -> control_pb2.ServerDescription: ...

    def watch(self, *, interval_s: float) -> AsyncGenerator[control_pb2.Heartbeat, None]: ...

    def watch_blocks(self) -> AsyncGenerator[control_pb2.BlockEvents, None]:
        """Which blocks of the prefix cache can be found there: all of them first, then each change."""

    async def drain(self, *, deadline_s: float) -> int:
        """Requests still there after `deadline_s`; the server takes no new ones from now on."""

    async def ledger(self, *, timeout_s: float) -> Sequence[control_pb2.LedgerEntry]: ...

    def prefill(
        self, request: control_pb2.PrefillRequest, *, timeout_s: float
    ) -> AsyncGenerator[control_pb2.PrefillProgress, None]:
        """Closing the iterator cancels the work."""

    def generate(self, orchestrator_id: str, opened: Callable[[], None]) -> AsyncGenerator[control_pb2.StepBatch, None]:
        """`opened` is called once the server has taken the stream: from then on it may be sent admissions."""

    async def admit(self, request: control_pb2.AdmitRequest, *, timeout_s: float) -> control_pb2.AdmitReply: ...

    async def cancel(self, orchestrator_id: str, stream_keys: Sequence[int], *, timeout_s: float) -> None: ...

    async def abort(self, transfer_ids: Sequence[str], *, timeout_s: float) -> None:
        """Of a context server: nobody will pull the blocks of these transfers."""

    async def close(self) -> None: ...


Connect = Callable[[str], ServerClient]
"""`host:port` to a client. Connects lazily, so this neither fails nor waits."""


class GrpcServerClient:
    """`ServerClient` over one gRPC channel."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = rpc.open_channel(address)
        self._server = control_pb2_grpc.ServerStub(self._channel)
        self._context = control_pb2_grpc.ContextStub(self._channel)
        self._generation = control_pb2_grpc.GenerationStub(self._channel)

    async def describe(self, *, timeout_s: float) -> control_pb2.ServerDescription:
        with rpc.errors_from(self.address):
            return await self._server.Describe(control_pb2.DescribeRequest(), timeout=timeout_s)

    async def watch(self, *, interval_s: float) -> AsyncGenerator[control_pb2.Heartbeat, None]:
        with (
            rpc.errors_from(self.address),
            _cancelled(self._server.Watch(control_pb2.WatchRequest(interval_s=interval_s))) as call,
        ):
            async for heartbeat in call:
                yield heartbeat

    async def watch_blocks(self) -> AsyncGenerator[control_pb2.BlockEvents, None]:
        request = control_pb2.WatchBlocksRequest()
        with rpc.errors_from(self.address), _cancelled(self._server.WatchBlocks(request)) as call:
            async for message in call:
                yield message

    async def drain(self, *, deadline_s: float) -> int:
        with rpc.errors_from(self.address):
            request = control_pb2.DrainRequest(deadline_s=deadline_s)
            return (await self._server.Drain(request, timeout=deadline_s + 5.0)).num_left

    async def ledger(self, *, timeout_s: float) -> Sequence[control_pb2.LedgerEntry]:
        with rpc.errors_from(self.address):
            return (await self._server.GetLedger(control_pb2.LedgerRequest(), timeout=timeout_s)).entries

    async def prefill(
        self, request: control_pb2.PrefillRequest, *, timeout_s: float
    ) -> AsyncGenerator[control_pb2.PrefillProgress, None]:
        with rpc.errors_from(self.address), _cancelled(self._context.Prefill(request, timeout=timeout_s)) as call:
            async for progress in call:
                yield progress

    async def generate(
        self, orchestrator_id: str, opened: Callable[[], None]
    ) -> AsyncGenerator[control_pb2.StepBatch, None]:
        request = control_pb2.GenerateRequest(orchestrator_id=orchestrator_id)
        with rpc.errors_from(self.address), _cancelled(self._generation.Generate(request)) as call:
            await call.initial_metadata()
            opened()
            async for batch in call:
                yield batch

    async def admit(self, request: control_pb2.AdmitRequest, *, timeout_s: float) -> control_pb2.AdmitReply:
        with rpc.errors_from(self.address):
            return await self._generation.Admit(request, timeout=timeout_s)

    async def cancel(self, orchestrator_id: str, stream_keys: Sequence[int], *, timeout_s: float) -> None:
        with rpc.errors_from(self.address):
            request = control_pb2.CancelRequest(orchestrator_id=orchestrator_id, stream_keys=stream_keys)
            await self._generation.Cancel(request, timeout=timeout_s)

    async def abort(self, transfer_ids: Sequence[str], *, timeout_s: float) -> None:
        with rpc.errors_from(self.address):
            request = control_pb2.AbortRequest(transfer_ids=transfer_ids, reason="the orchestrator gave up the request")
            await self._context.Abort(request, timeout=timeout_s)

    async def close(self) -> None:
        await self._channel.close()


@contextlib.contextmanager
def _cancelled(call: Call) -> Iterator[Call]:
    """A stream that we stop reading, for whatever reason, is a stream that the server must stop writing."""
    try:
        yield call
    finally:
        call.cancel()
