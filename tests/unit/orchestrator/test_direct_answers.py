"""Answers that are written past aiohttp's own response: what a client sees, and what becomes of its connection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from orchestrator.story import RequestStory
from tests.support.fake_cluster import Temper
from tests.support.front_door import Door, front_door, until

SLOW = Temper(latency_s=0.0, step_s=0.0002, prefill_token_s=0.0, tokens_a_step_max=1)
READ_TIMEOUT_S = 20.0


class RawClient:
    """A connection on which nothing is interpreted."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def ask(self, *, version: str = "1.1", headers: str = "", **fields: object) -> None:
        body = orjson.dumps({"model": "fake", "prompt": "Hello", "max_tokens": 8, **fields})
        head = f"POST /v1/completions HTTP/{version}\r\nHost: here\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        self.writer.write(head.encode() + body)

    async def head(self) -> dict[str, str]:
        async with asyncio.timeout(READ_TIMEOUT_S):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        named = [line.split(": ", 1) for line in lines[1:] if line]
        return {"status": lines[0], **{name.lower(): value for name, value in named}}

    async def chunked_body(self) -> bytes:
        body = b""
        async with asyncio.timeout(READ_TIMEOUT_S):
            while size := int(await self.reader.readline(), 16):
                body += await self.reader.readexactly(size)
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
        return body

    async def body(self, length: str) -> bytes:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await self.reader.readexactly(int(length))


@contextlib.asynccontextmanager
async def connected(door: Door, *, limit: int = 1 << 16) -> AsyncIterator[RawClient]:
    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=limit)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()


def text_of(events: bytes) -> str:
    """Of a stream of completions, which must end as it should."""
    lines = [line.removeprefix(b"data: ") for line in events.split(b"\n\n") if line]
    assert lines[-1] == b"[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


async def test_answers_follow_each_other_on_one_connection() -> None:
    async with front_door() as door, connected(door) as client:
        for index in range(3):
            client.ask(headers=f"x-request-id: number-{index}\r\n")
            head = await client.head()
            assert head["status"] == "HTTP/1.1 200 OK"
            assert head["content-type"] == "application/json; charset=utf-8"
            assert head["x-request-id"] == f"number-{index}"
            assert head["date"].endswith("GMT")
            assert json.loads(await client.body(head["content-length"]))["usage"]["completion_tokens"] <= 8
            client.ask(stream=True)
            head = await client.head()
            assert head["content-type"] == "text/event-stream"
            assert head["cache-control"] == "no-cache"
            assert head["transfer-encoding"] == "chunked"
            assert text_of(await client.chunked_body())
        await door.wait_idle()


async def test_an_old_client_gets_a_stream_that_ends_with_its_connection() -> None:
    async with front_door() as door, connected(door) as client:
        client.ask(version="1.0", stream=True)
        head = await client.head()
        assert head["status"] == "HTTP/1.0 200 OK"
        assert head["connection"] == "close"
        assert "transfer-encoding" not in head
        async with asyncio.timeout(READ_TIMEOUT_S):
            assert text_of(await client.reader.read())


async def test_a_client_that_asks_to_close_is_told_so_and_closed() -> None:
    async with front_door() as door, connected(door) as client:
        client.ask(headers="Connection: close\r\n")
        head = await client.head()
        assert head["connection"] == "close"
        await client.body(head["content-length"])
        async with asyncio.timeout(READ_TIMEOUT_S):
            assert await client.reader.read() == b""


async def test_a_stream_says_the_same_as_an_answer_token_by_token() -> None:
    async with front_door() as door, connected(door) as client:
        client.ask(max_tokens=60, ignore_eos=True, seed=1)
        head = await client.head()
        whole = json.loads(await client.body(head["content-length"]))["choices"][0]["text"]
        client.ask(max_tokens=60, ignore_eos=True, seed=1, stream=True)
        await client.head()
        assert text_of(await client.chunked_body()) == whole


async def test_a_client_that_reads_late_gets_everything_in_fewer_events() -> None:
    async with front_door(temper=SLOW, num_tokens_max=8192, send_buffer_bytes=4096) as door:
        async with connected(door, limit=1024) as client:
            client.ask(max_tokens=3000, ignore_eos=True, stream=True, seed=1)
            await client.head()
            await until(lambda: any(story.num_tokens == 3000 for story in stories_of(door)))
            events = await client.chunked_body()
        assert events.count(b"data: ") < 3000
        status, whole = await door.post(
            "/v1/completions",
            {"model": "fake", "prompt": "Hello", "max_tokens": 3000, "ignore_eos": True, "seed": 1},
        )
        assert status == 200
        assert text_of(events) == whole["choices"][0]["text"]
        await door.wait_idle()


def stories_of(door: Door) -> list[RequestStory]:
    shelf = door.door.dispatcher.stories
    return [*shelf._running.values(), *shelf._ended.values()]


async def test_a_client_that_leaves_while_it_is_too_slow_ends_its_request() -> None:
    async with front_door(temper=SLOW, num_tokens_max=8192, send_buffer_bytes=4096) as door:
        async with connected(door, limit=1024) as client:
            client.ask(max_tokens=8000, ignore_eos=True, stream=True)
            await client.head()
            await until(lambda: any(story.num_tokens > 1000 for story in stories_of(door)))
            client.writer.transport.abort()
        await door.wait_idle()


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stop": "zz"}, {"stop": "zz", "stream": True}])
async def test_an_answered_request_leaves_nothing_to_the_garbage_collector(fields: dict[str, Any]) -> None:
    async with front_door() as door, connected(door) as client:
        for is_warm in (False, True):
            gc.collect()
            gc.disable()
            try:
                for _ in range(5):
                    client.ask(ignore_eos=True, **fields)
                    head = await client.head()
                    await (client.chunked_body() if "stream" in fields else client.body(head["content-length"]))
                await door.wait_idle()
                left = garbage_of("orchestrator.")
            finally:
                gc.enable()
            assert not (is_warm and left)


def garbage_of(package: str) -> list[str]:
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [type(left).__name__ for left in gc.garbage if type(left).__module__.startswith(package)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
