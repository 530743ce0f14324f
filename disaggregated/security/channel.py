"""A gRPC channel of a member of the cluster: it shakes hands before its first call, and signs each.

Calls are signed without gRPC's interceptors, which would cost a task a call and, on a stream, a coroutine a message;
they only carry the calls that are made before hands were shaken.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc

from disaggregated.errors import Unauthenticated
from disaggregated.security.secret import ClusterSecret
from disaggregated.security.session import NONCE_BYTES, CallerSession

GREET: Final = "/disaggregated.v1.Door/Greet"
"""Its request is empty and its answer bytes: all that a caller says is in the metadata, which gRPC bounds to 8 KiB."""
GREETING_KEY: Final = "disagg-greeting-bin"
PROOF_KEY: Final = "disagg-proof-bin"
GREETING_TIMEOUT_S: Final = 5.0
"""Unless the call that needs it has less."""

MakeChannel = Callable[[Sequence[grpc.aio.ClientInterceptor]], grpc.aio.Channel]


class MemberChannel(grpc.aio.Channel):
    """Owns what `make` makes. Calls that a server refuses because it has started again fail with ServerLost, as those
    that it could not answer; whoever hears that opens a new channel."""

    def __init__(self, make: MakeChannel, secret: ClusterSecret, *, address: str) -> None:
        self._channel = make([])
        self._before_greeting = make([_GreetingUnary(self), _GreetingStream(self)])
        """Shares the connection: gRPC keeps one for all channels of a process whose options are the same."""
        self._secret = secret
        self._address = address
        self._session: CallerSession | None = None
        self._greeting = asyncio.Lock()

    async def greet(self, timeout_s: float | None) -> CallerSession:
        """Shake hands, unless that was done.

        Raises:
            Unauthenticated: the server does not know our secret.
            grpc.aio.AioRpcError: it is not there.
        """
        async with self._greeting:
            if self._session is None:
                nonce = secrets.token_bytes(NONCE_BYTES)
                limit_s = GREETING_TIMEOUT_S if timeout_s is None else min(timeout_s, GREETING_TIMEOUT_S)
                call: Any = self._channel.unary_unary(GREET)
                try:
                    welcome = await call(b"", timeout=limit_s, metadata=((GREETING_KEY, nonce),))
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                        raise Unauthenticated(f"what answers at {self._address} is no server of ours") from error
                    raise
                self._session = CallerSession.from_welcome(self._secret, nonce, welcome, address=self._address)
            return self._session

    def signed(self, method: bytes, metadata: Any) -> tuple[tuple[str, bytes], ...] | None:
        """`metadata` with the proof of one call; None before hands were shaken."""
        if self._session is None:
            return None
        return (*(metadata or ()), (PROOF_KEY, self._session.sign(method)))

    def unary_unary(self, method: str, *codecs: Any, **options: Any) -> Any:
        return self._signing(method, "unary_unary", codecs, options)

    def unary_stream(self, method: str, *codecs: Any, **options: Any) -> Any:
        return self._signing(method, "unary_stream", codecs, options)

    def stream_unary(self, method: str, *codecs: Any, **options: Any) -> Any:
        raise NotImplementedError("no call of ours sends a stream")

    def stream_stream(self, method: str, *codecs: Any, **options: Any) -> Any:
        raise NotImplementedError("no call of ours sends a stream")

    def _signing(self, method: str, kind: str, codecs: Any, options: Any) -> Callable[..., Any]:
        direct = getattr(self._channel, kind)(method, *codecs, **options)
        greeting_first = getattr(self._before_greeting, kind)(method, *codecs, **options)
        name = method.encode()

        def call(request: Any, *, metadata: Any = None, **limits: Any) -> Any:
            signed = self.signed(name, metadata)
            if signed is None:
                return greeting_first(request, metadata=metadata, **limits)
            return direct(request, metadata=signed, **limits)

        return call

    async def __aenter__(self) -> MemberChannel:
        return self

    async def __aexit__(self, *unused: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._before_greeting.close(grace)
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()


async def _greeted(channel: MemberChannel, details: Any) -> grpc.aio.ClientCallDetails:
    """The details of a call that waited for the handshake, signed."""
    await channel.greet(details.timeout)
    method = details.method if isinstance(details.method, bytes) else details.method.encode()
    signed = channel.signed(method, details.metadata)
    assert signed is not None, "a channel that has been greeted has a session"
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, grpc.aio.Metadata(*signed), details.credentials, details.wait_for_ready
    )


class _GreetingUnary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, channel: MemberChannel) -> None:
        self._channel = channel

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(await _greeted(self._channel, client_call_details), request)


class _GreetingStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, channel: MemberChannel) -> None:
        self._channel = channel

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(await _greeted(self._channel, client_call_details), request)
