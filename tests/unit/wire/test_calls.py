"""Calls in frames over a real connection: what a caller gets, what a server notices, and who is let in at all."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from disaggregated import rpc
from disaggregated.errors import DisaggregatedError, InvalidRequest, PoolExhausted, ServerLost, Unauthenticated
from disaggregated.security.membership import NOBODY, Membership
from disaggregated.security.secret import ClusterSecret
from disaggregated.v1 import control_pb2
from disaggregated.wire import WireConnection, WireServer
from disaggregated.wire.frames import FrameReader, Kind, call_frame, frame
from disaggregated.wire.handshake import CHALLENGE_BYTES, HELLO_BYTES, WELCOME_BYTES, CallerHandshake
from orchestrator.server_client import WireServerClient

MEMBER = Membership(secret=ClusterSecret("a secret of the cluster, long enough"))
STRANGER = Membership(secret=ClusterSecret("another secret of another cluster!"))


class Generation:
    """Of control.proto's service: echoes, streams, refuses, fails, and says what became of its calls."""

    def __init__(self) -> None:
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.num_sent = 0
        self.message_bytes = 10

    async def Admit(self, request: control_pb2.AdmitRequest, call: Any) -> control_pb2.AdmitReply:
        match request.request_id:
            case "full":
                raise PoolExhausted.of(wanted=9, free=8)
            case "wrong":
                raise InvalidRequest("seed is wrong", param="seed")
            case "bug":
                raise ZeroDivisionError("one by nothing")
            case "slow":
                await self._wait_for_ever("Admit")
        return control_pb2.AdmitReply(num_cached_tokens=len(request.token_ids))

    async def _wait_for_ever(self, name: str) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.cancelled.put_nowait(name)

    async def Generate(self, request: control_pb2.GenerateRequest, call: Any) -> AsyncIterator[control_pb2.StepBatch]:
        await call.send_initial_metadata(())
        if request.orchestrator_id == "three":
            for step in range(3):
                yield control_pb2.StepBatch(step=step)
            return
        try:
            while True:
                self.num_sent += 1
                yield control_pb2.StepBatch(token_ids=range(self.message_bytes))
                await asyncio.sleep(0)
        finally:
            self.cancelled.put_nowait("Generate")

    async def Cancel(self, request: control_pb2.CancelRequest, call: Any) -> control_pb2.CancelReply:
        return control_pb2.CancelReply()


@contextlib.asynccontextmanager
async def connected(
    server_member: Membership = NOBODY, caller: Membership = NOBODY
) -> AsyncIterator[tuple[Generation, WireConnection]]:
    generation = Generation()
    async with serving(generation, server_member) as server:
        connection = await WireConnection.open("127.0.0.1", server.port, membership=caller)
        try:
            yield generation, connection
        finally:
            connection.close()


@contextlib.asynccontextmanager
async def serving(generation: Generation, member: Membership = NOBODY) -> AsyncIterator[WireServer]:
    server = WireServer(membership=member)
    server.add("Generation", generation)
    await server.start("127.0.0.1")
    try:
        yield server
    finally:
        await server.stop(None)


def admission(request_id: str, *token_ids: int) -> bytes:
    return control_pb2.AdmitRequest(request_id=request_id, token_ids=token_ids).SerializeToString()


GENERATE_FOR_EVER = control_pb2.GenerateRequest(orchestrator_id="for ever").SerializeToString()


@pytest.mark.parametrize("member", [NOBODY, MEMBER])
async def test_a_call_is_answered(member: Membership) -> None:
    async with connected(member, member) as (_, connection):
        answer = await connection.ask(b"Generation.Admit", admission("well", 1, 2, 3))
        assert control_pb2.AdmitReply.FromString(answer).num_cached_tokens == 3
        assert await connection.ask(b"Generation.Cancel", b"") == b""


async def test_a_server_listens_at_the_port_that_it_was_told() -> None:
    with rpc.take_port("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        server = WireServer(membership=NOBODY)
        server.add("Generation", Generation())
        await server.start("127.0.0.1", bound=bound)
        try:
            assert server.port == port
            (await WireConnection.open("127.0.0.1", port, membership=NOBODY)).close()
        finally:
            await server.stop(None)


def with_small_buffers(sock: socket.socket) -> socket.socket:
    """So that it is soon full: what a listening one accepts is as small."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 1 << 14)
    return sock


async def test_who_does_not_read_its_answers_is_not_listened_to_until_it_does() -> None:
    server = WireServer(membership=NOBODY)
    await server.start("127.0.0.1", bound=with_small_buffers(rpc.take_port("127.0.0.1", 0)))
    sock = with_small_buffers(socket.socket())
    sock.connect(("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 14)
    writer.write(CallerHandshake(NOBODY.secret, address="deaf").hello(await reader.readexactly(CHALLENGE_BYTES)))
    await reader.readexactly(WELCOME_BYTES)
    num_calls, is_heard = 0, True
    while is_heard:
        writer.write(b"".join(call_frame(number, b"no such call", b"") for number in range(1000)))
        num_calls += 1000
        done, _ = await asyncio.wait([asyncio.ensure_future(writer.drain())], timeout=0.5)
        is_heard = bool(done)
        assert num_calls < 100_000, "what is not read is kept for ever"
    frames, num_answers = FrameReader(), 0
    while num_answers < num_calls:
        num_answers += sum(kind == Kind.ERROR for kind, _, _ in frames.feed(await reader.read(1 << 16)))
    assert num_answers == num_calls
    writer.transport.abort()
    await server.stop(None)


async def test_a_large_message_comes_whole() -> None:
    async with connected() as (_, connection):
        answer = await connection.ask(b"Generation.Admit", admission("well", *range(500_000)))
        assert control_pb2.AdmitReply.FromString(answer).num_cached_tokens == 500_000


@pytest.mark.parametrize(
    ("request_id", "error", "words"),
    [
        ("full", PoolExhausted, "wanted 9 KV blocks, 8 are free"),
        ("wrong", InvalidRequest, "seed is wrong"),
        ("bug", DisaggregatedError, "unexpected ZeroDivisionError: one by nothing"),
    ],
)
async def test_an_error_arrives_as_what_it_was(request_id: str, error: type[Exception], words: str) -> None:
    async with connected() as (_, connection):
        with pytest.raises(error, match=words) as raised:
            await connection.ask(b"Generation.Admit", admission(request_id))
        assert getattr(raised.value, "param", None) == ("seed" if request_id == "wrong" else None)
        assert await connection.ask(b"Generation.Cancel", b"") == b"", "the connection goes on"


async def test_a_method_that_is_not_there_is_told() -> None:
    async with connected() as (_, connection):
        with pytest.raises(InvalidRequest, match=r"no call 'Context.Prefill'"):
            await connection.ask(b"Context.Prefill", b"")


async def test_a_stream_brings_its_messages_in_order_and_ends() -> None:
    async with connected() as (_, connection):
        request = control_pb2.GenerateRequest(orchestrator_id="three").SerializeToString()
        messages = connection.stream(b"Generation.Generate", request)
        steps = [control_pb2.StepBatch.FromString(message).step async for message in messages]
        assert steps == [0, 1, 2]


def client_over(connection: WireConnection) -> WireServerClient:
    client = WireServerClient("127.0.0.1:1")
    client._wire = connection
    return client


async def test_steps_are_handed_over_as_they_come_once_the_stream_is_open() -> None:
    heard: list[str] = []
    async with connected() as (_, connection):
        await client_over(connection).generate(
            "three", lambda: heard.append("opened"), lambda batch: heard.append(f"step {batch.step}")
        )
    assert heard == ["opened", "step 0", "step 1", "step 2"]


async def test_who_cannot_take_a_step_ends_the_stream_and_nothing_else() -> None:
    taken: list[int] = []

    def take(batch: control_pb2.StepBatch) -> None:
        taken.append(batch.step)
        raise ServerLost("its columns differ")

    async with connected() as (_, connection):
        with pytest.raises(ServerLost, match="its columns differ"):
            await client_over(connection).generate("three", lambda: None, take)
        assert taken == [0], "nothing more is handed over"
        assert await connection.ask(b"Generation.Cancel", b"") == b"", "the connection goes on"


async def test_a_stream_that_is_left_is_cancelled_on_its_server() -> None:
    async with connected() as (generation, connection):
        async with contextlib.aclosing(connection.stream(b"Generation.Generate", GENERATE_FOR_EVER)) as messages:
            await anext(messages)
        async with asyncio.timeout(20):
            assert await generation.cancelled.get() == "Generate"


async def test_a_call_that_is_given_up_is_cancelled_on_its_server() -> None:
    async with connected() as (generation, connection):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connection.ask(b"Generation.Admit", admission("slow"))
        async with asyncio.timeout(20):
            assert await generation.cancelled.get() == "Admit"


async def test_a_call_that_is_cancelled_in_the_same_breath_leaves_nothing() -> None:
    generation = Generation()
    async with serving(generation) as server:
        connection = await WireConnection.open("127.0.0.1", server.port, membership=NOBODY)
        asking = [asyncio.ensure_future(connection.ask(b"Generation.Admit", admission("slow"))) for _ in range(5)]
        await asyncio.sleep(0)
        for each in asking:
            each.cancel()
        await asyncio.wait(asking)
        assert await connection.ask(b"Generation.Cancel", b"") == b""
        assert [len(one.tasks) for one in server.connections] == [0]
        connection.close()


async def test_a_caller_that_hangs_up_ends_its_calls_on_the_server() -> None:
    async with connected() as (generation, connection):
        messages = connection.stream(b"Generation.Generate", GENERATE_FOR_EVER)
        await anext(messages)
        connection.close()
        async with asyncio.timeout(20):
            assert await generation.cancelled.get() == "Generate"
        with pytest.raises(ServerLost):
            async for _ in messages:
                pass


async def test_a_server_that_goes_is_lost_to_every_call_and_to_later_ones() -> None:
    async with serving(Generation()) as server:
        connection = await WireConnection.open("127.0.0.1", server.port, membership=NOBODY)
        asking = asyncio.ensure_future(connection.ask(b"Generation.Admit", admission("slow")))
        await asyncio.sleep(0)
        await connection.ask(b"Generation.Cancel", b"")
        await server.stop(None)
        with pytest.raises(ServerLost):
            await asking
        with pytest.raises(ServerLost):
            await connection.ask(b"Generation.Cancel", b"")


async def test_a_caller_that_does_not_read_holds_its_stream_up_and_nothing_else() -> None:
    generation = Generation()
    generation.message_bytes = 100_000
    async with serving(generation) as server:
        connection = await WireConnection.open("127.0.0.1", server.port, membership=NOBODY)
        messages = connection.stream(b"Generation.Generate", GENERATE_FOR_EVER)
        await anext(messages)
        connection._transport.pause_reading()
        other = await WireConnection.open("127.0.0.1", server.port, membership=NOBODY)
        num_sent = -1
        async with asyncio.timeout(20.0):
            while num_sent != generation.num_sent:
                num_sent = generation.num_sent
                for _ in range(50):
                    await other.ask(b"Generation.Cancel", b"")
        assert num_sent < 200, "the stream waits for its reader"
        other.close()
        connection.close()
        await messages.aclose()


@pytest.mark.parametrize(
    ("server_member", "caller", "words"),
    [
        (MEMBER, STRANGER, "secret"),
        (MEMBER, NOBODY, "secret"),
        (NOBODY, MEMBER, "has no cluster secret"),
    ],
)
async def test_whoever_does_not_know_the_secret_is_not_served(
    server_member: Membership, caller: Membership, words: str
) -> None:
    with pytest.raises(Unauthenticated, match=words):
        async with connected(server_member, caller):
            pass


async def test_a_stranger_that_skips_the_handshake_is_hung_up_on_and_nothing_is_called() -> None:
    generation = Generation()
    async with serving(generation, MEMBER) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await reader.readexactly(CHALLENGE_BYTES)
        writer.write(frame(1, 1, b"\x0eGeneration.Adm") + b"\0" * HELLO_BYTES)
        async with asyncio.timeout(20):
            assert await reader.read() == b"", "no word is said to a stranger"
        writer.close()


async def test_what_is_no_server_of_ours_is_named() -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n" * 4)
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(other, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        with pytest.raises(Unauthenticated, match=f"127.0.0.1:{port} is no server of ours"):
            await WireConnection.open("127.0.0.1", port, membership=NOBODY)


async def test_where_nothing_listens_the_server_is_lost() -> None:
    async with serving(Generation()) as server:
        port = server.port
    with pytest.raises(ServerLost):
        await WireConnection.open("127.0.0.1", port, membership=NOBODY)


async def test_an_address_of_ip_version_6_may_stand_in_brackets() -> None:
    server = WireServer(membership=NOBODY)
    server.add("Generation", Generation())
    await server.start("[::1]")
    try:
        connection = await WireConnection.open("[::1]", server.port, membership=NOBODY)
        assert await connection.ask(b"Generation.Cancel", b"") == b""
        connection.close()
    finally:
        await server.stop(None)
