"""Bytes at an HTTP port that no client of good will would send, and what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Final

BODY: Final = b'{"model": "m", "prompt": "a", "max_tokens": 1}'
LENGTH: Final = b"content-length: %d\r\n" % len(BODY)
HEAD: Final = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
CHUNKED: Final = b"transfer-encoding: chunked\r\n"
CHUNKS: Final = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
GET: Final = b"GET /version HTTP/1.1\r\nhost: here\r\n\r\n"

SMUGGLED: Final = {
    "a length twice": HEAD + LENGTH + LENGTH + b"\r\n" + BODY,
    "two lengths": HEAD + LENGTH + b"content-length: 5\r\n\r\n" + BODY,
    "chunks and a length": HEAD + CHUNKED + LENGTH + b"\r\n" + CHUNKS,
    "a length and chunks": HEAD + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "an unknown coding": HEAD + b"transfer-encoding: xchunked\r\n\r\n" + CHUNKS,
    "two codings": HEAD + CHUNKED + b"transfer-encoding: identity\r\n\r\n" + CHUNKS,
    "a negative length": HEAD + b"content-length: -1\r\n\r\n" + BODY,
    "a length with a sign": HEAD + b"content-length: +46\r\n\r\n" + BODY,
    "a length of thirty digits": HEAD + b"content-length: " + b"9" * 30 + b"\r\n\r\n",
    "a space before the colon": HEAD + b"content-length : 46\r\n\r\n" + BODY,
    "a folded header": HEAD + b"x: a\r\n b\r\n" + LENGTH + b"\r\n" + BODY,
    "line feeds alone": HEAD.replace(b"\r\n", b"\n") + LENGTH.replace(b"\r\n", b"\n") + b"\n" + BODY,
    "a zero byte in a header": HEAD + b"x: a\0b\r\n" + LENGTH + b"\r\n" + BODY,
    "a chunk of no length": HEAD + CHUNKED + b"\r\nffffffffffffffffff\r\n",
    "no host": b"GET /version HTTP/1.1\r\n\r\n",
    "another protocol": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "noise": bytes(range(128, 256)) + b"\r\n\r\n",
}
"""What two readers of HTTP may take for different requests, or for none."""

TOO_LARGE: Final = {
    "a line of 100 kB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: here\r\n\r\n",
    "a header of 100 kB": HEAD + b"x: " + b"y" * 100_000 + b"\r\n\r\n",
    "ten thousand headers": HEAD + b"".join(b"h%d: 1\r\n" % number for number in range(10_000)) + b"\r\n",
}

STALLED: Final = {
    "half a line": b"POST /v1/comp",
    "half a head": HEAD,
    "a body of a gigabyte that does not come": HEAD + b"content-length: 1000000000\r\n\r\n",
    "half a body": HEAD + LENGTH + b"\r\n" + BODY[:10],
    "half a chunk": HEAD + CHUNKED + b"\r\n" + CHUNKS[:10],
    "a chunk's extension without an end": HEAD + CHUNKED + b"\r\n1;" + b"a" * 1000,
}
"""What stops in the middle."""


async def said(port: int, message: bytes, *, within_s: float) -> bytes:
    """All that is answered until the other end closes.

    Raises TimeoutError when it neither closes nor says anything that ends.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        async with asyncio.timeout(within_s):
            with contextlib.suppress(ConnectionError):
                writer.write(message)
                await writer.drain()
                while piece := await reader.read(65536):
                    answer += piece
    finally:
        writer.transport.abort()
    return answer


def statuses(answer: bytes) -> list[int]:
    """Of every response in `answer`."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]
