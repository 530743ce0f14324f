"""What a role adds to a server process."""

from __future__ import annotations

import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import grpc

from disaggregated.compute_cost import StepCost
from disaggregated.config.server import ServerConfig
from disaggregated.engine.serving.live_requests import LiveRequests
from disaggregated.engine.thread import EngineThread
from disaggregated.errors import DisaggregatedError
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import control_pb2

if TYPE_CHECKING:
    from disaggregated.engine.load import LoadedEngine  # It imports torch, which is not needed to take a port.


class PoolMemory(Protocol):
    """The memory that a KV pool lies in."""

    @property
    def buffer(self) -> memoryview:
        """Writable."""

    def populate(self) -> None:
        """Take its pages from the system, beside whoever uses them already. Raises NotEnoughMemory."""

    def close(self) -> None: ...


MemoryT = TypeVar("MemoryT", bound=PoolMemory)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerIdentity:
    instance_id: str
    """Unique in a cluster; another one for each process."""
    epoch: int
    """Grows when a server starts again: milliseconds since 1970 at its start, never compared with a clock."""

    @classmethod
    def of_this_process(cls, role: str) -> ServerIdentity:
        return cls(instance_id=f"{role}-{os.getpid()}-{secrets.token_hex(4)}", epoch=time.time_ns() // 1_000_000)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadedServer(Generic[MemoryT]):
    """Everything a role is made from, once the model is loaded. The process owns `memory`."""

    config: ServerConfig
    identity: ServerIdentity
    loaded: LoadedEngine
    memory: MemoryT
    on_crash: Callable[[BaseException], None]
    """Ends the process; may be called from any thread."""
    staging: KVLayout | None = None
    """Where the pool is in a device's memory: `memory` is a staging region of this layout. None: it is the pool."""
    copier: Any = None
    """kvtransfer's `DeviceCopier` between the two; this layer does not know that one."""
    device_pool: Any = None
    """kvtransfer's `DevicePool`: the pool itself, where it can be read by kernels of another process."""

    @property
    def memory_layout(self) -> KVLayout:
        return self.staging or self.loaded.layout

    @property
    def num_requests_max(self) -> int:
        """A few batches: more than an orchestrator that queues by itself ever sends."""
        return max(256, 8 * self.config.max_batch_size)


class Role(Protocol):
    """One server's work. Used on the event loop alone."""

    live_requests: LiveRequests
    engine: EngineThread

    @property
    def can_prefill(self) -> bool: ...

    @property
    def transports(self) -> Sequence[str]: ...

    def add_services(self, server: grpc.aio.Server) -> None: ...

    async def __aenter__(self) -> object:
        """From here on requests are served."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object:
        """What is left is cancelled; every task and thread has ended afterwards."""

    async def end_streams(self) -> None:
        """Let streams that outlive requests come to their end, so that the server can stop."""

    @property
    def unhealthy(self) -> str:
        """What is wrong with it although it answers, in words; "" while all is well."""

    def step_cost(self) -> StepCost | None:
        """Of prefill, as measured; None where nothing was measured, or not by steps."""

    def links(self) -> Sequence[control_pb2.LinkStatistics]: ...

    def transfers(self) -> Sequence[control_pb2.LedgerEntry]:
        """What is being moved; the blocks behind it are in the engine's ledger."""


def as_our_error(error: Exception) -> DisaggregatedError:
    """What a request failed with, as its caller is told it."""
    if isinstance(error, DisaggregatedError):
        return error
    return DisaggregatedError(f"unexpected {type(error).__name__}: {error}")


ENGINE_STOP_S: Final = 30.0
"""The step that is running is finished first, and a chunk takes seconds on a slow machine."""

AllocatePool = Callable[[KVLayout], MemoryT]
MakeRole = Callable[[LoadedServer[MemoryT]], Role]
