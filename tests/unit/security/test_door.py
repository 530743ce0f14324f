"""Every call of every service, over real gRPC connections: members are served, strangers are told why they are not."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from disaggregated import errors, rpc
from disaggregated.errors import ServerLost, Unauthenticated
from disaggregated.security.channel import GREET, GREETING_KEY, PROOF_KEY, MemberChannel
from disaggregated.security.membership import NOBODY, Membership
from disaggregated.security.secret import ClusterSecret
from disaggregated.security.seldom import Seldom
from disaggregated.v1 import control_pb2, kv_pb2

OURS = Membership(secret=ClusterSecret("o" * 32))
THEIRS = Membership(secret=ClusterSecret("t" * 32))
SERVICES = (
    *control_pb2.DESCRIPTOR.services_by_name.values(),
    *kv_pb2.DESCRIPTOR.services_by_name.values(),
)
METHODS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods]


class Handlers(grpc.GenericRpcHandler):
    """Serves every method of every service, and notes which were reached, and with how large a message."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.message_bytes = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = str(handler_call_details.method)
        if method not in METHODS:
            return None

        async def answer(request: bytes, call: Any) -> bytes:
            self.reached.append(method)
            self.message_bytes = len(request)
            return b""

        async def stream(request: bytes, call: Any) -> AsyncIterator[bytes]:
            self.reached.append(method)
            yield b"1"
            yield b"2"

        if is_stream(method):
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(answer)


def is_stream(method: str) -> bool:
    service, _, name = method[1:].rpartition("/")
    found = next(each for each in SERVICES if each.full_name == service).methods_by_name[name]
    return bool(found.server_streaming)


@dataclasses.dataclass(slots=True)
class Served:
    address: str
    handlers: Handlers
    server: grpc.aio.Server


@contextlib.asynccontextmanager
async def served(membership: Membership = OURS, *, port: int = 0) -> AsyncIterator[Served]:
    server = rpc.make_server(membership=membership)
    handlers = Handlers()
    server.add_generic_rpc_handlers((handlers,))
    address = rpc.bind(server, "127.0.0.1", port, membership=membership)
    await server.start()
    try:
        yield Served(address, handlers, server)
    finally:
        await server.stop(None)


async def called(
    address: str, method: str, *, membership: Membership = OURS, request: bytes = b"", metadata: Any = None
) -> list[bytes]:
    """The answers to one call on a channel of its own; raises the error of our tree."""
    async with rpc.open_channel(address, membership=membership) as channel:
        return await called_on(channel, address, method, request=request, metadata=metadata)


async def called_on(
    channel: Any, address: str, method: str, *, request: bytes = b"", metadata: Any = None
) -> list[bytes]:
    with rpc.errors_from(address):
        if is_stream(method):
            return [answer async for answer in channel.unary_stream(method)(request, timeout=20, metadata=metadata)]
        return [await channel.unary_unary(method)(request, timeout=20, metadata=metadata)]


async def raw(channel: Any, method: str, *, timeout: float = 5, metadata: Any = None) -> bytes:
    answer: bytes = await channel.unary_unary(method)(b"", timeout=timeout, metadata=metadata)
    return answer


def test_the_list_of_methods_is_the_whole_protocol() -> None:
    assert {method.split("/")[1].rpartition(".")[2] for method in METHODS} == {
        "Server",
        "Context",
        "Generation",
        "KVSource",
    }
    assert len(METHODS) >= 13


async def test_a_member_reaches_every_method() -> None:
    async with served() as there:
        for method in METHODS:
            assert await called(there.address, method) == ([b"1", b"2"] if is_stream(method) else [b""])
        assert there.handlers.reached == METHODS


@pytest.mark.parametrize("method", METHODS)
async def test_a_stranger_reaches_no_method(method: str) -> None:
    async with served() as there:
        for who in (NOBODY, THEIRS):
            with pytest.raises(Unauthenticated, match="cluster_secret_file"):
                await called(there.address, method, membership=who)
        forged = ((PROOF_KEY, b"x" * 56),)
        with pytest.raises(errors.DisaggregatedError):
            await called(there.address, method, membership=NOBODY, metadata=forged)
        assert there.handlers.reached == []


async def test_an_unknown_method_is_not_known_to_strangers_either() -> None:
    async with served() as there, rpc.open_channel(there.address, membership=NOBODY) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(channel, "/disaggregated.v1.Server/Guess")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_member_does_not_speak_to_a_server_that_does_not_know_the_secret() -> None:
    async with served(THEIRS) as there:
        with pytest.raises(Unauthenticated, match="another cluster secret"):
            await called(there.address, METHODS[0])
    async with served(NOBODY) as there:
        with pytest.raises(Unauthenticated, match="has no cluster secret"):
            await called(there.address, METHODS[0])
        assert await called(there.address, METHODS[0], membership=NOBODY) == [b""]


async def test_a_member_does_not_speak_to_a_foreign_grpc_server() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(Unauthenticated, match="no server of ours"):
        await called(f"127.0.0.1:{port}", METHODS[0])
    await server.stop(None)


async def test_a_stranger_is_refused_before_its_message_has_come() -> None:
    """Its call is a stream that never sends a message, so an answer can only come from the metadata."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    admit = "/disaggregated.v1.Generation/Admit"
    async with served() as there:
        await called(there.address, admit, request=b"\0" * (16 << 20))
        assert there.handlers.message_bytes == 16 << 20
        async with rpc.open_channel(there.address, membership=NOBODY) as channel:
            call: Any = channel.stream_unary(admit)
            with pytest.raises(Unauthenticated), rpc.errors_from(there.address):
                await call(nothing(), timeout=20)
        assert len(there.handlers.reached) == 1


async def test_hands_are_shaken_once_a_channel_however_many_calls_come_first() -> None:
    async with served() as there, rpc.open_channel(there.address, membership=OURS) as channel:
        assert isinstance(channel, MemberChannel)
        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(called_on(channel, there.address, METHODS[0]))
        session = await channel.greet(5)
        assert await channel.greet(5) is session
        assert len(there.handlers.reached) == 50


async def test_a_recorded_call_is_refused() -> None:
    recorded: list[Any] = []

    class Ear(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            recorded.append(tuple(client_call_details.metadata or ()))
            return await continuation(client_call_details, request)

    async with served() as there:

        def listened(interceptors: Sequence[grpc.aio.ClientInterceptor]) -> grpc.aio.Channel:
            return grpc.aio.insecure_channel(there.address, interceptors=[*interceptors, Ear()])

        async with MemberChannel(listened, OURS.secret, address=there.address) as channel:
            await called_on(channel, there.address, METHODS[0])
        call = next(metadata for metadata in recorded if metadata[-1][0] == PROOF_KEY)
        assert "o" * 32 not in str(recorded)
        with pytest.raises(Unauthenticated, match="came before"):
            await called(there.address, METHODS[0], membership=NOBODY, metadata=call)
        assert len(there.handlers.reached) == 1


async def test_a_server_that_started_again_is_lost_to_an_old_channel_and_found_by_a_new_one() -> None:
    async with served() as there:
        port = int(there.address.rpartition(":")[2])
        channel = rpc.open_channel(there.address, membership=OURS)
        await called_on(channel, there.address, METHODS[0])
    async with served(port=port) as there:
        with pytest.raises(ServerLost):
            await called_on(channel, there.address, METHODS[0])
        assert there.handlers.reached == []
        assert await called(there.address, METHODS[0]) == [b""]
    await channel.close()


async def test_the_deadline_of_a_call_holds_for_the_handshake_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        begin_s = time.monotonic()
        async with rpc.open_channel(address, membership=OURS) as channel:
            with pytest.raises(errors.DisaggregatedError), rpc.errors_from(address):
                await raw(channel, METHODS[0], timeout=0.2)
        assert time.monotonic() - begin_s < 10


@pytest.mark.parametrize("nonce", [b"", b"x", b"x" * 17, b"x" * 4000])
async def test_a_greeting_that_is_none_is_refused(nonce: bytes) -> None:
    async with served() as there, rpc.open_channel(there.address, membership=NOBODY) as channel:
        with pytest.raises(Unauthenticated, match="nonce"), rpc.errors_from(there.address):
            await raw(channel, GREET, metadata=((GREETING_KEY, nonce),))


async def test_strangers_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as there, rpc.open_channel(there.address, membership=NOBODY) as channel:
        for _ in range(50):
            with pytest.raises(Unauthenticated):
                await called_on(channel, there.address, METHODS[0])
    assert caplog.text.count("call_refused") == 1


def test_what_is_seldom_said_counts_what_was_not() -> None:
    now_s = [0.0]
    seldom = Seldom(interval_s=10.0, clock=lambda: now_s[0])
    assert [seldom.may_say() for _ in range(4)] == [0, None, None, None]
    now_s[0] = 10.0
    assert [seldom.may_say() for _ in range(2)] == [3, None]


async def test_an_idle_channel_is_kept_by_both_ends() -> None:
    """A server that does not permit pings without calls hangs up on a caller that pings while it is idle."""
    for options in (rpc.SERVER_OPTIONS, rpc.CHANNEL_OPTIONS):
        said = dict(options)
        assert said["grpc.keepalive_permit_without_calls"] == 1
        assert said["grpc.http2.max_pings_without_data"] == 0
    said = dict(rpc.SERVER_OPTIONS)
    callers = dict(rpc.CHANNEL_OPTIONS)
    assert said["grpc.http2.min_ping_interval_without_data_ms"] < callers["grpc.keepalive_time_ms"]
