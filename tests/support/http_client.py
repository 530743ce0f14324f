"""A connection to a front door on which nothing is interpreted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import orjson

READ_TIMEOUT_S: Final = 100.0


def request(path: str = "/v1/completions", *headers: str, **fields: Any) -> bytes:
    """A whole one, as clients send it."""
    body = orjson.dumps({"model": "fake", "prompt": "Hello", "max_tokens": 8, "seed": 1, "temperature": 0, **fields})
    lines = [f"POST {path} HTTP/1.1", "Host: here", "Content-Type: application/json", *headers]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.was_reset = False
        """Whatever had come and was not read yet is lost then."""

    def send(self, message: bytes) -> None:
        self.writer.write(message)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next one: its status, its headers by their names in lower case, and its body."""
        async with asyncio.timeout(READ_TIMEOUT_S):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self._chunks()
        return int(first.split()[1]), headers, body

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        assert await self.reader.readexactly(2) == b"\r\n"
        return body

    async def rest(self) -> bytes:
        """Until the other end closes, in whichever way."""
        async with asyncio.timeout(READ_TIMEOUT_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                self.was_reset = True
                # A reader keeps to itself what came before that.
                return bytes(self.reader._buffer)  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def connected(port: int, **options: Any) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
