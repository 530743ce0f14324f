"""The fake servers of `fake_cluster` behind real gRPC on real ports: an orchestrator sees the real protocol."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from disaggregated import rpc
from disaggregated.v1 import control_pb2, control_pb2_grpc
from disaggregated.wire import WireServer
from tests.support.fake_cluster import FakeClient, FakeCluster, FakeServer, Temper


class GrpcFront(control_pb2_grpc.ServerServicer, control_pb2_grpc.ContextServicer, control_pb2_grpc.GenerationServicer):
    def __init__(self, server: FakeServer) -> None:
        self._client = FakeClient(server)
        self.wire = WireServer()
        for service in ("Server", "Context", "Generation"):
            self.wire.add(service, self)

    async def Describe(self, request: control_pb2.DescribeRequest, call: Any) -> control_pb2.ServerDescription:
        description = await self._client.describe(timeout_s=5.0)
        description.wire_port = self.wire.port
        return description

    async def Watch(self, request: control_pb2.WatchRequest, call: Any) -> AsyncIterator[control_pb2.Heartbeat]:
        async with contextlib.aclosing(self._client.watch(interval_s=request.interval_s)) as heartbeats:
            async for heartbeat in heartbeats:
                yield heartbeat

    async def Drain(self, request: control_pb2.DrainRequest, call: Any) -> control_pb2.DrainReply:
        return control_pb2.DrainReply(num_left=await self._client.drain(deadline_s=request.deadline_s))

    async def GetLedger(self, request: control_pb2.LedgerRequest, call: Any) -> control_pb2.Ledger:
        return control_pb2.Ledger(entries=await self._client.ledger(timeout_s=5.0))

    async def WatchBlocks(
        self, request: control_pb2.WatchBlocksRequest, call: Any
    ) -> AsyncIterator[control_pb2.BlockEvents]:
        async with contextlib.aclosing(self._client.watch_blocks()) as messages:
            async for message in messages:
                yield message

    async def Prefill(
        self, request: control_pb2.PrefillRequest, call: Any
    ) -> AsyncIterator[control_pb2.PrefillProgress]:
        async with contextlib.aclosing(self._client.prefill(request, timeout_s=60.0)) as progresses:
            async for progress in progresses:
                yield progress

    async def Abort(self, request: control_pb2.AbortRequest, call: Any) -> control_pb2.AbortReply:
        await self._client.abort(request.transfer_ids, timeout_s=5.0)
        return control_pb2.AbortReply()

    async def Generate(self, request: control_pb2.GenerateRequest, call: Any) -> AsyncIterator[control_pb2.StepBatch]:
        await call.send_initial_metadata(())
        async with contextlib.aclosing(self._client.step_batches(request.orchestrator_id, lambda: None)) as batches:
            async for batch in batches:
                yield batch

    async def Admit(self, request: control_pb2.AdmitRequest, call: Any) -> control_pb2.AdmitReply:
        return await self._client.admit(request, timeout_s=5.0)

    async def Cancel(self, request: control_pb2.CancelRequest, call: Any) -> control_pb2.CancelReply:
        await self._client.cancel(request.orchestrator_id, request.stream_keys, timeout_s=5.0)
        return control_pb2.CancelReply()


@contextlib.asynccontextmanager
async def fake_servers(*, num_context: int, num_generation: int, temper: Temper) -> AsyncIterator[FakeCluster]:
    """A cluster whose servers are reachable under their `address`. The seed is always the same."""
    cluster = FakeCluster(0, num_context=num_context, num_generation=num_generation, temper=temper)
    async with contextlib.AsyncExitStack() as stack:
        for server in list(cluster.servers.values()):
            front = GrpcFront(server)
            grpc_server = rpc.make_server()
            control_pb2_grpc.add_ServerServicer_to_server(front, grpc_server)
            control_pb2_grpc.add_ContextServicer_to_server(front, grpc_server)
            control_pb2_grpc.add_GenerationServicer_to_server(front, grpc_server)
            server.address = rpc.bind(grpc_server, "127.0.0.1", 0)
            await front.wire.start("127.0.0.1")
            stack.push_async_callback(front.wire.stop, 0.5)
            await grpc_server.start()
            stack.push_async_callback(grpc_server.stop, 0.5)
        cluster.servers = {server.address: server for server in cluster.servers.values()}
        try:
            yield cluster
        finally:
            await cluster.close()
