"""A caller's end of a connection: calls out, what they bring to whoever made them, with no task and no queue between.

Invariant: a call's receiver is told of its end exactly once, unless the call was cancelled: then it hears nothing more.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import Final, Protocol, cast

from disaggregated import rpc
from disaggregated.errors import DisaggregatedError, ServerLost, Unauthenticated
from disaggregated.security import membership as membership_of
from disaggregated.security.membership import Membership
from disaggregated.v1 import control_pb2
from disaggregated.wire.frame_writer import FrameWriter
from disaggregated.wire.frames import FrameError, FrameReader, Kind, call_frame, frame
from disaggregated.wire.handshake import CHALLENGE_BYTES, HANDSHAKE_TIMEOUT_S, WELCOME_BYTES, CallerHandshake

CALLS_MAX: Final = 1 << 32
_MESSAGE: Final = int(Kind.MESSAGE)
"""Nearly all that comes; to look at an enum for it would take longer than to take the frame apart."""


class Receiver(Protocol):
    """Called on the event loop; must not block, and must not raise."""

    def on_opened(self) -> None: ...

    def on_message(self, message: bytes) -> None: ...

    def on_end(self, error: DisaggregatedError | None) -> None: ...


class WireConnection(asyncio.Protocol):
    """One connection to one server process. Lost once, lost for ever."""

    def __init__(self, address: str, handshake: CallerHandshake) -> None:
        self._address = address
        self._handshake = handshake
        self._stage = bytearray()
        """What came of the handshake's next message."""
        self._has_said_hello = False
        self._is_welcome = False
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = FrameReader()
        self._receivers: dict[int, Receiver] = {}
        self._numbers = itertools.count(1)
        self._lost: ServerLost | None = None

    @classmethod
    async def open(cls, host: str, port: int, *, membership: Membership | None = None) -> WireConnection:
        """A connection on which both ends have proven who they are. The caller closes it.

        Raises:
            ServerLost: nothing listens there, or it does not answer in time.
            Unauthenticated: the two ends do not know the same cluster secret, or TLS does not believe the server.
        """
        ours = membership or membership_of.of_this_process()
        address, host = f"{host}:{port}", host.strip("[]")
        tls = ours.tls.caller_context() if ours.tls else None
        server_name = (ours.tls.server_name or host) if ours.tls else None
        connection: WireConnection | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: cls(address, CallerHandshake(ours.secret, address=address)),
                    host,
                    port,
                    ssl=tls,
                    server_hostname=server_name,
                )
                await connection._ready
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError.
            raise ServerLost(f"lost {address}: {error or 'it does not shake hands'}") from error
        finally:
            if connection is not None and not connection._is_welcome:
                connection.close()
        return connection

    # Calls.

    def call(self, method: bytes, request: bytes, receiver: Receiver) -> int:
        """Begin a call; its number, for `cancel`.

        Raises:
            ServerLost: the connection is broken; nothing was sent.
        """
        if self._lost is not None:
            raise self._lost
        number = next(self._numbers) % CALLS_MAX
        self._receivers[number] = receiver
        self._writer.send(call_frame(number, method, request))
        return number

    def cancel(self, number: int) -> None:
        """Its receiver hears nothing more. Of a call that is over: nothing."""
        if self._receivers.pop(number, None) is not None and self._lost is None:
            self._writer.send(frame(Kind.CANCEL, number))

    async def ask(self, method: bytes, request: bytes) -> bytes:
        """A call with one answer. The caller has a deadline.

        Raises:
            ServerLost: the connection broke.
            DisaggregatedError: whatever the server raised.
        """
        answer = _Answer()
        number = self.call(method, request, answer)
        try:
            return await answer.came
        finally:
            self.cancel(number)

    async def stream(self, method: bytes, request: bytes) -> AsyncGenerator[bytes, None]:
        """A call with many messages, for one who reads at leisure. Closing the iterator cancels the call."""
        messages = _Messages()
        number = self.call(method, request, messages)
        try:
            while (message := await messages.queue.get()) is not None:
                if isinstance(message, DisaggregatedError):
                    raise message
                yield message
        finally:
            self.cancel(number)

    def close(self) -> None:
        self._break(ServerLost(f"the connection to {self._address} was closed"))
        self._transport.abort()

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so.
        self._writer = FrameWriter(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ready.done():
            why = f"{self._address} hung up before it was known who calls: {error or 'perhaps another cluster secret'}"
            self._ready.set_exception(Unauthenticated(why) if self._has_said_hello else ServerLost(why))
            self._ready.exception()
        self._break(ServerLost(f"lost {self._address}: {error or 'it hung up'}"))

    def data_received(self, received: bytes) -> None:
        if not self._is_welcome:
            received = self._shake_hands(received)
        try:
            for kind, number, payload in self._reader.feed(received):
                self._take(kind, number, payload)
        except FrameError as error:
            self._break(ServerLost(f"{self._address} does not speak as it should: {error}"))
            self._transport.abort()

    def _shake_hands(self, received: bytes) -> bytes:
        """What is left of `received` once hands are shaken."""
        self._stage += received
        try:
            if not self._has_said_hello and len(self._stage) >= CHALLENGE_BYTES:
                self._transport.write(self._handshake.hello(bytes(self._stage[:CHALLENGE_BYTES])))
                self._has_said_hello = True
                del self._stage[:CHALLENGE_BYTES]
            if self._has_said_hello and len(self._stage) >= WELCOME_BYTES:
                self._handshake.check(bytes(self._stage[:WELCOME_BYTES]))
                self._is_welcome = True
                if not self._ready.done():
                    self._ready.set_result(None)
                return bytes(self._stage[WELCOME_BYTES:])
        except Unauthenticated as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            self._transport.abort()
        return b""

    def _take(self, kind: int, number: int, payload: bytes) -> None:
        receiver = self._receivers.get(number)
        if receiver is None:
            return  # It was cancelled while this was on its way.
        if kind == _MESSAGE:
            receiver.on_message(payload)
        elif kind == Kind.ANSWER:
            del self._receivers[number]
            receiver.on_message(payload)
            receiver.on_end(None)
        elif kind == Kind.END:
            del self._receivers[number]
            receiver.on_end(None)
        elif kind == Kind.ERROR:
            del self._receivers[number]
            receiver.on_end(_error_of(payload))
        elif kind == Kind.OPENED:
            receiver.on_opened()

    def _break(self, lost: ServerLost) -> None:
        if self._lost is not None:
            return
        self._lost = lost
        receivers, self._receivers = self._receivers, {}
        for receiver in receivers.values():
            receiver.on_end(lost)


def _error_of(payload: bytes) -> DisaggregatedError:
    error = control_pb2.WireError.FromString(payload)
    return rpc.rebuild(error.kind, error.message, error.param or None)


class _Answer:
    def __init__(self) -> None:
        self.came: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._message = b""

    def on_opened(self) -> None: ...

    def on_message(self, message: bytes) -> None:
        self._message = message

    def on_end(self, error: DisaggregatedError | None) -> None:
        if self.came.done():
            return
        if error is None:
            self.came.set_result(self._message)
        else:
            self.came.set_exception(error)


MESSAGES_MAX: Final = 4096
"""That wait for one reader. One who is that late has lost the thread: its stream ends with ServerLost."""


class _Messages:
    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | DisaggregatedError | None] = asyncio.Queue()
        """Bounded by MESSAGES_MAX; its end always finds room."""

    def on_opened(self) -> None: ...

    def on_message(self, message: bytes) -> None:
        if self.queue.qsize() < MESSAGES_MAX:
            self.queue.put_nowait(message)
        elif self.queue.qsize() == MESSAGES_MAX:
            self.queue.put_nowait(ServerLost("its messages were not read in time"))

    def on_end(self, error: DisaggregatedError | None) -> None:
        self.queue.put_nowait(error)
