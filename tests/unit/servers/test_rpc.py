"""Errors cross a real gRPC connection as themselves; ports that are taken are named."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from disaggregated import errors, rpc
from disaggregated.v1 import control_pb2, control_pb2_grpc


class Faulty(control_pb2_grpc.ServerServicer):
    """Raises what it is told to, or streams until it is closed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.closed = asyncio.Event()

    async def Describe(self, request: Any, call: Any) -> control_pb2.ServerDescription:
        if self.error:
            raise self.error
        return control_pb2.ServerDescription(role="context")

    async def Watch(self, request: Any, call: Any) -> AsyncIterator[control_pb2.Heartbeat]:
        try:
            yield control_pb2.Heartbeat(step=1)
            if self.error:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def Drain(self, request: Any, call: Any) -> control_pb2.DrainReply:
        await asyncio.Event().wait()
        raise AssertionError

    async def GetLedger(self, request: Any, call: Any) -> control_pb2.Ledger:
        return control_pb2.Ledger()

    async def WatchBlocks(self, request: Any, call: Any) -> AsyncIterator[control_pb2.BlockEvents]:
        yield control_pb2.BlockEvents()


@contextlib.asynccontextmanager
async def served(faulty: Faulty) -> AsyncIterator[tuple[control_pb2_grpc.ServerAsyncStub, str, grpc.aio.Server]]:
    server = rpc.make_server()
    control_pb2_grpc.add_ServerServicer_to_server(faulty, server)
    address = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with rpc.open_channel(address) as channel:
            yield control_pb2_grpc.ServerStub(channel), address, server
    finally:
        await server.stop(None)


def num_connections(address: str) -> int:
    port = int(address.rpartition(":")[2])
    ours = psutil.Process().net_connections(kind="tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in ours)


async def test_a_channel_is_one_connection_and_shares_it_with_no_other_channel() -> None:
    """Shaking hands takes none of its own; a channel made anew has not to wait until an old one would try again."""
    async with served(Faulty()) as (stub, address, _), rpc.open_channel(address) as other:
        await stub.Describe(control_pb2.DescribeRequest(), timeout=20)
        await stub.Describe(control_pb2.DescribeRequest(), timeout=20)
        assert num_connections(address) == 1
        await control_pb2_grpc.ServerStub(other).Describe(control_pb2.DescribeRequest(), timeout=20)
        assert num_connections(address) == 2


@pytest.mark.parametrize("name", sorted(dict([*rpc.SERVER_OPTIONS, *rpc.CHANNEL_OPTIONS])))
def test_every_option_is_one_that_grpc_knows(name: str) -> None:
    """It takes any name without a word, and a misspelt one has no effect."""
    assert name.encode() + b"\0" in library()


@functools.cache
def library() -> bytes:
    spec = importlib.util.find_spec("grpc._cython.cygrpc")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_bytes()


def test_a_process_that_is_forked_beside_grpc_runs_nothing_of_it_and_says_nothing() -> None:
    """Between fork and exec a child of ours is as large as its parent, and nothing may happen in it."""
    forking_beside_grpc = """
import disaggregated, asyncio, grpc, os, time
async def main():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    await channel.channel_ready()
    if os.fork() == 0:
        time.sleep(0.1)
        os._exit(len(os.listdir("/proc/self/task")))
    num_threads = os.waitstatus_to_exitcode(os.wait()[1])
    await channel.close()
    await server.stop(None)
    os._exit(num_threads)
asyncio.run(main())
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    command = [sys.executable, "-c", forking_beside_grpc]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")


def tree(root: type[errors.DisaggregatedError]) -> list[type[errors.DisaggregatedError]]:
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(leaf for child in children for leaf in tree(child))]


@pytest.mark.parametrize("kind", tree(errors.DisaggregatedError), ids=lambda kind: kind.__name__)
async def test_every_error_arrives_in_its_own_class(kind: type[errors.DisaggregatedError]) -> None:
    async with served(Faulty(kind("12 blocks, ß and 漢字"))) as (stub, address, _):
        with (
            pytest.raises(errors.DisaggregatedError, match="12 blocks, ß and 漢字") as caught,
            rpc.errors_from(address),
        ):
            await stub.Describe(control_pb2.DescribeRequest(), timeout=20)
    assert type(caught.value) is kind


class TornFrame(errors.PeerLost):
    """An error of one room, that no other room knows."""


async def test_a_rooms_own_error_arrives_as_what_it_is_a_case_of() -> None:
    async with served(Faulty(TornFrame("half of it"))) as (stub, address, _):
        with pytest.raises(errors.PeerLost, match="half of it") as caught, rpc.errors_from(address):
            await stub.Describe(control_pb2.DescribeRequest(), timeout=20)
    assert type(caught.value) is errors.PeerLost


async def test_the_name_of_a_bad_field_travels_too() -> None:
    async with served(Faulty(errors.PromptTooLong("9 tokens, limit 8", param="messages"))) as (stub, address, _):
        with pytest.raises(errors.PromptTooLong) as caught, rpc.errors_from(address):
            await stub.Describe(control_pb2.DescribeRequest(), timeout=20)
    assert caught.value.param == "messages"


async def test_an_error_after_the_first_message_of_a_stream_arrives_in_its_own_class() -> None:
    async with served(Faulty(errors.SourceFailed("cancelled"))) as (stub, address, _):
        beats = stub.Watch(control_pb2.WatchRequest(), timeout=20)
        assert (await anext(aiter(beats))).step == 1
        with pytest.raises(errors.SourceFailed), rpc.errors_from(address):
            await anext(aiter(beats))


async def test_an_unexpected_error_is_logged_with_its_traceback_and_is_not_retryable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served(Faulty(KeyError("block 7"))) as (stub, address, _):
        with pytest.raises(errors.DisaggregatedError, match="KeyError") as caught, rpc.errors_from(address):
            await stub.Describe(control_pb2.DescribeRequest(), timeout=20)
    assert not caught.value.retryable
    assert "Traceback" in caplog.text


async def test_a_message_of_any_length_fits_into_the_trailers() -> None:
    async with served(Faulty(errors.PeerLost("\N{GRINNING FACE}" * 100_000))) as (stub, address, _):
        with pytest.raises(errors.PeerLost), rpc.errors_from(address):
            await stub.Describe(control_pb2.DescribeRequest(), timeout=20)


async def test_a_missing_server_is_lost_and_names_the_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        async with rpc.open_channel(address) as channel:
            says = f"^lost {address}: Connection refused$"
            with pytest.raises(errors.ServerLost, match=says), rpc.errors_from(address):
                await control_pb2_grpc.ServerStub(channel).Describe(control_pb2.DescribeRequest(), timeout=20)


async def test_a_server_that_goes_down_during_a_call_is_lost() -> None:
    async with served(Faulty()) as (stub, address, server):
        beats = stub.Watch(control_pb2.WatchRequest(), timeout=20)
        await anext(aiter(beats))
        await server.stop(None)
        with pytest.raises(errors.ServerLost), rpc.errors_from(address):
            await anext(aiter(beats))


async def test_a_call_that_takes_too_long_exceeds_its_deadline() -> None:
    async with served(Faulty()) as (stub, address, _):
        with pytest.raises(errors.DeadlineExceeded), rpc.errors_from(address):
            await stub.Drain(control_pb2.DrainRequest(), timeout=0.05)


async def test_a_stream_is_closed_as_soon_as_its_caller_leaves() -> None:
    faulty = Faulty()
    async with served(faulty) as (stub, _, _), asyncio.timeout(20):
        beats = stub.Watch(control_pb2.WatchRequest())
        await anext(aiter(beats))
        beats.cancel()
        await faulty.closed.wait()


@pytest.mark.parametrize("kind", ["NotAClass", "annotations", "ClassVar"])
def test_an_error_of_another_version_is_kept_in_words(kind: str) -> None:
    rebuilt = rpc.rebuild(kind, "something new")
    assert type(rebuilt) is errors.DisaggregatedError
    assert str(rebuilt) == f"{kind}: something new"


def test_a_stream_error_is_rebuilt_like_a_status() -> None:
    message = rpc.to_stream_error(errors.ChecksumMismatch("block 3"))
    assert message.retryable
    assert isinstance(rpc.from_stream_error(message), errors.ChecksumMismatch)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
async def test_a_taken_port_is_named_with_the_process_that_has_it(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(errors.PortTaken, match=rf"port {port} is taken by process {os.getpid()} "):
            rpc.bind(rpc.make_server(), host, port)


async def test_a_taken_port_is_told_with_the_flag_that_names_another_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder, pytest.raises(errors.PortTaken, match="another --wire_port"):
        rpc.take_port("localhost", holder.getsockname()[1], flag="--wire_port")


async def test_two_servers_cannot_share_a_port() -> None:
    async with served(Faulty()) as (_, address, _):
        with pytest.raises(errors.PortTaken):
            rpc.bind(rpc.make_server(), "127.0.0.1", int(address.rpartition(":")[2]))


@pytest.mark.parametrize(("host", "says"), [("192.0.2.1", "not an address of this"), ("no.such.host.invalid", "known")])
async def test_a_host_that_is_not_ours_is_a_configuration_error(host: str, says: str) -> None:
    with pytest.raises(errors.ConfigError, match=says):
        rpc.bind(rpc.make_server(), host, 0)


@pytest.mark.parametrize("trailer", [b"\xff", b"7", b'{"colour": "red"}', b'{"kind": "PoolExhausted"}'])
def test_a_trailer_that_is_not_ours_never_crashes_the_caller(trailer: bytes) -> None:
    status = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata((rpc.ERROR_KEY, trailer)), "gone"
    )
    assert isinstance(rpc.error_of_status(status, "127.0.0.1:1"), errors.ServerLost)
