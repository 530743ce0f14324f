"""What the orchestrator says to one server, in frames or, in tests, to a fake that speaks the same Protocol.

Every error that comes out of here is one of `errors.py`; `ServerLost` is a connection that broke or a process that is
gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Final, Protocol

from disaggregated import rpc
from disaggregated.errors import DeadlineExceeded, DisaggregatedError, ServerLost
from disaggregated.v1 import control_pb2, control_pb2_grpc
from disaggregated.wire import WireConnection

DRAIN_ANSWER_S: Final = 5.0
"""For the answer of a Drain to arrive, after its deadline."""


class PrefillReceiver(Protocol):
    """Called on the event loop; must not block."""

    def on_progress(self, progress: control_pb2.PrefillProgress) -> None: ...

    def on_prefill_over(self, error: DisaggregatedError | None) -> None:
        """Once, unless the prefill was stopped before."""


Admitted = Callable[[int, control_pb2.AdmitReply | DisaggregatedError], None]
"""Told once, with its stream key, what became of an admission: AdmissionError when it was refused, ServerLost when it
was not answered."""


TakeBatch = Callable[[control_pb2.StepBatch], None]
"""Called on the event loop with each message of a stream, at once; must not block."""


class ServerClient(Protocol):
    """One connection to one server process. A lost server gets a new client; a client never comes back to life."""

    async def describe(self, *, timeout_s: float) -> control_pb2.ServerDescription:
        """Called first."""

    def watch(self, *, interval_s: float) -> AsyncGenerator[control_pb2.Heartbeat, None]: ...

    def watch_blocks(self) -> AsyncGenerator[control_pb2.BlockEvents, None]:
        """Which blocks of the prefix cache can be found there: all of them first, then each change."""

    async def drain(self, *, deadline_s: float) -> int:
        """Requests still there after `deadline_s`; the server takes no new ones from now on."""

    async def ledger(self, *, timeout_s: float) -> Sequence[control_pb2.LedgerEntry]: ...

    def begin_prefill(self, request: control_pb2.PrefillRequest, receiver: PrefillReceiver) -> Callable[[], None]:
        """What comes back stops the work; it may be called at any time, and more than once.

        Raises ServerLost: the connection is broken, and the receiver hears nothing.
        """

    async def generate(self, orchestrator_id: str, opened: Callable[[], None], take: TakeBatch) -> None:
        """Until the stream ends. What `take` raises ends it, too. `opened` is called once the server has taken the
        stream: from then on it may be sent admissions."""

    def begin_admit(self, request: control_pb2.AdmitRequest, admitted: Admitted) -> None:
        """Runs to its end, whatever becomes of whoever asked. Raises ServerLost when nothing was sent."""

    async def cancel(self, orchestrator_id: str, stream_keys: Sequence[int], *, timeout_s: float) -> None: ...

    async def abort(self, transfer_ids: Sequence[str], *, timeout_s: float) -> None:
        """Of a context server: nobody will pull the blocks of these transfers."""

    async def close(self) -> None: ...


Connect = Callable[[str], ServerClient]
"""`host:port` to a client. Connects lazily, so this neither fails nor waits."""


class WireServerClient:
    """`ServerClient` over frames. Where they are spoken is asked over gRPC, once: `address` is gRPC's."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._wire: WireConnection | None = None

    async def describe(self, *, timeout_s: float) -> control_pb2.ServerDescription:
        async with contextlib.AsyncExitStack() as stack:
            channel = rpc.open_channel(self.address)
            stack.push_async_callback(channel.close)
            with rpc.errors_from(self.address):
                server = control_pb2_grpc.ServerStub(channel)
                description = await server.Describe(control_pb2.DescribeRequest(), timeout=timeout_s)
        if not description.wire_port:
            raise ServerLost(f"{self.address} is of a version ({description.version}) that does not speak in frames")
        self._wire = await WireConnection.open(self.address.rpartition(":")[0], description.wire_port)
        return description

    @property
    def _connection(self) -> WireConnection:
        if self._wire is None:
            raise ServerLost(f"{self.address} was not asked yet what it is")
        return self._wire

    async def watch(self, *, interval_s: float) -> AsyncGenerator[control_pb2.Heartbeat, None]:
        request = control_pb2.WatchRequest(interval_s=interval_s).SerializeToString()
        async with contextlib.aclosing(self._connection.stream(b"Server.Watch", request)) as messages:
            async for message in messages:
                yield control_pb2.Heartbeat.FromString(message)

    async def watch_blocks(self) -> AsyncGenerator[control_pb2.BlockEvents, None]:
        request = control_pb2.WatchBlocksRequest().SerializeToString()
        async with contextlib.aclosing(self._connection.stream(b"Server.WatchBlocks", request)) as messages:
            async for message in messages:
                yield control_pb2.BlockEvents.FromString(message)

    async def drain(self, *, deadline_s: float) -> int:
        request = control_pb2.DrainRequest(deadline_s=deadline_s).SerializeToString()
        async with self._within(deadline_s + DRAIN_ANSWER_S):
            return control_pb2.DrainReply.FromString(await self._connection.ask(b"Server.Drain", request)).num_left

    async def ledger(self, *, timeout_s: float) -> Sequence[control_pb2.LedgerEntry]:
        async with self._within(timeout_s):
            return control_pb2.Ledger.FromString(await self._connection.ask(b"Server.GetLedger", b"")).entries

    def begin_prefill(self, request: control_pb2.PrefillRequest, receiver: PrefillReceiver) -> Callable[[], None]:
        connection = self._wire or self._connection
        number = connection.call(b"Context.Prefill", request.SerializeToString(), _Prefill(receiver))
        return lambda: connection.cancel(number)

    async def generate(self, orchestrator_id: str, opened: Callable[[], None], take: TakeBatch) -> None:
        request = control_pb2.GenerateRequest(orchestrator_id=orchestrator_id)
        stream, connection = _Generate(opened, take), self._connection
        number = connection.call(b"Generation.Generate", request.SerializeToString(), stream)
        try:
            await stream.ended
        finally:
            connection.cancel(number)

    def begin_admit(self, request: control_pb2.AdmitRequest, admitted: Admitted) -> None:
        connection = self._wire or self._connection
        connection.call(b"Generation.Admit", request.SerializeToString(), _Admission(request.stream_key, admitted))

    async def cancel(self, orchestrator_id: str, stream_keys: Sequence[int], *, timeout_s: float) -> None:
        request = control_pb2.CancelRequest(orchestrator_id=orchestrator_id, stream_keys=stream_keys)
        async with self._within(timeout_s):
            await self._connection.ask(b"Generation.Cancel", request.SerializeToString())

    async def abort(self, transfer_ids: Sequence[str], *, timeout_s: float) -> None:
        request = control_pb2.AbortRequest(transfer_ids=transfer_ids, reason="the orchestrator gave up the request")
        async with self._within(timeout_s):
            await self._connection.ask(b"Context.Abort", request.SerializeToString())

    async def close(self) -> None:
        if self._wire is not None:
            self._wire.close()

    @contextlib.asynccontextmanager
    async def _within(self, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.address} did not answer in time") from error


class _Prefill:
    """What comes of a Prefill call, for whoever asked for it."""

    __slots__ = ("_receiver",)

    def __init__(self, receiver: PrefillReceiver) -> None:
        self._receiver = receiver

    def on_opened(self) -> None: ...

    def on_message(self, message: bytes) -> None:
        self._receiver.on_progress(control_pb2.PrefillProgress.FromString(message))

    def on_end(self, error: DisaggregatedError | None) -> None:
        self._receiver.on_prefill_over(error)


class _Generate:
    """What comes of a Generate call: no task and no queue is between the connection and `take`."""

    def __init__(self, opened: Callable[[], None], take: TakeBatch) -> None:
        self.on_opened = opened
        self._take = take
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_message(self, message: bytes) -> None:
        if self.ended.done():
            return
        try:
            self._take(control_pb2.StepBatch.FromString(message))
        except Exception as error:  # noqa: BLE001 - for whoever awaits the stream, and not for the connection
            self.ended.set_exception(error)

    def on_end(self, error: DisaggregatedError | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


class _Admission:
    __slots__ = ("_admitted", "_stream_key")

    def __init__(self, stream_key: int, admitted: Admitted) -> None:
        self._stream_key = stream_key
        self._admitted: Admitted | None = admitted

    def on_opened(self) -> None: ...

    def on_message(self, message: bytes) -> None:
        self._tell(control_pb2.AdmitReply.FromString(message))

    def on_end(self, error: DisaggregatedError | None) -> None:
        """An answer is followed by the end of its call."""
        if self._admitted is not None:
            self._tell(error or ServerLost("an admission was answered with nothing"))

    def _tell(self, outcome: control_pb2.AdmitReply | DisaggregatedError) -> None:
        """The first counts."""
        admitted, self._admitted = self._admitted, None
        if admitted is not None:
            admitted(self._stream_key, outcome)
