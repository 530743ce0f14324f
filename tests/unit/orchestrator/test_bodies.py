"""Bodies that do not come, or are going to be too large."""

from __future__ import annotations

import asyncio
import json

import pytest

from orchestrator.api import bodies
from tests.support.front_door import Door, front_door

READ_TIMEOUT_S = 20.0
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: here\r\n"


async def answer_to(door: Door, message: bytes) -> tuple[int, dict[str, object]]:
    """Status and body of what comes until the connection is closed."""
    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(message)
        async with asyncio.timeout(READ_TIMEOUT_S):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
        return int(head.split()[1]), json.loads(body)["error"]
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("framing", ["Content-Length: 100\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n5\r\n{"])
async def test_a_client_who_stops_in_its_body_is_told_and_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)
    async with front_door() as door:
        status, error = await answer_to(door, f"{HEAD}{framing}".encode())
        assert status == 408
        assert "the body did not come" in str(error["message"])


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes() -> None:
    async with front_door() as door:
        status, error = await answer_to(door, f"{HEAD}Content-Length: 10000000000\r\n\r\n{{".encode())
        assert status == 413
        assert "limit" in str(error["message"])


async def test_a_body_in_many_pieces_is_read_as_a_whole() -> None:
    async with front_door() as door:
        body = json.dumps({"model": "fake", "prompt": "Hello", "max_tokens": 0}).encode()
        pieces = b"".join(b"%x\r\n%b\r\n" % (1, body[at : at + 1]) for at in range(len(body)))
        message = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + pieces + b"0\r\n\r\n"
        status, error = await answer_to(door, message)
        assert (status, error["param"]) == (400, "max_tokens")
