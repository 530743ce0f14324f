"""Both roles over real gRPC in this process, around an engine without a model whose steps a test can hold back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from disaggregated import rpc
from disaggregated.config.server import CacheTransceiverConfig, ServerConfig
from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.serving.role import LoadedServer, Role, ServerIdentity
from disaggregated.engine.serving.service import ServerService
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import control_pb2_grpc
from disaggregated.wire import WireServer
from kvtransfer import Region
from tests.support.fake_copier import FakeBlockCopier
from tests.support.fake_runner import FakeModelRunner

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", num_blocks=64)


class HeldRunner(FakeModelRunner):
    """Each step waits until `go` is set, for a few seconds at most; `is_held` tells that one does."""

    def __init__(self) -> None:
        super().__init__(num_blocks=LAYOUT.num_blocks, block_size=LAYOUT.block_size)
        self.go = threading.Event()
        self.go.set()
        self.is_held = threading.Event()
        self.fails_with: Exception | None = None

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        if not self.go.is_set():
            self.is_held.set()
        assert self.go.wait(10), "the test forgot to let the runner go on"
        if self.fails_with is not None:
            raise self.fails_with
        return super().execute(batch)


@dataclasses.dataclass(frozen=True, slots=True)
class _Files:
    name: str = "a-model"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FakeLoadedEngine:
    """What a role and its service read of a `LoadedEngine`."""

    engine: LLMEngine
    layout: KVLayout = LAYOUT
    fingerprint: str = "a-model"
    files: _Files = _Files()
    device: str = "cpu"
    dtype: str = "float32"
    num_parameters: int = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class FakeServer:
    address: str
    role: Role
    runner: HeldRunner
    crashes: list[BaseException]

    async def check_integrity(self) -> None:
        await asyncio.wrap_future(self.role.engine.check_integrity())


@contextlib.asynccontextmanager
async def serving(
    name: str,
    make_role: Callable[[LoadedServer[Region]], Role],
    *,
    enable_block_reuse: bool = False,
    num_host_slots: int = 0,
    event_buffer_max_size: int = 1000,
) -> AsyncIterator[FakeServer]:
    runner = HeldRunner()
    engine = LLMEngine(
        runner,
        EngineLimits(
            num_blocks=LAYOUT.num_blocks,
            block_size=LAYOUT.block_size,
            max_num_tokens=16,
            max_batch_size=8,
            max_seq_len=200,
            enable_block_reuse=enable_block_reuse,
        ),
        EngineOptions(copier=FakeBlockCopier(runner, num_host_slots), event_buffer_max_size=event_buffer_max_size),
    )
    crashes: list[BaseException] = []
    loaded: Any = FakeLoadedEngine(engine=engine)
    with Region.allocate(LAYOUT.pool_bytes) as region:
        server = LoadedServer(
            config=ServerConfig(
                model="a-model", role=name, cache_transceiver_config=CacheTransceiverConfig(lease_s=0.3)
            ),
            identity=ServerIdentity.of_this_process(name),
            loaded=loaded,
            memory=region,
            on_crash=crashes.append,
        )
        role = make_role(server)
        service = ServerService(role, server, WireServer())
        grpc_server = rpc.make_server()
        control_pb2_grpc.add_ServerServicer_to_server(service, grpc_server)
        role.add_services(grpc_server)
        address = rpc.bind(grpc_server, "127.0.0.1", 0)
        async with role:
            await grpc_server.start()
            try:
                yield FakeServer(address, role, runner, crashes)
            finally:
                runner.go.set()
                service.end_watches()
                await role.end_streams()
                await grpc_server.stop(1.0)
