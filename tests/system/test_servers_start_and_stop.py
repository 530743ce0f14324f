"""How a server process begins and ends: one ready line, one line for what is wrong, and nobody's tokens lost."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import re
import signal
import socket

import pytest

from disaggregated.errors import Draining, ServerLost
from disaggregated.sampling_params import SamplingParams
from tests.support.processes import running, spawned
from tests.support.server_client import ContextClient
from tests.support.servers import arguments, generation_server, random_prompt, write_model

FEW = SamplingParams(max_tokens=4)
MANY = SamplingParams(max_tokens=100)
"""Of the slow model: it is still at it when somebody does the next thing."""
SOON_OVER = SamplingParams(max_tokens=800)
"""A good part of a second of the brisk model's, and far less than what a server that is told to end leaves it."""
FOREVER = SamplingParams(max_tokens=4000)


async def refused(*command: str) -> tuple[int, list[str]]:
    """Exit code and what was said on stderr, but for log lines."""
    async with spawned(*command) as server:
        code = await server.wait_exit()
    assert server.stdout == [], "only the ready line goes to stdout"
    return code, [line for line in server.stderr if not re.match(r"\d{4}-\d\d-\d\dT", line)]


@pytest.mark.parametrize("role", ["context", "generation"])
async def test_a_taken_port_is_found_before_anything_else(role: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        code, lines = await refused(*arguments(role, pathlib.Path("/no/such/model"), f"--port={port}"))
    assert code == 3
    assert len(lines) == 1
    assert lines[0].startswith(f"{role} server: port {port} is taken by process ")


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--kv-cache-config.cpu-memory-budget-bytes=1000"], 5, "not one KV block fits"),
        (["--max-seq-len=5000"], 2, "max_seq_len"),
        (["--cache-transceiver-config.backend=PIGEON"], 2, "backend"),
        (["--no-such-flag=1"], 2, "no-such-flag"),
        (["--host=192.0.2.1"], 2, "192.0.2.1"),
    ],
)
async def test_what_cannot_be_had_is_one_line_and_an_exit_code(
    tmp_path: pathlib.Path, flags: list[str], code: int, says: str
) -> None:
    found, lines = await refused(*arguments("generation", write_model(tmp_path), *flags))
    assert found == code
    assert len(lines) == 1
    assert says in lines[0]


async def test_a_missing_model_is_one_line_and_an_exit_code() -> None:
    code, lines = await refused(*arguments("context", pathlib.Path("/no/such/model")))
    assert (code, len(lines)) == (4, 1)
    assert "/no/such/model" in lines[0]


async def test_a_signal_while_the_model_loads_ends_the_process_at_once() -> None:
    async with spawned("-m", "context_server", "smollm2-135m-instruct", "--port=0") as server:
        async with asyncio.timeout(200):
            await server.wait_line("port_bound")
        server.signal(signal.SIGTERM)
        assert await server.wait_exit() == 0
    assert server.stdout == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_server_exits_with_0_on_a_signal(tmp_path: pathlib.Path, number: signal.Signals) -> None:
    async with running(*arguments("context", write_model(tmp_path))) as server:
        assert re.fullmatch(
            r"READY context 127\.0\.0\.1:\d+ instance=context-\d+-\w+ model=\S+ blocks=512 ops=\S+ in \d+\.\d s",
            server.ready_line,
        )
        server.signal(number)
        assert await server.wait_exit() == 0
        assert server.stdout == [server.ready_line]


async def test_draining_refuses_the_new_finishes_the_old_and_says_so(tmp_path: pathlib.Path) -> None:
    async with generation_server(write_model(tmp_path, slow=True)) as (_, client):
        key = await client.admit(random_prompt(20), MANY)
        await client.delta(key)
        assert await client.drain(deadline_s=0.0) == 1
        with pytest.raises(Draining) as caught:
            await client.admit(random_prompt(20), FEW)
        assert caught.value.retryable
        async with contextlib.aclosing(client.heartbeats(interval_s=30.0)) as heartbeats:
            assert (await anext(heartbeats)).draining
        assert await client.drain(deadline_s=20.0) == 0
        completion = await client.completion(key)
        assert (len(completion.token_ids), completion.finish_reason) == (100, "length")


async def test_watchers_hear_at_once_that_draining_begins(tmp_path: pathlib.Path) -> None:
    async with (
        running(*arguments("context", write_model(tmp_path))) as server,
        ContextClient(server.address) as client,
        contextlib.aclosing(client.heartbeats(interval_s=3600.0)) as heartbeats,
        asyncio.timeout(10),
    ):
        assert not (await anext(heartbeats)).draining
        await client.drain(deadline_s=0.0)
        assert (await anext(heartbeats)).draining


async def test_a_signal_lets_running_requests_finish(tmp_path: pathlib.Path) -> None:
    async with generation_server(write_model(tmp_path)) as (server, client):
        key = await client.admit(random_prompt(20), SOON_OVER)
        await client.delta(key)
        server.signal(signal.SIGTERM)
        completion = await client.completion(key)
        assert (len(completion.token_ids), completion.finish_reason) == (800, "length")
        assert await server.wait_exit() == 0


async def test_a_second_signal_ends_at_once(tmp_path: pathlib.Path) -> None:
    async with generation_server(write_model(tmp_path, slow=True)) as (server, client):
        key = await client.admit(random_prompt(20), FOREVER)
        await client.delta(key)
        server.signal(signal.SIGTERM)
        async with asyncio.timeout(100):
            await server.wait_line("signal_received")
        server.signal(signal.SIGINT)
        assert await server.wait_exit(timeout_s=10.0) == 0
        with pytest.raises(ServerLost):
            await client.completion(key)
