"""A server's end: takes connections, lets members of the cluster in, and serves calls with the objects that gRPC has.

One task a call. A call ends early when its caller cancels it or hangs up: its task is cancelled, as gRPC would do it.
A stream whose caller reads slowly waits before its next message, and a caller who does not read is not listened to, so
that what is kept for it is bounded by whoever makes the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, cast

from disaggregated import logs, rpc
from disaggregated.errors import DisaggregatedError, InvalidRequest, Unauthenticated
from disaggregated.security import membership as membership_of
from disaggregated.security.membership import Membership
from disaggregated.security.seldom import Seldom
from disaggregated.v1 import control_pb2
from disaggregated.wire.frame_writer import FrameWriter
from disaggregated.wire.frames import FrameError, FrameReader, Kind, frame
from disaggregated.wire.handshake import HANDSHAKE_TIMEOUT_S, HELLO_BYTES, ServerHandshake
from disaggregated.wire.silent_ends import notice_a_silent_end

log = logs.get(__name__)

CONNECTIONS_MAX: Final = 256
"""Of one server: a few orchestrators with a worker or more each. The next one is hung up on."""
CALLS_MAX: Final = 16_384
"""Of one connection at a time; as many requests as a server ever has live, and then some."""
STOP_POLL_S: Final = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Method:
    behaviour: Callable[[Any, Any], Any]
    read: Callable[[bytes], Any]
    is_stream: bool


class WireServer:
    """Listens from `start()` to `stop()`. Used on the event loop alone."""

    def __init__(self, *, membership: Membership | None = None) -> None:
        self.membership = membership or membership_of.of_this_process()
        self.methods: dict[bytes, _Method] = {}
        self.connections: set[_Connection] = set()
        self.refusals = Seldom()
        self.port = 0
        """0 until it listens."""
        self._listener: asyncio.Server | None = None

    def add(self, service: str, servicer: object) -> None:
        """Serve every call of `service`, one of control.proto's, with the methods of `servicer` of the same names."""
        for method in control_pb2.DESCRIPTOR.services_by_name[service].methods:
            self.methods[f"{service}.{method.name}".encode()] = _Method(
                getattr(servicer, method.name),
                getattr(control_pb2, method.input_type.name).FromString,
                method.server_streaming,
            )

    async def start(self, host: str, *, bound: socket.socket | None = None) -> None:
        """Listens at `bound`, which is ours then; without one, at any free port of `host`."""
        ours = self.membership
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self),
            sock=bound or rpc.take_port(host, 0),
            backlog=CONNECTIONS_MAX,
            ssl=ours.tls.server_context() if ours.tls else None,
        )
        self.port = int(self._listener.sockets[0].getsockname()[1])

    async def stop(self, grace_s: float | None) -> None:
        """No more connections; calls may end within `grace_s`, and are cancelled then."""
        if self._listener is not None:
            self._listener.close()
        tasks = [task for connection in self.connections for task in connection.tasks.values()]
        if tasks and grace_s:
            await asyncio.wait(tasks, timeout=grace_s)
        for connection in list(self.connections):
            connection.hang_up()
        if left := [task for task in tasks if not task.done()]:
            await asyncio.wait(left, timeout=STOP_POLL_S)


class WireCall:
    """What a servicer's method is given beside its request; of gRPC's `ServicerContext`, what ours use."""

    def __init__(self, connection: _Connection, number: int) -> None:
        self._connection = connection
        self._number = number

    async def send_initial_metadata(self, metadata: object) -> None:
        """The caller learns that its stream was taken."""
        self._connection.send(Kind.OPENED, self._number, b"")


class _Connection(asyncio.Protocol):
    """Invariant: until the handshake is over nothing is kept of what comes but one message of fixed size."""

    def __init__(self, server: WireServer) -> None:
        self._server = server
        self._handshake: ServerHandshake | None = ServerHandshake(server.membership.secret)
        self._stage = bytearray()
        self._reader = FrameReader()
        self._may_write = asyncio.Event()
        self._may_write.set()
        self.tasks: dict[int, asyncio.Task[None]] = {}

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so.
        self._writer = FrameWriter(self._transport)
        notice_a_silent_end(self._transport)
        if len(self._server.connections) >= CONNECTIONS_MAX:
            self._refuse("there are too many connections")
            return
        self._server.connections.add(self)
        assert self._handshake is not None, "hands are shaken once"
        self._transport.write(self._handshake.challenge())
        self._patience = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._refuse, "it said nothing")

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._may_write.set()
        for task in list(self.tasks.values()):
            task.cancel()

    def pause_writing(self) -> None:
        self._may_write.clear()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._may_write.set()
        self._transport.resume_reading()

    def data_received(self, received: bytes) -> None:
        if self._handshake is not None:
            received = self._shake_hands(self._handshake, received)
        try:
            for kind, number, payload in self._reader.feed(received):
                if kind == Kind.CALL:
                    self._begin(number, payload)
                elif kind == Kind.CANCEL and (task := self.tasks.get(number)) is not None:
                    task.cancel()
        except FrameError as error:
            self._refuse(str(error))

    def _shake_hands(self, handshake: ServerHandshake, received: bytes) -> bytes:
        """What is left of `received` once hands are shaken."""
        self._stage += received[: HELLO_BYTES - len(self._stage)]
        if len(self._stage) < HELLO_BYTES:
            return b""
        left = received[HELLO_BYTES:]  # A caller says nothing more before it is welcome.
        try:
            self._transport.write(handshake.welcome(bytes(self._stage)))
        except Unauthenticated as error:
            self._refuse(str(error))
            return b""
        self._patience.cancel()
        self._handshake = None
        return left

    def _refuse(self, reason: str) -> None:
        if (num_unsaid := self._server.refusals.may_say()) is not None:
            log.warning("connection_refused", reason=reason, unsaid=num_unsaid)
        self.hang_up()

    def hang_up(self) -> None:
        if self._handshake is not None:
            with contextlib.suppress(AttributeError):
                self._patience.cancel()
        self._writer.flush()
        self._transport.close()

    # Calls.

    def _begin(self, number: int, payload: bytes) -> None:
        end = 1 + payload[0] if payload else 1
        method = self._server.methods.get(payload[1:end])
        if method is None or number in self.tasks or len(self.tasks) >= CALLS_MAX:
            name = payload[1:end][:100].decode("ascii", "replace")
            self._fail(number, InvalidRequest(f"there is no call {name!r} here, or there are too many", param="method"))
            return
        serve = self._serve_stream if method.is_stream else self._serve_single
        task = asyncio.get_running_loop().create_task(self._mapping_errors(serve, number, method, payload[end:]))
        self.tasks[number] = task
        task.add_done_callback(lambda _: self.tasks.pop(number))  # Also of one that is cancelled before it begins.

    async def _mapping_errors(
        self, serve: Callable[[int, _Method, bytes], Awaitable[None]], number: int, method: _Method, message: bytes
    ) -> None:
        """A handler is a process's edge: what it did not expect costs this call alone, is logged, and never retried."""
        try:
            await serve(number, method, message)
        except DisaggregatedError as error:
            self._fail(number, error)
        except Exception as error:  # noqa: BLE001 - the edge that the docstring speaks of
            log.traceback("call_failed", error)
            self._fail(number, DisaggregatedError(f"unexpected {type(error).__name__}: {error}"))

    async def _serve_single(self, number: int, method: _Method, message: bytes) -> None:
        answer = await method.behaviour(method.read(message), WireCall(self, number))
        self.send(Kind.ANSWER, number, answer.SerializeToString())

    async def _serve_stream(self, number: int, method: _Method, message: bytes) -> None:
        messages: AsyncIterator[Any] = method.behaviour(method.read(message), WireCall(self, number))
        async with contextlib.aclosing(messages):  # type: ignore[type-var]
            async for each in messages:
                self.send(Kind.MESSAGE, number, each.SerializeToString())
                if not self._may_write.is_set():
                    await self._may_write.wait()
        self.send(Kind.END, number, b"")

    def send(self, kind: Kind, number: int, payload: bytes) -> None:
        self._writer.send(frame(kind, number, payload))

    def _fail(self, number: int, error: DisaggregatedError) -> None:
        fields: Mapping[str, str] = {"kind": rpc.kind_of(error), "message": str(error)[: rpc.ERROR_TEXT_MAX]}
        wire_error = control_pb2.WireError(**fields, param=getattr(error, "param", None) or "")
        self.send(Kind.ERROR, number, wire_error.SerializeToString())
