"""A client's connection at a real port: pieces, pipelines, hand-overs, hang-ups, deadlines and the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from disaggregated.config.door import DoorConfig
from orchestrator.api import bodies
from orchestrator.front_door import FrontDoor
from orchestrator.http import port as port_module
from orchestrator.http.connection import AHEAD_BYTES_MAX
from tests.support.certificates import make_certificate
from tests.support.fake_cluster import Temper
from tests.support.front_door import front_door, until
from tests.support.http_answers import answers_in
from tests.support.http_client import Client, connected, request
from tests.support.raw_http import CHUNKED, CHUNKS, GET

SLOW = Temper(latency_s=0.0, step_s=0.05, prefill_token_s=0.0)
CLOSING_GET = GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
CHAT = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def slow_client(connected_socket: socket.socket) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(sock=connected_socket, limit=4096)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


def id_of(number: int) -> str:
    return f"x-request-id: number-{number}"


async def test_a_request_that_comes_byte_by_byte_is_answered_like_one_that_comes_at_once() -> None:
    async with front_door() as door, connected(door.port.address[1]) as client:
        message = request("/v1/completions", id_of(1))
        client.send(message)
        status, _, whole = await client.answer()
        for at in range(len(message)):
            client.send(message[at : at + 1])
            await asyncio.sleep(0)
        assert status == (await client.answer())[0] == 200
        client.send(message)
        _, _, again = await client.answer()
        assert json.loads(whole)["choices"] == json.loads(again)["choices"]


async def test_requests_that_are_sent_ahead_are_answered_one_by_one_in_their_order() -> None:
    async with front_door() as door, connected(door.port.address[1]) as client:
        messages = [request("/v1/completions", id_of(number), stream=number % 3 == 0) for number in range(40)]
        client.send(b"".join(messages))
        for number in range(40):
            status, headers, _ = await client.answer()
            assert (status, headers["x-request-id"]) == (200, f"number-{number}")
        await door.wait_idle()


async def test_no_more_is_read_than_is_bounded_while_a_request_is_under_way() -> None:
    async with front_door(temper=SLOW, num_tokens_max=4096) as door, connected(door.port.address[1]) as client:
        client.send(request(max_tokens=1000, ignore_eos=True, stream=True))
        ahead = request("/v1/completions", id_of(1), user="u" * 50_000)
        for _ in range(200):
            client.send(ahead)
        (connection,) = door.port._connections
        await until(lambda: len(connection._ahead) > AHEAD_BYTES_MAX)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(connection._ahead) < 2 * AHEAD_BYTES_MAX + (1 << 18), "reading went on"


async def test_what_is_read_ahead_beyond_the_bound_is_answered_all_the_same() -> None:
    async with front_door() as door, connected(door.port.address[1], limit=1 << 20) as client:
        for number in range(60):
            client.send(request("/v1/completions", id_of(number), user="u" * 20_000))
        for number in range(60):
            status, headers, _ = await client.answer()
            assert (status, headers["x-request-id"]) == (200, f"number-{number}")


async def test_a_connection_is_handed_over_in_the_middle_of_its_life_and_stays_in_order() -> None:
    async with front_door() as door, connected(door.port.address[1]) as client:
        own, chunked = request("/v1/completions", id_of(1)), request("/v1/completions", id_of(2))
        head, _, _ = chunked.partition(b"Content-Length")
        client.send(own + own + head + CHUNKED + b"\r\n" + CHUNKS + own + GET + own)
        statuses = [(await client.answer())[0] for _ in range(6)]
        assert statuses == [200, 200, 404, 200, 200, 200], "the chunked one asks for a model that is not here"
        assert not door.port._connections, "aiohttp has it now"
        client.send(CLOSING_GET)
        assert answers_in(await client.rest())[0].status == 200


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
async def test_a_body_that_is_large_is_the_other_readers(path: str) -> None:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]} if path == CHAT else {}
    async with front_door() as door, connected(door.port.address[1]) as client:
        client.send(request(path, id_of(1), user="u" * 70_000, **prompt))
        assert (await client.answer())[0] == 200
        assert not door.port._connections


async def test_a_limit_for_bodies_that_is_lower_than_ours_holds() -> None:
    async with front_door(door=DoorConfig(body_bytes_max=2000)) as door, connected(door.port.address[1]) as client:
        client.send(request("/v1/completions", user="u" * 3000))
        status, _, body = await client.answer()
        assert status == 413
        assert "limit of 2000 bytes" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_hangs_up_is_noticed_on_every_server(stream: bool, n: int) -> None:
    async with front_door(temper=SLOW) as door:
        async with connected(door.port.address[1]) as client:
            client.send(request(max_tokens=900, ignore_eos=True, stream=stream, n=n))
            await until(lambda: door.door.dispatcher.stories.num_running == n)
            await until(lambda: len(door.cluster.of("generation")[0].admitted) == n)
        await door.wait_idle()
        assert not door.port._connections
        assert not door.port._tasks


async def test_a_client_that_hangs_up_at_once_leaves_nothing_behind() -> None:
    async with front_door() as door:
        for message in (request(), request(n=2), request(stream=True), request(prompt="long " * 1000), request()[:-5]):
            async with connected(door.port.address[1]) as client:
                client.send(message)
                await client.writer.drain()
        await door.wait_idle()
        await until(lambda: not door.port._connections and not door.port._tasks)


@pytest.mark.parametrize("message", [b"", b"POST /v1/comp", request()[:60]])
async def test_a_client_who_sends_no_whole_head_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, message: bytes) -> None:
    monkeypatch.setattr(port_module, "KEEPALIVE_S", 0.1)
    async with front_door() as door, connected(door.port.address[1]) as client:
        client.send(request())
        assert (await client.answer())[0] == 200
        client.send(message)
        assert await client.rest() == b""


async def test_a_client_who_reads_a_long_answer_slowly_is_not_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "KEEPALIVE_S", 0.2)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    async with front_door(send_buffer_bytes=4096) as door:
        reader.connect(("127.0.0.1", door.port.address[1]))
        async with slow_client(reader) as client:
            client.send(request(prompt=[65] * 900, prompt_logprobs=5, max_tokens=1))
            loop, began_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
            head = await client.reader.readuntil(b"\r\n\r\n")
            length, num_read = int(re.findall(rb"Content-Length: (\d+)", head)[0]), 0
            assert length > 200_000
            while num_read < length:
                num_read += len(await client.reader.readexactly(min(4096, length - num_read)))
                await asyncio.sleep(0.01)
            assert loop.time() - began_s > 0.4, "it was read too fast to show anything"
            assert await client.rest() == b"", "and then nothing came"


async def test_a_client_who_reads_nothing_of_its_answer_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "KEEPALIVE_S", 0.1)
    async with front_door(send_buffer_bytes=4096) as door, connected(door.port.address[1], limit=1024) as client:
        client.send(3 * request(prompt=[65] * 900, prompt_logprobs=5, max_tokens=1))
        await until(lambda: bool(door.port._connections))
        await until(lambda: not door.port._connections)


async def test_a_body_that_stops_half_way_is_answered_and_the_connection_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.1)
    async with front_door() as door, connected(door.port.address[1]) as client:
        client.send(request("/v1/completions", id_of(1))[:-3])
        status, headers, body = await client.answer()
        assert (status, headers["connection"], headers["x-request-id"]) == (408, "close", "number-1")
        assert "did not come" in json.loads(body)["error"]["message"]
        assert await client.rest() == b""


async def test_a_request_under_way_outlasts_the_deadlines_of_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(port_module, "KEEPALIVE_S", 0.05)
    async with front_door(temper=SLOW) as door, connected(door.port.address[1]) as client:
        client.send(request(max_tokens=8, ignore_eos=True))
        assert (await client.answer())[0] == 200


async def test_a_crash_in_a_handler_is_one_500_and_the_connection_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with front_door() as door, connected(door.port.address[1]) as client:
        with monkeypatch.context() as broken:
            broken.setattr(FrontDoor, "served_model", lambda _: 1 // 0)
            client.send(request("/v1/completions", id_of(1)))
            status, headers, body = await client.answer()
        assert (status, headers["x-request-id"]) == (500, "number-1")
        assert json.loads(body)["error"] == {
            "message": "internal error", "type": "internal_error", "param": None, "code": None,
        }  # fmt: skip
        client.send(request())
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize(
    ("what", "fields"), [("plain.PlainAnswer._body", {}), ("shapes.CompletionShape.whole", {"stop": "zz"})]
)
async def test_a_crash_at_the_end_of_an_answer_is_one_500(
    monkeypatch: pytest.MonkeyPatch, what: str, fields: dict[str, Any]
) -> None:
    async with front_door() as door, connected(door.port.address[1]) as client:
        with monkeypatch.context() as broken:
            broken.setattr(f"orchestrator.api.{what}", lambda *_: 1 // 0)
            client.send(request(**fields))
            assert (await client.answer())[0] == 500
        await door.wait_idle()


async def test_a_crash_in_the_middle_of_a_stream_ends_it_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with front_door(temper=SLOW) as door, connected(door.port.address[1]) as client:
        client.send(request(stream=True))
        await client.reader.readuntil(b"data: ")
        monkeypatch.setattr("orchestrator.api.sse.EventStream.try_end", lambda *_: 1 // 0)
        assert not (await client.rest()).endswith(b"0\r\n\r\n")
        await door.wait_idle()


async def test_a_client_that_asks_to_close_is_told_so_and_closed() -> None:
    async with front_door() as door:
        for fields in ({}, {"stream": True}, {"model": "unknown"}, {"n": 2}):
            async with connected(door.port.address[1]) as client:
                client.send(request("/v1/completions", "Connection: close", **fields) + request())
                (answer,) = answers_in(await client.rest())
                assert answer.headers["connection"] == "close"


async def test_a_port_that_closes_lets_answers_end_and_closes_idle_connections_at_once() -> None:
    async with front_door(temper=SLOW) as door:
        number = door.port.address[1]
        async with connected(number) as idle, connected(number) as busy:
            idle.send(request(max_tokens=1))
            assert (await idle.answer())[0] == 200
            busy.send(request(max_tokens=10, ignore_eos=True))
            await until(lambda: door.door.dispatcher.stories.num_running == 1)
            closing = asyncio.create_task(door.port.close())
            assert await idle.rest() == b""
            assert (await busy.answer())[0] == 200
            assert await busy.rest() == b""
            await closing
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", number)


async def test_a_port_that_closes_cuts_what_does_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with front_door(temper=SLOW) as door, connected(door.port.address[1]) as client:
        door.port._timeout_s = 0.1
        client.send(request(max_tokens=900, ignore_eos=True))
        await until(lambda: door.door.dispatcher.stories.num_running == 1)
        async with asyncio.timeout(10):
            await door.port.close()
        assert await client.rest() == b""
        assert door.door.dispatcher.stories.num_running == 0


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_over_tls_the_same_is_answered_and_handed_over(tmp_path: Path, loop: Any) -> None:
    cert, key = make_certificate(tmp_path)

    async def play() -> None:
        trusting = ssl.create_default_context(cafile=str(cert))
        async with (
            front_door(door=DoorConfig(cert_file=str(cert), key_file=str(key))) as door,
            connected(door.port.address[1], ssl=trusting, server_hostname="localhost") as client,
        ):
            client.send(request("/v1/completions", id_of(1)) + request(stream=True))
            assert (await client.answer())[0] == 200
            status, headers, events = await client.answer()
            assert (status, headers["transfer-encoding"]) == (200, "chunked")
            assert events.endswith(b"data: [DONE]\n\n")
            assert len(door.port._connections) == 1
            client.send(CLOSING_GET)
            assert (await client.answer())[0] == 200
            assert not door.port._connections

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(play())


async def test_keys_are_asked_for_before_anything_is_read_of_a_body(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yml"
    keys.write_text("keys:\n- name: a\n  key: sk-0123456789abcdef0123456789\n")
    keys.chmod(0o600)
    async with front_door(door=DoorConfig(api_keys_file=str(keys))) as door, connected(door.port.address[1]) as client:
        client.send(request("/v1/completions").replace(b"{", b"["))
        status, headers, _ = await client.answer()
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
