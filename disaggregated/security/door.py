"""Stands before every gRPC service of a server: who does not prove to belong to the cluster gets one sentence.

It looks at a call's metadata alone. The message of a call that is refused is never read, let alone parsed: its handler
is one that takes a stream of messages and asks for none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc

from disaggregated import logs
from disaggregated.errors import DisaggregatedError
from disaggregated.security.channel import GREET, GREETING_KEY, PROOF_KEY
from disaggregated.security.secret import ClusterSecret
from disaggregated.security.seldom import Seldom
from disaggregated.security.session import ServerSessions

log = logs.get(__name__)


class AbortWith(Protocol):
    async def __call__(self, call: grpc.aio.ServicerContext[Any, Any], error: DisaggregatedError) -> None:
        """End a call so that its caller gets `error`. Never returns."""


class Door(grpc.aio.ServerInterceptor):
    """The outermost interceptor. Without a secret it is open, and says so to callers who have one."""

    def __init__(self, secret: ClusterSecret, abort_with: AbortWith) -> None:
        self._sessions = None if secret.is_open else ServerSessions(secret)
        self._abort_with = abort_with
        self._refusals = Seldom()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = str(handler_call_details.method)
        if method == GREET:
            return self._answer_greeting(_found(handler_call_details, GREETING_KEY))
        if self._sessions is None:
            return await continuation(handler_call_details)
        try:
            self._sessions.check(_found(handler_call_details, PROOF_KEY), method.encode())
        except DisaggregatedError as error:
            if (num_unsaid := self._refusals.may_say()) is not None:
                log.warning("call_refused", method=method[:100], reason=str(error), unsaid=num_unsaid)
            return self._refuse(error)
        return await continuation(handler_call_details)

    def _answer_greeting(self, nonce: bytes | None) -> Any:
        try:
            welcome = b"" if self._sessions is None else self._sessions.greet(nonce or b"")
        except DisaggregatedError as error:
            return self._refuse(error)

        async def answer(_: AsyncIterator[bytes], call: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            return welcome

        return grpc.stream_unary_rpc_method_handler(answer)

    def _refuse(self, error: DisaggregatedError) -> Any:
        async def refuse(_: AsyncIterator[bytes], call: grpc.aio.ServicerContext[Any, Any]) -> None:
            await self._abort_with(call, error)

        return grpc.stream_stream_rpc_method_handler(refuse)


def _found(details: grpc.HandlerCallDetails, key: str) -> bytes | None:
    for name, value in details.invocation_metadata or ():
        if name == key:
            return value if isinstance(value, bytes) else None
    return None
