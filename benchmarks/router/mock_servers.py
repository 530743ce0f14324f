"""Mock context and generation servers that speak our protocol, without an engine.

    python -m benchmarks.router.mock_servers MODEL

A prefill is answered at once; the tokens of all sequences of a server leave once a step, in one message, through the
same stream object as those of a real generation server.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import uvloop

from benchmarks.router.mock_control import Control, until_told
from disaggregated import rpc
from disaggregated.errors import AdmissionError
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import control_pb2, control_pb2_grpc
from disaggregated.wire import WireServer
from generation_server.step_stream import StepStream

LAYOUT: Final = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=32, dtype="float32", num_blocks=1 << 22)
SEQUENCES_MAX: Final = 4096
TOKENS_MAX: Final = 1 << 20


class MockServer(control_pb2_grpc.ServerServicer):
    """What both roles answer about themselves."""

    role = ""

    def __init__(self, control: Control, model: str, number: int) -> None:
        self.control = control
        self._model = model
        self._number = number
        self.wire = WireServer()

    async def Describe(self, request: control_pb2.DescribeRequest, call: Any) -> control_pb2.ServerDescription:
        return control_pb2.ServerDescription(
            instance_id=f"mock-{self.role}-{self._number}",
            epoch=1,
            role=self.role,
            model=self._model,
            fingerprint="mock",
            layout=LAYOUT.to_proto(),
            max_num_tokens=1 << 22,
            max_batch_size=SEQUENCES_MAX,
            max_seq_len=TOKENS_MAX,
            can_prefill=True,
            wire_port=self.wire.port,
        )

    async def Watch(self, request: control_pb2.WatchRequest, call: Any) -> AsyncIterator[control_pb2.Heartbeat]:
        while True:
            yield control_pb2.Heartbeat(
                epoch=1,
                num_blocks=LAYOUT.num_blocks,
                num_blocks_free=LAYOUT.num_blocks,
                has_step_cost=True,  # As every engine of ours tells it.
                step_fixed_s=1e-3,
                step_token_s=1e-5,
                step_pair_s=1e-9,
            )
            await asyncio.sleep(request.interval_s)

    async def Drain(self, request: control_pb2.DrainRequest, call: Any) -> control_pb2.DrainReply:
        return control_pb2.DrainReply()

    async def GetLedger(self, request: control_pb2.LedgerRequest, call: Any) -> control_pb2.Ledger:
        return control_pb2.Ledger()

    async def WatchBlocks(
        self, request: control_pb2.WatchBlocksRequest, call: Any
    ) -> AsyncIterator[control_pb2.BlockEvents]:
        yield control_pb2.BlockEvents(cleared=True)
        await asyncio.get_running_loop().create_future()

    def step(self, num_tokens: int) -> None:
        """A context server has nothing to do at a step."""


class MockContext(MockServer, control_pb2_grpc.ContextServicer):
    role = "context"

    async def Prefill(
        self, request: control_pb2.PrefillRequest, call: Any
    ) -> AsyncIterator[control_pb2.PrefillProgress]:
        outcome = control_pb2.PrefillOutcome(first_token=self.control.next_token(), compute_s=1e-4)
        yield control_pb2.PrefillProgress(num_computed_tokens=len(request.token_ids), outcome=outcome)

    async def Abort(self, request: control_pb2.AbortRequest, call: Any) -> control_pb2.AbortReply:
        return control_pb2.AbortReply()


class Sequence:
    def __init__(self, request: control_pb2.AdmitRequest) -> None:
        self.position = len(request.token_ids) + 1
        self.num_left = request.sampling.max_tokens - 1
        self.is_new = True


class MockGeneration(MockServer, control_pb2_grpc.GenerationServicer):
    role = "generation"

    def __init__(self, control: Control, model: str, number: int) -> None:
        super().__init__(control, model, number)
        self._streams: dict[str, StepStream] = {}
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._num_steps = 0

    async def Generate(self, request: control_pb2.GenerateRequest, call: Any) -> AsyncIterator[control_pb2.StepBatch]:
        stream = self._streams[request.orchestrator_id] = StepStream()
        await call.send_initial_metadata(())
        async for batch in stream.batches():
            yield batch

    async def Admit(self, request: control_pb2.AdmitRequest, call: Any) -> control_pb2.AdmitReply:
        if request.orchestrator_id not in self._streams:
            raise AdmissionError("there is no Generate stream of this orchestrator")
        self._sequences[request.orchestrator_id, request.stream_key] = Sequence(request)
        return control_pb2.AdmitReply()

    async def Cancel(self, request: control_pb2.CancelRequest, call: Any) -> control_pb2.CancelReply:
        for stream_key in request.stream_keys:
            if self._sequences.pop((request.orchestrator_id, stream_key), None) is not None:
                self._streams[request.orchestrator_id].drop(stream_key)
                self.control.cancelled()
        return control_pb2.CancelReply()

    def step(self, num_tokens: int) -> None:
        self._num_steps += 1
        for (orchestrator_id, stream_key), sequence in list(self._sequences.items()):
            delta = self._delta(stream_key, sequence, num_tokens)
            self._streams[orchestrator_id].put(delta)
            if not sequence.num_left:
                del self._sequences[orchestrator_id, stream_key]
        for stream in self._streams.values():
            stream.send(self._num_steps)

    def _delta(self, stream_key: int, sequence: Sequence, num_tokens: int) -> control_pb2.StreamDelta:
        num_tokens = min(num_tokens, sequence.num_left)
        delta = control_pb2.StreamDelta(
            stream_key=stream_key,
            first_position=sequence.position,
            token_ids=[self.control.next_token() for _ in range(num_tokens)],
            finish_reason="" if sequence.num_left > num_tokens else "length",
            times=control_pb2.AdmissionTimes(transport="MOCK", transfer_s=1e-4) if sequence.is_new else None,
        )
        sequence.position += num_tokens
        sequence.num_left -= num_tokens
        sequence.is_new = False
        return delta


async def main(model: str) -> None:
    control = Control()
    servers: list[MockContext | MockGeneration] = [
        *(MockContext(control, model, number) for number in (0, 1)),
        *(MockGeneration(control, model, number) for number in (0, 1)),
    ]
    addresses = [await listen(server) for server in servers]
    await until_told(control, addresses, list(servers))


async def listen(server: MockContext | MockGeneration) -> str:
    grpc_server = rpc.make_server()
    address = rpc.bind(grpc_server, "127.0.0.1", 0)
    control_pb2_grpc.add_ServerServicer_to_server(server, grpc_server)
    if isinstance(server, MockContext):
        control_pb2_grpc.add_ContextServicer_to_server(server, grpc_server)
    else:
        control_pb2_grpc.add_GenerationServicer_to_server(server, grpc_server)
    server.wire.add("Server", server)
    server.wire.add(server.role.capitalize(), server)
    await server.wire.start("127.0.0.1")
    await grpc_server.start()
    _alive.append(grpc_server)
    return address


_alive: list[Any] = []
"""A gRPC server that nobody refers to stops."""


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
