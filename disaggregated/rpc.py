"""How the processes of a deployment call each other: one set of gRPC options, and one mapping of errors.

An error of the tree in `errors.py` that leaves a handler reaches the caller as the same class with the same message.
It travels in trailing metadata; a status without that metadata was made by gRPC itself, and means that the connection
or the process behind it is gone, or that the caller's own deadline has passed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Final

import grpc
import psutil

from disaggregated import errors, logs
from disaggregated.errors import ConfigError, DisaggregatedError, PortTaken, StartupError
from disaggregated.security import membership as membership_of
from disaggregated.security.channel import MemberChannel
from disaggregated.security.door import Door
from disaggregated.security.membership import Membership
from disaggregated.v1 import control_pb2

log = logs.get(__name__)

MESSAGE_BYTES_MAX: Final = 64 << 20
"""Of one message either way. The largest is a prompt: five bytes a token id at most, so 13 million tokens."""

ERROR_KEY: Final = "disagg-error-bin"
ERROR_TEXT_MAX: Final = 1000
_DETAILS_MAX: Final = 200
"""Characters. gRPC begins to refuse trailers at 8 KiB, and one character takes up to 5 bytes in ours, 12 in its own."""

_SIZES: Final = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]
# Heartbeats find a silent peer within a second. These pings are for the other direction: a server whose caller's host
# vanished without closing its connection notices, and cancels that caller's requests.
_KEEPALIVE: Final = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS: Final = [
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.so_reuseport", 0),  # with it a second server on the same port would quietly take half of the calls
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),  # or an idle channel is hung up on as one that pings too much
    ("grpc.server_handshake_timeout_ms", 5_000),  # for a stranger to show that it speaks HTTP/2, or TLS
    ("grpc.max_concurrent_streams", 8192),  # of one connection
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
]
CHANNEL_OPTIONS: Final = [
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web is never right between our own processes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # what gRPC calls so is its connect timeout; a refusal is found at once
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
_NUMBER: Final = "disaggregated.channel"
"""gRPC shares connections, and how long to wait for the next try, among channels with the same options. With a number
of its own a new channel never inherits the wait of an old one to a process that is gone by now."""
_numbers: Final = itertools.count()


def make_server(*, membership: Membership | None = None) -> grpc.aio.Server:
    """A server whose handlers may raise any `DisaggregatedError`, and are called by members of the cluster only.

    The caller adds services, binds, starts and stops. `membership` is this process's own unless it is given.
    """
    ours = membership or membership_of.of_this_process()
    return grpc.aio.server(interceptors=[Door(ours.secret, abort_with), _ErrorsInTrailers()], options=SERVER_OPTIONS)


def open_channel(address: str, *, membership: Membership | None = None) -> grpc.aio.Channel:
    """A channel to `host:port`; it connects at the first call and again after a break. The caller closes it.

    Each of its calls may raise Unauthenticated, through `errors_from` or by itself.
    """
    ours = membership or membership_of.of_this_process()
    credentials = ours.tls.channel_credentials() if ours.tls else None
    options = [*CHANNEL_OPTIONS, (_NUMBER, next(_numbers)), *(ours.tls.channel_options() if ours.tls else ())]

    def make(interceptors: Sequence[grpc.aio.ClientInterceptor]) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
        return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)

    return make([]) if ours.secret.is_open else MemberChannel(make, ours.secret, address=address)


def bind(server: grpc.aio.Server, host: str, port: int, *, membership: Membership | None = None) -> str:
    """Take the port now, so that a conflict shows before anything slow is done; port 0 takes any free one.

    Returns `host:port` with the port that was taken. `localhost` is 127.0.0.1 here: as a name of two addresses, one of
    them could be somebody else's and half of our callers would reach them. With TLS it speaks nothing else.

    Raises:
        PortTaken: names the port, and the process that has it where that can be seen.
        ConfigError: the host is not an address of this machine, or is one that others can reach and there is no secret.
    """
    ours = membership or membership_of.of_this_process()
    membership_of.check_may_listen(host, ours)
    host = "127.0.0.1" if host == "localhost" else host
    take_port(host, port).close()  # gRPC tells why it cannot bind only in its own log; a socket tells it in an errno.
    name = f"[{host}]" if ":" in host else host
    try:
        if ours.tls is None:
            taken = server.add_insecure_port(f"{name}:{port}")
        else:
            taken = server.add_secure_port(f"{name}:{port}", ours.tls.server_credentials())
    except RuntimeError as error:
        raise _port_taken(port) from error
    return f"{name}:{taken}"


def take_port(host: str, port: int, *, flag: str = "--port") -> socket.socket:
    """A socket that is bound and does not listen yet; the caller closes it. Raises as `bind` does; `flag` is where
    another port would be said."""
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} is not known: {error.strerror}") from error
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise _port_taken(port, flag) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"host {host!r} is not an address of this machine") from error
        raise StartupError(f"{flag[2:]}: cannot listen on {host}:{port}: {error.strerror}") from error
    return taken


def _port_taken(port: int, flag: str = "--port") -> PortTaken:
    owner = _listener(port)
    return PortTaken(f"port {port} is taken" + (f" by process {owner}" if owner else "") + f"; choose another {flag}")


def _listener(port: int) -> str | None:
    """`pid (name)` of the process that listens on the port; None when we may not see it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f"{connection.pid} ({psutil.Process(connection.pid).name()})"
    return None


# Errors, on the server's side.

_STATUS: Final = {
    errors.UnknownModel: grpc.StatusCode.NOT_FOUND,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.AdmissionError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.ServerLost: grpc.StatusCode.UNAVAILABLE,
    errors.NoServerAvailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RequestCancelled: grpc.StatusCode.CANCELLED,
    errors.LayoutMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FingerprintMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StaleEpoch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TransferError: grpc.StatusCode.ABORTED,
    errors.DisaggregatedError: grpc.StatusCode.INTERNAL,
}


def status_code(error: DisaggregatedError) -> grpc.StatusCode:
    """For callers in other languages; ours look at the class in the metadata."""
    return next(_STATUS[base] for base in type(error).__mro__ if base in _STATUS)


def kind_of(error: DisaggregatedError) -> str:
    """The class that other processes know: the error's own, or what a room's private one is a case of."""
    return next(base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__)


async def abort_with(call: grpc.aio.ServicerContext[Any, Any], error: DisaggregatedError) -> None:
    """End a call so that its caller gets `error`. Never returns."""
    text = str(error)[:ERROR_TEXT_MAX]
    fields = {"kind": kind_of(error), "message": text, "param": getattr(error, "param", None)}
    metadata = ((ERROR_KEY, json.dumps(fields, ensure_ascii=False).encode()),)
    await call.abort(status_code(error), text[:_DETAILS_MAX], metadata)


class _ErrorsInTrailers(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status, and closes its stream with the call, not when garbage is collected."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream), *codec)
        return grpc.unary_unary_rpc_method_handler(_single(handler.unary_unary), *codec)


def _single(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call_and_map(request: Any, call: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with _mapping_errors(call):
            return await behaviour(request, call)

    return call_and_map


def _streaming(behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., Awaitable[None]]:
    async def stream_and_map(request: Any, call: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with _mapping_errors(call), contextlib.aclosing(behaviour(request, call)) as messages:  # type: ignore[type-var]
            async for message in messages:
                await call.write(message)

    return stream_and_map


@contextlib.asynccontextmanager
async def _mapping_errors(call: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """A handler is a process's edge: what it did not expect costs this one call, is logged, and is never retried."""
    try:
        yield
    except DisaggregatedError as error:
        await abort_with(call, error)
    except grpc.aio.AbortError:
        raise
    except Exception as error:  # noqa: BLE001 - the edge that the docstring speaks of
        log.traceback("call_failed", error)
        await abort_with(call, DisaggregatedError(f"unexpected {type(error).__name__}: {error}"))


# Errors, on the caller's side.

_LOST: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,  # by the other side, on its way down; our own cancelling raises CancelledError
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,  # a reset stream
    }
)


@contextlib.contextmanager
def errors_from(address: str) -> Iterator[None]:
    """Around a call to the server at `address`: a gRPC error is raised as the error of our tree that it stands for.

    Raises:
        ServerLost: there is no server, or the connection broke.
        Unauthenticated: the two ends do not know the same cluster secret.
        DeadlineExceeded: the call's own deadline passed.
        DisaggregatedError: whatever the server raised, in its own class.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of_status(error, address) from error


def error_of_status(status: grpc.aio.AioRpcError, address: str) -> DisaggregatedError:
    for key, value in status.trailing_metadata() or ():
        if key == ERROR_KEY:
            try:
                return rebuild(**json.loads(value))
            except (ValueError, TypeError):
                break  # not written by us: what gRPC itself says has to do
    if status.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(f"{address} did not answer in time")
    if status.code() in _LOST:
        return errors.ServerLost(f"lost {address}: {_in_short(status.details() or status.code().name)}")
    return DisaggregatedError(f"{address}: {status.code().name}: {status.details()}")


def _in_short(details: str) -> str:
    """Of all that gRPC tells of a connection that could not be made, what the system said of it."""
    return details.rpartition("Failed to connect to remote host: ")[2]


def rebuild(kind: str, message: str, param: str | None = None) -> DisaggregatedError:
    """The error that another process of ours named. A kind that is unknown here (another version) is not retried."""
    found = getattr(errors, kind, None)
    if not (isinstance(found, type) and issubclass(found, DisaggregatedError)):
        return DisaggregatedError(f"{kind}: {message}")
    if issubclass(found, errors.InvalidRequest):
        return found(message, param=param)
    return found(message)


def to_stream_error(error: DisaggregatedError) -> control_pb2.StreamError:
    """An error that ends one request of a Generate stream, and not the stream."""
    return control_pb2.StreamError(kind=kind_of(error), message=str(error)[:ERROR_TEXT_MAX], retryable=error.retryable)


def from_stream_error(message: control_pb2.StreamError) -> DisaggregatedError:
    return rebuild(message.kind, message.message)
